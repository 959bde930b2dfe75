//! `netoken policy diff`: what loading a file would change.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::{Common, Progress, read, refuse};
use crate::cli::difference::{Difference, of_rules, tell};
use crate::policy::compile::{Naming, compile};
use crate::policy::write::{conditions_line, conditions_line_beside};
use crate::policy::{Decision, Policy, Rule, running};
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
    // What a load would refuse changes nothing.
    let names = Naming { instance: &args.common.instance, ..Naming::none() };
    compile(&checked.policy, names, &[]).map_err(|refused| refuse(&checked.refuse(&refused)))?;
    privileges::check("reading the policy in use")?;
    let (state, lock) = args.common.open()?;
    let instance = state.instance(&args.common.instance);
    let running = running::read(&instance, &instance.maps()?)?;
    drop(lock);
    tell(&differences(&running.policy, &checked.policy), args.common.json)
        .context("writing to standard output")
}

/// A rule in its place. Two are the same if the same happens to every SYN that comes to them.
struct Placed<'a> {
    number: usize,
    rule: &'a Rule,
}

impl Placed<'_> {
    fn all(policy: &Policy) -> Vec<Placed<'_>> {
        (1..).zip(&policy.rules).map(|(number, rule)| Placed { number, rule }).collect()
    }

    /// The place of one whose token has it on the wire.
    fn number_in_token(&self) -> Option<usize> {
        match &self.rule.decision {
            Decision::Stamp { token, .. } if token.has_rule_number() => Some(self.number),
            _ => None,
        }
    }

    fn text(&self, other: Option<&Placed<'_>>) -> String {
        let Some(other) = other else {
            return format!("{} -> {}", conditions_line(self.rule), self.rule.decision);
        };
        let conditions = conditions_line_beside(self.rule, other.rule);
        let number = self.number_in_token().filter(|number| *number != other.number);
        let number = number.map_or(String::new(), |number| format!(" of rule {number}"));
        format!("{conditions} -> {}{number}", self.rule.decision)
    }
}

impl PartialEq for Placed<'_> {
    fn eq(&self, other: &Self) -> bool {
        let (ours, theirs) = (&self.rule.conditions, &other.rule.conditions);
        ours.len() == theirs.len()
            && ours.iter().zip(theirs).all(|(one, other)| one.is_same(other))
            && self.rule.decision == other.rule.decision
            && self.number_in_token() == other.number_in_token()
    }
}

fn differences(before: &Policy, after: &Policy) -> Vec<Difference> {
    let (rules_before, rules_after) = (Placed::all(before), Placed::all(after));
    let mut found =
        of_rules(&rules_before, &rules_after, |placed| &placed.rule.name, |placed, other| placed.text(other));
    if before.default != after.default {
        let text = |policy: &Policy| policy.default.as_ref().map(ToString::to_string);
        let (before, after) = (text(before), text(after));
        let change = match (&before, &after) {
            (None, _) => "added",
            (_, None) => "removed",
            _ => "changed",
        };
        found.push(Difference { change, name: None, before, after });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::values::{Interface, List};
    use crate::policy::{Condition, Values};

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

    fn lines(before: &Policy, after: &Policy) -> Vec<(&'static str, String, String)> {
        let found = differences(before, after).into_iter();
        found.map(|d| (d.change, d.before.unwrap_or_default(), d.after.unwrap_or_default())).collect()
    }

    fn ports(list: &str) -> Policy {
        Policy::from_toml(&format!("[[rule]]\nname = 'a'\nport = {list}\naction = 'drop'\n")).unwrap()
    }

    #[test]
    fn what_changed_in_a_long_list_is_told() {
        for (before, after, was, is) in [
            ("[1, 3, 5, 7, 9]", "[1, 3, 5, 7, 11]", "port (5 values, with 9)", "port (5 values, with 11)"),
            ("[1, 3, 5, 7, 9]", "[1, 3, 5, 7]", "port (5 values, with 9)", "port 1,3,5,7"),
            (
                "[1, 3, 5, 7, 9]",
                "[11, 13, 15, 17, 19, 21]",
                "port (5 values, with 1,3,5,7 and 1 more)",
                "port (6 values, with 11,13,15,17 and 2 more)",
            ),
        ] {
            let [was, is] = [was, is].map(|text| format!("{text} -> drop"));
            assert_eq!(lines(&ports(before), &ports(after)), [("changed", was, is)]);
        }
    }

    #[test]
    fn what_a_name_means_now_is_told_and_another_name_is_not() {
        let rule = |name: &str, index| {
            let mut policy = policy(&[("a", 1)]);
            let interface = Interface { name: name.into(), netns: 4026531840, index };
            let values = Values::Interface(List::One(interface));
            policy.rules[0].conditions = [Condition { negated: false, values }].into();
            policy
        };
        let expected = |identity: &str| format!("interface v0 ({identity}) -> skip");
        let (was, is) = (expected("index 7 of net:[4026531840]"), expected("index 9 of net:[4026531840]"));
        assert_eq!(lines(&rule("v0", 7), &rule("v0", 9)), [("changed", was.clone(), is)]);
        assert_eq!(lines(&rule("v0", 7), &rule("v0", 0)), [("changed", was, expected("none"))]);
        assert!(lines(&rule("v0", 7), &rule("blue:v0", 7)).is_empty());
        assert_eq!(lines(&rule("v0", 0), &rule("v1", 0)).len(), 1);
    }

    #[test]
    fn a_token_that_changes_with_the_place_of_its_rule_is_told() {
        let with_number = "[[rule]]\nname = 't'\naction = 'stamp'\ntoken = 'r{rule:4}'\n";
        let in_front = "[[rule]]\nname = 'y'\nmark = 1\naction = 'skip'\n";
        let before = Policy::from_toml(with_number).unwrap();
        let after = Policy::from_toml(&format!("{in_front}{with_number}")).unwrap();
        let changed =
            ("changed", "any -> stamp r{rule:4} of rule 1".into(), "any -> stamp r{rule:4} of rule 2".into());
        assert_eq!(lines(&before, &after), [("added", "".into(), "mark 0x1 -> skip".into()), changed]);
    }

    #[test]
    fn a_default_comes_goes_or_changes() {
        let default =
            |action: &str| Policy::from_toml(&format!("default = {{ action = '{action}' }}")).unwrap();
        for (before, after, change) in [
            (Policy::default(), default("skip"), "added"),
            (default("skip"), Policy::default(), "removed"),
            (default("skip"), default("drop"), "changed"),
        ] {
            assert_eq!(differences(&before, &after)[0].change, change);
        }
    }
}
