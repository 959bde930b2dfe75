/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Which rule protects the destination of a packet. */
#ifndef NETOKEN_GUARD_MATCH_H
#define NETOKEN_GUARD_MATCH_H

#include "guard_maps.h"

/* No rule: an index that none has. */
#define NO_RULE GUARD_RULES_MAX

/*
 * The rule of the first match for a destination. Each of the last three is all ones if it counts,
 * else 0: port, address, and that the rule has to drop.
 *
 * A match is decided about at once and not part by part: the verifier would follow every decision
 * through every turn. And the answer is an index, because of a pointer it would follow every value.
 */
static __always_inline __u32 first_match(const struct netoken_guard_table *table,
					 const struct netoken_flow *flow, __u64 by_port,
					 __u64 by_addr, __u64 by_drop)
{
	const __u64 *addr = (const __u64 *)flow->daddr;
	__u64 first = addr[0], second = addr[1], port = bpf_ntohs(flow->dport_be);
	__u32 count = table->matches_count, family = flow->family;

	for (__u32 i = 0; i < GUARD_MATCHES_MAX; i++) {
		const struct netoken_guard_match *match = &table->matches[i];
		__u64 elsewhere, outside;

		if (i >= count)
			break;
		/* Of numbers below 0 the upper half is not. */
		outside = ((port - match->port_first) | (match->port_last - port)) >> 32;
		elsewhere = ((second & match->mask[1]) ^ match->addr[1]) |
			    ((first & match->mask[0]) ^ match->addr[0]) | (family ^ match->family);
		elsewhere &= by_addr;
		elsewhere |= (outside & by_port) | ((match->mode ^ MODE_DROP) & by_drop);
		barrier_var(elsewhere);
		if (!elsewhere)
			return match->rule;
	}
	return NO_RULE;
}

/* The rule for a destination whose port is known. */
static __always_inline __u32 match_port(const struct netoken_guard_table *table,
					const struct netoken_flow *flow)
{
	return first_match(table, flow, ~0ULL, ~0ULL, 0);
}

/*
 * The rule for a packet that does not show its port, or not even its address: the first that drops,
 * if there is any that could be meant, else the first.
 */
static __always_inline __u32 match_less(const struct netoken_guard_table *table,
					const struct netoken_flow *flow, __u64 by_addr)
{
	__u32 at = first_match(table, flow, 0, by_addr, ~0ULL);

	return at == NO_RULE ? first_match(table, flow, 0, by_addr, 0) : at;
}

#endif
