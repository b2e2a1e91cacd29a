/* SPDX-License-Identifier: MIT
 * Rules, and the gate of a queue, in loopback: with and without a ring.
 */
#define _GNU_SOURCE
#include "answer.h"
#include "gate.h"
#include "loopback.h"
#include "open.h"

#include <errno.h>
#include <pthread.h>
#include <string.h>

#include "check.h"

#define DEPTH 64
#define READS (1u << PU_OP_READ)
#define WRITES (1u << PU_OP_WRITE)

static void open_queue(struct pu_queue *q, struct pu_rules *rules, uint32_t extra_entries)
{
	struct pu_queue_options options = {
		.depth = DEPTH,
		.buffer_bytes = 4096,
		.rules = rules,
		.extra_entries = extra_entries,
	};

	CHECK_EQUAL(pu_queue_open(q, -1, &options), 0);
	CHECK_EQUAL(pu_queue_fetch(q), 0);
}

static void close_queue(struct pu_queue *q)
{
	CHECK(pu_queue_close(q));
	pu_queue_free(q);
}

static struct pu_rule *rule_of(enum pu_action action, uint32_t ops)
{
	struct pu_rule_spec spec = { .action = action, .ops = ops, .chance = PU_ALWAYS_FIRES };

	return pu_rule_new(&spec);
}

static struct pu_rule *delaying(const int64_t *delays, uint32_t count)
{
	struct pu_rule_spec spec = { .action = PU_ACT_DELAY,
				     .ops = READS,
				     .chance = PU_ALWAYS_FIRES,
				     .delays_ns = delays,
				     .nr_delays = count,
				     .seed = 5 };

	return pu_rule_new(&spec);
}

/* What waits bring, until nothing is kept any more. */
static uint32_t answer_all(struct pu_queue *q)
{
	uint32_t answered = 0;

	while (pu_queue_held(q)) {
		int there = pu_queue_wait(q, PU_FOREVER);

		CHECK(there >= 0);
		for (int i = 0; i < there; i++)
			CHECK_EQUAL(pu_queue_answer(q, q->ready[i], 0), 0);
		answered += (uint32_t)there;
	}
	return answered;
}

static void what_is_delayed_goes_on_in_its_time(uint32_t extra_entries)
{
	/* None is over before a busy machine gets to the first wait. */
	static const int64_t delays[] = { 40000000, 60000000, 50000000, 180000000, 30000000, 140000000 };
	struct pu_rules rules;
	struct pu_queue q;
	struct pu_rule *rule = delaying(delays, 6);
	uint64_t matched, fired;
	int64_t before;

	pu_rules_init(&rules);
	open_queue(&q, &rules, extra_entries);
	CHECK(!q.taps.armed);
	CHECK_EQUAL(pu_rules_exchange(&rules, &rule, 1), 0);
	CHECK(q.taps.armed);
	for (int round = 0; round < 3; round++) {
		before = pu_now_ns();
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			CHECK_EQUAL(pu_loopback_inject(&q, tag, tag & 1 ? PU_OP_READ : PU_OP_WRITE,
						       tag, 1),
				    0);
		CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), DEPTH / 2);
		CHECK_EQUAL(pu_gate_kept(&q), DEPTH / 2);
		CHECK_EQUAL(pu_queue_held(&q), DEPTH);
		for (uint32_t i = 0; i < DEPTH / 2; i++) {
			CHECK_EQUAL(q.desc[q.ready[i]].op_flags, PU_OP_WRITE);
			CHECK_EQUAL(pu_queue_answer(&q, q.ready[i], 0), 0);
		}
		CHECK_EQUAL(answer_all(&q), DEPTH / 2);
		CHECK(pu_now_ns() - before >= 180000000);
		CHECK_EQUAL(pu_gate_kept(&q), 0);
	}
	pu_rule_counts(rule, &matched, &fired);
	CHECK_EQUAL(matched, 3 * DEPTH / 2);
	CHECK_EQUAL(fired, 3 * DEPTH / 2);
	CHECK_EQUAL(pu_rules_exchange(&rules, NULL, 0), 0);
	pu_queue_wait(&q, 0);
	CHECK(!q.taps.armed); /* with nothing to do it is out of the way */
	close_queue(&q);
	pu_rule_put(rule);
	pu_rules_destroy(&rules);
}

