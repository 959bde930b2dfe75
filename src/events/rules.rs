//! Names of rules. An event has the number of its rule and of its policy; what they were called is remembered beside
//! the policy, and read when an event first needs it.

use std::path::PathBuf;

use crate::policy::running::{newest, rule_names};
use crate::state::Instance;

/// The names of the rules of one policy after the other.
#[derive(Debug)]
pub struct RuleNames {
    dir: PathBuf,
    /// Of which policy they are; 0 is none.
    generation: u32,
    names: Vec<Box<str>>,
}

impl RuleNames {
    /// For an instance, of which nothing is read yet.
    pub fn of(instance: &Instance) -> RuleNames {
        RuleNames { dir: instance.policy_dir.clone(), generation: 0, names: Vec::new() }
    }

    /// How many characters the longest name has in the policy that is in use.
    pub fn widest(&mut self) -> usize {
        if let Some(newest) = newest(&self.dir) {
            self.read(newest);
        }
        self.names.iter().map(|name| name.chars().count()).max().unwrap_or_default()
    }

    /// The name of a rule, by the number of the policy and its number in there, from 1. Nothing for the default, and
    /// for a policy that was replaced before its names were read.
    pub fn get(&mut self, generation: u32, rule: u32) -> Option<&str> {
        let index = usize::try_from(rule.checked_sub(1)?).ok()?;
        self.read(generation);
        self.names.get(index).map(|name| &**name)
    }

    fn read(&mut self, generation: u32) {
        if generation != self.generation {
            self.generation = generation;
            self.names = rule_names(&self.dir, generation.into()).unwrap_or_default();
        }
    }
}
