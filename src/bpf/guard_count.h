/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Counters and events: what was decided about a packet, for people. */
#ifndef NETOKEN_GUARD_COUNT_H
#define NETOKEN_GUARD_COUNT_H

#include "guard_maps.h"
#include "hook.h"

static __always_inline bool guard_has_reader(void)
{
	__u32 zero = 0;
	struct netoken_live *now = bpf_map_lookup_elem(&guard_live, &zero);

	return now && now->has_reader;
}

/* Out of line: nobody reads along when it matters what a packet costs. */
static __noinline void send_event(void *ctx, struct netoken_guard_event *event, __u32 ifindex)
{
	if (!event)
		return;
	event->time_ns = bpf_ktime_get_ns();
	event->netns_ino = config.netns_ino;
	event->ifindex = ifindex;
	__builtin_memset(event->flow.pad, 0, sizeof(event->flow.pad));
	__builtin_memset(event->pad, 0, sizeof(event->pad));
	bpf_perf_event_output(ctx, &guard_events, BPF_F_CURRENT_CPU, event, sizeof(*event));
}

/* What was decided about a packet: beside the verdict, what to do with it and where to count it.
 */
#define JUDGED_DROP (1U << 8)
#define JUDGED_MARK (1U << 9)
#define JUDGED_SCRUB (1U << 10)
#define JUDGED_ROW_SHIFT 16

static __always_inline void count_packet(void *ctx, const enum hook hook,
					 struct guard_scratch *scratch, __u32 judged)
{
	__u32 zero = 0, verdict = judged & 0xff, at;
	struct netoken_guard_counters *counters = bpf_map_lookup_elem(&guard_counters, &zero);
	struct netoken_guard_event *event = &scratch->event;
	struct netoken_counter *counter;
	bool drop = judged & JUDGED_DROP;
	__u64 before;

	barrier_var(verdict);
	if (!counters || verdict >= GUARD_COUNT)
		return;
	at = (judged >> JUDGED_ROW_SHIFT) * GUARD_COUNT + verdict;
	barrier_var(at);
	if (at < GUARD_ROWS * GUARD_COUNT)
		counters->rows[at]++;
	counter = &counters->verdicts[verdict];
	before = counter->packets;
	counter->packets = before + 1;
	counter->dropped += drop;
	if (!guard_has_reader() || (config.sample != 1 && before % config.sample))
		return;
	counter->events++;
	event->verdict = verdict;
	event->dropped = drop;
	send_event(ctx, event, packet_ifindex(ctx, hook));
}

#endif
