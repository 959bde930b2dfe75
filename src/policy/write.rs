//! Writes a policy: whole, as a file that reads back as the same policy, and a rule in one line for people.

use std::collections::{HashMap, HashSet};
use std::fmt::{self, Display, Write as _};
use std::sync::Arc;

use super::values::{Cgroup, Interface, List};
use super::{Condition, Decision, Policy, Rule, Values, WhenFull};
use crate::note::printable;
use crate::token::TokenSpec;

/// A longer list is only counted where a person reads.
const SHOWN_MAX: usize = 4;

/// The policy as a file. What a person wrote around it (comments, sets, included files) is not kept; a list that
/// several rules share, or that is empty, becomes a set.
pub fn to_toml(policy: &Policy) -> String {
    let mut text = String::with_capacity(policy.rules.len() * 128);
    if let Some(default) = &policy.default {
        let parts: Vec<String> =
            decision_lines(default).iter().map(|(key, value)| format!("{key} = {value}")).collect();
        text.push_str(&format!("default = {{ {} }}\n", parts.join(", ")));
    }
    // Or it would not read back, as what was read was said to be allowed to.
    if policy.rules.iter().flat_map(|rule| rule.conditions.iter()).any(is_missing) {
        text.push_str("missing = \"warn\"\n");
    }
    let sets = shared_sets(policy);
    let mut named: Vec<(&usize, &Set)> = sets.iter().collect();
    named.sort_by_key(|(_, set)| set.number);
    for kind in ["prefixes", "ports"] {
        let mut head = format!("\n[{kind}]\n");
        for (_, set) in named.iter().filter(|(_, set)| set.kind == kind) {
            text.push_str(&std::mem::take(&mut head));
            text.push_str(&format!("list-{} = {}\n", set.number, set.values));
        }
    }
    for rule in &policy.rules {
        write_rule(&mut text, rule, &sets);
    }
    text
}

/// Whether it names an interface or a cgroup that was not there when it was read.
fn is_missing(condition: &Condition) -> bool {
    match &condition.values {
        Values::Interface(list) => list.all().iter().any(|interface| interface.index == 0),
        Values::Cgroup(list) => list.all().iter().any(|cgroup| cgroup.id == 0),
        _ => false,
    }
}

struct Set {
    kind: &'static str,
    number: usize,
    values: String,
}

/// By the address of the list.
fn shared_sets(policy: &Policy) -> HashMap<usize, Set> {
    let mut uses: HashMap<usize, usize> = HashMap::new();
    let conditions = || policy.rules.iter().flat_map(|rule| rule.conditions.iter());
    for (address, _) in conditions().filter_map(shared) {
        *uses.entry(address).or_default() += 1;
    }
    let mut sets = HashMap::new();
    for condition in conditions() {
        let Some((address, kind)) = shared(condition) else { continue };
        // A rule itself cannot say that a list is empty.
        let is_set = uses[&address] > 1 || condition.values.count() == 0;
        if is_set && !sets.contains_key(&address) {
            let number = sets.len() + 1;
            sets.insert(address, Set { kind, number, values: values_text(&condition.values) });
        }
    }
    sets
}

/// Address and kind of a list that can be a set.
fn shared(condition: &Condition) -> Option<(usize, &'static str)> {
    fn address<T>(list: &List<T>) -> Option<usize> {
        match list {
            List::Many(many) => Some(Arc::as_ptr(many).cast::<u8>() as usize),
            List::One(_) => None,
        }
    }
    match &condition.values {
        Values::Src(list) | Values::Dst(list) => address(list).map(|address| (address, "prefixes")),
        Values::Port(list) | Values::SrcPort(list) => address(list).map(|address| (address, "ports")),
        _ => None,
    }
}

fn write_rule(text: &mut String, rule: &Rule, sets: &HashMap<usize, Set>) {
    // Writing to a string cannot fail.
    let _ = write!(text, "\n[[rule]]\nname = {}\n", quoted(&rule.name));
    for condition in &rule.conditions {
        let not = if condition.negated { "not_" } else { "" };
        let set = shared(condition).and_then(|(address, _)| sets.get(&address));
        let value = match set {
            Some(set) => format!("\"@list-{}\"", set.number),
            None => values_text(&condition.values),
        };
        let _ = writeln!(text, "{not}{} = {value}", condition.values.key());
    }
    for (key, value) in decision_lines(&rule.decision) {
        let _ = writeln!(text, "{key} = {value}");
    }
}

