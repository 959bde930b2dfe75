//! Remembers which policy is in use. The kernel has the rules in a form from which nobody could tell what they were
//! called; so beside it, in the state directory, lies the policy as a file, with what its names meant:
//!
//! ```text
//! <instance>.policy/<generation>.toml    the rules
//! <instance>.policy/<generation>.json    when and from where, hit counters by name, interfaces and cgroups
//! ```
//!
//! That both are there whenever a process is killed, and nothing else is taken for them, is the business of
//! [`crate::state`]'s `remembered`.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::compile::{Naming, Refused, compile};
use super::install::{DEFAULT_HITS, HITS_MAX};
use super::names::Names;
use super::read::{self, Options, Progress};
use super::values::Interface;
use super::write::to_toml;
use super::{Decision, Policy, Values, summary};
use crate::program::Maps;
use crate::state::{Instance, Remembered};

/// A policy that is in use.
#[derive(Debug)]
pub struct Running {
    /// Its rules. Interfaces and cgroups are what they were when it was loaded.
    pub policy: Policy,
    /// Number of each rule's hit counter.
    pub hits: Vec<u32>,
    /// Number of its generation.
    pub generation: u64,
    /// When it was loaded.
    pub loaded: SystemTime,
    /// The file that it is from, or what else it is.
    pub source: String,
}

/// A policy that is in use, without its rules; as `--json` prints it.
#[derive(Debug, Serialize)]
#[serde(tag = "type", rename = "policy")]
pub struct Outline {
    /// Whose it is.
    pub instance: String,
    /// Number of its generation.
    pub generation: u64,
    /// When it was loaded, RFC 3339 in UTC with seconds.
    pub loaded: String,
    /// The file that it is from, or what else it is.
    pub source: String,
    /// How many rules it has.
    pub rules: usize,
    /// What happens where no rule matches.
    pub default: Option<String>,
}

impl fmt::Display for Outline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let summary = summary(self.rules, self.default.as_deref());
        write!(f, "{summary}; from {}, loaded {}", self.source, self.loaded)
    }
}

/// What is remembered beside the rules.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Memory {
    loaded: String,
    source: String,
    default: Option<String>,
    /// The highest number of a hit counter that was ever given.
    highest: u32,
    /// In the order of the rules.
    hits: Vec<(String, u32)>,
    interfaces: Vec<(String, u32, u32)>,
    cgroups: Vec<(String, u8, u64)>,
}

/// Why a policy was not put into use.
#[derive(Debug)]
pub enum LoadError {
    /// The policy is beyond what the kernel side can express.
    Refused(Refused),
    /// Something else.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for LoadError {
    fn from(error: anyhow::Error) -> Self {
        LoadError::Other(error)
    }
}

impl From<LoadError> for anyhow::Error {
    fn from(error: LoadError) -> Self {
        match error {
            LoadError::Refused(refused) => anyhow::anyhow!(refused),
            LoadError::Other(error) => error,
        }
    }
}

/// Puts a policy into use and remembers it. Rules that keep their name keep their hit counter. The caller holds the lock of
/// the state. Returns the number of the generation.
///
/// # Errors
/// The running policy is then unchanged.
pub fn load(
    instance: &Instance,
    maps: &Maps,
    policy: &Policy,
    source: &str,
    progress: Option<Progress<'_>>,
) -> Result<u64, LoadError> {
    let running = maps.generation()?.map(|generation| generation.number);
    let remembered = Remembered(&instance.policy_dir);
    let memory = remembered.memory(remembered.before(running)).unwrap_or_default();
    let (hits, highest, reused) = give_numbers(policy, &memory).context("giving every rule a hit counter")?;
    let rings = maps.ring_numbers(policy)?;
    let names = Naming { instance: &instance.name, rings: &rings };
    let compiled = compile(policy, names, &hits).map_err(LoadError::Refused)?;

    let next = Memory {
        loaded: humantime::format_rfc3339_seconds(SystemTime::now()).to_string(),
        source: source.to_string(),
        default: policy.default.as_ref().map(Decision::to_string),
        highest,
        hits: policy.rules.iter().map(|rule| rule.name.to_string()).zip(hits).collect(),
        ..Memory::of_names(policy)?
    };
    let put = |number| {
        maps.clear_hits(&reused)?;
        maps.install_as(number, &compiled, progress)
    };
    Ok(remembered.put(running, &to_toml(policy), &next, put)?)
}

