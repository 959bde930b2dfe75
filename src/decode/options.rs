//! TCP options: which are tokens of ours, and which are others that share the experimental kinds with them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use serde::{Serialize, Serializer};

use crate::program::{DEFAULT_EXID, DEFAULT_KIND};
use crate::token::{TOKEN_LEN, Token};

/// RFC 4727: the two kinds that are for experiments.
const EXPERIMENTAL: [u8; 2] = [253, 254];
const FAST_OPEN: u8 = 34;
/// Kind, length, port and address: what the TOA modules of load balancers write, without an ExID.
const TOA_V4: (u8, usize) = (254, 8);
const TOA_V6: (u8, usize) = (253, 20);

/// Experiments by their identifiers: from the IANA registry of TCP ExIDs, the RFCs that it names, and the kernel.
const EXPERIMENTS: [(&[u8], &str); 5] = [
    (&[0x03, 0x48], "HOST_ID (RFC 7974)"),
    (&[0x45, 0x4e], "TCP-ENO (RFC 8547)"),
    (&[0xe2, 0xd4, 0xc3, 0xd9], "SMC-R (RFC 7609)"),
    (&[0xeb, 0x9f], "BPF header options (Linux)"),
    (&[0xf9, 0x89], "TCP Fast Open (RFC 7413)"),
];

/// Which option is a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Kind byte.
    pub kind: u8,
    /// Experiment identifier, host order.
    pub exid: u16,
}

impl Default for Shape {
    fn default() -> Self {
        Shape { kind: DEFAULT_KIND, exid: DEFAULT_EXID }
    }
}

/// An option that is worth a word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "option", rename_all = "snake_case")]
pub enum Found {
    /// One of ours.
    Token {
        /// Its eight bytes.
        token: Token,
    },
    /// One with our kind and ExID, but of another length.
    NoToken {
        /// Length that it claims, in bytes.
        length: usize,
    },
    /// An experiment by its ExID.
    Experiment {
        /// 253 or 254.
        kind: u8,
        /// The identifier as it stands on the wire; nothing if the option is too short for one.
        #[serde(serialize_with = "as_hex")]
        exid: Vec<u8>,
        /// Whose it is, if that is known.
        name: Option<&'static str>,
        /// What is behind the identifier.
        #[serde(serialize_with = "as_hex")]
        data: Vec<u8>,
    },
    /// TCP option address: the client of a load balancer, or something that looks the same.
    Toa {
        /// 254 for IPv4, 253 for IPv6.
        kind: u8,
        /// Address and port.
        client: SocketAddr,
    },
    /// TCP Fast Open under the kind that it got later.
    FastOpen {
        /// Empty if the client asks for one.
        #[serde(serialize_with = "as_hex")]
        cookie: Vec<u8>,
    },
    /// The list ends with a length that is a lie.
    Malformed {
        /// Where in the list, in bytes.
        at: usize,
    },
    /// The list goes on behind what was captured (the snap length, `tcpdump -s`).
    CutOff {
        /// Where in the list, in bytes.
        at: usize,
    },
}

fn as_hex<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&Hex(bytes))
}

/// Bytes as hexadecimal digits.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Found::Token { token } => write!(f, "token {token}"),
            Found::NoToken { length } => {
                write!(f, "our ExID in an option of {length} bytes, which is no token")
            }
            Found::Experiment { kind, exid, name, data } => {
                let name = name.unwrap_or("unknown experiment");
                write!(f, "{name}: kind {kind}, ExID 0x{}", Hex(exid))?;
                if data.is_empty() { Ok(()) } else { write!(f, ", data {}", Hex(data)) }
            }
            Found::Toa { kind, client } => write!(f, "TOA (kind {kind}): client {client}"),
            Found::FastOpen { cookie } if cookie.is_empty() => {
                f.write_str("TCP Fast Open (kind 34): cookie request")
            }
            Found::FastOpen { cookie } => write!(f, "TCP Fast Open (kind 34): cookie {}", Hex(cookie)),
            Found::Malformed { at } => write!(f, "malformed option at byte {at}"),
            Found::CutOff { at } => write!(f, "cut off by the capture from byte {at} of the options on"),
        }
    }
}

/// Walks a list of TCP options (RFC 9293 section 3.1). Where it lies about a length, the walk ends.
pub fn find(options: &[u8], shape: Shape) -> Vec<Found> {
    walk(options, true, shape)
}

/// The same of a list of which only that was captured.
pub fn find_in_part(options: &[u8], shape: Shape) -> Vec<Found> {
    walk(options, false, shape)
}

fn walk(options: &[u8], is_whole: bool, shape: Shape) -> Vec<Found> {
    let mut found = Vec::new();
    let mut at = 0;
    while let Some(kind) = options.get(at).copied() {
        match kind {
            0 => return found,
            1 => {
                at += 1;
                continue;
            }
            _ => {}
        }
        let len = options.get(at + 1).copied().map(usize::from);
        let body = len.filter(|len| *len >= 2).and_then(|len| options.get(at + 2..at + len));
        let Some((len, body)) = len.zip(body) else {
            let is_cut = !is_whole && len.is_none_or(|len| len >= 2);
            found.push(if is_cut { Found::CutOff { at } } else { Found::Malformed { at } });
            return found;
        };
        found.extend(recognise(kind, body, shape));
        at += len;
    }
    if !is_whole {
        found.push(Found::CutOff { at });
    }
    found
}

