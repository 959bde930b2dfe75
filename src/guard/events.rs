//! What the guard reports of single packets: reading it from the perf buffer, and what it means.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, SystemTime};

use anyhow::Result;
use plain::Plain;
use serde::Serialize;
use serde::ser::SerializeMap;

use super::counters::{GuardCounters, verdict_name};
use super::program::GuardMaps;
use super::types::{Event, Mode, RawAlert, Severity, Verdict};
use crate::events::buffer::{self, Buffer};
use crate::events::model::Clock;
use crate::token::Token;

// SAFETY: integers and arrays of them, without hidden padding, which guard_types.h asserts.
unsafe impl Plain for Event {}

// SAFETY: the same.
unsafe impl Plain for RawAlert {}

// By their sizes they are told apart, which a buffer rounds up to 8 bytes.
const _: () = assert!(size_of::<Event>() == 80 && size_of::<RawAlert>() + 8 < size_of::<Event>());

/// One packet that could open a connection, and what became of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// Wall-clock time, RFC 3339 in UTC with microseconds.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// Inode number of the network namespace.
    pub netns_inode: u32,
    /// Index of the interface in that namespace.
    pub ifindex: u32,
    /// Source; none if the packet does not show it. The port is 0 if only that is not shown.
    #[serde(flatten, serialize_with = "source")]
    pub src: Option<SocketAddr>,
    /// Destination, the same.
    #[serde(flatten, serialize_with = "destination")]
    pub dst: Option<SocketAddr>,
    /// Initial sequence number.
    pub isn: u32,
    /// Name of the verdict.
    pub verdict: &'static str,
    /// True if it was dropped.
    pub dropped: bool,
    /// True if its tokens did not reach the host.
    pub scrubbed: bool,
    /// `observe`, `mark`, `drop` or `scrub`; none if no rule matches.
    pub mode: Option<&'static str>,
    /// Number of the rule, from 1; 0 is none.
    pub rule: u32,
    /// Its first token.
    pub token: Option<Token>,
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_micros(*time))
}

/// One end of a flow as address and port, with the names that the stamp's events have for them.
fn end<S: serde::Serializer>(
    [addr, port]: [&'static str; 2],
    end: Option<SocketAddr>,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(2))?;
    map.serialize_entry(addr, &end.map(|end| end.ip()))?;
    map.serialize_entry(port, &end.map(|end| end.port()))?;
    map.end()
}

fn source<S: serde::Serializer>(src: &Option<SocketAddr>, serializer: S) -> Result<S::Ok, S::Error> {
    end(["src", "sport"], *src, serializer)
}

fn destination<S: serde::Serializer>(dst: &Option<SocketAddr>, serializer: S) -> Result<S::Ok, S::Error> {
    end(["dst", "dport"], *dst, serializer)
}

/// The name of a mode, as rules call it.
fn mode_name(mode: u32) -> &'static str {
    match Mode(mode) {
        Mode::MODE_OBSERVE => "observe",
        Mode::MODE_MARK => "mark",
        Mode::MODE_DROP => "drop",
        Mode::MODE_SCRUB => "scrub",
        _ => "unknown",
    }
}

/// Whether a packet with this verdict has a token. That may be eight zeros, as no token is.
fn has_token(verdict: u8) -> bool {
    matches!(
        Verdict(verdict.into()),
        Verdict::GUARD_VALID | Verdict::GUARD_DUPLICATE | Verdict::GUARD_SCRUBBED
    ) || (Verdict::GUARD_WRONG_STATIC.0..=Verdict::GUARD_SEEN_FULL.0).contains(&verdict.into())
}

impl Seen {
    /// Reads an event as it came out of the buffer; nothing if it is too short to be one.
    pub fn decode(bytes: &[u8], clock: Clock) -> Option<Seen> {
        let mut event = Event::default();
        event.copy_from_bytes(bytes).ok()?;
        let flow = event.flow;
        let end = |octets: [u8; 16], port_be: u16| {
            let addr = match flow.family {
                4 => Ipv6Addr::from(octets).to_canonical(),
                6 => IpAddr::V6(octets.into()),
                _ => return None,
            };
            Some(SocketAddr::new(addr, u16::from_be(port_be)))
        };
        Some(Seen {
            time: clock.at(event.time_ns),
            netns_inode: event.netns_ino,
            ifindex: event.ifindex,
            src: end(flow.saddr, flow.sport_be),
            dst: end(flow.daddr, flow.dport_be),
            isn: flow.isn,
            verdict: verdict_name(event.verdict.into()),
            dropped: event.dropped != 0,
            scrubbed: event.scrubbed != 0,
            mode: (event.rule != 0).then(|| mode_name(event.mode.into())),
            rule: event.rule,
            token: (event.token != [0; 8] || has_token(event.verdict)).then_some(Token(event.token)),
        })
    }
}