/// To be called once programs go by what was put into maps that had no policy.
///
/// # Errors
/// The kernel refused to say which policy is in use.
pub fn confirm(instance: &Instance, maps: &Maps) -> Result<()> {
    if let Some(generation) = maps.generation()? {
        Remembered(&instance.policy_dir).confirm(generation.number);
    }
    Ok(())
}

/// Numbers for all rules, the highest that was ever given, and those of them that somebody else had before.
///
/// A number that the running policy uses is given to nobody else: its rules count until the moment of the change.
fn give_numbers(policy: &Policy, before: &Memory) -> Result<(Vec<u32>, u32, Vec<u32>)> {
    let known: HashMap<&str, u32> = before.hits.iter().map(|(name, hits)| (&**name, *hits)).collect();
    let used: HashSet<u32> = before.hits.iter().map(|(_, hits)| *hits).collect();
    let mut free = (DEFAULT_HITS + 1..HITS_MAX).filter(|number| !used.contains(number));
    let mut highest = before.highest;
    let mut reused = Vec::new();
    let mut numbers = Vec::with_capacity(policy.rules.len());
    for rule in &policy.rules {
        let number = match known.get(&*rule.name) {
            Some(number) => *number,
            None => {
                let number = free.next().with_context(|| format!("there are only {HITS_MAX}"))?;
                if number <= before.highest {
                    reused.push(number);
                }
                number
            }
        };
        highest = highest.max(number);
        numbers.push(number);
    }
    Ok((numbers, highest, reused))
}

impl Memory {
    /// What its text says, by what the names in it meant when it was put into use.
    fn policy(&self, path: &Path, text: &str) -> Result<Policy> {
        let names = Names::known(&self.interfaces, &self.cgroups);
        let options = Options { allow_missing: true, is_checked: true, ..Options::default() };
        Ok(read::read_with(path, text, &options, names)?.policy)
    }

    fn hit_numbers(&self) -> Vec<u32> {
        self.hits.iter().map(|(_, number)| *number).collect()
    }

    /// What the names in a policy mean. Sorted, so that of interfaces with the same name the newest comes last.
    ///
    /// # Errors
    /// A name has two meanings, of which only one could be remembered.
    fn of_names(policy: &Policy) -> Result<Memory> {
        let mut memory = Memory::default();
        for condition in policy.rules.iter().flat_map(|rule| rule.conditions.iter()) {
            match &condition.values {
                Values::Interface(list) => {
                    memory
                        .interfaces
                        .extend(list.all().iter().map(|i| (i.name.to_string(), i.netns, i.index)));
                }
                Values::Cgroup(list) => {
                    memory.cgroups.extend(list.all().iter().map(|c| (c.path.to_string(), c.level, c.id)));
                }
                _ => {}
            }
        }
        memory.interfaces.sort();
        memory.interfaces.dedup();
        memory.cgroups.sort();
        memory.cgroups.dedup();
        // One that was in no namespace yet is no other one.
        let two = |p: &[(String, u32, u32)]| p[0].0 == p[1].0 && p[0].1 != p[1].1 && p[0].1 != 0;
        if let Some(pair) = memory.interfaces.windows(2).find(|pair| two(pair)) {
            bail!(
                "remembering the policy: its rules mean '{}' in two network namespaces; give one of them a name \
                 (`ip netns attach NAME PID`), and write the interface as NAME:{0}",
                pair[0].0
            );
        }
        Ok(memory)
    }
}

/// The policy in use. The caller holds the lock of the state, so that it does not change meanwhile.
///
/// # Errors
/// None was ever put into use, or the files about it are gone.
pub fn read(instance: &Instance, maps: &Maps) -> Result<Running> {
    let Some(generation) = maps.generation()? else {
        bail!("instance '{}' has no policy", instance.name);
    };
    // For one who was killed before it did so.
    Remembered(&instance.policy_dir).confirm(generation.number);
    remembered(instance, generation.number).with_context(|| lost(instance))
}

