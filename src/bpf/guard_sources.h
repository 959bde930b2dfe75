/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The lists of sources: who needs no token, and who is refused whatever he sends.
 */
#ifndef NETOKEN_GUARD_SOURCES_H
#define NETOKEN_GUARD_SOURCES_H

#include "guard_maps.h"

struct source_prefixes {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(key_size, sizeof(struct netoken_source_key));
	__uint(value_size, sizeof(struct netoken_source));
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_NO_PREALLOC);
};

/* By generation. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, GUARD_GENERATIONS);
	__array(values, struct source_prefixes);
} guard_exempt SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, GUARD_GENERATIONS);
	__array(values, struct source_prefixes);
} guard_blocked SEC(".maps");

static __always_inline bool has_expired(const struct netoken_source *source)
{
	__u32 zero = 0;
	struct netoken_clock *now;

	if (!source->expires_ns)
		return false;
	now = bpf_map_lookup_elem(&clock, &zero);
	return now && bpf_ktime_get_boot_ns() + now->boot_offset_ns >= source->expires_ns;
}

/* Whether the source of a flow is below one of these prefixes. */
static __always_inline bool is_listed(void *prefixes, const struct netoken_flow *flow)
{
	struct netoken_source_key key = {
		.prefixlen = SOURCE_FAMILY_BITS + ADDR_LEN * 8,
		.family = flow->family,
	};

	__builtin_memcpy(key.addr, flow->saddr, ADDR_LEN);
	/* Around a prefix that has expired there may be one that has not. */
	for (int i = 0; i <= GUARD_EXPIRED_MAX; i++) {
		const struct netoken_source *source = bpf_map_lookup_elem(prefixes, &key);

		if (!source)
			return false;
		if (!has_expired(source))
			return true;
		if (source->prefixlen <= SOURCE_FAMILY_BITS)
			return false;
		key.prefixlen = source->prefixlen - 1;
	}
	return false;
}

/* Out of line, because few instances have lists. Says GUARD_NONE if the source is on none. */
static __noinline __u32 check_source(const struct guard_scratch *scratch)
{
	__u32 generation;
	void *prefixes;

	if (!scratch)
		return GUARD_BLOCKED;
	generation = scratch->generation;
	if (scratch->has_exempt) {
		prefixes = bpf_map_lookup_elem(&guard_exempt, &generation);
		if (prefixes && is_listed(prefixes, &scratch->event.flow))
			return GUARD_EXEMPT;
	}
	if (scratch->has_blocked) {
		prefixes = bpf_map_lookup_elem(&guard_blocked, &generation);
		if (prefixes && is_listed(prefixes, &scratch->event.flow))
			return GUARD_BLOCKED;
	}
	return GUARD_NONE;
}

#endif
