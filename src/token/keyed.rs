//! The keyed token: what it consists of, and how it is made and checked. Pure computation, without the kernel and
//! without rights, so that a gateway or a test can do the same as the classifier. It has to agree with
//! `src/bpf/token.h`; `tests/data/token-vectors.json` holds both to this page.
//!
//! # The format, version 1
//!
//! All numbers on the wire and in the message are in network byte order (most significant byte first), except that
//! SipHash itself reads and writes as its paper says.
//!
//! The token is the 8 bytes behind kind, length and ExID of the TCP option:
//!
//! | bytes | bits | field |
//! |---|---|---|
//! | 0, 1 | 16 | tag: who opened the connection; the policy gives it |
//! | 2 | upper 4 | key id |
//! | 2 | lower 4 | the low 4 bits of the slot number |
//! | 3 to 7 | 40 | MAC |
//!
//! The slot number is floor(Unix time in seconds / slot length), modulo 2^32. Unix time is what POSIX calls so: UTC
//! without leap seconds. The slot length is agreed between both sides, 16 seconds if nothing else is.
//!
//! The MAC is the first 5 bytes of SipHash-2-4 with a 128-bit key over the message. The first bytes are those that
//! the paper's test vectors write first: the least significant ones of the 64-bit result. The key is 16 bytes, used
//! in the order in which a key file writes them.
//!
//! The message:
//!
//! | offset | bytes | field |
//! |---|---|---|
//! | 0 | 1 | format version: 1 |
//! | 1 | 1 | bind mode: 1 `flow`, 2 `server`, 3 `isn` |
//! | 2 | 2 | tag |
//! | 4 | 1 | key id |
//! | 5 | 3 | zero |
//! | 8 | 4 | the whole slot number |
//! | 12 | 4 | initial sequence number of the SYN |
//! | 16 | 2 | source port |
//! | 18 | 2 | destination port |
//! | 20 | 4 or 16 | source address |
//! | 24 or 36 | 4 or 16 | destination address |
//!
//! Over IPv4 an address has 4 bytes and the message 28; over IPv6 16 and 52. What the bind mode leaves out is zero:
//! `server` leaves out source port and source address, `isn` both ports and both addresses. The message of `isn` has
//! 28 bytes over IPv6, too, so that the token survives a translation between the two (NAT64). Nothing is ambiguous:
//! the mode is in the message, and SipHash mixes in the length.
//!
//! The addresses and ports are those of the packet that carries the token when it is made. With `flow` and `server`,
//! a translation of what the mode names makes the token invalid, which is the point of it.
//!
//! # Checking
//!
//! The token says which key and, together with the checker's clock, which slot; it does not say which bind mode, so a
//! checker tries those that it accepts. It accepts slots around its own; as long as that are fewer than 16, the four
//! bits name at most one of them.

use std::fmt;
use std::hash::Hasher;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use siphasher::sip::SipHasher24;
use subtle::ConstantTimeEq;

use super::Token;
use crate::keys::{Key, RingName, Secret, State};
use crate::types::{Bind as RawBind, KeySize};

/// Length of the MAC in bytes.
pub const MAC_LEN: usize = KeySize::MAC_LEN.0 as usize;
/// Length of a slot in seconds, if nobody says another.
pub const SLOT_S: u32 = 16;

const VERSION: u8 = KeySize::TOKEN_VERSION.0 as u8;
const LOW_BITS: u32 = KeySize::SLOTS.0 - 1;

/// What of a connection a token belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Bind {
    /// All of it: addresses, ports and initial sequence number.
    Flow,
    /// Destination address, destination port and initial sequence number: survives source NAT.
    #[default]
    Server,
    /// The initial sequence number: survives NAT on both sides.
    Isn,
}

impl Bind {
    /// Every one of them.
    pub const ALL: [Bind; 3] = [Bind::Flow, Bind::Server, Bind::Isn];

    /// Its number in the message and in the kernel.
    pub fn number(self) -> u8 {
        let raw = match self {
            Bind::Flow => RawBind::BIND_FLOW,
            Bind::Server => RawBind::BIND_SERVER,
            Bind::Isn => RawBind::BIND_ISN,
        };
        raw.0 as u8
    }

    /// As it is written in a policy.
    pub fn name(self) -> &'static str {
        match self {
            Bind::Flow => "flow",
            Bind::Server => "server",
            Bind::Isn => "isn",
        }
    }
}

