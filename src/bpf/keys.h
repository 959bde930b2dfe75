/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What keyed tokens are made and checked with: keys, which of them signs, and the wall clock. User
 * space writes all of it; programs only count.
 *
 * Plain arrays, although an update of one is no single step: their lookup is a few instructions and
 * no call. User space writes a key while nobody signs with it, and then names it as the signer,
 * which changes one byte.
 */
#ifndef NETOKEN_KEYS_H
#define NETOKEN_KEYS_H

#include "types.h"

enum netoken_key_size {
	KEYS_MAX = 16, /* a token names its key in four bits */
	RINGS_MAX = 16,
	RING_NAME_LEN = 24,
	SECRET_LEN = 16,
	MAC_LEN = 5,
	TOKEN_VERSION = 1,
	SLOTS = 16, /* a token names its slot in four bits */
};

enum netoken_key_state {
	KEY_ABSENT = 0,
	KEY_LIVE = 1, /* verifies, and signs if its ring says so */
	KEY_RETIRED = 2,
};

struct netoken_key {
	__u64 secret[2]; /* its bytes as two little-endian numbers, as SipHash reads them */
	__u8 state;	 /* enum netoken_key_state */
	__u8 ring;
	__u8 pad[6];
};

/* A name that rules use, and the one key of it that signs. */
struct netoken_ring {
	__u32 signer; /* id of the key, plus 1; 0 if none signs */
	__u8 name[RING_NAME_LEN];
	__u8 pad[4];
};

/* What makes a wall clock out of the clocks that BPF can read, and how it is cut into slots. */
struct netoken_clock {
	__s64 tai_offset_ns;  /* to be added to CLOCK_TAI */
	__s64 boot_offset_ns; /* to be added to CLOCK_BOOTTIME, where there is no TAI */
	__u64 slot_ns;
	__u32 slots_behind; /* how many slots old a token may be */
	__u32 slots_ahead;  /* how many slots ahead of this clock */
};

/*
 * What has been done with a key on one CPU. The last use is in nanoseconds of Unix time; 0 is
 * never.
 */
struct netoken_key_count {
	__u64 made;
	__u64 accepted;
	__u64 made_at_ns;
	__u64 accepted_at_ns;
	/* Not a count, but what is at hand where a token is made: see unix_time_ns(). */
	__u64 read_at_jiffies;
	__u64 clock_ns;
};

/* Which keyed tokens somebody accepts. */
struct netoken_accept {
	__u16 rings; /* bit by ring */
	__u8 binds;  /* bit by enum netoken_bind */
	__u8 any_tag;
	__be16 tag_be; /* the one that is accepted, unless any is */
	__u8 pad[2];
};

/* What came out of checking a token. */
enum netoken_check {
	CHECK_NONE = 0,
	CHECK_VALID = 1,
	CHECK_UNKNOWN_KEY = 2,
	CHECK_RETIRED_KEY = 3,
	CHECK_WRONG_RING = 4,
	CHECK_WRONG_TAG = 5,
	CHECK_WRONG_TIME = 6, /* outside of the slots that are accepted */
	CHECK_WRONG_MAC = 7,
};

_Static_assert(sizeof(struct netoken_key) == 24, "netoken_key has hidden padding");
_Static_assert(sizeof(struct netoken_ring) == 32, "netoken_ring has hidden padding");
_Static_assert(sizeof(struct netoken_clock) == 32, "netoken_clock has hidden padding");
_Static_assert(sizeof(struct netoken_key_count) == 48, "netoken_key_count has hidden padding");
_Static_assert(sizeof(struct netoken_accept) == 8, "netoken_accept has hidden padding");

/* bpf_ktime_get_tai_ns() exists: from 6.1. */
const volatile __u8 has_tai = 0;

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_key);
	__uint(max_entries, KEYS_MAX);
	__uint(map_flags, BPF_F_RDONLY_PROG);
} keys SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_ring);
	__uint(max_entries, RINGS_MAX);
	__uint(map_flags, BPF_F_RDONLY_PROG);
} rings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_clock);
	__uint(max_entries, 1);
	__uint(map_flags, BPF_F_RDONLY_PROG);
} clock SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__type(key, __u32);
	__type(value, struct netoken_key_count);
	__uint(max_entries, KEYS_MAX);
} key_counts SEC(".maps");

#endif
