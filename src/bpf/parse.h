/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Finds the TCP SYN in an outgoing packet and says where it is and whose it is. Nearly every other
 * packet has left in fast_path.h.
 *
 * The contract of every function: a pointer into the packet is checked against `end` before it is
 * read, at the place where it is read. Lengths come from the wire and are hostile.
 */
#ifndef NETOKEN_PARSE_H
#define NETOKEN_PARSE_H

#include "maps.h"
#include "scratch.h"
#include "types.h"
#include "wire.h"

#define VLAN_TAGS_MAX 2
#define IPV6_EXTENSIONS_MAX 8
/* Link header, tags and IPv6 header, then as many extension headers as we walk, each at its
 * largest. */
#define L4_OFF_MAX (128 + IPV6_EXTENSIONS_MAX * 2048)
/* In the answer of skip_extensions(), beside the offset. */
#define EXTENSIONS_SHORT (1U << 30)
#define EXTENSIONS_FRAGMENT (1U << 31)
/* What is pulled into the linear part when the headers are not there: nearly always, and at most.
 */
#define PULL_LEN_BYTES 256
#define PULL_LEN_MAX_BYTES (L4_OFF_MAX + TCP_HEADER_LEN + TCP_OPTIONS_MAX)

enum parsed {
	PARSED_OTHER, /* not a SYN */
	PARSED_SYN,
	PARSED_SHORT, /* the linear part ends before the answer */
	PARSED_CUT,   /* a SYN, but the linear part ends before its options do */
	PARSED_STUCK, /* there is no memory to make the linear part longer */
};

/* Where a packet's headers are, as offsets from the start of the frame. */
struct layers {
	__u32 l3_off;
	__u32 l4_off;
	bool is_ipv6;
	bool is_fragment;
};

static __always_inline bool is_syn(__u8 flags)
{
	return (flags & TCP_FLAGS_OF_SYN) == TCP_FLAG_SYN;
}

/*
 * The offset of the TCP header behind extension headers, the first of which is of type `next` and
 * stands at `off`; 0 if it is not TCP. Not static, so that the verifier looks at this loop once and
 * for any offset.
 */
__noinline __u32 skip_extensions(struct __sk_buff *skb, __u32 off, __u32 next)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	__u32 flags = 0;

	for (int i = 0; i < IPV6_EXTENSIONS_MAX && next != IPPROTO_TCP; i++) {
		/* Every one of these starts with `next header, length` and has at least 8 bytes. */
		struct frag_hdr *ext;

		if (off > L4_OFF_MAX)
			return 0;
		ext = data + off;
		if ((void *)(ext + 1) > end)
			return EXTENSIONS_SHORT;
		if (next == NEXTHDR_FRAGMENT) {
			if (ext->frag_off & bpf_htons(IPV6_OFFSET))
				return 0; /* only a first fragment shows what it belongs to */
			flags = EXTENSIONS_FRAGMENT;
			off += sizeof(*ext);
		} else if (is_extension(next)) {
			off += (((struct ipv6_opt_hdr *)ext)->hdrlen + 1) * 8;
		} else {
			return 0;
		}
		next = ext->nexthdr;
	}
	return next == IPPROTO_TCP && off <= L4_OFF_MAX ? off | flags : 0;
}

/* PARSED_SYN here means: TCP, as far as IP says. */
static __always_inline enum parsed parse_ipv4(struct layers *layers, void *l3, void *end)
{
	struct iphdr *ip = l3;
	__u16 frag;

	if ((void *)(ip + 1) > end)
		return PARSED_SHORT;
	if (ip->version != 4 || ip->ihl < 5 || ip->protocol != IPPROTO_TCP)
		return PARSED_OTHER;
	frag = bpf_ntohs(ip->frag_off);
	if (frag & IP_OFFSET)
		return PARSED_OTHER; /* only a first fragment shows what it belongs to */
	layers->is_ipv6 = false;
	layers->is_fragment = frag & IP_MF;
	layers->l4_off = layers->l3_off + ip->ihl * 4;
	return PARSED_SYN;
}

