//! Remembers which rules are in use. The kernel has them in a form from which nobody could tell what they were called;
//! so beside it, in the state directory, lies what was loaded:
//!
//! ```text
//! <instance>.guard/<number>.toml    the rules and lists
//! <instance>.guard/<number>.json    when and from where, and where the counters of each rule are
//! ```
//!
//! As with a policy, when they are written and which of them count is the business of [`crate::state`]'s `remembered`.
//!
//! A rule has a row of counters, which it keeps as long as it keeps its name. A row is never set to zero, since the
//! kernel may be counting there: what it had when a rule got it is remembered, and taken off.

use std::collections::HashMap;
use std::fmt;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::counters::{GuardCounters, Row};
use super::program::GuardMaps;
use super::rules::Rules;
use super::types::Size;
use crate::clock;
use crate::state::{Instance, Remembered};

/// Rules that are in use.
#[derive(Debug)]
pub struct Running {
    /// With the slots that the instance has, whoever set them.
    pub rules: Rules,
    /// How many packets got each verdict by each rule, since it has its name.
    pub counts: Vec<Row>,
    /// Counts what was put into use.
    pub number: u64,
    /// When it was.
    pub loaded: SystemTime,
    /// The file that it is from.
    pub source: String,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    loaded: String,
    source: String,
    /// In the order of the rules.
    rules: Vec<Counted>,
}

/// Where a rule is counted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Counted {
    name: String,
    row: u8,
    /// What the row had counted before.
    before: Row,
}

/// Puts rules into use and remembers them. The caller holds the lock of the state.
///
/// # Errors
/// The running rules are then unchanged.
pub fn load(instance: &Instance, maps: &GuardMaps, rules: &Rules, source: &str) -> Result<()> {
    let running = maps.table()?.map(|table| table.number);
    let remembered = Remembered(&instance.guard_dir);
    let memory = remembered.memory(remembered.before(running)).unwrap_or_default();
    let next = Memory {
        loaded: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        source: source.to_string(),
        rules: give_rows(rules, &memory, &GuardCounters::read(maps)?)?,
    };
    next.put(instance, maps, running, rules)
}

/// To be called once programs go by what was put into maps that had no rules.
///
/// # Errors
/// The kernel refused to say which rules are in use.
pub fn confirm(instance: &Instance, maps: &GuardMaps) -> Result<()> {
    if let Some(table) = maps.table()? {
        Remembered(&instance.guard_dir).confirm(table.number);
    }
    Ok(())
}

/// A row for every rule. One that the running rules use is given to nobody else: they count there until the moment of
/// the change.
fn give_rows(rules: &Rules, memory: &Memory, counters: &GuardCounters) -> Result<Vec<Counted>> {
    let known: HashMap<&str, &Counted> = memory.rules.iter().map(|rule| (&*rule.name, rule)).collect();
    let mut free =
        (1..Size::GUARD_ROWS.0 as u8).filter(|row| memory.rules.iter().all(|rule| rule.row != *row));
    let give = |name: &str| match known.get(name) {
        Some(counted) => {
            // Where the counters have begun anew, so does what is taken off them.
            let now = counters.row(counted.row);
            let before = counted.before.iter().zip(&now).map(|(before, now)| *before.min(now)).collect();
            Ok(Counted { before, ..(*counted).clone() })
        }
        None => {
            let row = free.next().context("giving every rule counters: there are not enough")?;
            Ok(Counted { name: name.to_string(), row, before: counters.row(row) })
        }
    };
    rules.rules.iter().map(|rule| &*rule.name).map(give).collect()
}

/// The rules in use. The caller holds the lock of the state, so that they do not change meanwhile.
///
/// # Errors
/// None were ever put into use, or the files about them are gone.
pub fn read(instance: &Instance, maps: &GuardMaps) -> Result<Running> {
    let Some(table) = maps.table()? else {
        bail!("the guard of instance '{}' has no rules", instance.name);
    };
    let lost = || lost(instance);
    // For one who was killed before it did so.
    Remembered(&instance.guard_dir).confirm(table.number);
    let (memory, mut rules) = remembered(instance, table.number).with_context(lost)?;
    rules.slots = clock::slots(&clock::published(&maps.clock)?);
    let counters = GuardCounters::read(maps)?;
    let since = |counted: &Counted| {
        let now = counters.row(counted.row);
        now.iter().zip(&counted.before).map(|(now, before)| now.saturating_sub(*before)).collect()
    };
    Ok(Running {
        rules,
        counts: memory.rules.iter().map(since).collect(),
        number: table.number,
        loaded: humantime::parse_rfc3339(&memory.loaded).with_context(lost)?,
        source: memory.source,
    })
}

/// Rules that are in use, without what they say.
#[derive(Debug)]
pub struct Outline {
    /// Counts what was put into use.
    pub number: u64,
    /// When it was, RFC 3339 in UTC with seconds.
    pub loaded: String,
    /// The file that it is from.
    pub source: String,
    /// How many rules there are.
    pub rules: usize,
}

