/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The memory of accepted tokens: buckets of a few, and how CPUs share one.
 *
 * On x86, the lock of a bucket is a count of those who hold or want it. Who comes adds one, and if
 * he then reads one, the bucket is his; everybody takes off what he added. As long as what he added
 * is there, nobody else who adds can read one. Two additions cost less than the two calls of
 * bpf_spin_lock(), and an instruction that adds and says what was there before came only with
 * kernel 5.12. x86 makes a lock of that: an addition is a full barrier, so what was written is
 * there before the bucket is free; and loads stay in their order, as stores do. So a bucket can
 * also be read without its lock, see find_token().
 *
 * Other machines promise neither. A CPU could have the count and not yet see what the one before it
 * has put there: let its token in for another flow, or put its own in the same place. There the
 * lock is bpf_spin_lock(), and nobody reads without it.
 *
 * A program that began runs to its end, so a pinned bucket is never left locked. But it can be
 * interrupted while it has a bucket, and with PREEMPT_RT even be preempted. So nobody waits for
 * ever: whom it takes too long has his SYN refused, and sends it again.
 */
#ifndef NETOKEN_GUARD_BUCKET_H
#define NETOKEN_GUARD_BUCKET_H

#include "guard_maps.h"

/* Where in a token, as a little-endian number, the bits are that choose its bucket: the first of
 * the MAC. */
#define SEEN_SHIFT (64 - MAC_LEN * 8)
#define SEEN_MASK ((__u64)(SEEN_BUCKETS - 1) << SEEN_SHIFT)

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

/* -DBUCKET_LOCK_PORTABLE shows on x86 what runs elsewhere. */
#if defined(__TARGET_ARCH_x86) && !defined(BUCKET_LOCK_PORTABLE)
#define BUCKET_LOCK __u32
#define reads_unlocked 1
#else
#define BUCKET_LOCK struct bpf_spin_lock
#define reads_unlocked 0
#endif

struct seen_bucket {
	BUCKET_LOCK lock;
	__u32 pad;
	struct seen_token tokens[SEEN_WAYS];
};

_Static_assert(sizeof(struct seen_token) == 32, "seen_token has hidden padding");

/* By bits of the MAC, which are as good as random. Only who has a key can add to it. As
 * `guard_tokens` it is pinned with another lock, which the verifier knows by its type. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct seen_bucket);
	__uint(max_entries, SEEN_BUCKETS);
} guard_accepted SEC(".maps");

#if reads_unlocked

/* How often to look whether a bucket is free, some 50 ns each time. */
#define BUCKET_LOOKS 64

static __always_inline bool try_lock(struct seen_bucket *bucket)
{
	__u32 holders;

	__atomic_fetch_add(&bucket->lock, 1, __ATOMIC_RELAXED);
	barrier();
	holders = *(volatile __u32 *)&bucket->lock;
	barrier();
	if (holders == 1)
		return true;
	__atomic_fetch_add(&bucket->lock, -1, __ATOMIC_RELAXED);
	return false;
}

/* Out of line, because two CPUs are seldom in one bucket at the same moment. Not static, so that
 * the verifier looks at the loop once. */
__noinline int wait_for_bucket(__u32 at)
{
	struct seen_bucket *bucket = bpf_map_lookup_elem(&guard_accepted, &at);

	if (!bucket)
		return false;
	for (__u32 i = 0; i < BUCKET_LOOKS; i++) {
		/* To pass the time. */
		bpf_ktime_get_ns();
		/* Additions of those who wait would keep out one another. */
		if (!*(volatile __u32 *)&bucket->lock && try_lock(bucket))
			return true;
	}
	return false;
}

/* False if others had it for too long. `at` is its place. */
static __always_inline bool lock_bucket(struct seen_bucket *bucket, __u32 at)
{
	return try_lock(bucket) || wait_for_bucket(at);
}

static __always_inline void unlock_bucket(struct seen_bucket *bucket)
{
	barrier();
	__atomic_fetch_add(&bucket->lock, -1, __ATOMIC_RELAXED);
}

#else

static __always_inline bool lock_bucket(struct seen_bucket *bucket, __u32 at)
{
	(void)at;
	bpf_spin_lock(&bucket->lock);
	return true;
}

static __always_inline void unlock_bucket(struct seen_bucket *bucket)
{
	bpf_spin_unlock(&bucket->lock);
}

#endif

/*
 * Looks for a token in a bucket: GUARD_VALID if it was accepted for the same flow, GUARD_REPLAYED
 * if for another one, GUARD_NONE if it is not there.
 *
 * Also right on x86 without the lock, but for what is being put there: put_token() takes the
 * `until` of a place away first and writes the new one last, and no two of a place are equal. So if
 * it is the same before and behind, all between belongs to it.
 */
static __always_inline __u32 find_token(struct seen_bucket *bucket, const struct seen_token *wanted,
					__u32 now_units)
{
	for (__u32 i = 0; i < SEEN_WAYS; i++) {
		struct seen_token *seen = &bucket->tokens[i];
		__u32 until = *(volatile __u32 *)&seen->until;
		__u64 other, elsewhere;

		barrier();
		/* One number for all, because the verifier follows every decision. */
		other = ((seen->token ^ wanted->token) & ~SEEN_MASK) | (seen->isn ^ wanted->isn);
		barrier_var(other);
		if (other || until <= now_units)
			continue;
		elsewhere = (seen->token ^ wanted->token) | (seen->from[0] ^ wanted->from[0]) |
			    (seen->from[1] ^ wanted->from[1]);
		barrier();
		if (*(volatile __u32 *)&seen->until == until)
			return elsewhere ? GUARD_REPLAYED : GUARD_VALID;
	}
	return GUARD_NONE;
}

/* Puts a token into a bucket that is locked. False if there is no place. */
static __always_inline bool put_token(struct seen_bucket *bucket, const struct seen_token *token,
				      __u32 now_units)
{
	for (__u32 i = 0; i < SEEN_WAYS; i++) {
		struct seen_token *seen = &bucket->tokens[i];

		if (seen->until > now_units)
			continue;
		*(volatile __u32 *)&seen->until = 0;
		barrier();
		seen->token = token->token;
		seen->isn = token->isn;
		seen->from[0] = token->from[0];
		seen->from[1] = token->from[1];
		barrier();
		*(volatile __u32 *)&seen->until = token->until;
		return true;
	}
	return false;
}

#endif
