//! Finds rules that can never match because one earlier rule matches every packet that they do. What several earlier
//! rules only cover together is not found.

use rustc_hash::FxHashMap;

use super::report::{Problem, Report};
use super::values::{
    Cgroup, Interface, Mark, Prefix, Range, some_covers, some_meets, some_range_covers, some_range_meets,
};
use super::{Condition, Policy, Rule, Values};

/// So many earlier rules with the same key are compared with a rule.
const COMPARED_MAX: usize = 16;
/// More kinds of keys are not looked at: the check must stay quick for a million rules.
const KINDS_MAX: usize = 64;

/// Warns of every rule that can never match.
pub fn warn(policy: &Policy, report: &mut Report) {
    let mut index = Index::default();
    for (at, rule) in policy.rules.iter().enumerate() {
        if rule.conditions.iter().any(|condition| !condition.negated && condition.values.count() == 0) {
            let what = format!("rule '{}' can never match: one of its lists is empty", rule.name);
            report.push(Problem::warning(rule.place, what));
            continue;
        }
        let mut candidates = index.candidates(rule).into_iter();
        match candidates.find(|earlier| covers(&policy.rules[*earlier], rule)) {
            Some(earlier) => {
                let earlier = &policy.rules[earlier];
                report.push(never_matches(rule, earlier).see(earlier.place, "this one comes first"));
            }
            None => index.add(at, rule),
        }
    }
}

/// The warning that a rule deserves if it is to come behind these.
pub fn warning_behind(earlier: &[Rule], rule: &Rule) -> Option<Problem> {
    earlier.iter().find(|earlier| covers(earlier, rule)).map(|earlier| never_matches(rule, earlier))
}

fn never_matches(rule: &Rule, earlier: &Rule) -> Problem {
    Problem::warning(rule.place, hidden(&rule.name, &earlier.name))
}

/// What is said of a rule that can never match, here and of the guard's rules.
pub(crate) fn hidden(name: &str, earlier: &str) -> String {
    format!("rule '{name}' can never match: '{earlier}' matches all of it before")
}

/// What the first values of a rule's addresses and ports begin with. A rule that covers another has, for some number of
/// leading bits, the same.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Kind {
    dst_bits: Option<(bool, u8)>,
    src_bits: Option<(bool, u8)>,
    has_port: bool,
}

type Key = (Option<u128>, Option<u128>, Option<Range>);

/// Rules by what they have one value of; in the rest they are compared one by one.
#[derive(Default)]
struct Index {
    kinds: FxHashMap<Kind, FxHashMap<Key, Vec<usize>>>,
    /// Rules with a list of prefixes, which have no one key.
    lists: Vec<usize>,
}

impl Index {
    fn add(&mut self, at: usize, rule: &Rule) {
        let (dst, src) = (single(rule, false), single(rule, true));
        if let (Err(()), _) | (_, Err(())) = (dst, src) {
            if self.lists.len() < COMPARED_MAX {
                self.lists.push(at);
            }
            return;
        }
        let (dst, src) = (dst.ok().flatten(), src.ok().flatten());
        let port = single_port(rule);
        let kind = Kind { dst_bits: dst.map(bits), src_bits: src.map(bits), has_port: port.is_some() };
        if self.kinds.len() >= KINDS_MAX && !self.kinds.contains_key(&kind) {
            return;
        }
        let key = (dst.map(address), src.map(address), port);
        let rules = self.kinds.entry(kind).or_default().entry(key).or_default();
        if rules.len() < COMPARED_MAX {
            rules.push(at);
        }
    }