static __always_inline enum parsed parse_ipv6(struct layers *layers, struct __sk_buff *skb,
					      void *l3, void *end)
{
	struct ipv6hdr *ip = l3;
	__u32 found;

	if ((void *)(ip + 1) > end)
		return PARSED_SHORT;
	if (ip->version != 6)
		return PARSED_OTHER;
	layers->is_ipv6 = true;
	layers->is_fragment = false;
	layers->l4_off = layers->l3_off + sizeof(*ip);
	if (ip->nexthdr == IPPROTO_TCP)
		return PARSED_SYN;
	if (!is_extension(ip->nexthdr) && ip->nexthdr != NEXTHDR_FRAGMENT)
		return PARSED_OTHER;

	found = skip_extensions(skb, layers->l4_off, ip->nexthdr);
	if (found == EXTENSIONS_SHORT)
		return PARSED_SHORT;
	layers->is_fragment = found & EXTENSIONS_FRAGMENT;
	layers->l4_off = found & ~EXTENSIONS_FRAGMENT;
	return found ? PARSED_SYN : PARSED_OTHER;
}

/* Finds the network header behind the link header and tags. A tag in skb metadata is not in the
 * packet. */
static __always_inline enum parsed parse_layers(struct layers *layers, struct __sk_buff *skb,
						__u32 l2_len)
{
	void *data = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;
	void *l3 = data + l2_len;
	__u16 proto;

	layers->l3_off = l2_len;
	if (l2_len == 0) {
		if (l3 + 1 > end)
			return PARSED_SHORT;
		proto = *(__u8 *)l3 >> 4 == 4 ? ETH_P_IP : ETH_P_IPV6;
	} else {
		if (l3 > end)
			return PARSED_SHORT;
		proto = bpf_ntohs(*(__be16 *)(l3 - 2));
		for (int i = 0; i < VLAN_TAGS_MAX; i++) {
			struct vlan_tag *tag = l3;

			if (proto != ETH_P_8021Q && proto != ETH_P_8021AD && proto != ETH_P_QINQ1)
				break;
			if ((void *)(tag + 1) > end)
				return PARSED_SHORT;
			proto = bpf_ntohs(tag->next_proto_be);
			layers->l3_off += sizeof(*tag);
			l3 = tag + 1;
		}
	}

	if (proto == ETH_P_IP)
		return parse_ipv4(layers, l3, end);
	if (proto == ETH_P_IPV6)
		return parse_ipv6(layers, skb, l3, end);
	return PARSED_OTHER;
}

/*
 * Copies a TCP header with `options_len` bytes of options. What lies behind those counts as zero in
 * the copy, and so in its sum. False if the linear part ends before they do.
 */
static __always_inline bool copy_tcp(struct headers *to, const void *tcp, const void *end,
				     __u32 options_len)
{
	const __u32 *word = tcp + TCP_HEADER_LEN;
	__u32 *options = (__u32 *)to->rest.options;

	__builtin_memset(options, 0, TCP_OPTIONS_MAX);
	if ((const void *)word > end)
		return false;
	__builtin_memcpy(to->tcp, tcp, TCP_REST_OFF);
	__builtin_memcpy(&to->rest, tcp + TCP_REST_OFF, TCP_HEADER_LEN - TCP_REST_OFF);

	for (__u32 i = 0; i < TCP_OPTIONS_MAX / 4; i++) {
		if (i * 4 >= options_len)
			break;
		if ((const void *)(word + i + 1) > end)
			return false;
		options[i] = word[i];
	}
	return true;
}

/* Notes in the scratch what is known of a SYN, and copies its headers. */
static __always_inline enum parsed describe_syn(struct scratch *scratch, struct __sk_buff *skb,
						const struct layers *layers,
						const struct tcp_head *tcp, void *end)
{
	void *l3 = (void *)(long)skb->data + layers->l3_off;
	__u32 tcp_len = (tcp->data_offset >> 4) * 4;
	struct syn *syn = &scratch->syn;
	struct netoken_flow *flow = &syn->event.flow;

	syn->l3_off = layers->l3_off;
	syn->l4_off = layers->l4_off;
	syn->is_fragment = layers->is_fragment;
	syn->tcp_len_bytes = tcp_len;
	flow->sport_be = tcp->sport_be;
	flow->dport_be = tcp->dport_be;
	flow->isn = bpf_ntohl(tcp->seq_be);
	if (layers->is_ipv6) {
		struct ipv6hdr *ip = l3;

		if ((void *)(ip + 1) > end)
			return PARSED_OTHER;
		flow->family = 6;
		syn->ip_len_bytes = IPV6_HEADER_LEN + bpf_ntohs(ip->payload_len);
		__builtin_memcpy(scratch->old.ip, ip, IPV6_HEADER_LEN);
		__builtin_memcpy(flow->saddr, &ip->saddr, ADDR_LEN);
		__builtin_memcpy(flow->daddr, &ip->daddr, ADDR_LEN);
	} else {
		struct iphdr *ip = l3;

		if ((void *)(ip + 1) > end)
			return PARSED_OTHER;
		flow->family = 4;
		syn->ip_len_bytes = bpf_ntohs(ip->tot_len);
		__builtin_memcpy(&scratch->old.ip[IPV6_HEADER_LEN - IPV4_HEADER_LEN], ip,
				 IPV4_HEADER_LEN);
		copy_mapped(flow->saddr, ip->saddr);
		copy_mapped(flow->daddr, ip->daddr);
	}
	/* Where the packet itself ends too early its lengths lie, which is for the stamp to say. */
	syn->is_cut = !copy_tcp(&scratch->old, tcp, end, tcp_len - TCP_HEADER_LEN) &&
		      tcp_len >= TCP_HEADER_LEN && skb->len >= layers->l4_off + tcp_len;
	return syn->is_cut ? PARSED_CUT : PARSED_SYN;
}

