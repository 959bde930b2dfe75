/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/* What to do with a SYN. The rest of the program knows of the policy only this one function. */
#ifndef NETOKEN_POLICY_H
#define NETOKEN_POLICY_H

#include "maps.h"
#include "types.h"

/* The longest prefix decides; of two rules for the same prefix the one that names the port. */
static __always_inline const struct netoken_rule *lookup_rule(const struct netoken_flow *flow)
{
	struct netoken_policy_key key = {
		.prefixlen = POLICY_FRONT_BITS + ADDR_LEN * 8,
		.family = flow->family,
	};
	const struct netoken_rule *of_any, *of_port;
	__u32 zero = 0;
	void *policy;

	policy = bpf_map_lookup_elem(&policies, &zero);
	if (!policy)
		return NULL;
	__builtin_memcpy(key.addr, flow->daddr, sizeof(key.addr));
	of_any = bpf_map_lookup_elem(policy, &key);
	if (of_any && !of_any->has_ports)
		return of_any;
	key.port_be = flow->dport_be;
	of_port = bpf_map_lookup_elem(policy, &key);
	if (of_port && (!of_any || of_port->addr_bits >= of_any->addr_bits))
		return of_port;
	return of_any;
}

#endif
