//! `netoken policy diff`: what loading a file would change.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::{Common, Progress, read};
use crate::cli::difference::{Difference, of_rules, tell};
use crate::policy::write::conditions_line;
use crate::policy::{Policy, Rule, running};
use crate::privileges;

/// Show what loading a policy would change
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  netoken policy diff policy.toml")]
pub(super) struct DiffArgs {
    /// The policy
    file: PathBuf,

    /// A cgroup or interface that does not exist is a warning
    #[arg(long)]
    allow_missing: bool,

    #[command(flatten)]
    common: Common,
}

pub(super) fn run(args: &DiffArgs) -> Result<()> {
    args.common.enter()?;
    let checked = read(&args.file, args.allow_missing, &Progress::new(args.common.json))?;
    privileges::check("reading the policy in use")?;
    let (state, lock) = args.common.open()?;
    let instance = state.instance(&args.common.instance);
    let running = running::read(&instance, &instance.maps()?)?;
    drop(lock);
    tell(&differences(&running.policy, &checked.policy), args.common.json)
        .context("writing to standard output")
}

fn differences(before: &Policy, after: &Policy) -> Vec<Difference> {
    let text = |rule: &Rule| format!("{} -> {}", conditions_line(rule), rule.decision);
    let mut found = of_rules(&before.rules, &after.rules, |rule| &rule.name, text);
    if before.default != after.default {
        let text = |policy: &Policy| policy.default.as_ref().map(ToString::to_string);
        found.push(Difference { change: "changed", name: None, before: text(before), after: text(after) });
    }
    found
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
