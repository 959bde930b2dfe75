/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Which rule of the policy decides over a SYN. The rest of the program knows of the policy only
 * lookup_rule().
 *
 * Rules that ask for the same facts, with the same masks, are of one shape. All entries of all
 * shapes are in one hash table; the packet's facts are looked up once for each shape, masked, in
 * the order of the shapes' first rules, until no shape that is left can lead to an earlier rule
 * than the one that was found. What a shape cannot express (ranges, negations, big lists) are
 * checks in the record that an entry leads to.
 *
 * A generation is read once for what is looked up in it: its parts are found by the slot that it
 * names.
 */
#ifndef NETOKEN_POLICY_H
#define NETOKEN_POLICY_H

#include "maps.h"
#include "scratch.h"
#include "types.h"

#define NO_RULE 0xffffffffU
#define WORDS (sizeof(struct netoken_facts) / sizeof(__u64))
#define CGROUP_WORD (offsetof(struct netoken_facts, cgroup_id) / sizeof(__u64))

static __always_inline const struct netoken_generation *this_generation(void)
{
	__u32 zero = 0;
	void *inner = bpf_map_lookup_elem(&policies, &zero);

	return inner ? bpf_map_lookup_elem(inner, &zero) : NULL;
}

/*
 * Who sends it. Only the TCP socket of this host that opens the connection is a sender: what is
 * forwarded has none, and what a raw or packet socket writes is not that socket's connection. What
 * came by another interface is forwarded, even if it still has a socket, as a bridge or a redirect
 * leaves it: the kernel would tell the user as that one's user namespace calls him, where anybody
 * can be root.
 */
static __always_inline void gather_sender(struct search *search, struct __sk_buff *skb,
					  const struct netoken_generation *gen)
{
	struct bpf_sock *sk = skb->sk;

	search->facts.has_sender = 0;
	search->facts.uid = 0;
	__builtin_memset(search->cgroup_ids, 0, sizeof(search->cgroup_ids));
	if (!(gen->needs & NEED_SENDER) || !sk || skb->ingress_ifindex)
		return;
	sk = bpf_sk_fullsock(sk);
	if (!sk || sk->type != SOCK_STREAM)
		return;
	search->facts.has_sender = 1;
	if (gen->needs & NEED_UID)
		search->facts.uid = bpf_get_socket_uid(skb);
	if (!config.has_cgroup_id)
		return;
	for (__u32 i = 0; i < CGROUP_LEVELS_MAX; i++) {
		if (i >= gen->level_count)
			break;
		search->cgroup_ids[i] = bpf_skb_ancestor_cgroup_id(skb, gen->levels[i]);
	}
}

static __always_inline void gather_facts(struct scratch *scratch, struct __sk_buff *skb,
					 const struct netoken_generation *gen)
{
	const struct netoken_flow *flow = &scratch->syn.event.flow;
	struct netoken_facts *facts = &scratch->search.facts;

	__builtin_memcpy(facts->daddr, flow->daddr, ADDR_LEN);
	__builtin_memcpy(facts->saddr, flow->saddr, ADDR_LEN);
	facts->dport_be = flow->dport_be;
	facts->sport_be = flow->sport_be;
	facts->mark = skb->mark;
	facts->ifindex = skb->ifindex;
	facts->netns_ino = config.netns_ino;
	facts->cgroup_id = 0;
	facts->family = flow->family;
	facts->shape = 0;
	facts->pad = 0;
	gather_sender(&scratch->search, skb, gen);
}

/* The same from a question. */
static __always_inline void take_facts(struct search *search, struct __sk_buff *skb,
				       const struct netoken_generation *gen)
{
	struct netoken_question *question = (void *)(long)skb->data;
	void *end = (void *)(long)skb->data_end;

	if ((void *)(question + 1) > end)
		return;
	__builtin_memcpy(&search->facts, &question->facts, sizeof(search->facts));
	for (__u32 i = 0; i < CGROUP_LEVELS_MAX; i++) {
		const __u64 *id = &question->cgroup_ids[gen->levels[i] & 31];

		/* It is; the verifier wants to see it of every pointer that it did not compute. */
		search->cgroup_ids[i] = (void *)(id + 1) > end ? 0 : *id;
	}
}

