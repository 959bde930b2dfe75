/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The maps and settings of the guard. Keys, rings, clock and the counters of keys are those of
 * keys.h: pinned in the instance, and so the same that the stamp of the instance uses.
 */
#ifndef NETOKEN_GUARD_MAPS_H
#define NETOKEN_GUARD_MAPS_H

#include "guard_types.h"
#include "wire.h"

const volatile struct netoken_config config = {
	.sample = 1,
	.exid = 0x4e54,
	.option_kind = 253,
};

/* Brings into BTF, and so to Rust, the types that no map and no setting mentions by value. */
const volatile struct {
	enum netoken_guard_size size;
	enum netoken_guard_verdict verdict;
	enum netoken_guard_mode mode;
	enum netoken_guard_severity severity;
	struct netoken_guard_event event;
	struct netoken_guard_alert alert;
	struct netoken_guard_table table;
	struct netoken_source_key source_key;
	enum netoken_source_list source_list;
} guard_types = {};

/* How much of a packet's destination is known. match_less() counts with the first two. */
enum reach {
	REACH_NOTHING = 0,
	REACH_ADDR = 1,
	REACH_PORT = 2,
};

/* What is known of one packet. One for each CPU is enough: an ingress hook is not entered from
 * within itself. */
struct guard_scratch {
	struct netoken_guard_event event;
	__u32 l3_off;
	__u32 l4_off;
	__u32 ip_len_bytes;  /* what the IP header claims, header included */
	__u32 tcp_len_bytes; /* what the data offset claims */
	__u32 reach;	     /* enum reach */
	__u32 mark;	     /* what a rule wants of the mark of the skb */
	__u32 mark_mask;
	__u32 tokens;	 /* in the options */
	__u32 token_off; /* of the first one's option */
	__u64 to_blank;	 /* bit by byte of the options: is a part of a token */
	/* Which lists the table has that decides about the packet. */
	__u8 generation;
	__u8 has_exempt;
	__u8 has_blocked;
	__u8 is_static; /* a static token makes it valid */
	__u32 severity; /* of the alert that it raises */
	/* Not of the packet, but what is at hand for it: see monotonic_ns(). */
	__u64 read_at_jiffies;
	__u64 monotonic_ns;
	/* Slack for the verifier, which sees only that an offset is below 64. */
	__u8 options[TCP_OPTIONS_MAX + 40];
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct guard_scratch);
	__uint(max_entries, 1);
} guard_scratches SEC(".maps");

struct guard_generation {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct netoken_guard_table));
	__uint(max_entries, 1);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, 1);
	__array(values, struct guard_generation);
} guard_rules SEC(".maps");

/* A source in the window that began with its first refused packet. */
struct refused_source {
	__u64 since_ns;
	__u64 refused;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct netoken_source_key);
	__type(value, struct refused_source);
	__uint(max_entries, GUARD_REFUSED_MAX);
} guard_refused SEC(".maps");

/* Apart from those that are only counted, so that a flood from everywhere does not push them out.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct netoken_source_key);
	__type(value, struct netoken_auto_blocked);
	__uint(max_entries, GUARD_AUTO_BLOCKED_MAX);
} guard_auto_blocked SEC(".maps");

/* What the instance refused in this window. */
struct guard_alarm {
	struct bpf_spin_lock lock;
	__u32 severity; /* that was alerted to already */
	__u64 ends_ns;
	__u64 refused;
	__u64 next;	  /* so many are the next alert */
	__u64 thresholds; /* of which table `next` and `severity` are */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct guard_alarm);
	__uint(max_entries, 1);
} guard_alarms SEC(".maps");

/* Only accepted SYNs come in, so that a flood without tokens pushes nobody out. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__type(key, struct netoken_peer_key);
	__type(value, struct netoken_peer);
	__uint(max_entries, GUARD_PEERS_MAX);
} guard_peers SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_guard_counters);
	__uint(max_entries, 1);
} guard_counters SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_live);
	__uint(max_entries, 1);
} guard_live SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERF_EVENT_ARRAY);
	__type(key, __u32);
	__type(value, __u32);
} guard_events SEC(".maps");

static __always_inline struct guard_scratch *this_guard_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&guard_scratches, &zero);
}

/* The rules in use; NULL if there never were any. */
static __always_inline const struct netoken_guard_table *running_table(void)
{
	__u32 zero = 0;
	void *generation = bpf_map_lookup_elem(&guard_rules, &zero);

	return generation ? bpf_map_lookup_elem(generation, &zero) : NULL;
}

#endif
