/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * SipHash-2-4 (Aumasson and Bernstein, 2012) over a message that the caller hands over in words of
 * eight bytes, read as little-endian numbers. All of its state is four local variables, so that the
 * compiler keeps it in registers.
 */
#ifndef NETOKEN_SIPHASH_H
#define NETOKEN_SIPHASH_H

struct siphash {
	__u64 v0, v1, v2, v3;
};

static __always_inline __u64 rotate_left(__u64 value, int bits)
{
	return value << bits | value >> (64 - bits);
}

static __always_inline void sip_round(struct siphash *sip)
{
	sip->v0 += sip->v1;
	sip->v2 += sip->v3;
	sip->v1 = rotate_left(sip->v1, 13) ^ sip->v0;
	sip->v3 = rotate_left(sip->v3, 16) ^ sip->v2;
	sip->v0 = rotate_left(sip->v0, 32);
	sip->v2 += sip->v1;
	sip->v0 += sip->v3;
	sip->v1 = rotate_left(sip->v1, 17) ^ sip->v2;
	sip->v3 = rotate_left(sip->v3, 21) ^ sip->v0;
	sip->v2 = rotate_left(sip->v2, 32);
}

static __always_inline void sip_begin(struct siphash *sip, const __u64 *secret)
{
	sip->v0 = secret[0] ^ 0x736f6d6570736575ULL;
	sip->v1 = secret[1] ^ 0x646f72616e646f6dULL;
	sip->v2 = secret[0] ^ 0x6c7967656e657261ULL;
	sip->v3 = secret[1] ^ 0x7465646279746573ULL;
}

static __always_inline void sip_word(struct siphash *sip, __u64 word)
{
	sip->v3 ^= word;
	sip_round(sip);
	sip_round(sip);
	sip->v0 ^= word;
}

/* `rest`: the last bytes of the message, less than eight; `len`: of the whole message. */
static __always_inline __u64 sip_end(struct siphash *sip, __u64 rest, __u64 len_bytes)
{
	sip_word(sip, rest | len_bytes << 56);
	sip->v2 ^= 0xff;
	sip_round(sip);
	sip_round(sip);
	sip_round(sip);
	sip_round(sip);
	return sip->v0 ^ sip->v1 ^ sip->v2 ^ sip->v3;
}

#endif