static __always_inline bool is_in_set(struct search *search, const struct netoken_condition *check,
				      void *sets)
{
	const struct netoken_facts *facts = &search->facts;
	struct netoken_set_key *key = &search->set_key;

	/* Every entry of a set is no longer than its field, so what lies behind does not count. */
	key->bits = SET_ID_BITS + ADDR_LEN * 8;
	key->set = check->a;
	switch (check->field) {
	case FIELD_SRC:
		key->set += facts->family == 6;
		__builtin_memcpy(key->value, facts->saddr, ADDR_LEN);
		break;
	case FIELD_DST:
		key->set += facts->family == 6;
		__builtin_memcpy(key->value, facts->daddr, ADDR_LEN);
		break;
	case FIELD_SPORT:
		*(__be16 *)key->value = facts->sport_be;
		break;
	case FIELD_DPORT:
		*(__be16 *)key->value = facts->dport_be;
		break;
	case FIELD_UID:
		*(__be32 *)key->value = bpf_htonl(facts->uid);
		break;
	case FIELD_CGROUP:
		*(__u64 *)key->value = search->cgroup_ids[check->level & (CGROUP_LEVELS_MAX - 1)];
		break;
	case FIELD_INTERFACE:
		*(__u32 *)key->value = facts->ifindex;
		*(__u32 *)(key->value + 4) = facts->netns_ino;
		break;
	default:
		return false;
	}
	return sets && bpf_map_lookup_elem(sets, key) != NULL;
}

static __always_inline bool is_in_range(const struct netoken_facts *facts,
					const struct netoken_condition *check)
{
	__u32 value = check->field == FIELD_DPORT   ? bpf_ntohs(facts->dport_be)
		      : check->field == FIELD_SPORT ? bpf_ntohs(facts->sport_be)
						    : facts->uid;

	return check->a <= value && value <= check->b;
}

static __always_inline bool check_holds(struct search *search,
					const struct netoken_condition *check, void *sets)
{
	bool holds;

	/* Who is unknown is also not somebody else. */
	if ((check->field == FIELD_UID || check->field == FIELD_CGROUP) &&
	    !search->facts.has_sender)
		return false;
	if (check->kind == CONDITION_RANGE)
		holds = is_in_range(&search->facts, check);
	else if (check->kind == CONDITION_BITS)
		holds = (search->facts.mark & check->b) == check->a;
	else
		holds = is_in_set(search, check, sets);
	return holds != check->negated;
}

/*
 * Whether all checks of a record of a slot hold. Not static, so that the verifier looks at them
 * once and not for every step of a walk.
 */
__noinline int record_holds(__u32 slot, __u32 number)
{
	struct scratch *scratch = this_scratch();
	const struct netoken_record *record;
	void *records, *sets;

	records = bpf_map_lookup_elem(&policy_records, &slot);
	sets = bpf_map_lookup_elem(&policy_sets, &slot);
	if (!scratch || !records)
		return 0;
	record = bpf_map_lookup_elem(records, &number);
	if (!record)
		return 0;
	for (__u32 c = 0; c < RECORD_CHECKS_MAX; c++) {
		if (c >= record->checks_count)
			break;
		if (!check_holds(&scratch->search, &record->checks[c], sets))
			return 0;
	}
	return 1;
}

/*
 * Walks from record `at` of a slot to the first one whose checks all hold, but not beyond rule
 * `before`. Leaves its rule in the scratch and returns that rule's number, or 0. Not static, so
 * that the verifier looks at it once.
 */
__noinline __u32 walk_records(__u32 slot, __u32 at, __u32 before)
{
	struct scratch *scratch = this_scratch();
	void *records;

	records = bpf_map_lookup_elem(&policy_records, &slot);
	if (!scratch || !records)
		return 0;
	for (int i = 0; i < CHAIN_MAX; i++) {
		const struct netoken_record *record;
		bool holds;

		record = bpf_map_lookup_elem(records, &at);
		if (!at || !record || record->rule.id >= before)
			return 0;
		holds = record_holds(slot, at);
		if (holds && !record->more) {
			scratch->search.found = record->rule;
			return record->rule.id;
		}
		at = holds ? record->more : record->next;
	}
	return 0;
}

/*
 * Finds the rule for the SYN in the scratch and leaves it there; returns 0 if there is none. Not
 * static, so that the verifier looks at the loop once and not for every way into it.
 */
