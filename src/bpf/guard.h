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
#include "guard_maps.h"
#include "guard_parse.h"
#include "guard_scrub.h"
#include "guard_sources.h"
#include "token.h"

/* No rule: an index that none has. */
#define NO_RULE GUARD_RULES_MAX

/* The rule for a destination whose port is known. The first match decides. Here and below an index
 * and no pointer, because of a pointer the verifier would follow every value. */
static __always_inline __u32 match_port(const struct netoken_guard_table *table,
					const struct netoken_flow *flow)
{
	__u16 port = bpf_ntohs(flow->dport_be);
	const __u64 *addr = (const __u64 *)flow->daddr;
	__u64 first = addr[0], second = addr[1];
	__u32 count = table->matches_count;

	for (__u32 i = 0; i < GUARD_MATCHES_MAX; i++) {
		const struct netoken_guard_match *match = &table->matches[i];

		if (i >= count)
			break;
		if (port < match->port_first || port > match->port_last ||
		    match->family != flow->family)
			continue;
		if ((second & match->mask[1]) == match->addr[1] &&
		    (first & match->mask[0]) == match->addr[0])
			return match->rule;
	}
	return NO_RULE;
}

/*
 * The rule for a packet that does not show its port, or not even its address: the first that drops,
 * if there is any that could be meant, else the first.
 */
static __always_inline __u32 match_less(const struct netoken_guard_table *table,
					const struct netoken_flow *flow, bool has_addr)
{
	__u32 found = NO_RULE;
	const __u64 *addr = (const __u64 *)flow->daddr;
	__u32 count = table->matches_count;

	for (__u32 i = 0; i < GUARD_MATCHES_MAX; i++) {
		const struct netoken_guard_match *match = &table->matches[i];

		if (i >= count)
			break;
		if (has_addr && (match->family != flow->family ||
				 (addr[1] & match->mask[1]) != match->addr[1] ||
				 (addr[0] & match->mask[0]) != match->addr[0]))
			continue;
		if (match->mode == MODE_DROP)
			return match->rule;
		if (found == NO_RULE)
			found = match->rule;
	}
	return found;
}

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

/*
 * Whether a valid token was accepted for another flow before. It is remembered for as long as any
 * slot is accepted that it may have, so that in this time nobody else can use it. A SYN of the same
 * flow is a retransmission.
 */
static __noinline __u32 check_seen(const struct netoken_flow *flow, __u64 token)
{
	__u32 zero = 0, key_id = le64(token) >> 20 & 0xf;
	__u32 at = le64(token) >> (64 - MAC_BITS) & (SEEN_BUCKETS - 1);
	const struct netoken_clock *now = bpf_map_lookup_elem(&clock, &zero);
	const struct netoken_key *key = bpf_map_lookup_elem(&keys, &key_id);
	struct seen_bucket *bucket = bpf_map_lookup_elem(&guard_seen, &at);
	__u32 verdict = GUARD_SEEN_FULL, isn, place = SEEN_WAYS;
	__u64 who, now_ns, until_ns;

	if (!flow || !now || !key || !bucket)
		return GUARD_SEEN_FULL;
	who = hash_flow(key, flow, message_head(BIND_FLOW, 0, key_id), 0);
	now_ns = bpf_ktime_get_ns();
	until_ns = now_ns + (now->slots_behind + now->slots_ahead + 1) * now->slot_ns;
	isn = flow->isn;

	bpf_spin_lock(&bucket->lock);
	for (__u32 i = 0; i < SEEN_WAYS; i++) {
		struct seen_token *seen = &bucket->tokens[i];

		if (seen->until_ns <= now_ns) {
			place = i;
			continue;
		}
		if (seen->token == token && seen->isn == isn) {
			verdict = seen->who == who ? GUARD_VALID : GUARD_REPLAYED;
			break;
		}
	}
	if (verdict == GUARD_SEEN_FULL && place < SEEN_WAYS) {
		struct seen_token *seen = &bucket->tokens[place & (SEEN_WAYS - 1)];

		seen->until_ns = until_ns;
		seen->token = token;
		seen->who = who;
		seen->isn = isn;
		verdict = GUARD_VALID;
	}
	bpf_spin_unlock(&bucket->lock);
	return verdict;
}

