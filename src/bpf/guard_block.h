/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What follows from refusing: a source that is refused too often is blocked for a while, and many
 * refused packets raise an alert.
 *
 * Anybody can write any source into a SYN. So nothing here may cost a source more than what it gets
 * without a right token anyway: who is exempt never comes here, and a keyed token that is right is
 * as good as before.
 */
#ifndef NETOKEN_GUARD_BLOCK_H
#define NETOKEN_GUARD_BLOCK_H

#include "guard_maps.h"

/* What is counted as one source. */
static __always_inline void make_source_key(struct netoken_source_key *key,
					    const struct netoken_flow *flow,
					    const struct netoken_guard_auto_block *settings)
{
	const __u64 *mask = flow->family == 4 ? settings->mask4 : settings->mask6;
	__u64 addr[2];

	__builtin_memcpy(addr, flow->saddr, ADDR_LEN);
	addr[0] &= mask[0];
	addr[1] &= mask[1];
	__builtin_memset(key, 0, sizeof(*key));
	key->prefixlen = flow->family == 4 ? settings->prefixlen4 : settings->prefixlen6;
	key->family = flow->family;
	__builtin_memcpy(key->addr, addr, ADDR_LEN);
}

/* Counts a refused packet. CPUs that count at once may lose one where a window begins. */
static __always_inline void count_refused(const struct netoken_source_key *key,
					  const struct netoken_guard_auto_block *settings,
					  __u64 now_ns)
{
	struct refused_source *source = bpf_map_lookup_elem(&guard_refused, key);
	struct refused_source first = {
		.since_ns = now_ns,
		.refused = 1,
	};
	struct netoken_auto_blocked blocked = {
		.until_ns = now_ns + settings->block_ns,
	};

	if (!source) {
		bpf_map_update_elem(&guard_refused, key, &first, BPF_ANY);
		return;
	}
	/* Negative where another CPU has just begun the window. */
	if ((__s64)(now_ns - source->since_ns) > (__s64)settings->within_ns) {
		source->since_ns = now_ns;
		source->refused = 1;
		return;
	}
	__atomic_fetch_add(&source->refused, 1, __ATOMIC_RELAXED);
	if (source->refused <= settings->refused_max)
		return;
	bpf_map_update_elem(&guard_auto_blocked, key, &blocked, BPF_ANY);
	bpf_map_delete_elem(&guard_refused, key);
}

/*
 * The verdict for the packet in the scratch once it is known what became of its source before; and
 * remembers what becomes of it now. Not static, so that the verifier looks at it once.
 */
__noinline __u32 watch_source(__u32 verdict)
{
	struct guard_scratch *scratch = this_guard_scratch();
	const struct netoken_guard_table *table = running_table();
	struct netoken_auto_blocked *blocked;
	struct netoken_source_key key;
	__u64 now_ns = bpf_ktime_get_ns();

	if (!scratch || !table)
		return verdict;
	make_source_key(&key, &scratch->event.flow, &table->auto_block);
	blocked = bpf_map_lookup_elem(&guard_auto_blocked, &key);
	if (blocked && blocked->until_ns > now_ns) {
		__atomic_fetch_add(&blocked->refused, 1, __ATOMIC_RELAXED);
		return GUARD_AUTO_BLOCKED;
	}
	/* That there was no room is not the fault of who has a right token. */
	if (verdict != GUARD_VALID && verdict != GUARD_SEEN_FULL)
		count_refused(&key, &table->auto_block, now_ns);
	return verdict;
}

/* CPUs read the clock in front of the lock, so a window may have begun a moment after `now_ns`. */
#define ALARM_SLACK_NS 100000000ULL
/* After so many more refused packets an alert that found no room is sent again. */
#define ALARM_AGAIN 64

/* One that has ended has nearly all of time left, and one of older rules too much. */
static __always_inline bool is_in_window(const struct guard_alarm *alarm, __u64 now_ns,
					 __u64 within_ns)
{
	return alarm->ends_ns - now_ns <= within_ns + ALARM_SLACK_NS;
}

/* Tells a table from the one before it, also where nobody counts them. */
static __always_inline __u64 thresholds_of(const struct netoken_guard_table *table)
{
	return table->number << 8 | table->generation;
}

/* The severity that a refused packet raises the alarm to; SEVERITY_NONE nearly always. The lock is
 * taken only where a window or an alert begins. Not static, so that the verifier looks at it once.
 */
__noinline __u32 raise_alarm(void)
{
	const struct netoken_guard_table *table = running_table();
	__u32 zero = 0, severity = SEVERITY_NONE, before;
	struct guard_alarm *alarm = bpf_map_lookup_elem(&guard_alarms, &zero);
	__u64 now_ns = bpf_ktime_get_ns(), within_ns, refused, next = ~0ULL;

	if (!table || !alarm)
		return SEVERITY_NONE;
	within_ns = table->alerts.within_ns;
	if (alarm->thresholds == thresholds_of(table) && is_in_window(alarm, now_ns, within_ns)) {
		__atomic_fetch_add(&alarm->refused, 1, __ATOMIC_RELAXED);
		if (alarm->refused < alarm->next)
			return SEVERITY_NONE;
	}
	bpf_spin_lock(&alarm->lock);
	if (!is_in_window(alarm, now_ns, within_ns)) {
		alarm->ends_ns = now_ns + within_ns;
		alarm->refused = 1;
		alarm->severity = SEVERITY_NONE;
	} else if (alarm->thresholds != thresholds_of(table)) {
		alarm->refused++;
	}
	refused = alarm->refused;
	for (__u32 i = 0; i < GUARD_SEVERITIES; i++) {
		if (refused >= table->alerts.refused[i])
			severity = i + 1;
		else if (table->alerts.refused[i] < next)
			next = table->alerts.refused[i];
	}
	before = alarm->severity;
	/* By the thresholds of new rules it may have been less. */
	if (severity > before || alarm->thresholds != thresholds_of(table))
		alarm->severity = severity;
	alarm->thresholds = thresholds_of(table);
	alarm->next = next;
	bpf_spin_unlock(&alarm->lock);
	return severity > before ? severity : SEVERITY_NONE;
}

/* Sends the alert that the packet in the scratch raises; or has it raised again, if the buffer has
 * no room for it among the packets that it is about. */
static __noinline int send_alert(void *ctx, __u32 severity, __u32 ifindex)
{
	const struct netoken_guard_table *table = running_table();
	__u32 zero = 0;
	struct guard_alarm *alarm = bpf_map_lookup_elem(&guard_alarms, &zero);
	struct netoken_guard_alert alert = {
		.severity = severity,
		.ifindex = ifindex,
	};

	if (!table || !alarm)
		return 0;
	alert.time_ns = bpf_ktime_get_ns();
	alert.netns_ino = config.netns_ino;
	alert.refused = alarm->refused;
	alert.within_ns = table->alerts.within_ns;
	if (!bpf_perf_event_output(ctx, &guard_events, BPF_F_CURRENT_CPU, &alert, sizeof(alert)))
		return 0;
	bpf_spin_lock(&alarm->lock);
	if (alarm->severity == severity) {
		alarm->severity = severity - 1;
		if (alarm->next > alarm->refused + ALARM_AGAIN)
			alarm->next = alarm->refused + ALARM_AGAIN;
	}
	bpf_spin_unlock(&alarm->lock);
	return 0;
}

#endif
