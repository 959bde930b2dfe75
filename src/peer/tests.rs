//! Real connections over loopback, which need no rights, and SYNs that are made here.

use std::net::{TcpStream, UdpSocket};
use std::time::SystemTime;

use super::*;
use crate::keys::{Key, Secret};
use crate::token::keyed::{Bind, Slots, Stamp, make};

fn connected(listener: &TcpListener, to: &str) -> (TcpStream, TcpStream) {
    let port = listener.local_addr().unwrap().port();
    let client = TcpStream::connect(format!("{to}:{port}")).unwrap();
    (client, listener.accept().unwrap().0)
}

#[test]
fn the_syn_of_a_connection_is_read_in_both_families() {
    for (at, to) in [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "[::1]"), ("[::]:0", "127.0.0.1")] {
        let listener = match listen(at.parse().unwrap()) {
            Err(error) if at.contains(':') && format!("{error:#}").contains("os error 97") => {
                eprintln!("SKIPPED {at}: this kernel has no IPv6");
                continue;
            }
            other => other.unwrap(),
        };
        let (client, server) = connected(&listener, to);
        let peer = of(&server).unwrap();
        assert_eq!(peer.flow().src(), client.local_addr().unwrap());
        assert_eq!(peer.flow().dst(), client.peer_addr().unwrap());
        assert_eq!((peer.token(), peer.tag()), (None, None));
        assert!(matches!(of(&server), Err(Unknown::Gone)), "a second time");
    }
}

#[test]
fn what_is_longer_than_expected_is_read_whole() {
    let listener = listen("127.0.0.1:0".parse().unwrap()).unwrap();
    let (client, server) = connected(&listener, "127.0.0.1");
    let headers = saved_syn(&server, 8).unwrap();
    let peer = Peer::from_headers(&headers, Shape::default()).unwrap();
    assert_eq!(peer.flow().src(), client.local_addr().unwrap());
}

#[test]
fn a_syn_that_is_not_to_be_had_is_told_from_others() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (_client, server) = connected(&listener, "127.0.0.1");
    let error = of(&server).unwrap_err();
    assert!(matches!(error, Unknown::NotSaved) && error.to_string().contains("save_syn"), "{error}");
    save_syn(&listener).unwrap();
    let (_client, server) = connected(&listener, "127.0.0.1");
    assert!(of(&server).is_ok());

    let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
    assert!(matches!(of(&udp), Err(Unknown::Refused(_))));
    assert!(save_syn(&udp).is_err());
    let taken = listen(listener.local_addr().unwrap()).unwrap_err();
    assert!(format!("{taken:#}").contains("listening at 127.0.0.1:"), "{taken:#}");
}

/// IPv4 and TCP headers with these options.
fn headers(options: &[u8]) -> Vec<u8> {
    let len = 40 + options.len() as u16;
    let mut bytes = vec![0x45, 0];
    bytes.extend(len.to_be_bytes());
    bytes.extend([0, 0, 0, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    bytes.extend([0x80, 0, 0, 80, 0, 0, 0, 7, 0, 0, 0, 0]);
    bytes.extend([(5 + options.len() as u8 / 4) << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    bytes.extend(options);
    bytes
}

fn with_tokens(tokens: &[Token]) -> Vec<u8> {
    headers(
        &tokens.iter().flat_map(|token| [&[253, 12, 0x4e, 0x54][..], &token.0].concat()).collect::<Vec<_>>(),
    )
}

#[test]
fn a_token_is_checked_and_every_verdict_has_the_name_that_the_guard_gives_it() {
    let key = |id: u8| {
        Key::new("edge".parse().unwrap(), id, Secret::from_bytes(&[id; 16]), SystemTime::UNIX_EPOCH).unwrap()
    };
    let mut keys = [key(1), key(2)];
    let flow = Peer::from_headers(&headers(&[]), Shape::default()).unwrap().flow();
    let unix = Duration::from_secs(1_000_000);
    let slot = Slots::default().at(unix);
    let token = |key_id: u8, slot| {
        let stamp = Stamp { tag: 17, key_id, bind: Bind::Server, slot };
        make(&Secret::from_bytes(&[key_id; 16]), stamp, &flow)
    };
    let good = token(1, slot);
    let mut forged = good;
    forged.0[7] ^= 1;
    let cases = [
        (with_tokens(&[good]), "valid"),
        (with_tokens(&[]), "missing"),
        (with_tokens(&[good, good]), "duplicate"),
        (headers(&[253, 12, 0x4e, 0x54, 253, 99, 0, 0]), "malformed"),
        (headers(&[253, 8, 0x4e, 0x54, 1, 2, 3, 4]), "malformed"),
        (with_tokens(&[token(3, slot)]), "unknown_key"),
        (with_tokens(&[token(2, slot)]), "retired_key"),
        (with_tokens(&[forged]), "bad_mac"),
        (with_tokens(&[token(1, slot - 3)]), "wrong_time"),
    ];
    keys[1].retire();
    let verifier = Verifier { keys: &keys, slots: Slots::default(), binds: &[Bind::Server] };
    for (bytes, expected) in cases {
        let peer = Peer::from_headers(&bytes, Shape::default()).unwrap();
        let verdict = peer.check(&verifier, unix);
        assert_eq!((verdict.name(), verdict.is_valid()), (expected, expected == "valid"), "{bytes:02x?}");
        if expected == "valid" {
            assert_eq!((peer.token(), peer.tag()), (Some(good), Some(17)));
        }
    }
}

#[test]
fn what_is_no_syn_is_nobody() {
    let mut ack = with_tokens(&[Token::DEFAULT]);
    ack[33] |= 0x10;
    for bytes in [&ack[..], &[], &[0x45], &with_tokens(&[])[..30]] {
        assert!(Peer::from_headers(bytes, Shape::default()).is_none(), "{bytes:02x?}");
    }
}
