//! Goes through the rules once, and collects what they need: shapes, chains, checks and sets.

use rustc_hash::FxHashMap;

use super::super::{Policy, Rule, Values};
use super::chains::Chains;
use super::choice::{Choice, first_of_each_length};
use super::encode::{Atom, Words, narrow, words};
use super::sets::Sets;
use super::{CHAIN_MAX, CHECKS_MAX, Compiled, LEVELS_MAX, Naming, Plan, Refused, Stop};
use crate::types::{ConditionKind, Facts, Field, Need, RawCondition, Shape};

/// A shape: what is compared, and at which of the generation's levels the cgroup is.
type ShapeKey = (Words, u8);
/// A rule with the checks of one of its ways to match.
pub(super) struct Variant {
    pub rule: u32,
    pub checks: std::ops::Range<usize>,
}

/// Takes mask, level and key of one combination of a rule's values.
type Each<'a, 'e> = dyn FnMut(&mut Compiler<'a>, &Facts, u8, &Facts) -> Result<(), Stop> + 'e;

/// What is known of the policy so far.
pub(super) struct Compiler<'a> {
    pub plan: Plan,
    pub names: Naming<'a>,
    shape_numbers: FxHashMap<ShapeKey, usize>,
    pub shapes: Vec<Shape>,
    pub levels: Vec<u8>,
    pub needs: u32,
    pub variants: Vec<Variant>,
    pub checks: Vec<RawCondition>,
    pub chains: Chains,
    pub sets: Sets,
}

impl<'a> Compiler<'a> {
    pub fn new(plan: Plan, names: Naming<'a>) -> Self {
        Compiler {
            plan,
            names,
            shape_numbers: FxHashMap::default(),
            shapes: Vec::new(),
            levels: Vec::new(),
            needs: 0,
            variants: Vec::new(),
            checks: Vec::new(),
            chains: Chains::default(),
            sets: Sets::default(),
        }
    }

    pub fn run(mut self, policy: &Policy, hits: &[u32]) -> Result<Compiled, Stop> {
        self.chains.reserve(policy.rules.len());
        for (index, rule) in policy.rules.iter().enumerate() {
            self.rule(index, rule)?;
        }
        Ok(self.finish(policy, hits)?)
    }

    /// Only that: one value stands for all of the same length.
    pub fn count_shapes(&mut self, policy: &Policy) -> Result<(), Stop> {
        for (index, rule) in policy.rules.iter().enumerate() {
            let (choices, _) = self.plan.choose(index, rule)?;
            let mut thinned = Vec::new();
            for choice in &choices {
                thinned.push(match choice {
                    Choice::Prefixes(_, list) => first_of_each_length(list),
                    _ => Vec::new(),
                });
            }
            let choices: Vec<Choice<'_>> = choices
                .iter()
                .zip(&thinned)
                .map(|(choice, thin)| match choice {
                    Choice::Prefixes(field, _) => Choice::Prefixes(*field, thin),
                    Choice::Numbers(field, list) => Choice::Numbers(*field, &list[..1]),
                    Choice::Marks(list) => Choice::Marks(list),
                    Choice::Interfaces(list) => Choice::Interfaces(&list[..list.len().min(1)]),
                    Choice::Cgroups(list) => Choice::Cgroups(list),
                })
                .collect();
            self.combine(index, &choices, &mut |compiler, mask, level, _| {
                compiler.shape(mask, level, index);
                Ok(())
            })?;
        }
        Ok(())
    }

