/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "watch.h"

#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "open.h"

static pthread_mutex_t gil = PTHREAD_MUTEX_INITIALIZER;
static pthread_barrier_t begun;
static struct pu_queue queue;
static int ends[2];

static void take_gil(void)
{
	pthread_mutex_lock(&gil);
	pthread_mutex_unlock(&gil);
}

static void take_gil_and_tell(void)
{
	pthread_barrier_wait(&begun);
	take_gil();
}

static void *probe(void *unused)
{
	pu_watch_probe();
	return unused;
}

static int looks(int times)
{
	int told = 0;

	while (times--)
		told += pu_watch_look(ends[1]);
	return told;
}

static void keep_gil_and_look(void)
{
	char text[2048] = "";
	pthread_t thread;

	pthread_mutex_lock(&gil);
	CHECK_EQUAL(pthread_create(&thread, NULL, probe, NULL), 0);
	pthread_barrier_wait(&begun);
	CHECK_EQUAL(looks(PU_WATCH_LOOKS), 0);
	CHECK_EQUAL(looks(1), 1);
	CHECK(read(ends[0], text, sizeof(text) - 1) > 0);
	CHECK(strstr(text, "has kept Python's GIL for 7200 seconds"));
	CHECK(strstr(text, " /dev/ublkb"));
	CHECK(strstr(text, "(queue 7, thread "));
	CHECK(text[strlen(text) - 1] == '\n');
	CHECK_EQUAL(looks(100), 0); /* once */
	pthread_mutex_unlock(&gil);
	CHECK_EQUAL(pthread_join(thread, NULL), 0);
	CHECK_EQUAL(looks(100), 0);
}

static void test_a_gil_that_is_kept(void)
{
	struct pu_watch watch = {0}, other = {0};

	pu_watch_begin(&watch, &queue, take_gil_and_tell);
	pu_watch_begin(&other, &queue, take_gil_and_tell);
	keep_gil_and_look();
	pu_watch_end(&other);
	pu_watch_end(&other); /* twice is nothing */
	keep_gil_and_look(); /* anew */
	pu_watch_end(&watch);
}

/* However often it is seen waiting: as long as it gets the GIL in between, nothing is wrong. */
static void test_a_gil_that_is_busy(void)
{
	struct pu_watch watch = {0};
	pthread_t thread;

	pu_watch_begin(&watch, &queue, take_gil_and_tell);
	for (int i = 0; i < 20; i++) {
		pthread_mutex_lock(&gil);
		CHECK_EQUAL(pthread_create(&thread, NULL, probe, NULL), 0);
		pthread_barrier_wait(&begun);
		CHECK_EQUAL(looks(PU_WATCH_LOOKS), 0);
		pthread_mutex_unlock(&gil);
		CHECK_EQUAL(pthread_join(thread, NULL), 0);
	}
	pu_watch_end(&watch);
}

#ifndef __SANITIZE_THREAD__ /* which cannot have threads after a fork */
/* What a parent watches is not a child's, which has a list, and threads, of its own. */
static void test_a_fork(void)
{
	struct pu_watch parents = {0};
	int status;
	pid_t child;

	pu_watch_begin(&parents, &queue, take_gil_and_tell);
	child = fork();
	if (!child) {
		struct pu_watch own = {0};

		pu_watch_end(&parents);
		pu_watch_begin(&own, &queue, take_gil_and_tell);
		keep_gil_and_look();
		pu_watch_end(&own);
		_exit(0);
	}
	CHECK_EQUAL(waitpid(child, &status, 0), child);
	CHECK_EQUAL(status, 0);
	pu_watch_end(&parents);
}
#endif

static void *come_and_go(void *unused)
{
	struct pu_watch watch = {0};

	for (int i = 0; i < 300; i++) {
		pu_watch_begin(&watch, &queue, take_gil);
		pu_watch_end(&watch);
	}
	return unused;
}

static void test_threads(void)
{
	pthread_t threads[3];

	for (int i = 0; i < 3; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, come_and_go, NULL), 0);
	for (int i = 0; i < 3; i++)
		CHECK_EQUAL(pthread_join(threads[i], NULL), 0);
}

int main(void)
{
	pu_watch_seconds = 3600; /* the core's own threads are not to interfere */
	CHECK_EQUAL(pipe2(ends, O_NONBLOCK), 0);
	CHECK_EQUAL(pthread_barrier_init(&begun, NULL, 2), 0);
	queue.cdev = ends[0];
	queue.id = 7;
	test_a_gil_that_is_kept();
	test_a_gil_that_is_busy();
#ifndef __SANITIZE_THREAD__
	test_a_fork();
#endif
	test_threads();
	return 0;
}
