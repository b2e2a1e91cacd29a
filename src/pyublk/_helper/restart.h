/* SPDX-License-Identifier: MIT
 * The program that has a dead server's disks served again: what it is, and its process.
 *
 * What is to be done, how often and when to give up is the program's business. Here it is only started, and
 * started again, a few times and ever later, when it fails: killed, or without the memory to begin.
 */
#ifndef PU_RESTART_H
#define PU_RESTART_H

#include "guarded.h"

enum restart_state {
	RESTART_GOES_ON,
	RESTART_DONE,	  /* the disks are in other hands, or gone */
	RESTART_GIVEN_UP, /* it has failed too often */
};

/* Takes the file of PU_ASK_PROGRAM, in place of the one before. 0 or -errno. */
int restart_take_program(int file);
bool restart_has_program(void);
/* The server has ended, `hung`: because it was killed for it. */
enum restart_state restart_begin(bool hung);
/* To be polled for; -1: no process runs now. */
int restart_pidfd(void);
/* Milliseconds to the next start; -1: none is due. */
int restart_next_start(void);
/* When pidfd or time have come. */
enum restart_state restart_go_on(void);
/* What the programs that it starts get for their oom_score_adj, where this one's is no good. */
void restart_with_oom_score(const char *text);

#endif
