/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * What crosses the border between the kernel and user space: maps' keys and values, events and the
 * settings of one loaded program. Rust reads all of it out of BTF; nothing here is written down
 * twice.
 *
 * A name that ends in _be is in network byte order, everything else is in host order. Padding is
 * spelt out, because the verifier refuses to copy, and a hash would mix in, bytes that were never
 * written.
 */
#ifndef NETOKEN_TYPES_H
#define NETOKEN_TYPES_H

enum netoken_size {
	TOKEN_LEN = 8,
	/* RFC 9293 section 3.1: a data offset of 15 words leaves 40 bytes for options. */
	TCP_OPTIONS_MAX = 40,
	/* kind, length, ExID (RFC 6994 section 3) and the token */
	OPTION_LEN = 4 + TOKEN_LEN,
	ADDR_LEN = 16,

	/* Limits of a policy; what is beyond them is refused before anything changes. */
	SHAPES_MAX = 64,       /* each costs a packet one look into a hash table */
	CHAIN_MAX = 64,	       /* records that a packet may walk through behind one entry */
	CGROUP_LEVELS_MAX = 8, /* each costs a packet one call of a helper */
	RECORD_CHECKS_MAX = 3, /* a rule with more goes on in another record */
	/* Bits of netoken_set_key in front of the value. */
	SET_ID_BITS = 32,

	/* Hit counters: so many in one map, and beyond them in chunks of this size. */
	HITS_FIRST = 4096,
	HITS_CHUNK = 65536,
	HITS_CHUNKS_MAX = 64,

	/* Of what a policy is compiled to, the maps `policies` and `policy_*`. A change of their
	 * types, or of what is in them, is a new layout: programs that are attached keep theirs. */
	POLICY_LAYOUT = 1,
};

/*
 * The one outcome of one SYN. It indexes `counters`, is the event's `verdict`, the metric's label
 * and what a test expects. Numbers are never given away twice: retire one, do not reuse it.
 */
enum netoken_verdict {
	VERDICT_NONE = 0, /* not a SYN, never counted */
	VERDICT_STAMPED = 1,
	VERDICT_SKIPPED = 2,
	VERDICT_DROPPED = 3,
	VERDICT_NO_POLICY = 4,
	VERDICT_NO_ROOM = 5,
	VERDICT_AUTH_OPTION = 6,
	VERDICT_ALREADY_STAMPED = 7,
	VERDICT_FRAGMENT = 8,
	VERDICT_MALFORMED = 9,
	VERDICT_TOO_BIG = 10,
	VERDICT_HELPER_FAILED = 11,
	VERDICT_NO_KEY = 12,
	VERDICT_COUNT, /* the size of `counters`, not a verdict */
};

enum netoken_action {
	ACTION_STAMP = 1,
	ACTION_SKIP = 2,
	ACTION_DROP = 3,
};

/* What a rule wants for a SYN that cannot be stamped. */
enum netoken_when_full {
	WHEN_FULL_PASS = 0,
	WHEN_FULL_DROP = 1,
};

/* What a token is made of. */
enum netoken_form {
	FORM_STATIC = 0, /* the bytes of the rule */
	FORM_KEYED = 1,	 /* a MAC, see token.h */
};

/* What of a connection a keyed token belongs to. Part of the message that the MAC is computed of.
 */
enum netoken_bind {
	BIND_FLOW = 1,	 /* addresses, ports and ISN */
	BIND_SERVER = 2, /* destination address, destination port and ISN */
	BIND_ISN = 3,
};

/*
 * Steps at which a test can make the classifier believe that a helper failed. The settings are
 * frozen before the program is loaded, so the verifier removes every check of a step that is not
 * asked for.
 */
enum netoken_fault {
	FAULT_GROW = 1 << 0,
	FAULT_MOVE = 1 << 1, /* the second chunk of the payload, after the first has moved */
	FAULT_STORE_TCP = 1 << 2,
	FAULT_STORE_IP = 1 << 3,
	FAULT_CSUM_LENGTH = 1 << 4,
	FAULT_CSUM_BYTES = 1 << 5,
	FAULT_RESTORE = 1 << 6,
	FAULT_PULL = 1 << 7,
};

