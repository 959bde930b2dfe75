//! netoken and real TCP, in network namespaces: what a promise of the design looks like from the outside.

mod blocks;
mod connects;
mod devices;
mod fastopen;
mod guard;
mod guard_changes;
mod guard_skbs;
mod keyed;
#[path = "../support/lab.rs"]
mod lab;
mod links;
mod losses;
mod measures;
#[path = "../support/nginx.rs"]
mod nginx;
mod peers;
mod policies;
mod receivers;
mod reloads;
mod scrubs;
mod segment;
mod senders;
mod skbs;
mod sockets;
mod streams;
#[path = "../support/mod.rs"]
mod support;
mod sys;
mod wire;
mod world;

use std::process::ExitCode;
use std::sync::{PoisonError, RwLock};

use anyhow::Result;
use libtest_mimic::Trial;
use support::Need;

/// What every case here needs.
const NET: &[Need] = &[Need::Root, Need::Tool("ip"), Need::Tool("ethtool")];

/// The same, and another tool.
fn with(tool: &'static str) -> Vec<Need> {
    [NET, &[Need::Tool(tool)]].concat()
}

/// Held alone by a case that measures, and shared by all others.
static QUIET: RwLock<()> = RwLock::new(());

/// One case; others may run at the same time.
fn case(name: &str, needs: &[Need], test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    support::case(name, needs, move || {
        let _shared = QUIET.read().unwrap_or_else(PoisonError::into_inner);
        test()
    })
}

/// One case that is SKIPPED, visibly, where the kernel lacks what `has` looks for.
fn case_if(
    name: &str,
    needs: &[Need],
    test: impl FnOnce() -> Result<()> + Send + 'static,
    has: impl FnOnce() -> Result<(), String>,
) -> Trial {
    let trial = case(name, needs, test);
    if trial.has_ignored_flag() {
        return trial;
    }
    match has() {
        Ok(()) => trial,
        Err(reason) => {
            eprintln!("SKIPPED {name}: {reason}");
            trial.with_ignored_flag(true)
        }
    }
}

/// One case while which no other runs.
fn alone(name: &str, needs: &[Need], test: impl FnOnce() -> Result<()> + Send + 'static) -> Trial {
    support::case(name, needs, move || {
        let _alone = QUIET.write().unwrap_or_else(PoisonError::into_inner);
        test()
    })
}

fn main() -> ExitCode {
    let cases = [
        sockets::cases(),
        connects::cases(),
        fastopen::cases(),
        receivers::cases(),
        policies::cases(),
        keyed::cases(),
        reloads::cases(),
        senders::cases(),
        skbs::cases(),
        devices::cases(),
        links::cases(),
        losses::cases(),
        streams::cases(),
        guard::cases(),
        guard_changes::cases(),
        guard_skbs::cases(),
        peers::cases(),
        scrubs::cases(),
        blocks::cases(),
        measures::cases(),
    ];
    support::run(cases.into_iter().flatten().collect())
}
