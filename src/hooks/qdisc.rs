//! What became of a clsact qdisc when a filter of ours went, and how a person is told.

use std::fmt;

use serde::Serialize;

/// What became of the clsact qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "qdisc", content = "qdisc_filters", rename_all = "snake_case")]
pub enum Qdisc {
    /// There was none.
    Absent,
    /// It was ours and nobody else used it: removed.
    Removed,
    /// Somebody else made it: kept.
    Foreign,
    /// It was ours, but there are other filters on it: kept. How many.
    InUse(usize),
    /// It was ours, but somebody made a chain on it: kept.
    HasChains,
}

impl fmt::Display for Qdisc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Qdisc::Absent => f.write_str("there is no clsact qdisc"),
            Qdisc::Removed => f.write_str("clsact qdisc removed: we made it and nobody else uses it"),
            Qdisc::Foreign => f.write_str("clsact qdisc kept: somebody else made it"),
            Qdisc::InUse(1) => f.write_str("clsact qdisc kept: 1 other filter on it"),
            Qdisc::InUse(others) => write!(f, "clsact qdisc kept: {others} other filters on it"),
            Qdisc::HasChains => f.write_str("clsact qdisc kept: somebody made a chain on it"),
        }
    }
}

impl Qdisc {
    /// What a person is told behind what was removed; nothing if there was no qdisc.
    pub fn as_clause(qdisc: Option<Qdisc>) -> String {
        qdisc.filter(|qdisc| *qdisc != Qdisc::Absent).map_or(String::new(), |qdisc| format!(", {qdisc}"))
    }
}
