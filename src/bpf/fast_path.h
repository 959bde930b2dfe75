/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Tells the packets that a machine sends all day from those that need a closer look: no tag, no IP
 * options, no extension headers. It says no more than that: what it does not know is for
 * parse_syn(). Where a TCP header would have its flags and there are none of a SYN, there is no
 * SYN, whatever the packet is.
 *
 * In assembly, because what this costs is how often it jumps more than how much it does: a TCP
 * segment jumps once here, of whichever family it is. Where a compiler lays out the same checks,
 * one family pays up to twice as much, and which one changes with the compiler.
 */
#ifndef NETOKEN_FAST_PATH_H
#define NETOKEN_FAST_PATH_H

#include "wire.h"

/* Where the flags of a TCP header are behind `ip_len` bytes of IP header, and where they end. */
#define FLAGS_OFF(l2_len, ip_len) ((l2_len) + (ip_len) + offsetof(struct tcp_head, flags))
#define FLAGS_END(l2_len, ip_len) ((l2_len) + (ip_len) + sizeof(struct tcp_head))

/*
 * Goes to the label `unsure` unless the packet is surely no SYN. r2 is the packet, r3 its end, and
 * as far as r4 it has been seen to reach. `load_family` brings into r5 what tells the families
 * apart, in the byte order of `ipv4` and `ipv6`.
 */
/* clang-format off */
#define GOTO_UNLESS_NO_SYN(skb, l2_len, load_family, ipv4, ipv6)			\
	asm volatile goto(								\
		"   r2 = *(u32 *)(%[ctx] + %[data]);"					\
		"   r3 = *(u32 *)(%[ctx] + %[data_end]);"				\
		"   r4 = r2;"								\
		"   r4 += %[flags_end4];"						\
		"   if r4 > r3 goto %l[unsure];"					\
		load_family								\
		"   if r5 == %[is_ipv4] goto 1f;"					\
		"   if r5 != %[is_ipv6] goto %l[unsure];"				\
		"   r4 += %[more_of_ipv6];"						\
		"   if r4 > r3 goto %l[unsure];"					\
		"   r5 = *(u8 *)(r2 + %[next_header]);"					\
		"   if r5 != %[tcp] goto 2f;"						\
		"   r5 = *(u8 *)(r2 + %[flags6]);"					\
		"   r5 &= %[flags_of_syn];"						\
		"   if r5 != %[syn] goto 3f;"						\
		"   goto %l[unsure];"							\
		"2: if r5 == %[udp] goto 3f;"						\
		"   goto %l[unsure];"							\
		"1: r5 = *(u8 *)(r2 + %[version_ihl]);"					\
		"   if r5 != 0x45 goto %l[unsure];"					\
		"   r5 = *(u8 *)(r2 + %[flags4]);"					\
		"   r5 &= %[flags_of_syn];"						\
		"   if r5 == %[syn] goto %l[unsure];"					\
		"3:"									\
		:									\
		: [ctx] "r"(skb),							\
		  [data] "i"(offsetof(struct __sk_buff, data)),				\
		  [data_end] "i"(offsetof(struct __sk_buff, data_end)),			\
		  [is_ipv4] "i"(ipv4),							\
		  [is_ipv6] "i"(ipv6),							\
		  [version_ihl] "i"(l2_len),						\
		  [next_header] "i"((l2_len) + offsetof(struct ipv6hdr, nexthdr)),	\
		  [tcp] "i"(IPPROTO_TCP),						\
		  [udp] "i"(IPPROTO_UDP),						\
		  [flags4] "i"(FLAGS_OFF(l2_len, IPV4_HEADER_LEN)),			\
		  [flags6] "i"(FLAGS_OFF(l2_len, IPV6_HEADER_LEN)),			\
		  [flags_end4] "i"(FLAGS_END(l2_len, IPV4_HEADER_LEN)),			\
		  [more_of_ipv6] "i"(IPV6_HEADER_LEN - IPV4_HEADER_LEN),		\
		  [flags_of_syn] "i"(TCP_FLAGS_OF_SYN),					\
		  [syn] "i"(TCP_FLAG_SYN)						\
		: "r2", "r3", "r4", "r5"						\
		: unsure)
/* clang-format on */

static __always_inline bool is_surely_no_syn(struct __sk_buff *skb, const __u32 l2_len)
{
	if (l2_len)
		GOTO_UNLESS_NO_SYN(skb, ETH_HEADER_LEN, "r5 = *(u16 *)(r2 + 12);",
				   bpf_htons(ETH_P_IP), bpf_htons(ETH_P_IPV6));
	else
		GOTO_UNLESS_NO_SYN(skb, 0, "r5 = *(u8 *)(r2 + 0); r5 >>= 4;", 4, 6);
	return true;
unsure:
	return false;
}

#endif
