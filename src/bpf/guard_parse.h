/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Finds, in what comes in, whatever could open a TCP connection, and says how much of it can be
 * told. Everything else leaves here after a few loads.
 *
 * Where the stamp may look away, the guard may not: what it cannot read is a shape of its own, and
 * the rules decide about it by what is known, at worst by nothing. What no host takes for TCP, such
 * as other protocols, is none of its business.
 */
#ifndef NETOKEN_GUARD_PARSE_H
#define NETOKEN_GUARD_PARSE_H

#include "guard_maps.h"
#include "guard_options.h"
#include "hook.h"
#include "wire.h"

/* With the one that the kernel moves to the skb before TC, so that a packet shows at least three to
 * both hooks. */
#define GUARD_TAGS_MAX_IN_PACKET 3
#define GUARD_EXTENSIONS_MAX 8
#define GUARD_L4_OFF_MAX (128 + GUARD_EXTENSIONS_MAX * 2048)
#define GUARD_PULL_BYTES 256
#define GUARD_PULL_MAX_BYTES (GUARD_L4_OFF_MAX + TCP_HEADER_LEN + TCP_OPTIONS_MAX)

enum shape {
	SHAPE_OTHER, /* opens nothing */
	SHAPE_SYN,   /* SYN without ACK */
	SHAPE_SHORT, /* ends before the answer */
	SHAPE_FRAGMENT,
	SHAPE_DEEP,	/* more headers or tags than we walk */
	SHAPE_ROUTED,	/* a SYN to somewhere else than its destination address */
	SHAPE_NONSENSE, /* a header contradicts itself */
	SHAPE_FLAGS,	/* SYN with FIN or RST */
};

/* Where a packet's headers are, as offsets from its beginning. */
struct guard_layers {
	__u32 l3_off;
	__u32 l4_off;
	__u32 family; /* 0 if its addresses cannot be read */
	bool is_routed;
};

/* In the answer of the walk over extension headers, beside the offset. */
#define WALK_ROUTED (1U << 27)
#define WALK_SHAPE(shape) ((__u32)(shape) << 28)
#define WALK_SHAPE_OF(walked) ((walked) >> 28)
#define WALK_OFF(walked) ((walked) & (WALK_ROUTED - 1))

/* With FIN or RST as well: some stack may take it for a SYN. */
static __always_inline bool opens(__u8 flags)
{
	return (flags & (TCP_FLAG_SYN | TCP_FLAG_ACK)) == TCP_FLAG_SYN;
}

static __always_inline bool may_lead_to_tcp(__u8 next)
{
	return next == IPPROTO_TCP || is_extension(next) || next == NEXTHDR_FRAGMENT;
}

/* Walks from the header of type `next` at `off` to TCP. Returns a shape, WALK_ROUTED if the packet
 * may go on to another address, and an offset if it is SHAPE_SYN, which here means: TCP, as far as
 * IP says. */
