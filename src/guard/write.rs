//! Writes rules down: whole, as a file that reads back as the same rules, and a rule in one line for people.

use std::fmt::Display;

use humantime::format_duration;

use super::rules::{Alerts, AutoBlock, Listed, Mode, Rule, Rules};
use crate::policy::write::quoted;
use crate::token::keyed::Slots;

/// The rules as a file. What a person wrote around them (comments, files of lists) is not kept.
pub fn to_toml(rules: &Rules) -> String {
    let Rules { slots: _, rules: of_file, exempt, blocked, auto_block: _, alerts: _ } = rules;
    let mut text = String::new();
    for (key, value) in settings(rules).into_iter().filter_map(|(key, value)| Some((key, value?))) {
        text.push_str(&format!("{key} = {value}\n"));
    }
    for (name, list) in [("exempt", exempt), ("blocked", blocked)] {
        if !list.is_empty() {
            let entries: Vec<String> =
                list.iter().map(|listed| format!("    {},\n", entry(listed))).collect();
            text.push_str(&format!("{name} = [\n{}]\n", entries.concat()));
        }
    }
    for rule in of_file {
        text.push_str(&format!("\n[[rule]]\nname = {}\n", quoted(&rule.name)));
        for (key, value) in parts(rule) {
            text.push_str(&format!("{key} = {value}\n"));
        }
    }
    text
}

