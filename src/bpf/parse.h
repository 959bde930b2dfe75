/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Finds the TCP SYN in an outgoing packet and says where it is and whose it is. Everything that is
 * not a SYN leaves here after a few loads: no helper, no map, no call.
 *
 * The contract of every function: a pointer into the packet is checked against `end` before it is
 * read, at the place where it is read. Lengths come from the wire and are hostile.
 */
#ifndef NETOKEN_PARSE_H
#define NETOKEN_PARSE_H

#include "scratch.h"
#include "types.h"

#define ETH_P_IP 0x0800
#define ETH_P_IPV6 0x86dd
#define ETH_P_8021Q 0x8100
#define ETH_P_8021AD 0x88a8
#define ETH_P_QINQ1 0x9100

#define IP_OFFSET 0x1fff /* fragment offset, RFC 791 */
#define IP_MF 0x2000
#define IPV6_OFFSET 0xfff8 /* fragment offset, RFC 8200 section 4.5 */
#define IPV6_HEADER_LEN 40
#define TCP_HEADER_LEN 20

#define VLAN_TAGS_MAX 2
#define IPV6_EXTENSIONS_MAX 8
/* What is pulled into the linear part when the headers are not there: link, IP, and TCP at their
 * largest. */
#define PULL_LEN_BYTES 256

#define TCP_FLAG_FIN 0x01
#define TCP_FLAG_SYN 0x02
#define TCP_FLAG_RST 0x04
#define TCP_FLAG_ACK 0x10

enum parsed {
	PARSED_OTHER, /* not a SYN */
	PARSED_SYN,
	PARSED_SHORT, /* the linear part ends before the answer */
};

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

static __always_inline void copy_mapped(__u8 *to, __be32 addr_be)
{
	__u32 *words = (__u32 *)to;

	words[0] = 0;
	words[1] = 0;
	words[2] = bpf_htonl(0xffff);
	words[3] = addr_be;
}

static __always_inline enum parsed parse_tcp(const struct tcp_head *tcp, void *end)
{
	if ((void *)(tcp + 1) > end)
		return PARSED_SHORT;
	/* ECE and CWR do not matter: an ECN SYN is a SYN. One with FIN or RST opens nothing. */
	if ((tcp->flags & (TCP_FLAG_SYN | TCP_FLAG_ACK | TCP_FLAG_RST | TCP_FLAG_FIN)) !=
	    TCP_FLAG_SYN)
		return PARSED_OTHER;
	return PARSED_SYN;
}

static __always_inline void describe_tcp(struct syn *syn, const struct tcp_head *tcp)
{
	syn->tcp_len_bytes = (tcp->data_offset >> 4) * 4;
	syn->event.flow.sport_be = tcp->sport_be;
	syn->event.flow.dport_be = tcp->dport_be;
	syn->event.flow.isn = bpf_ntohl(tcp->seq_be);
}

static __always_inline enum parsed parse_ipv4(void *data, struct iphdr *ip, void *end)
{
	struct scratch *scratch;
	struct tcp_head *tcp;
	enum parsed parsed;
	struct syn *syn;
	__u16 frag;

	if ((void *)(ip + 1) > end)
		return PARSED_SHORT;
	if (ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_TCP)
		return PARSED_OTHER;
	frag = bpf_ntohs(ip->frag_off);
	if (frag & IP_OFFSET)
		return PARSED_OTHER; /* only a first fragment shows what it belongs to */
	tcp = (void *)ip + ip->ihl * 4;
	parsed = parse_tcp(tcp, end);
	if (parsed != PARSED_SYN)
		return parsed;

	scratch = this_scratch();
	if (!scratch)
		return PARSED_OTHER;
	syn = &scratch->syn;
	syn->l3_off = (void *)ip - data;
	syn->l4_off = (void *)tcp - data;
	syn->ip_len_bytes = bpf_ntohs(ip->tot_len);
	syn->is_fragment = frag & IP_MF;
	__builtin_memcpy(syn->ip4, ip, sizeof(syn->ip4));
	syn->event.flow.family = 4;
	copy_mapped(syn->event.flow.saddr, ip->saddr);
	copy_mapped(syn->event.flow.daddr, ip->daddr);
	describe_tcp(syn, tcp);
	return PARSED_SYN;
}

