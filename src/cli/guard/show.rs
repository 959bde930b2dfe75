//! `netoken guard --show` and `--diff`: the rules that run, what each has counted, and what a file would change.

use std::collections::{BTreeSet, HashSet};
use std::io::{self, Write};
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Lists, Record, Verdicts, print_json};
use crate::cli::args::Scope;
use crate::cli::difference::{Difference, of_rules, tell};
use crate::cli::told::load_keys;
use crate::guard::program::GuardMaps;
use crate::guard::rules::{Listed, Rule, Rules, ended};
use crate::guard::running::{self, Running};
use crate::guard::write::{line, listed_line, settings, to_toml};
use crate::keys::RingName;
use crate::privileges;
use crate::state::State;

/// More differences of a list are counted and not shown: nobody reads a million lines.
const SHOWN_MAX: usize = 20;

/// The rules that run, and the rings of theirs that have no key.
fn running(doing: &str, scope: &Scope) -> Result<(Running, BTreeSet<RingName>)> {
    privileges::check(doing)?;
    let (state, _lock) = State::with_instance(&scope.instance)?.with_context(|| {
        format!(
            "{doing}: there is no instance '{}'; attach its guard with: netoken guard {} --attach --rules FILE",
            scope.instance,
            scope.flags("NAME")
        )
    })?;
    let instance = state.instance(&scope.instance);
    if !instance.has_guard() {
        bail!("{doing}: instance '{}' has no guard", scope.instance);
    }
    let maps = GuardMaps::open(&instance.pins).with_context(|| doing.to_string())?;
    Ok((running::read(&instance, &maps)?, maps.rings_without_key()?))
}

pub(super) fn show(scope: &Scope, toml: bool) -> Result<()> {
    let (running, keyless) = running("showing the rules of the guard", scope)?;
    if toml {
        return write!(io::stdout(), "{}", to_toml(&running.rules)).context("writing to standard output");
    }
    if scope.json {
        show_json(scope, &running, &keyless)
    } else {
        show_text(scope, &running, &keyless).context("writing to standard output")
    }
}

fn show_json(scope: &Scope, running: &Running, keyless: &BTreeSet<RingName>) -> Result<()> {
    let rules = &running.rules;
    print_json(&Record::GuardRules {
        instance: &scope.instance,
        number: running.number,
        loaded: humantime::format_rfc3339_seconds(running.loaded).to_string(),
        source: &running.source,
        rules: rules.rules.len(),
        lists: Some(Lists::of(rules)),
    })?;
    for ((rule, counts), number) in rules.rules.iter().zip(&running.counts).zip(1..) {
        print_json(&Record::GuardRule {
            rule: number,
            name: &rule.name,
            says: line(rule),
            rings_without_key: without_key(rule, keyless).collect(),
            seen: counts.iter().sum(),
            verdicts: Verdicts(counts),
        })?;
    }
    Ok(())
}

/// The key rings of a rule that have no key.
fn without_key<'a>(rule: &'a Rule, keyless: &'a BTreeSet<RingName>) -> impl Iterator<Item = RingName> + 'a {
    rule.keys.iter().copied().filter(|ring| keyless.contains(ring))
}

fn show_text(scope: &Scope, running: &Running, keyless: &BTreeSet<RingName>) -> Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    writeln!(
        out,
        "instance '{}': {}; from {}, loaded {}",
        scope.instance,
        running.rules.summary(),
        running.source,
        humantime::format_rfc3339_seconds(running.loaded)
    )?;
    for (name, list) in [("exempt", &running.rules.exempt), ("blocked", &running.rules.blocked)] {
        if ended(list) > 0 {
            writeln!(out, "{name}: {} of {} have expired", ended(list), list.len())?;
        }
    }
    for (name, value) in settings(&running.rules) {
        if let Some(value) = value {
            writeln!(out, "{name} = {value}")?;
        }
    }
    for ((rule, counts), number) in running.rules.rules.iter().zip(&running.counts).zip(1..) {
        write!(out, "\nrule {number} '{}': {}", rule.name, line(rule))?;
        for ring in without_key(rule, keyless) {
            let load = load_keys(&scope.instance);
            write!(out, "  [ring '{ring}' has no key: all its tokens are refused; {load}]")?;
        }
        writeln!(out)?;
        let verdicts: Vec<String> = Verdicts(counts)
            .iter()
            .filter(|(_, packets)| *packets > 0)
            .map(|(name, packets)| format!("{packets} {name}"))
            .collect();
        let seen: u64 = counts.iter().sum();
        let counted = if seen == 0 {
            "nothing yet".to_string()
        } else {
            format!("{seen} seen: {}", verdicts.join(", "))
        };
        writeln!(out, "  {counted}")?;
    }
    Ok(out.flush()?)
}

