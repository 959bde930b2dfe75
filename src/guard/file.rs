//! The guard's file: read from TOML and checked as a whole, with the lists that it names.

use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use rustc_hash::FxHashSet;
use serde::Deserialize;
use toml::Spanned;

use super::forms::{ListedFile, OneOrMany};
use super::lists;
use super::rules::{Mark, Mode, Rule, Rules};
use super::thresholds::{AlertsFile, AutoBlockFile};
use super::types::Size;
use super::wrong::{Text, Wrong};
use crate::files::Files;
use crate::keys::RingName;
use crate::note::printable;
use crate::policy::check_rule_name;
use crate::policy::values::Prefix;
use crate::token::Token;
use crate::token::keyed::{Bind, SLOT_S, Slots};

const RULES_MAX: usize = Size::GUARD_RULES_MAX.0 as usize;
const MATCHES_MAX: usize = Size::GUARD_MATCHES_MAX.0 as usize;
const TAGS_MAX: usize = Size::GUARD_TAGS_MAX.0 as usize;
const STATICS_MAX: usize = Size::GUARD_STATICS_MAX.0 as usize;
/// The file as it is written.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RulesFile {
    slots: Option<Spanned<SlotsFile>>,
    #[serde(default, rename = "rule")]
    rules: Vec<Spanned<RuleFile>>,
    #[serde(default)]
    exempt: Vec<Spanned<ListedFile>>,
    #[serde(default)]
    blocked: Vec<Spanned<ListedFile>>,
    exempt_file: Option<Spanned<String>>,
    blocked_file: Option<Spanned<String>>,
    auto_block: Option<Spanned<AutoBlockFile>>,
    alerts: Option<Spanned<AlertsFile>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SlotsFile {
    #[serde(default = "default_slot")]
    length: u32,
    #[serde(default = "one")]
    behind: u32,
    #[serde(default = "one")]
    ahead: u32,
}

fn default_slot() -> u32 {
    SLOT_S
}

