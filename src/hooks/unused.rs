//! An instance goes when the last hook that uses it has gone.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::clsact::attached;
use super::egress::stamps;
use super::loaded::{Loaded, Programs, Role, loaded_programs};
use super::netlink::{Netlink, Side};
use super::xdp::attached_xdp;
use crate::netns::Netns;
use crate::state::{Instance, Lock, State};

/// How long the kernel may take to free a program that is attached nowhere any more: it does so behind a grace period,
/// and a busy machine takes its time.
const LINGER: Duration = Duration::from_secs(10);

/// Programs whose pins were lost, as they were before a command removed some of them.
pub struct Lost {
    programs: Programs,
    /// Ids of those that were attached in this network namespace.
    here: HashSet<u32>,
}

impl Lost {
    /// As it is now.
    ///
    /// # Errors
    /// The kernel refused to list what is there.
    pub fn now(state: &State) -> Result<Lost> {
        let programs = loaded_programs(state)?.without_instance();
        let here = if programs.all().next().is_some() { attached_here(&programs)? } else { HashSet::new() };
        Ok(Lost { programs, here })
    }

    /// Those that are still attached and may be of the instance whose programs were removed. Programs of an instance share
    /// their maps; where none was removed, nobody can tell of which instance they are.
    fn left(&self) -> Result<Programs> {
        let here = attached_here(&self.programs)?;
        let removed: Vec<&Loaded> =
            self.here.difference(&here).filter_map(|id| self.programs.get(*id)).collect();
        let may_be_of_it =
            |loaded: &Loaded| removed.is_empty() || removed.iter().any(|gone| gone.shares_maps(loaded));
        let found = attached_anywhere(&self.programs)?;
        Ok(self.programs.only(|id, loaded| found.contains(&id) && may_be_of_it(loaded)))
    }
}

/// Removes an instance if no program uses it any more, and what is remembered of it. Returns what the programs do that use
/// it; none if nothing of it is left. `lost` is what there was before the command that asks for it.
///
/// Where a program of it may be attached in a network namespace that cannot be found, this takes as long as the kernel
/// may take to free one that is not.
///
/// # Errors
/// The kernel refused to list what is there, or something cannot be removed.
pub fn remove_unused(state: &State, lock: &Lock, name: &str, lost: &Lost) -> Result<HashSet<Role>> {
    let instance = state.instance(name);
    if instance.pins.exists() {
        return remove_with(state, lock, name, Instance::remove);
    }
    if !instance.is_remembered() {
        return Ok(HashSet::new());
    }
    let left = roles(&lost.left()?);
    if left.is_empty() {
        instance.forget()?;
    }
    Ok(left)
}

/// Removes the pins of an instance for an attach that has failed and made them; what is remembered stays.
///
/// # Errors
/// As [`remove_unused`].
pub fn remove_unused_pins(state: &State, lock: &Lock, name: &str) -> Result<HashSet<Role>> {
    remove_with(state, lock, name, Instance::remove_pins)
}

fn remove_with(
    state: &State,
    _lock: &Lock,
    name: &str,
    remove: impl FnOnce(&Instance) -> Result<()>,
) -> Result<HashSet<Role>> {
    // A directory of somebody else stays.
    let Some(instance) = state.instances()?.into_iter().find(|instance| instance.name == name) else {
        return Ok(HashSet::new());
    };
    let of_instance = || Ok::<_, anyhow::Error>(loaded_programs(state)?.of_instance(name));
    let mut programs = of_instance()?;
    // Once is enough: under the lock none is attached meanwhile.
    let attached = attached_anywhere(&programs)?;
    if !attached.is_empty() {
        return Ok(roles(&programs.only(|id, _| attached.contains(&id))));
    }
    let deadline = Instant::now() + LINGER;
    while programs.all().next().is_some() {
        if Instant::now() >= deadline {
            return Ok(roles(&programs));
        }
        thread::sleep(Duration::from_millis(10));
        programs = of_instance()?;
    }
    remove(&instance)?;
    Ok(HashSet::new())
}

/// Where an instance is still used, for a person who has removed its guard, or else its stamp, from some interfaces.
pub fn used_where(roles: &HashSet<Role>, of_guard: bool) -> String {
    let (same, other): (Vec<&Role>, Vec<&Role>) =
        roles.iter().partition(|role| (**role != Role::Stamp) == of_guard);
    // The other one may be on the same interface.
    let other_name = if of_guard { "by its stamp" } else { "by its guard" };
    let elsewhere = "on another interface or in another network namespace";
    match (same.is_empty(), other.is_empty()) {
        (_, true) => elsewhere.to_string(),
        (true, false) => other_name.to_string(),
        (false, false) => format!("{other_name}, and {elsewhere}"),
    }
}

fn roles(programs: &Programs) -> HashSet<Role> {
    programs.all().map(|(_, program)| program.role).collect()
}

/// The ids of those of these programs that are attached to an interface of a namespace that can be found.
fn attached_anywhere(programs: &Programs) -> Result<HashSet<u32>> {
    let wanted: HashSet<u32> = programs.all().map(|(id, _)| id).collect();
    if wanted.is_empty() {
        return Ok(wanted);
    }
    let mut found = attached_here(programs)?;
    for netns in Netns::everywhere() {
        if wanted.is_subset(&found) {
            break;
        }
        // One that is gone a moment later holds nothing of ours any more.
        found.extend(netns.run(|| attached_here(programs)).unwrap_or_default());
    }
    Ok(found)
}

/// The same of this network namespace.
fn attached_here(programs: &Programs) -> Result<HashSet<u32>> {
    let mut netlink = Netlink::connect()?;
    let mut found = HashSet::new();
    for link in netlink.links()? {
        found.extend(stamps(&mut netlink, link.index, programs)?.iter().map(|stamp| stamp.program));
        let guards = attached(&mut netlink, link.index, Side::Ingress, programs)?;
        found.extend(guards.iter().map(|guard| guard.program));
        found.extend(attached_xdp(link.index, programs)?.map(|guard| guard.program));
    }
    Ok(found)
}
