/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* How packets look: what the stamp, which sends them, and the guard, which gets them, both know. */
#ifndef NETOKEN_WIRE_H
#define NETOKEN_WIRE_H

#include "types.h"

#define ETH_HEADER_LEN 14
#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define ETH_P_QINQ1 0x9100

#define IP_OFFSET 0x1fff /* fragment offset, RFC 791 */
#define IP_MF 0x2000
#define IPV6_OFFSET 0xfff8 /* fragment offset, RFC 8200 section 4.5 */

#define IPV4_HEADER_LEN 20
#define IPV6_HEADER_LEN 40
#define TCP_HEADER_LEN 20
#define TCP_CHECK_OFF 16

#define TCP_FLAG_FIN 0x01
#define TCP_FLAG_SYN 0x02
#define TCP_FLAG_RST 0x04
#define TCP_FLAG_ACK 0x10
/* ECE and CWR do not matter: an ECN SYN is a SYN. One with FIN or RST opens nothing. */
#define TCP_FLAGS_OF_SYN (TCP_FLAG_SYN | TCP_FLAG_ACK | TCP_FLAG_RST | TCP_FLAG_FIN)

#define TCPOPT_EOL 0
#define TCPOPT_NOP 1
#define TCPOPT_MD5SIG 19 /* RFC 2385 */
#define TCPOPT_AO 29	 /* RFC 5925 */

/* Bytes in the order in which they stand in memory, as a little-endian number. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define le16(bytes) (bytes)
#define le32(bytes) (bytes)
#define le64(bytes) (bytes)
#else
#define le16(bytes) __builtin_bswap16(bytes)
#define le32(bytes) __builtin_bswap32(bytes)
#define le64(bytes) __builtin_bswap64(bytes)
#endif

/* The part of a TCP header that decides what the packet is: through the flags. */
struct tcp_head {
	__be16 sport_be;
	__be16 dport_be;
	__be32 seq_be;
	__be32 ack_be;
	__u8 data_offset; /* in words, in the upper four bits */
	__u8 flags;
};

struct vlan_tag {
	__be16 tci_be;
	__be16 next_proto_be;
};

static __always_inline bool is_extension(__u8 next)
{
	return next == NEXTHDR_HOP || next == NEXTHDR_ROUTING || next == NEXTHDR_DEST;
}

static __always_inline void copy_mapped(__u8 *to, __be32 addr_be)
{
	__u32 *words = (__u32 *)to;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = addr_be;
}

/* One's complement sum of 16-bit words in 16 bits, RFC 1071. */
static __always_inline __u16 fold(__u32 sum)
{
	sum = (sum & 0xffff) + (sum >> 16);
	return sum + (sum >> 16);
}

/* The same of 32-bit words, or of their one's complements. */
static __always_inline __u16 fold_long(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffffffff) + (sum >> 32);
	return fold((__u16)sum + (__u16)(sum >> 16));
}

/*
 * Keeps an offset inside a 64-byte window, in a way that the compiler cannot reason about and
 * remove. The verifier then knows the same of every iteration, and one pass through a loop's body
 * stands for all.
 */
static __always_inline __u64 below_64(__u64 off)
{
	asm volatile("%0 &= 63" : "+r"(off));
	return off;
}

#endif