    /// Rules that may cover this one, by their index.
    fn candidates(&self, rule: &Rule) -> Vec<usize> {
        let (dst, src, port) = (first(rule, false), first(rule, true), single_port(rule));
        let cut = move |prefix: Option<Prefix>, wanted: Option<(bool, u8)>| match (prefix, wanted) {
            (_, None) => Some(None),
            (Some(prefix), Some((v6, bits))) if prefix.is_v6() == v6 && prefix.bits() >= bits => {
                let width = if v6 { 128 } else { 32 };
                let below = u32::from(width - bits);
                Some(Some(address(prefix) & u128::MAX.checked_shl(below).unwrap_or(0)))
            }
            _ => None,
        };
        let of_kinds = self.kinds.iter().filter_map(move |(kind, rules)| {
            let key = (
                cut(dst, kind.dst_bits)?,
                cut(src, kind.src_bits)?,
                if kind.has_port { Some(port?) } else { None },
            );
            rules.get(&key)
        });
        let mut found: Vec<usize> = of_kinds.flatten().chain(&self.lists).copied().collect();
        found.sort_unstable();
        found
    }
}

fn prefixes(rule: &Rule, src: bool) -> Option<&[Prefix]> {
    rule.conditions.iter().filter(|condition| !condition.negated).find_map(|condition| {
        match &condition.values {
            Values::Src(list) if src => Some(list.all()),
            Values::Dst(list) if !src => Some(list.all()),
            _ => None,
        }
    })
}

/// The one prefix of a rule, none, or an error if there are several.
fn single(rule: &Rule, src: bool) -> Result<Option<Prefix>, ()> {
    match prefixes(rule, src) {
        None => Ok(None),
        Some([one]) => Ok(Some(*one)),
        Some(_) => Err(()),
    }
}

fn first(rule: &Rule, src: bool) -> Option<Prefix> {
    prefixes(rule, src).and_then(|list| list.first()).copied()
}

/// The one port of a rule.
fn single_port(rule: &Rule) -> Option<Range> {
    rule.conditions.iter().filter(|condition| !condition.negated).find_map(|condition| {
        match &condition.values {
            Values::Port(list) => match list.all() {
                [one] if one.first == one.last => Some(*one),
                _ => None,
            },
            _ => None,
        }
    })
}

fn bits(prefix: Prefix) -> (bool, u8) {
    (prefix.is_v6(), prefix.bits())
}

fn address(prefix: Prefix) -> u128 {
    u128::from(prefix.mapped().0)
}

/// True if every packet that `b` matches is matched by `a`.
pub fn covers(a: &Rule, b: &Rule) -> bool {
    a.conditions.iter().all(|needed| b.conditions.iter().any(|given| implies(given, needed)))
}

/// True if `needed` holds wherever `given` does.
fn implies(given: &Condition, needed: &Condition) -> bool {
    let (given_values, needed_values) = (&given.values, &needed.values);
    match (given.negated, needed.negated) {
        (false, false) => is_within(given_values, needed_values),
        // Out of more is also out of less.
        (true, true) => is_within(needed_values, given_values),
        (false, true) => is_apart(given_values, needed_values),
        (true, false) => false,
    }
}

fn is_within(inner: &Values, outer: &Values) -> bool {
    match (inner, outer) {
        (Values::Src(a), Values::Src(b)) | (Values::Dst(a), Values::Dst(b)) => {
            a.all().iter().all(|prefix| some_covers(b.all(), *prefix))
        }
        (Values::SrcPort(a), Values::SrcPort(b))
        | (Values::Port(a), Values::Port(b))
        | (Values::Uid(a), Values::Uid(b)) => a.all().iter().all(|range| some_range_covers(b.all(), *range)),
        (Values::Mark(a), Values::Mark(b)) => {
            let covers = |outer: &Mark, inner: &Mark| {
                outer.mask & !inner.mask == 0 && inner.value & outer.mask == outer.value
            };
            a.all().iter().all(|inner| b.all().iter().any(|outer| covers(outer, inner)))
        }
        (Values::Interface(a), Values::Interface(b)) => {
            let same = |one: &Interface, other: &Interface| one.name == other.name;
            a.all().iter().all(|inner| b.all().iter().any(|outer| same(outer, inner)))
        }
        (Values::Cgroup(a), Values::Cgroup(b)) => {
            a.all().iter().all(|inner| b.all().iter().any(|outer| is_below(inner, outer)))
        }
        _ => false,
    }
}

