/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Tells user space what became of a SYN: a counter always, an event for one in `sample`. */
#ifndef NETOKEN_COUNT_H
#define NETOKEN_COUNT_H

#include "maps.h"
#include "parse.h"
#include "types.h"

/* Fills in what every event says, whatever becomes of the SYN. Written in full: the stack holds
 * garbage. */
static __always_inline void describe_event(struct __sk_buff *skb, struct syn *syn)
{
	struct netoken_event *event = &syn->event;
	__u8 options_len =
		syn->tcp_len_bytes > TCP_HEADER_LEN ? syn->tcp_len_bytes - TCP_HEADER_LEN : 0;

	event->netns_ino = config.netns_ino;
	event->ifindex = skb->ifindex;
	event->rule = 0;
	__builtin_memset(event->token, 0, sizeof(event->token));
	event->old_options_len_bytes = options_len;
	event->new_options_len_bytes = options_len;
	__builtin_memset(event->flow.pad, 0, sizeof(event->flow.pad));
	event->generation = 0;
}

/* Filling in an event and finding no reader costs as much as half a stamp. */
static __always_inline bool has_reader(void)
{
	__u32 zero = 0;
	struct netoken_live *now = bpf_map_lookup_elem(&live, &zero);

	return now && now->has_reader;
}

/* Nobody else writes this CPU's counters: a transmit hook is not entered from within itself. */
static __always_inline void count_syn(struct __sk_buff *skb, struct netoken_event *event)
{
	__u32 verdict = event->verdict;
	struct netoken_counter *counter = bpf_map_lookup_elem(&counters, &verdict);
	__u64 before;

	if (!counter)
		return;
	before = counter->packets;
	counter->packets = before + 1;
	counter->dropped += event->dropped;
	if ((config.sample != 1 && before % config.sample) || !has_reader())
		return;
	event->time_ns = bpf_ktime_get_ns();
	/* The reader compares with what has reached it: the buffer's own count of losses comes only
	 * with the next event that fits. */
	counter->events++;
	bpf_perf_event_output(skb, &events, BPF_F_CURRENT_CPU, event, sizeof(*event));
}

#endif
