// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Pushes a VLAN tag, or with -DTAGS=2 two, and lets the next filter go on. Needs no headers. */

#define SEC(name) __attribute__((section(name), used))
#define TC_ACT_UNSPEC (-1)
#define TC_ACT_SHOT 2

/* Helper 18 of include/uapi/linux/bpf.h: the type in network byte order, then the tag. */
static long (*const bpf_skb_vlan_push)(void *skb, unsigned short proto_be,
				       unsigned short tci) = (void *)18;

SEC("tc")
int vlan_push(void *skb)
{
	if (bpf_skb_vlan_push(skb, __builtin_bswap16(0x8100), 7))
		return TC_ACT_SHOT;
	if (TAGS > 1 && bpf_skb_vlan_push(skb, __builtin_bswap16(0x88a8), 9))
		return TC_ACT_SHOT;
	return TC_ACT_UNSPEC;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