fn is_below(inner: &Cgroup, outer: &Cgroup) -> bool {
    let outer = outer.path.trim_end_matches('/');
    inner.path.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn is_apart(one: &Values, other: &Values) -> bool {
    match (one, other) {
        (Values::Src(a), Values::Src(b)) | (Values::Dst(a), Values::Dst(b)) => {
            !a.all().iter().any(|prefix| some_meets(b.all(), *prefix))
        }
        (Values::SrcPort(a), Values::SrcPort(b))
        | (Values::Port(a), Values::Port(b))
        | (Values::Uid(a), Values::Uid(b)) => !a.all().iter().any(|range| some_range_meets(b.all(), *range)),
        (Values::Mark(a), Values::Mark(b)) => {
            let meet = |a: &Mark, b: &Mark| (a.value ^ b.value) & a.mask & b.mask == 0;
            !a.all().iter().any(|a| b.all().iter().any(|b| meet(a, b)))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Decision, Place};
    use super::*;

    /// Whether the second of two rules is found to be covered.
    fn is_covered(first: &str, second: &str) -> bool {
        let rule = |name, conditions| format!("[[rule]]\nname = '{name}'\n{conditions}\naction = 'skip'\n");
        let text = rule("a", first) + &rule("b", second);
        let policy = Policy::from_toml(&text).unwrap_or_else(|error| panic!("{error:#}"));
        let mut report = Report::default();
        warn(&policy, &mut report);
        assert_eq!(covers(&policy.rules[0], &policy.rules[1]), !report.is_empty(), "{text}");
        !report.is_empty()
    }

    #[test]
    fn a_rule_behind_one_that_takes_all_of_it_is_found() {
        for (first, second) in [
            ("", ""),
            ("", "dst = '10.0.0.0/8'"),
            ("dst = '10.0.0.0/8'", "dst = '10.1.0.0/16'\nport = 80"),
            ("dst = ['10.0.0.0/8', '::/0']", "dst = ['10.1.0.0/16', 'fd00::/8']"),
            ("port = '1-100'", "port = [7, '20-30']"),
            ("port = '1-100'", "port = 7"),
            ("mark = '0x1/0x1'", "mark = 3"),
            ("not_dst = '10.0.0.0/8'", "dst = '11.0.0.0/8'"),
            ("not_dst = '10.0.0.0/8'", "not_dst = ['10.0.0.0/7', '::/0']"),
            ("cgroup = '/'", "cgroup = '/'\nuid = 0"),
            ("src = '10.0.0.0/8'\nport = 80", "src = '10.0.0.0/9'\nport = 80\nmark = 1"),
        ] {
            assert!(is_covered(first, second), "{first} does not cover {second}");
        }
    }

    /// In pairs, this would take minutes.
    #[test]
    fn long_lists_are_compared_in_no_time() {
        let rule = |first: u32, negated| {
            let list: Vec<Range> = (0..1_000_000).map(|n| Range::one(first + n * 2)).collect();
            let condition = Condition { negated, values: Values::Uid(list.into()) };
            let (decision, place) = (Decision::Skip, Place::default());
            Rule { name: "a".into(), conditions: [condition].into(), decision, place }
        };
        assert!(covers(&rule(0, false), &rule(0, false)) && covers(&rule(0, true), &rule(1, false)));
        assert!(!covers(&rule(1, false), &rule(0, false)) && !covers(&rule(0, true), &rule(0, false)));
    }

    #[test]
    fn a_rule_that_leaves_something_is_not() {
        for (first, second) in [
            ("dst = '10.0.0.0/8'", ""),
            ("dst = '10.1.0.0/16'", "dst = '10.0.0.0/8'"),
            ("dst = '10.0.0.0/8'", "src = '10.0.0.0/8'"),
            ("dst = '::/0'", "dst = '10.0.0.0/8'"),
            ("port = '1-100'", "port = [7, 101]"),
            ("mark = 3", "mark = '0x1/0x1'"),
            ("not_dst = '10.0.0.0/8'", "dst = '10.0.0.0/7'"),
            ("not_dst = '10.0.0.0/8'", "port = 1"),
            ("not_uid = 1", "dst = '10.0.0.0/8'"),
        ] {
            assert!(!is_covered(first, second), "{first} covers {second}");
        }
    }
}
