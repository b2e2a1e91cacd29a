/* SPDX-License-Identifier: MIT */
#define _GNU_SOURCE
#include "gate.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "tapping.h"

#define UNTIL_RELEASED INT64_MAX

/* ---- a queue's gate ---- */

int pu_gate_open(struct pu_queue *q, struct pu_rules *rules)
{
	struct pu_gate *gate = calloc(1, sizeof(*gate));

	if (!gate)
		return -ENOMEM;
	gate->rules = rules;
	gate->q = q;
	q->gate = gate;
	pthread_mutex_lock(&rules->lock);
	gate->next = rules->gates;
	rules->gates = gate;
	if (rules->set) {
		pthread_mutex_lock(&q->inbox_lock);
		pu_rules_arm(q, gate);
		pthread_mutex_unlock(&q->inbox_lock);
	}
	pthread_mutex_unlock(&rules->lock);
	return 0;
}

static void forget(struct pu_gate *gate, uint16_t tag);

void pu_gate_close(struct pu_queue *q)
{
	struct pu_gate *gate = q->gate, **link;

	if (!gate || !gate->rules)
		return;
	pthread_mutex_lock(&gate->rules->lock);
	for (link = &gate->rules->gates; *link; link = &(*link)->next)
		if (*link == gate) {
			*link = gate->next;
			break;
		}
	pthread_mutex_unlock(&gate->rules->lock);
	gate->rules = NULL;
	pthread_mutex_lock(&q->inbox_lock);
	pu_rules_arm(q, NULL);
	pthread_mutex_unlock(&q->inbox_lock);
	for (uint32_t tag = 0; gate->kept && tag < q->depth; tag++)
		forget(gate, (uint16_t)tag);
}

int pu_gate_leave_device(struct pu_queue *q)
{
	int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
	const void *kernels = q->gate->kernels;

	if (!kernels)
		return 0;
	return mmap((void *)kernels, q->desc_bytes, PROT_READ, flags, -1, 0) == MAP_FAILED ? -errno : 0;
}

void pu_gate_free(struct pu_queue *q)
{
	if (!q->gate)
		return;
	if (q->gate->kernels && q->process == pu_process())
		munmap((void *)q->gate->kernels, q->desc_bytes);
	free(q->gate->kept);
	free(q->gate->heap);
	free(q->gate);
	q->gate = NULL;
}

/* ---- what is kept, the first one due at the top of a heap ---- */

static int64_t due_at(const struct pu_gate *gate, uint32_t place)
{
	return gate->kept[gate->heap[place]].due_ns;
}

static void put_at(struct pu_gate *gate, uint32_t place, uint16_t tag)
{
	gate->heap[place] = tag;
	gate->kept[tag].place = place + 1;
}

static void rise(struct pu_gate *gate, uint32_t place)
{
	uint16_t tag = gate->heap[place];
	int64_t due_ns = gate->kept[tag].due_ns;

	while (place && due_at(gate, (place - 1) / 2) > due_ns) {
		put_at(gate, place, gate->heap[(place - 1) / 2]);
		place = (place - 1) / 2;
	}
	put_at(gate, place, tag);
}

static void sink(struct pu_gate *gate, uint32_t place)
{
	uint16_t tag = gate->heap[place];
	int64_t due_ns = gate->kept[tag].due_ns;
	uint32_t below;

	while ((below = place * 2 + 1) < gate->nr_kept) {
		if (below + 1 < gate->nr_kept && due_at(gate, below + 1) < due_at(gate, below))
			below++;
		if (due_at(gate, below) >= due_ns)
			break;
		put_at(gate, place, gate->heap[below]);
		place = below;
	}
	put_at(gate, place, tag);
}

static void keep(struct pu_gate *gate, uint16_t tag)
{
	put_at(gate, gate->nr_kept++, tag);
	rise(gate, gate->nr_kept - 1);
}

static void take_out(struct pu_gate *gate, uint16_t tag)
{
	uint32_t place = gate->kept[tag].place - 1;
	uint16_t last = gate->heap[--gate->nr_kept];

	gate->kept[tag].place = 0;
	if (last == tag)
		return;
	put_at(gate, place, last);
	rise(gate, place);
	sink(gate, gate->kept[last].place - 1);
}

/* Nothing is known of the tag's request any more. */
static void forget(struct pu_gate *gate, uint16_t tag)
{
	struct pu_kept *kept = &gate->kept[tag];

	if (kept->place)
		take_out(gate, tag);
	if (kept->sectors || kept->at_end || kept->past)
		gate->nr_changed--;
	pu_rule_put(kept->holder);
	pu_rule_put(kept->at_end);
	pu_rule_put(kept->past);
	*kept = (struct pu_kept){ 0 };
}

