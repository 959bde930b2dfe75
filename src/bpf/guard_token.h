/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* Whether a rule accepts the token of a SYN. */
#ifndef NETOKEN_GUARD_TOKEN_H
#define NETOKEN_GUARD_TOKEN_H

#include "guard_maps.h"
#include "guard_seen.h"
#include "token.h"

/* Whether the slot of a token that is outside of the window lies ahead of it, as far as four bits
 * can tell: the nearer side is meant. */
static __always_inline bool is_ahead(__u64 token)
{
	__u32 zero = 0, key_id = le64(token) >> 20 & 0xf;
	const struct netoken_clock *now = bpf_map_lookup_elem(&clock, &zero);
	struct netoken_key_count *count = count_of_key(key_id);
	__u32 ahead;

	if (!now || !count || !now->slot_ns)
		return false;
	ahead = ((__u32)(le64(token) >> 16) - (__u32)(unix_time_ns(now, count) / now->slot_ns)) &
		(SLOTS - 1);
	return ahead <= SLOTS / 2;
}

static __always_inline bool has_tag(const struct netoken_guard_rule *rule, __be16 tag_be)
{
	for (__u32 i = 0; i < GUARD_TAGS_MAX; i++) {
		if (i < rule->tags_count && rule->tags_be[i] == tag_be)
			return true;
	}
	return false;
}

static __always_inline __u32 check_keyed(struct guard_scratch *scratch,
					 const struct netoken_guard_rule *rule, __u64 token)
{
	const struct netoken_flow *flow = &scratch->event.flow;
	struct netoken_proof proof;
	__u32 verdict;

	if (rule->tags_count && !has_tag(rule, *(__be16 *)&token))
		return GUARD_TAG_NOT_ALLOWED;

	switch (check_token(flow, token, &rule->accept, &proof)) {
	case CHECK_VALID:
		/* Nobody else can use what is bound to the whole flow. */
		verdict = rule->may_repeat || proof.bind == BIND_FLOW
				  ? GUARD_VALID
				  : check_seen(scratch, token, proof.bind);
		if (verdict == GUARD_VALID)
			count_accepted(&proof);
		return verdict;
	case CHECK_UNKNOWN_KEY:
		return GUARD_UNKNOWN_KEY;
	case CHECK_RETIRED_KEY:
		return GUARD_RETIRED_KEY;
	case CHECK_WRONG_RING:
		return GUARD_KEY_NOT_ALLOWED;
	case CHECK_WRONG_TAG:
		return GUARD_TAG_NOT_ALLOWED;
	case CHECK_WRONG_TIME:
		return is_ahead(token) ? GUARD_FUTURE_SLOT : GUARD_STALE_SLOT;
	default:
		return GUARD_BAD_MAC;
	}
}

/* Judges the one token of a SYN, its bytes as they stand in the packet. */
static __always_inline __u32 judge_token(struct guard_scratch *scratch,
					 const struct netoken_guard_rule *rule, __u64 token)
{
	for (__u32 i = 0; i < GUARD_STATICS_MAX; i++) {
		if (i >= rule->statics_count)
			break;
		if (rule->statics[i] == token) {
			scratch->is_static = true;
			return GUARD_VALID;
		}
	}
	return rule->accept.rings ? check_keyed(scratch, rule, token) : GUARD_WRONG_STATIC;
}

#endif
