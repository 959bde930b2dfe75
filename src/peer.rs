//! Who opened a connection: what an application reads of the SYN of a [`std::net::TcpStream`] that it accepted. It
//! needs no rights and no guard; the kernel keeps the SYN with the connection, if the listener asked for it.
//!
//! ```no_run
//! # fn main() -> anyhow::Result<()> {
//! let listener = netoken::peer::listen("[::]:8080".parse()?)?;
//! let (stream, _) = listener.accept()?;
//! let peer = netoken::peer::of(&stream)?;
//! println!("{} has {:?}", peer.flow().src(), peer.token());
//! # Ok(())
//! # }
//! ```
//!
//! A token that has not been checked proves nothing: either a guard stands in front, or [`Peer::check`] says whether
//! it is right. Where a guard scrubs tokens, the SYN has none any more; [`Peers`] asks the guard.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use anyhow::{Context, Result};
use libc::{IPPROTO_TCP, TCP_SAVE_SYN, TCP_SAVED_SYN};
use socket2::{Domain, Protocol, Socket, Type};

pub use self::guarded::{Guarded, Peers};
use crate::decode::options::{Found, Shape};
use crate::decode::syn::read_syn;
use crate::guard::counters::verdict_name;
use crate::guard::types::Verdict as Number;
use crate::token::Token;
use crate::token::keyed::{Flow, Parts, Refusal, Valid, Verifier};

/// More than the headers of a SYN can be: 40 bytes of IPv6, its extension headers, 60 of TCP. What is longer is read
/// again with the length that the kernel says.
const SYN_LEN: usize = 512;
/// How many connections wait to be accepted.
const BACKLOG: i32 = 1024;

/// What the SYN of a connection says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    flow: Flow,
    options: Vec<Found>,
}

/// Why a connection's SYN cannot be had.
#[derive(Debug)]
pub enum Unknown {
    /// The listener did not ask for it.
    NotSaved,
    /// It was asked for, but is not there: it is handed out once; a connection that was opened by a SYN cookie has
    /// none; and so has one whose SYN came before the listener asked.
    Gone,
    /// What was kept is not a SYN.
    NoSyn,
    /// The kernel refused to say: that is no TCP socket.
    Refused(io::Error),
}

impl fmt::Display for Unknown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("reading the SYN of a connection: ")?;
        match self {
            Unknown::NotSaved => {
                f.write_str("its listener did not ask for it; call netoken::peer::save_syn before it listens")
            }
            Unknown::Gone => f.write_str(
                "the kernel has none: it was read already, or the connection was opened by a SYN cookie, or before the \
                 listener asked for it",
            ),
            Unknown::NoSyn => f.write_str("what the kernel kept is not a SYN"),
            Unknown::Refused(error) => write!(f, "{error}; is that a TCP socket?"),
        }
    }
}

impl std::error::Error for Unknown {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match self {
            Unknown::Refused(error) => Some(error),
            _ => None,
        }
    }
}

/// Listens at an address, for both families if that is `[::]`, and keeps the SYN of each connection.
///
/// # Errors
/// The address is in use, or may not be used.
pub fn listen(addr: SocketAddr) -> Result<TcpListener> {
    let open = || {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if addr.is_ipv6() {
            socket.set_only_v6(!addr.ip().is_unspecified())?;
        }
        // Before it listens, so that no connection comes without.
        save_syn(&socket)?;
        socket.bind(&addr.into())?;
        socket.listen(BACKLOG)?;
        Ok::<_, io::Error>(socket.into())
    };
    open().with_context(|| format!("listening at {addr}"))
}