fn decision_lines(decision: &Decision) -> Vec<(&'static str, String)> {
    match decision {
        Decision::Skip => vec![("action", "\"skip\"".to_string())],
        Decision::Drop => vec![("action", "\"drop\"".to_string())],
        Decision::Stamp { token, when_full } => {
            let mut lines = vec![("action", "\"stamp\"".to_string()), ("token", token_value(token))];
            if *when_full == WhenFull::Drop {
                lines.push(("when_full", "\"drop\"".to_string()));
            }
            lines
        }
    }
}

fn token_value(token: &TokenSpec) -> String {
    match token {
        TokenSpec::Keyed { tag, key, bind } => {
            format!("{{ tag = {tag}, key = \"{key}\", bind = \"{bind}\" }}")
        }
        other => quoted(&other.to_string()),
    }
}

/// A TOML string. Names have no control characters.
pub(crate) fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len() + 2);
    quoted.push('"');
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => drop(write!(quoted, "\\u{:04x}", u32::from(c))),
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}

fn values_text(values: &Values) -> String {
    fn list<T: Display>(list: &List<T>) -> String {
        match list.all() {
            [one] => quoted(&one.to_string()),
            many => {
                let mut text = String::with_capacity(many.len() * 20);
                for value in many {
                    text.push_str(if text.is_empty() { "[" } else { ", " });
                    let _ = write!(text, "\"{value}\"");
                }
                text.push_str(if many.is_empty() { "[]" } else { "]" });
                text
            }
        }
    }
    match values {
        Values::Interface(names) => texts(names.all().iter().map(|interface| &*interface.name)),
        Values::Cgroup(paths) => texts(paths.all().iter().map(|cgroup| &*cgroup.path)),
        Values::Src(values) | Values::Dst(values) => list(values),
        Values::SrcPort(values) | Values::Port(values) | Values::Uid(values) => list(values),
        Values::Mark(values) => list(values),
    }
}

fn texts<'a>(texts: impl Iterator<Item = &'a str>) -> String {
    let texts: Vec<String> = texts.map(quoted).collect();
    if texts.len() == 1 { texts.concat() } else { format!("[{}]", texts.join(", ")) }
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.line(shown))
    }
}

impl Condition {
    /// In one line, with these texts of its values unless they are too many.
    fn line(&self, texts: fn(&Values) -> Vec<String>) -> String {
        let not = if self.negated { "not_" } else { "" };
        let noun = match &self.values {
            Values::Src(_) | Values::Dst(_) => "prefixes",
            _ => "values",
        };
        let values = match self.values.count() {
            count if count == 0 || count > SHOWN_MAX => format!("({count} {noun})"),
            _ => texts(&self.values).join(","),
        };
        format!("{not}{} {values}", self.values.key())
    }

    /// The same beside what it is elsewhere: with what is different in a list that is too long to be shown, or with what
    /// its names mean if they are the same there.
    fn line_beside(&self, elsewhere: &Condition) -> String {
        let texts = if self.values == elsewhere.values { shown_with_identity } else { shown };
        let line = self.line(texts);
        if self.values.count() <= SHOWN_MAX {
            return line;
        }
        let others: HashSet<String> = texts(&elsewhere.values).into_iter().collect();
        let own: Vec<String> =
            texts(&self.values).into_iter().filter(|value| !others.contains(value)).collect();
        let line = line.trim_end_matches(')');
        match own.len() {
            0 => format!("{line})"),
            count if count > SHOWN_MAX => {
                format!("{line}, with {} and {} more)", own[..SHOWN_MAX].join(","), count - SHOWN_MAX)
            }
            _ => format!("{line}, with {})", own.join(",")),
        }
    }
}

/// The values as a person reads them: as they are, but for what a terminal would obey.
fn shown(values: &Values) -> Vec<String> {
    fn all<T: Display>(list: &List<T>) -> Vec<String> {
        let text = |value: &T| printable(&value.to_string());
        list.all().iter().map(text).collect()
    }
    match values {
        Values::Interface(list) => all(list),
        Values::Cgroup(list) => all(list),
        Values::Src(list) | Values::Dst(list) => all(list),
        Values::SrcPort(list) | Values::Port(list) | Values::Uid(list) => all(list),
        Values::Mark(list) => all(list),
    }
}

/// The same with the numbers that the kernel goes by, which tell two of one name apart.
fn shown_with_identity(values: &Values) -> Vec<String> {
    let identities: Vec<String> = match values {
        Values::Interface(list) => list.all().iter().map(interface_identity).collect(),
        Values::Cgroup(list) => list.all().iter().map(cgroup_identity).collect(),
        _ => return shown(values),
    };
    shown(values).into_iter().zip(identities).map(|(name, identity)| format!("{name} ({identity})")).collect()
}

