//! `netoken policy diff`: what loading a file would change.

use std::collections::HashMap;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::{Common, Progress, read};
use crate::policy::write::conditions_line;
use crate::policy::{Policy, Rule, running};
use crate::privileges;

/// Show what loading a policy would change
#[derive(Debug, Args)]
pub(super) struct DiffArgs {
    /// The policy
    file: PathBuf,

    /// A cgroup or interface that does not exist is a warning
    #[arg(long)]
    allow_missing: bool,

    #[command(flatten)]
    common: Common,
}

/// One difference, as `--json` prints it.
#[derive(Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename = "difference")]
struct Difference {
    /// `added`, `removed`, `changed` or `moved`.
    change: &'static str,
    /// Nothing for the default.
    name: Option<String>,
    before: Option<String>,
    after: Option<String>,
}

pub(super) fn run(args: &DiffArgs) -> Result<()> {
    args.common.enter()?;
    let checked = read(&args.file, args.allow_missing, &Progress::new(args.common.json))?;
    privileges::check("reading the policy in use")?;
    let (state, lock) = args.common.open()?;
    let instance = state.instance(&args.common.instance);
    let running = running::read(&instance, &instance.maps()?)?;
    drop(lock);
    tell(args, &differences(&running.policy, &checked.policy)).context("writing to standard output")
}

fn tell(args: &DiffArgs, differences: &[Difference]) -> Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for difference in differences {
        if args.common.json {
            writeln!(out, "{}", serde_json::to_string(difference)?)?;
            continue;
        }
        let name = difference.name.as_deref().unwrap_or("default");
        for (sign, side) in [("-", &difference.before), ("+", &difference.after)] {
            if let Some(side) = side {
                writeln!(out, "{sign} {name}: {side}")?;
            }
        }
    }
    if differences.is_empty() && !args.common.json {
        writeln!(out, "no difference")?;
    }
    Ok(out.flush()?)
}

fn differences(before: &Policy, after: &Policy) -> Vec<Difference> {
    let mut found = Vec::new();
    let text = |rule: &Rule| format!("{} -> {}", conditions_line(rule), rule.decision);
    let new: HashMap<&str, usize> =
        after.rules.iter().enumerate().map(|(at, rule)| (&*rule.name, at)).collect();
    let old: HashMap<&str, usize> =
        before.rules.iter().enumerate().map(|(at, rule)| (&*rule.name, at)).collect();
    let mut add = |change, name: Option<&str>, before, after| {
        found.push(Difference { change, name: name.map(str::to_string), before, after });
    };
    for rule in before.rules.iter().filter(|rule| !new.contains_key(&*rule.name)) {
        add("removed", Some(&rule.name), Some(text(rule)), None);
    }
    let moved = moved(&before.rules, &after.rules, &old, &new);
    for (at, rule) in after.rules.iter().enumerate() {
        match old.get(&*rule.name).map(|place| (*place, &before.rules[*place])) {
            None => add("added", Some(&rule.name), None, Some(text(rule))),
            Some((_, was)) if was != rule => {
                // Lists that are too long to be shown look the same.
                add("changed", Some(&rule.name), Some(text(was)), Some(text(rule)));
            }
            Some((place, _)) if moved[at] => {
                let now = format!("now rule {}", at + 1);
                add("moved", Some(&rule.name), Some(format!("was rule {}", place + 1)), Some(now));
            }
            Some(_) => {}
        }
    }
    if before.default != after.default {
        let text = |policy: &Policy| policy.default.as_ref().map(ToString::to_string);
        add("changed", None, text(before), text(after));
    }
    found
}

/// Which rules stand, among those that both have, behind one that they stood before: all but a longest part that
/// kept its order.
fn moved(
    before: &[Rule],
    after: &[Rule],
    old: &HashMap<&str, usize>,
    new: &HashMap<&str, usize>,
) -> Vec<bool> {
    debug_assert!(before.len() >= old.len() && after.len() >= new.len());
    let places: Vec<Option<usize>> = after.iter().map(|rule| old.get(&*rule.name).copied()).collect();
    // Patience: the last of each length of increasing parts, and what each came behind.
    let mut tails: Vec<usize> = Vec::new();
    let mut behind: Vec<Option<usize>> = vec![None; after.len()];
    for (at, place) in places.iter().enumerate() {
        let Some(place) = place else { continue };
        let length = tails.partition_point(|tail| places[*tail] < Some(*place));
        behind[at] = length.checked_sub(1).map(|length| tails[length]);
        if length == tails.len() {
            tails.push(at);
        } else {
            tails[length] = at;
        }
    }
    let mut moved: Vec<bool> = places.iter().map(Option::is_some).collect();
    let mut at = tails.last().copied();
    while let Some(kept) = at {
        moved[kept] = false;
        at = behind[kept];
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[(&str, u32)]) -> Policy {
        let text: String = rules
            .iter()
            .map(|(name, mark)| format!("[[rule]]\nname = '{name}'\nmark = {mark}\naction = 'skip'\n"))
            .collect();
        Policy::from_toml(&text).unwrap()
    }

    #[test]
    fn what_changed_is_told_and_nothing_else() {
        let before = policy(&[("a", 1), ("b", 2), ("c", 3), ("d", 4)]);
        let after = policy(&[("d", 4), ("a", 1), ("x", 9), ("c", 5)]);
        let found: Vec<(&str, String)> =
            differences(&before, &after).into_iter().map(|d| (d.change, d.name.unwrap())).collect();
        let expected = [("removed", "b"), ("moved", "d"), ("added", "x"), ("changed", "c")];
        assert_eq!(found, expected.map(|(change, name)| (change, name.to_string())));
        assert!(differences(&before, &before).is_empty());
    }
}