struct netoken_config {
	/* Of every `sample` SYNs with the same verdict on one CPU, one is sent as an event; never
	 * 0. */
	__u32 sample;
	/* Inode number of the network namespace: an ifindex means nothing without it. */
	__u32 netns_ino;
	/* enum netoken_fault, 0 outside tests */
	__u32 faults;
	__u16 exid;
	__u8 option_kind;
	__u8 has_check_mtu; /* bpf_check_mtu() exists: from 5.12 */
	/* Where it does not: the MTU that the interface had when it was attached to. */
	__u32 mtu_bytes;
	__u8 has_cgroup_id; /* bpf_skb_ancestor_cgroup_id() exists: CONFIG_SOCK_CGROUP_DATA */
	__u8 is_question;   /* packets are of struct netoken_question */
	__u8 pad[2];
};

/* IPv4 addresses are stored as IPv4-mapped IPv6 addresses (RFC 4291 section 2.5.5.2). */
struct netoken_flow {
	__u8 saddr[ADDR_LEN];
	__u8 daddr[ADDR_LEN];
	__be16 sport_be;
	__be16 dport_be;
	__u32 isn;
	__u8 family; /* 4 or 6 */
	__u8 pad[3];
};

struct netoken_event {
	__u64 time_ns; /* CLOCK_MONOTONIC */
	__u32 netns_ino;
	__u32 ifindex;
	struct netoken_flow flow;
	__u32 rule; /* 0 is the default, otherwise the rule's place in the policy, from 1 */
	__u8 token[TOKEN_LEN]; /* the one for this SYN; zero when there is none */
	__u8 verdict;	       /* enum netoken_verdict */
	__u8 dropped;	       /* 1 if the packet was dropped, whatever the verdict */
	__u8 old_options_len_bytes;
	__u8 new_options_len_bytes; /* equal to the old one unless stamped */
	/* Low bits of the number of the policy that decided, 0 if none did: rule numbers mean
	 * something only with it. */
	__u32 generation;
};

/* What user space tells a program that is already attached. */
struct netoken_live {
	__u32 has_reader; /* somebody reads the events */
};

struct netoken_counter {
	__u64 packets;
	__u64 dropped;
	__u64 events; /* handed to the buffer, which may have been full */
};

/*
 * What a policy can ask of a SYN. It is also the key of an entry: there, what the entry's shape
 * leaves out is zero.
 */
struct netoken_facts {
	__u8 daddr[ADDR_LEN]; /* as in netoken_flow */
	__u8 saddr[ADDR_LEN];
	__be16 dport_be;
	__be16 sport_be;
	__u32 mark;
	__u32 ifindex;
	__u32 netns_ino;
	__u64 cgroup_id; /* of the ancestor at the shape's level, 0 without a sender */
	__u32 uid;	 /* of the sender, 0 without one */
	__u8 family;	 /* 4 or 6 */
	__u8 has_sender; /* 1 if the socket that sent it is known */
	__u8 shape;	 /* number of the shape, in a key only */
	__u8 pad;
};

/* How a rule's token is made. */
struct netoken_token_spec {
	__u8 form; /* enum netoken_form; of the rest a static one has only `bytes` */
	__u8 bind; /* enum netoken_bind */
	__u8 ring; /* index into `rings` */
	__u8 pad;
	__be16 tag_be;
	__u8 pad2[2];
	__u8 bytes[TOKEN_LEN];
};

/* Which facts the entries of a shape are about: a packet is looked up once for each shape. */
struct netoken_shape {
	struct netoken_facts mask;
	__u32 first_rule; /* no entry of this shape leads to a rule before this one */
	__u8 level;	  /* of the cgroup, as an index of netoken_generation.levels */
	__u8 pad[3];
};

/* What a rule, or the default, does to a SYN. */
struct netoken_rule {
	__u32 id;	/* the rule's place in the policy, from 1; 0 is the default */
	__u32 hits;	/* number of its hit counter */
	__u8 action;	/* enum netoken_action; 0 if there is no default */
	__u8 when_full; /* enum netoken_when_full */
	__u8 pad[6];
	struct netoken_token_spec token;
};

/* A condition that its shape could not express. */
enum netoken_condition_kind {
	CONDITION_RANGE = 1, /* `a` <= field <= `b` */
	CONDITION_BITS = 2,  /* field & `b` == `a` */
	CONDITION_SET = 3,   /* the field is in set `a` */
};