/// So many packets were refused that somebody should know.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Alert {
    /// Wall-clock time, RFC 3339 in UTC with microseconds.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    /// Inode number of the network namespace where the last of them came in.
    pub netns_inode: u32,
    /// Index of the interface there.
    pub ifindex: u32,
    /// `low`, `medium`, `high` or `critical`.
    pub severity: &'static str,
    /// Packets that the instance refused, so far in this window.
    pub refused: u64,
    /// Length of the window in seconds.
    pub within_s: f64,
}

impl Alert {
    /// Reads an alert as it came out of the buffer; nothing if it is too short to be one.
    pub fn decode(bytes: &[u8], clock: Clock) -> Option<Alert> {
        let mut alert = RawAlert::default();
        alert.copy_from_bytes(bytes).ok()?;
        Some(Alert {
            time: clock.at(alert.time_ns),
            netns_inode: alert.netns_ino,
            ifindex: alert.ifindex,
            severity: match Severity(alert.severity.into()) {
                Severity::SEVERITY_LOW => "low",
                Severity::SEVERITY_MEDIUM => "medium",
                Severity::SEVERITY_HIGH => "high",
                Severity::SEVERITY_CRITICAL => "critical",
                _ => "unknown",
            },
            refused: alert.refused,
            within_s: Duration::from_nanos(alert.within_ns).as_secs_f64(),
        })
    }
}

/// What is in the buffer of the guard.
enum Report {
    Seen(Seen),
    Alert(Alert),
}

impl buffer::Event for Report {
    fn decode(bytes: &[u8], clock: Clock) -> Option<Report> {
        let seen = Seen::decode(bytes, clock).map(Report::Seen);
        seen.or_else(|| Alert::decode(bytes, clock).map(Report::Alert))
    }

    fn is_counted(&self) -> bool {
        matches!(self, Report::Seen(_))
    }
}

/// The one reader of the guard's events of an instance.
pub struct Reader<'a> {
    buffer: Buffer<'a, Report>,
    alerts: Vec<Alert>,
}

impl<'a> Reader<'a> {
    /// Opens the buffer. From here on the kernel sends events, until this is dropped.
    ///
    /// # Errors
    /// The kernel refused a perf event.
    pub fn open(maps: &'a GuardMaps) -> Result<Reader<'a>> {
        let handed = || Ok(GuardCounters::read(maps)?.events());
        Ok(Reader { buffer: Buffer::of(&maps.events, &maps.live, handed)?, alerts: Vec::new() })
    }

    /// Waits for events, at most that long, and returns what there is, in the order of each CPU.
    ///
    /// # Errors
    /// The kernel refused to wait.
    pub fn read(&mut self, timeout: Duration) -> Result<Vec<Seen>> {
        let mut all = Vec::new();
        for report in self.buffer.read(timeout)? {
            match report {
                Report::Seen(seen) => all.push(seen),
                Report::Alert(alert) => self.alerts.push(alert),
            }
        }
        Ok(all)
    }

    /// The alerts that came with the events.
    pub fn alerts(&mut self) -> Vec<Alert> {
        std::mem::take(&mut self.alerts)
    }

    /// Of the events that `counters` know of, those for which the buffer had no room. What is in the buffer is
    /// taken out first; the next look returns it.
    ///
    /// # Errors
    /// The kernel refused to read the buffer.
    pub fn lost(&mut self, counters: &GuardCounters) -> Result<u64> {
        self.buffer.lost(counters.events())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token_of(verdict: Verdict) -> Option<Token> {
        let event = Event { verdict: verdict.0 as u8, ..Default::default() };
        // SAFETY: plain data without padding.
        let bytes = unsafe { plain::as_bytes(&event) };
        Seen::decode(bytes, Clock::now()).unwrap().token
    }

    #[test]
    fn eight_zeros_are_a_token_where_there_is_one() {
        assert_eq!(token_of(Verdict::GUARD_WRONG_STATIC), Some(Token([0; 8])));
        assert_eq!(token_of(Verdict::GUARD_VALID), Some(Token([0; 8])));
        assert_eq!(token_of(Verdict::GUARD_MISSING), None);
        assert_eq!(token_of(Verdict::GUARD_CLEAN), None);
    }
}