fn remembered(instance: &Instance, generation: u64) -> Result<Running> {
    let remembered = Remembered(&instance.policy_dir);
    let memory: Memory = remembered.memory(generation)?;
    let policy = memory.policy(&remembered.text_path(generation), &remembered.text(generation)?)?;
    Ok(Running {
        policy,
        hits: memory.hit_numbers(),
        generation,
        loaded: humantime::parse_rfc3339(&memory.loaded)?,
        source: memory.source,
    })
}

/// Whether the last policy is remembered. One that an attach was killed with is none: nothing goes by it.
pub fn is_remembered(instance: &Instance) -> bool {
    Remembered(&instance.policy_dir).newest().is_some()
}

/// Puts what is remembered into maps that have no policy, because those that had it are of another version of netoken.
/// True if something is remembered. It stays as it is, under another number: programs of that version still go by it. The
/// caller holds the lock of the state.
///
/// # Errors
/// This version cannot read it, or cannot put it into use.
pub fn restore(instance: &Instance, maps: &Maps) -> Result<bool> {
    let files = Remembered(&instance.policy_dir);
    let Some(before) = files.newest() else { return Ok(false) };
    let restore = || -> Result<()> {
        let (text, memory) = (files.text(before)?, files.memory::<Memory>(before)?);
        let policy = memory.policy(&files.text_path(before), &text)?;
        let rings = maps.ring_numbers(&policy)?;
        let names = Naming { instance: &instance.name, rings: &rings };
        let compiled =
            compile(&policy, names, &memory.hit_numbers()).map_err(|refused| anyhow::anyhow!(refused))?;
        let put = |number| maps.install_as(number, &compiled, None);
        files.put(None, &text, &memory, put).map(drop)
    };
    let doing = || {
        format!(
            "carrying over the policy of instance '{}', which another version of netoken has loaded; say which one to \
             use with --policy or --token",
            instance.name
        )
    };
    restore().with_context(doing).map(|()| true)
}

fn lost(instance: &Instance) -> String {
    format!(
        "reading what is remembered of the policy of instance '{}'; load it again to mend that",
        instance.name
    )
}

impl Running {
    /// The same without the rules.
    pub fn outline(&self, instance: &str) -> Outline {
        Outline {
            instance: instance.to_string(),
            generation: self.generation,
            loaded: humantime::format_rfc3339_seconds(self.loaded).to_string(),
            source: self.source.clone(),
            rules: self.policy.rules.len(),
            default: self.policy.default.as_ref().map(Decision::to_string),
        }
    }
}

/// The outline of the policy in use, or nothing if none was ever put into use. Needs no lock, and does not read the rules.
///
/// # Errors
/// The files about it are gone.
pub fn outline(instance: &Instance, maps: &Maps) -> Result<Option<Outline>> {
    #[derive(Deserialize)]
    struct Known {
        loaded: String,
        source: String,
        default: Option<String>,
        hits: Vec<IgnoredAny>,
    }
    let number = || Ok::<_, anyhow::Error>(maps.generation()?.map(|generation| generation.number));
    let (mut generation, mut tries) = (number()?, 0..10);
    while let Some(before) = generation {
        let known: Result<Known> = Remembered(&instance.policy_dir).memory(before);
        generation = number()?;
        // Another one was loaded meanwhile, and has removed the files of this one.
        if known.is_err() && generation != Some(before) && tries.next().is_some() {
            continue;
        }
        let Known { loaded, source, default, hits } = known.with_context(|| lost(instance))?;
        let instance = instance.name.clone();
        return Ok(Some(Outline {
            instance,
            generation: before,
            loaded,
            source,
            rules: hits.len(),
            default,
        }));
    }
    Ok(None)
}

/// The number of the generation in whose place the next one is put, as an event has it; nothing if none is remembered.
pub fn newest(policy_dir: &Path) -> Option<u32> {
    Remembered(policy_dir).newest().and_then(|number| u32::try_from(number).ok())
}

