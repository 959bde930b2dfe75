/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The two hooks of the guard behind one set of verbs. Each takes the hook as a constant, so that
 * nothing of the other one is left in a program.
 */
#ifndef NETOKEN_HOOK_H
#define NETOKEN_HOOK_H

enum hook {
	HOOK_TC,
	HOOK_XDP,
};

static __always_inline void *packet_begin(void *ctx, const enum hook hook)
{
	return hook == HOOK_XDP ? (void *)(long)((struct xdp_md *)ctx)->data
				: (void *)(long)((struct __sk_buff *)ctx)->data;
}

/* Where the bytes end that can be read; of an skb that may be less than all. */
static __always_inline void *packet_end(void *ctx, const enum hook hook)
{
	return hook == HOOK_XDP ? (void *)(long)((struct xdp_md *)ctx)->data_end
				: (void *)(long)((struct __sk_buff *)ctx)->data_end;
}

/* Out of line: the compiler would share the loads with those that become pointers, and cut them to
 * 32 bits. */
static __noinline __u32 skb_linear_len(struct __sk_buff *skb)
{
	return skb->data_end - skb->data;
}

/* Whether the whole packet is at least so long. */
static __always_inline bool packet_has(void *ctx, const enum hook hook, __u32 len_bytes)
{
	return hook == HOOK_XDP ? packet_begin(ctx, hook) + len_bytes <= packet_end(ctx, hook)
				: len_bytes <= ((struct __sk_buff *)ctx)->len;
}

/* Makes `len` bytes readable. False if they were already, or cannot be. Ends all pointers. */
static __always_inline bool pull_packet(void *ctx, const enum hook hook, __u32 len)
{
	struct __sk_buff *skb = ctx;

	if (hook == HOOK_XDP || skb->len <= skb_linear_len(skb))
		return false;
	return !bpf_skb_pull_data(skb, skb->len < len ? skb->len : len);
}

static __always_inline __u32 packet_ifindex(void *ctx, const enum hook hook)
{
	return hook == HOOK_XDP ? ((struct xdp_md *)ctx)->ingress_ifindex
				: ((struct __sk_buff *)ctx)->ifindex;
}

/* Nothing at XDP: there is no skb yet. User space attaches no rules there that mark. */
static __always_inline void mark_packet(void *ctx, const enum hook hook, __u32 mark, __u32 mask)
{
	struct __sk_buff *skb = ctx;

	if (hook == HOOK_TC)
		skb->mark = (skb->mark & ~mask) | (mark & mask);
}

/* Not TC_ACT_OK: that would hide the packet from the filters behind ours. */
static __always_inline int pass_packet(const enum hook hook)
{
	return hook == HOOK_XDP ? XDP_PASS : TC_ACT_UNSPEC;
}

static __always_inline int drop_packet(const enum hook hook)
{
	return hook == HOOK_XDP ? XDP_DROP : TC_ACT_SHOT;
}

#endif