enum netoken_field {
	FIELD_INTERFACE = 1,
	FIELD_SRC = 2,
	FIELD_DST = 3,
	FIELD_SPORT = 4,
	FIELD_DPORT = 5,
	FIELD_MARK = 6,
	FIELD_CGROUP = 7,
	FIELD_UID = 8,
};

struct netoken_condition {
	__u8 kind;    /* enum netoken_condition_kind */
	__u8 field;   /* enum netoken_field */
	__u8 negated; /* holds where it otherwise would not */
	__u8 level;   /* of a cgroup, as an index of netoken_generation.levels */
	__u32 a;
	__u32 b;
};

/* A rule with checks, as an entry leads to it. Numbers of records count from 1; 0 is none. */
struct netoken_record {
	struct netoken_rule rule;
	__u32 next; /* what to try if a check fails */
	__u32 more; /* further checks of the same rule */
	__u32 checks_count;
	struct netoken_condition checks[RECORD_CHECKS_MAX];
};

/* The rule is here and not behind another look-up: one cache miss less for every packet. */
struct netoken_entry {
	struct netoken_rule rule; /* the first one that this entry leads to */
	__u32 record;		  /* if it has checks: the number of its record, else 0 */
	__u32 pad;
};

/* A value in a set: longest prefix match with the set's number in front. */
struct netoken_set_key {
	__u32 bits; /* SET_ID_BITS plus the bits of the value that count */
	__u32 set;
	__u8 value[ADDR_LEN]; /* in network order, from the left */
};

/* What a generation of the policy asks for, beside what every packet has. */
enum netoken_need {
	NEED_SENDER = 1 << 0,
	NEED_UID = 1 << 1,
};

/* One generation of the policy: everything that is not in the maps of its slot. */
struct netoken_generation {
	__u64 number; /* counts up */
	__u32 slot;   /* where its entries, records and sets are: 0 or 1 */
	__u32 shape_count;
	__u32 level_count;
	__u32 needs; /* enum netoken_need */
	__u8 levels[CGROUP_LEVELS_MAX];
	struct netoken_rule default_rule;
	struct netoken_shape shapes[SHAPES_MAX];
};

struct netoken_hits {
	__u64 packets;
	__u64 last_jiffies; /* of the last one */
};

/* What `policy test` asks, as the bytes of a packet, and the answer in its place. */
struct netoken_question {
	struct netoken_facts facts;
	__u64 cgroup_ids[32]; /* of the ancestor at each level, 0 where there is none */
	/* The answer. */
	struct netoken_rule rule;
	__u64 generation;
	__u64 now_ns; /* CLOCK_MONOTONIC, and the same moment in jiffies */
	__u64 now_jiffies;
	__u32 found; /* 1 if a rule or the default decides */
	__u32 shapes_looked_up;
};

_Static_assert(sizeof(struct netoken_config) == 24, "netoken_config has hidden padding");
_Static_assert(sizeof(struct netoken_flow) == 44, "netoken_flow has hidden padding");
_Static_assert(sizeof(struct netoken_event) == 80, "netoken_event has hidden padding");
_Static_assert(sizeof(struct netoken_facts) == 64, "netoken_facts has hidden padding");
_Static_assert(sizeof(struct netoken_shape) == 72, "netoken_shape has hidden padding");
_Static_assert(sizeof(struct netoken_token_spec) == 16, "netoken_token_spec has hidden padding");
_Static_assert(sizeof(struct netoken_rule) == 32, "netoken_rule has hidden padding");
_Static_assert(sizeof(struct netoken_entry) == 40, "netoken_entry has hidden padding");
_Static_assert(sizeof(struct netoken_condition) == 12, "netoken_check has hidden padding");
_Static_assert(sizeof(struct netoken_record) == 80, "netoken_record has hidden padding");
_Static_assert(sizeof(struct netoken_set_key) == 24, "netoken_set_key has hidden padding");
_Static_assert(sizeof(struct netoken_generation) == 64 + SHAPES_MAX * 72,
	       "netoken_generation has hidden padding");
_Static_assert(sizeof(struct netoken_question) == 384, "netoken_question has hidden padding");

#endif
