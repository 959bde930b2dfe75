/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What crosses the border between the guard and user space, beside what types.h and keys.h have.
 * The same rules hold: Rust reads it out of BTF, _be is network byte order, padding is spelt out.
 */
#ifndef NETOKEN_GUARD_TYPES_H
#define NETOKEN_GUARD_TYPES_H

#include "keys.h"
#include "types.h"

enum netoken_guard_size {
	GUARD_RULES_MAX = 32,
	GUARD_MATCHES_MAX = 128, /* prefixes times port ranges, of all rules together */
	GUARD_TAGS_MAX = 8,	 /* of one rule */
	GUARD_STATICS_MAX = 8,
	/* Two generations of the lists of sources, of which a table names one. */
	GUARD_GENERATIONS = 2,
	SOURCE_LISTS = 2,
	SOURCE_FAMILIES = 2, /* IPv4, IPv6 */
	SOURCE_TOPS = GUARD_GENERATIONS * SOURCE_LISTS * SOURCE_FAMILIES,
	SOURCE_LEVELS = 3,
	SOURCE_PAGE_BITS = 8,
	SOURCE_PAGE_BOUNDARIES = 1 << 8,
	SOURCE_PAGE_SLOTS = 1 << 7,
	/* Bits of netoken_source_key in front of the address. */
	SOURCE_FAMILY_BITS = 8,
	/* Tokens that have been accepted: how many stand in one bucket, and buckets. */
	SEEN_WAYS = 8,
	SEEN_BUCKETS = 65536,
	/* Rows of counters: the first for what no rule is about, and one for each rule of two
	 * tables, so that a rule that comes does not count where one that goes still does. */
	GUARD_ROWS = 1 + 2 * 32,
	/* Accepted SYNs that are kept for the application, of which the oldest give way. */
	GUARD_PEERS_MAX = 65536,
	/* Source prefixes whose refused packets are counted, and those that are blocked for them.
	 */
	GUARD_REFUSED_MAX = 65536,
	GUARD_AUTO_BLOCKED_MAX = 16384,
	GUARD_SEVERITIES = 4,

	/* Of what rules are compiled to, the maps `guard_rules`, `guard_lists` and `guard_sources`;
	 * as POLICY_LAYOUT. */
	GUARD_LAYOUT = 3,
};

/*
 * The one outcome of one packet that could open a connection. It indexes the counters and is the
 * event's `verdict`. Numbers are never given away twice: retire one, do not reuse it.
 */
enum netoken_guard_verdict {
	GUARD_NONE = 0, /* opens nothing, never counted */
	GUARD_UNPROTECTED = 1,
	GUARD_VALID = 2,
	GUARD_EXEMPT = 3,
	/* From here to GUARD_SEEN_FULL refused: in mode `drop` it is dropped. */
	GUARD_BLOCKED = 4,
	GUARD_MISSING = 5,
	GUARD_MALFORMED = 6,
	GUARD_FRAGMENT = 7,
	GUARD_BAD_FLAGS = 8,
	GUARD_TOO_DEEP = 9,
	GUARD_SOURCE_ROUTED = 10,
	GUARD_DUPLICATE = 11,
	GUARD_WRONG_STATIC = 12,
	GUARD_TAG_NOT_ALLOWED = 13,
	GUARD_UNKNOWN_KEY = 14,
	GUARD_RETIRED_KEY = 15,
	GUARD_KEY_NOT_ALLOWED = 16,
	GUARD_STALE_SLOT = 17,
	GUARD_FUTURE_SLOT = 18,
	GUARD_BAD_MAC = 19,
	GUARD_REPLAYED = 20,
	GUARD_SEEN_FULL = 21,
	/* In mode `scrub` nothing is refused. */
	GUARD_SCRUBBED = 22,
	GUARD_CLEAN = 23,
	/* Dropped in every mode. */
	GUARD_NOT_SCRUBBED = 24,
	/* Refused. */
	GUARD_AUTO_BLOCKED = 25,
	GUARD_COUNT, /* how many there are, not a verdict */
};

enum netoken_guard_mode {
	MODE_OBSERVE = 0,
	MODE_MARK = 1,
	MODE_DROP = 2,
	MODE_SCRUB = 3, /* no check, only no tokens behind it */
};

