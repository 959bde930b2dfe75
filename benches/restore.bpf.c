// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Gives a packet back the bytes that it had before it was stamped, then hands it to the program
 * under measurement. BPF_PROG_TEST_RUN repeats on one and the same packet, and a SYN can be stamped
 * only once.
 */
#define BPF_NO_PRESERVE_ACCESS_INDEX
#include "vmlinux.h"

#include <bpf/bpf_helpers.h>

#define FRAME_MAX 256

const volatile __u32 frame_len = 0;
const volatile __u8 frame[FRAME_MAX] = {};

struct {
	__uint(type, BPF_MAP_TYPE_PROG_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
	__uint(max_entries, 1);
} target SEC(".maps");

SEC("tc")
int restore(struct __sk_buff *skb)
{
	__u32 len = frame_len;

	if (len == 0 || len > FRAME_MAX)
		return 2;
	if (skb->len != len && bpf_skb_change_tail(skb, len, 0))
		return 2;
	if (bpf_skb_store_bytes(skb, 0, (const void *)frame, len, 0))
		return 2;
	bpf_tail_call(skb, &target, 0);
	return 2;
}

SEC("tc")
int empty(struct __sk_buff *skb)
{
	return -1;
}

/*
 * A stamp grows the packet, and taking it back shrinks it again, which is not the stamp's cost.
 * Growing it once and twice tells the two apart.
 */
SEC("tc")
int grow_once(struct __sk_buff *skb)
{
	return bpf_skb_change_tail(skb, skb->len + 12, 0) ? 2 : -1;
}

SEC("tc")
int grow_twice(struct __sk_buff *skb)
{
	if (bpf_skb_change_tail(skb, skb->len + 12, 0))
		return 2;
	return bpf_skb_change_tail(skb, skb->len + 12, 0) ? 2 : -1;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