/// The names of the rules of a generation, in their order, from the policy directory of its instance; nothing if they are
/// not remembered any more.
pub fn rule_names(policy_dir: &Path, generation: u64) -> Option<Vec<Box<str>>> {
    #[derive(Deserialize)]
    struct Names {
        hits: Vec<(Box<str>, IgnoredAny)>,
    }
    let names: Names = Remembered(policy_dir).memory(generation).ok()?;
    Some(names.hits.into_iter().map(|(name, _)| name).collect())
}

/// What became of the interfaces of the policy in use since it was loaded, and where it is from. Does not read the rules;
/// knows of nothing if nothing is remembered.
///
/// # Errors
/// The kernel refused to say which policy is in use.
pub fn stale_interfaces(instance: &Instance, maps: &Maps) -> Result<(Vec<String>, String)> {
    #[derive(Default, Deserialize)]
    struct Known {
        source: String,
        interfaces: Vec<(String, u32, u32)>,
    }
    let Some(generation) = maps.generation()? else { return Ok(Default::default()) };
    let known: Known = Remembered(&instance.policy_dir).memory(generation.number).unwrap_or_default();
    let now = Names::default();
    let interfaces = known.interfaces.into_iter();
    let interfaces = interfaces.map(|(name, netns, index)| Interface { name: name.into(), netns, index });
    Ok((interfaces.filter_map(|interface| stale_interface(&interface, &now)).collect(), known.source))
}

fn stale_interface(interface: &Interface, now: &Names) -> Option<String> {
    let Interface { name, netns, index } = interface;
    let (of, short) = name.split_once(':').unwrap_or(("", name));
    // The kernel gives the number of a namespace that is gone to the next one, whose interfaces have much the same
    // indexes: only the name tells them apart.
    let is_same = of.is_empty() || now.netns(of) == Some(*netns);
    let found = match is_same {
        // One without a name cannot be asked.
        true => now.interface_in(*netns, short)?,
        false => now.interface(name).map_or(0, |interface| interface.index),
    };
    match found {
        found if found == *index && (is_same || found == 0 && *index == 0) => None,
        0 if is_same && now.has_index(*netns, *index) => None,
        _ if *index == 0 => Some(format!("interface '{name}' is there now")),
        0 => Some(format!("interface '{name}' is gone")),
        _ => Some(format!("interface '{name}' is another one now")),
    }
}

/// What became of a name that a policy uses since it was loaded.
pub fn stale(values: &Values, now: &Names) -> Option<String> {
    match values {
        Values::Interface(list) => list.all().iter().find_map(|interface| stale_interface(interface, now)),
        Values::Cgroup(list) => {
            list.all().iter().find_map(|cgroup| match now.cgroup(&cgroup.path).map_or(0, |(_, id)| id) {
                id if id == cgroup.id => None,
                0 => Some(format!("cgroup '{}' is gone", cgroup.path)),
                _ => Some(format!("cgroup '{}' is another one now", cgroup.path)),
            })
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(names: &[&str]) -> Policy {
        let text: String = names
            .iter()
            .map(|name| format!("[[rule]]\nname = '{name}'\nmark = 1\naction = 'skip'\n"))
            .collect();
        Policy::from_toml(&text).unwrap()
    }

    #[test]
    fn a_rule_keeps_its_counter_as_long_as_it_keeps_its_name() {
        let (hits, highest, reused) = give_numbers(&policy(&["a", "b", "c"]), &Memory::default()).unwrap();
        assert_eq!((hits, highest, reused.len()), (vec![1, 2, 3], 3, 0));
        let before = Memory {
            highest: 5,
            hits: vec![("a".into(), 1), ("b".into(), 2), ("c".into(), 4)],
            ..Memory::default()
        };
        // The number of `b`, which is gone, still counts for it; 3 was somebody's and is free.
        let (hits, highest, reused) = give_numbers(&policy(&["c", "x", "a", "y", "z"]), &before).unwrap();
        assert_eq!((hits, highest), (vec![4, 3, 1, 5, 6], 6));
        assert_eq!(reused, [3, 5]);
    }
}
