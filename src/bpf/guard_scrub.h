/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What becomes of a token that was looked at: the host does not see it, and the application can ask
 * for it.
 */
#ifndef NETOKEN_GUARD_SCRUB_H
#define NETOKEN_GUARD_SCRUB_H

#include "guard_maps.h"
#include "hook.h"
#include "wire.h"

/* Keeps who opened a connection. A retransmission writes the same again, with a later time. */
static __noinline int note_peer(const struct guard_scratch *scratch)
{
	struct netoken_peer_key key = {};
	struct netoken_peer peer = {
		.verdict = GUARD_VALID,
	};

	if (!scratch)
		return 0;
	__builtin_memcpy(key.saddr, scratch->event.flow.saddr, ADDR_LEN);
	__builtin_memcpy(key.daddr, scratch->event.flow.daddr, ADDR_LEN);
	key.sport_be = scratch->event.flow.sport_be;
	key.dport_be = scratch->event.flow.dport_be;
	key.family = scratch->event.flow.family;
	peer.time_ns = bpf_ktime_get_ns();
	peer.rule = scratch->event.rule;
	__builtin_memcpy(peer.token, scratch->event.token, TOKEN_LEN);
	return bpf_map_update_elem(&guard_peers, &key, &peer, BPF_ANY);
}

#endif
