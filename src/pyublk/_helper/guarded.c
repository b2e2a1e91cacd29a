/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "guarded.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct guarded *guarded;

static char *title;
static size_t title_room;
static const char *spared = ""; /* systemd lets those live that begin with an @: service/title.py */

static void show(void)
{
	size_t at = (size_t)snprintf(title, title_room, "%spyublk-helper:", spared);

	for (struct guarded *one = guarded; one && at < title_room; one = one->next)
		at += (size_t)snprintf(title + at, title_room - at, " ublkb%u", one->id);
	if (at < title_room)
		memset(title + at, 0, title_room - at);
}

void guarded_shown(char *where, size_t room, int server_pid)
{
	char place[32], first = 0;
	int file;

	title = where;
	title_room = room;
	snprintf(place, sizeof(place), "/proc/%d/cmdline", server_pid);
	file = open(place, O_RDONLY | O_CLOEXEC);
	if (file >= 0) {
		if (read(file, &first, 1) == 1 && first == '@')
			spared = "@";
		close(file);
	}
	show();
}

void unguard(uint32_t id)
{
	for (struct guarded **at = &guarded; *at; at = &(*at)->next)
		if ((*at)->id == id) {
			struct guarded *old = *at;

			*at = old->next;
			if (old->memory >= 0)
				close(old->memory);
			free(old);
			show();
			return;
		}
}

int guard(const struct pu_ask *ask, int memory)
{
	struct guarded *new = malloc(sizeof(*new));

	if (!new) {
		if (memory >= 0)
			close(memory);
		return -ENOMEM;
	}
	unguard(ask->cmd.dev_id);
	*new = (struct guarded){ .next = guarded, .id = ask->cmd.dev_id, .cookie = ask->cookie,
				 .restarted = ask->flags & PU_ASK_RESTARTED, .memory = memory,
				 .hang_ms = ask->hang_ms };
	guarded = new;
	show();
	return 0;
}
