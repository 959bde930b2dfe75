/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Makes and checks the eight bytes of a token. What a keyed one consists of is described where the
 * same is done in Rust, in src/token/keyed.rs; this file has to agree with it.
 */
#ifndef NETOKEN_TOKEN_H
#define NETOKEN_TOKEN_H

#include "keys.h"
#include "siphash.h"
#include "types.h"
#include "wire.h"

#define MAC_BITS (MAC_LEN * 8)
#define MESSAGE_LEN_SHORT 28
#define MESSAGE_LEN_LONG 52

/* Four bytes of the message. */
#define message_part(pointer) ((__u64)le32(*(const __u32 *)(pointer)))

/*
 * Unix time, exact to a tick of the kernel. Reading a clock costs as much as the MAC, jiffies
 * nothing; so it is read once in a jiffy, which is also often enough to notice that it was set or
 * that the machine has slept.
 */
static __always_inline __u64 unix_time_ns(const struct netoken_clock *now,
					  struct netoken_key_count *count)
{
	__u64 jiffies = bpf_jiffies64();

	if (count->read_at_jiffies != jiffies) {
		count->clock_ns = has_tai ? bpf_ktime_get_tai_ns() : bpf_ktime_get_boot_ns();
		count->read_at_jiffies = jiffies;
	}
	return count->clock_ns + (has_tai ? now->tai_offset_ns : now->boot_offset_ns);
}

/* The message's first eight bytes. */
static __always_inline __u64 message_head(__u32 bind, __be16 tag_be, __u32 key_id)
{
	return TOKEN_VERSION | bind << 8 | (__u64)le16(tag_be) << 16 | (__u64)key_id << 32;
}

/*
 * Reads the secret of a key, once. False if it has none: an update is no single step, and a key
 * that is retired at this moment loses its secret before its state. With zeros anybody can make a
 * token.
 */
static __always_inline bool read_secret(const struct netoken_key *key, __u64 *secret)
{
	secret[0] = *(const volatile __u64 *)&key->secret[0];
	secret[1] = *(const volatile __u64 *)&key->secret[1];
	return secret[0] | secret[1];
}

/* The hash of which the first bytes are the MAC. */
static __always_inline __u64 hash_flow(const __u64 *secret, const struct netoken_flow *flow,
				       __u64 head, __u32 slot)
{
	__u32 bind = head >> 8 & 0xff;
	const __u8 *saddr = flow->saddr, *daddr = flow->daddr;
	struct siphash sip;
	__u64 ports;

	sip_begin(&sip, secret);
	sip_word(&sip, head);
	sip_word(&sip, le32(bpf_htonl(slot)) | (__u64)le32(bpf_htonl(flow->isn)) << 32);

	/* Neither address nor port: the same for both families, so that it survives NAT64, too. */
	if (bind == BIND_ISN) {
		sip_word(&sip, 0);
		return sip_end(&sip, 0, MESSAGE_LEN_SHORT);
	}

	ports = (__u64)le16(flow->dport_be) << 16;
	if (bind == BIND_FLOW)
		ports |= le16(flow->sport_be);
	if (flow->family == 4) {
		/* The last four bytes of the mapped address. */
		if (bind == BIND_FLOW)
			ports |= message_part(saddr + 12) << 32;
		sip_word(&sip, ports);
		return sip_end(&sip, message_part(daddr + 12), MESSAGE_LEN_SHORT);
	}
	if (bind == BIND_FLOW) {
		sip_word(&sip, ports | message_part(saddr) << 32);
		sip_word(&sip, message_part(saddr + 4) | message_part(saddr + 8) << 32);
		sip_word(&sip, message_part(saddr + 12) | message_part(daddr) << 32);
	} else {
		sip_word(&sip, ports);
		sip_word(&sip, 0);
		sip_word(&sip, message_part(daddr) << 32);
	}
	sip_word(&sip, message_part(daddr + 4) | message_part(daddr + 8) << 32);
	return sip_end(&sip, message_part(daddr + 12), MESSAGE_LEN_LONG);
}

static __always_inline struct netoken_key_count *count_of_key(__u32 key_id)
{
	return bpf_map_lookup_elem(&key_counts, &key_id);
}

