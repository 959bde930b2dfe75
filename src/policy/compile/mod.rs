//! Turns a policy into what the kernel looks things up in: shapes, entries, records and sets, as `src/bpf/types.h`
//! describes them and `src/bpf/policy.h` uses them. Nothing here talks to the kernel.
//!
//! Each rule becomes entries of a hash table, one for every combination of its values. What is no single value, or
//! has too many combinations, becomes a check in the rule's record instead. Which lists of prefixes are entries and
//! which are sets is a [`Plan`]: the first that stays within the kernel side's limits is taken.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, LazyLock};

use plain::Plain;
use rustc_hash::{FxBuildHasher, FxHashMap, FxHashSet};

use super::values::{Cgroup, Interface, List, Mark, Prefix, Range};
use super::{Policy, Rule, Values};
use crate::keys::RingName;
use crate::types::{
    ConditionKind, Entry, Facts, Field, Generation, Need, RawCondition, Record, Rule as RawRule, SetKey,
    Shape, Size,
};
use encode::{Atom, Words, blocks, describe_mask, facts, narrow, raw_rule, words};

// SAFETY: integers and arrays of them, without hidden padding, which types.h asserts.
unsafe impl Plain for Facts {}
// SAFETY: the same.
unsafe impl Plain for Generation {}

mod encode;

const SHAPES_MAX: usize = Size::SHAPES_MAX.0 as usize;
const CHAIN_MAX: usize = Size::CHAIN_MAX.0 as usize;
const LEVELS_MAX: usize = Size::CGROUP_LEVELS_MAX.0 as usize;
const CHECKS_MAX: usize = Size::RECORD_CHECKS_MAX.0 as usize;
/// More shapes than these are not listed.
const SHOWN_MAX: usize = 100;
/// A rule that would make more entries is refused: it would take more than a gigabyte of kernel memory.
const ENTRIES_MAX: u64 = 1 << 24;

/// Everything that the kernel needs of one generation.
pub struct Compiled {
    /// The generation itself; its number and slot are given when it is put into use.
    pub generation: Box<Generation>,
    /// Keys and values of the hash table.
    pub entries: Vec<(Facts, Entry)>,
    /// Records, from number 1.
    pub records: Vec<Record>,
    /// Keys of the sets.
    pub sets: Vec<SetKey>,
    /// The shapes in words, for people.
    pub shapes: Vec<String>,
    /// What became of the lists.
    pub plan: Plan,
}

/// Why a policy cannot be expressed. The message is for the one who wrote it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// The rule that it is about, by its index.
    pub rule: Option<usize>,
    /// What is wrong.
    pub what: String,
    /// What to do about it.
    pub help: String,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.what, self.help)
    }
}
impl std::error::Error for Refused {}

/// How lists become entries or sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// A list of prefixes with more different lengths than this becomes a set.
    lengths_max: usize,
    /// A rule whose second list of values makes more combinations than this has a check for it instead.
    combinations_max: u64,
    /// So many shapes are accepted.
    shapes_max: usize,
}

/// In the order in which they are tried. A shape costs every packet a look into the hash table, a set costs only
/// those packets that come to its rule, but more.
const PLANS: [Plan; 5] = [
    Plan { lengths_max: usize::MAX, combinations_max: 64, shapes_max: 24 },
    Plan { lengths_max: 8, combinations_max: 64, shapes_max: SHAPES_MAX },
    Plan { lengths_max: usize::MAX, combinations_max: 64, shapes_max: SHAPES_MAX },
    Plan { lengths_max: 1, combinations_max: 64, shapes_max: SHAPES_MAX },
    Plan { lengths_max: usize::MAX, combinations_max: 1 << 16, shapes_max: SHAPES_MAX },
];

/// What the instance calls the things that tokens are made of.
#[derive(Clone, Copy, Debug)]
pub struct Naming<'a> {
    /// Its own name.
    pub instance: &'a str,
    /// The numbers of its key rings. One that is not here has number 0, which does where nothing is stamped.
    pub rings: &'a HashMap<RingName, u8>,
}

impl Naming<'static> {
    /// For a policy that is only looked at.
    pub fn none() -> Naming<'static> {
        static NONE: LazyLock<HashMap<RingName, u8>> = LazyLock::new(HashMap::new);
        Naming { instance: "default", rings: &NONE }
    }
}

