/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The options of a SYN: recognises the lists that real stacks send, and walks any other one.
 */
#ifndef NETOKEN_GUARD_OPTIONS_H
#define NETOKEN_GUARD_OPTIONS_H

#include "guard_maps.h"
#include "layouts.h"
#include "wire.h"

/* Copies as many bytes of options as the header claims, zeros behind them. False if they are not
 * all there. */
static __always_inline bool copy_options(struct guard_scratch *scratch, const void *tcp,
					 const void *end, __u32 options_len)
{
	const __u64 *long_word = tcp + TCP_HEADER_LEN;
	__u64 *to = (__u64 *)scratch->options;
	__u32 i;

	for (i = 0; i < TCP_OPTIONS_MAX / 8; i++) {
		to[i] = 0;
		if (i * 8 >= options_len)
			continue;
		if (i * 8 + 4 == options_len) {
			if ((const void *)(long_word + i) + 4 > end)
				return false;
			*(__u32 *)&to[i] = *(const __u32 *)(long_word + i);
			continue;
		}
		if ((const void *)(long_word + i + 1) > end)
			return false;
		to[i] = long_word[i];
	}
	return true;
}

/* IPv4 options have the form of TCP's, and stand at the same distance from their header. */
#define IPOPT_LSRR 131 /* RFC 791 section 3.1, loose and strict source route */
#define IPOPT_SSRR 137

/* Walks a list of options in the scratch, `len` bytes long, 0 to 40, and notes our tokens. With
 * `is_ip` it looks for source routes instead, which it counts as tokens. Returns 0 if the list lies
 * about a length. */
static __always_inline int walk_list(struct guard_scratch *scratch, __u32 len, const bool is_ip)
{
	__u64 off = 0;

	if (len > TCP_OPTIONS_MAX)
		return 0;
	scratch->tokens = 0;
	scratch->token_off = 0;
	scratch->to_blank = 0;
	for (int i = 0; i < TCP_OPTIONS_MAX; i++) {
		const __u8 *option = &scratch->options[off];

		if (off >= len || option[0] == TCPOPT_EOL)
			break;
		if (option[0] == TCPOPT_NOP) {
			off = below_64(off + 1);
			continue;
		}
		/* 0 and 1 would never end the walk, more than is left would leave the header. */
		if (off + 2 > len || option[1] < 2 || off + option[1] > len)
			return 0;
		if (is_ip) {
			if (option[0] == IPOPT_LSRR || option[0] == IPOPT_SSRR)
				scratch->tokens++;
		} else if (option[0] == config.option_kind && option[1] >= 4 &&
			   option[2] == config.exid >> 8 && option[3] == (config.exid & 0xff)) {
			/* Whatever becomes of the list: who reads it may get so far. */
			scratch->to_blank |= ((1ULL << option[1]) - 1) << off;
			if (option[1] != OPTION_LEN)
				return 0;
			if (scratch->tokens++ == 0)
				scratch->token_off = off;
		}
		off = below_64(off + option[1]);
	}
	return 1;
}

/* The same for IPv4 options. Not static, so that the verifier looks at the loop once. */
__noinline int walk_ip_options(__u32 len)
{
	struct guard_scratch *scratch = this_guard_scratch();

	return scratch && walk_list(scratch, len, true);
}

enum list {
	LIST_UNKNOWN, /* may be anything */
	LIST_PLAIN,   /* well-formed, and no token in it */
	LIST_TOKEN,   /* the same with one token behind it */
};

/*
 * Recognises a list by its layout. `token` becomes the bytes of its token as they stand in the
 * packet.
 */
static __always_inline enum list recognise_list(const void *options, const void *end, __u32 len,
						__u64 *token)
{
#pragma unroll
	for (__u32 i = 0; i < sizeof(layouts) / sizeof(layouts[0]); i++) {
		const struct layout *layout = &layouts[i];
		const __u8 *behind = options + layout->len;
		bool has_more = len == layout->len + OPTION_LEN && !is_closed(layout);

		if (len != layout->len && !has_more)
			continue;
		if ((const void *)behind > end || !is_laid_out(options, layout))
			continue;
		if (!has_more)
			return LIST_PLAIN;
		if ((const void *)behind + OPTION_LEN > end || behind[0] != config.option_kind ||
		    behind[1] != OPTION_LEN || behind[2] != config.exid >> 8 ||
		    behind[3] != (config.exid & 0xff))
			continue;
		*token = *(const __u64 *)(behind + OPTION_LEN - TOKEN_LEN);
		return LIST_TOKEN;
	}
	return LIST_UNKNOWN;
}

#endif