/* ---- descriptors ---- */

/* A copy takes the place of the kernel's descriptors, at once for all who look at them; those are
 * mapped anew somewhere else. */
static int copy_descriptors(struct pu_queue *q)
{
	size_t stride = PU_MAX_DEPTH * sizeof(struct pu_desc);
	void *copy, *kernels;

	copy = mmap(NULL, q->desc_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (copy == MAP_FAILED)
		return -errno;
	kernels = mmap(NULL, q->desc_bytes, PROT_READ, MAP_SHARED, q->cdev, (off_t)(q->id * stride));
	if (kernels == MAP_FAILED || madvise(kernels, q->desc_bytes, MADV_DONTFORK) ||
	    madvise(copy, q->desc_bytes, MADV_DONTFORK))
		goto failed;
	memcpy(copy, kernels, q->depth * sizeof(*q->desc));
	if (mremap(copy, q->desc_bytes, q->desc_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, q->desc) ==
	    MAP_FAILED)
		goto failed;
	q->gate->kernels = kernels;
	/* Who severed it meanwhile has not seen them. */
	return __atomic_load_n(&q->severed, __ATOMIC_ACQUIRE) ? pu_gate_leave_device(q) : 0;
failed:
	munmap(copy, q->desc_bytes);
	if (kernels != MAP_FAILED)
		munmap(kernels, q->desc_bytes);
	return -ENOMEM;
}

void pu_gate_see(struct pu_queue *q, uint16_t tag)
{
	if (q->gate->kernels)
		q->desc[tag] = q->gate->kernels[tag];
}

/* ---- requests ---- */

static int prepare(struct pu_queue *q, const struct pu_rule_set *set)
{
	struct pu_gate *gate = q->gate;

	if (!gate->kept) {
		gate->heap = calloc(q->depth, sizeof(*gate->heap));
		gate->kept = calloc(q->depth, sizeof(*gate->kept));
		if (!gate->heap || !gate->kept) {
			free(gate->heap);
			free(gate->kept);
			gate->heap = NULL;
			gate->kept = NULL;
			return -ENOMEM;
		}
	}
	if (set && set->changes_requests && !q->loopback && !gate->kernels)
		return copy_descriptors(q);
	return 0;
}

static void change(struct pu_gate *gate, uint16_t tag, struct pu_rule *rule)
{
	struct pu_kept *kept = &gate->kept[tag];
	struct pu_desc *desc = &gate->q->desc[tag];
	uint64_t length = (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT;
	uint64_t size = __atomic_load_n(&gate->rules->size, __ATOMIC_RELAXED);
	uint64_t place = rule->spec.place;

	if (rule->spec.action == PU_ACT_STALE) {
		kept->stale = kept->past == rule;
		return;
	}
	if (!kept->past)
		gate->nr_changed++;
	if (rule->spec.action == PU_ACT_ROT) {
		kept->at_end = pu_rule_get(rule);
		return;
	}
	kept->sectors = desc->nr_sectors;
	if (rule->spec.action == PU_ACT_TEAR) {
		if (rule->spec.amount < desc->nr_sectors)
			desc->nr_sectors = rule->spec.amount;
		return;
	}
	if (size && place + length > size) /* what is beyond is nobody's */
		place = size - length;
	desc->start_sector = place >> PU_SECTOR_SHIFT;
}

/* What passes becomes a rule's past, whether or not the rule fires for it. */
static void join_past(struct pu_gate *gate, uint16_t tag, struct pu_rule *rule)
{
	const struct pu_queue *q = gate->q;
	const struct pu_desc *desc = &q->desc[tag];
	struct pu_kept *kept = &gate->kept[tag];
	uint32_t op = desc->op_flags & 0xff;

	if (op > PU_OP_WRITE || desc->op_flags & PU_FLAG_SHMEM_ZC || !q->copies ||
	    !pu_rule_covers(rule, pu_desc_offset(desc),
			    (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT))
		return;
	if (op == PU_OP_WRITE) {
		pu_past_see(rule->past, desc->start_sector, pu_queue_buffer(q, tag),
			    desc->nr_sectors);
	} else if (!kept->past) {
		gate->nr_changed++;
		kept->past = pu_rule_get(rule);
	}
}

static void hold_by(struct pu_kept *kept, struct pu_rule *rule)
{
	if (kept->holder)
		pu_rule_put(kept->holder);
	kept->holder = pu_rule_get(rule);
}

static void obey(struct pu_gate *gate, uint16_t tag, struct pu_rule *rule)
{
	struct pu_kept *kept = &gate->kept[tag];

	switch (rule->spec.action) {
	case PU_ACT_HANG:
		kept->due_ns = UNTIL_RELEASED;
		hold_by(kept, rule);
		break;
	case PU_ACT_DELAY:
		if (!kept->holder)
			hold_by(kept, rule);
		break;
	case PU_ACT_LIMIT:
		break;
	case PU_ACT_FAIL:
		kept->verdict = -rule->spec.error;
		break;
	case PU_ACT_DROP:
		kept->verdict = 0;
		break;
	default:
		change(gate, tag, rule);
	}
}

/* The bytes from its offset on that a request is about: one of zones names them without any data. */
static uint64_t bytes_of(const struct pu_rules *rules, const struct pu_desc *desc)
{
	switch (desc->op_flags & 0xff) {
	case PU_OP_ZONE_OPEN:
	case PU_OP_ZONE_CLOSE:
	case PU_OP_ZONE_FINISH:
	case PU_OP_ZONE_RESET:
		return __atomic_load_n(&rules->zone_size, __ATOMIC_RELAXED);
	case PU_OP_ZONE_RESET_ALL:
		return __atomic_load_n(&rules->size, __ATOMIC_RELAXED);
	case PU_OP_REPORT_ZONES: /* so many zones, in the place of sectors */
		return __atomic_load_n(&rules->zone_size, __ATOMIC_RELAXED) * desc->nr_sectors;
	default:
		return (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT;
	}
}

int32_t pu_gate_arrive(struct pu_queue *q, uint16_t tag)
{
	struct pu_gate *gate = q->gate;
	uint64_t change;
	struct pu_rule_set *set = pu_rules_get_set(gate->rules, &change);
	const struct pu_desc *desc = &q->desc[tag];
	uint32_t op = desc->op_flags % PU_OP_COUNT;
	uint64_t offset = pu_desc_offset(desc);
	uint64_t length = (uint64_t)desc->nr_sectors << PU_SECTOR_SHIFT;
	uint64_t about = bytes_of(gate->rules, desc);
	int64_t now_ns = pu_now_ns();
	struct pu_kept *kept;
	int error = prepare(q, set);

	if (error) {
		pu_rules_put_set(set);
		return error;
	}
	forget(gate, tag); /* the one before may have been failed from outside */
	kept = &gate->kept[tag];
	kept->generation = pu_tag_generation(&q->tags[tag]);
	kept->verdict = PU_GATE_SERVE;
	kept->change = change;
	if (__atomic_load_n(&gate->rules->open, __ATOMIC_RELAXED)) {
		pu_rules_put_set(set);
		return PU_GATE_SERVE;
	}
	for (uint32_t i = 0; set && i < set->count; i++) {
		struct pu_rule *rule = set->rules[i];

		if (rule->past)
			join_past(gate, tag, rule);
		if (!pu_rule_covers(rule, offset, about) ||
		    !pu_rule_fires(rule, op, offset, length, now_ns, &kept->due_ns))
			continue;
		obey(gate, tag, rule);
		if (rule->spec.action >= PU_ACT_FAIL)
			break;
	}
	pu_rules_put_set(set);
	if (kept->due_ns <= now_ns)
		return kept->verdict;
	keep(gate, tag);
	return PU_GATE_KEEP;
}

/* What somebody has released is due at once. */
static void look_at_changes(struct pu_gate *gate)
{
	uint64_t changes = __atomic_load_n(&gate->rules->changes, __ATOMIC_ACQUIRE);
	bool open = __atomic_load_n(&gate->rules->open, __ATOMIC_RELAXED);

	if (changes == gate->seen)
		return;
	gate->seen = changes;
	for (uint32_t place = 0; place < gate->nr_kept; place++) {
		struct pu_kept *kept = &gate->kept[gate->heap[place]];

		/* Also by who released it before it was held, but after it had met the rule. */
		if (open || (kept->holder && __atomic_load_n(&kept->holder->released,
							     __ATOMIC_RELAXED) > kept->change))
			kept->due_ns = 0;
	}
	for (uint32_t place = gate->nr_kept / 2; place--;)
		sink(gate, place);
}

/* With nothing to do any more, requests pass without a look. */
static void rest(struct pu_gate *gate)
{
	struct pu_rules *rules = gate->rules;

	if (gate->nr_kept || gate->nr_changed || gate->kernels)
		return;
	pthread_mutex_lock(&rules->lock);
	if (!rules->set && gate->seen == rules->changes) {
		pthread_mutex_lock(&gate->q->inbox_lock);
		pu_rules_arm(gate->q, NULL);
		pthread_mutex_unlock(&gate->q->inbox_lock);
	}
	pthread_mutex_unlock(&rules->lock);
}

int32_t pu_gate_next(struct pu_queue *q, int32_t *verdict)
{
	struct pu_gate *gate = q->gate;
	int64_t now_ns = 0;

	look_at_changes(gate);
	while (gate->nr_kept) {
		uint16_t tag = gate->heap[0];
		struct pu_kept *kept = &gate->kept[tag];

		if (kept->due_ns == UNTIL_RELEASED)
			return -1;
		if (!now_ns)
			now_ns = pu_now_ns();
		if (kept->due_ns > now_ns)
			return -1;
		take_out(gate, tag);
		*verdict = kept->verdict;
		if (pu_queue_holds(q, tag, kept->generation)) /* else: failed from outside */
			return tag;
		forget(gate, tag);
	}
	rest(gate);
	return -1;
}

int64_t pu_gate_due(const struct pu_queue *q)
{
	const struct pu_gate *gate = q->gate;
	int64_t due_ns;

	if (!gate || !gate->nr_kept)
		return -1;
	due_ns = gate->kept[gate->heap[0]].due_ns;
	if (due_ns == UNTIL_RELEASED)
		return -1;
	due_ns -= pu_now_ns();
	return due_ns > 0 ? due_ns : 0;
}

uint32_t pu_gate_kept(const struct pu_queue *q)
{
	return q->gate ? q->gate->nr_kept : 0;
}

/* ---- waiting ---- */

static void set_timer(struct pu_queue *q, int64_t due_ns)
{
	struct pu_gate *gate = q->gate;
	struct pu_sqe *sqe;

	if (gate->timing && gate->timer_ns <= due_ns)
		return;
	sqe = pu_ring_next_sqe(&q->ring);
	if (!sqe)
		return;
	gate->timer[0] = due_ns / 1000000000;
	gate->timer[1] = due_ns % 1000000000;
	gate->timer_ns = due_ns;
	if (gate->timing) {
		sqe->opcode = PU_OPCODE_TIMEOUT_REMOVE;
		sqe->fd = -1;
		sqe->addr = PU_USER_DATA(PU_KIND_GATE, 0);
		sqe->off = (uint64_t)(uintptr_t)gate->timer;
		sqe->op_flags = PU_TIMEOUT_UPDATE | PU_TIMEOUT_ABS;
		sqe->user_data = PU_USER_DATA(PU_KIND_NOTHING, 0);
		return;
	}
	sqe->opcode = PU_OPCODE_TIMEOUT;
	sqe->fd = -1;
	sqe->addr = (uint64_t)(uintptr_t)gate->timer;
	sqe->len = 1;
	sqe->op_flags = PU_TIMEOUT_ABS;
	sqe->user_data = PU_USER_DATA(PU_KIND_GATE, 0);
	gate->timing = true;
}

void pu_gate_timer_ended(struct pu_queue *q)
{
	q->gate->timing = false;
}

int64_t pu_gate_before_wait(struct pu_queue *q, int64_t timeout_ns)
{
	int64_t due_ns;

	look_at_changes(q->gate);
	due_ns = pu_gate_due(q);
	if (due_ns < 0)
		return timeout_ns;
	if (!due_ns)
		return 0;
	if (q->ring.fd >= 0) {
		set_timer(q, q->gate->kept[q->gate->heap[0]].due_ns);
		return timeout_ns;
	}
	return timeout_ns < 0 || due_ns < timeout_ns ? due_ns : timeout_ns;
}

/* ---- answers ---- */

static void rot(struct pu_rule *rule, uint8_t *data, uint64_t length)
{
	for (uint32_t i = 0; i < rule->spec.amount; i++) {
		uint64_t bit = pu_rule_random(rule) % (length * 8);

		data[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
}

static void meet_past(const struct pu_queue *q, uint16_t tag, struct pu_rule *rule, bool stale)
{
	const struct pu_desc *desc = &q->desc[tag];
	uint8_t *data = pu_queue_next_buffer(q, tag);

	if (stale)
		pu_past_show(rule->past, desc->start_sector, data, desc->nr_sectors);
	else
		pu_past_see(rule->past, desc->start_sector, data, desc->nr_sectors);
}

int32_t pu_gate_settle(struct pu_queue *q, uint16_t tag, int32_t value)
{
	struct pu_gate *gate = q->gate;
	struct pu_kept *kept;

	if (!gate->kept)
		return value;
	kept = &gate->kept[tag];
	if (kept->generation != pu_tag_generation(&q->tags[tag]))
		return value;
	if (value > 0 && kept->sectors)
		value = (int32_t)(kept->sectors << PU_SECTOR_SHIFT);
	if (value > 0 && kept->past)
		meet_past(q, tag, kept->past, kept->stale);
	if (value > 0 && kept->at_end)
		rot(kept->at_end, pu_queue_next_buffer(q, tag), (uint64_t)value);
	forget(gate, tag);
	return value;
}