/// Compiles a policy. `hits` holds the number of each rule's hit counter; the default has number 0.
///
/// # Errors
/// It is beyond the limits; the message names the shapes or the rules that are too many.
pub fn compile(policy: &Policy, names: Naming<'_>, hits: &[u32]) -> Result<Compiled, Refused> {
    let mut refused = None;
    for plan in PLANS {
        match Compiler::new(plan, names).run(policy, hits) {
            Ok(compiled) => return Ok(compiled),
            // Too many shapes is the reason only if no plan had another.
            Err(Stop::Refused(error)) => refused = Some(error),
            Err(Stop::Shapes) => {}
        }
    }
    Err(refused.unwrap_or_else(|| too_many_shapes(policy, names)))
}

/// Why a plan is given up.
enum Stop {
    /// It has more shapes than it may have.
    Shapes,
    Refused(Refused),
}

impl From<Refused> for Stop {
    fn from(refused: Refused) -> Self {
        Stop::Refused(refused)
    }
}

/// Names the shapes that are left where most lists are sets.
fn too_many_shapes(policy: &Policy, names: Naming<'_>) -> Refused {
    let plan = PLANS.into_iter().min_by_key(|plan| plan.lengths_max).unwrap_or(PLANS[0]);
    let mut compiler = Compiler::new(plan, names);
    if let Err(Stop::Refused(refused)) = compiler.count_shapes(policy) {
        return refused;
    }
    let shapes = compiler.describe_shapes();
    Refused {
        rule: None,
        what: format!(
            "the rules have {} shapes, more than {SHAPES_MAX}: a packet is looked up once for each. They are:\n  {}",
            shapes.len(),
            shapes[..shapes.len().min(SHOWN_MAX)].join("\n  ")
        ),
        help: "use fewer different combinations of fields and prefix lengths".to_string(),
    }
}