impl fmt::Display for Bind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Bind {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Bind> {
        let found = Bind::ALL.into_iter().find(|bind| bind.name() == text);
        found.ok_or_else(|| anyhow!("'{text}' is no bind mode; there are flow, server and isn"))
    }
}

/// What a SYN says of its connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Flow {
    src: SocketAddr,
    dst: SocketAddr,
    isn: u32,
}

impl Flow {
    /// From source to destination, with this initial sequence number. IPv4-mapped IPv6 addresses count as IPv4.
    ///
    /// # Errors
    /// One end is IPv4, the other IPv6.
    pub fn new(src: SocketAddr, dst: SocketAddr, isn: u32) -> Result<Flow> {
        let canonical = |addr: SocketAddr| SocketAddr::new(addr.ip().to_canonical(), addr.port());
        let (src, dst) = (canonical(src), canonical(dst));
        if src.is_ipv4() != dst.is_ipv4() {
            bail!("{src} and {dst} are of different families; a SYN has two addresses of one");
        }
        Ok(Flow { src, dst, isn })
    }

    /// Source address and port.
    pub fn src(&self) -> SocketAddr {
        self.src
    }

    /// Destination address and port.
    pub fn dst(&self) -> SocketAddr {
        self.dst
    }

    /// Initial sequence number.
    pub fn isn(&self) -> u32 {
        self.isn
    }
}

/// How time is cut into slots, and how far a token's may be from the checker's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slots {
    length_s: u32,
    behind: u32,
    ahead: u32,
}

impl Default for Slots {
    fn default() -> Self {
        Slots { length_s: SLOT_S, behind: 1, ahead: 1 }
    }
}

impl Slots {
    /// Slots of `length_s` seconds; a token may be `behind` slots old, or `ahead` slots ahead.
    ///
    /// # Errors
    /// A slot has no length, or four bits could not tell the accepted ones apart.
    pub fn new(length_s: u32, behind: u32, ahead: u32) -> Result<Slots> {
        if length_s == 0 {
            bail!("a slot lasts at least one second");
        }
        if behind.saturating_add(ahead) > LOW_BITS {
            bail!(
                "of {behind} slots behind and {ahead} ahead, four bits cannot tell which is meant; at most 15 in all"
            );
        }
        Ok(Slots { length_s, behind, ahead })
    }

    /// In seconds.
    pub fn length_s(&self) -> u32 {
        self.length_s
    }

    /// How many slots old a token may be.
    pub fn behind(&self) -> u32 {
        self.behind
    }

    /// How many slots ahead of the checker a token may be.
    pub fn ahead(&self) -> u32 {
        self.ahead
    }

    /// The number of the slot at `unix`, the time since 1970.
    pub fn at(&self, unix: Duration) -> u32 {
        (unix.as_secs() / u64::from(self.length_s)) as u32
    }

    /// The slot with these low bits that is accepted at `unix`, if one is.
    fn accepted(&self, low: u8, unix: Duration) -> Option<u32> {
        let latest = self.at(unix).wrapping_add(self.ahead);
        let back = latest.wrapping_sub(low.into()) & LOW_BITS;
        (back <= self.ahead + self.behind).then(|| latest.wrapping_sub(back))
    }
}

/// A keyed token taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Who opened the connection.
    pub tag: u16,
    /// Which key it was made with, 0 to 15.
    pub key_id: u8,
    /// The low 4 bits of the slot number.
    pub slot_low: u8,
    /// What nobody can compute without the key.
    pub mac: [u8; MAC_LEN],
}

impl From<Token> for Parts {
    fn from(Token(bytes): Token) -> Parts {
        let [t0, t1, ids, mac @ ..] = bytes;
        Parts { tag: u16::from_be_bytes([t0, t1]), key_id: ids >> 4, slot_low: ids & 0xf, mac }
    }
}

impl From<Parts> for Token {
    fn from(parts: Parts) -> Token {
        let mut bytes = [0; super::TOKEN_LEN];
        bytes[..2].copy_from_slice(&parts.tag.to_be_bytes());
        bytes[2] = parts.key_id << 4 | parts.slot_low & 0xf;
        bytes[3..].copy_from_slice(&parts.mac);
        Token(bytes)
    }
}

/// What a token is made of beside the flow and the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    /// Who opens the connection.
    pub tag: u16,
    /// 0 to 15; the upper four bits are ignored.
    pub key_id: u8,
    /// What it belongs to.
    pub bind: Bind,
    /// The whole slot number.
    pub slot: u32,
}

