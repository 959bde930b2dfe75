/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* The maps and settings of an instance. Which of them are pinned is decided in user space. */
#ifndef NETOKEN_MAPS_H
#define NETOKEN_MAPS_H

#include "keys.h"
#include "types.h"

const volatile struct netoken_config config = {
	.sample = 1,
	.exid = 0x4e54,
	.option_kind = 253,
};

#define fault(step) ((config.faults & (step)) != 0)

/* Brings into BTF, and so to Rust, the types that no map and no setting mentions by value. */
const volatile struct {
	enum netoken_size size;
	enum netoken_verdict verdict;
	enum netoken_action action;
	enum netoken_when_full when_full;
	enum netoken_fault fault;
	enum netoken_form form;
	enum netoken_bind bind;
	enum netoken_key_size key_size;
	enum netoken_key_state key_state;
	enum netoken_check check;
	struct netoken_accept accept;
	enum netoken_condition_kind condition_kind;
	enum netoken_field field;
	enum netoken_need need;
	struct netoken_facts facts;
	struct netoken_entry entry;
	struct netoken_record record;
	struct netoken_set_key set_key;
	struct netoken_generation generation;
	struct netoken_hits hits;
	struct netoken_question question;
} types = {};

/*
 * The policy in use. Replacing the map in `policies` is the one step in which a policy changes; it
 * says in which slot of the other three its parts are. The slot that it does not name is free: it
 * is filled before that step, and emptied only when no packet can still be looking into it, which
 * is when the update has returned. See docs/policy.md.
 *
 * Inner maps are declared by size and not by type: user space makes them without BTF, and kernels
 * from 5.15 to 6.1 take such a one for another kind than one with BTF.
 */
struct generation_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct netoken_generation));
	__uint(max_entries, 1);
};

struct entry_map {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(key_size, sizeof(struct netoken_facts));
	__uint(value_size, sizeof(struct netoken_entry));
	__uint(max_entries, 1);
};

struct record_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct netoken_record));
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_INNER_MAP);
};

struct set_map {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(key_size, sizeof(struct netoken_set_key));
	__uint(value_size, sizeof(__u32));
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 1);
	__array(values, struct generation_map);
} policies SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 2);
	__array(values, struct entry_map);
} policy_entries SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 2);
	__array(values, struct record_map);
} policy_records SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 2);
	__array(values, struct set_map);
} policy_sets SEC(".maps");

/* Outlives generations: a rule keeps the number of its counter as long as it keeps its name. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_hits);
	__uint(max_entries, HITS_FIRST);
} hits SEC(".maps");

struct hits_map {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct netoken_hits));
	__uint(max_entries, HITS_CHUNK);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, HITS_CHUNKS_MAX);
	__array(values, struct hits_map);
} more_hits SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_counter);
	__uint(max_entries, VERDICT_COUNT);
} counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_live);
	__uint(max_entries, 1);
} live SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
} events SEC(".maps");

#endif
