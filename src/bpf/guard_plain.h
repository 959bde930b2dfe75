/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The way of nearly every SYN: bare IPv4 or IPv6, options as a real stack sends them. All in one
 * piece, because a call costs more than most of what is done here. What is not quite like that is
 * left to guard(), which begins anew and decides the same.
 */
#ifndef NETOKEN_GUARD_PLAIN_H
#define NETOKEN_GUARD_PLAIN_H

#include "guard.h"

/* The TCP header of a packet that has nothing between it and a plain IP header, and is whole; NULL
 * if it is another one. Notes the addresses. */
static __always_inline const struct tcp_head *
plain_tcp(void *ctx, const enum hook hook, const __u32 l2_len, struct guard_scratch *scratch)
{
	const __u8 *l3 = packet_begin(ctx, hook) + l2_len;
	const void *end = packet_end(ctx, hook);
	const struct tcp_head *tcp;
	__u32 ip_len, tcp_len;
	__u16 proto;

	if ((const void *)l3 + IPV4_HEADER_LEN + TCP_HEADER_LEN > end)
		return NULL;
	if (l2_len)
		proto = *(const __be16 *)(l3 - 2);
	else
		proto = l3[0] >> 4 == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);

	if (proto == bpf_htons(ETH_P_IP)) {
		const struct iphdr *ip = (const void *)l3;

		if (l3[0] != 0x45 || ip->protocol != IPPROTO_TCP ||
		    ip->frag_off & bpf_htons(IP_OFFSET | IP_MF))
			return NULL;
		note_ipv4(scratch, ip);
		tcp = (const void *)(ip + 1);
	} else {
		const struct ipv6hdr *ip = (const void *)l3;

		if (proto != bpf_htons(ETH_P_IPV6) ||
		    (const void *)l3 + IPV6_HEADER_LEN + TCP_HEADER_LEN > end || l3[0] >> 4 != 6 ||
		    ip->nexthdr != IPPROTO_TCP)
			return NULL;
		note_ipv6(scratch, ip);
		tcp = (const void *)(ip + 1);
	}
	ip_len = scratch->ip_len_bytes;
	tcp_len = (tcp->data_offset >> 4) * 4;
	if ((const void *)tcp + tcp_len > (const void *)l3 + ip_len ||
	    (const void *)l3 + ip_len > end)
		return NULL;
	return tcp;
}

/* Judges a plain SYN as judge_packet() does. Says GUARD_NONE, which nothing else is, of any other
 * packet, and of one that is not only to be judged. */
static __always_inline __u32 judge_plain(void *ctx, const enum hook hook, const __u32 l2_len,
					 struct guard_scratch *scratch)
{
	const struct tcp_head *tcp = plain_tcp(ctx, hook, l2_len, scratch);
	struct netoken_flow *flow = &scratch->event.flow;
	const struct netoken_guard_table *table = running_table();
	const struct netoken_guard_rule *rule;
	__u64 token = 0;
	__u32 at, found;

	if (!tcp || (tcp->flags & TCP_FLAGS_OF_SYN) != TCP_FLAG_SYN)
		return GUARD_NONE;
	scratch->reach = REACH_PORT;
	flow->sport_be = tcp->sport_be;
	flow->dport_be = tcp->dport_be;
	flow->isn = bpf_ntohl(tcp->seq_be);

	begin_judging(scratch);
	if (!table)
		return GUARD_UNPROTECTED;
	at = match_port(table, flow);
	barrier_var(at);
	if (at >= GUARD_RULES_MAX)
		return GUARD_UNPROTECTED;
	rule = &table->rules[at];
	if (rule->scrub)
		return GUARD_NONE;

	/* A data offset of less than the header has no layout either. */
	switch (recognise_list((const void *)tcp + TCP_HEADER_LEN, packet_end(ctx, hook),
			       (tcp->data_offset >> 4) * 4 - TCP_HEADER_LEN, &token)) {
	case LIST_PLAIN:
		found = GUARD_MISSING;
		break;
	case LIST_TOKEN:
		found = GUARD_NONE;
		break;
	default:
		return GUARD_NONE;
	}
	return apply_rule(scratch, table, rule, judge(scratch, table, rule, found, token));
}

/* Decides about a plain SYN. False if it is another packet, of which nothing is counted yet. */
static __always_inline bool guard_plain(void *ctx, const enum hook hook, const __u32 l2_len,
					int *action)
{
	struct guard_scratch *scratch = this_guard_scratch();
	__u32 judged;

	if (!scratch)
		return false;
	judged = judge_plain(ctx, hook, l2_len, scratch);
	if (judged == GUARD_NONE)
		return false;
	*action = carry_out(ctx, hook, scratch, judged);
	return true;
}

#endif
