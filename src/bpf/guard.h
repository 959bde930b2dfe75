/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Decides about what could open a connection: which rule protects its destination, whether its
 * source is on a list, whether its token is right. One body of logic for TC and XDP.
 *
 * The rule of this file: every way to `valid`, `exempt` or `unprotected` is written out; what ends
 * anywhere else is refused.
 */
#ifndef NETOKEN_GUARD_H
#define NETOKEN_GUARD_H

#include "guard_block.h"
#include "guard_count.h"
#include "guard_maps.h"
#include "guard_match.h"
#include "guard_options.h"
#include "guard_parse.h"
#include "guard_scrub.h"
#include "guard_sources.h"
#include "guard_token.h"

/* RFC 4291 section 2.5.5.2. On the wire no host may use it, and a list of IPv4 prefixes must not
 * be reached with it. */
static __always_inline bool is_mapped(const __u8 *addr)
{
	const __u32 *words = (const __u32 *)addr;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

/* The first token that was found, as its bytes stand in the packet. */
static __always_inline __u64 first_token(const struct guard_scratch *scratch)
{
	__u64 off = below_64(scratch->token_off);

	return *(__u64 *)&scratch->options[off + OPTION_LEN - TOKEN_LEN];
}

/* Looks at the options of the packet in the scratch. Says GUARD_NONE if it has one token. Not
 * static, so that the verifier looks at the loop once and not for every shape. */
__noinline __u32 look_at_options(__u32 is_whole)
{
	struct guard_scratch *scratch = this_guard_scratch();
	__u32 tcp_len;

	if (!scratch)
		return GUARD_MALFORMED;
	tcp_len = scratch->tcp_len_bytes;
	if (!is_whole || tcp_len < TCP_HEADER_LEN ||
	    scratch->l4_off + tcp_len > scratch->l3_off + scratch->ip_len_bytes)
		return GUARD_MALFORMED;
	if (!walk_list(scratch, tcp_len - TCP_HEADER_LEN, false))
		return GUARD_MALFORMED;
	if (scratch->tokens > 1)
		return GUARD_DUPLICATE;
	return scratch->tokens ? GUARD_NONE : GUARD_MISSING;
}

/* Looks at the options also where they do not decide: a token that is there may have to go. */
static __always_inline __u32 judge_shape(enum shape shape, __u32 is_whole)
{
	__u32 found = GUARD_MALFORMED;

	if (shape == SHAPE_SYN || shape == SHAPE_ROUTED || shape == SHAPE_FLAGS)
		found = look_at_options(is_whole);
	switch (shape) {
	case SHAPE_FRAGMENT:
		return GUARD_FRAGMENT;
	case SHAPE_DEEP:
		return GUARD_TOO_DEEP;
	case SHAPE_ROUTED:
		return GUARD_SOURCE_ROUTED;
	case SHAPE_FLAGS:
		return GUARD_BAD_FLAGS;
	default:
		return found;
	}
}

/* Whether it matters that a source may be blocked for what it did before. The lists decide alone,
 * and a keyed token is one that nobody else can send from there. */
static __always_inline bool is_watched(const struct guard_scratch *scratch, __u32 verdict)
{
	return verdict != GUARD_EXEMPT && verdict != GUARD_BLOCKED &&
	       (verdict != GUARD_VALID || scratch->is_static);
}

/* Judges the packet in the scratch. `found` is what it says of itself: GUARD_NONE if it has one
 * token. `token` is the first one, 0 if that does not matter. */
static __always_inline __u32 judge(struct guard_scratch *scratch,
				   const struct netoken_guard_table *table,
				   const struct netoken_guard_rule *rule, __u32 found, __u64 token)
{
	const struct netoken_flow *flow = &scratch->event.flow;
	__u32 verdict = GUARD_NONE;

	if (scratch->reach != REACH_NOTHING) {
		if (flow->family == 6 && is_mapped(flow->saddr))
			return GUARD_MALFORMED;
		if (table->has_exempt | table->has_blocked) {
			scratch->generation = table->generation;
			scratch->has_exempt = table->has_exempt;
			scratch->has_blocked = table->has_blocked;
			verdict = check_source(scratch);
		}
	}
	if (verdict == GUARD_NONE) {
		*(__u64 *)scratch->event.token = token;
		verdict = found == GUARD_NONE ? judge_token(scratch, rule, token) : found;
	}
	if (table->auto_block.within_ns && scratch->reach != REACH_NOTHING &&
	    is_watched(scratch, verdict))
		verdict = watch_source(verdict);
	return verdict;
}

/* What a rule says that only scrubs. The lists are about tokens, which it does not ask for. */
static __always_inline __u32 judge_scrubbed(struct guard_scratch *scratch, __u32 found, __u64 token)
{
	if (found == GUARD_MISSING)
		return GUARD_CLEAN;
	if (found != GUARD_NONE && found != GUARD_DUPLICATE)
		return found;
	*(__u64 *)scratch->event.token = token;
	return GUARD_SCRUBBED;
}

static __always_inline bool is_refused(__u32 verdict)
{
	return verdict != GUARD_VALID && verdict != GUARD_EXEMPT && verdict != GUARD_UNPROTECTED;
}

/* Before anything is known of what becomes of a packet. */
static __always_inline void begin_judging(struct guard_scratch *scratch)
{
	scratch->event.rule = 0;
	scratch->event.mode = MODE_OBSERVE;
	scratch->event.scrubbed = 0;
	*(__u64 *)scratch->event.token = 0;
	scratch->severity = SEVERITY_NONE;
	scratch->is_static = false;
}

/* What a rule makes of a verdict. */
static __always_inline __u32 apply_rule(struct guard_scratch *scratch,
					const struct netoken_guard_table *table,
					const struct netoken_guard_rule *rule, __u32 verdict)
{
	__u32 judged = verdict | (__u32)rule->row << JUDGED_ROW_SHIFT;

	scratch->event.rule = rule->id;
	scratch->event.mode = rule->mode;
	if (table->alerts.within_ns && rule->mode != MODE_SCRUB && is_refused(verdict))
		scratch->severity = raise_alarm();
	if (rule->mode == MODE_DROP && is_refused(verdict))
		return judged | JUDGED_DROP;
	if (rule->mode == MODE_MARK) {
		scratch->mark = is_refused(verdict) ? rule->mark_refused : rule->mark_valid;
		scratch->mark_mask = rule->mark_mask;
		judged |= JUDGED_MARK;
	}
	return judged;
}

/*
 * Decides about the packet in the scratch, by the one table that is in use now even if it is
 * replaced meanwhile. `is_whole`: it is as long as its IP header claims. Not static, so that the
 * verifier looks at it once and not for every way in which a packet can be found; so it takes only
 * numbers, and works for both hooks.
 */
__noinline __u32 judge_packet(__u32 shape, __u32 is_whole)
{
	struct guard_scratch *scratch = this_guard_scratch();
	const struct netoken_guard_table *table = running_table();
	const struct netoken_guard_rule *rule;
	__u32 found, verdict, judged, at;
	__u64 token = 0;

	if (!scratch)
		return GUARD_UNPROTECTED;
	begin_judging(scratch);
	if (!table)
		return GUARD_UNPROTECTED;
	at = scratch->reach == REACH_PORT
		     ? match_port(table, &scratch->event.flow)
		     : match_less(table, &scratch->event.flow, -(__u64)scratch->reach);
	barrier_var(at);
	if (at >= GUARD_RULES_MAX)
		return GUARD_UNPROTECTED;
	rule = &table->rules[at];

	scratch->to_blank = 0;
	found = judge_shape(shape, is_whole);
	if (found == GUARD_NONE || found == GUARD_DUPLICATE)
		token = first_token(scratch);
	verdict = rule->mode == MODE_SCRUB ? judge_scrubbed(scratch, found, token)
					   : judge(scratch, table, rule, found, token);
	judged = apply_rule(scratch, table, rule, verdict);
	if (judged & JUDGED_DROP || !rule->scrub)
		return judged;
	if (verdict == GUARD_VALID)
		note_peer(scratch);
	return scratch->to_blank ? judged | JUDGED_SCRUB : judged;
}

/* What the host must not see it does not get: the sender tries again. */
static __always_inline __u32 scrub(void *ctx, const enum hook hook, struct guard_scratch *scratch)
{
	scratch->event.scrubbed = hook == HOOK_XDP ? scrub_xdp(ctx) : scrub_tc(ctx);
	return scratch->event.scrubbed;
}

/* Does to the packet what was decided about it. */
static __always_inline int carry_out(void *ctx, const enum hook hook, struct guard_scratch *scratch,
				     __u32 judged)
{
	if (judged & JUDGED_MARK)
		mark_packet(ctx, hook, scratch->mark, scratch->mark_mask);
	count_packet(ctx, hook, scratch, judged);
	if (scratch->severity && guard_has_reader())
		send_alert(ctx, scratch->severity, packet_ifindex(ctx, hook));
	return judged & JUDGED_DROP ? drop_packet(hook) : pass_packet(hook);
}

/* What to do with a packet of that shape. */
static __always_inline int guard(void *ctx, const enum hook hook, struct guard_scratch *scratch,
				 enum shape shape)
{
	__u32 judged;

	if (shape == SHAPE_OTHER)
		return pass_packet(hook);
	judged =
		judge_packet(shape, packet_has(ctx, hook, scratch->l3_off + scratch->ip_len_bytes));
	if (judged & JUDGED_SCRUB && !scrub(ctx, hook, scratch))
		judged = judged >> JUDGED_ROW_SHIFT << JUDGED_ROW_SHIFT | GUARD_NOT_SCRUBBED |
			 JUDGED_DROP;
	return carry_out(ctx, hook, scratch, judged);
}

#endif
