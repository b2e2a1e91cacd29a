/* SPDX-License-Identifier: MIT
 * Serving a queue from an NBD server, by the queue's own ring
 *
 * A queue has links: stream sockets on which the handshake is over (Python's business), each with at
 * most one send and one receive under way. A send takes all that waits, headers and data; a receive
 * takes the rest of a read's data to where it belongs, and what follows to a buffer from which
 * small answers are copied. Nothing is allocated while requests are served.
 *
 * A link that ends, or whose server says what it must not, is broken: no byte of it is believed any
 * more. Its requests are held until somebody says that the server is done with them
 * (pu_nbd_release), since else an old write that the server still has might come after a new one. Then
 * they go out again, over whichever link is up.
 */
#ifndef PU_NBD_H
#define PU_NBD_H

#include <sys/socket.h>
#include <sys/uio.h>

#include "queue.h"

#define PU_NBD_MAX_LINKS 16u
#define PU_NBD_SENDS 32u /* requests in one send */
#define PU_NBD_HEADER 28u
#define PU_NBD_REPLY 16u
#define PU_NBD_STAGING 32768u

/* Why a link is broken: an errno, or one of these. */
enum pu_nbd_reason {
	PU_NBD_CLOSED = 1000,  /* the server closed it */
	PU_NBD_SHUTTING_DOWN,  /* it says that it ends */
	PU_NBD_BAD_MAGIC,      /* what came is not an answer */
	PU_NBD_UNKNOWN_COOKIE, /* it answers what was not asked, or is answered already */
};

enum pu_nbd_link_state { PU_NBD_DOWN, PU_NBD_UP, PU_NBD_BREAKING };

struct pu_nbd_list { /* of tags, by their requests' `next` */
	uint32_t count;
	uint16_t first, last;
};

struct pu_nbd_link {
	enum pu_nbd_link_state state;
	int fd; /* the caller's, which keeps it open until the link is told to be down */
	int reason;
	bool to_tell; /* it is down, and nobody has been told */
	bool sending, receiving;
	bool standing; /* the receive uses no request's memory */
	struct pu_nbd_list to_send;
	uint32_t nr_sent; /* requests in the send under way, or that goes on */
	uint16_t sent[PU_NBD_SENDS];
	uint8_t headers[PU_NBD_SENDS][PU_NBD_HEADER];
	struct iovec out[2 * PU_NBD_SENDS];
	struct msghdr out_message;

	uint8_t *staging;
	uint32_t filled, parsed;
	bool large; /* the last answer was: the next one's data is not to pass through staging */
	bool drained; /* the last receive got less than it asked for */
	uint64_t asked;
	uint16_t tag; /* whose data comes, while `rest` */
	uint64_t rest;
	uint8_t *into;
	struct iovec in[2];
	struct msghdr in_message;

	/* Read by other threads. */
	uint32_t pending; /* requests given to it */
	uint64_t replies;
	/* Written by them: -1, or a socket to take up; a reason to break it, or 0; its requests may go
	 * elsewhere. */
	int offered, drop;
	bool release;
};

struct pu_nbd_request {
	uint64_t cookie; /* of its last sending: the tag is in the low 16 bits */
	uint64_t offset;
	uint32_t length;
	uint32_t generation; /* of the tag */
	uint8_t *memory;
	uint16_t type, flags;
	uint16_t link, next;
	uint8_t state;
	bool early; /* answered before the kernel said that it was sent */
	int early_result;
};

struct pu_nbd {
	struct pu_queue *q;
	struct pu_nbd_request *requests; /* for each tag */
	struct pu_nbd_link *links;
	uint32_t nr_links;
	struct pu_nbd_list waiting; /* for a link */
	uint64_t cookies;
	uint64_t resent; /* read by other threads */
	bool to_tell;	 /* some link has something to tell */
	bool ending;	 /* some link is breaking */
	bool stopped;
	bool ordered;	 /* other threads want something */
	bool fail;	 /* requests that find no link fail; written by other threads */
};

/* Completions that the ring needs room for beside the tags' own. */
uint32_t pu_nbd_entries(uint32_t nr_links);

/* The queue has nr_links empty places for files behind the char device. 0 or -errno. */
int pu_nbd_open(struct pu_nbd *n, struct pu_queue *q, uint32_t nr_links);
/* Before the queue is closed, by whoever closes it: nothing begins any more, and the server is told. */
void pu_nbd_stop(struct pu_nbd *n);
/* With the queue closed (true, all is over), but not freed. */
void pu_nbd_close(struct pu_nbd *n);

/* Nothing more is sent on a socket: the server ends when it has done what it was asked. */
void pu_nbd_shut(int fd);

/* Waits and serves: 0, or -errno as pu_queue_wait. With to_tell set, the caller takes what there is
 * to tell (pu_nbd_tell). */
int pu_nbd_turn(struct pu_nbd *n, int64_t timeout_ns);

/* The next link that went down: its number, with *reason; -1: none, and to_tell is not set any
 * more. Its socket is the caller's again. Owner thread only. */
int pu_nbd_tell(struct pu_nbd *n, int *reason);

/* The rest is said by any thread, and done with the owner's next turn. */

/* A socket for a link that is down. */
void pu_nbd_attach(struct pu_nbd *n, uint32_t link, int fd);
/* Breaks a link that is up. */
void pu_nbd_drop(struct pu_nbd *n, uint32_t link, int reason);
/* The server is done with what it had by a link that is down: its requests go out again. */
void pu_nbd_release(struct pu_nbd *n, uint32_t link);
/* Whether requests for which there is no link fail with EIO, those that wait for one too. A link that
 * is attached ends that. */
void pu_nbd_set_fail(struct pu_nbd *n, bool fail);

#endif
