//! What may be typed, and the checked value that it becomes.

use std::collections::HashSet;
use std::path::PathBuf;

use anyhow::Result;
use clap::error::ErrorKind;
use clap::{ArgGroup, CommandFactory, Parser, Subcommand};

use super::told::Said;
use super::{guard::GuardArgs, key::KeyArgs, policy::PolicyArgs, token::TokenArgs};
use crate::hooks::clsact::Place;
use crate::hooks::egress::Hook;
use crate::hooks::link::find_link;
use crate::hooks::netlink::Link;
use crate::note::quoted;
use crate::state::{check_name, instance_flag};
use crate::token::Token;

// Each explanation on a line of its own: columns would be broken by narrow terminals.
const EXAMPLES: &str = "\
Examples:
  Stamp every SYN with the default token, and watch:
    netoken --iface eth0 --attach
  Stamp with a token of your own, and return:
    netoken --iface eth0 --attach --quiet --token 00112233aabbccdd
  Stamp, skip or drop by rules:
    netoken --iface eth0 --attach --policy p.toml
  Make a key for keyed tokens:
    netoken key new edge
  Let only SYNs with a right token in:
    netoken guard --iface eth0 --attach --rules guard.toml
  See what is attached, on every interface:
    netoken --query
  See it with the tool that you know:
    tc filter show dev eth0 egress
  Remove it, and the clsact qdisc if nobody else uses it:
    netoken --iface eth0 --destroy

Exit codes: 0 done, 1 failed, 2 wrong usage.";

/// What goes with `--attach` goes with none of these. Said of each flag, since clap answers for a group with all
/// of its flags, also those that nobody typed.
const OTHER_MODES: [&str; 3] = ["query", "detach", "destroy"];

/// Writes a token into the first packet of TCP connections, as a TCP option, in the kernel.
#[derive(Debug, Parser)]
#[command(version, after_help = EXAMPLES, arg_required_else_help = true)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
#[command(group = ArgGroup::new("mode").required(true).args(["attach", "query", "detach", "destroy"]))]
pub struct Args {
    #[command(subcommand)]
    pub(super) command: Option<Command>,

    /// Interface to act on; may be given more than once
    #[arg(short, long = "iface", visible_alias = "interface", value_name = "NAME")]
    iface: Vec<String>,

    /// Attach, or replace in place, and stream metrics until Ctrl-C; stays attached
    #[arg(long, requires = "iface", help_heading = "What to do")]
    attach: bool,

    /// Show what is attached, with policies and counters; without --iface on all interfaces of all known network
    /// namespaces, and instances that have no filter there
    #[arg(long, help_heading = "What to do")]
    query: bool,

    /// Remove netoken's own filter; policy and counters stay for the next --attach
    #[arg(long, requires = "iface", help_heading = "What to do")]
    detach: bool,

    /// Remove the filter, the clsact qdisc if we made it and nobody else uses it, and with the last filter of
    /// the instance its policy and counters; without --iface on all interfaces of this network namespace
    #[arg(long, help_heading = "What to do")]
    destroy: bool,

    /// Token to stamp every SYN with, 16 hexadecimal digits [default: 4e45544f4b454e31, "NETOKEN1"]
    #[arg(long, value_name = "HEX", help_heading = "With --attach", conflicts_with = "policy", conflicts_with_all = OTHER_MODES)]
    token: Option<Token>,

    /// Policy file: what to stamp, skip or drop; SIGHUP loads it again while streaming
    #[arg(long, value_name = "FILE", help_heading = "With --attach", conflicts_with_all = OTHER_MODES)]
    policy: Option<PathBuf>,

    /// Load the policy file again whenever it, or a file that it names, changes
    #[arg(long, requires = "policy", conflicts_with = "quiet", help_heading = "With --attach", conflicts_with_all = OTHER_MODES)]
    watch: bool,

    /// A cgroup or interface in the policy that does not exist is a warning
    #[arg(long, requires = "policy", help_heading = "With --attach", conflicts_with_all = OTHER_MODES)]
    allow_missing: bool,

    /// Attach and return at once
    #[arg(long, help_heading = "With --attach", conflicts_with_all = OTHER_MODES)]
    quiet: bool,