/// Asks the kernel to keep the SYN of each connection that this socket will accept: TCP_SAVE_SYN of tcp(7).
///
/// # Errors
/// It is not a TCP socket.
pub fn save_syn(listener: &impl AsFd) -> io::Result<()> {
    let on = 1i32;
    // SAFETY: the kernel reads one int from `on`, and keeps no pointer to it.
    let result = unsafe {
        libc::setsockopt(
            listener.as_fd().as_raw_fd(),
            IPPROTO_TCP,
            TCP_SAVE_SYN,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads a socket option; an error with the length that it would need, if `value` is too short for it.
fn option(socket: &impl AsFd, name: i32, value: &mut [u8]) -> Result<usize, (io::Error, usize)> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is the length of `value`, and says how many in `len`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            IPPROTO_TCP,
            name,
            value.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if result == 0 { Ok(len as usize) } else { Err((io::Error::last_os_error(), len as usize)) }
}

/// The SYN as the kernel kept it; tries first with room for `room` bytes.
fn saved_syn(stream: &impl AsFd, room: usize) -> Result<Vec<u8>, Unknown> {
    let mut headers = vec![0; room];
    let len = match option(stream, TCP_SAVED_SYN, &mut headers) {
        Err((_, needed)) if needed > room => {
            headers.resize(needed, 0);
            option(stream, TCP_SAVED_SYN, &mut headers)
        }
        other => other,
    };
    headers.truncate(len.map_err(|(error, _)| Unknown::Refused(error))?);
    if headers.is_empty() {
        // A connection inherits this from its listener.
        let mut saves = [0; size_of::<i32>()];
        option(stream, TCP_SAVE_SYN, &mut saves).map_err(|(error, _)| Unknown::Refused(error))?;
        return Err(if i32::from_ne_bytes(saves) == 0 { Unknown::NotSaved } else { Unknown::Gone });
    }
    Ok(headers)
}

/// Who opened this connection. The kernel hands a SYN out once: keep what this returns. Tokens have kind 253 and ExID
/// 0x4e54; [`with_shape`] takes others.
///
/// # Errors
/// The SYN is not to be had; says why.
pub fn of(stream: &impl AsFd) -> Result<Peer, Unknown> {
    with_shape(stream, Shape::default())
}

/// The same, where tokens have another kind and ExID.
///
/// # Errors
/// The SYN is not to be had; says why.
pub fn with_shape(stream: &impl AsFd, shape: Shape) -> Result<Peer, Unknown> {
    let headers = saved_syn(stream, SYN_LEN)?;
    Peer::from_headers(&headers, shape).ok_or(Unknown::NoSyn)
}

/// What is thought of the token of a SYN. The names are those of the guard's verdicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has one keyed token, which is right.
    Valid(Valid),
    /// It has none.
    Missing,
    /// It has more than one.
    Duplicate,
    /// Its options contradict themselves.
    Malformed,
    /// It has one that is not right.
    Refused(Refusal),
}

impl Verdict {
    /// True if the token is right.
    pub fn is_valid(&self) -> bool {
        matches!(self, Verdict::Valid(_))
    }

    /// As the guard calls it, except that `wrong_time` is what it tells apart as `stale_slot` and `future_slot`.
    pub fn name(&self) -> &'static str {
        verdict_name(match self {
            Verdict::Valid(_) => Number::GUARD_VALID.0,
            Verdict::Missing => Number::GUARD_MISSING.0,
            Verdict::Duplicate => Number::GUARD_DUPLICATE.0,
            Verdict::Malformed => Number::GUARD_MALFORMED.0,
            Verdict::Refused(Refusal::UnknownKey) => Number::GUARD_UNKNOWN_KEY.0,
            Verdict::Refused(Refusal::RetiredKey) => Number::GUARD_RETIRED_KEY.0,
            Verdict::Refused(Refusal::WrongMac) => Number::GUARD_BAD_MAC.0,
            Verdict::Refused(Refusal::WrongTime) => return "wrong_time",
        })
    }
}

impl Peer {
    /// Reads the headers of a SYN, from IP to the end of the TCP options; nothing if it is none.
    pub fn from_headers(headers: &[u8], shape: Shape) -> Option<Peer> {
        let syn = read_syn(headers, shape)?;
        Some(Peer { flow: syn.flow, options: syn.options })
    }

    /// Source, destination and initial sequence number of the SYN, as it came to this host's TCP.
    pub fn flow(&self) -> Flow {
        self.flow
    }

    /// Every token in it.
    pub fn tokens(&self) -> impl Iterator<Item = Token> + '_ {
        self.options.iter().filter_map(|option| match option {
            Found::Token { token } => Some(*token),
            _ => None,
        })
    }

    /// Its token, unchecked; none if it has none, or more than one.
    pub fn token(&self) -> Option<Token> {
        let mut tokens = self.tokens();
        tokens.next().filter(|_| tokens.next().is_none())
    }

    /// The tag of its token, unchecked; only a keyed token has one.
    pub fn tag(&self) -> Option<u16> {
        self.token().map(|token| Parts::from(token).tag)
    }

    /// Checks its token as a keyed one, for a SYN that came at `unix`, the time since 1970: see
    /// [`crate::clock::now`]. A connection may have waited to be accepted; what was too long ago to be told from an
    /// old token is not valid. Which tokens were used before is known to a guard only.
    pub fn check(&self, verifier: &Verifier<'_>, unix: Duration) -> Verdict {
        // Our ExID in an option of another length is nothing else to a guard.
        let is_malformed = |option: &Found| matches!(option, Found::Malformed { .. } | Found::NoToken { .. });
        if self.options.iter().any(is_malformed) {
            return Verdict::Malformed;
        }
        if self.tokens().count() > 1 {
            return Verdict::Duplicate;
        }
        let Some(token) = self.token() else { return Verdict::Missing };
        match verifier.check(token, &self.flow, unix) {
            Ok(valid) => Verdict::Valid(valid),
            Err(refusal) => Verdict::Refused(refusal),
        }
    }
}

mod guarded;
#[cfg(test)]
mod tests;