    fn rule(&mut self, index: usize, rule: &Rule) -> Result<(), Stop> {
        let (choices, left) = self.plan.choose(index, rule)?;
        if rule.conditions.iter().any(|condition| !condition.negated && condition.values.count() == 0) {
            return Ok(()); // a set that is empty
        }
        let first_check = self.checks.len();
        let level_error = |_| too_many_levels(index, rule);
        for values in left {
            self.add_check(values, false).map_err(level_error)?;
        }
        for condition in rule.conditions.iter().filter(|condition| condition.negated) {
            self.add_check(&condition.values, true).map_err(level_error)?;
        }
        let checks = first_check..self.checks.len();
        let variant = self.variants.len() as u32;
        let (records, is_closed) = (checks.len().div_ceil(CHECKS_MAX).max(1), checks.is_empty());
        if records > CHAIN_MAX {
            return Err(too_many_checks(index, rule, checks.len()).into());
        }
        self.variants.push(Variant { rule: index as u32 + 1, checks });

        self.combine(index, &choices, &mut |compiler, mask, level, key| {
            let shape = compiler.shape(mask, level, index);
            if shape >= compiler.plan.shapes_max {
                return Err(Stop::Shapes);
            }
            let mut key = *key;
            key.shape = shape as u8;
            let chains = &mut compiler.chains;
            let appended = chains.append(&words(&key), variant, records, is_closed);
            Ok(appended.map_err(|()| too_long_a_chain(index, rule))?)
        })
    }

