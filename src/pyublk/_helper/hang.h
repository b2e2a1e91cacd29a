/* SPDX-License-Identifier: MIT
 * Whether a disk answers, by the kernel's own counters: no request is sent, and none costs more.
 */
#ifndef PU_HANG_H
#define PU_HANG_H

#include "guarded.h"

int64_t now_ms(void);
/* Milliseconds to the next look; -1: none of the disks wants one. */
int hang_next_look(void);
/* Whether the disk has had requests, and answered none of them, for as long as it may. It is looked at when
 * it is time to. */
bool hang_seen(struct guarded *disk);

#endif
