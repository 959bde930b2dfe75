//! The numbers of key rings in the kernel, of which an instance has few: one that nothing needs any more is given up for
//! another.

use std::collections::BTreeSet;

use anyhow::Result;

use crate::guard;
use crate::guard::program::GuardMaps;
use crate::keys::live::LiveKeys;
use crate::keys::{Key, RingName};
use crate::policy;
use crate::state::Instance;

/// Gives the kernel these keys, and before that makes room for their rings and those that a policy or rules will name. The
/// caller holds the lock of the state.
///
/// # Errors
/// There are too many rings, or the kernel refused.
pub(crate) fn load(
    instance: &Instance,
    live: &LiveKeys,
    keys: &[Key],
    named: impl IntoIterator<Item = RingName>,
) -> Result<()> {
    let of_keys = keys.iter().filter(|key| key.is_live()).map(Key::ring);
    let wanted: BTreeSet<RingName> = of_keys.chain(named).collect();
    // Only then is it read what is in use, which may take a while.
    if !live.has_room(&wanted)?
        && let Ok(used) = in_use(instance)
    {
        live.give_up_all_but(&used.union(&wanted).copied().collect())?;
    }
    live.load(keys)
}

/// The rings that the policy and the rules name that go now.
fn in_use(instance: &Instance) -> Result<BTreeSet<RingName>> {
    let mut used = BTreeSet::new();
    let maps = instance.maps()?;
    if maps.generation()?.is_some() {
        used.extend(policy::running::read(instance, &maps)?.policy.rings());
    }
    if instance.has_guard() {
        let maps = GuardMaps::open(&instance.pins)?;
        if maps.table()?.is_some() {
            used.extend(guard::running::read(instance, &maps)?.rules.rings());
        }
    }
    Ok(used)
}