    /// Send one event for every N SYNs of the same verdict and CPU; counters always count all [default: as it is
    /// attached already, or 1]
    #[arg(long, value_name = "N", help_heading = "With --attach", conflicts_with_all = OTHER_MODES,
          value_parser = clap::value_parser!(u32).range(1..))]
    sample: Option<u32>,

    /// Remove everything again when the stream ends, also what was attached before
    #[arg(long, help_heading = "With --attach", conflicts_with = "quiet", conflicts_with_all = OTHER_MODES)]
    detach_on_exit: bool,

    /// Where to attach: clsact is a filter, which tc filter show lists; tcx, from Linux 6.6 on, is in front of all filters
    /// [default: where it is already, else clsact]
    #[arg(long, value_enum, hide_possible_values = true, value_name = "clsact|tcx", help_heading = "With --attach", conflicts_with_all = OTHER_MODES)]
    hook: Option<Hook>,

    /// Place among the filters of the interface, 1 to 65535, lower runs first [default: in front of those there]
    #[arg(long, value_name = "N", help_heading = "With --attach", conflicts_with_all = OTHER_MODES, value_parser = clap::value_parser!(u16).range(1..))]
    priority: Option<u16>,

    /// Handle of the filter within its priority [default: the next free one]
    #[arg(long, value_name = "N", help_heading = "With --attach", conflicts_with_all = OTHER_MODES, value_parser = handle)]
    handle: Option<u32>,

    /// Kind byte of the TCP option, 253 or 254 (RFC 4727) [default: as it is attached already, or 253]
    #[arg(long, value_name = "KIND",
          help_heading = "With --attach", conflicts_with_all = OTHER_MODES, value_parser = clap::value_parser!(u8).range(253..=254))]
    option_kind: Option<u8>,

    /// Experiment identifier of the option (RFC 6994) [default: as it is attached already, or 0x4e54]
    #[arg(long, value_name = "ID", help_heading = "With --attach", conflicts_with_all = OTHER_MODES, value_parser = exid)]
    exid: Option<u16>,

    /// Length of a time slot of keyed tokens, in seconds; both sides have to agree [default: what the instance has,
    /// or 16]
    #[arg(long, value_name = "SECONDS", help_heading = "With --attach", conflicts_with_all = OTHER_MODES,
          value_parser = clap::value_parser!(u32).range(1..=3600))]
    slot: Option<u32>,

    /// Act on the interfaces of another network namespace: a name from `ip netns`, or a path
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,

    /// Which set of policy and counters to use [default: default; with --query: all]
    #[arg(long, value_name = "NAME", value_parser = instance)]
    instance: Option<String>,

    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// What is not about hooks.
#[derive(Debug, Subcommand)]
pub(super) enum Command {
    Policy(PolicyArgs),
    Key(KeyArgs),
    Token(TokenArgs),
    Guard(GuardArgs),
}

/// What every command needs to know.
#[derive(Debug)]
pub(super) struct Scope {
    pub ifaces: Vec<String>,
    pub netns: Option<String>,
    pub instance: String,
    /// The instance was named.
    pub is_one_instance: bool,
    pub json: bool,
}

/// What to do.
#[derive(Debug)]
pub(super) enum Mode {
    Attach(AttachOptions),
    Query,
    Detach,
    Destroy,
}

/// How to attach.
#[derive(Debug)]
pub(super) struct AttachOptions {
    pub policy: PolicySource,
    pub watch: bool,
    pub allow_missing: bool,
    pub quiet: bool,
    pub detach_on_exit: bool,
    pub said: Said,
    /// Where it is already, if nothing is said.
    pub hook: Option<Hook>,
    pub place: Place,
    /// Length of a slot in seconds.
    pub slot_s: Option<u32>,
}

/// Where the policy comes from.
#[derive(Debug)]
pub(super) enum PolicySource {
    /// What the instance has, or else the default token for everything.
    Keep,
    Token(Token),
    File(PathBuf),
}

