//! `netoken policy add` and `del`: quick changes of what is in use. The file that it came from is left alone.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use clap::{ArgGroup, Args};

use super::{Common, load_keys, refuse, tell_loaded, warn};
use crate::policy::read::{Options, read_text};
use crate::policy::report::Report;
use crate::policy::running::{self, LoadError, Running};
use crate::policy::{Decision, Policy, Rule, cover};
use crate::privileges;
use crate::program::Maps;
use crate::state::{Instance, instance_flag};

/// Add a rule to the policy in use; the file that it came from is left alone
#[derive(Debug, Args)]
#[command(
    after_help = "Example, for two ports of one prefix:\n  netoken policy add --name web --dst 192.0.2.0/24 --port 80 --port 443 \\\n      --action stamp --token 0011223344556677 --last"
)]
#[command(group = ArgGroup::new("place").args(["before", "after", "last"]))]
pub(super) struct AddArgs {
    /// Name of the rule
    #[arg(long)]
    name: String,

    /// What happens: stamp, skip or drop
    #[arg(long)]
    action: String,

    /// Token to stamp with
    #[arg(long)]
    token: Option<String>,

    /// What to do if it cannot be stamped: pass or drop
    #[arg(long, value_name = "WHAT")]
    when_full: Option<String>,

    /// In front of the rule of this name [default: in front of all]
    #[arg(long, value_name = "NAME")]
    before: Option<String>,

    /// Behind the rule of this name
    #[arg(long, value_name = "NAME")]
    after: Option<String>,

    /// Behind all rules
    #[arg(long)]
    last: bool,

    // In front of the conditions, whose heading is for all that stand behind it.
    #[command(flatten)]
    common: Common,

    #[command(flatten)]
    conditions: Conditions,
}

/// Every condition may be given more than once: one of the values has to fit.
#[derive(Debug, Args)]
#[command(next_help_heading = "Conditions, all of which must hold; each may be given more than once")]
struct Conditions {
    /// Interface that it leaves by
    #[arg(long, value_name = "NAME")]
    interface: Vec<String>,
    /// Source prefix
    #[arg(long, value_name = "PREFIX")]
    src: Vec<String>,
    /// Destination prefix
    #[arg(long, value_name = "PREFIX")]
    dst: Vec<String>,
    /// Source port or range
    #[arg(long, value_name = "PORT|RANGE")]
    src_port: Vec<String>,
    /// Destination port or range
    #[arg(long, value_name = "PORT|RANGE")]
    port: Vec<String>,
    /// Mark, with /MASK if not all bits count
    #[arg(long, value_name = "MARK")]
    mark: Vec<String>,
    /// Cgroup of the sender
    #[arg(long, value_name = "PATH")]
    cgroup: Vec<String>,
    /// User id, range of them or user name of the sender
    #[arg(long, value_name = "UID|RANGE|NAME")]
    uid: Vec<String>,
    /// The negation of a condition, like port=443
    #[arg(long, value_name = "KEY=VALUE")]
    not: Vec<String>,
}

/// Remove rules from the policy in use; the file that it came from is left alone
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  netoken policy del web")]
pub(super) struct DelArgs {
    /// Names of the rules
    #[arg(required = true)]
    names: Vec<String>,

    #[command(flatten)]
    common: Common,
}

pub(super) fn add(args: &AddArgs) -> Result<()> {
    args.common.enter()?;
    let options = Options { is_typed: true, ..Options::default() };
    let checked = read_text("(command line)", &args.toml()?, &options).map_err(|report| refuse(&report))?;
    warn(&checked.report);
    let sources = checked.report.sources;
    let rule = checked.policy.rules.into_iter().next().context("the command line makes no rule")?;
    change(&args.common, |policy| {
        if policy.rules.iter().any(|other| other.name == rule.name) {
            bail!(
                "adding rule '{}': there is one of that name; remove it first: netoken policy del {0}{1}",
                rule.name,
                instance_flag(&args.common.instance)
            );
        }
        let place = match (&args.before, &args.after) {
            (Some(name), _) => find(&args.common, policy, name)?,
            (_, Some(name)) => find(&args.common, policy, name)? + 1,
            _ if args.last => policy.rules.len(),
            _ => 0,
        };
        let problems = cover::warning_behind(&policy.rules[..place], &rule).into_iter().collect();
        warn(&Report { sources, problems, more: 0 });
        policy.rules.insert(place, rule);
        Ok(())
    })
}

