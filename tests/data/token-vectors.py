#!/usr/bin/env python3
"""Prints token-vectors.json: keyed tokens as another language makes them.

Written from the page in src/token/keyed.rs and the SipHash paper alone, with nothing but Python's own library, so
that it is a second opinion on what Rust and BPF do. The values are made up, the tokens computed.
"""

import ipaddress
import json

MASK = (1 << 64) - 1
BINDS = {"flow": 1, "server": 2, "isn": 3}


def rotl(value, bits):
    return (value << bits | value >> (64 - bits)) & MASK


def siphash24(key, message):
    k0, k1 = (int.from_bytes(key[at : at + 8], "little") for at in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def rounds(count):
        for _ in range(count):
            v[0] = (v[0] + v[1]) & MASK
            v[1] = rotl(v[1], 13) ^ v[0]
            v[0] = rotl(v[0], 32)
            v[2] = (v[2] + v[3]) & MASK
            v[3] = rotl(v[3], 16) ^ v[2]
            v[0] = (v[0] + v[3]) & MASK
            v[3] = rotl(v[3], 21) ^ v[0]
            v[2] = (v[2] + v[1]) & MASK
            v[1] = rotl(v[1], 17) ^ v[2]
            v[2] = rotl(v[2], 32)

    padded = message + bytes(-(len(message) + 1) % 8) + bytes([len(message) & 0xFF])
    for at in range(0, len(padded), 8):
        word = int.from_bytes(padded[at : at + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(4)
    return (v[0] ^ v[1] ^ v[2] ^ v[3]).to_bytes(8, "little")


def message_of(bind, tag, key_id, slot, isn, src, sport, dst, dport):
    src, dst = (ipaddress.ip_address(addr).packed for addr in (src, dst))
    if bind != "flow":
        src, sport = bytes(len(src)), 0
    if bind == "isn":
        src, dst, dport = bytes(4), bytes(4), 0
    numbers = [(1, 1), (BINDS[bind], 1), (tag, 2), (key_id, 1), (0, 3), (slot, 4), (isn, 4), (sport, 2), (dport, 2)]
    return b"".join(number.to_bytes(size, "big") for number, size in numbers) + src + dst


def vector(secret, unix_s, slot_s, **fields):
    slot = unix_s // slot_s % 2**32
    message = message_of(slot=slot, **fields)
    mac = siphash24(bytes.fromhex(secret), message)[:5]
    ids = fields["key_id"] << 4 | slot & 15
    token = fields["tag"].to_bytes(2, "big") + bytes([ids]) + mac
    return {
        "secret": secret,
        "unix_s": unix_s,
        "slot_s": slot_s,
        "slot": slot,
        **fields,
        "message": message.hex(),
        "mac": mac.hex(),
        "token": token.hex(),
    }


def main():
    ramp = bytes(range(16))
    ends = [
        ("192.0.2.1", 40000, "198.51.100.7", 443),
        ("2001:db8::1", 40000, "2001:db8:ff::7", 443),
        ("0.0.0.0", 0, "255.255.255.255", 65535),
        ("::", 65535, "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 0),
    ]
    stamps = [
        (ramp.hex(), 1795249800, 16, 17, 3, 0x01020304),
        ("ffffffffffffffffffffffffffffffff", 0, 16, 0, 0, 0),
        ("8000000000000000000000000000000f", 2**32 - 1, 1, 65535, 15, 0xFFFFFFFF),
        ("5f1d3c9be20746a8b3d9e0f112233445", 1795249807, 1, 4660, 9, 0xDEADBEEF),
    ]
    print(
        json.dumps(
            {
                "format": 1,
                "siphash": {
                    "key": ramp.hex(),
                    "message": "the bytes 00, 01, 02 and so on, as many as the place of the result in the list",
                    "results": [siphash24(ramp, bytes(range(size))).hex() for size in range(64)],
                },
                "tokens": [
                    vector(secret, unix_s, slot_s, bind=bind, tag=tag, key_id=key_id, isn=isn, src=src, sport=sport, dst=dst, dport=dport)
                    for bind in BINDS
                    for src, sport, dst, dport in ends
                    for secret, unix_s, slot_s, tag, key_id, isn in stamps
                ],
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
