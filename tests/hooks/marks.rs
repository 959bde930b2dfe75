//! Whether a clsact qdisc is ours is written down beside the pins. A note that outlives the qdisc which it was
//! made for must not make somebody else's qdisc ours.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Instant;

use anyhow::{Result, bail, ensure};

use crate::lab::{Lab, PATIENCE, wait_until};
use crate::look::{expect_no_state, has_clsact};
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// Destroys on an interface whose clsact somebody else made: it has to stay.
fn expect_kept(lab: &Lab, ns: &str, iface: &str) -> Result<()> {
    let output = lab.run(&format!("--netns {ns} -i {iface} --destroy"))?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.success(), "{}: {said}", output.status);
    ensure!(has_clsact(ns, iface)?, "somebody else's qdisc was removed: {said}");
    ensure!(said.contains("somebody else made it"), "{said}");
    Ok(())
}

pub fn a_clsact_that_was_made_anew_is_not_ours() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    sh(&format!("tc -n {} qdisc del dev c0 clsact", world.ns))?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    expect_kept(&world.lab, &world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_clsact_of_an_interface_with_a_used_index_is_not_ours() -> Result<()> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("reuse")?;
    let add = format!("ip -n {ns} link add d0 index 7777 type veth peer name d1");
    sh(&add)?;
    lab.ok(&format!("--netns {ns} -i d0 --attach --quiet"))?;
    sh(&format!("ip -n {ns} link del d0"))?;
    sh(&add)?;
    sh(&format!("tc -n {ns} qdisc add dev d0 clsact"))?;
    expect_kept(&lab, &ns, "d0")?;
    expect_no_state(&lab)
}

/// The kernel gives the number of a deleted namespace to a new one: always the lowest that is free.
pub fn a_clsact_of_a_namespace_with_a_used_number_is_not_ours() -> Result<()> {
    for _ in 0..20 {
        if number_is_used_again()? {
            return Ok(());
        }
    }
    bail!("others took the number of the deleted namespace each time");
}

/// False if another case has taken the number meanwhile, and may keep it for long.
fn number_is_used_again() -> Result<bool> {
    let mut lab = Lab::new()?;
    let first = lab.netns("first")?;
    let number = |ns: &str| fs::metadata(format!("/run/netns/{ns}")).map(|metadata| metadata.ino());
    let link = |ns: &str| sh(&format!("ip -n {ns} link add d0 index 7777 type veth peer name d1"));
    link(&first)?;
    lab.ok(&format!("--netns {first} -i d0 --attach --quiet"))?;
    let used = number(&first)?;
    sh(&format!("ip netns del {first}"))?;

    // Numbers are also those of what lies in /proc: it may be gone for good.
    let (mut tries, began) = (0, Instant::now());
    let found = wait_until("a new namespace with the number of the deleted one", || {
        tries += 1;
        let ns = lab.netns(&format!("next{tries}"))?;
        let got = number(&ns)?;
        if got > used {
            // Not free yet. A lower number is kept, so that the next one is higher.
            sh(&format!("ip netns del {ns}"))?;
            let named = fs::read_dir("/run/netns")?.flatten();
            // One of them may go while we look.
            let mut numbers = named.filter_map(|entry| Some(fs::metadata(entry.path()).ok()?.ino()));
            let is_lost = numbers.any(|number| number == used) || began.elapsed() > PATIENCE / 4;
            return Ok(is_lost.then_some(None));
        }
        Ok((got == used).then_some(Some(ns)))
    })?;
    let Some(ns) = found else { return Ok(false) };
    link(&ns)?;
    sh(&format!("tc -n {ns} qdisc add dev d0 clsact"))?;
    expect_kept(&lab, &ns, "d0")?;
    Ok(true)
}

pub fn a_deleted_namespace_leaves_no_mark() -> Result<()> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("gone")?;
    let other = lab.netns("other")?;
    for ns in [&ns, &other] {
        sh(&format!("ip -n {ns} link add d0 type veth peer name d1"))?;
        lab.ok(&format!("--netns {ns} -i d0 --attach --quiet"))?;
    }
    sh(&format!("ip netns del {ns}"))?;
    let out = lab.ok(&format!("--netns {other} -i d0 --destroy"))?;
    ensure_eq!(out, "", "what a person reads is on standard error");
    expect_no_state(&lab)
}
