// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What 5.10 refuses and 6.1 takes: it calls bpf_ktime_get_tai_ns(). For scripts/kernels
 * --self-check. */

#define SEC(name) __attribute__((section(name), used))

/* Helper 208 of include/uapi/linux/bpf.h. */
static unsigned long long (*const bpf_ktime_get_tai_ns)(void) = (void *)208;

SEC("tc")
int refused(void *skb)
{
	return bpf_ktime_get_tai_ns() ? -1 : 2;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
