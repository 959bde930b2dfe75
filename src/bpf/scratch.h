/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The memory of one SYN on its way through the classifier. It lies in a map value and not on the
 * stack for two reasons: only there may a program of 5.10 index with a number from the wire, and
 * what lies there the verifier does not track, so that it cannot multiply its states by it.
 *
 * One per CPU is enough: a transmit hook runs with bottom halves off and is not entered from within
 * itself.
 */
#ifndef NETOKEN_SCRATCH_H
#define NETOKEN_SCRATCH_H

#include "types.h"
#include "wire.h"

#define CHUNK_LEN_BYTES 2048

/* Where the parts of a SYN are, as offsets from the start of the frame, and what an event says of
 * it. */
struct syn {
	struct netoken_event event;
	__u32 l3_off;
	__u32 l4_off;
	__u32 ip_len_bytes;  /* what the IP header claims, header included */
	__u32 tcp_len_bytes; /* what the data offset claims */
	__u16 is_fragment;
	__u16 is_cut; /* its options were not all in the linear part when they were copied */
};

/* A TCP header from the data offset to the end of the options: all of it that a stamp can change.
 */
struct tcp_rest {
	__u8 data_offset;
	__u8 flags;
	__be16 window_be;
	__be16 check_be;
	__be16 urgent_be;
	/* Slack for the verifier, which sees only that an offset is below 64. */
	__u8 options[TCP_OPTIONS_MAX + 40];
} __attribute__((aligned(8)));

/* The part of it in front of the data offset: ports and sequence numbers. */
#define TCP_REST_OFF 12
#define TCP_REST_LEN (TCP_HEADER_LEN - TCP_REST_OFF + TCP_OPTIONS_MAX)

/*
 * An IP header and a TCP header side by side, as they lie in nearly every packet, so that one store
 * writes both. An IPv4 header stands in the second half of `ip`; its options are not copied.
 */
struct headers {
	__u8 align[4]; /* brings `rest` to a multiple of 8 */
	__u8 ip[IPV6_HEADER_LEN];
	__u8 tcp[TCP_REST_OFF];
	struct tcp_rest rest;
};

/* What the option list of a SYN holds. */
struct option_list {
	__u32 end;  /* behind the last option that is neither NOP nor EOL */
	__u32 nops; /* NOPs in front of `end` */
	__u8 has_auth;
	__u8 has_token;
	volatile __u8 squeezed;
	volatile __u8 left;
};

/* How far a stamp has come; all that is needed to take it back. */
struct stamp {
	__u32 old_options_len;
	__u32 new_options_len;
	__u32 grow;	  /* bytes */
	__u32 tail_off;	  /* of the payload, before it moves */
	__u32 tail_end;	  /* end of the frame, before it grows */
	__u32 moved_from; /* what lies between here and tail_end has moved */
};

/* The way of one SYN through the policy. */
struct search {
	struct netoken_facts facts;
	struct netoken_facts key;
	__u64 cgroup_ids[CGROUP_LEVELS_MAX]; /* at the levels of the generation */
	struct netoken_set_key set_key;
	struct netoken_rule found;
	__u32 shapes_looked_up;
	__u32 pad;
	__u64 generation;
};

struct scratch {
	struct syn syn;
	struct search search;
	struct headers old;
	struct headers new;
	struct option_list options;
	struct stamp stamp;
	__u8 chunk[CHUNK_LEN_BYTES];
};

/* One store writes from one part into the next. */
_Static_assert(__builtin_offsetof(struct headers, rest) == 4 + IPV6_HEADER_LEN + TCP_REST_OFF,
	       "hole in headers");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct scratch);
	__uint(max_entries, 1);
} scratches SEC(".maps");

static __always_inline struct scratch *this_scratch(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&scratches, &zero);
}

#endif
