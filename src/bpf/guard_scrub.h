/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What becomes of a token that was looked at: the host does not see it, and the application can ask
 * for it.
 */
#ifndef NETOKEN_GUARD_SCRUB_H
#define NETOKEN_GUARD_SCRUB_H

#include "guard_maps.h"
#include "guard_parse.h"
#include "hook.h"
#include "token.h"
#include "wire.h"

/* Keeps who opened a connection. A retransmission writes the same again, with a later time. */
static __noinline int note_peer(const struct guard_scratch *scratch)
{
	struct netoken_peer_key key = {};
	struct netoken_peer peer = {
		.verdict = GUARD_VALID,
	};

	if (!scratch)
		return 0;
	__builtin_memcpy(key.saddr, scratch->event.flow.saddr, ADDR_LEN);
	__builtin_memcpy(key.daddr, scratch->event.flow.daddr, ADDR_LEN);
	key.sport_be = scratch->event.flow.sport_be;
	key.dport_be = scratch->event.flow.dport_be;
	key.family = scratch->event.flow.family;
	peer.time_ns = bpf_ktime_get_ns();
	peer.rule = scratch->event.rule;
	__builtin_memcpy(peer.token, scratch->event.token, TOKEN_LEN);
	return bpf_map_update_elem(&guard_peers, &key, &peer, BPF_ANY);
}

/*
 * Turns every token in the copy of the options into NOPs. Returns the sum of what changed, of new
 * words less old ones: as the options begin at an even place of the segment, a token that stands at
 * an odd one is summed up right as well.
 */
static __always_inline __u16 blank_tokens(struct guard_scratch *scratch)
{
	__u32 *words = (__u32 *)scratch->options;
	__u64 to_blank = scratch->to_blank, sum = 0;

	for (int i = 0; i < TCP_OPTIONS_MAX / 4; i++) {
		__u32 old = words[i];
		/* Four bits become the lowest of four bytes each, which is also what a NOP is. */
		__u32 nops = le32((__u32)(to_blank >> i * 4 & 0xf) * 0x204081 & 0x01010101);

		words[i] = (old & ~(nops * 0xff)) | nops;
		sum += (__u64)words[i] + (__u32)~old;
	}
	return fold_long(sum);
}

/*
 * In an skb whose checksum the device computes later the helper changes nothing, and the changed
 * bytes are the device's business. One that holds the sum of the whole packet stays right, because
 * the checksum takes back what the options add.
 */
__noinline int scrub_tc(struct __sk_buff *skb)
{
	struct guard_scratch *scratch = this_guard_scratch();
	__u32 less_one;
	__u16 change;

	if (!scratch || config.faults & FAULT_STORE_TCP)
		return false;
	change = blank_tokens(scratch);
	/* Before 6.8 the verifier learns nothing from `len != 0`. */
	less_one = scratch->tcp_len_bytes - TCP_HEADER_LEN - 1;
	barrier_var(less_one);
	if (less_one >= TCP_OPTIONS_MAX)
		return false;
	return !bpf_skb_store_bytes(skb, scratch->l4_off + TCP_HEADER_LEN, scratch->options,
				    less_one + 1, 0) &&
	       !bpf_l4_csum_replace(skb, scratch->l4_off + TCP_CHECK_OFF, 0, change, 0);
}

/* Longer segments are not summed up to find out what their checksum is. */
#define SUM_MAX_BYTES 2048

/* The next `size` bytes; NULL if they are not there. The compiler must not compare with something
 * less than the end instead, which the verifier does not understand. */
static __always_inline const void *take(const void **at, const void *end, __u32 size)
{
	const void *taken = *at, *next = taken + size;

	barrier_var(next);
	if (next > end)
		return NULL;
	*at = next;
	return taken;
}

/* Whether a segment and its pseudo-header, of which `sum` is that of the latter, sum up to what a
 * receiver wants to see. */
static __always_inline bool sums_up(const void *at, const void *end, __u32 len, __u64 sum)
{
	const void *part;

	for (int i = 0; i < SUM_MAX_BYTES / 4 && len >= 4; i++) {
		part = take(&at, end, 4);
		if (!part)
			return false;
		sum += *(const __u32 *)part;
		len -= 4;
	}
	if (len & 2) {
		part = take(&at, end, 2);
		if (!part)
			return false;
		sum += *(const __u16 *)part;
	}
	if (len & 1) {
		part = take(&at, end, 1);
		if (!part)
			return false;
		sum += bpf_htons(*(const __u8 *)part << 8);
	}
	return len < 4 && fold_long(sum) == 0xffff;
}

/*
 * Whether the checksum is left to a device: then it is the sum of the pseudo-header. veth and
 * generic XDP show packets of which a local sender has computed no more. A whole checksum is the
 * same by chance in one of 65536 packets, and in those the segment sums up. One in 65536 of the
 * others does that too and is mended in vain: the host does not look at the checksum, and where it
 * is forwarded the retransmission, which has another time in it, gets through.
 */
__noinline int is_partial_xdp(struct xdp_md *ctx)
{
	struct guard_scratch *scratch = this_guard_scratch();
	const __u32 *addrs;
	__u64 l4_off, sum = 0;
	void *tcp, *end;
	__u32 len;

	if (!scratch)
		return false;
	/* Mapping an IPv4 address adds 0xffff, which is nothing. */
	addrs = (const __u32 *)scratch->event.flow.saddr;
	for (__u32 i = 0; i < 2 * ADDR_LEN / 4; i++)
		sum += addrs[i];
	len = scratch->ip_len_bytes - (scratch->l4_off - scratch->l3_off);
	sum += (__u64)bpf_htons(IPPROTO_TCP) + bpf_htonl(len);

	l4_off = scratch->l4_off;
	barrier_var(l4_off);
	if (l4_off > GUARD_L4_OFF_MAX)
		return false;
	tcp = (void *)(long)ctx->data + l4_off;
	end = (void *)(long)ctx->data_end;
	if (tcp + TCP_HEADER_LEN > end || *(__u16 *)(tcp + TCP_CHECK_OFF) != fold_long(sum))
		return false;
	return !sums_up(tcp, end, len, sum);
}

__noinline int scrub_xdp(struct xdp_md *ctx)
{
	struct guard_scratch *scratch = this_guard_scratch();
	const __u32 *words;
	__u32 options_len;
	bool is_partial;
	void *tcp, *end;
	__be16 *check;
	__u64 l4_off;
	__u16 change;

	if (!scratch || config.faults & FAULT_STORE_TCP)
		return false;
	is_partial = is_partial_xdp(ctx);
	change = blank_tokens(scratch);
	words = (const __u32 *)scratch->options;
	options_len = scratch->tcp_len_bytes - TCP_HEADER_LEN;
	l4_off = scratch->l4_off;
	barrier_var(l4_off);
	if (l4_off > GUARD_L4_OFF_MAX)
		return false;
	tcp = (void *)(long)ctx->data + l4_off;
	end = (void *)(long)ctx->data_end;
	if (tcp + TCP_HEADER_LEN > end)
		return false;
	check = tcp + TCP_CHECK_OFF;
	if (!is_partial)
		*check = ~fold((__u16) ~*check + change);
	for (__u32 i = 0; i < TCP_OPTIONS_MAX / 4; i++) {
		__u32 *to = tcp + TCP_HEADER_LEN + i * 4;

		if (i * 4 >= options_len)
			break;
		if ((void *)(to + 1) > end)
			return false;
		*to = words[i];
	}
	return true;
}

#endif
