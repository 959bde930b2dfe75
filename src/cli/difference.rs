//! What loading a file would change, for `netoken policy diff` and `netoken guard --diff`: rules by their names.

use std::collections::HashMap;
use std::io::{self, Write};

use anyhow::Result;
use serde::Serialize;

/// One difference, as `--json` prints it.
#[derive(Debug, PartialEq, Serialize)]
#[serde(tag = "type", rename = "difference")]
pub(super) struct Difference {
    /// `added`, `removed`, `changed` or `moved`.
    pub change: &'static str,
    /// What is different; nothing for the default of a policy.
    pub name: Option<String>,
    pub before: Option<String>,
    pub after: Option<String>,
}

/// Prints them.
pub(super) fn tell(differences: &[Difference], json: bool) -> Result<()> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for difference in differences {
        if json {
            writeln!(out, "{}", serde_json::to_string(difference)?)?;
            continue;
        }
        let name = difference.name.as_deref().unwrap_or("default");
        for (sign, side) in [("-", &difference.before), ("+", &difference.after)] {
            if let Some(side) = side {
                writeln!(out, "{sign} {name}: {side}")?;
            }
        }
    }
    if differences.is_empty() && !json {
        writeln!(out, "no difference")?;
    }
    Ok(out.flush()?)
}

/// What became of ordered rules, whose names are unique: those that are gone first, then the others in their new
/// order. `text` is given a rule and, if it changed, what it is on the other side.
pub(super) fn of_rules<T: PartialEq>(
    before: &[T],
    after: &[T],
    name: impl Fn(&T) -> &str,
    text: impl Fn(&T, Option<&T>) -> String,
) -> Vec<Difference> {
    let places = |rules: &[T]| -> HashMap<String, usize> {
        rules.iter().enumerate().map(|(at, rule)| (name(rule).to_string(), at)).collect()
    };
    let (old, new) = (places(before), places(after));
    let mut found = Vec::new();
    let mut add = |change, rule: &T, before, after| {
        found.push(Difference { change, name: Some(name(rule).to_string()), before, after });
    };
    for rule in before.iter().filter(|rule| !new.contains_key(name(rule))) {
        add("removed", rule, Some(text(rule, None)), None);
    }
    let places: Vec<Option<usize>> = after.iter().map(|rule| old.get(name(rule)).copied()).collect();
    for (at, (rule, moved)) in after.iter().zip(moved(&places)).enumerate() {
        match places[at].map(|place| (place, &before[place])) {
            None => add("added", rule, None, Some(text(rule, None))),
            Some((_, was)) if was != rule => {
                add("changed", rule, Some(text(was, Some(rule))), Some(text(rule, Some(was))));
            }
            Some((place, _)) if moved => {
                let (was, is) = (format!("was rule {}", place + 1), format!("now rule {}", at + 1));
                add("moved", rule, Some(was), Some(is));
            }
            Some(_) => {}
        }
    }
    found
}

/// Which rules stand, among those that both have, behind one that they stood before: all but a longest part that
/// kept its order. `places` are the old places of the rules, in their new order.
fn moved(places: &[Option<usize>]) -> Vec<bool> {
    // Patience: the last of each length of increasing parts, and what each came behind.
    let mut tails: Vec<usize> = Vec::new();
    let mut behind: Vec<Option<usize>> = vec![None; places.len()];
    for (at, place) in places.iter().enumerate() {
        let Some(place) = place else { continue };
        let length = tails.partition_point(|tail| places[*tail] < Some(*place));
        behind[at] = length.checked_sub(1).map(|length| tails[length]);
        if length == tails.len() {
            tails.push(at);
        } else {
            tails[length] = at;
        }
    }
    let mut moved: Vec<bool> = places.iter().map(Option::is_some).collect();
    let mut at = tails.last().copied();
    while let Some(kept) = at {
        moved[kept] = false;
        at = behind[kept];
    }
    moved
}
