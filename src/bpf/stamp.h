/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Changes the packet: makes room at its tail, moves the payload, writes the headers, mends the
 * checksums. The rule of this file: the packet leaves stamped and right, or byte for byte as it
 * came, or not at all.
 */
#ifndef NETOKEN_STAMP_H
#define NETOKEN_STAMP_H

#include "options.h"
#include "parse.h"
#include "scratch.h"
#include "types.h"

#define TCP_CHECK_OFF 16
/* 64 KiB, the largest IP packet */
#define CHUNKS_MAX 32

/* How far a stamp has come; all that is needed to take it back. */
struct stamp {
	__u32 old_options_len;
	__u32 new_options_len;
	__u32 grow;	  /* bytes */
	__u32 tail_off;	  /* of the payload, before it moves */
	__u32 tail_end;	  /* end of the frame, before it grows */
	__u32 moved_from; /* what lies between here and tail_end has moved */
};

#define fault(step) ((config.faults & (step)) != 0)

/* Moves one chunk by `grow` bytes, forwards or, with `back`, to where it was. */
static __always_inline long move_chunk(struct __sk_buff *skb, struct scratch *scratch, __u32 off,
				       __u32 len, __u32 grow, bool back)
{
	__u32 from = back ? off + grow : off;
	__u32 to = back ? off : off + grow;
	__u32 less_one = len - 1;

	/*
	 * The compiler knows these bounds, the verifier wants to see them checked; and before 6.8
	 * it learns nothing from `len != 0`, so the check is of one less.
	 */
	barrier_var(less_one);
	if (less_one >= CHUNK_LEN_BYTES)
		return -1;
	len = less_one + 1;
	if (bpf_skb_load_bytes(skb, from, scratch->chunk, len))
		return -1;
	return bpf_skb_store_bytes(skb, to, scratch->chunk, len, 0);
}

/* From the end, so that nothing is overwritten before it was read. */
static __noinline long move_tail(struct __sk_buff *skb, struct scratch *scratch,
				 struct stamp *stamp)
{
	if (!scratch || !stamp)
		return -1;
	for (int i = 0; i < CHUNKS_MAX; i++) {
		__u32 len = stamp->moved_from - stamp->tail_off;

		if (len == 0)
			return 0;
		if (fault(FAULT_MOVE) && i == 1)
			return -1;
		if (len > CHUNK_LEN_BYTES)
			len = CHUNK_LEN_BYTES;
		if (move_chunk(skb, scratch, stamp->moved_from - len, len, stamp->grow, false))
			return -1;
		stamp->moved_from -= len;
	}
	return stamp->moved_from == stamp->tail_off ? 0 : -1;
}

static __noinline long move_tail_back(struct __sk_buff *skb, struct scratch *scratch,
				      struct stamp *stamp)
{
	if (!scratch || !stamp)
		return -1;
	for (int i = 0; i < CHUNKS_MAX; i++) {
		__u32 len = stamp->tail_end - stamp->moved_from;

		if (len == 0)
			return 0;
		if (len > CHUNK_LEN_BYTES)
			len = CHUNK_LEN_BYTES;
		if (move_chunk(skb, scratch, stamp->moved_from, len, stamp->grow, true))
			return -1;
		stamp->moved_from += len;
	}
	return stamp->moved_from == stamp->tail_end ? 0 : -1;
}

/*
 * Length of a struct tcp_rest with that many bytes of options. It is in bounds; the check is for
 * the verifier, which forgets what it knew of a number that has been in memory.
 */
static __always_inline __u32 tcp_rest_len(__u32 options_len)
{
	__u64 len = options_len;

	barrier_var(len);
	if (len > TCP_OPTIONS_MAX)
		len = TCP_OPTIONS_MAX;
	return TCP_REST_HEAD_LEN + len;
}

static __always_inline long store_tcp(struct __sk_buff *skb, const struct syn *syn,
				      const struct tcp_rest *tcp, __u32 options_len)
{
	return bpf_skb_store_bytes(skb, syn->l4_off + TCP_REST_OFF, tcp, tcp_rest_len(options_len),
				   0);
}

/* Writes the length of an IP packet that grew by `grow` bytes and, for IPv4, the checksum (RFC
 * 1624). */
static __always_inline long store_ip(struct __sk_buff *skb, const struct syn *syn, __u32 grow)
{
	__u32 len = syn->ip_len_bytes + grow;
	__u32 ip4[3];

	if (syn->event.flow.family == 6) {
		__be16 payload_len_be = bpf_htons(len - IPV6_HEADER_LEN);

		return bpf_skb_store_bytes(skb, syn->l3_off + offsetof(struct ipv6hdr, payload_len),
					   &payload_len_be, sizeof(payload_len_be), 0);
	}

	__builtin_memcpy(ip4, syn->ip4, sizeof(ip4));
	if (grow) {
		__be16 *words = (__be16 *)ip4;
		__u32 sum = (__u16)~words[5] + (__u16)~words[1];

		words[1] = bpf_htons(len);
		sum += words[1];
		sum = (sum & 0xffff) + (sum >> 16);
		sum = (sum & 0xffff) + (sum >> 16);
		words[5] = ~sum;
	}
	return bpf_skb_store_bytes(skb, syn->l3_off, ip4, sizeof(ip4), 0);
}

/* The sum of all new words less that of all old ones, as a 32-bit one's complement sum (RFC 1071).
 */
