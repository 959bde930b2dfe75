//! The guard: what checks the tokens of connections that come in.
//!
//! [`rules`] is what it is told, read from a file; [`write`](mod@write) makes a file of it; [`program`] loads the program
//! and gives it the rules, [`running`] remembers which those are, [`counters`] reads what became of packets, [`events`]
//! what became of one, [`blocked`] which sources are blocked because they were refused too often. Where it is attached is in
//! [`crate::hooks`]; what it decides is in `src/bpf/guard.h`.

pub mod blocked;
mod compile;
pub mod counters;
pub mod events;
mod file;
mod forms;
mod lists;
pub mod program;
pub mod rules;
pub mod running;
mod sources;
mod thresholds;
pub mod write;
mod wrong;

/// The types and constants that the guard and Rust share, read out of the compiled program's BTF.
pub mod types {
    pub use crate::guard_skel::types::{
        netoken_accept as Accept, netoken_auto_blocked as AutoBlocked, netoken_config as Config,
        netoken_guard_alert as RawAlert, netoken_guard_alerts as RawAlerts,
        netoken_guard_auto_block as RawAutoBlock, netoken_guard_counters as Counters,
        netoken_guard_event as Event, netoken_guard_match as Match, netoken_guard_mode as Mode,
        netoken_guard_rule as Rule, netoken_guard_severity as Severity, netoken_guard_size as Size,
        netoken_guard_table as Table, netoken_guard_verdict as Verdict, netoken_live as Live,
        netoken_peer as Peer, netoken_peer_key as PeerKey, netoken_source_key as SourceKey,
        netoken_source_list as SourceList, netoken_source_page as SourcePage,
    };
}
