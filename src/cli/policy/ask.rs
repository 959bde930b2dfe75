//! `netoken policy test`: which rule decides over a SYN that is described, answered by the kernel's own lookup.

use std::io::{self, Write};
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory};
use serde::Serialize;

use super::super::args::{self, number};
use super::{Common, Progress, read, refuse};
use crate::policy::Policy;
use crate::policy::ask::{Answer, Ask, Sender, Syn};
use crate::policy::compile::{Naming, compile};
use crate::policy::explain::fails;
use crate::policy::names::Names;
use crate::policy::running;
use crate::policy::write::conditions_line;
use crate::privileges;

/// So many rules in front of the one that decides are explained.
const EXPLAINED_MAX: usize = 10;

/// Which rule decides over such a SYN, and why; the kernel's own lookup answers
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  netoken policy test --dst 192.0.2.1 --port 443 --src 10.17.0.5\n  netoken policy test --dst 192.0.2.1 --port 443 --file policy.toml"
)]
pub(super) struct TestArgs {
    /// Ask this policy instead of the one in use; it is not put into use
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,

    /// With --file: a cgroup or interface that does not exist is a warning
    #[arg(long, requires = "file")]
    allow_missing: bool,

    /// Destination address
    #[arg(long, value_name = "ADDRESS")]
    dst: IpAddr,

    /// Destination port
    #[arg(long)]
    port: u16,

    /// Source address [default: the unspecified one]
    #[arg(long, value_name = "ADDRESS")]
    src: Option<IpAddr>,

    /// Source port
    #[arg(long, value_name = "PORT", default_value_t = 40000)]
    src_port: u16,

    /// Mark of the skb
    #[arg(long, default_value = "0", value_parser = number)]
    mark: u32,

    /// Interface that it leaves by [default: none that a rule names]
    #[arg(long, value_name = "NAME")]
    interface: Option<String>,

    /// Cgroup of the socket that sends it [default with --uid: the root]; without --cgroup and --uid it has no sender
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,

    /// User who owns the socket that sends it [default with --cgroup: 0]
    #[arg(long, value_name = "UID|NAME", value_parser = user)]
    uid: Option<User>,

    #[command(flatten)]
    common: Common,
}

/// One user, as one types it.
#[derive(Clone, Debug)]
enum User {
    Id(u32),
    Name(String),
}

fn user(text: &str) -> Result<User, String> {
    match text.parse() {
        Ok(id) => Ok(User::Id(id)),
        Err(_) if text.starts_with(char::is_alphabetic) || text.starts_with('_') => {
            Ok(User::Name(text.to_string()))
        }
        Err(_) => Err("not one user; write it like 1000, or as the name of a user".to_string()),
    }
}

/// The answer, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "decision")]
struct Decision<'a> {
    /// 0 is the default; nothing if no rule matches and there is no default.
    rule: Option<u32>,
    name: Option<&'a str>,
    matches: Option<String>,
    action: Option<String>,
    generation: u64,
    lookups: u32,
}

pub(super) fn run(args: &TestArgs) -> Result<()> {
    args.expect_one_family();
    privileges::check("asking the kernel about a SYN")?;
    args.common.enter()?;
    let syn = args.syn()?;
    let (policy, answer) = match &args.file {
        Some(file) => {
            let checked = read(file, args.allow_missing, &Progress::new(args.common.json))?;
            let compiled =
                compile(&checked.policy, Naming { instance: &args.common.instance, ..Naming::none() }, &[])
                    .map_err(|refused| refuse(&checked.refuse(&refused)))?;
            let ask = Ask::load(None)?;
            ask.program.maps.install(&compiled, None)?;
            (checked.policy, ask.about(&syn)?)
        }
        None => {
            let (state, lock) = args.common.open()?;
            let instance = state.instance(&args.common.instance);
            // Which makes none, where they are of another version.
            drop(instance.maps()?);
            let ask = Ask::load(Some(&instance.pins))?;
            let answer = ask.about(&syn)?;
            let policy = running::read(&instance, &ask.program.maps)?.policy;
            drop(lock);
            (policy, answer)
        }
    };
    tell(args, &syn, &policy, &answer).context("writing to standard output")
}

