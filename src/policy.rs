//! The policy: what to do with a SYN, by where it goes. Read from TOML, checked as a whole, then filled into
//! a new map that replaces the running one in a single step.
//!
//! The border to the kernel is [`Policy::entries`] and `lookup_rule()` in `src/bpf/policy.h`; nothing else
//! knows how rules are stored.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::keys::RingName;
use crate::token::{Token, TokenSpec};
use crate::types::{Action as RawAction, PolicyKey, Rule as RawRule, Size, WhenFull as RawWhenFull};

/// An ordered list of rules and a default.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What happens to a SYN that no rule matches; without it the verdict is `no_policy`.
    pub default: Option<Decision>,
    /// In the order of the file; a rule's number is its place, from 1.
    pub rules: Vec<Rule>,
}

/// One destination and what happens to SYNs that go there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Unique within the policy.
    pub name: String,
    /// The longest matching prefix decides.
    pub dst: Prefix,
    /// Destination port, host order; 0 is any. Of two rules for the same prefix, the one with a port decides.
    pub port: u16,
    /// What happens.
    pub decision: Decision,
}

/// What to do with a SYN.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WhenFull {
    /// Send it as it came.
    #[default]
    Pass,
    /// Do not send it.
    Drop,
}

/// An address and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    addr: IpAddr,
    bits: u8,
}

impl Prefix {
    /// The prefix in the one address space that the kernel side uses: IPv4 mapped into IPv6.
    fn mapped(self) -> (Ipv6Addr, u8) {
        match self.addr {
            IpAddr::V4(addr) => (addr.to_ipv6_mapped(), self.bits + 96),
            IpAddr::V6(addr) => (addr, self.bits),
        }
    }
}

impl FromStr for Prefix {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (addr, bits) = match text.split_once('/') {
            Some((addr, bits)) => (addr, Some(bits)),
            None => (text, None),
        };
        let addr: IpAddr =
            addr.parse().map_err(|_| anyhow!("'{addr}' is neither an IPv4 nor an IPv6 address"))?;
        let width = if addr.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => width,
            Some(bits) => bits.parse().ok().filter(|bits| *bits <= width).with_context(|| {
                format!("prefix length '{bits}' of {addr} is not a number from 0 to {width}")
            })?,
        };
        let prefix = Prefix { addr, bits };
        let (mapped, mapped_bits) = prefix.mapped();
        let host_bits = u128::MAX.checked_shr(mapped_bits.into()).unwrap_or(0);
        if u128::from(mapped) & host_bits != 0 {
            let network = Ipv6Addr::from(u128::from(mapped) & !host_bits);
            let network = network.to_ipv4_mapped().map_or(IpAddr::V6(network), IpAddr::V4);
            bail!("{text} has bits set behind its prefix length; did you mean {network}/{bits}?");
        }
        if matches!(addr, IpAddr::V6(addr) if addr.to_ipv4_mapped().is_some()) {
            bail!("{text} is an IPv4-mapped address, which is never on the wire; write it as IPv4");
        }
        Ok(prefix)
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.bits)
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

/// The file as it is written. Kept apart from [`Policy`], so that a checked policy cannot be half right.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PolicyFile {
    default: Option<DecisionFile>,
    #[serde(default, rename = "rule")]
    rules: Vec<toml::Spanned<RuleFile>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct DecisionFile {
    action: ActionFile,
    token: Option<TokenSpec>,
    when_full: Option<WhenFull>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    name: String,
    dst: PrefixFile,
    #[serde(default)]
    port: u16,
    action: ActionFile,
    token: Option<TokenSpec>,
    when_full: Option<WhenFull>,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ActionFile {
    Stamp,
    Skip,
    Drop,
}

#[derive(Deserialize)]
#[serde(try_from = "String")]
struct PrefixFile(Prefix);

impl TryFrom<String> for PrefixFile {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse().map(PrefixFile)
    }
}

fn decide(action: ActionFile, token: Option<TokenSpec>, when_full: Option<WhenFull>) -> Result<Decision> {
    match (action, token) {
        (ActionFile::Stamp, Some(token)) => {
            Ok(Decision::Stamp { token, when_full: when_full.unwrap_or_default() })
        }
        (ActionFile::Stamp, None) => bail!("action 'stamp' needs a token"),
        (_, None) if when_full.is_none() => Ok(match action {
            ActionFile::Drop => Decision::Drop,
            _ => Decision::Skip,
        }),
        _ => bail!("'token' and 'when_full' belong to action 'stamp' only"),
    }
}