static __always_inline bool sign_token(struct netoken_event *event,
				       const struct netoken_token_spec *spec)
{
	const struct netoken_clock *now;
	const struct netoken_ring *ring;
	struct netoken_key_count *count;
	const struct netoken_key *key;
	__u32 zero = 0, ring_id, key_id;
	__u64 now_ns, slot, hash, secret[2];

	ring_id = spec->ring;
	now = bpf_map_lookup_elem(&clock, &zero);
	ring = bpf_map_lookup_elem(&rings, &ring_id);
	if (!now || !ring)
		return false;
	/* Where none signs, this is no key's id. */
	key_id = ring->signer - 1;
	key = bpf_map_lookup_elem(&keys, &key_id);
	count = count_of_key(key_id);
	if (!key || key->state != KEY_LIVE || !count || !read_secret(key, secret))
		return false;

	now_ns = unix_time_ns(now, count);
	slot = now_ns / now->slot_ns;
	hash = hash_flow(secret, &event->flow, message_head(spec->bind, spec->tag_be, key_id),
			 slot);
	*(__u64 *)event->token =
		le64(le16(spec->tag_be) | (key_id << 4 | (slot & (SLOTS - 1))) << 16 |
		     hash << (64 - MAC_BITS));
	count->made++;
	count->made_at_ns = now_ns;
	return true;
}

/* Writes the token for this SYN into its event. False if there is no key to make it with. */
static __always_inline bool make_token(struct netoken_event *event,
				       const struct netoken_token_spec *spec)
{
	if (spec->form == FORM_STATIC) {
		__builtin_memcpy(event->token, spec->bytes, TOKEN_LEN);
		return true;
	}
	return sign_token(event, spec);
}

/* How a token that is right was made, and what is to be counted if it is accepted. */
struct netoken_proof {
	struct netoken_key_count *count;
	__u64 now_ns;
	enum netoken_bind bind;
};

static __always_inline void count_accepted(const struct netoken_proof *proof)
{
	proof->count->accepted++;
	proof->count->accepted_at_ns = proof->now_ns;
}

/*
 * Says whether a keyed token belongs to this flow and this moment. `token` is the option's eight
 * bytes as they stand in memory, read as one number. `proof` is written of one that does.
 */
static __always_inline enum netoken_check check_token(const struct netoken_flow *flow, __u64 token,
						      const struct netoken_accept *accept,
						      struct netoken_proof *proof)
{
	struct netoken_key_count *count;
	const struct netoken_clock *now;
	const struct netoken_key *key;
	__u32 zero = 0, key_id, slot, behind;
	__u64 now_ns, secret[2];
	__u16 tag;

	token = le64(token);
	tag = token & 0xffff;
	key_id = token >> 20 & 0xf;
	key = bpf_map_lookup_elem(&keys, &key_id);
	now = bpf_map_lookup_elem(&clock, &zero);
	count = count_of_key(key_id);
	if (!key || !now || !count || key->state == KEY_ABSENT)
		return CHECK_UNKNOWN_KEY;
	if (key->state != KEY_LIVE || !read_secret(key, secret))
		return CHECK_RETIRED_KEY;
	if (!(accept->rings >> (key->ring & 0xf) & 1))
		return CHECK_WRONG_RING;
	if (!accept->any_tag && tag != le16(accept->tag_be))
		return CHECK_WRONG_TAG;

	/* The window is smaller than the cycle of the low bits, so one slot at most can be meant.
	 */
	now_ns = unix_time_ns(now, count);
	slot = now_ns / now->slot_ns + now->slots_ahead;
	behind = (slot - (token >> 16)) & (SLOTS - 1);
	if (behind > now->slots_ahead + now->slots_behind)
		return CHECK_WRONG_TIME;
	slot -= behind;

	for (__u32 bind = BIND_FLOW; bind <= BIND_ISN; bind++) {
		__u64 hash;

		if (!(accept->binds >> bind & 1))
			continue;
		hash = hash_flow(secret, flow, message_head(bind, le16(tag), key_id), slot);
		if (hash << (64 - MAC_BITS) >> (64 - MAC_BITS) != token >> (64 - MAC_BITS))
			continue;
		proof->count = count;
		proof->now_ns = now_ns;
		proof->bind = bind;
		return CHECK_VALID;
	}
	return CHECK_WRONG_MAC;
}

#endif
