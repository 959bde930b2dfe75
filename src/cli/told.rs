//! What an attached program was told, for `--query`.

use std::fmt;

use serde::Serialize;

use crate::guard;
use crate::hooks::loaded::{Loaded, Role};
use crate::program::{DEFAULT_EXID, DEFAULT_KIND};
use crate::types;

/// What a program was told when it was attached.
#[derive(Serialize)]
pub(super) struct Told {
    option_kind: u8,
    exid: u16,
    /// Of so many packets of the same verdict on a CPU, one is sent as an event.
    sample: u32,
}

impl Told {
    /// Nothing if another version of netoken has loaded it.
    pub fn of(loaded: &Loaded) -> Option<Told> {
        match loaded.role {
            Role::Stamp => loaded.config().map(Told::from),
            Role::Guard | Role::GuardXdp => loaded.guard_config().map(Told::from),
        }
    }

    /// Whether all of it is as if nothing was said.
    pub fn is_usual(&self) -> bool {
        (self.option_kind, self.exid, self.sample) == (DEFAULT_KIND, DEFAULT_EXID, 1)
    }
}

impl From<types::Config> for Told {
    fn from(config: types::Config) -> Told {
        Told { option_kind: config.option_kind, exid: config.exid, sample: config.sample }
    }
}

impl From<guard::types::Config> for Told {
    fn from(config: guard::types::Config) -> Told {
        Told { option_kind: config.option_kind, exid: config.exid, sample: config.sample }
    }
}

impl fmt::Display for Told {
    /// What is not as it is if nothing is said.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.option_kind != DEFAULT_KIND {
            parts.push(format!("option kind {}", self.option_kind));
        }
        if self.exid != DEFAULT_EXID {
            parts.push(format!("ExID {:#06x}", self.exid));
        }
        if self.sample != 1 {
            parts.push(format!("events for one of {} SYNs", self.sample));
        }
        f.write_str(&parts.join(", "))
    }
}