/// What a file says that is neither a rule nor a list, by its keys; nothing for what it leaves out.
pub fn settings(rules: &Rules) -> [(&'static str, Option<String>); 3] {
    [
        ("slots", rules.slots.map(slots_text)),
        ("auto_block", rules.auto_block.map(auto_block_text)),
        ("alerts", rules.alerts.map(alerts_text)),
    ]
}

fn slots_text(slots: Slots) -> String {
    format!("{{ length = {}, behind = {}, ahead = {} }}", slots.length_s(), slots.behind(), slots.ahead())
}

fn auto_block_text(auto_block: AutoBlock) -> String {
    let AutoBlock { refused, within, block_for, v4_bits, v6_bits } = auto_block;
    let (within, block_for) = (format_duration(within), format_duration(block_for));
    format!(
        "{{ refused = {refused}, within = \"{within}\", block_for = \"{block_for}\", v4_bits = {v4_bits}, v6_bits = \
         {v6_bits} }}"
    )
}

fn alerts_text(alerts: Alerts) -> String {
    let Alerts { within, refused } = alerts;
    let mut text = format!("{{ within = \"{}\"", format_duration(within));
    for (name, refused) in ["low", "medium", "high", "critical"].iter().zip(refused) {
        text.push_str(&refused.map_or(String::new(), |refused| format!(", {name} = {refused}")));
    }
    text + " }"
}

/// Everything that a rule says but its name, in one line.
pub fn line(rule: &Rule) -> String {
    let parts: Vec<String> = parts(rule).iter().map(|(key, value)| format!("{key} {value}")).collect();
    parts.join(", ").replace('"', "")
}

/// An entry of a list as a person reads it.
pub fn listed_line(listed: &Listed) -> String {
    let until = listed.until.map(|time| format!(" until {}", humantime::format_rfc3339(time)));
    format!("{}{}", listed.src, until.unwrap_or_default())
}

fn entry(listed: &Listed) -> String {
    match listed.until {
        None => quoted(&listed.src.to_string()),
        Some(time) => {
            format!("{{ src = \"{}\", until = \"{}\" }}", listed.src, humantime::format_rfc3339(time))
        }
    }
}

/// What a rule says, by its keys in the file; what it leaves to the default is left out.
fn parts(rule: &Rule) -> Vec<(&'static str, String)> {
    // Taken apart by name: a field that comes has to be written.
    let Rule { name: _, dst, ports, mode, keys, binds, tags, tokens, may_repeat, scrub } = rule;
    let mut parts = vec![("dst", many(dst))];
    if ports[..] != [(0, u16::MAX)] {
        let range = |(first, last): &(u16, u16)| match first == last {
            true => first.to_string(),
            false => format!("\"{first}-{last}\""),
        };
        parts.push(("port", list(ports.iter().map(range))));
    }
    match mode {
        Mode::Observe => parts.push(("mode", "\"observe\"".to_string())),
        Mode::Drop => parts.push(("mode", "\"drop\"".to_string())),
        Mode::Scrub => parts.push(("mode", "\"scrub\"".to_string())),
        Mode::Mark(mark) => {
            parts.push(("mode", "\"mark\"".to_string()));
            let bits = format!(
                "{{ valid = {:#x}, refused = {:#x}, mask = {:#x} }}",
                mark.valid, mark.refused, mark.mask
            );
            parts.push(("mark", bits));
        }
    }
    if !keys.is_empty() {
        parts.push(("keys", many(keys)));
        parts.push(("binds", many(binds)));
    }
    if !tags.is_empty() {
        parts.push(("tags", list(tags.iter().map(u16::to_string))));
    }
    if !tokens.is_empty() {
        parts.push(("tokens", many(tokens)));
    }
    if *may_repeat {
        parts.push(("may_repeat", "true".to_string()));
    }
    // In mode `scrub` that goes without saying.
    if *scrub && *mode != Mode::Scrub {
        parts.push(("scrub", "true".to_string()));
    }
    parts
}

/// Values that are text in the file.
fn many<T: Display>(values: &[T]) -> String {
    list(values.iter().map(|value| quoted(&value.to_string())))
}

fn list(values: impl Iterator<Item = String>) -> String {
    let values: Vec<String> = values.collect();
    match &values[..] {
        [one] => one.clone(),
        _ => format!("[{}]", values.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn what_is_written_reads_back_the_same() {
        let strange = "\
            auto_block = { refused = 7, within = '90s', block_for = '1h 1s', v6_bits = 48 }\n\
            alerts = { within = '2s', medium = 3, critical = 4 }\n\
            exempt = [{ src = '::/0', until = '2026-12-01T00:00:00.5Z' }]\n\
            [[rule]]\nname = \"a \\\"b\\\" \\\\ ä\"\ndst = '10.0.0.0/8'\nmode = 'mark'\n\
            mark = { valid = 1, refused = 4294967295 }\ntokens = ['0000000000000001', 'ffffffffffffffff']\n\
            port = [0, '65535', '7-9']\nkeys = ['a', 'b']\nbinds = ['flow', 'isn']\ntags = [0, 65535]\n\
            may_repeat = true\nscrub = true\n\
            [[rule]]\nname = 'b'\ndst = '::/0'\nmode = 'scrub'\n";
        let strange = Rules::from_toml(strange, Path::new(".")).unwrap();
        for rules in [Rules::from_file(Path::new("examples/guard.toml")).unwrap(), strange] {
            let text = to_toml(&rules);
            let back = Rules::from_toml(&text, Path::new("/nonexistent"));
            assert_eq!(back.unwrap_or_else(|error| panic!("{error:#}\n{text}")), rules, "{text}");
        }
    }

    #[test]
    fn a_person_reads_a_rule_in_one_line() {
        let text = "\
            blocked = [{ src = '2001:db8:bad::/48', until = '2026-12-01T00:00:00Z' }]\n\
            [[rule]]\nname = 'a'\ndst = ['192.0.2.10', '2001:db8:1::/64']\nport = [443, '8000-8099']\nmode = 'drop'\n\
            keys = 'edge'\nbinds = ['server', 'flow']\ntags = [17, 18]\nscrub = true\n";
        let rules = Rules::from_toml(text, Path::new(".")).unwrap();
        assert_eq!(
            line(&rules.rules[0]),
            "dst [192.0.2.10/32, 2001:db8:1::/64], port [443, 8000-8099], mode drop, keys edge, binds [server, flow], \
             tags [17, 18], scrub true"
        );
        assert_eq!(listed_line(&rules.blocked[0]), "2001:db8:bad::/48 until 2026-12-01T00:00:00Z");
    }
}