static __always_inline __u32 sum_changes(const struct scratch *scratch)
{
	const __u32 *from = (const __u32 *)&scratch->old_tcp;
	const __u32 *to = (const __u32 *)&scratch->new_tcp;
	__u64 sum = 0;

#pragma unroll
	for (int i = 0; i < TCP_REST_LEN / 4; i++)
		sum += (__u64)to[i] + (__u32)~from[i];
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return sum;
}

/*
 * The length is part of the pseudo-header, whose sum stands in the checksum field of every skb. The
 * changed header bytes are summed by the device where it sums the payload, so there that call does
 * nothing.
 */
static __always_inline long mend_checksum(struct __sk_buff *skb, const struct syn *syn,
					  struct scratch *scratch, const struct stamp *stamp)
{
	__u32 check_off = syn->l4_off + TCP_CHECK_OFF;
	__u32 tcp_len = syn->ip_len_bytes - (syn->l4_off - syn->l3_off);

	if (stamp->grow &&
	    (fault(FAULT_CSUM_LENGTH) ||
	     bpf_l4_csum_replace(skb, check_off, bpf_htons(tcp_len),
				 bpf_htons(tcp_len + stamp->grow), BPF_F_PSEUDO_HDR | 2)))
		return -1;

	if (fault(FAULT_CSUM_BYTES))
		return -1;
	return bpf_l4_csum_replace(skb, check_off, 0, sum_changes(scratch), 0);
}

/* Puts back every byte that a stamp may have changed. The old TCP bytes include the old checksum.
 */
static __noinline bool restore(struct __sk_buff *skb, struct syn *syn, struct scratch *scratch,
			       struct stamp *stamp)
{
	if (!syn || !scratch || !stamp || fault(FAULT_RESTORE))
		return false;
	return !move_tail_back(skb, scratch, stamp) &&
	       !store_tcp(skb, syn, &scratch->old_tcp, stamp->old_options_len) &&
	       !store_ip(skb, syn, 0) &&
	       !(stamp->grow && bpf_skb_change_tail(skb, stamp->tail_end, 0));
}

/* Also true if the length would not fit into the IP header: the MTU of loopback is larger than
 * that. */
static __always_inline bool exceeds_mtu(struct __sk_buff *skb, const struct syn *syn, __u32 grow)
{
	__u32 len_max = syn->event.flow.family == 6 ? IPV6_HEADER_LEN + 0xffff : 0xffff;
	__u32 len = syn->ip_len_bytes;

	if (len + grow > len_max)
		return true;
	if (!config.has_check_mtu)
		return len + grow > config.mtu_bytes;
	return bpf_check_mtu(skb, 0, &len, grow, 0) != 0;
}

/* Appends `token`, or leaves the packet as it came. *`must_drop` is set if it can do neither. */
static __always_inline enum netoken_verdict
stamp_syn(struct __sk_buff *skb, struct scratch *scratch, const __u8 *token, bool *must_drop)
{
	struct option_list *options = &scratch->options;
	struct syn *syn = &scratch->syn;
	__u32 tcp_len = syn->tcp_len_bytes;
	__u32 options_len = tcp_len - TCP_HEADER_LEN;
	struct stamp stamp = {};

	if (syn->is_fragment)
		return VERDICT_FRAGMENT;
	if (tcp_len < TCP_HEADER_LEN || syn->l4_off + tcp_len > syn->l3_off + syn->ip_len_bytes ||
	    syn->l3_off + syn->ip_len_bytes > skb->len)
		return VERDICT_MALFORMED;

	/* What lies behind the options counts as zero in the copies, and so in their sums. */
	__builtin_memset(&scratch->old_tcp, 0, TCP_REST_LEN);
	if (bpf_skb_load_bytes(skb, syn->l4_off + TCP_REST_OFF, &scratch->old_tcp,
			       tcp_rest_len(options_len)))
		return VERDICT_HELPER_FAILED;
	if (!walk_options(options_len))
		return VERDICT_MALFORMED;
	if (options->has_token)
		return VERDICT_ALREADY_STAMPED;
	if (options->has_auth)
		return VERDICT_AUTH_OPTION;

	stamp.old_options_len = options_len;
	stamp.new_options_len =
		append_token(&scratch->new_tcp, &scratch->old_tcp, options, options_len, token);
	if (stamp.new_options_len == 0)
		return VERDICT_NO_ROOM;
	stamp.grow = stamp.new_options_len - stamp.old_options_len;
	stamp.tail_off = syn->l4_off + tcp_len;
	stamp.tail_end = skb->len;
	stamp.moved_from = stamp.tail_end;

	if (stamp.grow) {
		/* Segments of one skb would each carry the token; resizing would merge them. */
		if (skb->gso_size || exceeds_mtu(skb, syn, stamp.grow))
			return VERDICT_TOO_BIG;
		if (fault(FAULT_GROW))
			return VERDICT_HELPER_FAILED;
		if (bpf_skb_change_tail(skb, stamp.tail_end + stamp.grow, 0))
			return VERDICT_HELPER_FAILED;
	}

	/* The headers go in behind the payload, which they would overwrite. */
	if ((!stamp.grow || !move_tail(skb, scratch, &stamp)) && !fault(FAULT_STORE_TCP) &&
	    !store_tcp(skb, syn, &scratch->new_tcp, stamp.new_options_len) &&
	    !fault(FAULT_STORE_IP) && (!stamp.grow || !store_ip(skb, syn, stamp.grow)) &&
	    !mend_checksum(skb, syn, scratch, &stamp)) {
		syn->event.new_options_len_bytes = stamp.new_options_len;
		return VERDICT_STAMPED;
	}
	*must_drop = !restore(skb, syn, scratch, &stamp);
	return VERDICT_HELPER_FAILED;
}

#endif
