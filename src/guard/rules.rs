//! What the guard is told: what is protected, what is accepted there, and which sources are on a list. Reading the file
//! that says so is in [`super::file`], turning it into what the kernel stores in [`super::compile`] and [`super::sources`].

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use serde::Deserialize;

use crate::keys::RingName;
use crate::policy::cover::hidden;
use crate::policy::values::Prefix;
use crate::token::Token;
use crate::token::keyed::{Bind, Slots};

/// Everything that the file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// How time is cut into slots, if the file says it; the instance keeps what it has otherwise.
    pub slots: Option<Slots>,
    /// In the order of the file; the first that matches decides.
    pub rules: Vec<Rule>,
    /// Sources whose SYNs need no token.
    pub exempt: Vec<Listed>,
    /// Sources whose SYNs are refused, whatever they carry.
    pub blocked: Vec<Listed>,
    /// When a source is blocked automatically; never, if it is not said.
    pub auto_block: Option<AutoBlock>,
    /// When an alert is raised; never, if it is not said.
    pub alerts: Option<Alerts>,
}

/// When a source is blocked that is refused too often.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AutoBlock {
    /// Refused packets that a source may send.
    pub refused: u32,
    /// In this time.
    pub within: Duration,
    /// If it sends more, how long it is blocked.
    pub block_for: Duration,
    /// Leading bits of an IPv4 address that are one source.
    pub v4_bits: u8,
    /// The same of an IPv6 address.
    pub v6_bits: u8,
}

/// How many refused packets of an instance raise an alert.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Alerts {
    /// In this time.
    pub within: Duration,
    /// For each severity, from low to critical; those that are none are never raised.
    pub refused: [Option<u64>; 4],
}

/// Some destinations, and what a SYN to them must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Unique within the file.
    pub name: String,
    /// Destination prefixes.
    pub dst: Vec<Prefix>,
    /// Destination ports, first and last of each range, host order.
    pub ports: Vec<(u16, u16)>,
    /// What happens to a SYN that is refused.
    pub mode: Mode,
    /// Key rings whose tokens are accepted.
    pub keys: Vec<RingName>,
    /// What those may be bound to.
    pub binds: Vec<Bind>,
    /// Tags that are accepted; any if there are none.
    pub tags: Vec<u16>,
    /// Static tokens that are accepted.
    pub tokens: Vec<Token>,
    /// A keyed token is good for more than one flow, as long as its slot is accepted.
    pub may_repeat: bool,
    /// Tokens of SYNs that go on do not reach the host.
    pub scrub: bool,
}

/// What happens to a SYN that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// It is counted, and goes on.
    Observe,
    /// It goes on, and the mark of its skb says what is thought of it.
    Mark(Mark),
    /// It goes no further.
    Drop,
    /// Nothing is refused: tokens are not checked, only scrubbed.
    Scrub,
}

/// What the bits of `mask` in an skb's mark become.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mark {
    /// Where the SYN may pass.
    pub valid: u32,
    /// Where it would be refused.
    pub refused: u32,
    /// Which bits are changed; all, if it is not said.
    #[serde(default = "all_bits")]
    pub mask: u32,
}

fn all_bits() -> u32 {
    u32::MAX
}

/// A source prefix on a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Listed {
    /// Which sources.
    pub src: Prefix,
    /// When it is no longer on the list; never, if it is not said.
    pub until: Option<SystemTime>,
}

impl Rule {
    /// Whether it is about all that the other one is about.
    fn covers(&self, other: &Rule) -> bool {
        let ports =
            |(first, last): (u16, u16)| self.ports.iter().any(|(from, to)| *from <= first && last <= *to);
        let dst = |dst: Prefix| self.dst.iter().any(|prefix| prefix.covers(dst));
        other.dst.iter().copied().all(dst) && other.ports.iter().copied().all(ports)
    }
}

impl Listed {
    /// Whether it is still on the list.
    pub fn is_on(&self, now: SystemTime) -> bool {
        self.until.is_none_or(|until| until > now)
    }
}

/// How many entries of a list have ended.
pub fn ended(list: &[Listed]) -> usize {
    let now = SystemTime::now();
    list.iter().filter(|listed| !listed.is_on(now)).count()
}

impl Rules {
    /// The key rings that its rules accept.
    pub fn rings(&self) -> BTreeSet<RingName> {
        self.rules.iter().flat_map(|rule| rule.keys.iter().copied()).collect()
    }

    /// Whether a rule wants marks, which XDP does not have.
    pub fn marks(&self) -> bool {
        self.rules.iter().any(|rule| matches!(rule.mode, Mode::Mark(_)))
    }

    /// Entries of the list of blocked sources that block something of a prefix now.
    pub fn blocking(&self, prefix: Prefix) -> Vec<Prefix> {
        let now = SystemTime::now();
        let is_exempt =
            |src: Prefix| self.exempt.iter().any(|exempt| exempt.is_on(now) && exempt.src.covers(src));
        let blocked = self.blocked.iter().filter(|blocked| blocked.is_on(now)).map(|blocked| blocked.src);
        blocked
            .filter(|src| {
                (src.covers(prefix) && !is_exempt(prefix)) || (prefix.covers(*src) && !is_exempt(*src))
            })
            .collect()
    }

    /// What is worth a look: rules that can never match because one earlier rule matches all of it. What several earlier
    /// rules only cover together is not found.
    pub fn warnings(&self) -> Vec<String> {
        let hides = |at: usize, rule: &Rule| self.rules[..at].iter().find(|earlier| earlier.covers(rule));
        let hidden_by = |(at, rule)| hides(at, rule).map(|earlier| hidden(&rule.name, &earlier.name));
        self.rules.iter().enumerate().filter_map(hidden_by).collect()
    }

    /// What a person has to know of entries that are on the lists and have ended; nothing if there are none. `of` is whose
    /// entries they are, where that is not clear.
    pub fn expired(&self, of: &str) -> Option<String> {
        match ended(&self.exempt) + ended(&self.blocked) {
            0 => None,
            1 => Some(format!("1 entry{of} has expired")),
            count => Some(format!("{count} entries{of} have expired")),
        }
    }

    /// The same as the summary, and how many entries of the lists have ended.
    pub fn summary_now(&self) -> String {
        let expired = self.expired("").map_or(String::new(), |expired| format!("; {expired}"));
        self.summary() + &expired
    }

    /// One line for a person.
    pub fn summary(&self) -> String {
        let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        format!(
            "{}, {} exempt, {} blocked",
            count(self.rules.len(), "rule"),
            count(self.exempt.len(), "prefix").replace("prefixs", "prefixes"),
            count(self.blocked.len(), "prefix").replace("prefixs", "prefixes")
        )
    }
}
