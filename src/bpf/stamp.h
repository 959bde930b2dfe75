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

/* 64 KiB, the largest IP packet */
#define CHUNKS_MAX 32

/*
 * Copies `len` bytes of the packet. Returns 0 if it could. Here and below not static, so that the
 * verifier looks at each once; and so they take no pointer but the context's.
 */
__noinline int copy_chunk(struct __sk_buff *skb, __u32 from, __u32 to, __u32 len)
{
	struct scratch *scratch = this_scratch();
	__u32 less_one = len - 1;

	/* Before 6.8 the verifier learns nothing from `len != 0`, so the check is of one less. */
	barrier_var(less_one);
	if (!scratch || less_one >= CHUNK_LEN_BYTES)
		return -1;
	len = less_one + 1;
	if (bpf_skb_load_bytes(skb, from, scratch->chunk, len))
		return -1;
	return bpf_skb_store_bytes(skb, to, scratch->chunk, len, 0);
}

/* Moves the payload, from its end, so that nothing is overwritten before it was read. Returns 0 if
 * all of it has moved. */
__noinline int move_tail(struct __sk_buff *skb)
{
	struct scratch *scratch = this_scratch();
	struct stamp *stamp;

	if (!scratch)
		return -1;
	stamp = &scratch->stamp;
	for (int i = 0; i < CHUNKS_MAX; i++) {
		__u32 len = stamp->moved_from - stamp->tail_off;
		__u32 from;

		if (len == 0)
			return 0;
		if (fault(FAULT_MOVE) && i == 1)
			return -1;
		if (len > CHUNK_LEN_BYTES)
			len = CHUNK_LEN_BYTES;
		from = stamp->moved_from - len;
		if (copy_chunk(skb, from, from + stamp->grow, len))
			return -1;
		stamp->moved_from = from;
	}
	return stamp->moved_from == stamp->tail_off ? 0 : -1;
}

static __always_inline int move_tail_back(struct __sk_buff *skb, struct stamp *stamp)
{
	for (int i = 0; i < CHUNKS_MAX; i++) {
		__u32 len = stamp->tail_end - stamp->moved_from;

		if (len == 0)
			return 0;
		if (len > CHUNK_LEN_BYTES)
			len = CHUNK_LEN_BYTES;
		if (copy_chunk(skb, stamp->moved_from + stamp->grow, stamp->moved_from, len))
			return -1;
		stamp->moved_from += len;
	}
	return stamp->moved_from == stamp->tail_end ? 0 : -1;
}

/*
 * Length of a TCP header with that many bytes of options. It is in bounds; the check is for the
 * verifier, which forgets what it knew of a number that has been in memory.
 */
static __always_inline __u32 tcp_header_len(__u32 options_len)
{
	__u64 len = options_len;

	barrier_var(len);
	if (len > TCP_OPTIONS_MAX)
		len = TCP_OPTIONS_MAX;
	return TCP_HEADER_LEN + len;
}

/* Writes both headers: at once, or one by one if IP options or extension headers stand between. */
static __always_inline bool store_headers(struct __sk_buff *skb, const struct syn *syn,
					  const struct headers *headers, __u32 options_len,
					  __u32 faults)
{
	__u32 ip_len = syn->event.flow.family == 6 ? IPV6_HEADER_LEN : IPV4_HEADER_LEN;
	const __u8 *ip = &headers->ip[IPV6_HEADER_LEN - ip_len];
	__u32 tcp_len = tcp_header_len(options_len);

	if (faults & FAULT_STORE_TCP)
		return false;
	if (syn->l4_off == syn->l3_off + ip_len)
		return !bpf_skb_store_bytes(skb, syn->l3_off, ip, ip_len + tcp_len, 0) &&
		       !(faults & FAULT_STORE_IP);
	return !bpf_skb_store_bytes(skb, syn->l4_off, headers->tcp, tcp_len, 0) &&
	       !(faults & FAULT_STORE_IP) && !bpf_skb_store_bytes(skb, syn->l3_off, ip, ip_len, 0);
}

/* Writes the new length of the IP packet and, for IPv4, the checksum (RFC 1624). */
static __always_inline void grow_ip(struct headers *new, const struct syn *syn, __u32 grow)
{
	__u32 len = syn->ip_len_bytes + grow;

	if (syn->event.flow.family == 6) {
		struct ipv6hdr *ip = (void *)new->ip;

		ip->payload_len = bpf_htons(len - IPV6_HEADER_LEN);
	} else {
		struct iphdr *ip = (void *)&new->ip[IPV6_HEADER_LEN - IPV4_HEADER_LEN];
		__be16 len_be = bpf_htons(len);

		ip->check = ~fold((__u16)~ip->check + (__u16)~ip->tot_len + len_be);
		ip->tot_len = len_be;
	}
}

/* The sum of all new words less that of all old ones. */
static __always_inline __u16 sum_changes(const struct scratch *scratch)
{
	const __u32 *from = (const __u32 *)&scratch->old.rest;
	const __u32 *to = (const __u32 *)&scratch->new.rest;
	__u64 sum = 0;

	for (int i = 0; i < TCP_REST_LEN / 4; i++) {
		/* A change of the checksum is not one of what it sums. */
		if (i != 1)
			sum += (__u64)to[i] + (__u32)~from[i];
	}
	return fold_long(sum);
}

