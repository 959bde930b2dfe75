//! The policy: an ordered list of rules that says what happens to a SYN; the first that matches decides.
//! `docs/policy.md` describes the language.
//!
//! This file is what a policy *is*. [`read`] makes one from a file and [`write`](mod@write) a file from one;
//! [`compile`](mod@compile) turns it into what the kernel's `lookup_rule()` in `src/bpf/policy.h` understands, and
//! [`install`] puts that into use. [`cover`] knows when one rule leaves nothing to another, [`running`] remembers
//! what is in use.

use std::collections::BTreeSet;
use std::fmt;
use std::path::Path;

use anyhow::{Result, bail};

use crate::files::Files;
use crate::keys::RingName;
use crate::token::{Token, TokenSpec};

pub mod ask;
pub mod compile;
pub mod cover;
pub mod explain;
pub mod install;
pub mod names;
pub mod read;
pub mod report;
pub mod running;
mod split;
pub mod values;
pub mod write;

use values::{Cgroup, Interface, List, Mark, Prefix, Range};

/// Whether a rule may have that name, which tables, events and logs show.
///
/// # Errors
/// It may not; the message says why.
pub(crate) fn check_rule_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > 255 || name.contains(char::is_control) {
        bail!("a name has 1 to 255 bytes and no control characters");
    }
    Ok(())
}

/// An ordered list of rules and a default.
#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub struct Policy {
    /// What happens to a SYN that no rule matches; without it the verdict is `no_policy`.
    pub default: Option<Decision>,
    /// In the order in which they are asked; a rule's number is its place, from 1.
    pub rules: Vec<Rule>,
}

/// What a SYN must be like, and what then happens to it.
#[derive(Clone, Debug)]
pub struct Rule {
    /// Unique within the policy.
    pub name: Box<str>,
    /// All have to hold; without any, every SYN matches. In the order of the fields.
    pub conditions: Box<[Condition]>,
    /// What happens.
    pub decision: Decision,
    /// Where it is written.
    pub place: Place,
}

/// Rules are the same if they say the same, wherever it is written.
impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        (&self.name, &self.conditions, &self.decision) == (&other.name, &other.conditions, &other.decision)
    }
}
impl Eq for Rule {}

/// A piece of a file that was read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Number of the file in its [`report::Sources`].
    pub file: u32,
    /// Offset of its first byte.
    pub start: u32,
    /// Offset behind its last byte.
    pub end: u32,
}

/// One field, and the values of which one has to fit, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    /// None of the values may fit.
    pub negated: bool,
    /// The field and its values.
    pub values: Values,
}

impl Condition {
    /// Whether both mean the same to the kernel now, by whatever names.
    pub fn is_same(&self, other: &Condition) -> bool {
        fn same<'a, T, I: Ord>(one: &'a List<T>, other: &'a List<T>, identity: fn(&'a T) -> I) -> bool {
            let identities = |list: &'a List<T>| list.all().iter().map(identity).collect::<BTreeSet<I>>();
            identities(one) == identities(other)
        }
        let is_same = match (&self.values, &other.values) {
            (Values::Interface(one), Values::Interface(other)) => same(one, other, Interface::identity),
            (Values::Cgroup(one), Values::Cgroup(other)) => same(one, other, Cgroup::identity),
            (one, other) => one == other,
        };
        self.negated == other.negated && is_same
    }
}

/// The values of a condition, by the field that they are compared with. Lists are sorted and merged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Values {
    /// The interface that it leaves by.
    Interface(List<Interface>),
    /// Source address.
    Src(List<Prefix>),
    /// Destination address.
    Dst(List<Prefix>),
    /// Source port.
    SrcPort(List<Range>),
    /// Destination port.
    Port(List<Range>),
    /// Mark of the skb.
    Mark(List<Mark>),
    /// Cgroup of the sending socket: it or one above it.
    Cgroup(List<Cgroup>),
    /// Owner of the sending socket.
    Uid(List<Range>),
}