static __always_inline __u32 walk_extensions(void *ctx, const enum hook hook, __u32 off, __u32 next)
{
	void *data = packet_begin(ctx, hook);
	void *end = packet_end(ctx, hook);
	__u32 routed = 0;

	for (int i = 0; i < GUARD_EXTENSIONS_MAX && next != IPPROTO_TCP; i++) {
		/* Every one of these starts with `next header, length` and has at least 8 bytes. */
		struct frag_hdr *ext;

		if (next != NEXTHDR_FRAGMENT && !is_extension(next))
			return WALK_SHAPE(SHAPE_OTHER);
		if (off > GUARD_L4_OFF_MAX)
			return WALK_SHAPE(SHAPE_DEEP) | WALK_ROUTED;
		ext = data + off;
		if ((void *)(ext + 1) > end)
			return WALK_SHAPE(SHAPE_SHORT) | routed;
		/* A later fragment shows no more than this, and a first one is not worth more. What
		 * stands between it and TCP may be a routing header. */
		if (next == NEXTHDR_FRAGMENT) {
			if (!may_lead_to_tcp(ext->nexthdr))
				return WALK_SHAPE(SHAPE_OTHER);
			if (ext->nexthdr != IPPROTO_TCP)
				routed = WALK_ROUTED;
			return WALK_SHAPE(SHAPE_FRAGMENT) | routed;
		}
		/* Segments left, RFC 8200 section 4.4. */
		if (next == NEXTHDR_ROUTING && ((__u8 *)ext)[3])
			routed = WALK_ROUTED;
		off += (((struct ipv6_opt_hdr *)ext)->hdrlen + 1) * 8;
		next = ext->nexthdr;
	}
	if (next == IPPROTO_TCP)
		return off <= GUARD_L4_OFF_MAX ? WALK_SHAPE(SHAPE_SYN) | routed | off
					       : WALK_SHAPE(SHAPE_DEEP) | routed;
	/* One of the next may be a routing header. */
	return may_lead_to_tcp(next) ? WALK_SHAPE(SHAPE_DEEP) | WALK_ROUTED
				     : WALK_SHAPE(SHAPE_OTHER);
}

/* Not static, so that the verifier looks at the loop once and for any offset; and twice, because it
 * has to know whose context it is. */
__noinline __u32 walk_extensions_tc(struct __sk_buff *skb, __u32 off, __u32 next)
{
	return walk_extensions(skb, HOOK_TC, off, next);
}

__noinline __u32 walk_extensions_xdp(struct xdp_md *ctx, __u32 off, __u32 next)
{
	return walk_extensions(ctx, HOOK_XDP, off, next);
}

/* SHAPE_SYN means: TCP, as far as IP says. */
static __always_inline enum shape guard_ipv4(struct guard_layers *layers, void *l3, void *end)
{
	struct iphdr *ip = l3;

	if ((void *)(ip + 1) > end)
		return SHAPE_SHORT;
	if (ip->protocol != IPPROTO_TCP)
		return SHAPE_OTHER;
	layers->family = 4;
	layers->l4_off = layers->l3_off + ip->ihl * 4;
	if (ip->version != 4 || ip->ihl < 5)
		return SHAPE_NONSENSE;
	if (ip->frag_off & bpf_htons(IP_OFFSET | IP_MF))
		return SHAPE_FRAGMENT;
	return SHAPE_SYN;
}

static __always_inline enum shape guard_ipv6(struct guard_layers *layers, void *ctx,
					     const enum hook hook, void *l3, void *end)
{
	struct ipv6hdr *ip = l3;
	__u32 walked;

	if ((void *)(ip + 1) > end)
		return SHAPE_SHORT;
	if (!may_lead_to_tcp(ip->nexthdr))
		return SHAPE_OTHER;
	layers->family = 6;
	layers->l4_off = layers->l3_off + sizeof(*ip);
	if (ip->version != 6)
		return SHAPE_NONSENSE;
	if (ip->nexthdr == IPPROTO_TCP)
		return SHAPE_SYN;

	walked = hook == HOOK_XDP ? walk_extensions_xdp(ctx, layers->l4_off, ip->nexthdr)
				  : walk_extensions_tc(ctx, layers->l4_off, ip->nexthdr);
	layers->is_routed = walked & WALK_ROUTED;
	layers->l4_off = WALK_OFF(walked);
	return WALK_SHAPE_OF(walked);
}

