//! Asks a guard on this host who opened a connection: where it scrubs tokens, nobody else knows.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use plain::Plain;
use socket2::SockRef;

use crate::events::model::Clock;
use crate::guard::counters::verdict_name;
use crate::guard::types::{Peer as Value, PeerKey};
use crate::privileges;
use crate::state::{State, flag_of_pins};
use crate::token::Token;
use crate::token::keyed::Parts;

// SAFETY: integers and arrays of them, without hidden padding, which guard_types.h asserts.
unsafe impl Plain for Value {}

const DOING: &str = "asking the guard about a connection";

const _: () = assert!(size_of::<PeerKey>() == 40 && size_of::<Value>() == 24);

/// What the guard of an instance keeps of connections whose tokens it has scrubbed.
#[derive(Debug)]
pub struct Peers {
    map: MapHandle,
}

/// What a guard knows of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guarded {
    /// The token of its SYN.
    pub token: Token,
    /// Name of the guard's verdict.
    pub verdict: &'static str,
    /// Number of the rule that decided, from 1.
    pub rule: u32,
    /// When its SYN came, or came again.
    pub time: SystemTime,
}

impl Guarded {
    /// The tag of its token; only a keyed token has one, so ask where the rule accepts nothing else.
    pub fn tag(&self) -> u16 {
        Parts::from(self.token).tag
    }
}

impl Peers {
    /// Opens what the guard of `instance` keeps. That needs root; what is open stays usable when the process gives
    /// its rights up, from Linux 5.19 on also where unprivileged BPF is turned off.
    ///
    /// # Errors
    /// The process is not root, or no guard of this instance is attached on this host.
    pub fn open(instance: &str) -> Result<Peers> {
        let doing = format!("opening what the guard of instance '{instance}' knows of connections");
        privileges::check(&doing)?;
        let Some(state) = State::find().with_context(|| doing.clone())? else {
            bail!("{doing}: there is no guard on this host; {}", remedy(Path::new(instance)));
        };
        let pins = state.instance(instance).pins;
        open_map(&pins)
            .map(|map| Peers { map })
            .with_context(|| format!("{doing}: it has no guard; {}", remedy(&pins)))
    }

    /// The same, of the instance whose maps are pinned in this directory.
    ///
    /// # Errors
    /// The process may not open it, or there is no guard.
    pub fn open_below(pins: &Path) -> Result<Peers> {
        let map = open_map(pins)
            .with_context(|| format!("there is no guard in {}; {}", pins.display(), remedy(pins)))?;
        Ok(Peers { map })
    }

    /// What the guard knows of this connection; nothing if it did not let it in by a token that it scrubs. It goes by
    /// the addresses and ports of the connection, so ask when it is accepted: later they may have been used again, and
    /// behind a translation of addresses on this host they are others. The guard forgets the oldest when there are
    /// too many: see docs/guard.md.
    ///
    /// # Errors
    /// It is not a connected TCP socket, or the kernel refused.
    pub fn of(&self, stream: &impl AsFd) -> Result<Option<Guarded>> {
        let socket = SockRef::from(stream);
        let key =
            (|| Some(key(socket.peer_addr().ok()?.as_socket()?, socket.local_addr().ok()?.as_socket()?)))();
        let key = key.context("that is no connected socket").context(DOING)?;
        // SAFETY: plain data without hidden padding, which guard_types.h asserts.
        let key = unsafe { plain::as_bytes(&key) };
        let Some(bytes) = self.map.lookup(key, MapFlags::ANY).context(DOING)? else { return Ok(None) };
        let mut value = Value::default();
        value.copy_from_bytes(&bytes).ok().context("an entry of a strange size").context(DOING)?;
        Ok(Some(Guarded {
            token: Token(value.token),
            verdict: verdict_name(value.verdict),
            rule: value.rule,
            time: Clock::now().at(value.time_ns),
        }))
    }
}

/// What to do where the guard of the instance is not there whose pins are in this directory.
fn remedy(pins: &Path) -> String {
    format!("attach it with: netoken guard --iface NAME{} --attach --rules FILE", flag_of_pins(pins))
}

fn open_map(pins: &Path) -> Result<MapHandle> {
    Ok(MapHandle::from_pinned_path(pins.join("guard_peers"))?)
}

/// As the guard saw the flow: IPv4 addresses are mapped into IPv6, and the family tells them apart.
fn key(src: SocketAddr, dst: SocketAddr) -> PeerKey {
    let octets = |addr: SocketAddr| match addr.ip().to_canonical() {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    };
    PeerKey {
        saddr: octets(src),
        daddr: octets(dst),
        sport_be: src.port().to_be(),
        dport_be: dst.port().to_be(),
        family: if src.ip().to_canonical().is_ipv4() { 4 } else { 6 },
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_to_write_an_ipv4_address_are_the_same_flow() {
        let key = |src: &str, dst: &str| {
            let key = key(src.parse().unwrap(), dst.parse().unwrap());
            (key.saddr, key.daddr, key.sport_be, key.dport_be, key.family)
        };
        let plain = key("192.0.2.1:7", "192.0.2.2:443");
        assert_eq!(plain, key("[::ffff:192.0.2.1]:7", "[::ffff:192.0.2.2]:443"));
        assert_eq!((plain.0[10..12].to_vec(), plain.2.to_ne_bytes(), plain.4), (vec![255, 255], [0, 7], 4));
        assert_eq!(key("[2001:db8::1]:7", "[2001:db8::2]:443").4, 6);
    }
}
