//! Turns a policy into what the kernel looks things up in: shapes, entries, records and sets, as `src/bpf/types.h`
//! describes them and `src/bpf/policy.h` uses them. Nothing here talks to the kernel.
//!
//! Each rule becomes entries of a hash table, one for every combination of its values. What is no single value, or
//! has too many combinations, becomes a check in the rule's record instead. Which lists of prefixes are entries and
//! which are sets is a [`Plan`]: the first that stays within the kernel side's limits is taken.

use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;

use compiler::Compiler;
use plain::Plain;

use super::Policy;
use crate::keys::RingName;
use crate::types::{Entry, Facts, Generation, Record, SetKey, Size};

// SAFETY: integers and arrays of them, without hidden padding, which types.h asserts.
unsafe impl Plain for Facts {}
// SAFETY: the same.
unsafe impl Plain for Generation {}

mod chains;
mod choice;
mod compiler;
mod encode;
mod output;
mod sets;

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
    fn a_rule_with_too_many_checks_is_refused_as_that() {
        let most = CHAIN_MAX * CHECKS_MAX;
        let compiled = |count: usize| {
            let marks: Vec<String> = (1..=count).map(|mark| mark.to_string()).collect();
            let text = format!("[[rule]]\nname = 'a'\nnot_mark = [{}]\naction = 'skip'\n", marks.join(", "));
            compile(&Policy::from_toml(&text).unwrap(), Naming::none(), &[])
        };
        assert!(compiled(most).is_ok());
        let refused = compiled(most + 1).err().unwrap();
        assert!(refused.what.contains(&format!("has {} checks", most + 1)), "{refused}");
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
