//! What an attached program was told, for `--query`.

use std::fmt;
use std::io::{self, Write};

use serde::Serialize;

use crate::guard;
use crate::hooks::loaded::{Loaded, Role};
use crate::hooks::tcx;
use crate::keys::RingName;
use crate::note::quoted;
use crate::program::{DEFAULT_EXID, DEFAULT_KIND};
use crate::state::{DIR_VARIABLE, dir_path, instance_flag};
use crate::token::keyed::Slots;
use crate::types;

/// What a program may do that sees packets before the stamp.
pub(super) const RISK: &str = "before ours and may end a packet's way there";

/// What the program was told whose place another one takes.
pub(super) enum Before {
    /// There was none.
    Nothing,
    Known(Told),
    /// Another version of netoken has loaded it.
    Unknown,
}

impl Before {
    pub fn of(loaded: Option<Loaded>) -> Before {
        match loaded {
            None => Before::Nothing,
            Some(loaded) => Told::of(&loaded).map_or(Before::Unknown, Before::Known),
        }
    }

    fn known(&self) -> Option<&Told> {
        match self {
            Before::Known(told) => Some(told),
            _ => None,
        }
    }

    /// What a person has to know of one that is told `now`.
    pub fn note(&self, now: &Told) -> Option<String> {
        match self {
            Before::Nothing => None,
            Before::Known(before) => now.changes(before).map(|changes| format!("this attach changed {changes}")),
            Before::Unknown => Some(
                "it takes the place of a program of another version, of which nobody knows what it was told: what was not \
                 said now of --sample, --option-kind and --exid is as usual"
                    .to_string(),
            ),
        }
    }
}

/// What a person is told of filters of others that are in front; nothing if there are none.
pub(super) fn filters_remark(count: usize, risk: &str) -> Option<String> {
    match count {
        0 => None,
        1 => Some(format!("another filter runs {risk}")),
        count => Some(format!("{count} other filters run {risk}")),
    }
}

/// What a person is told of programs in whose place another one is, and whose pins were lost; nothing if there were none.
pub(super) fn lost_note(count: usize) -> Option<String> {
    match count {
        0 => None,
        1 => Some("it takes the place of a program whose counters were lost".to_string()),
        count => Some(format!("it takes the place of {count} programs whose counters were lost")),
    }
}

/// What a person has to know of the slots of an instance, by which its stamp and its guard go; nothing if they are what
/// they were.
pub(super) fn slots_note(instance: &str, (before, now): (Option<Slots>, Option<Slots>)) -> Option<String> {
    let (before, now) = before.zip(now)?;
    let mut changes = Vec::new();
    if before.length_s() != now.length_s() {
        changes.push(format!(
            "slots of keyed tokens have {} s now, and had {} s; who checks tokens has to agree",
            now.length_s(),
            before.length_s()
        ));
    }
    let window = |slots: Slots| format!("{} slots behind and {} ahead", slots.behind(), slots.ahead());
    if window(before) != window(now) {
        changes.push(format!("tokens are accepted {} now, and were {}", window(now), window(before)));
    }
    (!changes.is_empty()).then(|| format!("instance '{instance}': {}", changes.join("; ")))
}

/// What a person has to know of a key ring that rules of the guard name and that has no key.
pub(super) fn keyless_note(instance: &str, ring: RingName) -> String {
    format!(
        "instance '{instance}': ring '{ring}' has no key: the guard's rules in use that name it refuse all its tokens; {}",
        load_keys(instance)
    )
}

/// What helps a ring without keys.
pub(super) fn load_keys(instance: &str) -> String {
    format!("copy its key file here, then: netoken key load{}", instance_flag(instance))
}

/// What is said of a program below the table in which it is listed.
pub(super) struct Remarks<'a> {
    /// The one that attached it.
    pub command: &'a str,
    /// May be empty.
    pub netns: &'a str,
    pub interface: &'a str,
    pub instance: Option<&'a str>,
    pub told: Option<&'a Told>,
    pub outdated: bool,
    pub link_changed: bool,
    /// Foreign filters.
    pub filters_before: usize,
    /// Programs at tcx, in front of all filters.
    pub tcx_before: usize,
    /// What those in front may do.
    pub risk: &'a str,
    /// What puts ours in front of those at tcx.
    pub to_the_front: &'a str,
    /// What else there is to know.
    pub remark: Option<&'a str>,
}