impl Values {
    /// The key that it is written under, without `not_`.
    pub fn key(&self) -> &'static str {
        match self {
            Values::Interface(_) => "interface",
            Values::Src(_) => "src",
            Values::Dst(_) => "dst",
            Values::SrcPort(_) => "src_port",
            Values::Port(_) => "port",
            Values::Mark(_) => "mark",
            Values::Cgroup(_) => "cgroup",
            Values::Uid(_) => "uid",
        }
    }

    /// How many values.
    pub fn count(&self) -> usize {
        match self {
            Values::Interface(list) => list.all().len(),
            Values::Src(list) | Values::Dst(list) => list.all().len(),
            Values::SrcPort(list) | Values::Port(list) | Values::Uid(list) => list.all().len(),
            Values::Mark(list) => list.all().len(),
            Values::Cgroup(list) => list.all().len(),
        }
    }
}

/// What to do with a SYN.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Append the token.
    Stamp {
        /// What to append.
        token: TokenSpec,
        /// What to do if it cannot be appended.
        when_full: WhenFull,
    },
    /// Send the SYN as it is.
    Skip,
    /// Do not send the SYN.
    Drop,
}

/// What to do with a SYN that should be stamped but cannot be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WhenFull {
    /// Send it as it came.
    #[default]
    Pass,
    /// Do not send it.
    Drop,
}

impl Decision {
    /// The key ring that its token needs.
    pub fn ring(&self) -> Option<RingName> {
        match self {
            Decision::Stamp { token, .. } => token.ring(),
            _ => None,
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Decision::Stamp { token, when_full: WhenFull::Pass } => write!(f, "stamp {token}"),
            Decision::Stamp { token, when_full: WhenFull::Drop } => write!(f, "stamp {token} or drop"),
            Decision::Skip => f.write_str("skip"),
            Decision::Drop => f.write_str("drop"),
        }
    }
}

impl Policy {
    /// Stamps every SYN with `token`.
    pub fn stamp_all(token: Token) -> Policy {
        let decision = Decision::Stamp { token: TokenSpec::Static(token), when_full: WhenFull::Pass };
        Policy { default: Some(decision), rules: Vec::new() }
    }

    /// Reads and checks a policy file. Warnings are not told; [`read::read_file`] has them.
    ///
    /// # Errors
    /// The file cannot be read or is not a policy; the message shows every place in it that is wrong.
    pub fn from_file(path: &Path) -> Result<Policy> {
        Ok(read::read_file(path, &Files::default(), &read::Options::default())?.policy)
    }

    /// Checks the text of a policy file.
    ///
    /// # Errors
    /// The text is not a policy; the message shows every place in it that is wrong.
    pub fn from_toml(text: &str) -> Result<Policy> {
        Ok(read::read_text("policy", text, &read::Options::default())?.policy)
    }

    /// The key rings that its tokens need.
    pub fn rings(&self) -> BTreeSet<RingName> {
        let decisions = self.default.iter().chain(self.rules.iter().map(|rule| &rule.decision));
        decisions.filter_map(Decision::ring).collect()
    }

    /// One line for a person: how many rules, and the default.
    pub fn summary(&self) -> String {
        summary(self.rules.len(), self.default.as_ref().map(Decision::to_string).as_deref())
    }
}

/// The same of a policy that is not at hand.
fn summary(rules: usize, default: Option<&str>) -> String {
    let said = default.map_or("no default".to_string(), |default| format!("default: {default}"));
    match rules {
        0 if default.is_none() => "no rule and no default: nothing is stamped".to_string(),
        0 => said,
        1 => format!("1 rule, {said}"),
        n => format!("{n} rules, {said}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_shows_a_policy_that_works() {
        let readme = include_str!("../../README.md");
        let shown = readme.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        assert_eq!(Policy::from_toml(shown).unwrap().rules.len(), 1);
    }

    #[test]
    fn a_policy_that_does_nothing_says_so() {
        assert_eq!(Policy::from_toml("").unwrap().summary(), "no rule and no default: nothing is stamped");
    }
}