impl Args {
    pub(super) fn check(mut self) -> Result<(Mode, Scope)> {
        let mut seen = HashSet::new();
        self.iface.retain(|name| seen.insert(name.clone()));
        let mode = if self.query {
            Mode::Query
        } else if self.detach {
            Mode::Detach
        } else if self.destroy {
            Mode::Destroy
        } else {
            let place = Place { priority: self.priority, handle: self.handle };
            if self.hook == Some(Hook::Tcx) && place.is_chosen() {
                let why =
                    "--priority and --handle are about filters of clsact; at tcx ours is in front of all";
                Args::command().error(ErrorKind::ArgumentConflict, why).exit();
            }
            Mode::Attach(AttachOptions {
                policy: match (self.token, self.policy) {
                    (Some(token), _) => PolicySource::Token(token),
                    (_, Some(path)) => PolicySource::File(path),
                    _ => PolicySource::Keep,
                },
                watch: self.watch,
                allow_missing: self.allow_missing,
                quiet: self.quiet,
                detach_on_exit: self.detach_on_exit,
                said: Said { option_kind: self.option_kind, exid: self.exid, sample: self.sample },
                hook: self.hook,
                place,
                slot_s: self.slot,
            })
        };
        let scope = Scope {
            ifaces: self.iface,
            netns: self.netns,
            is_one_instance: self.instance.is_some(),
            instance: self.instance.unwrap_or("default".to_string()),
            json: self.json,
        };
        Ok((mode, scope))
    }
}

impl Scope {
    /// The interfaces that were named, among those that there are; each once, as one may have several names.
    pub fn find(&self, links: &[Link]) -> Result<Vec<Link>> {
        let netns = self.netns.as_deref().unwrap_or_default();
        let mut found: Vec<Link> = Vec::new();
        for name in &self.ifaces {
            let link = find_link(links, name, netns)?;
            if !found.iter().any(|known| known.index == link.index) {
                found.push(link.clone());
            }
        }
        Ok(found)
    }

    /// The same; all that there are, if none was named.
    pub fn find_or_all(&self, links: Vec<Link>) -> Result<Vec<Link>> {
        if self.ifaces.is_empty() { Ok(links) } else { self.find(&links) }
    }

    /// Whether an instance is one of those that were asked for. What has lost its pins may be of any, and is replaced and
    /// removed as one of the instance that is named; so it is shown where that would be done.
    pub fn wants(&self, instance: Option<&str>) -> bool {
        let is_place_named = !self.ifaces.is_empty() || self.netns.is_some();
        !self.is_one_instance || instance.map_or(is_place_named, |instance| instance == self.instance)
    }

    /// The flags that lead another command to the same place.
    pub fn flags(&self, iface: &str) -> String {
        let mut flags = format!("--iface {}", quoted(iface));
        if let Some(netns) = &self.netns {
            flags.push_str(&format!(" --netns {}", quoted(netns)));
        }
        flags.push_str(&instance_flag(&self.instance));
        flags
    }
}

pub(super) fn number(text: &str) -> Result<u32, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| "not a number of 32 bits; write it like 7 or 0x7".to_string())
}

pub(super) fn handle(text: &str) -> Result<u32, String> {
    match number(text)? {
        0 => Err("handles count from 1; leave the flag away to let the kernel choose".to_string()),
        handle => Ok(handle),
    }
}

pub(super) fn exid(text: &str) -> Result<u16, String> {
    let id = number(text).ok().and_then(|id| id.try_into().ok());
    id.ok_or_else(|| "an experiment identifier is a number of 16 bits, like 0x4e54".to_string())
}

pub(super) fn instance(text: &str) -> Result<String> {
    check_name(text).map(|()| text.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn what_makes_no_sense_is_wrong_usage() {
        for line in [
            "netoken",
            "netoken --iface eth0",
            "netoken --attach",
            "netoken --iface eth0 --attach --detach",
            "netoken --iface eth0 --query --token 0011223344556677",
            "netoken --iface eth0 --attach --token 00",
            "netoken --iface eth0 --attach --sample 0",
            "netoken --iface eth0 --attach --quiet --detach-on-exit",
            "netoken --iface eth0 --attach --option-kind 8",
            "netoken --iface eth0 --attach --instance a.b",
            "netoken --iface eth0 --attach --exid 0x10000",
            "netoken --iface eth0 --attach --watch",
            "netoken --iface eth0 policy show",
            "netoken policy",
            "netoken policy load",
            "netoken policy test --dst 192.0.2.1",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn the_first_users_flags_work() {
        for line in [
            "netoken --iface eth0 --attach",
            "netoken -i eth0 -i eth1 --attach --quiet",
            "netoken --interface eth0 --destroy",
            "netoken --query --json",
            "netoken --destroy",
            "netoken policy check p.toml",
            "netoken policy show --instance edge --json",
        ] {
            assert!(parse(line).is_ok(), "{line}");
        }
    }
}