impl TestArgs {
    /// Ends the process if no SYN could be from there to there.
    fn expect_one_family(&self) {
        if self.src.is_some_and(|src| src.is_ipv4() != self.dst.is_ipv4()) {
            let why = "--src and --dst are addresses of different families";
            args::Args::command().error(ErrorKind::ArgumentConflict, why).exit();
        }
    }

    fn syn(&self) -> Result<Syn> {
        let unspecified: IpAddr = if self.dst.is_ipv4() { [0u8; 4].into() } else { [0u8; 16].into() };
        let names = Names::default();
        let interface = match &self.interface {
            None => (0, 0),
            Some(name) => match names.interface(name)? {
                found if found.index == 0 => bail!("looking for interface '{name}': there is none"),
                found => (found.netns, found.index),
            },
        };
        let sender =
            (self.cgroup.is_some() || self.uid.is_some()).then(|| self.sender(&names)).transpose()?;
        Ok(Syn {
            src: self.src.unwrap_or(unspecified),
            dst: self.dst,
            src_port: self.src_port,
            port: self.port,
            mark: self.mark,
            interface,
            sender,
        })
    }

    fn sender(&self, names: &Names) -> Result<Sender> {
        let uid = match &self.uid {
            None => 0,
            Some(User::Id(id)) => *id,
            Some(User::Name(name)) => {
                names.user(name)?.with_context(|| format!("there is no user '{name}'"))?
            }
        };
        let mut cgroups = Vec::new();
        if let Some(path) = &self.cgroup {
            let mut at = String::from("/");
            for part in [""].into_iter().chain(path.split('/').filter(|part| !part.is_empty())) {
                at.push_str(if at.len() > 1 { "/" } else { "" });
                at.push_str(part);
                match names.cgroup(&at)? {
                    (_, 0) => bail!("looking for cgroup '{at}': there is none"),
                    (_, id) => cgroups.push(id),
                }
            }
        } else if let Ok((_, root)) = names.cgroup("/") {
            cgroups.push(root);
        }
        Ok(Sender { uid, cgroups })
    }
}

fn tell(args: &TestArgs, syn: &Syn, policy: &Policy, answer: &Answer) -> Result<()> {
    let mut out = io::stdout().lock();
    let number = answer.rule.map(|rule| rule.id);
    let rule = number.and_then(|number| policy.rules.get((number as usize).wrapping_sub(1)));
    let action = rule.map(|rule| &rule.decision).or(policy.default.as_ref().filter(|_| number == Some(0)));
    let decision = Decision {
        rule: number,
        name: rule.map(|rule| &*rule.name),
        matches: rule.map(conditions_line),
        action: action.map(ToString::to_string),
        generation: answer.generation,
        lookups: answer.shapes_looked_up,
    };
    if args.common.json {
        writeln!(out, "{}", serde_json::to_string(&decision)?)?;
        return Ok(out.flush()?);
    }
    let asked =
        policy.rules.len().min(number.filter(|number| *number > 0).map_or(usize::MAX, |n| n as usize - 1));
    let first = asked.saturating_sub(EXPLAINED_MAX);
    if first > 0 {
        writeln!(out, "rules 1 to {first} do not match")?;
    }
    for (at, before) in policy.rules.iter().enumerate().take(asked).skip(first) {
        match fails(before, syn) {
            Some(condition) => {
                writeln!(out, "rule {} '{}' does not match: {condition}", at + 1, before.name)?;
            }
            None => bail!(
                "rule {} '{}' should match, but the kernel says otherwise; please report it",
                at + 1,
                before.name
            ),
        }
    }
    let action = decision.action.unwrap_or_default();
    match (number, rule) {
        (Some(number), Some(rule)) => {
            writeln!(out, "rule {number} '{}' decides: {} -> {action}", rule.name, conditions_line(rule))?;
        }
        (Some(_), None) => writeln!(out, "no rule matches; the default decides: {action}")?,
        (None, _) => writeln!(out, "no rule matches, and there is no default: no_policy")?,
    }
    Ok(out.flush()?)
}