impl Policy {
    /// Stamps every SYN with `token`.
    pub fn stamp_all(token: Token) -> Policy {
        let decision = Decision::Stamp { token: token.into(), when_full: WhenFull::Pass };
        Policy { default: Some(decision), rules: Vec::new() }
    }

    /// Reads and checks a policy file.
    ///
    /// # Errors
    /// The file cannot be read or is not a policy; the message shows the place in the file.
    pub fn from_file(path: &Path) -> Result<Policy> {
        let text =
            fs::read_to_string(path).with_context(|| format!("reading the policy {}", path.display()))?;
        Policy::from_toml(&text).with_context(|| format!("checking the policy {}", path.display()))
    }

    /// Checks the text of a policy file.
    ///
    /// # Errors
    /// The text is not a policy; the message shows the line.
    pub fn from_toml(text: &str) -> Result<Policy> {
        let file: PolicyFile = toml::from_str(text)?;
        let default =
            file.default.map(|d| decide(d.action, d.token, d.when_full)).transpose().context("[default]")?;

        let mut rules: Vec<Rule> = Vec::with_capacity(file.rules.len());
        for spanned in file.rules {
            let line = text[..spanned.span().start].lines().count() + 1;
            let rule = spanned.into_inner();
            let place = || format!("line {line}: rule '{}'", rule.name);
            let decision = decide(rule.action, rule.token, rule.when_full).with_context(place)?;
            rules.push(Rule { name: rule.name.clone(), dst: rule.dst.0, port: rule.port, decision });
        }
        let policy = Policy { default, rules };
        policy.check_unique()?;
        Ok(policy)
    }

    fn check_unique(&self) -> Result<()> {
        let mut names: HashMap<&str, usize> = HashMap::new();
        let mut matches = HashMap::new();
        for (at, rule) in self.rules.iter().enumerate() {
            if let Some(other) = names.insert(&rule.name, at) {
                bail!("rules {} and {} are both called '{}'", other + 1, at + 1, rule.name);
            }
            if let Some(other) = matches.insert((rule.dst, rule.port), &rule.name) {
                bail!(
                    "rules '{other}' and '{}' both match exactly {} port {}; only one can decide",
                    rule.name,
                    rule.dst,
                    if rule.port == 0 { "any".to_string() } else { rule.port.to_string() }
                );
            }
        }
        Ok(())
    }

    /// The key rings that its tokens need.
    pub fn rings(&self) -> BTreeSet<RingName> {
        let decisions = self.default.iter().chain(self.rules.iter().map(|rule| &rule.decision));
        decisions
            .filter_map(|decision| match decision {
                Decision::Stamp { token, .. } => token.ring(),
                _ => None,
            })
            .collect()
    }

    /// The policy as the kernel stores it: keys and values of one generation of the map `policies`.
    /// `ring_number` says what number the instance has given to each of [`Policy::rings`].
    pub fn entries(&self, ring_number: impl Fn(RingName) -> u8) -> Vec<(PolicyKey, RawRule)> {
        let entry = |family, addr, bits, port, id, decision| {
            entry(family, addr, bits, port, id, decision, &ring_number)
        };
        let everything =
            |decision| [4, 6].map(|family| entry(family, Ipv6Addr::UNSPECIFIED, 0, 0, 0, decision));
        let default = self.default.map(everything);
        let rules = (1..).zip(&self.rules).map(|(id, rule)| {
            let (addr, bits) = rule.dst.mapped();
            let family = if rule.dst.addr.is_ipv4() { 4 } else { 6 };
            entry(family, addr, bits, rule.port, id, rule.decision)
        });
        let has_ports = self.rules.iter().any(|rule| rule.port != 0).into();
        // The default comes first, so that a rule for ::/0 takes its place in IPv6.
        let entries = default.into_iter().flatten().chain(rules);
        entries.map(|(key, rule)| (key, RawRule { has_ports, ..rule })).collect()
    }

    /// One line for a person: how many rules, and the default.
    pub fn summary(&self) -> String {
        let default = self.default.map_or("no default".to_string(), |d| format!("default: {d}"));
        match self.rules.len() {
            0 => default,
            1 => format!("1 rule, {default}"),
            n => format!("{n} rules, {default}"),
        }
    }
}

