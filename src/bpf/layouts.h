/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * The option lists of SYNs as real stacks write them. Stamp and guard recognise such a list as a
 * whole, which costs less than to walk it.
 */
#ifndef NETOKEN_LAYOUTS_H
#define NETOKEN_LAYOUTS_H

#include "types.h"
#include "wire.h"

/* Options as they are written in the list below. Their values are any bytes. */
#define ANY (-1)
#define MSS 2, 4, ANY, ANY
#define WINDOW_SCALE 3, 3, ANY
#define SACK_PERMITTED 4, 2
#define TIMESTAMPS 8, 10, ANY, ANY, ANY, ANY, ANY, ANY, ANY, ANY
#define NOP TCPOPT_NOP
#define EOL TCPOPT_EOL

#define LAYOUT_WORDS 3

struct layout {
	__u32 len;
	__s16 bytes[LAYOUT_WORDS * 8];
};

#define LAYOUT(...)                                                                                \
	{                                                                                          \
		.len = sizeof((__s16[]){ __VA_ARGS__ }) / sizeof(__s16), .bytes = { __VA_ARGS__ }, \
	}

/* Well-formed lists without a token, the commonest first; each ends with a whole word of four
 * bytes. The compiler makes comparisons of them, nothing is left of the table. */
static const struct layout layouts[] = {
	/* Linux, with and without timestamps */
	LAYOUT(MSS, SACK_PERMITTED, TIMESTAMPS, NOP, WINDOW_SCALE),
	LAYOUT(MSS, NOP, NOP, SACK_PERMITTED, NOP, WINDOW_SCALE),
	/* Windows */
	LAYOUT(MSS, NOP, WINDOW_SCALE, NOP, NOP, SACK_PERMITTED),
	/* macOS and iOS */
	LAYOUT(MSS, NOP, WINDOW_SCALE, NOP, NOP, TIMESTAMPS, SACK_PERMITTED, EOL, EOL),
	/* FreeBSD, and Windows with timestamps */
	LAYOUT(MSS, NOP, WINDOW_SCALE, SACK_PERMITTED, TIMESTAMPS),
	/* OpenBSD */
	LAYOUT(MSS, NOP, NOP, SACK_PERMITTED, NOP, WINDOW_SCALE, NOP, NOP, TIMESTAMPS),
	/* What floods consist of */
	LAYOUT(MSS),
	{},
};

/* Behind end-of-list nothing counts. */
static __always_inline bool is_closed(const struct layout *layout)
{
	return layout->len && layout->bytes[layout->len - 1] == EOL;
}

/* Whether the options begin with those of the layout. */
static __always_inline bool is_laid_out(const void *options, const struct layout *layout)
{
	const __u64 *words = options;

#pragma unroll
	for (__u32 i = 0; i < LAYOUT_WORDS; i++) {
		__u64 bytes = 0, mask = 0;

#pragma unroll
		for (__u32 j = 0; j < 8; j++) {
			if (i * 8 + j >= layout->len || layout->bytes[i * 8 + j] == ANY)
				continue;
			mask |= 0xffULL << j * 8;
			bytes |= (__u64)layout->bytes[i * 8 + j] << j * 8;
		}
		if (i * 8 + 4 == layout->len) {
			if ((*(const __u32 *)&words[i] & le32((__u32)mask)) != le32((__u32)bytes))
				return false;
		} else if (mask && (words[i] & le64(mask)) != le64(bytes)) {
			return false;
		}
	}
	return true;
}

#endif