/*
 * Mends the checksum of a packet that grew: in the packet for its length, in the new header for the
 * bytes that changed in it.
 *
 * The length is part of the pseudo-header, so in every skb the helper has something to change, and
 * in which direction tells what the field is. Where the device sums up the TCP segment it is the
 * sum of the pseudo-header, which rises with the length, and the changed bytes are the device's
 * business. Everywhere else it is the complement of the whole sum, which falls.
 */
static __always_inline bool mend_grown(struct __sk_buff *skb, struct scratch *scratch, __u32 grow)
{
	const struct syn *syn = &scratch->syn;
	__be16 old_check = scratch->old.rest.check_be, new_check;
	__u32 tcp_len = syn->ip_len_bytes - (syn->l4_off - syn->l3_off);
	__be16 from = bpf_htons(tcp_len), to = bpf_htons(tcp_len + grow);
	__u16 rise = fold((__u16)~from + to), change;
	__u64 l4_off = syn->l4_off;
	__u8 *tcp;

	if (fault(FAULT_CSUM_LENGTH) || bpf_l4_csum_replace(skb, l4_off + TCP_CHECK_OFF, from, to,
							    BPF_F_PSEUDO_HDR | sizeof(from)))
		return false;

	barrier_var(l4_off);
	if (l4_off > L4_OFF_MAX)
		return false;
	tcp = (void *)(long)skb->data + l4_off;
	if ((void *)tcp + TCP_HEADER_LEN > (void *)(long)skb->data_end)
		return false;
	new_check = *(__be16 *)(tcp + TCP_CHECK_OFF);

	change = fold((__u16)~old_check + new_check);
	if (change == (__u16)~rise)
		new_check = ~fold((__u16)~new_check + sum_changes(scratch));
	else if (change != rise)
		return false;
	scratch->new.rest.check_be = new_check;
	return true;
}

/* Puts back every byte that a stamp may have changed, the checksum included. Returns 0 if it could.
 */
__noinline int restore(struct __sk_buff *skb)
{
	struct scratch *scratch = this_scratch();
	struct stamp *stamp;

	if (!scratch || fault(FAULT_RESTORE))
		return -1;
	stamp = &scratch->stamp;
	if (move_tail_back(skb, stamp) ||
	    !store_headers(skb, &scratch->syn, &scratch->old, stamp->old_options_len, 0))
		return -1;
	return stamp->grow && bpf_skb_change_tail(skb, stamp->tail_end, 0) ? -1 : 0;
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
	struct stamp *stamp = &scratch->stamp;
	/* Wider than need be: half a slot of the stack that is written leaves the verifier
	 * wondering about the other half, for every way in which a SYN can be found. */
	__u64 tcp_len = syn->tcp_len_bytes;
	__u64 options_len = tcp_len - TCP_HEADER_LEN;
	__u64 new_len, grow;

	if (syn->is_fragment)
		return VERDICT_FRAGMENT;
	if (tcp_len < TCP_HEADER_LEN || syn->l4_off + tcp_len > syn->l3_off + syn->ip_len_bytes ||
	    syn->l3_off + syn->ip_len_bytes > skb->len)
		return VERDICT_MALFORMED;
	if (syn->is_cut)
		return VERDICT_HELPER_FAILED;

	if (is_plain_list(&scratch->old.rest, options_len)) {
		options->end = options_len;
	} else {
		if (!walk_options(options_len))
			return VERDICT_MALFORMED;
		if (options->has_token)
			return VERDICT_ALREADY_STAMPED;
		if (options->has_auth)
			return VERDICT_AUTH_OPTION;
	}
	/* The end of the list is in the scratch alone, for the verifier: see classify(). */
	barrier();

	new_len = append_token(&scratch->new, &scratch->old, options, options_len, token);
	if (new_len == 0)
		return VERDICT_NO_ROOM;
	grow = new_len - options_len;
	stamp->old_options_len = options_len;
	stamp->new_options_len = new_len;
	stamp->grow = grow;
	stamp->tail_off = syn->l4_off + tcp_len;
	stamp->tail_end = skb->len;
	stamp->moved_from = stamp->tail_end;

	if (grow) {
		/* Segments of one skb would each carry the token; resizing would merge them. */
		if (skb->gso_size || exceeds_mtu(skb, syn, grow))
			return VERDICT_TOO_BIG;
		if (fault(FAULT_GROW))
			return VERDICT_HELPER_FAILED;
		if (bpf_skb_change_tail(skb, stamp->tail_end + grow, 0))
			return VERDICT_HELPER_FAILED;
		grow_ip(&scratch->new, syn, grow);
	}

	/* The headers go in behind the payload, which they would overwrite. */
	if ((!grow || (mend_grown(skb, scratch, grow) &&
		       (stamp->tail_off == stamp->tail_end || !move_tail(skb)))) &&
	    store_headers(skb, syn, &scratch->new, new_len, config.faults) &&
	    !fault(FAULT_CSUM_BYTES) &&
	    (grow ||
	     !bpf_l4_csum_replace(skb, syn->l4_off + TCP_CHECK_OFF, 0, sum_changes(scratch), 0))) {
		syn->event.new_options_len_bytes = new_len;
		return VERDICT_STAMPED;
	}
	*must_drop = restore(skb) != 0;
	return VERDICT_HELPER_FAILED;
}

#endif