/// The values of a field that become entries.
enum Choice<'a> {
    Prefixes(Field, &'a [Prefix]),
    Numbers(Field, &'a [Range]),
    Marks(&'a [Mark]),
    Interfaces(&'a [Interface]),
    Cgroups(&'a [Cgroup]),
}

impl<'a> Choice<'a> {
    /// How many entries it makes, and how it ranks when not all can: the addresses tell rules apart best.
    fn count(&self) -> u64 {
        match self {
            Choice::Prefixes(_, list) => list.len() as u64,
            Choice::Numbers(_, list) => list.iter().map(|range| range.count()).sum(),
            Choice::Marks(list) => list.len() as u64,
            Choice::Interfaces(list) => list.len() as u64,
            Choice::Cgroups(list) => list.len() as u64,
        }
    }
}

/// A shape: what is compared, and at which of the generation's levels the cgroup is.
type ShapeKey = (Words, u8);
/// A rule with the checks of one of its ways to match.
struct Variant {
    rule: u32,
    checks: std::ops::Range<usize>,
}

/// The variants behind a key, in the order of their rules.
struct Chain {
    first: u32,
    last: u32,
    /// Records that they will need.
    len: u16,
    /// The last one has no checks, so nothing behind it is ever reached.
    is_closed: bool,
}

const NONE: u32 = u32::MAX;

/// Takes mask, level and key of one combination of a rule's values.
type Each<'a, 'e> = dyn FnMut(&mut Compiler<'a>, &Facts, u8, &Facts) -> Result<(), Stop> + 'e;

struct Compiler<'a> {
    plan: Plan,
    names: Naming<'a>,
    shape_numbers: FxHashMap<ShapeKey, usize>,
    shapes: Vec<Shape>,
    levels: Vec<u8>,
    needs: u32,
    variants: Vec<Variant>,
    checks: Vec<RawCondition>,
    chains: FxHashMap<Words, Chain>,
    /// Variant and next link, or NONE.
    links: Vec<(u32, u32)>,
    sets: Vec<SetKey>,
    /// Sets by the address of the list that they were made from.
    known_sets: FxHashMap<(usize, u32), u32>,
    next_set: u32,
    entries: u64,
}

impl<'a> Compiler<'a> {
    fn new(plan: Plan, names: Naming<'a>) -> Self {
        Compiler {
            plan,
            names,
            shape_numbers: FxHashMap::default(),
            shapes: Vec::new(),
            levels: Vec::new(),
            needs: 0,
            variants: Vec::new(),
            checks: Vec::new(),
            chains: FxHashMap::default(),
            links: Vec::new(),
            sets: Vec::new(),
            known_sets: FxHashMap::default(),
            next_set: 0,
            entries: 0,
        }
    }

    fn run(mut self, policy: &Policy, hits: &[u32]) -> Result<Compiled, Stop> {
        self.chains.reserve(policy.rules.len());
        self.links.reserve(policy.rules.len());
        for (index, rule) in policy.rules.iter().enumerate() {
            self.rule(index, rule)?;
        }
        Ok(self.finish(policy, hits)?)
    }

    /// Only that: one value stands for all of the same length.
    fn count_shapes(&mut self, policy: &Policy) -> Result<(), Stop> {
        for (index, rule) in policy.rules.iter().enumerate() {
            let (choices, _) = self.choose(index, rule)?;
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

    /// Splits the conditions of a rule into those that become entries and those that become checks.
    fn choose<'r>(
        &mut self,
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
            if count <= 1 || combinations == 1 || must || product <= self.plan.combinations_max {
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

    fn prefixes<'r>(&self, field: Field, list: &'r List<Prefix>) -> Option<Choice<'r>> {
        let list = list.all();
        let few = list.len() <= 1 || lengths(list) <= self.plan.lengths_max;
        few.then_some(Choice::Prefixes(field, list))
    }

    fn numbers<'r>(&self, field: Field, list: &'r List<Range>) -> Option<Choice<'r>> {
        let list = list.all();
        let count: u64 = list.iter().map(|range| range.count()).sum();
        (1..=64).contains(&count).then_some(Choice::Numbers(field, list))
    }

    fn rule(&mut self, index: usize, rule: &Rule) -> Result<(), Stop> {
        let (choices, left) = self.choose(index, rule)?;
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
        self.variants.push(Variant { rule: index as u32 + 1, checks });

        self.combine(index, &choices, &mut |compiler, mask, level, key| {
            let shape = compiler.shape(mask, level, index);
            if shape >= compiler.plan.shapes_max {
                return Err(Stop::Shapes);
            }
            let mut key = *key;
            key.shape = shape as u8;
            let refused = |()| Refused {
                rule: Some(index),
                what: format!(
                    "rule '{}' is the last of too many rules that differ only in ranges, negations or big lists: \
                     more than {CHAIN_MAX} would have to be tried one after the other for one packet",
                    rule.name
                ),
                help: "give them something else to tell them apart, such as a prefix or single ports".to_string(),
            };
            Ok(compiler.append(&words(&key), variant, records, is_closed).map_err(refused)?)
        })
    }

    fn append(&mut self, key: &Words, variant: u32, records: usize, is_closed: bool) -> Result<(), ()> {
        let link = self.links.len() as u32;
        let last = match self.chains.get_mut(key) {
            None => {
                let len = u16::try_from(records).map_err(drop)?;
                if records > CHAIN_MAX {
                    return Err(());
                }
                self.chains.insert(*key, Chain { first: link, last: link, len, is_closed });
                NONE
            }
            Some(chain) if chain.is_closed => return Ok(()),
            Some(chain) => {
                if usize::from(chain.len) + records > CHAIN_MAX {
                    return Err(());
                }
                chain.len += records as u16;
                chain.is_closed = is_closed;
                std::mem::replace(&mut chain.last, link)
            }
        };
        self.links.push((variant, NONE));
        if last != NONE {
            self.links[last as usize].1 = link;
        }
        Ok(())
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
            self.entries += 1;
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
                let set = self.prefix_set(list);
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
                    let set = self.range_set(list, bits);
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
                let set = self.new_set();
                for interface in list.all().iter().filter(|interface| interface.index != 0) {
                    let mut value = [0; 16];
                    value[..4].copy_from_slice(&interface.index.to_ne_bytes());
                    value[4..8].copy_from_slice(&interface.netns.to_ne_bytes());
                    self.add_to_set(set, value, 64);
                }
                self.checks.push(in_set(Field::FIELD_INTERFACE, set));
            }
            Values::Cgroup(list) => {
                self.needs |= Need::NEED_SENDER.0;
                let set = self.new_set();
                let mut levels = Vec::new();
                for cgroup in list.all() {
                    let mut value = [0; 16];
                    value[..8].copy_from_slice(&cgroup.id.to_ne_bytes());
                    if cgroup.id != 0 {
                        self.add_to_set(set, value, 64);
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

    /// Sets of addresses take two numbers: one for IPv4, the next for IPv6.
    fn new_set(&mut self) -> u32 {
        let set = self.next_set;
        self.next_set += 2;
        set
    }

    fn add_to_set(&mut self, set: u32, value: [u8; 16], bits: u32) {
        self.sets.push(SetKey { bits: Size::SET_ID_BITS.0 + bits, set, value });
    }

    /// The set of a shared list is made once.
    fn known_set<T>(&mut self, list: &List<T>, kind: u32) -> (u32, bool) {
        let List::Many(many) = list else { return (self.new_set(), true) };
        let key = (Arc::as_ptr(many).cast::<u8>() as usize, kind);
        if let Some(set) = self.known_sets.get(&key) {
            return (*set, false);
        }
        let set = self.new_set();
        self.known_sets.insert(key, set);
        (set, true)
    }

    fn prefix_set(&mut self, list: &List<Prefix>) -> u32 {
        let (set, is_new) = self.known_set(list, 0);
        if is_new {
            for prefix in list.all() {
                let (addr, bits) = prefix.mapped();
                self.add_to_set(set + u32::from(prefix.is_v6()), addr.octets(), bits.into());
            }
        }
        set
    }

    fn range_set(&mut self, list: &List<Range>, width: u32) -> u32 {
        let (set, is_new) = self.known_set(list, width);
        if is_new {
            for range in list.all() {
                for (first, bits) in blocks(*range, width) {
                    let mut value = [0; 16];
                    value[..4].copy_from_slice(&(first << (32 - width)).to_be_bytes());
                    self.add_to_set(set, value, bits);
                }
            }
        }
        set
    }

    fn finish(self, policy: &Policy, hits: &[u32]) -> Result<Compiled, Refused> {
        let mut compiled = Compiled {
            generation: Box::default(),
            entries: Vec::with_capacity(self.chains.len()),
            records: Vec::new(),
            sets: Vec::new(),
            shapes: self.describe_shapes(),
            plan: self.plan,
        };
        // Number 0 is none.
        compiled.records.push(Record::default());
        let mut rules = Vec::with_capacity(policy.rules.len());
        for (index, rule) in policy.rules.iter().enumerate() {
            let number = index as u32 + 1;
            let hits = hits.get(index).copied().unwrap_or(0);
            rules.push(raw_rule(number, hits, &rule.decision, self.names).map_err(|error| Refused {
                rule: Some(index),
                what: format!("the token of rule '{}': {error:#}", rule.name),
                help: "give it more room".to_string(),
            })?);
        }
        let mut alone = vec![0u32; self.variants.len()];
        let mut chained: FxHashMap<(u32, u32), u32> = FxHashMap::default();
        let mut links: Vec<u32> = Vec::new();
        for (key, chain) in &self.chains {
            links.clear();
            let mut at = chain.first;
            while at != NONE {
                let (variant, next) = self.links[at as usize];
                links.push(variant);
                at = next;
            }
            let first = &self.variants[links[0] as usize];
            let mut entry = Entry { rule: rules[first.rule as usize - 1], ..Default::default() };
            if !first.checks.is_empty() {
                for variant in links.iter().rev() {
                    let (rule, next) = (*variant, entry.record);
                    let known = if next == 0 { alone[rule as usize] } else { 0 };
                    let known = if known == 0 { chained.get(&(rule, next)).copied() } else { Some(known) };
                    let record =
                        known.unwrap_or_else(|| self.add_records(&mut compiled.records, &rules, rule, next));
                    match next {
                        0 => alone[rule as usize] = record,
                        _ => drop(chained.insert((rule, next), record)),
                    }
                    entry.record = record;
                }
            }
            compiled.entries.push((facts(key), entry));
        }

        let generation = &mut compiled.generation;
        generation.shape_count = self.shapes.len() as u32;
        generation.level_count = self.levels.len() as u32;
        generation.needs = self.needs;
        generation.levels[..self.levels.len()].copy_from_slice(&self.levels);
        for (to, shape) in generation.shapes.iter_mut().zip(&self.shapes) {
            *to = *shape;
        }
        if let Some(default) = &policy.default {
            generation.default_rule = raw_rule(0, 0, default, self.names).map_err(|error| Refused {
                rule: None,
                what: format!("the token of the default: {error:#}"),
                help: "give it more room".to_string(),
            })?;
        }
        compiled.sets = self.sets;
        Ok(compiled)
    }

    /// Adds as many records as the variant's checks need, and returns the number of the first.
    fn add_records(&self, records: &mut Vec<Record>, rules: &[RawRule], variant: u32, next: u32) -> u32 {
        let Variant { rule, checks } = &self.variants[variant as usize];
        let first = records.len() as u32;
        let checks = &self.checks[checks.clone()];
        let parts = checks.len().div_ceil(CHECKS_MAX).max(1);
        for part in 0..parts {
            let mine = &checks[part * CHECKS_MAX..checks.len().min((part + 1) * CHECKS_MAX)];
            let mut record = Record {
                rule: rules[*rule as usize - 1],
                next,
                more: if part + 1 < parts { first + part as u32 + 1 } else { 0 },
                checks_count: mine.len() as u32,
                ..Default::default()
            };
            record.checks[..mine.len()].copy_from_slice(mine);
            records.push(record);
        }
        first
    }

    fn describe_shapes(&self) -> Vec<String> {
        let describe =
            |shape: &Shape| describe_mask(&shape.mask, self.levels.get(usize::from(shape.level)).copied());
        self.shapes
            .iter()
            .map(|shape| format!("{} (from rule {})", describe(shape), shape.first_rule))
            .collect()
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

fn first_of_each_length(list: &[Prefix]) -> Vec<Prefix> {
    let mut seen = FxHashSet::with_hasher(FxBuildHasher);
    list.iter().copied().filter(|prefix| seen.insert((prefix.is_v6(), prefix.bits()))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_many_shapes_are_refused_and_listed() {
        let rule = |n: usize| {
            let (src, dst) = (8 + n % 9, 8 + n / 9);
            format!(
                "[[rule]]\nname = '{n}'\nsrc = '10.0.0.0/{src}'\ndst = '10.0.0.0/{dst}'\naction = 'skip'\n"
            )
        };
        let text: String = (0..64).map(rule).collect();
        let policy = Policy::from_toml(&text).unwrap();
        assert_eq!(compile(&policy, Naming::none(), &[]).ok().unwrap().shapes.len(), 64);
        let text: String = (0..65).map(rule).collect();
        let refused = compile(&Policy::from_toml(&text).unwrap(), Naming::none(), &[]).err().unwrap();
        assert!(refused.what.contains("65 shapes") && refused.what.contains("src/10"), "{refused}");
    }

    #[test]
    fn lists_become_sets_where_shapes_run_out() {
        // Every length of IPv6, in one list, and beside it rules of other shapes.
        let list: Vec<String> = (1..=128).map(|bits| format!("'8000::/{bits}'")).collect();
        let list = format!(
            "[[rule]]\nname = 'l'\nnot_dst = 'fe80::/10'\nsrc = [{}]\naction = 'skip'\n",
            list.join(", ")
        );
        // One covers all of them, so they are made apart.
        let apart: Vec<String> = (1..=128u32)
            .map(|bits| {
                let addr = std::net::Ipv6Addr::from(1u128 << (128 - bits));
                format!("'{addr}/{bits}'")
            })
            .filter(|prefix| !prefix.starts_with("'::ffff:"))
            .collect();
        let list = list + &format!("[[rule]]\nname = 'm'\ndst = [{}]\naction = 'drop'\n", apart.join(", "));
        let compiled = compile(&Policy::from_toml(&list).unwrap(), Naming::none(), &[]).ok().unwrap();
        assert!(compiled.shapes.len() <= 2 && compiled.sets.len() > 100, "{:?}", compiled.shapes);
        assert_eq!(compiled.plan, PLANS[1]);
    }

    #[test]
    fn the_reason_of_a_refusal_is_the_one_that_no_plan_avoids() {
        // More than 24 shapes and fewer than 64, and more ranges than a packet may try.
        let mut text: String = (1..=30)
            .map(|bits| format!("[[rule]]\nname = 's{bits}'\ndst = '0.0.0.0/{bits}'\naction = 'skip'\n"))
            .collect();
        text.extend((0..=CHAIN_MAX).map(|n| {
            format!("[[rule]]\nname = 'r{n}'\nport = '{}-{}'\naction = 'skip'\n", n * 100, n * 100 + 99)
        }));
        let refused = compile(&Policy::from_toml(&text).unwrap(), Naming::none(), &[]).err().unwrap();
        assert!(refused.what.contains("one after the other"), "{refused}");
    }

    #[test]
    fn too_many_rules_that_differ_only_in_ranges_are_refused() {
        let rule = |n: usize| {
            format!("[[rule]]\nname = '{n}'\nport = '{}-{}'\naction = 'skip'\n", n * 100, n * 100 + 99)
        };
        let text = |count| (0..count).map(rule).collect::<String>();
        assert!(compile(&Policy::from_toml(&text(CHAIN_MAX)).unwrap(), Naming::none(), &[]).is_ok());
        let refused =
            compile(&Policy::from_toml(&text(CHAIN_MAX + 1)).unwrap(), Naming::none(), &[]).err().unwrap();
        assert_eq!(refused.rule, Some(CHAIN_MAX));
        assert!(refused.what.contains("one after the other"), "{refused}");
    }
}
