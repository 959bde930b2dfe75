//! An instance goes when the last hook that uses it has gone.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::clsact::attached;
use super::egress::stamps;
use super::loaded::{Loaded, loaded_programs};
use super::netlink::{Netlink, Side};
use super::xdp::attached_xdp;
use crate::netns::Netns;
use crate::state::{Lock, State};

/// How long the kernel may take to free a program that is attached nowhere any more: it does so behind a grace period,
/// and a busy machine takes its time.
const LINGER: Duration = Duration::from_secs(10);

/// Removes an instance if no program uses it any more. True if nothing of it is left.
///
/// Where a program of it may be attached in a network namespace that cannot be found, this takes as long as the kernel
/// may take to free one that is not.
///
/// # Errors
/// The kernel refused to list what is there, or a pin cannot be removed.
pub fn remove_unused(state: &State, _lock: &Lock, name: &str) -> Result<bool> {
    let instance = state.instance(name);
    if !instance.pins.exists() {
        return Ok(true);
    }
    let of_instance = || -> Result<HashMap<u32, Loaded>> {
        let mut programs = loaded_programs(state)?;
        programs.retain(|_, program| program.instance.as_deref() == Some(name));
        Ok(programs)
    };
    let mut programs = of_instance()?;
    // Once is enough: under the lock none is attached meanwhile.
    if !programs.is_empty() && are_attached(&programs)? {
        return Ok(false);
    }
    let deadline = Instant::now() + LINGER;
    while !programs.is_empty() {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
        programs = of_instance()?;
    }
    instance.remove()?;
    Ok(true)
}

/// Whether one of these programs is attached to an interface of any namespace that can be found.
fn are_attached(programs: &HashMap<u32, Loaded>) -> Result<bool> {
    if are_attached_here(programs)? {
        return Ok(true);
    }
    // One that is gone a moment later holds nothing of ours any more.
    Ok(Netns::everywhere().iter().any(|netns| netns.run(|| are_attached_here(programs)).unwrap_or(false)))
}

/// Whether one of these programs is attached to an interface of this network namespace.
fn are_attached_here(programs: &HashMap<u32, Loaded>) -> Result<bool> {
    let mut netlink = Netlink::connect()?;
    for link in netlink.links()? {
        if !stamps(&mut netlink, link.index, programs)?.is_empty()
            || !attached(&mut netlink, link.index, Side::Ingress, programs)?.is_empty()
        {
            return Ok(true);
        }
        if attached_xdp(link.index, programs)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}
