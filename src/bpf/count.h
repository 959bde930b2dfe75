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
	__builtin_memset(event->pad, 0, sizeof(event->pad));
}

/* Filling in an event and finding no reader costs as much as half a stamp. */
static __always_inline bool has_reader(void)
{
	__u32 zero = 0;
	struct netoken_live *now = bpf_map_lookup_elem(&live, &zero);

	return now && now->has_reader;
}

/* Counts, and returns true if this one is to be sent as well. */
static __always_inline bool count_verdict(__u32 verdict, bool dropped)
{
	struct netoken_counter *counter = bpf_map_lookup_elem(&counters, &verdict);
	__u64 before;

	if (!counter)
		return false;
	/* Nobody else writes this CPU's counter: a transmit hook is not entered from within itself.
	 */
	before = counter->packets;
	counter->packets = before + 1;
	counter->dropped += dropped;
	return config.sample == 1 || before % config.sample == 0;
}

static __always_inline void emit_event(struct __sk_buff *skb, struct netoken_event *event)
{
	event->time_ns = bpf_ktime_get_ns();
	/* Without a reader this fails at once. A full buffer is counted by the kernel and shown by
	 * the reader. */
	bpf_perf_event_output(skb, &events, BPF_F_CURRENT_CPU, event, sizeof(*event));
}

#endif