fn one() -> u32 {
    1
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RuleFile {
    name: String,
    /// Prefixes, which are judged with the rest of the rule.
    dst: OneOrMany<String>,
    port: Option<OneOrMany<PortFile>>,
    mode: ModeFile,
    mark: Option<Mark>,
    #[serde(default)]
    keys: OneOrMany<RingName>,
    binds: Option<OneOrMany<Bind>>,
    tags: Option<OneOrMany<u16>>,
    #[serde(default)]
    tokens: OneOrMany<Token>,
    may_repeat: Option<bool>,
    scrub: Option<bool>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum ModeFile {
    Observe,
    Mark,
    Drop,
    Scrub,
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "a port is a number, and a range of them a text like \"8000-8010\"")]
enum PortFile {
    Number(i64),
    Range(String),
}

impl PortFile {
    fn range(&self) -> Result<(u16, u16)> {
        let port = |text: &str| {
            text.trim()
                .parse::<u16>()
                .map_err(|_| anyhow!("'{}' is no port; they go from 0 to 65535", text.trim()))
        };
        match self {
            PortFile::Number(number) => port(&number.to_string()).map(|port| (port, port)),
            PortFile::Range(text) => {
                let (first, last) = text.split_once('-').unwrap_or((text, text));
                let (first, last) = (port(first)?, port(last)?);
                if first > last {
                    bail!("the port range '{text}' ends before it begins");
                }
                Ok((first, last))
            }
        }
    }
}

impl RuleFile {
    fn check(self) -> Result<Rule> {
        check_rule_name(&self.name)?;
        let dst: Vec<Prefix> = self.dst.into_vec().iter().map(|text| text.parse()).collect::<Result<_>>()?;
        if dst.is_empty() {
            bail!("'dst' names no destination");
        }
        let ports = match self.port {
            None => vec![(0, u16::MAX)],
            Some(ports) => ports.into_vec().iter().map(PortFile::range).collect::<Result<_>>()?,
        };
        if ports.is_empty() {
            bail!("'port' names no port; leave it away for all");
        }
        let mode = match (self.mode, self.mark) {
            (ModeFile::Observe, None) => Mode::Observe,
            (ModeFile::Drop, None) => Mode::Drop,
            (ModeFile::Scrub, None) => Mode::Scrub,
            (ModeFile::Mark, Some(mark)) => Mode::Mark(checked(mark)?),
            (ModeFile::Mark, None) => {
                bail!(
                    "mode 'mark' needs to know the marks, like: mark = {{ valid = 1, refused = 2, mask = 3 }}"
                )
            }
            (_, Some(_)) => bail!("'mark' belongs to mode 'mark' only"),
        };
        let (keys, tokens) = (self.keys.into_vec(), self.tokens.into_vec());
        let tags = self.tags.map(OneOrMany::into_vec);
        if tags.as_ref().is_some_and(Vec::is_empty) {
            bail!("'tags' names no tag; leave it away for all");
        }
        let tags = tags.unwrap_or_default();
        let says_what = !keys.is_empty() || !tokens.is_empty() || !tags.is_empty();
        if mode == Mode::Scrub {
            if says_what || self.binds.is_some() || self.may_repeat.is_some() {
                bail!("mode 'scrub' checks no token; leave away what is accepted, or choose another mode");
            }
            if self.scrub == Some(false) {
                bail!(
                    "mode 'scrub' does nothing but that; leave 'scrub = false' away, or choose another mode"
                );
            }
        } else if keys.is_empty() && tokens.is_empty() {
            bail!("it accepts nothing; name key rings with 'keys', or static tokens with 'tokens'");
        }
        if keys.is_empty() && (!tags.is_empty() || self.binds.is_some() || self.may_repeat.is_some()) {
            bail!("'tags', 'binds' and 'may_repeat' are of keyed tokens; name their key rings with 'keys'");
        }
        if tags.len() > TAGS_MAX || tokens.len() > STATICS_MAX {
            bail!("a rule has at most {TAGS_MAX} tags and {STATICS_MAX} static tokens");
        }
        let binds = self.binds.map_or(vec![Bind::default()], OneOrMany::into_vec);
        if binds.is_empty() {
            bail!("'binds' names nothing; there are flow, server and isn");
        }
        let may_repeat = self.may_repeat.unwrap_or_default();
        let scrub = self.scrub.unwrap_or(mode == Mode::Scrub);
        Ok(Rule { name: self.name, dst, ports, mode, keys, binds, tags, tokens, may_repeat, scrub })
    }
}

fn section<F, T>(
    section: Option<Spanned<F>>,
    name: &str,
    text: &Text,
    wrong: &mut Wrong,
    check: impl FnOnce(F) -> Result<T>,
) -> Option<T> {
    let offset = section.as_ref()?.span().start;
    wrong.keep(check(section?.into_inner()), || format!("{}: '{name}'", text.at(offset)))
}

/// Two marks that a firewall can tell apart.
fn checked(mark: Mark) -> Result<Mark> {
    for (name, bits) in [("valid", mark.valid), ("refused", mark.refused)] {
        if bits & !mark.mask != 0 {
            bail!("'{name}' is {bits:#x}, which has bits that the mask {:#x} leaves out", mark.mask);
        }
    }
    if mark.valid == mark.refused {
        bail!("'valid' and 'refused' are the same mark, {:#x}", mark.valid);
    }
    Ok(mark)
}

impl Rules {
    /// Reads and checks a file, and the lists that it names.
    ///
    /// # Errors
    /// A file cannot be read or says nonsense; the message shows the place in it.
    pub fn from_file(path: &Path) -> Result<Rules> {
        Rules::read(path, &Files::default())
    }

    /// The same by way of `files`, which knows all of them afterwards, also if this fails.
    ///
    /// # Errors
    /// The same.
    pub fn read(path: &Path, files: &Files) -> Result<Rules> {
        let text = files.read(path).with_context(|| format!("reading the rules {}", path.display()))?;
        let dir = path.parent().unwrap_or(Path::new(""));
        let text = Text { name: path.display().to_string(), text };
        Rules::parse(&text, dir, files).with_context(|| format!("checking the rules {}", path.display()))
    }

    /// Checks the text of a file. Lists that it names are looked for in `dir`.
    ///
    /// # Errors
    /// It says nonsense; the message shows the line.
    pub fn from_toml(text: &str, dir: &Path) -> Result<Rules> {
        let text = Text { name: "rules".to_string(), text: text.to_string() };
        Rules::parse(&text, dir, &Files::default())
    }

    /// The same, with the lists that it names added to `files`.
    fn parse(text: &Text, dir: &Path, files: &Files) -> Result<Rules> {
        let file: RulesFile = toml::from_str(&text.text).map_err(|error| {
            // Instead of its first line, which has the line and the column in words.
            let (said, place) = (error.to_string(), error.span().map_or(0, |span| span.start));
            let said = said.trim_end().split_once('\n').map_or(&*said, |(_, said)| said);
            anyhow!("{}: this cannot be read:\n{said}", text.at(place))
        })?;
        let mut wrong = Wrong::default();
        let slots =
            section(file.slots, "slots", text, &mut wrong, |s| Slots::new(s.length, s.behind, s.ahead));
        let mut rules: Vec<Rule> = Vec::new();
        let mut names = FxHashSet::default();
        for spanned in file.rules {
            let offset = spanned.span().start;
            let rule = spanned.into_inner();
            let name = printable(&rule.name).to_string();
            let place = || format!("{}: rule '{name}'", text.at(offset));
            if !names.insert(rule.name.clone()) {
                wrong.0.push(anyhow!("an earlier rule has this name").context(place()));
            }
            rules.extend(wrong.keep(rule.check(), place));
        }
        let exempt = lists::read("exempt", file.exempt, file.exempt_file, text, dir, files, &mut wrong);
        let blocked = lists::read("blocked", file.blocked, file.blocked_file, text, dir, files, &mut wrong);
        let auto_block = section(file.auto_block, "auto_block", text, &mut wrong, AutoBlockFile::check);
        let alerts = section(file.alerts, "alerts", text, &mut wrong, AlertsFile::check);
        wrong.end()?;
        let rules = Rules { slots, rules, exempt, blocked, auto_block, alerts };
        rules.check_sizes().map(|()| rules)
    }

    fn check_sizes(&self) -> Result<()> {
        if self.rules.is_empty() {
            bail!("there is no [[rule]], so nothing would be protected");
        }
        if self.rules.len() > RULES_MAX {
            bail!("there are {} rules; there is room for {RULES_MAX}", self.rules.len());
        }
        let matches: usize = self.rules.iter().map(|rule| rule.dst.len() * rule.ports.len()).sum();
        if matches > MATCHES_MAX {
            bail!(
                "prefixes times port ranges make {matches}; there is room for {MATCHES_MAX}: use wider prefixes or \
                 ranges"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn rules(text: &str) -> Result<Rules> {
        Rules::from_toml(text, Path::new("."))
    }

    const RULE: &str =
        "[[rule]]\nname = 'a'\ndst = '10.0.0.0/8'\nmode = 'drop'\ntokens = '0000000000000001'\n";

    const BLOCK: &str = "auto_block = { within = '10s', block_for = '1m', ";
    const SCRUB: &str = "[[rule]]\nname = 'a'\ndst = '10.0.0.0/8'\nmode = 'scrub'\n";

    #[test]
    fn the_example_is_read_whole() {
        let rules = Rules::from_file(Path::new("examples/guard.toml")).unwrap();
        assert_eq!(rules.summary(), "4 rules, 1 prefix exempt, 2 prefixes blocked");
        let table = rules.table(1, |_| 3);
        assert_eq!((table.generation, table.has_exempt, table.has_blocked), (1, 1, 1));
        assert_eq!(table.rules[0].accept.rings, 8);
        assert_eq!(table.matches_count, 4 + 1 + 1 + 1);
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_the_message_says_where_and_why() {
        for (text, expect) in [
            ("", "no [[rule]]"),
            ("a = 1", "rules:1:1: this cannot be read:\n  |\n1 | a = 1\n  | ^\nunknown field `a`"),
            (&RULE.replace("'10.0.0.0/8'", "'10.0.0.1/8'"), "rules:1:1: rule 'a': 10.0.0.1/8 has bits set"),
            (&RULE.replace("'10.0.0.0/8'", "[]"), "names no destination"),
            (&RULE.replace("tokens = '0000000000000001'", ""), "accepts nothing"),
            (&RULE.replace("tokens = '0000000000000001'", "tokens = '00'"), "rules:5:10: "),
            (
                &RULE.replace("tokens = '0000000000000001'", "tokens = ['0000000000000001']\ntags = 1"),
                "keyed tokens",
            ),
            (&RULE.replace("'drop'", "'mark'"), "needs to know the marks"),
            (&format!("{RULE}mark = {{ valid = 1, refused = 2 }}"), "mode 'mark' only"),
            (
                &RULE.replace("'drop'", "'mark'\nmark = { valid = 0x4, refused = 0x2, mask = 0x3 }"),
                "'valid' is 0x4, which has bits that the mask 0x3 leaves out",
            ),
            (&RULE.replace("'drop'", "'mark'\nmark = { valid = 2, refused = 2 }"), "are the same mark, 0x2"),
            (&RULE.replace("tokens = '0000000000000001'", "keys = 'edge'\ntags = []"), "'tags' names no tag"),
            (&RULE.replace("'a'", "''"), "a name has 1 to 255 bytes"),
            (&RULE.replace("'a'", "\"a\\u001b[31m\""), "rule 'a\\u{1b}[31m': a name has"),
            (&RULE.replace("'drop'", "'scrub'"), "mode 'scrub' checks no token"),
            (&format!("{SCRUB}may_repeat = true"), "mode 'scrub' checks no token"),
            (&format!("{SCRUB}scrub = false"), "leave 'scrub = false' away"),
            (&format!("{BLOCK}refused = 0 }}\n{RULE}"), "rules:1:14: 'auto_block': 'refused' is 0"),
            (&format!("{BLOCK}refused = 5, v4_bits = 33 }}\n{RULE}"), "it goes from 1 to 32"),
            (&format!("{}refused = 5 }}\n{RULE}", BLOCK.replace("'10s'", "'10 parsecs'")), "is no time"),
            (&format!("{}refused = 5 }}\n{RULE}", BLOCK.replace("'10s'", "'10ms'")), "not between 1s and"),
            (&format!("alerts = {{ within = '1s' }}\n{RULE}"), "rules:1:10: 'alerts': it names no severity"),
            (&format!("alerts = {{ within = '1s', low = 5, high = 5 }}\n{RULE}"), "have to rise"),
            (&format!("alerts = {{ within = '1s', low = 0 }}\n{RULE}"), "begin with 1"),
            (&format!("# ä\n  [alerts]\nwithin = '1s'\n{RULE}"), "rules:2:3: 'alerts': "),
            (&format!("{RULE}port = 65536"), "'65536' is no port"),
            (&format!("{RULE}port = '9-8'"), "ends before it begins"),
            (&format!("{RULE}port = []"), "names no port"),
            (&format!("{RULE}{RULE}"), "rules:6:1: rule 'a': an earlier rule"),
            (&RULE.replace("tokens = '0000000000000001'", "tokens = 1"), "rules:5:10: "),
            (&RULE.replace("tokens = '0000000000000001'", "keys = ['edge', 5]"), "invalid type: integer `5`"),
            (&RULE.replace("'10.0.0.0/8'", "true"), "expected one value or a list of them"),
            (&format!("{RULE}port = ['http', true]"), "a port is a number"),
            (&format!("exempt = [{{ src = '1.2.3.4' }}]\n{RULE}"), "missing field `until`"),
            (&format!("exempt = [{{ prefix = '1.2.3.4' }}]\n{RULE}"), "unknown field `prefix`"),
            (&format!("exempt = [5]\n{RULE}"), "expected a prefix, or { src = PREFIX, until = TIME }"),
            (
                &format!("blocked = ['1.2.3.4', '1.2.3.4/32']\n{RULE}"),
                "rules:1:23: 'blocked': 1.2.3.4/32 is listed twice",
            ),
            (
                &format!("exempt = [{{ src = '1.2.3.4', until = 'soon' }}]\n{RULE}"),
                "rules:1:11: 'exempt': 'soon' is no time",
            ),
            (
                &format!("blocked_file = 'no-such-file'\n{RULE}"),
                "rules:1:16: reading the list ./no-such-file: ",
            ),
            (&format!("slots = {{ behind = 15, ahead = 1 }}\n{RULE}"), "rules:1:9: 'slots': "),
            (&format!("{RULE}port = {:?}", (0..129).collect::<Vec<_>>()), "make 129; there is room for 128"),
        ] {
            let error = format!("{:#}", rules(text).unwrap_err());
            assert!(error.contains(expect), "{text}\ngave {error}");
            assert!(!error.contains("untagged") && error == error.trim_end(), "{text}\ngave {error}");
        }
    }

    #[test]
    fn all_that_is_wrong_is_said_at_once() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("list"), "192.0.2.1\n x\n192.0.2.2 soon\n192.0.2.1\n").unwrap();
        let text = format!(
            "blocked_file = 'list'\nexempt = ['1.2.3.4/8', 'y']\n{}{}{}",
            RULE.replace("'drop'", "'mark'"),
            RULE,
            RULE.replace("'a'", "'b'").replace("10.0.0.0/8", "10.0.0.1/8"),
        );
        assert_eq!(
            format!("{:#}", Rules::from_toml(&text, dir.path()).unwrap_err())
                .replace(dir.path().to_str().unwrap(), "D"),
            "8 things are wrong:
  rules:3:1: rule 'a': mode 'mark' needs to know the marks, like: mark = { valid = 1, refused = 2, mask = 3 }
  rules:8:1: rule 'a': an earlier rule has this name
  rules:13:1: rule 'b': 10.0.0.1/8 has bits set behind its prefix length; did you mean 10.0.0.0/8?
  rules:2:11: 'exempt': 1.2.3.4/8 has bits set behind its prefix length; did you mean 1.0.0.0/8?
  rules:2:24: 'exempt': 'y' is neither an IPv4 nor an IPv6 address
  D/list:2:2: 'x' is neither an IPv4 nor an IPv6 address
  D/list:3:11: 'soon' is no time; write it like 2026-12-01T00:00:00Z, or 2026-12-01T01:00:00+01:00
  D/list:4:1: 'blocked': 192.0.2.1/32 is listed twice"
        );
    }
}
