//! Which loaded programs are ours: those that bear our name and use the maps of an instance, or at least have ours.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use libbpf_rs::query::{ProgInfoIter, ProgInfoQueryOptions, ProgramInfo};
use libbpf_rs::{MapCore, MapHandle};
use nix::errno::Errno;

use crate::guard::program as guard;
use crate::guard::types as guard_types;
use crate::pins;
use crate::program::{LinkHeader, PROGRAM_NAME, PROGRAM_NAME_L3, config_among};
use crate::state::{Instance, State};
use crate::types::Config;

/// What a program of ours is for. Each is attached at a place of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// The classifier, on clsact egress.
    Stamp,
    /// The guard, on clsact ingress.
    Guard,
    /// The guard, at XDP.
    GuardXdp,
}

impl Role {
    /// By the name of a program, with the header that it skips, and those of its maps; the name alone anybody can have.
    fn of(name: &OsStr) -> Option<(Role, LinkHeader, &'static [&'static str])> {
        const STAMP: &[&str] = &["policies", "counters", "events", "live", "scratches"];
        const GUARD: &[&str] = &["guard_rules", "guard_counters", "guard_live"];
        match name.to_str()? {
            PROGRAM_NAME => Some((Role::Stamp, LinkHeader::Ethernet, STAMP)),
            PROGRAM_NAME_L3 => Some((Role::Stamp, LinkHeader::None, STAMP)),
            guard::PROGRAM_NAME => Some((Role::Guard, LinkHeader::Ethernet, GUARD)),
            guard::PROGRAM_NAME_L3 => Some((Role::Guard, LinkHeader::None, GUARD)),
            guard::PROGRAM_NAME_XDP => Some((Role::GuardXdp, LinkHeader::Ethernet, GUARD)),
            _ => None,
        }
    }
}

/// A program of ours that is loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Where programs of its name are attached.
    pub role: Role,
    /// What it takes to stand in front of the network header.
    pub link_header: LinkHeader,
    /// Time since boot at which it was loaded.
    pub loaded_at: Duration,
    /// The instance whose maps it uses; none if its pins are gone.
    pub instance: Option<String>,
    /// It goes by a policy or by rules that no command reaches, because another version of netoken has loaded it.
    pub is_outdated: bool,
    /// Ids of its maps.
    map_ids: Vec<u32>,
}

impl Loaded {
    /// Whether both use a map.
    pub(super) fn shares_maps(&self, other: &Loaded) -> bool {
        self.map_ids.iter().any(|id| other.map_ids.contains(id))
    }

    /// What it was told; nothing if another version of netoken has loaded it.
    pub fn config(&self) -> Option<Config> {
        config_among(&self.map_ids)
    }

    /// The same of a guard.
    pub fn guard_config(&self) -> Option<guard_types::Config> {
        guard::config_among(&self.map_ids)
    }
}

/// Every program of ours that was loaded at one moment, in whatever network namespace, by program id.
#[derive(Debug, Default)]
pub struct Programs {
    ours: HashMap<u32, Loaded>,
    /// The highest id that there was.
    newest: u32,
    /// A newer one was asked for.
    is_old: AtomicBool,
}

impl Programs {
    /// What is known of a program, if it is ours.
    pub fn get(&self, id: u32) -> Option<&Loaded> {
        // Ids only grow.
        if id > self.newest {
            self.is_old.store(true, Ordering::Relaxed);
        }
        self.ours.get(&id)
    }

    /// Whether a program was asked for that has come since, and so looked like somebody else's.
    pub fn is_old(&self) -> bool {
        self.is_old.load(Ordering::Relaxed)
    }

    /// All of them, with their ids.
    pub fn all(&self) -> impl Iterator<Item = (u32, &Loaded)> {
        self.ours.iter().map(|(id, loaded)| (*id, loaded))
    }

    /// Those of one instance.
    pub fn of_instance(mut self, name: &str) -> Programs {
        self.ours.retain(|_, program| program.instance.as_deref() == Some(name));
        self
    }

    /// Those whose pins are gone.
    pub fn without_instance(mut self) -> Programs {
        self.ours.retain(|_, program| program.instance.is_none());
        self
    }

    /// Those for which this is true.
    pub(super) fn only(&self, is_wanted: impl Fn(u32, &Loaded) -> bool) -> Programs {
        let ours = self.all().filter(|(id, loaded)| is_wanted(*id, loaded));
        let ours = ours.map(|(id, loaded)| (id, loaded.clone())).collect();
        Programs { ours, newest: self.newest, is_old: AtomicBool::new(self.is_old()) }
    }
}

/// Every program of ours that is loaded now.
///
/// # Errors
/// An instance's pins cannot be read, or the kernel refused to list its programs.
pub fn loaded_programs(state: &State) -> Result<Programs> {
    loaded_by(&state.instances()?)
}

