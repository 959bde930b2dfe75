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
	struct netoken_policy_key policy_key;
	struct netoken_rule rule;
} types = {};

/* One generation of the policy. User space fills a new one and swaps it in whole. */
struct policy {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(key_size, sizeof(struct netoken_policy_key));
	__uint(value_size, sizeof(struct netoken_rule));
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 1);
	__array(values, struct policy);
} policies SEC(".maps");

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
