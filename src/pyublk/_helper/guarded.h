/* SPDX-License-Identifier: MIT
 * The disks whose server this helper watches over.
 */
#ifndef PU_GUARDED_H
#define PU_GUARDED_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "../_core/protocol.h"

struct guarded {
	struct guarded *next;
	uint32_t id;
	uint64_t cookie;
	bool restarted; /* served again after its server's end, in place of being deleted */
	int memory;	/* its bytes, for the next server; -1: elsewhere */
	uint32_t hang_ms;
	int64_t looked;	   /* when it was looked at last */
	uint64_t answered; /* requests until then */
	int64_t since;	   /* when it answered one last, or had none to answer */
};

extern struct guarded *guarded;

/* Where the command line is, which shows the disks from then on, as far as there is room; it begins as
 * the server's does that is spared by systemd. */
void guarded_shown(char *title, size_t room, int server_pid);
/* As the message says; `memory`, if there is one, is ours from now on. 0 or -errno. */
int guard(const struct pu_ask *ask, int memory);
void unguard(uint32_t id);

#endif