static __always_inline enum parsed parse_ipv6(void *data, struct ipv6hdr *ip, void *end)
{
	__u32 off = sizeof(*ip);
	bool is_fragment = false;
	struct scratch *scratch;
	struct tcp_head *tcp;
	enum parsed parsed;
	struct syn *syn;
	__u8 next;

	if ((void *)(ip + 1) > end)
		return PARSED_SHORT;
	if (ip->version != 6)
		return PARSED_OTHER;

	next = ip->nexthdr;
	for (int i = 0; i < IPV6_EXTENSIONS_MAX && next != IPPROTO_TCP; i++) {
		/* Every one of these starts with `next header, length` and is at least 8 bytes
		 * long. */
		struct frag_hdr *ext = (void *)ip + off;

		if ((void *)(ext + 1) > end)
			return PARSED_SHORT;
		if (next == NEXTHDR_FRAGMENT) {
			if (ext->frag_off & bpf_htons(IPV6_OFFSET))
				return PARSED_OTHER; /* only a first fragment shows what it belongs
							to */
			is_fragment = true;
			off += sizeof(*ext);
		} else if (next == NEXTHDR_HOP || next == NEXTHDR_ROUTING || next == NEXTHDR_DEST) {
			off += (((struct ipv6_opt_hdr *)ext)->hdrlen + 1) * 8;
		} else {
			return PARSED_OTHER;
		}
		next = ext->nexthdr;
	}
	if (next != IPPROTO_TCP)
		return PARSED_OTHER;

	tcp = (void *)ip + off;
	parsed = parse_tcp(tcp, end);
	if (parsed != PARSED_SYN)
		return parsed;

	scratch = this_scratch();
	if (!scratch)
		return PARSED_OTHER;
	syn = &scratch->syn;
	syn->l3_off = (void *)ip - data;
	syn->l4_off = syn->l3_off + off;
	syn->ip_len_bytes = IPV6_HEADER_LEN + bpf_ntohs(ip->payload_len);
	syn->is_fragment = is_fragment;
	syn->event.flow.family = 6;
	__builtin_memcpy(syn->event.flow.saddr, &ip->saddr, ADDR_LEN);
	__builtin_memcpy(syn->event.flow.daddr, &ip->daddr, ADDR_LEN);
	describe_tcp(syn, tcp);
	return PARSED_SYN;
}

static __always_inline enum parsed parse_linear(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	__u32 off = config.l2_len_bytes;
	void *l3 = data + off;
	__u16 proto;

	if (off == 0) {
		if (l3 + 1 > end)
			return PARSED_SHORT;
		proto = *(__u8 *)l3 >> 4 == 4 ? ETH_P_IP : ETH_P_IPV6;
	} else {
		if (l3 > end)
			return PARSED_SHORT;
		proto = bpf_ntohs(*(__be16 *)(l3 - 2));
		/* A tag in skb metadata is not in the packet; these are the others. */
		for (int i = 0; i < VLAN_TAGS_MAX; i++) {
			struct vlan_tag *tag = l3;

			if (proto != ETH_P_8021Q && proto != ETH_P_8021AD && proto != ETH_P_QINQ1)
				break;
			if ((void *)(tag + 1) > end)
				return PARSED_SHORT;
			proto = bpf_ntohs(tag->next_proto_be);
			l3 = tag + 1;
		}
	}

	if (proto == ETH_P_IP)
		return parse_ipv4(data, l3, end);
	if (proto == ETH_P_IPV6)
		return parse_ipv6(data, l3, end);
	return PARSED_OTHER;
}

/* True if `skb` is a SYN, which this CPU's scratch then describes. */
static __always_inline bool parse_syn(struct __sk_buff *skb)
{
	enum parsed parsed = parse_linear(skb);

	if (parsed == PARSED_SHORT) {
		__u32 linear = skb->data_end - skb->data;

		if (skb->len <= linear)
			return false; /* nothing more to see: too short to show a SYN flag */
		if (bpf_skb_pull_data(skb, skb->len < PULL_LEN_BYTES ? skb->len : PULL_LEN_BYTES))
			return false;
		parsed = parse_linear(skb);
	}
	return parsed == PARSED_SYN;
}

#endif
