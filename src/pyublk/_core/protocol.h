/* SPDX-License-Identifier: MIT
 * What a process and its helper say to each other, a message each over a SOCK_SEQPACKET.
 */
#ifndef PU_HELPER_PROTOCOL_H
#define PU_HELPER_PROTOCOL_H

#include <stdint.h>

#include "ublk.h"

enum pu_ask_kind {
	PU_ASK_NODE,	/* the control node comes along; no answer */
	PU_ASK_COMMAND, /* a control command; its buffer follows, and comes back with the answer */
	PU_ASK_WRITE,	/* a path and a text follow, each ended by a 0: a file of sysfs */
	PU_ASK_CANCEL,	/* nobody waits for `id` any more; no answer of its own */
	PU_ASK_GUARD,	/* cmd.dev_id of that cookie is deleted when the asker ends; no answer without an id */
	PU_ASK_UNGUARD, /* it is kept */
	PU_ASK_PROGRAM, /* what serves disks again comes along, as a file: see RESTARTED */
};

enum { /* pu_ask.flags */
	PU_ASK_GUARDED = 1u << 0, /* ADD_DEV: the new device is guarded from its first moment */
	PU_ASK_MEMORY = 1u << 1,  /* REG_BUF: the memory is a file, which comes along */
	PU_ASK_READ_ONLY = 1u << 2,
	/* GUARD: when the asker ends, the program is executed, once for all such disks, and they are
	 * deleted only when it fails again and again. Its file has words, each ended by a 0: those of
	 * the command, an empty one, and those of the environment. To the command come "ended", or
	 * "hung" when the asker was killed for it, and ID:COOKIE for each disk; for one with MEMORY, a
	 * file that comes along, ID:COOKIE:DESCRIPTOR. */
	PU_ASK_RESTARTED = 1u << 3,
};

struct pu_ask {
	uint64_t id;
	uint32_t kind;
	uint32_t flags;
	uint32_t cmd_op;
	uint32_t hang_ms; /* GUARD: the asker is killed when the disk answers nothing for so long; 0: never */
	uint64_t cookie;
	uint64_t file_offset, file_bytes; /* MEMORY */
	struct pu_ctrl_cmd cmd;		  /* addr and len are the helper's to set */
};

struct pu_answer {
	uint64_t id;
	int32_t stage; /* enum pu_control_stage */
	int32_t result;
};

enum pu_control_stage { /* how far it came: tells whose error `result` is */
	PU_CONTROL_STARTING,
	PU_CONTROL_RING,   /* io_uring_setup refused */
	PU_CONTROL_SUBMIT, /* io_uring_enter refused */
	PU_CONTROL_DONE,   /* the command's own result */
};

#define PU_MESSAGE_BYTES 16384u /* the longest message, payload included */

#endif