pub(super) fn del(args: &DelArgs) -> Result<()> {
    args.common.enter()?;
    change(&args.common, |policy| {
        for name in &args.names {
            let at = find(&args.common, policy, name)?;
            policy.rules.remove(at);
        }
        // As a load would, or nobody could load again what is then in use.
        if policy.rules.is_empty() && policy.default.is_none() {
            bail!(
                "removing rule '{}': it is the last, there is no default, and nothing would be stamped; if that is meant, \
                 load a file with: default = {{ action = \"skip\" }}",
                args.names.join("', '")
            );
        }
        Ok(())
    })
}

fn find(common: &Common, policy: &Policy, name: &str) -> Result<usize> {
    if let Some(at) = policy.rules.iter().position(|rule| &*rule.name == name) {
        return Ok(at);
    }
    let likeness = |other: &str| strsim::jaro_winkler(name, other);
    let names = policy.rules.iter().map(|rule| &*rule.name).filter(|other| likeness(other) > 0.7);
    let near = names.max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match near {
        Some(near) => bail!("there is no rule '{name}' in use; did you mean '{near}'?"),
        None => {
            let flag = instance_flag(&common.instance);
            bail!("there is no rule '{name}' in use; see: netoken policy show{flag}")
        }
    }
}

/// Changes the policy in use, in one step.
fn change(common: &Common, change: impl FnOnce(&mut Policy) -> Result<()>) -> Result<()> {
    privileges::check("changing the policy in use")?;
    let (state, _lock) = common.open()?;
    let instance = state.instance(&common.instance);
    let maps = instance.maps()?;
    let Running { mut policy, source, .. } = running::read(&instance, &maps)?;
    let before = numbers_in_tokens(&policy);
    change(&mut policy)?;
    let generation = put(&instance, &maps, &policy, &source)?;
    let after = numbers_in_tokens(&policy);
    let others = after.iter().filter(|(name, now)| before.get(*name).is_some_and(|was| was != *now)).count();
    if others > 0 {
        note!("rules whose token has their number in it, which is another one now: {others}");
    }
    tell_loaded(common, &state, &policy, generation)
}

/// The places of the rules whose tokens have them on the wire.
fn numbers_in_tokens(policy: &Policy) -> HashMap<Box<str>, usize> {
    let has_number = |rule: &Rule| match &rule.decision {
        Decision::Stamp { token, .. } => token.has_rule_number(),
        _ => false,
    };
    let numbered = (1..).zip(&policy.rules).filter(|(_, rule)| has_number(rule));
    numbered.map(|(number, rule)| (rule.name.clone(), number)).collect()
}

fn put(instance: &Instance, maps: &Maps, policy: &Policy, source: &str) -> Result<u64> {
    let changed = " (changed by hand)";
    let source = format!("{}{changed}", source.strip_suffix(changed).unwrap_or(source));
    load_keys(instance, maps, policy)?;
    running::load(instance, maps, policy, &source, None).map_err(|error| match error {
        LoadError::Refused(refused) => anyhow::anyhow!("changing the policy in use: {refused}"),
        LoadError::Other(error) => error,
    })
}

impl AddArgs {
    /// The rule as a file would say it, so that both are checked by the same code.
    fn toml(&self) -> Result<String> {
        let Conditions { interface, src, dst, src_port, port, mark, cgroup, uid, not } = &self.conditions;
        let mut keys: Vec<(String, Vec<String>)> = [
            ("interface", interface),
            ("src", src),
            ("dst", dst),
            ("src_port", src_port),
            ("port", port),
            ("mark", mark),
            ("cgroup", cgroup),
            ("uid", uid),
        ]
        .into_iter()
        .filter(|(_, values)| !values.is_empty())
        .map(|(key, values)| (key.to_string(), values.clone()))
        .collect();
        for negated in not {
            let (key, value) = negated
                .split_once('=')
                .with_context(|| format!("--not {negated}: write it like --not port=443"))?;
            let key = format!("not_{}", key.replace('-', "_"));
            match keys.iter_mut().find(|(known, _)| *known == key) {
                Some((_, values)) => values.push(value.to_string()),
                None => keys.push((key, vec![value.to_string()])),
            }
        }
        let mut rule = toml::Table::new();
        rule.insert("name".into(), self.name.clone().into());
        rule.insert("action".into(), self.action.clone().into());
        for (key, value) in [("token", &self.token), ("when_full", &self.when_full)] {
            if let Some(value) = value {
                rule.insert(key.into(), value.clone().into());
            }
        }
        for (key, values) in keys {
            let values: Vec<toml::Value> = values.into_iter().map(Into::into).collect();
            rule.insert(key, values.into());
        }
        Ok(format!("[[rule]]\n{rule}"))
    }
}
