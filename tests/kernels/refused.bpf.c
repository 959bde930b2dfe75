// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/* What the verifier of 5.10 refuses: bpf_loop(), which came with 5.17. For scripts/kernels --self-check. */

#define SEC(name) __attribute__((section(name), used))

/* Helper 181 of include/uapi/linux/bpf.h. */
static long (*const bpf_loop)(unsigned int count, void *callback, void *context,
			      unsigned long long flags) = (void *)181;

static long do_nothing(unsigned int number, void *context)
{
	return 0;
}

SEC("tc")
int refused(void *skb)
{
	return bpf_loop(3, do_nothing, 0, 0) == 3 ? 0 : 2;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
