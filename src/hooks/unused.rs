//! An instance goes when the last hook that uses it has gone.

use std::collections::HashSet;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::clsact::attached;
use super::egress::stamps;
use super::loaded::{Programs, Role, loaded_programs};
use super::netlink::{Netlink, Side};
use super::xdp::attached_xdp;
use crate::netns::Netns;
use crate::state::{Lock, State};

/// How long the kernel may take to free a program that is attached nowhere any more: it does so behind a grace period,
/// and a busy machine takes its time.
const LINGER: Duration = Duration::from_secs(10);

/// Removes an instance if no program uses it any more. Returns what the programs do that use it; none if nothing of it is
/// left.
///
/// Where a program of it may be attached in a network namespace that cannot be found, this takes as long as the kernel
/// may take to free one that is not.
///
/// # Errors
/// The kernel refused to list what is there, or a pin cannot be removed.
pub fn remove_unused(state: &State, _lock: &Lock, name: &str) -> Result<HashSet<Role>> {
    // A directory of somebody else stays.
    let Some(instance) = state.instances()?.into_iter().find(|instance| instance.name == name) else {
        return Ok(HashSet::new());
    };
    let of_instance = || Ok::<_, anyhow::Error>(loaded_programs(state)?.of_instance(name));
    let mut programs = of_instance()?;
    // Once is enough: under the lock none is attached meanwhile.
    let attached = attached_roles(&programs)?;
    if !attached.is_empty() {
        return Ok(attached);
    }
    let deadline = Instant::now() + LINGER;
    while programs.all().next().is_some() {
        if Instant::now() >= deadline {
            return Ok(roles(&programs));
        }
        thread::sleep(Duration::from_millis(10));
        programs = of_instance()?;
    }
    instance.remove()?;
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

/// What those of these programs do that are attached to an interface of any namespace that can be found.
fn attached_roles(programs: &Programs) -> Result<HashSet<Role>> {
    let wanted = roles(programs);
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
fn attached_here(programs: &Programs) -> Result<HashSet<Role>> {
    let mut netlink = Netlink::connect()?;
    let mut found = HashSet::new();
    for link in netlink.links()? {
        if !stamps(&mut netlink, link.index, programs)?.is_empty() {
            found.insert(Role::Stamp);
        }
        if !attached(&mut netlink, link.index, Side::Ingress, programs)?.is_empty() {
            found.insert(Role::Guard);
        }
        if attached_xdp(link.index, programs)?.is_some() {
            found.insert(Role::GuardXdp);
        }
    }
    Ok(found)
}