/// `body`: what is behind kind and length.
fn recognise(kind: u8, body: &[u8], shape: Shape) -> Option<Found> {
    if kind == shape.kind && body.starts_with(&shape.exid.to_be_bytes()) {
        return Some(match <[u8; TOKEN_LEN]>::try_from(&body[2..]) {
            Ok(bytes) => Found::Token { token: Token(bytes) },
            Err(_) => Found::NoToken { length: body.len() + 2 },
        });
    }
    if kind == FAST_OPEN {
        return Some(Found::FastOpen { cookie: body.to_vec() });
    }
    if !EXPERIMENTAL.contains(&kind) {
        return None;
    }
    if let Some((exid, name)) = EXPERIMENTS.iter().find(|(exid, _)| body.starts_with(exid)) {
        let data = body[exid.len()..].to_vec();
        return Some(Found::Experiment { kind, exid: exid.to_vec(), name: Some(name), data });
    }
    if let Some(client) = toa(kind, body) {
        return Some(Found::Toa { kind, client });
    }
    let (exid, data) = body.split_at(body.len().min(2));
    Some(Found::Experiment { kind, exid: exid.to_vec(), name: None, data: data.to_vec() })
}

fn toa(kind: u8, body: &[u8]) -> Option<SocketAddr> {
    let (port, addr) = body.split_at_checked(2)?;
    let addr: IpAddr = match (kind, body.len() + 2) {
        TOA_V4 => Ipv4Addr::from(<[u8; 4]>::try_from(addr).ok()?).into(),
        TOA_V6 => Ipv6Addr::from(<[u8; 16]>::try_from(addr).ok()?).into(),
        _ => return None,
    };
    Some(SocketAddr::new(addr, u16::from_be_bytes(port.try_into().ok()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(options: &[u8]) -> Vec<String> {
        find(options, Shape::default()).iter().map(Found::to_string).collect()
    }

    #[test]
    fn what_shares_the_experimental_kinds_is_told_apart() {
        for (options, expected) in [
            (&[][..], &[][..]),
            (&[1, 1, 2, 4, 5, 180, 0, 253], &[]),
            (&[253, 12, 0x4e, 0x54, 1, 2, 3, 4, 5, 6, 7, 8], &["token 0102030405060708"]),
            (
                &[254, 12, 0x4e, 0x54, 1, 2, 3, 4, 5, 6, 7, 8],
                &["unknown experiment: kind 254, ExID 0x4e54, data 0102030405060708"],
            ),
            (&[253, 6, 0x4e, 0x54, 1, 2], &["our ExID in an option of 6 bytes, which is no token"]),
            (&[254, 8, 0x1f, 0x90, 192, 0, 2, 7], &["TOA (kind 254): client 192.0.2.7:8080"]),
            (
                &[254, 8, 0x03, 0x48, 192, 0, 2, 7],
                &["HOST_ID (RFC 7974): kind 254, ExID 0x0348, data c0000207"],
            ),
            (&[254, 4, 0xf9, 0x89], &["TCP Fast Open (RFC 7413): kind 254, ExID 0xf989"]),
            (&[253, 6, 0xe2, 0xd4, 0xc3, 0xd9], &["SMC-R (RFC 7609): kind 253, ExID 0xe2d4c3d9"]),
            (&[253, 4, 0xe2, 0xd4], &["unknown experiment: kind 253, ExID 0xe2d4"]),
            (&[254, 5, 0x45, 0x4e, 1], &["TCP-ENO (RFC 8547): kind 254, ExID 0x454e, data 01"]),
            (&[34, 2], &["TCP Fast Open (kind 34): cookie request"]),
            (
                &[34, 4, 1, 2, 253, 3, 9],
                &["TCP Fast Open (kind 34): cookie 0102", "unknown experiment: kind 253, ExID 0x09"],
            ),
            (&[253, 2], &["unknown experiment: kind 253, ExID 0x"]),
            (&[253], &["malformed option at byte 0"]),
            (&[1, 253, 0, 1], &["malformed option at byte 1"]),
            (&[1, 2, 1], &["malformed option at byte 1"]),
            (&[253, 12, 0x4e, 0x54], &["malformed option at byte 0"]),
        ] {
            assert_eq!(shown(options), expected, "{options:?}");
        }
        let v6 = [&[253, 20, 0, 80][..], &"2001:db8::7".parse::<Ipv6Addr>().unwrap().octets()].concat();
        assert_eq!(shown(&v6), ["TOA (kind 253): client [2001:db8::7]:80"]);
    }

    #[test]
    fn of_a_list_that_is_cut_off_the_front_is_read() {
        for (options, expected) in [
            (&[][..], &[Found::CutOff { at: 0 }][..]),
            (&[1, 2, 4, 5], &[Found::CutOff { at: 1 }]),
            (&[2, 4, 5, 180], &[Found::CutOff { at: 4 }]),
            (&[1, 253], &[Found::CutOff { at: 1 }]),
            (&[1, 0, 1], &[]),
            (&[1, 2, 1], &[Found::Malformed { at: 1 }]),
            (
                &[253, 12, 0x4e, 0x54, 1, 2, 3, 4, 5, 6, 7, 8, 4],
                &[Found::Token { token: Token([1, 2, 3, 4, 5, 6, 7, 8]) }, Found::CutOff { at: 12 }],
            ),
        ] {
            assert_eq!(find_in_part(options, Shape::default()), expected, "{options:?}");
        }
    }

    #[test]
    fn kind_and_exid_are_settings() {
        let options = [254, 12, 0x12, 0x34, 1, 2, 3, 4, 5, 6, 7, 8];
        let found = find(&options, Shape { kind: 254, exid: 0x1234 });
        assert_eq!(found, [Found::Token { token: Token([1, 2, 3, 4, 5, 6, 7, 8]) }]);
    }
}