impl fmt::Display for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = if self.rules == 1 { "" } else { "s" };
        write!(f, "{} rule{s}; from {}, loaded {}", self.rules, self.source, self.loaded)
    }
}

/// The outline of the rules in use, or nothing if none were ever put into use. Needs no lock, and does not read the rules.
///
/// # Errors
/// The files about them are gone.
pub fn outline(instance: &Instance, maps: &GuardMaps) -> Result<Option<Outline>> {
    #[derive(Deserialize)]
    struct Known {
        loaded: String,
        source: String,
        rules: Vec<IgnoredAny>,
    }
    let number = || Ok::<_, anyhow::Error>(maps.table()?.map(|table| table.number));
    let (mut running, mut tries) = (number()?, 0..10);
    while let Some(before) = running {
        let known: Result<Known> = Remembered(&instance.guard_dir).memory(before);
        running = number()?;
        // Others were loaded meanwhile, which has removed the files of these.
        if known.is_err() && running != Some(before) && tries.next().is_some() {
            continue;
        }
        let Known { loaded, source, rules } = known.with_context(|| lost(instance))?;
        return Ok(Some(Outline { number: before, loaded, source, rules: rules.len() }));
    }
    Ok(None)
}

fn lost(instance: &Instance) -> String {
    format!(
        "reading what is remembered of the guard of instance '{}'; load the rules again to mend that",
        instance.name
    )
}

fn remembered(instance: &Instance, number: u64) -> Result<(Memory, Rules)> {
    let remembered = Remembered(&instance.guard_dir);
    let memory = remembered.memory(number)?;
    let rules = Rules::from_toml(&remembered.text(number)?, &instance.guard_dir)?;
    Ok((memory, rules))
}

/// Puts what is remembered into maps that have no rules, because those that had them are of another version of netoken.
/// Returns the rules, if any are remembered. They stay as they are, under another number: programs of that version still go
/// by them. The caller holds the lock of the state.
///
/// # Errors
/// This version cannot read them, or cannot put them into use.
pub fn restore(instance: &Instance, maps: &GuardMaps) -> Result<Option<Rules>> {
    let Some(before) = Remembered(&instance.guard_dir).newest() else { return Ok(None) };
    let restore = || -> Result<Rules> {
        let (mut memory, rules) = remembered(instance, before)?;
        memory.rules = give_rows(&rules, &memory, &GuardCounters::read(maps)?)?;
        memory.put(instance, maps, None, &rules)?;
        Ok(rules)
    };
    let doing = || {
        format!(
            "carrying over the guard's rules of instance '{}', which another version of netoken has loaded; say which \
             to use with --rules FILE",
            instance.name
        )
    };
    restore().with_context(doing).map(Some)
}

/// Whether a rule that is in use wants marks, or would if it were restored. The caller holds the lock of the state.
///
/// # Errors
/// The kernel refused to read them.
pub fn marks(instance: &Instance) -> Result<bool> {
    if let Ok(maps) = GuardMaps::open(&instance.pins) {
        return maps.marks();
    }
    let last = Remembered(&instance.guard_dir).newest().and_then(|number| remembered(instance, number).ok());
    Ok(last.is_some_and(|(_, rules)| rules.marks()))
}

impl Memory {
    /// Writes it down and puts its rules into use.
    fn put(&self, instance: &Instance, maps: &GuardMaps, running: Option<u64>, rules: &Rules) -> Result<()> {
        let rows: Vec<u8> = self.rules.iter().map(|counted| counted.row).collect();
        let put = |number| maps.install(rules, number, &rows);
        Remembered(&instance.guard_dir).put(running, &super::write::to_toml(rules), self, put).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn rules(names: &[String]) -> Rules {
        let rule = |name: &String| {
            format!("[[rule]]\nname = '{name}'\ndst = '::/0'\nmode = 'drop'\ntokens = '0000000000000001'\n")
        };
        Rules::from_toml(&names.iter().map(rule).collect::<String>(), Path::new(".")).unwrap()
    }

    #[test]
    fn a_rule_keeps_its_row_as_long_as_it_keeps_its_name() {
        let many = |from: usize, to: usize| (from..to).map(|n| format!("r{n}")).collect::<Vec<_>>();
        let counters = GuardCounters::default();
        let mut memory = Memory::default();
        // As many rules as there may be, and then as many others.
        for (from, to) in [(0, 32), (32, 64), (40, 72), (0, 1), (0, 32)] {
            let names = many(from, to);
            let given = give_rows(&rules(&names), &memory, &counters).unwrap();
            for counted in &given {
                let before = memory.rules.iter().find(|old| old.row == counted.row);
                let before = before.or(memory.rules.iter().find(|old| old.name == counted.name));
                assert!(before.is_none_or(|old| (old.row, &old.name) == (counted.row, &counted.name)));
            }
            let mut rows: Vec<u8> = given.iter().map(|counted| counted.row).collect();
            rows.sort_unstable();
            rows.dedup();
            assert_eq!((rows.len(), rows.contains(&0)), (names.len(), false));
            memory.rules = given;
        }
    }
}
