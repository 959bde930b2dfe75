//! The policy: an ordered list of rules that says what happens to a SYN; the first that matches decides.
//! `docs/policy.md` describes the language.
//!
//! This file is what a policy *is*. [`read`] makes one from a file and [`write`](mod@write) a file from one;
//! [`compile`](mod@compile) turns it into what the kernel's `lookup_rule()` in `src/bpf/policy.h` understands, and
//! [`install`] puts that into use. [`cover`] knows when one rule leaves nothing to another, [`running`] remembers
//! what is in use.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use crate::token::Token;

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

/// Where the eight bytes of a rule's token come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSpec {
    /// These bytes.
    Static(Token),
    /// Text with the number of the rule and the name of the instance in it, filled in when it is put into use.
    Template(Arc<str>),
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

impl TokenSpec {
    /// Reads a token as it is written in a policy: 16 hexadecimal digits, text of at most 8 bytes, or a template
    /// with `{rule:N}` or `{instance:N}` in it.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(text: &str) -> Result<TokenSpec> {
        if text.contains(['{', '}']) {
            // Any rule and instance do to find out whether it is right.
            fill_template(text, 0, "")?;
            return Ok(TokenSpec::Template(text.into()));
        }
        if let Ok(token) = text.parse() {
            return Ok(TokenSpec::Static(token));
        }
        let mut bytes = [0; 8];
        match text.len() {
            1..=8 => bytes[..text.len()].copy_from_slice(text.as_bytes()),
            _ => bail!("a token is 16 hexadecimal digits, like {}, or text of 1 to 8 bytes", Token::DEFAULT),
        }
        Ok(TokenSpec::Static(Token(bytes)))
    }

    /// The bytes, for the rule with this number in this instance.
    ///
    /// # Errors
    /// The number has more bytes than the template has room for.
    pub fn bytes(&self, rule: u32, instance: &str) -> Result<Token> {
        match self {
            TokenSpec::Static(token) => Ok(*token),
            TokenSpec::Template(text) => fill_template(text, rule, instance),
        }
    }
}

/// `{rule:N}` becomes the number in N bytes, most significant first; `{instance:N}` the first N bytes of the name,
/// followed by zeros if it is shorter; the rest stands as it is.
fn fill_template(text: &str, rule: u32, instance: &str) -> Result<Token> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        bytes.extend(before.as_bytes());
        let (inside, behind) = after.split_once('}').with_context(|| format!("no '}}' in '{text}'"))?;
        let (what, len) = inside.split_once(':').with_context(|| {
            format!("'{{{inside}}}' has no length; write it like {{rule:4}} or {{instance:4}}")
        })?;
        let len: usize = len
            .parse()
            .ok()
            .filter(|len| (1..=8).contains(len))
            .with_context(|| format!("the length in '{{{inside}}}' is not a number from 1 to 8"))?;
        match what {
            "rule" => {
                let number = u64::from(rule).to_be_bytes();
                let (unused, used) = number.split_at(8 - len);
                if unused.iter().any(|byte| *byte != 0) {
                    bail!("the number of rule {rule} has no room in the {len} bytes of '{{{inside}}}'");
                }
                bytes.extend(used);
            }
            "instance" => bytes.extend(instance.bytes().chain(std::iter::repeat(0)).take(len)),
            _ => bail!("'{{{inside}}}' is not known; there are {{rule:N}} and {{instance:N}}"),
        }
        rest = behind;
    }
    if rest.contains('}') {
        bail!("no '{{' before '}}' in '{text}'");
    }
    bytes.extend(rest.as_bytes());
    if bytes.is_empty() || bytes.len() > 8 {
        bail!("the token '{text}' has {} bytes; it must have 1 to 8", bytes.len());
    }
    bytes.resize(8, 0);
    Ok(Token(bytes.try_into().unwrap_or_default()))
}

impl fmt::Display for TokenSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenSpec::Static(token) => token.fmt(f),
            TokenSpec::Template(text) => f.write_str(text),
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
        Ok(read::read_file(path, &read::Options::default())?.policy)
    }

    /// Checks the text of a policy file.
    ///
    /// # Errors
    /// The text is not a policy; the message shows every place in it that is wrong.
    pub fn from_toml(text: &str) -> Result<Policy> {
        Ok(read::read_text("policy", text, &read::Options::default())?.policy)
    }

    /// One line for a person: how many rules, and the default.
    pub fn summary(&self) -> String {
        let default = self.default.as_ref().map_or("no default".to_string(), |d| format!("default: {d}"));
        match self.rules.len() {
            0 => default,
            1 => format!("1 rule, {default}"),
            n => format!("{n} rules, {default}"),
        }
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
    fn tokens_are_digits_text_or_templates() {
        let bytes = |text: &str, rule| TokenSpec::parse(text).unwrap().bytes(rule, "edge").unwrap().0;
        assert_eq!(bytes("4e45544f4b454e31", 1), *b"NETOKEN1");
        assert_eq!(bytes("NETOKEN1", 1), *b"NETOKEN1");
        assert_eq!(bytes("edge", 1), *b"edge\0\0\0\0");
        assert_eq!(bytes("{instance:5}{rule:3}", 0x01_02_03), *b"edge\0\x01\x02\x03");
        assert_eq!(bytes("r{rule:2}", 0xff), *b"r\0\xff\0\0\0\0\0");
        for bad in [
            "",
            "NETOKEN12",
            "4e45544f4b454e3",
            "{rule}",
            "{rule:0}",
            "{rule:9}",
            "{rule:2",
            "rule}",
            "{x:1}",
        ] {
            assert!(TokenSpec::parse(bad).is_err(), "{bad}");
        }
        assert!(TokenSpec::parse("{rule:1}").unwrap().bytes(256, "").is_err());
    }
}
