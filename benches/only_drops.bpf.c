// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What the guard is measured against: an XDP program that drops everything. Needs no headers. */

#define SEC(name) __attribute__((section(name), used))
#define XDP_DROP 1

SEC("xdp")
int only_drops(void *ctx)
{
	(void)ctx;
	return XDP_DROP;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