fn interface_identity(interface: &Interface) -> String {
    match interface.index {
        0 => "none".to_string(),
        index => format!("index {index} of net:[{}]", interface.netns),
    }
}

fn cgroup_identity(cgroup: &Cgroup) -> String {
    if cgroup.id == 0 { "none".to_string() } else { format!("id {}", cgroup.id) }
}

/// Its conditions in one line.
pub fn conditions_line(rule: &Rule) -> String {
    if rule.conditions.is_empty() {
        return "any".to_string();
    }
    let parts: Vec<String> = rule.conditions.iter().map(Condition::to_string).collect();
    parts.join(", ")
}

/// The same where the rule is another one elsewhere: what differs is told apart.
pub fn conditions_line_beside(rule: &Rule, elsewhere: &Rule) -> String {
    if rule.conditions.is_empty() {
        return conditions_line(rule);
    }
    let part = |condition: &Condition| {
        let other = elsewhere
            .conditions
            .iter()
            .find(|other| (other.negated, other.values.key()) == (condition.negated, condition.values.key()));
        match other.filter(|other| !other.is_same(condition)) {
            Some(other) => condition.line_beside(other),
            None => condition.to_string(),
        }
    };
    let parts: Vec<String> = rule.conditions.iter().map(part).collect();
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_shown_as_they_are() {
        for (path, expected) in [
            (r"/a\x2db.service", r"cgroup /a\x2db.service"),
            (r#"/x, "y" [z]"#, r#"cgroup /x, "y" [z]"#),
            ("/\u{1b}[2J", r"cgroup /\u{1b}[2J"),
        ] {
            let cgroup = Cgroup { path: path.into(), level: 1, id: 0 };
            let condition = Condition { negated: false, values: Values::Cgroup(List::One(cgroup)) };
            assert_eq!(condition.to_string(), expected);
        }
    }

    #[test]
    fn an_empty_list_reads_back_as_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("empty.txt"), "# nobody yet\n").unwrap();
        let rule = |name: &str, condition: &str| {
            format!("[[rule]]\nname = '{name}'\n{condition}\naction = 'drop'\n")
        };
        let text = "[prefixes]\ns = ['file:empty.txt']\nt = []\n[ports]\np = []\n".to_string()
            + &rule("file", "dst = 'file:empty.txt'")
            + &rule("twice", "dst = 'file:empty.txt'\nnot_src = '@s'")
            + &rule("in a list", "not_src = ['@s', '@t']")
            + &rule("set", "not_dst = '@t'\nport = '@p'\nnot_src_port = ['@p']");
        let path = dir.path().join("p.toml");
        std::fs::write(&path, text).unwrap();
        let policy = Policy::from_file(&path).unwrap_or_else(|error| panic!("{error:#}"));
        let written = to_toml(&policy);
        let again = Policy::from_toml(&written).unwrap_or_else(|error| panic!("{error:#}\n{written}"));
        assert_eq!(again, policy, "{written}");
    }

    #[test]
    fn what_is_written_reads_back_as_the_same() {
        let text = r#"
            default = { action = "stamp", token = "{rule:4}", when_full = "drop" }
            missing = "warn"
            [prefixes]
            a = ["10.0.0.0/8", "fd00::/8"]
            [ports]
            b = [1, "5-9"]
            [[rule]]
            name = "one \"quoted\" \\ name"
            dst = "@a"
            not_src = ["@a", "192.0.2.1"]
            port = "@b"
            not_mark = ["0x1/0xff", 7]
            interface = ["lo", "none0"]
            cgroup = "/"
            not_uid = [0, "10-20"]
            action = "drop"
            [[rule]]
            name = "two"
            dst = "@a"
            src_port = "@b"
            action = "stamp"
            token = "text"
        "#;
        let policy = Policy::from_toml(text).unwrap();
        let written = to_toml(&policy);
        let again = Policy::from_toml(&written).unwrap();
        assert_eq!(again, policy, "{written}");
        let whole = written.replace("none0", "lo");
        assert!(!to_toml(&Policy::from_toml(&whole).unwrap()).contains("missing"), "{whole}");
        assert!(written.contains("@list-1") && written.contains("@list-2"), "{written}");
        assert_eq!(conditions_line(&policy.rules[1]), "dst 10.0.0.0/8,fd00::/8, src_port 1,5-9");
    }
}