fn entry(
    family: u8,
    addr: Ipv6Addr,
    bits: u8,
    port: u16,
    id: u32,
    decision: Decision,
    ring_number: impl Fn(RingName) -> u8,
) -> (PolicyKey, RawRule) {
    let key = PolicyKey {
        prefixlen: Size::POLICY_FRONT_BITS.0 + u32::from(bits),
        port_be: port.to_be(),
        pad: 0,
        family,
        addr: addr.octets(),
    };
    let (action, spec, when_full) = match decision {
        Decision::Stamp { token, when_full } => {
            let spec = token.to_raw(token.ring().map_or(0, ring_number));
            (RawAction::ACTION_STAMP, spec, when_full)
        }
        Decision::Skip => (RawAction::ACTION_SKIP, Default::default(), WhenFull::Pass),
        Decision::Drop => (RawAction::ACTION_DROP, Default::default(), WhenFull::Pass),
    };
    let when_full = match when_full {
        WhenFull::Pass => RawWhenFull::WHEN_FULL_PASS,
        WhenFull::Drop => RawWhenFull::WHEN_FULL_DROP,
    };
    let rule = RawRule {
        id,
        action: action.0 as u8,
        when_full: when_full.0 as u8,
        addr_bits: bits,
        has_ports: 0,
        spec,
    };
    (key, rule)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"
        default = { action = "stamp", token = "4e45544f4b454e31" }

        [[rule]]
        name = "database"
        dst = "10.20.0.0/16"
        port = 5432
        action = "stamp"
        token = "0000000000000001"
        when_full = "drop"

        [[rule]]
        name = "outside"
        dst = "2001:db8::/32"
        action = "skip"
    "#;

    #[test]
    fn a_good_file_is_read_whole() {
        let policy = Policy::from_toml(GOOD).unwrap();
        assert_eq!(policy.rules.len(), 2);
        assert_eq!(policy.rules[0].port, 5432);
        assert_eq!(policy.rules[1].decision, Decision::Skip);
        let entries = policy.entries(|_| 0);
        assert_eq!(entries.len(), 4);
        assert_eq!(entries[2].0.prefixlen, 16 + 8 + 8 + 96 + 16);
        assert_eq!(entries[2].0.port_be, 5432u16.to_be());
        assert_eq!(entries[3].1.addr_bits, 32);
    }

    #[test]
    fn a_bad_file_is_refused_and_the_message_says_where_and_why() {
        let rule = "name = 'a'\ndst = '10.0.0.0/8'\naction = 'skip'\n";
        for (text, expect) in [
            ("default = { action = 'stamp' }", "needs a token"),
            ("default = { action = 'skip', token = '0000000000000001' }", "belong to action 'stamp'"),
            ("nonsense = 1", "unknown field `nonsense`"),
            ("[[rule]]\nname = 'a'\ndst = '10.0.0.1/8'\naction = 'skip'", "did you mean 10.0.0.0/8"),
            ("[[rule]]\nname = 'a'\ndst = '10.0.0.0/33'\naction = 'skip'", "0 to 32"),
            ("[[rule]]\nname = 'a'\ndst = 'ten/8'\naction = 'skip'", "neither an IPv4 nor an IPv6"),
            ("[[rule]]\nname = 'a'\ndst = '::ffff:1.2.3.4'\naction = 'skip'", "IPv4-mapped"),
            ("[[rule]]\nname = 'a'\ndst = '10.0.0.0/8'\nport = 65536\naction = 'skip'", "65536"),
            ("[[rule]]\nname = 'a'\ndst = '10.0.0.0/8'\naction = 'stmp'", "stmp"),
            (&format!("[[rule]]\n{rule}[[rule]]\n{rule}"), "both called 'a'"),
            (&format!("[[rule]]\n{rule}[[rule]]\n{}", rule.replace("'a'", "'b'")), "both match exactly"),
        ] {
            let error = format!("{:#}", Policy::from_toml(text).unwrap_err());
            assert!(error.contains(expect), "{text}\ngave {error}");
        }
    }

    #[test]
    fn the_example_and_the_readme_show_policies_that_work() {
        let example = Policy::from_file(Path::new("examples/policy.toml")).unwrap();
        assert_eq!(example.summary(), "3 rules, default: stamp 4e45544f4b454e31");
        let readme = include_str!("../README.md");
        let shown = readme.split("```toml").nth(1).and_then(|rest| rest.split("```").next()).unwrap();
        assert_eq!(Policy::from_toml(shown).unwrap().rules, example.rules[..1]);
    }

    #[test]
    fn prefixes_at_their_edges() {
        for good in ["0.0.0.0/0", "::/0", "255.255.255.255/32", "ffff::/16", "::1/128", "10.0.0.1"] {
            assert!(good.parse::<Prefix>().is_ok(), "{good}");
        }
        assert_eq!("10.0.0.1".parse::<Prefix>().unwrap().to_string(), "10.0.0.1/32");
    }
}
