//! Whether a command is changing something, for who only looks: he holds nothing, so that nobody waits for him.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::MetadataExt;

use anyhow::Result;
use nix::fcntl::{Flock, FlockArg};

use super::State;
use super::locks::holder;

/// What can be seen of the lock.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Changing {
    /// Nobody holds it. Who takes it writes his name into it, and takes it out again: as long as this is the same, nothing
    /// was changed.
    Nobody(Option<Seen>),
    /// That process does.
    Somebody(String),
}

/// The file of the lock, and when it was written last.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    file: (u64, u64),
    written: (i64, i64),
}

impl fmt::Display for Changing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Changing::Nobody(_) => f.write_str("another netoken command"),
            Changing::Somebody(holder) => f.write_str(holder),
        }
    }
}

impl Changing {
    /// # Errors
    /// The state directory is there and cannot be opened.
    pub fn now() -> Result<Changing> {
        let lock = State::find()?.and_then(|state| File::open(state.below("lock")).ok());
        let Some((lock, file)) = lock.and_then(|lock| Some((lock.metadata().ok()?, lock))) else {
            return Ok(Changing::Nobody(None));
        };
        let seen = Seen { file: (lock.dev(), lock.ino()), written: (lock.mtime(), lock.mtime_nsec()) };
        // One that was killed has left its name. Only then is the lock touched, for who takes it in that moment would wait.
        if lock.len() > 0
            && let Err((mut file, _)) = Flock::lock(file, FlockArg::LockSharedNonblock)
        {
            return Ok(Changing::Somebody(holder(&mut file)));
        }
        Ok(Changing::Nobody(Some(seen)))
    }
}