/* The lists of sources. */
enum netoken_source_list {
	SOURCES_EXEMPT = 0,
	SOURCES_BLOCKED = 1,
};

/* How many refused packets an alert tells of. */
enum netoken_guard_severity {
	SEVERITY_NONE = 0,
	SEVERITY_LOW = 1,
	SEVERITY_MEDIUM = 2,
	SEVERITY_HIGH = 3,
	SEVERITY_CRITICAL = 4,
};

/* One prefix and one range of ports, and the rule that protects them. The first match decides. */
struct netoken_guard_match {
	__u64 addr[2]; /* as the bytes stand in the packet; IPv4 is mapped into IPv6 */
	__u64 mask[2];
	__u16 port_first;
	__u16 port_last;
	__u8 rule;   /* index into `rules` */
	__u8 mode;   /* of that rule, enum netoken_guard_mode */
	__u8 family; /* 4 or 6: ::/0 is no IPv4 prefix */
	__u8 pad;
};

struct netoken_guard_rule {
	__u32 id; /* its place in the file, from 1 */
	__u8 mode;
	__u8 tags_count; /* 0: any tag */
	__u8 statics_count;
	__u8 may_repeat;	      /* a keyed token is good for more than one flow */
	struct netoken_accept accept; /* of keyed tokens; its tag is not used */
	/* In mode `mark`, what the bits of `mark_mask` in the skb's mark become. */
	__u32 mark_valid;
	__u32 mark_refused;
	__u32 mark_mask;
	__u8 row;   /* of its counters */
	__u8 scrub; /* tokens do not reach the host */
	__u8 pad2[2];
	__be16 tags_be[GUARD_TAGS_MAX];
	__u64 statics[GUARD_STATICS_MAX]; /* as the bytes stand in the packet */
};

/* When a source is blocked that is refused too often. */
struct netoken_guard_auto_block {
	__u64 within_ns; /* 0: never */
	__u64 block_ns;
	__u64 refused_max; /* one more within that time, and it is blocked */
	/* What of its address is a source: masks as the bytes stand in the packet, and the
	 * `prefixlen` of netoken_source_key. */
	__u64 mask4[2];
	__u64 mask6[2];
	__u32 prefixlen4;
	__u32 prefixlen6;
};

/* When an alert is raised. */
struct netoken_guard_alerts {
	__u64 within_ns;		 /* 0: never */
	__u64 refused[GUARD_SEVERITIES]; /* so many, or more; rising; the highest number is never */
};

/* One generation of rules. User space fills a new one and swaps it in whole. */
struct netoken_guard_table {
	__u32 matches_count;
	__u8 generation; /* of the lists of sources */
	__u8 has_exempt;
	__u8 has_blocked;
	__u8 pad;
	__u64 number; /* counts the tables that were put into use; 0: nothing is remembered of it */
	struct netoken_guard_auto_block auto_block;
	struct netoken_guard_alerts alerts;
	struct netoken_guard_match matches[GUARD_MATCHES_MAX];
	struct netoken_guard_rule rules[GUARD_RULES_MAX];
};

/* A source that is counted or blocked for what it sends: the leading bits of its address. */
struct netoken_source_key {
	__u32 prefixlen; /* SOURCE_FAMILY_BITS plus the bits of the address that count */
	__u8 family;	 /* 4 or 6 */
	__u8 addr[ADDR_LEN];
	__u8 pad[3];
};

/* An `expires_ns` that never comes. */
#define SOURCE_FOR_EVER (~0ULL)

struct netoken_source_boundary {
	/* The address as a number, both halves; an IPv4 address is in the first. */
	__u64 high;
	__u64 low;
	/* Unix time up to which the range is on the list; 0: it is not. */
	__u64 expires_ns;
};

/*
 * Boundaries of ranges of addresses, rising. What a boundary says holds up to the next one; the
 * first one of a list is the lowest address of all. A page that leads on has the first boundary of
 * each of the pages that it leads to.
 *
 * A search reads one page of each level. The addresses from the second boundary of a page to its
 * last one are cut into slots of one length; the first one of a list is far from the others. So few
 * boundaries are left to look at, next to one another: what is read of the lowest level is in no
 * cache.
 */
