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
	/* Bits of netoken_policy_key in front of the address: port, padding and family. */
	POLICY_FRONT_BITS = 32,
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
	__u32 rule; /* 0 is the default, otherwise the rule's place in its file, from 1 */
	__u8 token[TOKEN_LEN]; /* the one for this SYN; zero when there is none */
	__u8 verdict;	       /* enum netoken_verdict */
	__u8 dropped;	       /* 1 if the packet was dropped, whatever the verdict */
	__u8 old_options_len_bytes;
	__u8 new_options_len_bytes; /* equal to the old one unless stamped */
	__u8 pad[4];
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
 * Longest prefix match: the port (0 is any) and the family exactly, then the destination's leading
 * bits. Without the family, ::/0 would hold all of IPv4, which is mapped into it.
 */
struct netoken_policy_key {
	__u32 prefixlen; /* POLICY_FRONT_BITS plus the bits of the address that count */
	__be16 port_be;
	__u8 pad;
	__u8 family; /* 4 or 6 */
	__u8 addr[ADDR_LEN];
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

struct netoken_rule {
	__u32 id;
	__u8 action;	/* enum netoken_action */
	__u8 when_full; /* enum netoken_when_full */
	__u8 addr_bits; /* of the prefix, 0 to 128; longer wins */
	__u8 has_ports; /* some rule of this policy names a port */
	struct netoken_token_spec spec;
};

_Static_assert(sizeof(struct netoken_config) == 20, "netoken_config has hidden padding");
_Static_assert(sizeof(struct netoken_flow) == 44, "netoken_flow has hidden padding");
_Static_assert(sizeof(struct netoken_event) == 80, "netoken_event has hidden padding");
_Static_assert(sizeof(struct netoken_policy_key) == 24, "netoken_policy_key has hidden padding");
_Static_assert(sizeof(struct netoken_token_spec) == 16, "netoken_token_spec has hidden padding");
_Static_assert(sizeof(struct netoken_rule) == 24, "netoken_rule has hidden padding");

#endif
