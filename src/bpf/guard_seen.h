/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Remembers which keyed tokens were accepted and for whom, so that each is good for one flow.
 */
#ifndef NETOKEN_GUARD_SEEN_H
#define NETOKEN_GUARD_SEEN_H

#include "guard_bucket.h"
#include "token.h"

/* What is remembered ends with a unit of this, some 1.07 s: 32 bits of them are 146 years. */
#define seen_units(ns) ((__u32)((ns) >> 30))

_Static_assert(SEEN_BUCKETS == 1 << 16, "a port has no room in the bits that choose a bucket");

/* CLOCK_MONOTONIC, exact to a tick of the kernel, as in wall_clock_ns(). */
static __always_inline __u64 monotonic_ns(struct guard_scratch *scratch)
{
	__u64 jiffies = bpf_jiffies64();

	if (scratch->read_at_jiffies != jiffies) {
		scratch->monotonic_ns = bpf_ktime_get_ns();
		scratch->read_at_jiffies = jiffies;
	}
	return scratch->monotonic_ns;
}

/* Remembers a token unless it is there by now. The bucket is locked. */
static __always_inline __u32 remember(struct seen_bucket *bucket, const struct seen_token *token,
				      __u32 now_units)
{
	__u32 verdict = find_token(bucket, token, now_units);

	if (verdict != GUARD_NONE)
		return verdict;
	return put_token(bucket, token, now_units) ? GUARD_VALID : GUARD_SEEN_FULL;
}

/*
 * Whether a valid token was accepted for another flow before. It is remembered for as long as any
 * slot is accepted that it may have, so that in this time nobody else can use it. A SYN of the same
 * flow is a retransmission.
 *
 * The lock is only for who remembers a new one, which takes a key to make: a flood of copies must
 * not make CPUs wait for one another.
 */
static __always_inline __u32 check_seen(struct guard_scratch *scratch, __u64 token,
					enum netoken_bind bind)
{
	const struct netoken_flow *flow = &scratch->event.flow;
	__u32 zero = 0, key_id = le64(token) >> 20 & 0xf;
	__u32 at = (le64(token) & SEEN_MASK) >> SEEN_SHIFT;
	const struct netoken_clock *now = bpf_map_lookup_elem(&clock, &zero);
	const struct netoken_key *key = bpf_map_lookup_elem(&keys, &key_id);
	struct seen_bucket *bucket = bpf_map_lookup_elem(&guard_accepted, &at);
	const __u64 *saddr = (const __u64 *)flow->saddr;
	__u32 verdict, now_units;
	struct seen_token mine;
	__u64 now_ns, secret[2];

	if (!now || !key || !bucket)
		return GUARD_SEEN_FULL;
	mine.token = (le64(token) & ~SEEN_MASK) | (__u64)flow->sport_be << SEEN_SHIFT;
	mine.isn = flow->isn;
	mine.from[0] = saddr[0];
	mine.from[1] = saddr[1];
	if (bind == BIND_ISN) {
		if (!read_secret(key, secret))
			return GUARD_RETIRED_KEY;
		mine.from[0] = hash_flow(secret, flow, message_head(BIND_FLOW, 0, key_id), 0);
		mine.from[1] = 0;
	}
	now_ns = monotonic_ns(scratch);
	now_units = seen_units(now_ns);
	/* One more for what is cut off, and one because this clock and that of the slots are not
	 * read at the same moment, nor at the same on every CPU. */
	mine.until =
		seen_units(now_ns + (now->slots_behind + now->slots_ahead + 1) * now->slot_ns) + 2;

	if (reads_unlocked) {
		verdict = find_token(bucket, &mine, now_units);
		if (verdict != GUARD_NONE)
			return verdict;
	}
	if (!lock_bucket(bucket, at))
		return GUARD_SEEN_FULL;
	verdict = remember(bucket, &mine, now_units);
	unlock_bucket(bucket);
	return verdict;
}

#endif
