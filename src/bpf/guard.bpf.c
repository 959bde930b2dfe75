// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The guard: finds what could open a connection, asks the rules, checks the token, counts it. An
 * object of its own, so that attaching one side loads nothing of the other; keys, rings and clock
 * are shared with the stamp through their pins.
 */
/* Nothing here reads a structure of the kernel's own, so no kernel BTF is needed to load it. */
#define BPF_NO_PRESERVE_ACCESS_INDEX
#include "vmlinux.h"

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "kernel.h"
#include "guard_types.h"
#include "guard_plain.h"

/*
 * Out of line, because what is surely no SYN must not pay for the registers and the stack of one;
 * and not static, so that the verifier looks at each once.
 */
__noinline int guard_look_tc(struct __sk_buff *skb)
{
	struct guard_scratch *scratch = this_guard_scratch();

	return scratch ? guard_look(skb, HOOK_TC, ETH_HEADER_LEN, scratch) : SHAPE_OTHER;
}

__noinline int guard_look_tc3(struct __sk_buff *skb)
{
	struct guard_scratch *scratch = this_guard_scratch();

	return scratch ? guard_look(skb, HOOK_TC, 0, scratch) : SHAPE_OTHER;
}

/* Headers are nearly always in the linear part of an skb; where they are not, they are moved. */
static __always_inline int guard_skb(struct __sk_buff *skb, int (*look)(struct __sk_buff *))
{
	struct guard_scratch *scratch = this_guard_scratch();
	int shape = look(skb);

	if (shape == SHAPE_SHORT && pull_packet(skb, HOOK_TC, GUARD_PULL_BYTES))
		shape = look(skb);
	if (shape == SHAPE_SHORT && pull_packet(skb, HOOK_TC, GUARD_PULL_MAX_BYTES))
		shape = look(skb);
	return scratch ? guard(skb, HOOK_TC, scratch, shape) : TC_ACT_UNSPEC;
}

__noinline int guard_tc(struct __sk_buff *skb)
{
	return guard_skb(skb, guard_look_tc);
}

__noinline int guard_tc3(struct __sk_buff *skb)
{
	return guard_skb(skb, guard_look_tc3);
}

__noinline int guard_xdp(struct xdp_md *ctx)
{
	struct guard_scratch *scratch = this_guard_scratch();

	if (!scratch)
		return XDP_PASS;
	return guard(ctx, HOOK_XDP, scratch, guard_look(ctx, HOOK_XDP, ETH_HEADER_LEN, scratch));
}

SEC("tc")
int netoken_guard(struct __sk_buff *skb)
{
	int action = TC_ACT_UNSPEC;

	if (surely_opens_nothing(skb, HOOK_TC, ETH_HEADER_LEN) ||
	    guard_plain(skb, HOOK_TC, ETH_HEADER_LEN, &action))
		return action;
	return guard_tc(skb);
}

/* For a device whose packets begin with layer 3. */
SEC("tc")
int netoken_guard3(struct __sk_buff *skb)
{
	int action = TC_ACT_UNSPEC;

	if (surely_opens_nothing(skb, HOOK_TC, 0) || guard_plain(skb, HOOK_TC, 0, &action))
		return action;
	return guard_tc3(skb);
}

SEC("xdp")
int netoken_guardx(struct xdp_md *ctx)
{
	int action = XDP_PASS;

	if (surely_opens_nothing(ctx, HOOK_XDP, ETH_HEADER_LEN) ||
	    guard_plain(ctx, HOOK_XDP, ETH_HEADER_LEN, &action))
		return action;
	return guard_xdp(ctx);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
