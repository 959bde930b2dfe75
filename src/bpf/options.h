/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The option list of a SYN: what it holds, and the list that holds the token as well. Works on
 * copies in a map value, because that is the only memory that every supported verifier lets a
 * program index with a number from the wire.
 */
#ifndef NETOKEN_OPTIONS_H
#define NETOKEN_OPTIONS_H

#include "layouts.h"
#include "scratch.h"
#include "types.h"
#include "wire.h"

_Static_assert(LAYOUT_WORDS * 8 + OPTION_LEN <= TCP_OPTIONS_MAX,
	       "a token does not fit behind every layout");

struct token_option {
	__u8 kind;
	__u8 len;
	__u8 exid[2];
	__u8 token[TOKEN_LEN];
	__u8 eol[4]; /* up to three bytes of padding, RFC 9293 section 3.1; one more for the copy */
};

/*
 * Whether a list of `len` bytes is one that real stacks send and that ends with an option: it holds
 * neither a token nor a signature, and leaves room behind it.
 */
static __always_inline bool is_plain_list(const struct tcp_rest *tcp, __u32 len)
{
#pragma unroll
	for (__u32 i = 0; i < sizeof(layouts) / sizeof(layouts[0]); i++) {
		if (!is_closed(&layouts[i]) && len == layouts[i].len &&
		    is_laid_out(tcp->options, &layouts[i]))
			return true;
	}
	return false;
}

/*
 * Reads the list in the scratch, which is `len` bytes long, 0 to 40. Returns 0 if it lies about a
 * length. Not static, so that the verifier looks at the loop once, and at what follows once and not
 * for every way out.
 */
__noinline int walk_options(__u32 len)
{
	struct scratch *scratch = this_scratch();
	const struct tcp_rest *tcp;
	struct option_list *list;
	__u64 off = 0;
	__u32 nops = 0;

	if (!scratch || len > TCP_OPTIONS_MAX)
		return 0;
	tcp = &scratch->old.rest;
	list = &scratch->options;
	list->end = 0;
	list->nops = 0;
	list->has_auth = 0;
	list->has_token = 0;

	for (int i = 0; i < TCP_OPTIONS_MAX; i++) {
		const __u8 *option = &tcp->options[off];

		if (off >= len)
			break;
		if (option[0] == TCPOPT_EOL)
			break;
		if (option[0] == TCPOPT_NOP) {
			off = below_64(off + 1);
			nops++;
			continue;
		}
		/* 0 and 1 would never end the walk, more than is left would leave the header. */
		if (off + 2 > len || option[1] < 2 || off + option[1] > len)
			return 0;
		if (option[0] == TCPOPT_MD5SIG || option[0] == TCPOPT_AO)
			list->has_auth = 1;
		if (option[0] == config.option_kind && option[1] >= 4 &&
		    option[2] == config.exid >> 8 && option[3] == (config.exid & 0xff))
			list->has_token = 1;
		off = below_64(off + option[1]);
		list->end = off;
		list->nops = nops;
	}
	return 1;
}

/*
 * Copies the list without its NOPs; `end` becomes the new end. Rare, so the cursors may live in
 * memory, where the verifier does not follow them.
 */
static __noinline void squeeze_options(struct tcp_rest *to, const struct tcp_rest *from,
				       struct option_list *list)
{
	if (!to || !from || !list)
		return;
	__builtin_memset(to->options, 0, TCP_OPTIONS_MAX);
	list->squeezed = 0;
	list->left = 0;
	for (__u32 off = 0; off < TCP_OPTIONS_MAX; off++) {
		if (off >= list->end)
			break;
		/* `left` counts the bytes of the option that we are in; a NOP stands outside of
		 * any. */
		if (list->left == 0) {
			if (from->options[off] == TCPOPT_NOP)
				continue;
			list->left = from->options[off + 1];
		}
		list->left--;
		to->options[below_64(list->squeezed)] = from->options[off];
		list->squeezed++;
	}
	list->end = list->squeezed;
}

static __always_inline __u32 round_to_words(__u32 len_bytes)
{
	return (len_bytes + 3) & ~3U;
}

/*
 * Writes to `new` the list of `old` with the token behind the last option. Trailing NOPs and
 * padding are always reused, NOPs between options only where the token does not fit otherwise.
 * Returns the length of the new list, which is never shorter than the old one, or 0 if there is no
 * room.
 */
static __always_inline __u32 append_token(struct headers *new_headers,
					  const struct headers *old_headers,
					  struct option_list *list, __u32 old_len,
					  const __u8 *token)
{
	struct token_option option = {
		.kind = config.option_kind,
		.len = OPTION_LEN,
		.exid = { config.exid >> 8, config.exid & 0xff },
	};
	const struct tcp_rest *old = &old_headers->rest;
	struct tcp_rest *new = &new_headers->rest;
	__u32 len;

	__builtin_memcpy(option.token, token, TOKEN_LEN);
	__builtin_memcpy(new_headers, old_headers, offsetof(struct headers, rest) + TCP_REST_LEN);
	if (list->end + OPTION_LEN > TCP_OPTIONS_MAX) {
		if (list->end - list->nops + OPTION_LEN > TCP_OPTIONS_MAX)
			return 0;
		squeeze_options(new, old, list);
	}
	len = round_to_words(list->end + OPTION_LEN);
	if (len < old_len)
		len = old_len;

	/* Behind the token stands end-of-list, so what the old padding held stays unread. */
	__builtin_memcpy(&new->options[below_64(list->end)], &option, sizeof(option));
	new->data_offset = (old->data_offset & 0x0f) | ((TCP_HEADER_LEN + len) / 4) << 4;
	return len;
}

#endif
