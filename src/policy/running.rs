//! Remembers which policy is in use. The kernel has the rules in a form from which nobody could tell what they were
//! called; so beside it, in the state directory, lies the policy as a file, with what its names meant:
//!
//! ```text
//! <instance>.policy/<generation>.toml    the rules
//! <instance>.policy/<generation>.json    when and from where, hit counters by name, interfaces and cgroups
//! ```
//!
//! Both are written before their generation is put into use, and older ones are removed behind that, so the files of the
//! generation in use are there whenever a process is killed.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use super::compile::{Naming, Refused, compile};
use super::install::{DEFAULT_HITS, HITS_MAX};
use super::names::Names;
use super::read::{self, Options, Progress};
use super::write::to_toml;
use super::{Decision, Policy, Values, summary};
use crate::program::Maps;
use crate::state::{self, Instance};

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

/// What the file of a [`Memory`] ends in.
const JSON: &str = "json";

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
    // Where there is none, programs of another version may still go by the last one.
    let before = running.or_else(|| state::newest(&instance.policy_dir)).unwrap_or(0);
    let memory = Memory::read(instance, before).unwrap_or_default();
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
    let number = before + 1;
    let installed = next
        .write(instance, number, policy)
        .and_then(|()| maps.clear_hits(&reused))
        .and_then(|()| maps.install_as(number, &compiled, progress));
    match (&installed, running) {
        (Err(_), _) => state::forget_newer(&instance.policy_dir, Some(before)),
        (Ok(()), Some(_)) => forget_all_but(instance, number),
        (Ok(()), None) => {}
    }
    Ok(installed.map(|()| number)?)
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
    fn paths(instance: &Instance, generation: u64) -> (PathBuf, PathBuf) {
        let path = |kind| instance.policy_dir.join(format!("{generation}.{kind}"));
        (path("toml"), path(JSON))
    }

    fn read(instance: &Instance, generation: u64) -> Option<Memory> {
        let (_, json) = Memory::paths(instance, generation);
        serde_json::from_str(&fs::read_to_string(json).ok()?).ok()
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
        if let Some(pair) = memory.interfaces.windows(2).find(|p| p[0].0 == p[1].0 && p[0].1 != p[1].1) {
            bail!(
                "remembering the policy: its rules mean '{}' in two network namespaces; give one of them a name \
                 (`ip netns attach NAME PID`), and write the interface as NAME:{0}",
                pair[0].0
            );
        }
        Ok(memory)
    }

    fn write(&self, instance: &Instance, generation: u64, policy: &Policy) -> Result<()> {
        let (toml, json) = Memory::paths(instance, generation);
        let write = || -> Result<()> {
            fs::create_dir_all(&instance.policy_dir)?;
            fs::write(&toml, to_toml(policy))?;
            // In one step, and last: where it is, all is there.
            let next = instance.policy_dir.join("next");
            fs::write(&next, serde_json::to_vec(self)?)?;
            fs::rename(&next, &json)?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", state::shown(&toml).display()))
    }
}

fn forget_all_but(instance: &Instance, generation: u64) {
    let (toml, json) = Memory::paths(instance, generation);
    for entry in fs::read_dir(&instance.policy_dir).into_iter().flatten().flatten() {
        if entry.path() != toml && entry.path() != json {
            // What stays is removed by the next one.
            fs::remove_file(entry.path()).ok();
        }
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
    remembered(instance, generation.number).with_context(|| lost(instance))
}

fn remembered(instance: &Instance, generation: u64) -> Result<Running> {
    let (toml, json) = Memory::paths(instance, generation);
    let missing = || format!("{} is gone or of another version", state::shown(&json).display());
    let memory = Memory::read(instance, generation).with_context(missing)?;
    let text = fs::read_to_string(&toml)?;
    let names = Names::known(&memory.interfaces, &memory.cgroups);
    let options = Options { allow_missing: true, is_checked: true, ..Options::default() };
    let checked = read::read_with(&toml, &text, &options, names)?;
    Ok(Running {
        policy: checked.policy,
        hits: memory.hits.into_iter().map(|(_, hits)| hits).collect(),
        generation,
        loaded: humantime::parse_rfc3339(&memory.loaded)?,
        source: memory.source,
    })
}

/// Whether the last policy is remembered. Of that of an attach that was killed there may be a part, and nothing goes by it.
pub fn is_remembered(instance: &Instance) -> bool {
    state::newest(&instance.policy_dir).is_some_and(|number| Memory::paths(instance, number).1.exists())
}

/// Puts what is remembered into maps that have no policy, because those that had it are of another version of netoken.
/// True if something is remembered. It stays as it is, under another number: programs of that version still go by it. The
/// caller holds the lock of the state.
///
/// # Errors
/// This version cannot read it, or cannot put it into use.
pub fn restore(instance: &Instance, maps: &Maps) -> Result<bool> {
    let Some(before) = state::newest(&instance.policy_dir) else { return Ok(false) };
    let restore = || -> Result<()> {
        let Running { policy, hits, .. } = remembered(instance, before)?;
        let number = before + 1;
        let (from, to) = (Memory::paths(instance, before), Memory::paths(instance, number));
        fs::copy(from.0, to.0)?;
        fs::copy(from.1, to.1)?;
        let rings = maps.ring_numbers(&policy)?;
        let names = Naming { instance: &instance.name, rings: &rings };
        let compiled = compile(&policy, names, &hits).map_err(|refused| anyhow::anyhow!(refused))?;
        maps.install_as(number, &compiled, None)
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
    struct Remembered {
        loaded: String,
        source: String,
        default: Option<String>,
        hits: Vec<IgnoredAny>,
    }
    let number = || Ok::<_, anyhow::Error>(maps.generation()?.map(|generation| generation.number));
    let (mut generation, mut tries) = (number()?, 0..10);
    while let Some(before) = generation {
        let (_, json) = Memory::paths(instance, before);
        let read = || -> Result<Remembered> { Ok(serde_json::from_str(&fs::read_to_string(json)?)?) };
        let remembered = read();
        generation = number()?;
        // Another one was loaded meanwhile, and has removed the files of this one.
        if remembered.is_err() && generation != Some(before) && tries.next().is_some() {
            continue;
        }
        let Remembered { loaded, source, default, hits } = remembered.with_context(|| lost(instance))?;
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

/// The names of the rules of a generation, in their order, from the policy directory of its instance; nothing if they are
/// not remembered any more.
pub fn rule_names(policy_dir: &Path, generation: u64) -> Option<Vec<Box<str>>> {
    #[derive(Deserialize)]
    struct Names {
        hits: Vec<(Box<str>, IgnoredAny)>,
    }
    let text = fs::read_to_string(policy_dir.join(format!("{generation}.{JSON}"))).ok()?;
    let names: Names = serde_json::from_str(&text).ok()?;
    Some(names.hits.into_iter().map(|(name, _)| name).collect())
}

/// What became of a name that a policy uses since it was loaded.
pub fn stale(values: &Values, now: &Names) -> Option<String> {
    match values {
        Values::Interface(list) => list.all().iter().find_map(|interface| {
            let name = interface.name.rsplit(':').next().unwrap_or_default();
            // One without a name cannot be asked.
            match now.interface_in(interface.netns, name)? {
                index if index == interface.index => None,
                _ if now.has_index(interface.netns, interface.index) => None,
                0 => Some(format!("interface '{}' is gone", interface.name)),
                _ => Some(format!("interface '{}' is another one now", interface.name)),
            }
        }),
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