static __always_inline enum shape guard_network(struct guard_layers *layers, void *ctx,
						const enum hook hook, const __u32 l2_len)
{
	void *end = packet_end(ctx, hook);
	void *l3 = packet_begin(ctx, hook) + l2_len;
	__u16 proto;

	layers->l3_off = l2_len;
	if (l2_len == 0) {
		/* All of it may be in fragments of the skb. */
		if (l3 + 1 > end)
			return SHAPE_SHORT;
		proto = *(__u8 *)l3 >> 4 == 4 ? ETH_P_IP : ETH_P_IPV6;
	} else {
		if (l3 > end)
			return SHAPE_OTHER;
		proto = bpf_ntohs(*(__be16 *)(l3 - 2));
		for (int i = 0; i <= GUARD_TAGS_MAX_IN_PACKET; i++) {
			struct vlan_tag *tag = l3;

			if (proto != ETH_P_8021Q && proto != ETH_P_8021AD && proto != ETH_P_QINQ1)
				break;
			if (i == GUARD_TAGS_MAX_IN_PACKET)
				return SHAPE_DEEP;
			if ((void *)(tag + 1) > end)
				return SHAPE_SHORT;
			proto = bpf_ntohs(tag->next_proto_be);
			layers->l3_off += sizeof(*tag);
			l3 = tag + 1;
		}
	}

	if (proto == ETH_P_IP)
		return guard_ipv4(layers, l3, end);
	if (proto == ETH_P_IPV6)
		return guard_ipv6(layers, ctx, hook, l3, end);
	return SHAPE_OTHER;
}

static __always_inline void note_ipv4(struct guard_scratch *scratch, const struct iphdr *ip)
{
	struct netoken_flow *flow = &scratch->event.flow;

	flow->family = 4;
	scratch->reach = REACH_ADDR;
	scratch->ip_len_bytes = bpf_ntohs(ip->tot_len);
	copy_mapped(flow->saddr, ip->saddr);
	copy_mapped(flow->daddr, ip->daddr);
}

static __always_inline void note_ipv6(struct guard_scratch *scratch, const struct ipv6hdr *ip)
{
	struct netoken_flow *flow = &scratch->event.flow;

	flow->family = 6;
	scratch->reach = REACH_ADDR;
	scratch->ip_len_bytes = IPV6_HEADER_LEN + bpf_ntohs(ip->payload_len);
	__builtin_memcpy(flow->saddr, &ip->saddr, ADDR_LEN);
	__builtin_memcpy(flow->daddr, &ip->daddr, ADDR_LEN);
}

/* Notes the addresses. The IP header has been seen to be there; the check is for the verifier. */
static __always_inline void note_addresses(struct guard_scratch *scratch, void *l3, void *end,
					   __u32 family)
{
	if (family == 6 && l3 + IPV6_HEADER_LEN <= end)
		note_ipv6(scratch, l3);
	else if (family == 4 && l3 + IPV4_HEADER_LEN <= end)
		note_ipv4(scratch, l3);
}

/* Whether IPv4 options send the packet on to another address. A list that lies counts as well. */
static __always_inline bool is_source_routed(struct guard_scratch *scratch, const void *l3,
					     const void *end)
{
	__u32 len = scratch->l4_off - scratch->l3_off - IPV4_HEADER_LEN;

	return !copy_options(scratch, l3, end, len) || !walk_ip_options(len) || scratch->tokens;
}

/* The TCP header, as far as its flags; NULL if the packet ends before. */
static __always_inline struct tcp_head *tcp_at(void *ctx, const enum hook hook, __u64 l4_off)
{
	struct tcp_head *tcp;

	/* One register for the check and for what it bounds, see parse_linear(). */
	barrier_var(l4_off);
	if (l4_off > GUARD_L4_OFF_MAX)
		return NULL;
	tcp = packet_begin(ctx, hook) + l4_off;
	return (void *)&tcp->flags + 1 > packet_end(ctx, hook) ? NULL : tcp;
}

/*
 * One look at what is readable. Leaves in the scratch what is known of the packet, and how much
 * that is in `reach`.
 */
static __always_inline enum shape guard_look(void *ctx, const enum hook hook, const __u32 l2_len,
					     struct guard_scratch *scratch)
{
	struct guard_layers layers = {};
	enum shape shape = guard_network(&layers, ctx, hook, l2_len);
	struct netoken_flow *flow = &scratch->event.flow;
	struct tcp_head *tcp;
	void *end, *l3;
	__u32 tcp_len;
	bool is_routed;

	if (shape == SHAPE_OTHER)
		return shape;

