//! One instance below the state directory: its pins, and where it is remembered what they go by.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};

use super::{EventsOf, Identity, entries, make_dir};
use crate::pins::{Renewal, Wanted};
use crate::program::Maps;

/// One named set of maps.
#[derive(Debug)]
pub struct Instance {
    /// As given with `--instance`.
    pub name: String,
    /// The directory of its pins, valid in this process.
    pub pins: PathBuf,
    /// The directory of what is remembered of its policy, valid in this process.
    pub policy_dir: PathBuf,
    /// The same of the rules of its guard.
    pub guard_dir: PathBuf,
}

impl Instance {
    /// Whether it has pins.
    pub fn exists(&self) -> bool {
        self.pins.join("counters").exists()
    }

    /// Which one of its name it is, for who reads its events; none if it is not there. Who destroys it and attaches again
    /// makes other maps, of which nothing comes to who has the former ones open.
    pub fn identity(&self, of: EventsOf) -> Option<Identity> {
        let pin = match of {
            EventsOf::Stamp => "events",
            EventsOf::Guard => "guard_events",
        };
        fs::metadata(self.pins.join(pin)).ok().map(|pin| Identity(pin.dev(), pin.ino()))
    }

    /// When it began to count what is done with keys.
    ///
    /// # Errors
    /// It does not exist.
    pub fn counts_keys_since(&self) -> Result<SystemTime> {
        let pin = fs::metadata(self.pins.join("key_counts")).and_then(|pin| pin.modified());
        pin.with_context(|| format!("looking at the counters of keys of instance '{}'", self.name))
    }

    /// Whether its directory is one of ours. An attach that was killed may have pinned nothing in it yet; a directory in
    /// it is never ours.
    pub(super) fn is_ours(&self) -> Result<bool> {
        let is_ours = self.exists() || self.has_guard();
        Ok(is_ours || !entries(&self.pins)?.iter().any(|(_, kind)| kind.is_dir()))
    }

    /// Whether those of a guard are among them.
    pub fn has_guard(&self) -> bool {
        self.pins.join("guard_counters").exists()
    }

    /// Makes the directory of its pins.
    ///
    /// # Errors
    /// It cannot be made, or somebody else has made one of that name.
    pub fn create(&self) -> Result<()> {
        if !self.is_ours()? {
            bail!(
                "making the directory of instance '{}': somebody else's directory of that name is there; choose another \
                 --instance",
                self.name
            );
        }
        make_dir(&self.pins)
    }

    /// Makes place in it for what this version pins, if another version has pinned something there.
    pub(crate) fn renew(&self, wanted: Vec<Wanted>) -> Result<Renewal> {
        Renewal::begin(&self.pins, wanted)
            .with_context(|| format!("looking at the maps of instance '{}'", self.name))
    }

    /// Its maps.
    ///
    /// # Errors
    /// It does not exist, or its pins cannot be opened.
    pub fn maps(&self) -> Result<Maps> {
        Maps::open(&self.pins).with_context(|| format!("opening instance '{}'", self.name))
    }

    /// Removes it with all that is remembered of it: policy and counters are gone when the last program is.
    ///
    /// # Errors
    /// Something cannot be removed.
    pub fn remove(&self) -> Result<()> {
        self.unpin()?;
        // Before the directory of the pins, by which the next destroy finds what one left that was killed.
        self.forget()?;
        self.remove_dir()
    }

    /// Removes its pins alone: what an attach has made that failed. What was remembered before stays.
    ///
    /// # Errors
    /// A pin cannot be removed.
    pub fn remove_pins(&self) -> Result<()> {
        self.unpin()?;
        for dir in [&self.policy_dir, &self.guard_dir] {
            // Unless something is in it.
            fs::remove_dir(dir).ok();
        }
        self.remove_dir()
    }

    /// Whether a policy or rules are remembered, which may be so without pins.
    pub fn is_remembered(&self) -> bool {
        self.policy_dir.exists() || self.guard_dir.exists()
    }

    /// Removes what is remembered of it.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn forget(&self) -> Result<()> {
        for (dir, what) in [(&self.policy_dir, "policy"), (&self.guard_dir, "guard's rules")] {
            if dir.exists() {
                fs::remove_dir_all(dir)
                    .with_context(|| format!("removing the {what} of instance '{}'", self.name))?;
            }
        }
        Ok(())
    }

    fn unpin(&self) -> Result<()> {
        for entry in fs::read_dir(&self.pins).into_iter().flatten().flatten() {
            fs::remove_file(entry.path()).with_context(|| {
                format!("removing the pin {:?} of instance '{}'", entry.file_name(), self.name)
            })?;
        }
        Ok(())
    }

    fn remove_dir(&self) -> Result<()> {
        fs::remove_dir(&self.pins)
            .with_context(|| format!("removing the directory of instance '{}'", self.name))
    }
}
