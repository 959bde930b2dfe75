// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * Calls what the classifier and the guard share, with what a test writes into the packet, and
 * writes the outcome back there: SipHash over any message, a token made, a token checked.
 */
#define BPF_NO_PRESERVE_ACCESS_INDEX
#include "vmlinux.h"

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "kernel.h"
#include "types.h"
#include "keys.h"
#include "token.h"

/* Behind an Ethernet header, which BPF_PROG_TEST_RUN wants to see. */
#define ORDER_OFF 14
#define WORDS_MAX 8

struct hash_order {
	__u64 secret[2];
	__u64 words[WORDS_MAX];
	__u64 len_bytes;
	__u64 result;
};

struct token_order {
	struct netoken_token_spec spec;
	struct netoken_accept accept;
	__u64 token;
	struct netoken_flow flow;
	__u32 result;
};

_Static_assert(sizeof(struct token_order) == 80, "token_order has hidden padding");

SEC("tc")
int hash_any(struct __sk_buff *skb)
{
	struct hash_order order = {};
	struct siphash sip;
	__u64 rest = 0;

	if (bpf_skb_load_bytes(skb, ORDER_OFF, &order, sizeof(order)))
		return TC_ACT_SHOT;
	sip_begin(&sip, order.secret);
#pragma unroll
	for (__u64 i = 0; i < WORDS_MAX; i++) {
		if (i < order.len_bytes / 8)
			sip_word(&sip, order.words[i]);
		else if (i == order.len_bytes / 8)
			rest = order.words[i];
	}
	order.result = sip_end(&sip, rest, order.len_bytes);
	return bpf_skb_store_bytes(skb, ORDER_OFF, &order, sizeof(order), 0) ? TC_ACT_SHOT : 0;
}

SEC("tc")
int make_one(struct __sk_buff *skb)
{
	struct netoken_event event = {};
	struct token_order order = {};

	if (bpf_skb_load_bytes(skb, ORDER_OFF, &order, sizeof(order)))
		return TC_ACT_SHOT;
	event.flow = order.flow;
	order.result = make_token(&event, &order.spec);
	order.token = *(__u64 *)event.token;
	return bpf_skb_store_bytes(skb, ORDER_OFF, &order, sizeof(order), 0) ? TC_ACT_SHOT : 0;
}

SEC("tc")
int check_one(struct __sk_buff *skb)
{
	struct token_order order = {};
	struct netoken_proof proof;

	if (bpf_skb_load_bytes(skb, ORDER_OFF, &order, sizeof(order)))
		return TC_ACT_SHOT;
	order.result = check_token(&order.flow, order.token, &order.accept, &proof);
	if (order.result == CHECK_VALID)
		count_accepted(&proof);
	return bpf_skb_store_bytes(skb, ORDER_OFF, &order, sizeof(order), 0) ? TC_ACT_SHOT : 0;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
