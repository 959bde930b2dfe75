//! The command line: [`args`] is what may be typed, and each command has a file that says what it does.

pub mod args;
mod attach;
mod blocked;
mod detach;
mod difference;
mod found;
mod guard;
mod instance_clock;
mod key;
mod loads;
mod outdated;
mod policy;
mod query;
mod reload;
mod signals;
mod table;
mod token;
mod told;

use anyhow::Result;
use nix::sys::resource::{Resource, getrlimit, setrlimit};

pub use args::Args;

use crate::clock;
use crate::netns;
use args::{Command, Mode};

/// Runs what was asked for.
///
/// # Errors
/// It failed; the message says what was being done to what, why it failed, and what to do now.
pub fn run(mut args: Args) -> Result<()> {
    raise_open_files();
    clock::publish_to_all();
    if let Some(command) = args.command.take() {
        return match command {
            Command::Policy(args) => policy::run(args),
            Command::Key(args) => key::run(args),
            Command::Token(args) => token::run(&args),
            Command::Guard(args) => guard::run(args),
        };
    }
    let (mode, scope) = args.check()?;
    // Everything that follows happens there. Paths are not affected: a network namespace has none.
    if let Some(netns) = &scope.netns {
        netns::enter(netns)?;
    }
    match mode {
        Mode::Attach(options) => attach::run(&scope, &options),
        Mode::Query => query::run(&scope),
        Mode::Detach => detach::run(&scope, false),
        Mode::Destroy => detach::run(&scope, true),
    }
}

/// A namespace, an attach or a program that can be put back is a descriptor each, and there may be thousands. What a shell
/// gives, 1024, is for programs that use select(2).
fn raise_open_files() {
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        // Most commands need but a few.
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).ok();
    }
}