pub(super) fn diff(scope: &Scope, file: &Path) -> Result<()> {
    let rules = Rules::from_file(file)?;
    let (running, _) = running("reading the rules of the guard that run", scope)?;
    tell(&differences(&running.rules, &rules, !scope.json), scope.json).context("writing to standard output")
}

/// Of a long list only some, if `brief`.
fn differences(before: &Rules, after: &Rules, brief: bool) -> Vec<Difference> {
    let mut found = of_rules(&before.rules, &after.rules, |rule| &rule.name, |rule, _| line(rule));
    for ((name, before), (_, after)) in settings(before).into_iter().zip(settings(after)) {
        let change = match (&before, &after) {
            // The instance keeps what it has.
            (_, None) if name == "slots" => continue,
            (before, after) if before == after => continue,
            (None, _) => "added",
            (_, None) => "removed",
            _ => "changed",
        };
        found.push(Difference { change, name: Some(name.to_string()), before, after });
    }
    for (name, before, after) in
        [("exempt", &before.exempt, &after.exempt), ("blocked", &before.blocked, &after.blocked)]
    {
        for (change, these, those) in [("removed", before, after), ("added", after, before)] {
            let those: HashSet<&Listed> = those.iter().collect();
            let only: Vec<&Listed> = these.iter().filter(|listed| !those.contains(listed)).collect();
            let shown = if brief { SHOWN_MAX.min(only.len()) } else { only.len() };
            let mut texts: Vec<String> = only[..shown].iter().map(|listed| listed_line(listed)).collect();
            if shown < only.len() {
                texts.push(format!("and {} more", only.len() - shown));
            }
            found.extend(texts.into_iter().map(|text| {
                let (before, after) =
                    if change == "removed" { (Some(text), None) } else { (None, Some(text)) };
                Difference { change, name: Some(name.to_string()), before, after }
            }));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(head: &str, names: &[&str]) -> Rules {
        let rule = |name: &&str| {
            format!("[[rule]]\nname = '{name}'\ndst = '::/0'\nmode = 'drop'\ntokens = '0000000000000001'\n")
        };
        let text = format!("{head}\n{}", names.iter().map(rule).collect::<String>());
        Rules::from_toml(&text, Path::new(".")).unwrap()
    }

    #[test]
    fn what_changed_is_told_and_nothing_else() {
        let before = rules(
            "slots = {}\nalerts = { within = '1s', low = 1 }\nblocked = ['192.0.2.0/24']",
            &["a", "b", "c"],
        );
        assert!(differences(&before, &before, true).is_empty());
        // Without slots the instance keeps what it has.
        let silent =
            rules("alerts = { within = '1s', low = 1 }\nblocked = ['192.0.2.0/24']", &["a", "b", "c"]);
        assert!(differences(&before, &silent, true).is_empty());
        let after = rules(
            "slots = { length = 8 }\nblocked = [{ src = '192.0.2.0/24', until = '2026-12-01T00:00:00Z' }]",
            &["c", "a", "x"],
        );
        let found: Vec<String> = differences(&before, &after, true)
            .into_iter()
            .map(|d| format!("{} {} {:?}", d.change, d.name.unwrap(), d.after))
            .collect();
        let rule = "Some(\"dst ::/0, mode drop, tokens 0000000000000001\")";
        let expected = [
            "removed b None".to_string(),
            "moved c Some(\"now rule 1\")".to_string(),
            format!("added x {rule}"),
            "changed slots Some(\"{ length = 8, behind = 1, ahead = 1 }\")".to_string(),
            "removed alerts None".to_string(),
            "removed blocked None".to_string(),
            "added blocked Some(\"192.0.2.0/24 until 2026-12-01T00:00:00Z\")".to_string(),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn a_long_list_is_cut_for_people_only() {
        let list: Vec<String> = (0..100).map(|n| format!("'10.0.0.{n}'")).collect();
        let (before, after) = (rules("", &["a"]), rules(&format!("exempt = [{}]", list.join(", ")), &["a"]));
        let brief = differences(&before, &after, true);
        assert_eq!((brief.len(), brief[20].after.as_deref()), (21, Some("and 80 more")));
        assert_eq!(differences(&before, &after, false).len(), 100);
    }
}
