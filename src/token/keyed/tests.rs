//! Holds the library to its own page: the vectors, every bit, the edges of slots.

use std::time::SystemTime;

use serde_json::Value;

use super::*;

const VECTORS: &str = include_str!("../../../tests/data/token-vectors.json");

fn vectors() -> Value {
    serde_json::from_str(VECTORS).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn key_of(id: u8, secret: &str) -> Key {
    let secret = Secret::from_hex(secret.as_bytes()).unwrap();
    Key::new("edge".parse().unwrap(), id, secret, SystemTime::UNIX_EPOCH).unwrap()
}

/// One of the vectors, as what it was made of.
struct Vector {
    key: Key,
    stamp: Stamp,
    flow: Flow,
    unix: Duration,
    slots: Slots,
    token: Token,
    message: String,
}

fn read(vector: &Value) -> Vector {
    let number = |name: &str| vector[name].as_u64().unwrap();
    let text = |name: &str| vector[name].as_str().unwrap();
    let end = |addr: &str, port: &str| SocketAddr::new(text(addr).parse().unwrap(), number(port) as u16);
    let slots = Slots::new(number("slot_s") as u32, 1, 1).unwrap();
    let unix = Duration::from_secs(number("unix_s"));
    assert_eq!(u64::from(slots.at(unix)), number("slot"));
    let key_id = number("key_id") as u8;
    Vector {
        key: key_of(key_id, text("secret")),
        stamp: Stamp {
            tag: number("tag") as u16,
            key_id,
            bind: text("bind").parse().unwrap(),
            slot: number("slot") as u32,
        },
        flow: Flow::new(end("src", "sport"), end("dst", "dport"), number("isn") as u32).unwrap(),
        unix,
        slots,
        token: text("token").parse().unwrap(),
        message: text("message").to_string(),
    }
}

fn check(vector: &Vector, token: Token, flow: &Flow, unix: Duration) -> Result<Valid, Refusal> {
    let keys = std::slice::from_ref(&vector.key);
    Verifier { keys, slots: vector.slots, binds: &[vector.stamp.bind] }.check(token, flow, unix)
}

#[test]
fn siphash_gives_its_published_results() {
    let vectors = vectors();
    let key = Secret::from_hex(vectors["siphash"]["key"].as_str().unwrap().as_bytes()).unwrap();
    let results = vectors["siphash"]["results"].as_array().unwrap();
    assert_eq!(results.len(), 64);
    // The paper's own example, and the first and the last line of its authors' list.
    assert_eq!(results[15], "e545be4961ca29a1");
    assert_eq!((&results[0], &results[63]), (&"310e0edd47db6f72".into(), &"724506eb4c328a95".into()));
    let message: Vec<u8> = (0..64).collect();
    for (len, result) in results.iter().enumerate() {
        let mut hasher = SipHasher24::new_with_key(key.bytes());
        hasher.write(&message[..len]);
        assert_eq!(hex(&hasher.finish().to_le_bytes()), result.as_str().unwrap(), "{len} bytes");
    }
}

#[test]
fn every_vector_is_made_and_found_valid() {
    let vectors = vectors();
    let vectors = vectors["tokens"].as_array().unwrap();
    assert_eq!(vectors.len(), 48);
    for vector in vectors {
        let read = read(vector);
        assert_eq!(hex(&message(read.stamp, &read.flow)), read.message, "{vector}");
        assert_eq!(make(read.key.secret().unwrap(), read.stamp, &read.flow), read.token, "{vector}");
        let valid = check(&read, read.token, &read.flow, read.unix).unwrap();
        let Stamp { tag, key_id, bind, slot } = read.stamp;
        assert_eq!(valid, Valid { tag, ring: read.key.ring(), key_id, bind, slot });
    }
}

/// Flips every bit of the token and of the flow. What the bind mode leaves out does not matter; all else does.
#[test]
fn every_bit_that_belongs_to_it_matters() {
    let vectors = vectors();
    let mut refused = 0;
    for vector in vectors["tokens"].as_array().unwrap() {
        let read = read(vector);
        for bit in 0..64 {
            let mut bytes = read.token.0;
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(check(&read, Token(bytes), &read.flow, read.unix).is_err(), "bit {bit} of {vector}");
            refused += 1;
        }
        for (field, flow) in flipped(&read.flow) {
            let counts = match field {
                "isn" => true,
                "dst" => read.stamp.bind != Bind::Isn,
                _ => read.stamp.bind == Bind::Flow,
            };
            let valid = check(&read, read.token, &flow, read.unix).is_ok();
            assert_eq!(valid, !counts, "{field} of {vector} as {flow:?}");
            refused += usize::from(counts);
        }
        for bit in 0..128 {
            let mut bytes = *read.key.secret().unwrap().bytes();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let key = Key::new(read.key.ring(), read.key.id(), Secret::from_bytes(&bytes), SystemTime::now());
            let other = Vector { key: key.unwrap(), ..self::read(vector) };
            let result = check(&other, read.token, &read.flow, read.unix);
            assert_eq!(result, Err(Refusal::WrongMac), "bit {bit} of the key of {vector}");
            refused += 1;
        }
    }
    println!("{refused} flips refused");
}

/// Every flow that differs in one bit, with the field that differs.
fn flipped(flow: &Flow) -> Vec<(&'static str, Flow)> {
    let mut all = Vec::new();
    for bit in 0..32 {
        all.push(("isn", Flow { isn: flow.isn ^ 1 << bit, ..*flow }));
    }
    for bit in 0..16 {
        let port = |end: SocketAddr| SocketAddr::new(end.ip(), end.port() ^ 1 << bit);
        all.push(("src", Flow { src: port(flow.src), ..*flow }));
        all.push(("dst", Flow { dst: port(flow.dst), ..*flow }));
    }
    let bits = if flow.src.is_ipv4() { 32 } else { 128 };
    for bit in 0..bits {
        let addr = |end: SocketAddr| {
            let addr: IpAddr = match end.ip() {
                IpAddr::V4(addr) => IpAddr::V4((addr.to_bits() ^ 1 << bit).into()),
                IpAddr::V6(addr) => IpAddr::V6((addr.to_bits() ^ 1 << bit).into()),
            };
            SocketAddr::new(addr, end.port())
        };
        all.push(("src", Flow { src: addr(flow.src), ..*flow }));
        all.push(("dst", Flow { dst: addr(flow.dst), ..*flow }));
    }
    all
}

#[test]
fn another_bind_mode_is_not_taken_for_the_one_it_was_made_with() {
    let vectors = vectors();
    for vector in vectors["tokens"].as_array().unwrap() {
        let read = read(vector);
        let keys = std::slice::from_ref(&read.key);
        for bind in Bind::ALL {
            let verifier = Verifier { keys, slots: read.slots, binds: &[bind] };
            let result = verifier.check(read.token, &read.flow, read.unix).map(|valid| valid.bind);
            let expected = if bind == read.stamp.bind { Ok(bind) } else { Err(Refusal::WrongMac) };
            assert_eq!(result, expected, "{vector}");
        }
        let verifier = Verifier { keys, slots: read.slots, binds: &Bind::ALL };
        assert_eq!(verifier.check(read.token, &read.flow, read.unix).unwrap().bind, read.stamp.bind);
    }
}

#[test]
fn an_isn_token_survives_a_change_of_the_family() {
    let vectors = vectors();
    let vector = vectors["tokens"].as_array().unwrap().iter().map(read).find(|v| v.stamp.bind == Bind::Isn);
    let read = vector.unwrap();
    assert!(read.flow.src.is_ipv4());
    let end = "[2001:db8::7]:99".parse().unwrap();
    let translated = Flow::new(end, end, read.flow.isn).unwrap();
    check(&read, read.token, &translated, read.unix).unwrap();
}

/// Slots of 16 seconds, one behind and one ahead: at which second of the checker's clock a token of slot 100 counts.
#[test]
fn a_slot_is_accepted_to_its_edges_and_no_further() {
    let key = key_of(3, "000102030405060708090a0b0c0d0e0f");
    let flow = Flow::new("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap(), 7).unwrap();
    for (base, behind, ahead) in [(100, 1, 1), (112, 1, 1), (111, 0, 0), (127, 2, 3), (1 << 20, 7, 8)] {
        let slots = Slots::new(16, behind, ahead).unwrap();
        let stamp = Stamp { tag: 1, key_id: 3, bind: Bind::Flow, slot: base };
        let token = make(key.secret().unwrap(), stamp, &flow);
        let verifier = Verifier { keys: std::slice::from_ref(&key), slots, binds: &[Bind::Flow] };
        let first = 16 * u64::from(base - ahead);
        let last = 16 * u64::from(base + behind) + 15;
        for second in first.saturating_sub(600)..last + 600 {
            let result = verifier.check(token, &flow, Duration::from_secs(second));
            if (first..=last).contains(&second) {
                assert_eq!(result.unwrap().slot, base, "second {second}");
            } else {
                // In another cycle of the four bits the number looks right, and the MAC does not.
                assert!(result.is_err(), "second {second}");
            }
        }
        for edge in [first, last + 1].map(|second| Duration::from_secs(second) - Duration::from_nanos(1)) {
            let valid = verifier.check(token, &flow, edge).is_ok();
            assert_eq!(valid, edge >= Duration::from_secs(first), "{edge:?}");
        }
    }
}

#[test]
fn the_number_of_a_slot_wraps_where_the_page_says() {
    let slots = Slots::new(1, 1, 1).unwrap();
    let key = key_of(0, "000102030405060708090a0b0c0d0e0f");
    let flow = Flow::new("192.0.2.1:1".parse().unwrap(), "192.0.2.2:2".parse().unwrap(), 7).unwrap();
    let verifier = Verifier { keys: std::slice::from_ref(&key), slots, binds: &[Bind::Isn] };
    for second in [(1u64 << 32) - 1, 1 << 32, (1 << 32) + 1] {
        let slot = slots.at(Duration::from_secs(second));
        assert_eq!(u64::from(slot), second % (1 << 32));
        let token = make(key.secret().unwrap(), Stamp { tag: 1, key_id: 0, bind: Bind::Isn, slot }, &flow);
        for at in [second - 1, second, second + 1] {
            assert_eq!(verifier.check(token, &flow, Duration::from_secs(at)).unwrap().slot, slot);
        }
    }
}

#[test]
fn windows_that_four_bits_cannot_tell_apart_are_refused() {
    assert!(Slots::new(16, 7, 8).is_ok() && Slots::new(16, 15, 0).is_ok());
    for (length, behind, ahead) in [(0, 1, 1), (16, 8, 8), (16, 16, 0), (16, u32::MAX, u32::MAX)] {
        assert!(Slots::new(length, behind, ahead).is_err(), "{length} {behind} {ahead}");
    }
}

#[test]
fn unknown_and_retired_keys_are_told_apart() {
    let vectors = vectors();
    let read = read(&vectors["tokens"][0]);
    let verifier = |keys| Verifier { keys, slots: read.slots, binds: &Bind::ALL };
    assert_eq!(verifier(&[]).check(read.token, &read.flow, read.unix), Err(Refusal::UnknownKey));
    let mut key = key_of(read.stamp.key_id, "000102030405060708090a0b0c0d0e0f");
    key.retire();
    assert_eq!(verifier(&[key]).check(read.token, &read.flow, read.unix), Err(Refusal::RetiredKey));
}

#[test]
fn a_flow_has_one_family_and_mapped_addresses_are_ipv4() {
    let (four, six) = ("192.0.2.1:1".parse().unwrap(), "[2001:db8::1]:1".parse().unwrap());
    assert!(Flow::new(four, six, 0).is_err() && Flow::new(six, four, 0).is_err());
    let mapped = "[::ffff:192.0.2.1]:1".parse().unwrap();
    assert_eq!(Flow::new(mapped, four, 0).unwrap(), Flow::new(four, four, 0).unwrap());
}