struct netoken_source_page {
	__u32 first_page;
	__u8 leads_on;
	__u8 by_low; /* all have the same upper half, and the lower one makes the slot */
	__u8 shift;  /* how many bits of that half do not choose the slot */
	__u8 pad;
	/* Where the first slot begins. What is in front of that belongs to it, too. */
	__u64 high;
	__u64 low;
	/* The last boundary in front of each slot, or the first one; behind them the last. */
	__u8 slots[SOURCE_PAGE_SLOTS + 8];
	struct netoken_source_boundary boundaries[SOURCE_PAGE_BOUNDARIES];
};

/* Of one CPU. */
struct netoken_guard_counters {
	struct netoken_counter verdicts[GUARD_COUNT];
	__u64 rows[GUARD_ROWS * GUARD_COUNT]; /* packets, by row and verdict */
};

/* A source that was blocked for being refused too often. */
struct netoken_auto_blocked {
	__u64 until_ns; /* CLOCK_MONOTONIC */
	__u64 refused;	/* packets, since it is blocked */
};

/* Beside netoken_guard_event in the same buffer, and shorter: by that they are told apart. */
struct netoken_guard_alert {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 netns_ino;
	__u32 ifindex; /* where the last of them came in */
	__u64 refused; /* packets of the instance, so far in this window */
	__u64 within_ns;
	__u8 severity; /* enum netoken_guard_severity */
	__u8 pad[7];
};

/*
 * Who opened a connection, for the application, which does not see a token that was scrubbed: the
 * flow as it was on the wire, in front of any translation of addresses.
 */
struct netoken_peer_key {
	__u8 saddr[ADDR_LEN]; /* as in netoken_flow */
	__u8 daddr[ADDR_LEN];
	__be16 sport_be;
	__be16 dport_be;
	__u8 family; /* 4 or 6 */
	__u8 pad[3];
};

struct netoken_peer {
	__u64 time_ns; /* CLOCK_MONOTONIC, of the last SYN */
	__u8 token[TOKEN_LEN];
	__u32 verdict; /* enum netoken_guard_verdict, so far always GUARD_VALID */
	__u32 rule;    /* its place in the file, from 1 */
};

struct netoken_guard_event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 netns_ino;
	__u32 ifindex;
	/* Of a packet that does not show its ports these are 0, and so is the ISN. Family 0: it
	 * does not show its addresses either. */
	struct netoken_flow flow;
	__u32 rule;	       /* its place in its file, from 1; 0 is none */
	__u8 token[TOKEN_LEN]; /* the first one in the packet; zero when there is none */
	__u8 verdict;	       /* enum netoken_guard_verdict */
	__u8 dropped;
	__u8 mode;     /* enum netoken_guard_mode, if there is a rule */
	__u8 scrubbed; /* its tokens did not reach the host */
	__u8 pad[4];
};

_Static_assert(sizeof(struct netoken_guard_match) == 40, "netoken_guard_match has hidden padding");
_Static_assert(sizeof(struct netoken_guard_rule) == 112, "netoken_guard_rule has hidden padding");
_Static_assert(sizeof(struct netoken_guard_table) ==
		       120 + GUARD_MATCHES_MAX * 40 + GUARD_RULES_MAX * 112,
	       "netoken_guard_table has hidden padding");
_Static_assert(sizeof(struct netoken_source_key) == 24, "netoken_source_key has hidden padding");
_Static_assert(sizeof(struct netoken_source_page) ==
		       24 + SOURCE_PAGE_SLOTS + 8 + SOURCE_PAGE_BOUNDARIES * 24,
	       "netoken_source_page has hidden padding");
/* What a per-CPU map holds for one key: PCPU_MIN_UNIT_SIZE of include/linux/percpu.h. */
_Static_assert(sizeof(struct netoken_guard_counters) <= 32768, "netoken_guard_counters is too big");
_Static_assert(sizeof(struct netoken_guard_auto_block) == 64,
	       "netoken_guard_auto_block has hidden padding");
_Static_assert(sizeof(struct netoken_guard_alert) == 40, "netoken_guard_alert has hidden padding");
_Static_assert(sizeof(struct netoken_peer_key) == 40, "netoken_peer_key has hidden padding");
_Static_assert(sizeof(struct netoken_peer) == 24, "netoken_peer has hidden padding");
_Static_assert(sizeof(struct netoken_guard_event) == 80, "netoken_guard_event has hidden padding");

#endif