/// Makes the token for a flow.
pub fn make(secret: &Secret, stamp: Stamp, flow: &Flow) -> Token {
    let parts = Parts {
        tag: stamp.tag,
        key_id: stamp.key_id & 0xf,
        slot_low: (stamp.slot & LOW_BITS) as u8,
        mac: mac(secret, stamp, flow),
    };
    parts.into()
}

/// The message that the MAC is computed of; see the page of this module.
pub fn message(stamp: Stamp, flow: &Flow) -> Vec<u8> {
    let Stamp { tag, key_id, bind, slot } = stamp;
    let (src, dst) = (flow.src, flow.dst);
    let mut bytes = vec![VERSION, bind.number()];
    bytes.extend(tag.to_be_bytes());
    bytes.extend([key_id & 0xf, 0, 0, 0]);
    bytes.extend(slot.to_be_bytes());
    bytes.extend(flow.isn.to_be_bytes());
    let (has_source, has_destination) = (bind == Bind::Flow, bind != Bind::Isn);
    bytes.extend(if has_source { src.port() } else { 0 }.to_be_bytes());
    bytes.extend(if has_destination { dst.port() } else { 0 }.to_be_bytes());
    for (addr, counts) in [(src.ip(), has_source), (dst.ip(), has_destination)] {
        match (addr, counts) {
            (IpAddr::V4(addr), true) => bytes.extend(addr.octets()),
            (IpAddr::V6(addr), true) => bytes.extend(addr.octets()),
            (IpAddr::V6(_), false) if has_destination => bytes.extend([0; 16]),
            (_, false) => bytes.extend([0; 4]),
        }
    }
    bytes
}

fn mac(secret: &Secret, stamp: Stamp, flow: &Flow) -> [u8; MAC_LEN] {
    let mut hasher = SipHasher24::new_with_key(secret.bytes());
    hasher.write(&message(stamp, flow));
    let mut mac = [0; MAC_LEN];
    mac.copy_from_slice(&hasher.finish().to_le_bytes()[..MAC_LEN]);
    mac
}

/// What a valid token says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Valid {
    /// Who opened the connection.
    pub tag: u16,
    /// The ring of the key that it was made with.
    pub ring: RingName,
    /// The id of that key.
    pub key_id: u8,
    /// What it belongs to.
    pub bind: Bind,
    /// The whole slot number.
    pub slot: u32,
}

/// Why a token is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// There is no key with this id.
    UnknownKey,
    /// The key with this id has been retired.
    RetiredKey,
    /// Its slot is not among those that are accepted now.
    WrongTime,
    /// It was made for another flow, in another cycle of slots, with another bind mode or another key, or not by us.
    WrongMac,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Refusal::UnknownKey => "no key with this id is known",
            Refusal::RetiredKey => "its key has been retired",
            Refusal::WrongTime => "its time slot is not one of those that are accepted at that time",
            Refusal::WrongMac => "it was not made for this flow, time and bind mode with this key",
        })
    }
}

/// What somebody accepts.
#[derive(Clone, Copy, Debug)]
pub struct Verifier<'a> {
    /// Keys with distinct ids.
    pub keys: &'a [Key],
    /// Which moments.
    pub slots: Slots,
    /// Which bind modes.
    pub binds: &'a [Bind],
}

impl Verifier<'_> {
    /// Checks a token that came with `flow` at the time `unix`, since 1970. How long it takes does not depend on
    /// the MAC.
    ///
    /// # Errors
    /// It is not valid; says why.
    pub fn check(&self, token: Token, flow: &Flow, unix: Duration) -> Result<Valid, Refusal> {
        let Parts { tag, key_id, slot_low, mac: claimed } = token.into();
        let key = self.keys.iter().find(|key| key.id() == key_id).ok_or(Refusal::UnknownKey)?;
        if key.state() == State::Retired {
            return Err(Refusal::RetiredKey);
        }
        let secret = key.secret().ok_or(Refusal::RetiredKey)?;
        let slot = self.slots.accepted(slot_low, unix).ok_or(Refusal::WrongTime)?;
        let mut found = Err(Refusal::WrongMac);
        for bind in self.binds.iter().copied() {
            let computed = mac(secret, Stamp { tag, key_id, bind, slot }, flow);
            if bool::from(computed.ct_eq(&claimed)) && found.is_err() {
                found = Ok(Valid { tag, ring: key.ring(), key_id, bind, slot });
            }
        }
        found
    }
}

#[cfg(test)]
mod tests;