/// Looks at what is attached, by the programs that are loaded, and again if something was attached meanwhile.
///
/// # Errors
/// They cannot be listed, or the look failed.
pub(super) fn look_with<T>(state: &State, mut look: impl FnMut(&Programs) -> Result<T>) -> Result<T> {
    let mut tries = 1..TRIES;
    loop {
        let programs = loaded_programs(state)?;
        let seen = look(&programs)?;
        if !programs.is_old() || tries.next().is_none() {
            return Ok(seen);
        }
    }
}

/// Every program of ours that is loaded now, where these are all instances that there are.
///
/// # Errors
/// As [`loaded_programs`].
pub fn loaded_by(instances: &[Instance]) -> Result<Programs> {
    let mut owners = HashMap::new();
    // By what the stamp or the guard of an instance has to use, or no command reaches it.
    let mut needed: HashMap<(String, bool), Vec<u32>> = HashMap::new();
    for instance in instances {
        // An attach that was killed leaves an instance without all of its maps; the next one completes it.
        for (pin, id) in pins::ids(&instance.pins)? {
            for (is_guard, names) in
                [(false, ["counters", "policies"]), (true, ["guard_counters", "guard_rules"])]
            {
                if names.iter().any(|name| pins::path_of(&instance.pins, name).ends_with(&pin)) {
                    needed.entry((instance.name.clone(), is_guard)).or_default().push(id);
                }
            }
            owners.insert(id, instance.name.clone());
        }
    }
    let all = every_program()?;
    let newest = all.last().map_or(0, |program| program.id);
    let ours = all
        .into_iter()
        .filter_map(|program| {
            let (role, link_header, maps) = Role::of(&program.name)?;
            let instance = program.map_ids.iter().find_map(|id| owners.get(id).cloned());
            // One whose pins are gone is ours if it has our maps.
            let ours = instance.is_some() || has_maps(&program.map_ids, maps);
            let is_outdated = instance.as_ref().is_some_and(|name| {
                let needed = needed.get(&(name.clone(), role != Role::Stamp));
                needed.is_none_or(|ids| ids.len() < 2 || ids.iter().any(|id| !program.map_ids.contains(id)))
            });
            let (loaded_at, map_ids) = (program.load_time, program.map_ids);
            let loaded = Loaded { role, link_header, loaded_at, instance, is_outdated, map_ids };
            ours.then_some((program.id, loaded))
        })
        .collect();
    Ok(Programs { ours, newest, is_old: AtomicBool::new(false) })
}

/// Keeps a program loaded; nothing if it has just gone, and with it from wherever it was attached.
pub(super) fn keep(id: u32) -> Result<Option<OwnedFd>> {
    match libbpf_rs::Program::fd_from_id(id) {
        Ok(program) => Ok(Some(program)),
        Err(error) if error.kind() == libbpf_rs::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("keeping the running program"),
    }
}

/// The name of a loaded program; empty if it has none, or has just gone.
pub(super) fn program_name(id: u32) -> Result<String> {
    let programs = every_program()?.into_iter();
    let name = programs.filter(|program| program.id == id).map(|program| program.name).next();
    Ok(name.unwrap_or_default().to_string_lossy().into_owned())
}

/// How often to begin again if programs are loaded while they are looked at.
pub const TRIES: usize = 20;
const LISTING: &str = "listing the loaded BPF programs";

/// Every program that is loaded. The iterator ends without a word where the kernel refuses, and a list that is
/// too short would make our own filters look like somebody else's; so its end is held against the kernel's.
fn every_program() -> Result<Vec<ProgramInfo>> {
    for _ in 0..TRIES {
        let options = ProgInfoQueryOptions::default().include_map_ids(true);
        let programs: Vec<ProgramInfo> = ProgInfoIter::with_query_opts(options).collect();
        let Some(id) = program_after(programs.last().map_or(0, |program| program.id))? else {
            return Ok(programs);
        };
        // It has come meanwhile, or it is the one at which the list broke off.
        match libbpf_rs::Program::fd_from_id(id) {
            Err(error) if error.kind() != libbpf_rs::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("{LISTING}: looking at program {id}"));
            }
            _ => {}
        }
    }
    bail!("{LISTING}: others are loaded faster than they can be listed; try again")
}

/// The id of the next program after that one; nothing if it is the last.
fn program_after(id: u32) -> Result<Option<u32>> {
    let mut next = 0;
    // SAFETY: the pointer is valid for the call, which writes one u32 to it.
    let result = unsafe { libbpf_sys::bpf_prog_get_next_id(id, &mut next) };
    // libbpf returns the error itself, negative.
    match Errno::from_raw(-result) {
        _ if result == 0 => Ok(Some(next)),
        Errno::ENOENT => Ok(None),
        Errno::EPERM => {
            bail!(
                "{LISTING}: permission denied; it needs CAP_SYS_ADMIN outside of any user namespace (try sudo)"
            )
        }
        errno => Err(errno).context(LISTING),
    }
}

fn has_maps(ids: &[u32], names: &[&str]) -> bool {
    let maps: Vec<_> = ids.iter().filter_map(|id| MapHandle::from_map_id(*id).ok()).collect();
    // The kernel cuts names off behind 15 characters.
    names.iter().all(|name| maps.iter().any(|map| map.name() == &name[..name.len().min(15)]))
}
