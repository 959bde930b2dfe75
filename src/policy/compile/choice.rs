//! Which conditions of a rule become entries of the hash table, and which become checks.

use rustc_hash::{FxBuildHasher, FxHashSet};

use super::super::values::{Cgroup, Interface, List, Mark, Prefix, Range};
use super::super::{Rule, Values};
use super::{ENTRIES_MAX, Plan, Refused};
use crate::types::Field;

/// The values of a field that become entries.
pub(super) enum Choice<'a> {
    Prefixes(Field, &'a [Prefix]),
    Numbers(Field, &'a [Range]),
    Marks(&'a [Mark]),
    Interfaces(&'a [Interface]),
    Cgroups(&'a [Cgroup]),
}

impl<'a> Choice<'a> {
    /// How many entries it makes.
    pub fn count(&self) -> u64 {
        match self {
            Choice::Prefixes(_, list) => list.len() as u64,
            Choice::Numbers(_, list) => list.iter().map(|range| range.count()).sum(),
            Choice::Marks(list) => list.len() as u64,
            Choice::Interfaces(list) => list.len() as u64,
            Choice::Cgroups(list) => list.len() as u64,
        }
    }
}

impl Plan {
    /// Splits the conditions of a rule into those that become entries and those that become checks.
    pub(super) fn choose<'r>(
        self,
        index: usize,
        rule: &'r Rule,
    ) -> Result<(Vec<Choice<'r>>, Vec<&'r Values>), Refused> {
        let mut choices: Vec<(usize, Choice<'r>)> = Vec::new();
        let mut left = Vec::new();
        for condition in rule.conditions.iter().filter(|condition| !condition.negated) {
            let values = &condition.values;
            let choice = match values {
                // Addresses tell rules apart best, so they come first where not all lists can be entries.
                Values::Dst(list) => (0, self.prefixes(Field::FIELD_DST, list)),
                Values::Src(list) => (1, self.prefixes(Field::FIELD_SRC, list)),
                Values::Interface(list) => (2, Some(Choice::Interfaces(list.all()))),
                Values::Cgroup(list) => (3, Some(Choice::Cgroups(list.all()))),
                Values::Uid(list) => (4, self.numbers(Field::FIELD_UID, list)),
                Values::Mark(list) => (5, Some(Choice::Marks(list.all()))),
                Values::Port(list) => (6, self.numbers(Field::FIELD_DPORT, list)),
                Values::SrcPort(list) => (7, self.numbers(Field::FIELD_SPORT, list)),
            };
            match choice {
                (rank, Some(choice)) => choices.push((rank, choice)),
                (_, None) => left.push(values),
            }
        }
        choices.sort_by_key(|(rank, _)| *rank);
        let mut combinations = 1u64;
        let mut kept = Vec::new();
        for (_, choice) in choices {
            let count = choice.count();
            let product = combinations.saturating_mul(count);
            // One of several cgroups or marks cannot be said in checks, which all have to hold.
            let must = matches!(choice, Choice::Cgroups(_) | Choice::Marks(_));
            if count <= 1 || combinations == 1 || must || product <= self.combinations_max {
                combinations = product;
                kept.push(choice);
            } else {
                let values = rule.conditions.iter().map(|condition| &condition.values);
                left.extend(values.filter(|values| is_of(values, &choice)));
            }
        }
        if combinations > ENTRIES_MAX {
            return Err(Refused {
                rule: Some(index),
                what: format!("rule '{}' has {combinations} combinations of values", rule.name),
                help: format!("at most {ENTRIES_MAX} are possible; split it into rules with fewer lists"),
            });
        }
        Ok((kept, left))
    }

    fn prefixes<'r>(self, field: Field, list: &'r List<Prefix>) -> Option<Choice<'r>> {
        let list = list.all();
        let few = list.len() <= 1 || lengths(list) <= self.lengths_max;
        few.then_some(Choice::Prefixes(field, list))
    }

    fn numbers<'r>(self, field: Field, list: &'r List<Range>) -> Option<Choice<'r>> {
        let list = list.all();
        let count: u64 = list.iter().map(|range| range.count()).sum();
        (1..=64).contains(&count).then_some(Choice::Numbers(field, list))
    }
}

/// True if the choice was made from these values.
fn is_of(values: &Values, choice: &Choice<'_>) -> bool {
    match (values, choice) {
        (Values::Dst(list), Choice::Prefixes(Field::FIELD_DST, of))
        | (Values::Src(list), Choice::Prefixes(Field::FIELD_SRC, of)) => std::ptr::eq(list.all(), *of),
        (Values::Port(list), Choice::Numbers(Field::FIELD_DPORT, of))
        | (Values::SrcPort(list), Choice::Numbers(Field::FIELD_SPORT, of))
        | (Values::Uid(list), Choice::Numbers(Field::FIELD_UID, of)) => std::ptr::eq(list.all(), *of),
        (Values::Interface(list), Choice::Interfaces(of)) => std::ptr::eq(list.all(), *of),
        _ => false,
    }
}

/// How many different lengths, counting the families apart.
fn lengths(list: &[Prefix]) -> usize {
    list.iter().map(|prefix| (prefix.is_v6(), prefix.bits())).collect::<FxHashSet<_>>().len()
}

/// What the list needs shapes for.
pub(super) fn first_of_each_length(list: &[Prefix]) -> Vec<Prefix> {
    let mut seen = FxHashSet::with_hasher(FxBuildHasher);
    list.iter().copied().filter(|prefix| seen.insert((prefix.is_v6(), prefix.bits()))).collect()
}