/* Not inlined: a packet without a token must not pay for the registers that this needs. */
static __noinline __u32 check_keyed(const struct netoken_flow *flow,
				    const struct netoken_guard_rule *rule, __u64 token)
{
	bool has_tag = false;
	__be16 tag_be;

	if (!flow || !rule)
		return GUARD_BAD_MAC;
	tag_be = *(__be16 *)&token;
	for (__u32 i = 0; i < GUARD_TAGS_MAX; i++)
		has_tag |= i < rule->tags_count && rule->tags_be[i] == tag_be;
	if (rule->tags_count && !has_tag)
		return GUARD_TAG_NOT_ALLOWED;

	switch (check_token(flow, token, &rule->accept)) {
	case CHECK_VALID:
		return rule->may_repeat ? GUARD_VALID : check_seen(flow, token);
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

/* The first token, as its bytes stand in the packet. */
static __always_inline __u64 note_token(struct guard_scratch *scratch)
{
	__u64 off = below_64(scratch->token_off);
	__u64 token = *(__u64 *)&scratch->options[off + OPTION_LEN - TOKEN_LEN];

	*(__u64 *)scratch->event.token = token;
	return token;
}

static __always_inline __u32 judge_token(struct guard_scratch *scratch,
					 const struct netoken_guard_rule *rule)
{
	__u64 token = note_token(scratch);

	if (scratch->tokens > 1)
		return GUARD_DUPLICATE;
	for (__u32 i = 0; i < GUARD_STATICS_MAX; i++) {
		if (i < rule->statics_count && rule->statics[i] == token) {
			scratch->is_static = true;
			return GUARD_VALID;
		}
	}
	if (!rule->accept.rings)
		return GUARD_WRONG_STATIC;
	return check_keyed(&scratch->event.flow, rule, token);
}

/* RFC 4291 section 2.5.5.2. On the wire no host may use it, and a list of IPv4 prefixes must not
 * be reached with it. */
static __always_inline bool is_mapped(const __u8 *addr)
{
	const __u32 *words = (const __u32 *)addr;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

/* Looks at the options of the packet. Says GUARD_NONE if it has a token. */
static __always_inline __u32 look_at_options(struct guard_scratch *scratch, __u32 packet_len)
{
	__u32 tcp_len = scratch->tcp_len_bytes;

	if (tcp_len < TCP_HEADER_LEN ||
	    scratch->l4_off + tcp_len > scratch->l3_off + scratch->ip_len_bytes ||
	    scratch->l3_off + scratch->ip_len_bytes > packet_len)
		return GUARD_MALFORMED;
	if (!walk_list(tcp_len - TCP_HEADER_LEN, false))
		return GUARD_MALFORMED;
	return scratch->tokens ? GUARD_NONE : GUARD_MISSING;
}

/* The same for the packet in the scratch, where it does not matter what a call costs. Not static,
 * so that the verifier looks at it once. */
__noinline __u32 look_for_tokens(__u32 packet_len)
{
	struct guard_scratch *scratch = this_guard_scratch();

	return scratch ? look_at_options(scratch, packet_len) : GUARD_MALFORMED;
}

static __always_inline __u32 judge_shape(struct guard_scratch *scratch, enum shape shape,
					 __u32 packet_len)
{
	switch (shape) {
	case SHAPE_SYN:
		return look_at_options(scratch, packet_len);
	case SHAPE_FRAGMENT:
		return GUARD_FRAGMENT;
	case SHAPE_DEEP:
		return GUARD_TOO_DEEP;
	case SHAPE_ROUTED:
		return GUARD_SOURCE_ROUTED;
	case SHAPE_FLAGS:
		return GUARD_BAD_FLAGS;
	default:
		return GUARD_MALFORMED;
	}
}

/* Whether it matters that a source may be blocked for what it did before. The lists decide alone,
 * and a keyed token is one that nobody else can send from there. */
static __always_inline bool is_watched(const struct guard_scratch *scratch, __u32 verdict)
{
	return verdict != GUARD_EXEMPT && verdict != GUARD_BLOCKED &&
	       (verdict != GUARD_VALID || scratch->is_static);
}

static __always_inline __u32 judge(struct guard_scratch *scratch,
				   const struct netoken_guard_rule *rule, enum shape shape,
				   __u32 packet_len)
{
	const struct netoken_flow *flow = &scratch->event.flow;
	__u32 verdict = GUARD_NONE;

	if (scratch->reach != REACH_NOTHING) {
		if (flow->family == 6 && is_mapped(flow->saddr))
			return GUARD_MALFORMED;
		if (scratch->has_exempt | scratch->has_blocked)
			verdict = check_source(scratch);
	}
	if (verdict == GUARD_NONE)
		verdict = judge_shape(scratch, shape, packet_len);
	if (verdict == GUARD_NONE)
		verdict = judge_token(scratch, rule);
	if (scratch->has_auto_block && scratch->reach != REACH_NOTHING &&
	    is_watched(scratch, verdict))
		verdict = watch_source(verdict);
	return verdict;
}

/* What a rule says that only scrubs. The lists are about tokens, which it does not ask for. */
static __always_inline __u32 judge_scrubbed(struct guard_scratch *scratch, enum shape shape,
					    __u32 packet_len)
{
	__u32 verdict = judge_shape(scratch, shape, packet_len);

	if (verdict == GUARD_MISSING)
		return GUARD_CLEAN;
	if (verdict != GUARD_NONE)
		return verdict;
	note_token(scratch);
	return GUARD_SCRUBBED;
}

static __always_inline bool is_refused(__u32 verdict)
{
	return verdict != GUARD_VALID && verdict != GUARD_EXEMPT && verdict != GUARD_UNPROTECTED;
}

static __always_inline bool guard_has_reader(void)
{
	__u32 zero = 0;
	struct netoken_live *now = bpf_map_lookup_elem(&guard_live, &zero);

	return now && now->has_reader;
}

/* Out of line: nobody reads along when it matters what a packet costs. */
static __noinline void send_event(void *ctx, struct netoken_guard_event *event, __u32 ifindex)
{
	if (!event)
		return;
	event->time_ns = bpf_ktime_get_ns();
	event->netns_ino = config.netns_ino;
	event->ifindex = ifindex;
	__builtin_memset(event->flow.pad, 0, sizeof(event->flow.pad));
	__builtin_memset(event->pad, 0, sizeof(event->pad));
	bpf_perf_event_output(ctx, &guard_events, BPF_F_CURRENT_CPU, event, sizeof(*event));
}

/* In the answer of judge_packet(), beside the verdict. */
#define JUDGED_DROP (1U << 8)
#define JUDGED_MARK (1U << 9)
#define JUDGED_SCRUB (1U << 10)
#define JUDGED_ROW_SHIFT 16

static __always_inline void count_packet(void *ctx, const enum hook hook,
					 struct guard_scratch *scratch, __u32 judged)
{
	__u32 zero = 0, verdict = judged & 0xff, at;
	struct netoken_guard_counters *counters = bpf_map_lookup_elem(&guard_counters, &zero);
	struct netoken_guard_event *event = &scratch->event;
	struct netoken_counter *counter;
	bool drop = judged & JUDGED_DROP;
	__u64 before;

	barrier_var(verdict);
	if (!counters || verdict >= GUARD_COUNT)
		return;
	at = (judged >> JUDGED_ROW_SHIFT) * GUARD_COUNT + verdict;
	barrier_var(at);
	if (at < GUARD_ROWS * GUARD_COUNT)
		counters->rows[at]++;
	counter = &counters->verdicts[verdict];
	before = counter->packets;
	counter->packets = before + 1;
	counter->dropped += drop;
	if (!guard_has_reader() || (config.sample != 1 && before % config.sample))
		return;
	counter->events++;
	event->verdict = verdict;
	event->dropped = drop;
	send_event(ctx, event, packet_ifindex(ctx, hook));
}

/*
 * Finds the rule for the packet in the scratch, and leaves there what is needed of the table, so
 * that one table decides even if it is replaced meanwhile. Not static, so that the verifier does
 * not go on from every turn of the loops.
 */
__noinline int find_rule(void)
{
	struct guard_scratch *scratch = this_guard_scratch();
	const struct netoken_guard_table *table = running_table();
	const struct netoken_flow *flow;
	__u32 at;

	if (!scratch)
		return false;
	scratch->event.rule = 0;
	scratch->event.mode = MODE_OBSERVE;
	scratch->event.scrubbed = 0;
	*(__u64 *)scratch->event.token = 0;
	scratch->severity = SEVERITY_NONE;
	if (!table)
		return false;
	flow = &scratch->event.flow;
	at = scratch->reach == REACH_PORT ? match_port(table, flow)
					  : match_less(table, flow, scratch->reach == REACH_ADDR);
	barrier_var(at);
	if (at >= GUARD_RULES_MAX)
		return false;
	scratch->rule = table->rules[at];
	scratch->generation = table->generation;
	scratch->has_exempt = table->has_exempt;
	scratch->has_blocked = table->has_blocked;
	scratch->has_auto_block = table->auto_block.within_ns != 0;
	scratch->has_alerts = table->alerts.within_ns != 0;
	return true;
}

/* What a rule that scrubs wants of a packet that goes on. */
static __always_inline __u32 scrub_judged(struct guard_scratch *scratch, enum shape shape,
					  __u32 verdict, __u32 packet_len)
{
	if (verdict == GUARD_VALID)
		note_peer(scratch);
	/* Of a source that is on a list nobody has looked further. */
	if (scratch->tokens == TOKENS_UNKNOWN && shape == SHAPE_SYN)
		look_for_tokens(packet_len);
	return scratch->to_blank ? JUDGED_SCRUB : 0;
}

/*
 * Decides by the rule for the packet in the scratch. Not static, so that the verifier looks at it
 * once and not for every way in which a packet can be found; so it takes only numbers, and works
 * for both hooks.
 */
__noinline __u32 judge_packet(__u32 shape, __u32 packet_len)
{
	struct guard_scratch *scratch = this_guard_scratch();
	const struct netoken_guard_rule *rule;
	__u32 verdict, judged;

	if (!scratch)
		return GUARD_UNPROTECTED;
	rule = &scratch->rule;
	scratch->is_static = false;
	scratch->tokens = TOKENS_UNKNOWN;
	scratch->to_blank = 0;
	verdict = rule->mode == MODE_SCRUB ? judge_scrubbed(scratch, shape, packet_len)
					   : judge(scratch, rule, shape, packet_len);
	scratch->event.rule = rule->id;
	scratch->event.mode = rule->mode;
	judged = verdict | (__u32)rule->row << JUDGED_ROW_SHIFT;
	if (scratch->has_alerts && rule->mode != MODE_SCRUB && is_refused(verdict))
		scratch->severity = raise_alarm();
	if (rule->mode == MODE_DROP && is_refused(verdict))
		return judged | JUDGED_DROP;
	if (rule->mode == MODE_MARK) {
		scratch->mark = is_refused(verdict) ? rule->mark_refused : rule->mark_valid;
		scratch->mark_mask = rule->mark_mask;
		judged |= JUDGED_MARK;
	}
	if (rule->scrub)
		judged |= scrub_judged(scratch, shape, verdict, packet_len);
	return judged;
}

/* What the host must not see it does not get: the sender tries again. */
static __always_inline __u32 scrub(void *ctx, const enum hook hook, struct guard_scratch *scratch)
{
	scratch->event.scrubbed = hook == HOOK_XDP ? scrub_xdp(ctx) : scrub_tc(ctx);
	return scratch->event.scrubbed;
}

/* What to do with a packet of that shape. */
static __always_inline int guard(void *ctx, const enum hook hook, struct guard_scratch *scratch,
				 enum shape shape)
{
	__u32 judged;

	if (shape == SHAPE_OTHER)
		return pass_packet(hook);
	judged = find_rule() ? judge_packet(shape, packet_len(ctx, hook)) : GUARD_UNPROTECTED;
	if (judged & JUDGED_SCRUB && !scrub(ctx, hook, scratch))
		judged = judged >> JUDGED_ROW_SHIFT << JUDGED_ROW_SHIFT | GUARD_NOT_SCRUBBED |
			 JUDGED_DROP;
	if (judged & JUDGED_MARK)
		mark_packet(ctx, hook, scratch->mark, scratch->mark_mask);
	count_packet(ctx, hook, scratch, judged);
	if (scratch->severity && guard_has_reader())
		send_alert(ctx, scratch->severity, packet_ifindex(ctx, hook));
	return judged & JUDGED_DROP ? drop_packet(hook) : pass_packet(hook);
}

#endif