    /// Calls `each` with mask, level and key of every combination.
    fn combine(&mut self, index: usize, choices: &[Choice<'_>], each: &mut Each<'a, '_>) -> Result<(), Stop> {
        self.narrow(index, choices, &Facts::default(), 0, &Facts::default(), each)
    }

    fn narrow(
        &mut self,
        index: usize,
        choices: &[Choice<'_>],
        mask: &Facts,
        level: u8,
        key: &Facts,
        each: &mut Each<'a, '_>,
    ) -> Result<(), Stop> {
        let Some((choice, rest)) = choices.split_first() else {
            return each(self, mask, level, key);
        };
        let mut with = |compiler: &mut Self, atom: Atom<'_>| {
            let (mut mask, mut key, mut level) = (*mask, *key, level);
            if let Atom::Cgroup(_, at) = atom {
                level = at;
                compiler.needs |= Need::NEED_SENDER.0;
            }
            if let Atom::Number(Field::FIELD_UID, _) = atom {
                compiler.needs |= Need::NEED_SENDER.0 | Need::NEED_UID.0;
            }
            match narrow(atom, &mut mask, &mut key) {
                true => compiler.narrow(index, rest, &mask, level, &key, each),
                false => Ok(()),
            }
        };
        match choice {
            Choice::Prefixes(field, list) => {
                list.iter().try_for_each(|prefix| with(self, Atom::Prefix(*field, *prefix)))
            }
            Choice::Numbers(field, list) => list
                .iter()
                .flat_map(|range| range.first..=range.last)
                .try_for_each(|number| with(self, Atom::Number(*field, number))),
            Choice::Marks(list) => list.iter().try_for_each(|mark| with(self, Atom::Mark(*mark))),
            Choice::Interfaces(list) => list
                .iter()
                .filter(|interface| interface.index != 0)
                .try_for_each(|interface| with(self, Atom::Interface(interface))),
            Choice::Cgroups(list) => {
                for cgroup in list.iter().filter(|cgroup| cgroup.id != 0) {
                    let level = self
                        .level(cgroup.level)
                        .map_err(|()| Refused { rule: Some(index), ..too_many_levels_of(LEVELS_MAX) })?;
                    with(self, Atom::Cgroup(cgroup, level))?;
                }
                Ok(())
            }
        }
    }

    fn level(&mut self, level: u8) -> Result<u8, ()> {
        if let Some(at) = self.levels.iter().position(|known| *known == level) {
            return Ok(at as u8);
        }
        if self.levels.len() == LEVELS_MAX {
            return Err(());
        }
        self.levels.push(level);
        Ok(self.levels.len() as u8 - 1)
    }

    fn shape(&mut self, mask: &Facts, level: u8, index: usize) -> usize {
        let next = self.shapes.len();
        let shapes = &mut self.shapes;
        *self.shape_numbers.entry((words(mask), level)).or_insert_with(|| {
            // Rules come in order, so the first rule of a new shape is not before that of any other.
            shapes.push(Shape { mask: *mask, first_rule: index as u32 + 1, level, pad: [0; 3] });
            next
        })
    }

    /// Adds the checks that stand for a condition.
    fn add_check(&mut self, values: &Values, negated: bool) -> Result<(), ()> {
        let check = |kind: ConditionKind, field: Field, a, b| RawCondition {
            kind: kind.0 as u8,
            field: field.0 as u8,
            negated: negated.into(),
            level: 0,
            a,
            b,
        };
        let in_set = |field, set| check(ConditionKind::CONDITION_SET, field, set, 0);
        match values {
            Values::Src(list) | Values::Dst(list) => {
                let field =
                    if matches!(values, Values::Src(_)) { Field::FIELD_SRC } else { Field::FIELD_DST };
                let set = self.sets.prefixes(list);
                self.checks.push(in_set(field, set));
            }
            Values::Port(list) | Values::SrcPort(list) | Values::Uid(list) => {
                let (field, bits) = match values {
                    Values::Port(_) => (Field::FIELD_DPORT, 16),
                    Values::SrcPort(_) => (Field::FIELD_SPORT, 16),
                    _ => (Field::FIELD_UID, 32),
                };
                if field == Field::FIELD_UID {
                    self.needs |= Need::NEED_SENDER.0 | Need::NEED_UID.0;
                }
                if let [range] = list.all() {
                    self.checks.push(check(ConditionKind::CONDITION_RANGE, field, range.first, range.last));
                } else {
                    let set = self.sets.ranges(list, bits);
                    self.checks.push(in_set(field, set));
                }
            }
            // None of them may fit, so each has a check of its own.
            Values::Mark(list) => self.checks.extend(
                list.all()
                    .iter()
                    .map(|m| check(ConditionKind::CONDITION_BITS, Field::FIELD_MARK, m.value, m.mask)),
            ),
            Values::Interface(list) => {
                let set = self.sets.begin();
                for interface in list.all().iter().filter(|interface| interface.index != 0) {
                    let mut value = [0; 16];
                    value[..4].copy_from_slice(&interface.index.to_ne_bytes());
                    value[4..8].copy_from_slice(&interface.netns.to_ne_bytes());
                    self.sets.add(set, value, 64);
                }
                self.checks.push(in_set(Field::FIELD_INTERFACE, set));
            }
            Values::Cgroup(list) => {
                self.needs |= Need::NEED_SENDER.0;
                let set = self.sets.begin();
                let mut levels = Vec::new();
                for cgroup in list.all() {
                    let mut value = [0; 16];
                    value[..8].copy_from_slice(&cgroup.id.to_ne_bytes());
                    if cgroup.id != 0 {
                        self.sets.add(set, value, 64);
                    }
                    let level = self.level(cgroup.level)?;
                    if !levels.contains(&level) {
                        levels.push(level);
                    }
                }
                for level in levels {
                    self.checks.push(RawCondition { level, ..in_set(Field::FIELD_CGROUP, set) });
                }
            }
        }
        Ok(())
    }
}

fn too_many_checks(index: usize, rule: &Rule, count: usize) -> Refused {
    Refused {
        rule: Some(index),
        what: format!(
            "rule '{}' has {count} checks, one for each value of not_mark and for each other list that is no key; at \
             most {} are possible",
            rule.name,
            CHAIN_MAX * CHECKS_MAX
        ),
        help: "use fewer values of not_mark, such as one with a mask".to_string(),
    }
}

fn too_long_a_chain(index: usize, rule: &Rule) -> Refused {
    Refused {
        rule: Some(index),
        what: format!(
            "rule '{}' is the last of too many rules that differ only in ranges, negations or big lists: more than \
             {CHAIN_MAX} would have to be tried one after the other for one packet",
            rule.name
        ),
        help: "give them something else to tell them apart, such as a prefix or single ports".to_string(),
    }
}

fn too_many_levels(index: usize, rule: &Rule) -> Refused {
    let of = too_many_levels_of(LEVELS_MAX);
    Refused { rule: Some(index), what: format!("rule '{}': {}", rule.name, of.what), ..of }
}

fn too_many_levels_of(max: usize) -> Refused {
    Refused {
        rule: None,
        what: format!("the cgroups of this policy are at more than {max} different depths"),
        help: "use cgroups at fewer depths: each costs every packet a call".to_string(),
    }
}