__noinline int find_rule(struct __sk_buff *skb)
{
	const struct netoken_generation *gen = this_generation();
	struct scratch *scratch = this_scratch();
	__u32 best = NO_RULE;
	void *entries;
	struct search *search;
	__u64 *have, *key;
	__u32 slot;

	if (!gen || !scratch)
		return 0;
	search = &scratch->search;
	have = (__u64 *)&search->facts;
	key = (__u64 *)&search->key;
	if (config.is_question)
		take_facts(search, skb, gen);
	else
		gather_facts(scratch, skb, gen);
	search->generation = gen->number;
	search->shapes_looked_up = 0;
	search->found = gen->default_rule;

	slot = gen->slot;
	entries = bpf_map_lookup_elem(&policy_entries, &slot);
	if (!entries)
		return search->found.action;
	for (__u32 i = 0; i < SHAPES_MAX; i++) {
		const struct netoken_shape *shape = &gen->shapes[i];
		const __u64 *mask = (const __u64 *)&shape->mask;
		const struct netoken_entry *entry;

		if (i >= gen->shape_count || shape->first_rule >= best)
			break;
		for (__u32 word = 0; word < WORDS; word++)
			key[word] = have[word] & mask[word];
		key[CGROUP_WORD] = search->cgroup_ids[shape->level & (CGROUP_LEVELS_MAX - 1)] &
				   mask[CGROUP_WORD];
		search->key.shape = i;
		search->shapes_looked_up++;
		entry = bpf_map_lookup_elem(entries, &search->key);
		if (!entry || entry->rule.id >= best)
			continue;
		if (entry->record) {
			__u32 rule = walk_records(slot, entry->record, best);

			if (rule)
				best = rule;
		} else {
			search->found = entry->rule;
			best = entry->rule.id;
		}
	}
	return search->found.action;
}

static __always_inline void count_hit(__u32 number)
{
	struct netoken_hits *counter;

	if (number < HITS_FIRST) {
		counter = bpf_map_lookup_elem(&hits, &number);
	} else {
		__u32 chunk = (number - HITS_FIRST) / HITS_CHUNK;
		__u32 place = (number - HITS_FIRST) % HITS_CHUNK;
		void *inner = bpf_map_lookup_elem(&more_hits, &chunk);

		counter = inner ? bpf_map_lookup_elem(inner, &place) : NULL;
	}
	if (!counter)
		return;
	/* One for all CPUs: for a million rules, one for each CPU would take too much memory.
	 * Relaxed, or newer compilers use an instruction that 5.10 does not know. */
	__atomic_fetch_add(&counter->packets, 1, __ATOMIC_RELAXED);
	counter->last_jiffies = bpf_jiffies64();
}

/*
 * Chooses the rule for the SYN in the scratch, leaves it there and counts it; NULL if no rule
 * matches and there is no default.
 */
static __always_inline const struct netoken_rule *lookup_rule(struct __sk_buff *skb,
							      struct scratch *scratch)
{
	const struct netoken_generation *gen = this_generation();
	struct search *search = &scratch->search;

	if (!gen)
		return NULL;
	/* A policy without rules is the most frequent one, and needs no search. */
	if (!gen->shape_count) {
		search->generation = gen->number;
		search->found = gen->default_rule;
	} else if (!find_rule(skb)) {
		return NULL;
	}
	if (!search->found.action)
		return NULL;
	count_hit(search->found.hits);
	return &search->found;
}

/* Answers a question: what find_rule() decides about the facts in it, and when that was. */
static __always_inline int answer(struct __sk_buff *skb)
{
	struct scratch *scratch = this_scratch();
	struct netoken_question *question;
	int found;

	if (!config.is_question || !scratch)
		return TC_ACT_SHOT;
	found = find_rule(skb);
	question = (void *)(long)skb->data;
	if ((void *)(question + 1) > (void *)(long)skb->data_end)
		return TC_ACT_SHOT;
	question->found = found != 0;
	question->rule = scratch->search.found;
	question->generation = scratch->search.generation;
	question->shapes_looked_up = scratch->search.shapes_looked_up;
	question->now_ns = bpf_ktime_get_ns();
	question->now_jiffies = bpf_jiffies64();
	return TC_ACT_UNSPEC;
}

#endif
