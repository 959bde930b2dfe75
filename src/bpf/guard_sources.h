/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The lists of sources: who needs no token, and who is refused whatever he sends.
 *
 * User space has cut nested prefixes into ranges that do not overlap (src/guard/sources.rs), so
 * that one search decides. Its cost depends on how many there are, and not on how they lie.
 */
#ifndef NETOKEN_GUARD_SOURCES_H
#define NETOKEN_GUARD_SOURCES_H

#include "guard_maps.h"

/* The page where the search begins, of each generation, list and family. An array as it is, because
 * looking into that takes no call. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_source_page);
	__uint(max_entries, SOURCE_TOPS);
} guard_lists SEC(".maps");

struct source_pages {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(key_size, sizeof(__u32));
	__uint(value_size, sizeof(struct netoken_source_page));
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_INNER_MAP);
};

/* By generation: the pages that others lead to. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__type(key, __u32);
	__uint(max_entries, GUARD_GENERATIONS);
	__array(values, struct source_pages);
} guard_sources SEC(".maps");

/* The slot of a page in which an address is. */
static __always_inline __u32 find_slot(const struct netoken_source_page *page, __u64 high,
				       __u64 low)
{
	__u64 slot = high - page->high;

	if (high < page->high)
		return 0;
	if (page->by_low && !slot) {
		if (low < page->low)
			return 0;
		slot = low - page->low;
	} else if (page->by_low) {
		return SOURCE_PAGE_SLOTS - 1;
	}
	slot >>= page->shift & 63;
	return slot < SOURCE_PAGE_SLOTS ? slot : SOURCE_PAGE_SLOTS - 1;
}

/* The last boundary of a page that is not behind an address. */
static __always_inline const struct netoken_source_boundary *
find_boundary(const struct netoken_source_page *page, __u64 high, __u64 low, __u32 *place)
{
	__u32 slot = find_slot(page, high, low), at, left;

	barrier_var(slot);
	if (slot >= SOURCE_PAGE_SLOTS)
		return NULL;
	at = page->slots[slot];
	left = page->slots[slot + 1] - at + 1;
	for (__u32 i = 0; i < SOURCE_PAGE_BITS; i++) {
		const struct netoken_source_boundary *probe;
		__u32 half = left / 2;

		if (!half)
			break;
		/* For the verifier; a page has no more. */
		probe = &page->boundaries[(at + half) & (SOURCE_PAGE_BOUNDARIES - 1)];
		if (probe->high < high || (probe->high == high && probe->low <= low))
			at += half;
		left -= half;
	}
	at &= SOURCE_PAGE_BOUNDARIES - 1;
	*place = at;
	return &page->boundaries[at];
}

static __always_inline bool is_over(__u64 expires_ns)
{
	__u32 zero = 0;
	struct netoken_clock *now;
	__u64 now_ns;

	if (!expires_ns || expires_ns == SOURCE_FOR_EVER)
		return !expires_ns;
	now = bpf_map_lookup_elem(&clock, &zero);
	if (!now)
		return false;
	/* By the same clock as tokens: one that is set counts at once where there is TAI. */
	if (has_tai)
		now_ns = bpf_ktime_get_tai_ns() + now->tai_offset_ns;
	else
		now_ns = bpf_ktime_get_boot_ns() + now->boot_offset_ns;
	return now_ns >= expires_ns;
}

/* Until when the range of an address is on a list; 0 if it is not. */
static __always_inline __u64 look_up(const struct netoken_source_page *page, __u32 generation,
				     __u64 high, __u64 low)
{
	const struct netoken_source_boundary *found;
	__u32 at = 0;
	void *pages;

	found = find_boundary(page, high, low, &at);
	if (!page->leads_on)
		return found ? found->expires_ns : 0;
	pages = bpf_map_lookup_elem(&guard_sources, &generation);
	if (!pages)
		return 0;
	for (__u32 level = 1; level < SOURCE_LEVELS; level++) {
		at += page->first_page;
		page = bpf_map_lookup_elem(pages, &at);
		if (!page)
			return 0;
		found = find_boundary(page, high, low, &at);
		if (!page->leads_on)
			return found ? found->expires_ns : 0;
	}
	return 0;
}

/* Whether the source of the packet in the scratch is on a list, enum netoken_source_list. Not
 * static, so that the verifier looks at it once. */
__noinline int is_listed(__u32 list)
{
	struct guard_scratch *scratch = this_guard_scratch();
	const struct netoken_source_page *page;
	const struct netoken_flow *flow;
	__u32 at, generation, is_v6;
	const __u64 *addr;
	__u64 high, low;

	if (!scratch)
		return false;
	flow = &scratch->event.flow;
	addr = (const __u64 *)flow->saddr;
	is_v6 = flow->family == 6;
	/* IPv4 is mapped into IPv6, and has here no more than its address. */
	high = is_v6 ? bpf_be64_to_cpu(addr[0]) : (__u32)bpf_be64_to_cpu(addr[1]);
	low = is_v6 ? bpf_be64_to_cpu(addr[1]) : 0;
	generation = scratch->generation;
	at = (generation * SOURCE_LISTS + list) * SOURCE_FAMILIES + is_v6;
	page = bpf_map_lookup_elem(&guard_lists, &at);
	return page && !is_over(look_up(page, generation, high, low));
}

/* What the lists say of the source of the packet in the scratch: GUARD_NONE if it is on none. */
static __always_inline __u32 check_source(const struct guard_scratch *scratch)
{
	if (scratch->has_exempt && is_listed(SOURCES_EXEMPT))
		return GUARD_EXEMPT;
	if (scratch->has_blocked && is_listed(SOURCES_BLOCKED))
		return GUARD_BLOCKED;
	return GUARD_NONE;
}

#endif
