//! What an event means. Nothing here reads or prints.

use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, SystemTime};

use nix::time::{ClockId, clock_gettime};
use plain::Plain;
use serde::Serialize;

use crate::counters::verdict_name;
use crate::token::Token;
use crate::types::{Event, Verdict};

// SAFETY: integers and arrays of them, without hidden padding, which types.h asserts.
unsafe impl Plain for Event {}

const _: () = assert!(size_of::<Event>() == 80);

/// One SYN and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Syn {
    /// Wall-clock time, RFC 3339 in UTC with microseconds.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// Inode number of the network namespace.
    pub netns_inode: u32,
    /// Index of the interface in that namespace.
    pub ifindex: u32,
    /// Source address.
    pub src: IpAddr,
    /// Source port.
    pub sport: u16,
    /// Destination address.
    pub dst: IpAddr,
    /// Destination port.
    pub dport: u16,
    /// Initial sequence number.
    pub isn: u32,
    /// Name of the verdict.
    pub verdict: &'static str,
    /// True if it was not sent.
    pub dropped: bool,
    /// Low bits of the number of the policy that decided; 0 if none did.
    #[serde(skip)]
    pub generation: u32,
    /// Number of the rule in that policy, from 1; 0 is the default or, with `no_policy`, none.
    pub rule: u32,
    /// The token of the rule.
    pub token: Option<Token>,
    /// Length of the TCP options before, in bytes.
    pub old_options_len: u8,
    /// Length of the TCP options after.
    pub new_options_len: u8,
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_micros(*time))
}

/// Turns the kernel's monotonic time into wall-clock time.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    boot: SystemTime,
}

impl Clock {
    /// Reads both clocks now; take a new one now and then, since the wall clock can be set.
    pub fn now() -> Clock {
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from);
        Clock { boot: SystemTime::now() - monotonic }
    }

    pub(crate) fn at(self, monotonic_ns: u64) -> SystemTime {
        since_epoch(self.boot + Duration::from_nanos(monotonic_ns))
    }
}

/// A time that can be printed. On a machine whose clock was never set, or in a time namespace, what is computed
/// from the time since boot can lie before 1970, where RFC 3339 times do not begin.
pub fn since_epoch(time: SystemTime) -> SystemTime {
    time.max(SystemTime::UNIX_EPOCH)
}

impl Syn {
    /// Reads an event as it came out of the buffer; nothing if it is too short to be one.
    pub fn decode(bytes: &[u8], clock: Clock) -> Option<Syn> {
        let mut event = Event::default();
        event.copy_from_bytes(bytes).ok()?;
        let flow = event.flow;
        let addr = |octets: [u8; 16]| match flow.family {
            4 => Ipv6Addr::from(octets).to_canonical(),
            _ => IpAddr::V6(octets.into()),
        };
        let stamped = u32::from(event.verdict) == Verdict::VERDICT_STAMPED.0;
        Some(Syn {
            time: clock.at(event.time_ns),
            netns_inode: event.netns_ino,
            ifindex: event.ifindex,
            src: addr(flow.saddr),
            sport: u16::from_be(flow.sport_be),
            dst: addr(flow.daddr),
            dport: u16::from_be(flow.dport_be),
            isn: flow.isn,
            verdict: verdict_name(event.verdict.into()),
            dropped: event.dropped != 0,
            generation: event.generation,
            rule: event.rule,
            // A rule that stamps may have a token of zeros; other rules have nothing but zeros.
            token: (stamped || event.token != [0; 8]).then_some(Token(event.token)),
            old_options_len: event.old_options_len_bytes,
            new_options_len: event.new_options_len_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::Flow;

    #[test]
    fn a_clock_that_was_never_set_is_no_panic() {
        let clock = Clock { boot: SystemTime::UNIX_EPOCH - Duration::from_secs(10) };
        let bytes = [0; size_of::<Event>()];
        let syn = Syn::decode(&bytes, clock).unwrap();
        assert!(serde_json::to_string(&syn).unwrap().contains("1970-01-01T00:00:00"));
    }

    #[test]
    fn an_event_is_read_as_the_kernel_wrote_it() {
        let event = Event {
            time_ns: 1_500_000_000,
            ifindex: 7,
            flow: Flow {
                saddr: "10.0.0.1".parse::<std::net::Ipv4Addr>().unwrap().to_ipv6_mapped().octets(),
                daddr: "10.0.0.2".parse::<std::net::Ipv4Addr>().unwrap().to_ipv6_mapped().octets(),
                sport_be: 40000u16.to_be(),
                dport_be: 80u16.to_be(),
                isn: 0xdead_beef,
                family: 4,
                ..Default::default()
            },
            verdict: Verdict::VERDICT_STAMPED.0 as u8,
            token: *b"NETOKEN1",
            old_options_len_bytes: 20,
            new_options_len_bytes: 32,
            ..Default::default()
        };
        // SAFETY: Event is plain data.
        let bytes = unsafe { plain::as_bytes(&event) };
        let clock = Clock { boot: SystemTime::UNIX_EPOCH };
        let syn = Syn::decode(bytes, clock).unwrap();
        assert_eq!((syn.src.to_string(), syn.sport), ("10.0.0.1".to_string(), 40000));
        assert_eq!((syn.dst.to_string(), syn.dport), ("10.0.0.2".to_string(), 80));
        assert_eq!((syn.verdict, syn.isn, syn.token), ("stamped", 0xdead_beef, Some(Token::DEFAULT)));
        assert!(serde_json::to_string(&syn).unwrap().contains("\"time\":\"1970-01-01T00:00:01.500000Z\""));
        assert_eq!(Syn::decode(&bytes[..79], clock), None);

        let zeros = Event { token: [0; 8], ..event };
        // SAFETY: Event is plain data.
        let token = |event: &Event| Syn::decode(unsafe { plain::as_bytes(event) }, clock).unwrap().token;
        assert_eq!(token(&zeros), Some(Token([0; 8])), "stamped with zeros");
        let skipped = Event { verdict: Verdict::VERDICT_SKIPPED.0 as u8, ..zeros };
        assert_eq!(token(&skipped), None, "skipped");
    }
}
