/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "watch.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>

#include "libc.h"
#include "queue.h"

unsigned int pu_watch_seconds = 2; /* so a wait of 4 s is told of within 8 */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t some = PTHREAD_COND_INITIALIZER;
static struct pu_watch *first;
static void (*take)(void);
static int watchers; /* the process whose threads look; a fork does not take threads along */
static bool stopped;
static _Atomic uint32_t turns; /* odd while the one thread waits for the GIL */
static uint32_t seen, looks;   /* the other one's: at the last look; since then */

static const char WHAT[] =
	"pyublk: some thread of this process (%d) has kept Python's GIL for %d seconds, and without "
	"it nobody serves%s. One that waits for such a disk with the GIL in its hands, as in a page "
	"fault of its own mapping (mmap) or in a C extension that reads it, waits for ever: let "
	"another process do that. A long call that does not let go of the GIL ends by itself.\n";

/* With the lock. */
static void tell(int fd)
{
	char disks[512] = "", text[sizeof(WHAT) + sizeof(disks) + 32];
	size_t used = 0;
	int length;

	for (const struct pu_watch *watch = first; watch && used < sizeof(disks) - 96;
	     watch = watch->next)
		used += (size_t)sprintf(disks + used, "%s /dev/ublkb%u (queue %u, thread %d: %u held)",
					used ? "," : "", watch->disk, (unsigned int)watch->queue->id,
					watch->thread, (unsigned int)pu_queue_held(watch->queue));
	length = snprintf(text, sizeof(text), WHAT, (int)getpid(),
			  (int)pu_watch_seconds * PU_WATCH_LOOKS, disks);
	if (write(fd, text, (size_t)length) < 0)
		return; /* there is nobody else to tell */
}

bool pu_watch_look(int fd)
{
	uint32_t now = atomic_load(&turns);
	bool told;

	if (!(now & 1) || now != seen) {
		seen = now;
		looks = 0;
		return false;
	}
	if (++looks != PU_WATCH_LOOKS) /* once */
		return false;
	pthread_mutex_lock(&lock);
	told = first != NULL;
	if (told)
		tell(fd);
	pthread_mutex_unlock(&lock);
	return told;
}

void pu_watch_probe(void)
{
	void (*take_gil)(void);

	pthread_mutex_lock(&lock);
	while (!first || stopped)
		pthread_cond_wait(&some, &lock);
	take_gil = take;
	pthread_mutex_unlock(&lock);
	atomic_fetch_add(&turns, 1);
	take_gil();
	atomic_fetch_add(&turns, 1);
}

static void pause_a_while(void)
{
	const struct timespec pause = {.tv_sec = pu_watch_seconds};

	nanosleep(&pause, NULL);
}

static void *probe(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, "ublk-gil", 0, 0, 0);
	for (;;) {
		pause_a_while();
		pu_watch_probe();
	}
	return NULL;
}

static void *look(void *unused)
{
	(void)unused;
	prctl(PR_SET_NAME, "ublk-watch", 0, 0, 0);
	for (;;) {
		pause_a_while();
		pthread_mutex_lock(&lock);
		while (!first)
			pthread_cond_wait(&some, &lock);
		pthread_mutex_unlock(&lock);
		pu_watch_look(STDERR_FILENO);
	}
	return NULL;
}

/* In a forked child: nobody looks, and what is on the list belongs to the parent. */
static void forget(void)
{
	pthread_mutex_init(&lock, NULL);
	pthread_cond_init(&some, NULL);
	first = NULL;
	atomic_store(&turns, 0);
}

/* With the lock. Signals are for Python's own threads. */
static void have_watchers(void)
{
	static bool forks_are_known;
	sigset_t all, before;
	pthread_attr_t attributes;
	pthread_t thread;

	if (watchers == getpid())
		return;
	watchers = getpid();
	if (!forks_are_known)
		forks_are_known = !pthread_atfork(NULL, NULL, forget);
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	pthread_attr_setstacksize(&attributes, 256 << 10);
	if (!pthread_create(&thread, &attributes, look, NULL))
		pthread_create(&thread, &attributes, probe, NULL);
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void pu_watch_begin(struct pu_watch *watch, const struct pu_queue *q, void (*take_gil)(void))
{
	struct stat status;

	if (fstat(q->cdev, &status) < 0)
		return;
	watch->queue = q;
	watch->disk = minor(status.st_rdev); /* ublk_drv numbers its char devices so */
	watch->thread = gettid();
	watch->process = getpid();
	pthread_mutex_lock(&lock);
	take = take_gil;
	have_watchers();
	watch->previous = NULL;
	watch->next = first;
	if (first)
		first->previous = watch;
	first = watch;
	pthread_cond_broadcast(&some);
	pthread_mutex_unlock(&lock);
}

void pu_watch_end(struct pu_watch *watch)
{
	if (watch->process != getpid()) /* never begun, or by the process that forked this one */
		return;
	pthread_mutex_lock(&lock);
	watch->process = 0;
	if (watch->next)
		watch->next->previous = watch->previous;
	if (watch->previous)
		watch->previous->next = watch->next;
	else
		first = watch->next;
	pthread_mutex_unlock(&lock);
}

void pu_watch_stop(void)
{
	pthread_mutex_lock(&lock);
	stopped = true;
	pthread_mutex_unlock(&lock);
}
