// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
/*
 * The egress classifier: finds a SYN, asks the policy, stamps it, counts it.
 * Built for every kernel from 5.10 on; the README says what it promises.
 */
/* Nothing here reads a structure of the kernel's own, so no kernel BTF is needed to load it. */
#define BPF_NO_PRESERVE_ACCESS_INDEX
#include "vmlinux.h"

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "kernel.h"
#include "types.h"
#include "maps.h"
#include "fast_path.h"
#include "parse.h"
#include "policy.h"
#include "token.h"
#include "stamp.h"
#include "count.h"

static __always_inline int handle_syn(struct __sk_buff *skb, struct scratch *scratch)
{
	struct netoken_event *event = &scratch->syn.event;
	const struct netoken_rule *rule;
	enum netoken_verdict verdict;
	bool drop = false;

	describe_event(skb, &scratch->syn);
	rule = lookup_rule(skb, scratch);
	if (!rule) {
		verdict = VERDICT_NO_POLICY;
	} else {
		event->rule = rule->id;
		event->generation = scratch->search.generation;
		switch (rule->action) {
		case ACTION_STAMP:
			verdict = VERDICT_NO_KEY;
			if (make_token(event, &rule->token))
				verdict = stamp_syn(skb, scratch, event->token, &drop);
			if (rule->when_full == WHEN_FULL_DROP && verdict != VERDICT_STAMPED &&
			    verdict != VERDICT_ALREADY_STAMPED)
				drop = true;
			break;
		case ACTION_DROP:
			verdict = VERDICT_DROPPED;
			drop = true;
			break;
		default:
			verdict = VERDICT_SKIPPED;
		}
	}

	event->verdict = verdict;
	event->dropped = drop;
	count_syn(skb, event);
	/* Not TC_ACT_OK: that would hide the packet from the filters behind ours. */
	return drop ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

/*
 * Out of line: what is surely no SYN must not pay for the registers and the stack that a SYN needs.
 * In here is the way of nearly every SYN, all in one piece, because a call costs more than most of
 * what is done between two.
 */
static __noinline int classify(struct __sk_buff *skb, __u32 l2_len)
{
	struct scratch *scratch = parse_syn(skb, l2_len);

	if (!scratch)
		return TC_ACT_UNSPEC;
	/* What is known of the SYN is in the scratch alone, so that the verifier follows one way
	 * from here on, and not each in which a SYN can be found. */
	barrier();
	return handle_syn(skb, scratch);
}

SEC("tc")
int netoken_egress(struct __sk_buff *skb)
{
	if (is_surely_no_syn(skb, ETH_HEADER_LEN))
		return TC_ACT_UNSPEC;
	return classify(skb, ETH_HEADER_LEN);
}

/* For a device whose packets begin with layer 3. */
SEC("tc")
int netoken_egress3(struct __sk_buff *skb)
{
	if (is_surely_no_syn(skb, 0))
		return TC_ACT_UNSPEC;
	return classify(skb, 0);
}

/* Answers `netoken policy test`, with the function that decides over packets. */
SEC("tc")
int netoken_ask(struct __sk_buff *skb)
{
	return answer(skb);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