static void what_hangs_is_released(uint32_t extra_entries)
{
	struct pu_rules rules;
	struct pu_queue q;
	struct pu_rule *both[2] = { rule_of(PU_ACT_HANG, READS), rule_of(PU_ACT_HANG, WRITES) };

	pu_rules_init(&rules);
	CHECK_EQUAL(pu_rules_exchange(&rules, both, 2), 0);
	open_queue(&q, &rules, extra_entries);
	CHECK(q.taps.armed); /* from its beginning */
	for (uint16_t tag = 0; tag < DEPTH; tag++)
		CHECK_EQUAL(pu_loopback_inject(&q, tag, tag & 1 ? PU_OP_READ : PU_OP_WRITE, tag, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	CHECK_EQUAL(pu_gate_kept(&q), DEPTH);
	CHECK_EQUAL(pu_gate_due(&q), -1);
	pu_rules_release(&rules, both[1]);
	CHECK_EQUAL(pu_queue_wait(&q, PU_FOREVER), DEPTH / 2);
	for (uint32_t i = 0; i < DEPTH / 2; i++) {
		CHECK_EQUAL(q.desc[q.ready[i]].op_flags, PU_OP_WRITE);
		CHECK_EQUAL(pu_queue_answer(&q, q.ready[i], 0), 0);
	}
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	/* one is failed from outside, and its tag brings another, which hangs as well */
	CHECK_EQUAL(pu_queue_post(&q, 1, pu_tag_generation(&q.tags[1]), -EIO), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	CHECK_EQUAL(pu_loopback_result(&q, 1), -EIO);
	CHECK_EQUAL(pu_loopback_inject(&q, 1, PU_OP_READ, 1, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	CHECK_EQUAL(pu_gate_kept(&q), DEPTH / 2);
	pu_rules_open(&rules, true);
	CHECK_EQUAL(answer_all(&q), DEPTH / 2);
	close_queue(&q); /* with rules */
	pu_rule_put(both[0]);
	pu_rule_put(both[1]);
	pu_rules_destroy(&rules);
}

static void a_queue_may_be_closed_with_what_it_keeps(void)
{
	struct pu_rules rules;
	struct pu_queue q;
	struct pu_rule *rule = rule_of(PU_ACT_HANG, READS);

	pu_rules_init(&rules);
	CHECK_EQUAL(pu_rules_exchange(&rules, &rule, 1), 0);
	pu_rule_put(rule); /* the set has it */
	open_queue(&q, &rules, 0);
	CHECK_EQUAL(pu_loopback_inject(&q, 0, PU_OP_READ, 0, 1), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	CHECK_EQUAL(pu_rules_exchange(&rules, NULL, 0), 0); /* the request has it */
	close_queue(&q);
	CHECK_EQUAL(pu_rules_exchange(&rules, NULL, 0), 0); /* tells no queue */
	pu_rules_destroy(&rules);
}

static void changed_requests_are_answered_as_the_kernel_has_them(void)
{
	struct pu_rule_spec spec = { .action = PU_ACT_TEAR,
				     .ops = WRITES,
				     .chance = PU_ALWAYS_FIRES,
				     .amount = 2,
				     .times = 1 };
	struct pu_rule *all[3] = { pu_rule_new(&spec) };
	struct pu_rules rules;
	struct pu_queue q;

	spec.action = PU_ACT_MISDIRECT;
	spec.place = 1 << 20;
	all[1] = pu_rule_new(&spec);
	spec.action = PU_ACT_FAIL;
	spec.error = ENOSPC;
	spec.times = 0;
	all[2] = pu_rule_new(&spec);
	pu_rules_init(&rules);
	pu_rules_set_size(&rules, (1 << 20) + 1024, 0);
	open_queue(&q, &rules, 0);
	CHECK_EQUAL(pu_rules_exchange(&rules, all, 3), 0);
	for (uint16_t tag = 0; tag < 3; tag++)
		CHECK_EQUAL(pu_loopback_inject(&q, tag, PU_OP_WRITE, 8, 8), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 2);
	CHECK_EQUAL(q.desc[0].nr_sectors, 2);
	CHECK_EQUAL(q.desc[1].start_sector, (1 << 20) / 512 + 2 - 8);
	CHECK_EQUAL(pu_loopback_result(&q, 2), -ENOSPC);
	CHECK_EQUAL(pu_queue_answer(&q, 0, 0), 0);
	CHECK_EQUAL(pu_loopback_result(&q, 0), 4096);
	CHECK_EQUAL(pu_queue_post(&q, 1, 1, 0), 0);
	CHECK_EQUAL(pu_queue_wait(&q, 0), 0);
	CHECK_EQUAL(pu_loopback_result(&q, 1), 4096);
	close_queue(&q);
	for (int i = 0; i < 3; i++)
		pu_rule_put(all[i]);
	pu_rules_destroy(&rules);
}

/* ---- rules that change while requests come ---- */

struct changer {
	struct pu_rules *rules;
	bool over;
};

static void *change_rules(void *argument)
{
	static const int64_t delays[] = { 0, 20000, 50000 };
	struct changer *changer = argument;

	while (!__atomic_load_n(&changer->over, __ATOMIC_RELAXED)) {
		struct pu_rule *both[2] = { delaying(delays, 3), rule_of(PU_ACT_HANG, WRITES) };

		CHECK_EQUAL(pu_rules_exchange(changer->rules, both, 2), 0);
		pu_rules_release(changer->rules, NULL);
		CHECK_EQUAL(pu_rules_exchange(changer->rules, NULL, 0), 0);
		pu_rules_release(changer->rules, both[1]);
		pu_rule_put(both[0]);
		pu_rule_put(both[1]);
	}
	return NULL;
}

static void rules_change_while_requests_come(uint32_t extra_entries)
{
	struct pu_rules rules;
	struct pu_queue q;
	struct changer changer = { .rules = &rules };
	pthread_t thread;

	pu_rules_init(&rules);
	open_queue(&q, &rules, extra_entries);
	CHECK_EQUAL(pthread_create(&thread, NULL, change_rules, &changer), 0);
	for (int round = 0; round < 200; round++) {
		for (uint16_t tag = 0; tag < DEPTH; tag++)
			CHECK_EQUAL(pu_loopback_inject(&q, tag, tag & 1 ? PU_OP_READ : PU_OP_WRITE,
						       tag, 1),
				    0);
		CHECK_EQUAL(answer_all(&q), DEPTH);
	}
	__atomic_store_n(&changer.over, true, __ATOMIC_RELAXED);
	CHECK_EQUAL(pthread_join(thread, NULL), 0);
	CHECK_EQUAL(q.counters.errors, 0);
	close_queue(&q);
	pu_rules_destroy(&rules);
}

int main(void)
{
	what_is_delayed_goes_on_in_its_time(0);
	what_is_delayed_goes_on_in_its_time(8);
	what_hangs_is_released(0);
	what_hangs_is_released(8);
	a_queue_may_be_closed_with_what_it_keeps();
	changed_requests_are_answered_as_the_kernel_has_them();
	rules_change_while_requests_come(0);
	rules_change_while_requests_come(8);
	return 0;
}