	if (shape == SHAPE_SYN) {
		tcp = tcp_at(ctx, hook, layers.l4_off);
		if (!tcp)
			shape = SHAPE_SHORT;
		else if (!opens(tcp->flags))
			return SHAPE_OTHER;
	}

	scratch->reach = REACH_NOTHING;
	scratch->l3_off = layers.l3_off;
	scratch->l4_off = layers.l4_off;
	flow->family = 0;
	flow->sport_be = 0;
	flow->dport_be = 0;
	flow->isn = 0;
	l3 = packet_begin(ctx, hook) + layers.l3_off;
	end = packet_end(ctx, hook);
	if (layers.family)
		note_addresses(scratch, l3, end, layers.family);
	is_routed = layers.is_routed || (layers.family == 4 && shape != SHAPE_NONSENSE &&
					 layers.l4_off != layers.l3_off + IPV4_HEADER_LEN &&
					 is_source_routed(scratch, l3, end));
	if (is_routed)
		scratch->reach = REACH_NOTHING;
	if (shape != SHAPE_SYN)
		return shape;
	/* Looked at anew: verifiers before 6.8 do not learn from the shape that it is there. */
	tcp = tcp_at(ctx, hook, layers.l4_off);
	if (!tcp)
		return SHAPE_SHORT;

	tcp_len = (tcp->data_offset >> 4) * 4;
	scratch->tcp_len_bytes = tcp_len;
	flow->sport_be = tcp->sport_be;
	flow->dport_be = tcp->dport_be;
	flow->isn = bpf_ntohl(tcp->seq_be);
	if (!is_routed)
		scratch->reach = REACH_PORT;
	/* Where the packet itself ends too early its lengths lie, which is for the check to say. */
	if (tcp_len >= TCP_HEADER_LEN && !copy_options(scratch, tcp, end, tcp_len - TCP_HEADER_LEN))
		return SHAPE_SHORT;
	if (is_routed)
		return SHAPE_ROUTED;
	return tcp->flags & (TCP_FLAG_FIN | TCP_FLAG_RST) ? SHAPE_FLAGS : SHAPE_SYN;
}

/*
 * Tells the packets that a machine gets all day from those that need a closer look: no tag, no IP
 * options, no fragment, no extension headers. Where a TCP header would have its flags and they are
 * not those of a SYN, nothing is opened, whatever the packet is.
 *
 * `l2_len` is a constant and not a setting: reading that would be half of what all this costs.
 */
static __always_inline bool surely_opens_nothing(void *ctx, const enum hook hook,
						 const __u32 l2_len)
{
	__u8 *l3 = packet_begin(ctx, hook) + l2_len;
	void *end = packet_end(ctx, hook);
	__u16 proto;
	__u8 next;

	if ((void *)l3 + IPV4_HEADER_LEN + sizeof(struct tcp_head) > end)
		return false;
	if (l2_len)
		proto = *(__be16 *)(l3 - 2);
	else
		proto = l3[0] >> 4 == 4 ? bpf_htons(ETH_P_IP) : bpf_htons(ETH_P_IPV6);

	if (proto == bpf_htons(ETH_P_IP)) {
		if (l3[0] != 0x45 ||
		    *(__be16 *)&l3[offsetof(struct iphdr, frag_off)] & bpf_htons(IP_OFFSET | IP_MF))
			return false;
		return !opens(l3[IPV4_HEADER_LEN + offsetof(struct tcp_head, flags)]);
	}
	if (proto != bpf_htons(ETH_P_IPV6) ||
	    (void *)l3 + IPV6_HEADER_LEN + sizeof(struct tcp_head) > end)
		return false;
	next = l3[offsetof(struct ipv6hdr, nexthdr)];
	if (next == IPPROTO_TCP)
		return !opens(l3[IPV6_HEADER_LEN + offsetof(struct tcp_head, flags)]);
	/* Or the compiler asks for UDP first. */
	barrier_var(next);
	return next == IPPROTO_UDP;
}

#endif