/* *`scratch` is where the SYN is described. */
static __always_inline enum parsed parse_linear(struct __sk_buff *skb, __u32 l2_len,
						struct scratch **scratch)
{
	struct layers layers;
	enum parsed parsed = parse_layers(&layers, skb, l2_len);
	struct tcp_head *tcp;
	__u64 l4_off;
	void *end;

	if (parsed != PARSED_SYN)
		return parsed;
	/* One register for the check and for what it bounds. The verifiers of 5.10 and 6.1 do not
	 * carry the bound over to another, and then know no range behind the pointer. */
	l4_off = layers.l4_off;
	barrier_var(l4_off);
	if (l4_off > L4_OFF_MAX)
		return PARSED_OTHER;
	/* Read anew: behind a call the verifier has forgotten what these point to. */
	end = (void *)(long)skb->data_end;
	tcp = (void *)(long)skb->data + l4_off;
	if ((void *)(tcp + 1) > end)
		return PARSED_SHORT;
	if (!is_syn(tcp->flags))
		return PARSED_OTHER;

	*scratch = this_scratch();
	return *scratch ? describe_syn(*scratch, skb, &layers, tcp, end) : PARSED_OTHER;
}

/* Out of line: the compiler would share the loads with those that become pointers, and cut them to
 * 32 bits. */
static __noinline bool is_linear(struct __sk_buff *skb)
{
	return skb->len <= skb->data_end - skb->data;
}

/* Moves up to `pull_len` bytes into the linear part and looks again. */
static __always_inline enum parsed pull_and_parse(struct __sk_buff *skb, __u32 l2_len,
						  __u32 pull_len)
{
	struct scratch *scratch;

	if (is_linear(skb))
		return PARSED_OTHER; /* nothing more to see: too short to show a SYN flag */
	if (fault(FAULT_PULL) || bpf_skb_pull_data(skb, skb->len < pull_len ? skb->len : pull_len))
		return PARSED_STUCK;
	return parse_linear(skb, l2_len, &scratch);
}

/* Out of line, because headers are nearly always in the linear part; and not static, so that the
 * verifier looks at each once. */
__noinline int pull_ethernet(struct __sk_buff *skb, __u32 pull_len)
{
	return pull_and_parse(skb, ETH_HEADER_LEN, pull_len);
}

__noinline int pull_bare(struct __sk_buff *skb, __u32 pull_len)
{
	return pull_and_parse(skb, 0, pull_len);
}

/* Goes on where `parsed` is no answer yet. */
static __always_inline int look_further(struct __sk_buff *skb, __u32 l2_len, __u32 pull_len,
					int parsed)
{
	int found;

	if (parsed != PARSED_SHORT && parsed != PARSED_CUT)
		return parsed;
	found = l2_len ? pull_ethernet(skb, pull_len) : pull_bare(skb, pull_len);
	if (found != PARSED_STUCK)
		return found;
	/* A SYN that is cut is one, and the scratch says of it what could be seen. */
	return parsed == PARSED_CUT ? PARSED_SYN : PARSED_OTHER;
}

/* This CPU's scratch, which describes the SYN, or NULL if `skb` is none. */
static __always_inline struct scratch *parse_syn(struct __sk_buff *skb, __u32 l2_len)
{
	struct scratch *scratch = NULL;
	int parsed = parse_linear(skb, l2_len, &scratch);

	parsed = look_further(skb, l2_len, PULL_LEN_BYTES, parsed);
	parsed = look_further(skb, l2_len, PULL_LEN_MAX_BYTES, parsed);
	if (parsed != PARSED_SYN)
		return NULL;
	return scratch ? scratch : this_scratch();
}

#endif
