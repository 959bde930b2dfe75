//! An instance goes when the last hook that uses it has gone.

use std::collections::HashMap;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::clsact::attached;
use super::loaded::{Loaded, loaded_programs};
use super::netlink::{Netlink, Side};
use super::xdp::attached_xdp;
use crate::state::{Lock, State};

/// How long the kernel may take to free a program that is attached nowhere any more: it does so behind a grace period,
/// and a busy machine takes its time.
const LINGER: Duration = Duration::from_secs(10);

/// Removes an instance if no program uses it any more. True if nothing of it is left.
///
/// Where a program of the instance may be attached in another network namespace, this takes as long as the kernel may
/// take to free one that is not.
///
/// # Errors
/// The kernel refused to list what is there, or a pin cannot be removed.
pub fn remove_unused(state: &State, _lock: &Lock, name: &str) -> Result<bool> {
    let instance = state.instance(name);
    if !instance.pins.exists() {
        return Ok(true);
    }
    let deadline = Instant::now() + LINGER;
    loop {
        let mut programs = loaded_programs(state)?;
        programs.retain(|_, program| program.instance.as_deref() == Some(name));
        if programs.is_empty() {
            instance.remove()?;
            return Ok(true);
        }
        if Instant::now() >= deadline || are_attached_here(&programs)? {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Whether one of these programs is attached to an interface of this network namespace.
fn are_attached_here(programs: &HashMap<u32, Loaded>) -> Result<bool> {
    let mut netlink = Netlink::connect()?;
    for link in netlink.links()? {
        for side in [Side::Egress, Side::Ingress] {
            if !attached(&mut netlink, link.index, side, programs)?.is_empty() {
                return Ok(true);
            }
        }
        if attached_xdp(link.index, programs)?.is_some() {
            return Ok(true);
        }
    }
    Ok(false)
}
