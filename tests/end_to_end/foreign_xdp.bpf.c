// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* Somebody else's XDP program: lets everything pass. Needs no headers. */

#define SEC(name) __attribute__((section(name), used))
#define XDP_PASS 2

SEC("xdp")
int foreign_xdp(void *ctx)
{
	(void)ctx;
	return XDP_PASS;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