impl Remarks<'_> {
    /// Nothing, if all is as usual.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let place = match self.netns.is_empty() {
            true => self.interface.to_string(),
            false => format!("{} in {}", self.interface, self.netns),
        };
        if self.instance.is_none() {
            let dir = dir_path();
            writeln!(
                out,
                "{place}: its policy and counters are not in {} ({DIR_VARIABLE} names another place); it goes on until --attach takes \
                 its place or --destroy removes it",
                dir.display()
            )?;
        }
        if let Some(told) = self.told.filter(|told| !told.is_usual()) {
            writeln!(out, "{place}: {told}")?;
        }
        let again = self.attach_again();
        if self.outdated {
            writeln!(
                out,
                "{place}: another version of netoken is attached, and no command changes what it goes by; replace it: {again}"
            )?;
        }
        if self.link_changed {
            writeln!(
                out,
                "{place}: its link header is another one than when it was attached to, and no SYN is found in its packets; \
                 attach again: {again}"
            )?;
        }
        if let Some(remark) = self.remark {
            writeln!(out, "{place}: {remark}")?;
        }
        if let Some(remark) = tcx::remark(self.tcx_before, self.risk, self.to_the_front) {
            writeln!(out, "{place}: {remark}")?;
        }
        match filters_remark(self.filters_before, self.risk) {
            Some(remark) => writeln!(out, "{place}: {remark}"),
            None => Ok(()),
        }
    }

    /// The command that does.
    fn attach_again(&self) -> String {
        let flag = |name: &str, value: &str| match value {
            "" | "default" => String::new(),
            value => format!(" --{name} {}", quoted(value)),
        };
        let (netns, instance) =
            (flag("netns", self.netns), flag("instance", self.instance.unwrap_or_default()));
        format!("{} --iface {}{netns}{instance} --attach", self.command, quoted(self.interface))
    }
}

/// What a program was told when it was attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Told {
    pub option_kind: u8,
    pub exid: u16,
    /// Of so many packets of the same verdict on a CPU, one is sent as an event.
    pub sample: u32,
}

/// What the command line says of that.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Said {
    pub option_kind: Option<u8>,
    pub exid: Option<u16>,
    pub sample: Option<u32>,
}

impl Said {
    /// What a program is told: what is not said is as it was, or as usual. Who upgrades must not have to know what was
    /// said long ago.
    pub fn over(self, before: &Before) -> Told {
        let usual = Told { option_kind: DEFAULT_KIND, exid: DEFAULT_EXID, sample: 1 };
        let before = before.known().unwrap_or(&usual);
        Told {
            option_kind: self.option_kind.unwrap_or(before.option_kind),
            exid: self.exid.unwrap_or(before.exid),
            sample: self.sample.unwrap_or(before.sample),
        }
    }
}

impl Told {
    /// Nothing if another version of netoken has loaded it.
    pub fn of(loaded: &Loaded) -> Option<Told> {
        match loaded.role {
            Role::Stamp => loaded.config().map(Told::from),
            Role::Guard | Role::GuardXdp => loaded.guard_config().map(Told::from),
        }
    }

    /// What one that takes the place of another was told otherwise, in one line; nothing if all is as it was.
    fn changes(&self, before: &Told) -> Option<String> {
        let changes = [
            (before.sample != self.sample)
                .then(|| format!("--sample from {} to {}", before.sample, self.sample)),
            (before.option_kind != self.option_kind)
                .then(|| format!("--option-kind from {} to {}", before.option_kind, self.option_kind)),
            (before.exid != self.exid)
                .then(|| format!("--exid from {:#06x} to {:#06x}", before.exid, self.exid)),
        ];
        let changes: Vec<String> = changes.into_iter().flatten().collect();
        (!changes.is_empty()).then(|| changes.join(", "))
    }

    /// Whether all of it is as if nothing was said.
    fn is_usual(&self) -> bool {
        (self.option_kind, self.exid, self.sample) == (DEFAULT_KIND, DEFAULT_EXID, 1)
    }
}

impl From<types::Config> for Told {
    fn from(config: types::Config) -> Told {
        Told { option_kind: config.option_kind, exid: config.exid, sample: config.sample }
    }
}

impl From<guard::types::Config> for Told {
    fn from(config: guard::types::Config) -> Told {
        Told { option_kind: config.option_kind, exid: config.exid, sample: config.sample }
    }
}

impl fmt::Display for Told {
    /// What is not as it is if nothing is said.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.option_kind != DEFAULT_KIND {
            parts.push(format!("option kind {}", self.option_kind));
        }
        if self.exid != DEFAULT_EXID {
            parts.push(format!("ExID {:#06x}", self.exid));
        }
        if self.sample != 1 {
            parts.push(format!("events for one of {} SYNs", self.sample));
        }
        f.write_str(&parts.join(", "))
    }
}
