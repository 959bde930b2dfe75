/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Remembers which keyed tokens were accepted and for whom, so that each is good for one flow.
 */
#ifndef NETOKEN_GUARD_SEEN_H
#define NETOKEN_GUARD_SEEN_H

#include "guard_maps.h"
#include "token.h"

/* Where in a token, as a little-endian number, the bits are that choose its bucket: the first of
 * the MAC. */
#define SEEN_SHIFT (64 - MAC_BITS)
#define SEEN_MASK ((__u64)(SEEN_BUCKETS - 1) << SEEN_SHIFT)

/* What is remembered ends with a unit of this, some 1.07 s: 32 bits of them are 146 years. */
#define seen_units(ns) ((__u32)((ns) >> 30))

/* A token that was accepted, and for whom: what the token itself does not say. */
struct seen_token {
	/* As a little-endian number. The bits that all of the bucket have in common make room for
	 * the source port. */
	__u64 token;
	/* With it, because of a bind mode nothing else may be known. */
	__u32 isn;
	/* seen_units() of CLOCK_MONOTONIC; from then on no slot is accepted that the token may
	 * have. */
	__u32 until;
	/* The source address. Where the token is bound to the ISN alone, and so the destination is
	 * free as well, a hash of the flow with the key of the token. */
	__u64 from[2];
};

struct seen_bucket {
	struct bpf_spin_lock lock;
	__u32 pad;
	struct seen_token tokens[SEEN_WAYS];
};

_Static_assert(SEEN_BUCKETS == 1 << 16, "a port has no room in the bits that choose a bucket");
_Static_assert(sizeof(struct seen_token) == 32, "seen_token has hidden padding");

/* By bits of the MAC, which are as good as random. Only who has a key can add to it. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct seen_bucket);
	__uint(max_entries, SEEN_BUCKETS);
} guard_tokens SEC(".maps");

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

/*
 * Whether a valid token was accepted for another flow before. It is remembered for as long as any
 * slot is accepted that it may have, so that in this time nobody else can use it. A SYN of the same
 * flow is a retransmission.
 */
static __always_inline __u32 check_seen(struct guard_scratch *scratch, __u64 token,
					enum netoken_bind bind)
{
	const struct netoken_flow *flow = &scratch->event.flow;
	__u32 zero = 0, key_id = le64(token) >> 20 & 0xf;
	__u32 at = (le64(token) & SEEN_MASK) >> SEEN_SHIFT;
	const struct netoken_clock *now = bpf_map_lookup_elem(&clock, &zero);
	const struct netoken_key *key = bpf_map_lookup_elem(&keys, &key_id);
	struct seen_bucket *bucket = bpf_map_lookup_elem(&guard_tokens, &at);
	__u32 verdict = GUARD_SEEN_FULL, isn = flow->isn, now_units, until, place = SEEN_WAYS;
	const __u64 *saddr = (const __u64 *)flow->saddr;
	__u64 mine, from[2], now_ns;

	if (!now || !key || !bucket)
		return GUARD_SEEN_FULL;
	mine = (le64(token) & ~SEEN_MASK) | (__u64)flow->sport_be << SEEN_SHIFT;
	from[0] = saddr[0];
	from[1] = saddr[1];
	if (bind == BIND_ISN) {
		from[0] = hash_flow(key, flow, message_head(BIND_FLOW, 0, key_id), 0);
		from[1] = 0;
	}
	now_ns = monotonic_ns(scratch);
	now_units = seen_units(now_ns);
	/* One more for what is cut off, and one because this clock and that of the slots are not
	 * read at the same moment, nor at the same on every CPU. */
	until = seen_units(now_ns + (now->slots_behind + now->slots_ahead + 1) * now->slot_ns) + 2;

	bpf_spin_lock(&bucket->lock);
	for (__u32 i = 0; i < SEEN_WAYS; i++) {
		struct seen_token *seen = &bucket->tokens[i];

		if (seen->until <= now_units) {
			if (place == SEEN_WAYS)
				place = i;
			continue;
		}
		if (seen->isn == isn && !((seen->token ^ mine) & ~SEEN_MASK)) {
			verdict = seen->token == mine && seen->from[0] == from[0] &&
						  seen->from[1] == from[1]
					  ? GUARD_VALID
					  : GUARD_REPLAYED;
			break;
		}
	}
	if (verdict == GUARD_SEEN_FULL && place < SEEN_WAYS) {
		struct seen_token *seen = &bucket->tokens[place & (SEEN_WAYS - 1)];

		seen->token = mine;
		seen->isn = isn;
		seen->until = until;
		seen->from[0] = from[0];
		seen->from[1] = from[1];
		verdict = GUARD_VALID;
	}
	bpf_spin_unlock(&bucket->lock);
	return verdict;
}

#endif
