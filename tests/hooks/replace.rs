//! Attaching again replaces in place.

use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use socket2::SockRef;

use crate::lab::{PATIENCE, kernel_counter};
use crate::look::{counter, expect_bare, expect_no_state, expect_ours, ours, records};
use crate::support::{ensure_eq, sh};
use crate::world::{World, accept, saved_syn, token};

pub fn an_interface_may_be_given_in_three_ways() -> Result<()> {
    let world = World::new()?;
    for flag in ["-i", "--iface", "--interface"] {
        world.ok(&format!("{flag} c0 --attach --quiet"))?;
        expect_ours(&world.ns, "c0", 1)?;
        let out = world.ok(&format!("{flag} c0 --query --json"))?;
        ensure_eq!(records(&out, "hook")?.len(), 1, "hooks of {out}");
        world.ok(&format!("{flag} c0 --detach"))?;
        expect_ours(&world.ns, "c0", 0)?;
        world.ok(&format!("{flag} c0 --destroy"))?;
        expect_bare(&world.ns, "c0")?;
    }
    expect_no_state(&world.lab)
}

pub fn an_alternative_name_will_do() -> Result<()> {
    let world = World::new()?;
    sh(&format!("ip -n {} link property add dev c0 altname uplink", world.ns))?;
    world.ok("-i uplink --attach --quiet")?;
    world.ok("-i c0 -i uplink --attach --quiet")?;
    expect_ours(&world.ns, "c0", 1)?;
    // One interface, though it was named twice.
    let out = world.ok("-i c0 -i uplink --query --json")?;
    ensure_eq!(records(&out, "hook")?.len(), 1, "hooks of {out}");
    let said = String::from_utf8(world.run("-i c0 -i uplink --destroy")?.stderr)?;
    ensure!(!said.contains("not attached"), "{said}");
    expect_bare(&world.ns, "c0")?;
    // Such a name may be longer than one of an interface can be.
    sh(&format!("ip -n {} link property add dev c0 altname uplink-of-the-first-rack", world.ns))?;
    world.ok("-i uplink-of-the-first-rack --attach --quiet")?;
    expect_ours(&world.ns, "c0", 1)?;
    world.ok("-i uplink-of-the-first-rack --destroy")?;
    expect_bare(&world.ns, "c0")
}

pub fn and_more_than_once() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let both = "--iface c0 -i c1";
    world.ok(&format!("{both} --attach --quiet"))?;
    expect_ours(&world.ns, "c0", 1)?;
    expect_ours(&world.ns, "c1", 1)?;
    let out = world.ok(&format!("{both} --query --json"))?;
    ensure_eq!(records(&out, "hook")?.len(), 2, "hooks of {out}");
    world.ok(&format!("{both} --detach"))?;
    expect_ours(&world.ns, "c0", 0)?;
    expect_ours(&world.ns, "c1", 0)?;
    world.ok(&format!("{both} -i c0 --attach --quiet"))?;
    expect_ours(&world.ns, "c0", 1)?;
    world.ok(&format!("{both} -i c0 --destroy"))?;
    expect_bare(&world.ns, "c0")?;
    expect_bare(&world.ns, "c1")?;
    expect_no_state(&world.lab)
}

pub fn attaching_twice_keeps_policy_counters_and_place() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 00112233aabbccdd")?;
    world.syns(5)?;
    let place = |line: &str| line.split(" netoken_egress").next().unwrap_or_default().to_string();
    let before = ours(&world.ns, "c0")?;
    world.ok("-i c0 --attach --quiet --sample 10")?;
    expect_ours(&world.ns, "c0", 1)?;
    let after = ours(&world.ns, "c0")?;
    ensure_eq!(place(&before[0]), place(&after[0]), "the place of the filter");
    ensure!(before != after, "the program was not replaced: {after:?}");
    world.expect_counter("default", "stamped", 5, "SYNs stamped before")?;
    world.expect_token("00112233aabbccdd", "the token")?;
    world.expect_counter("default", "stamped", 6, "SYNs stamped in all")?;

    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    world.expect_token("1111111111111111", "the new token")?;
    world.expect_counter("default", "stamped", 7, "SYNs stamped in the end")?;
    expect_ours(&world.ns, "c0", 1)
}

pub fn replacing_lets_no_syn_pass_unstamped_and_breaks_no_connect() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    while_connecting(&world, 30, || world.ok("-i c0 --attach --quiet").map(drop))?;
    expect_ours(&world.ns, "c0", 1)
}

/// Changes something so many times while connections are made, of which none may fail and every SYN has to be stamped once.
pub fn while_connecting(world: &World, times: u64, mut change: impl FnMut() -> Result<()>) -> Result<()> {
    let listener = world.listen("10.77.0.2:0")?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| world.lab.within(&world.ns, || connect_until(&listener, &stop)));
        let changed = (0..times).try_for_each(|_| change());
        stop.store(true, Ordering::Release);
        let made = load.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        changed?;
        ensure!(made >= times, "only {made} connections in {times} changes");
        // Exactly: one SYN for each connection, and those that were sent again: because a machine had much to do, or a
        // clsact qdisc came or went, with which the kernel loses packets.
        let again = kernel_counter(&world.ns, "TcpExtTCPSynRetrans")?;
        ensure_eq!(
            counter(&world.lab, &world.ns, "default", "stamped")?,
            made + again,
            "SYNs stamped, connections made and the {again} SYNs sent again for them"
        );
        Ok(())
    })
}

/// Connects and accepts again and again, looks at every SYN, and returns how many there were. One after the
/// other, so that a machine with much to do cannot let the queue of the listener overflow.
fn connect_until(listener: &TcpListener, stop: &AtomicBool) -> Result<u64> {
    let addr = listener.local_addr()?;
    let mut made = 0;
    while !stop.load(Ordering::Acquire) {
        let client =
            TcpStream::connect_timeout(&addr, PATIENCE).with_context(|| format!("connect {made}"))?;
        let server = accept(listener)?;
        made += 1;
        let syn = saved_syn(&server)?;
        ensure!(token(&syn).is_some(), "SYN {made} has no token: {syn:02x?}");
        // A reset leaves no TIME_WAIT behind, and the ports last.
        SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
    }
    Ok(made)
}

pub fn two_interfaces_are_attached_by_one_command() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok("-i c0 -i c1 --attach --quiet")?;
    world.syns(3)?;
    world.syns_to("10.78.0.2:9", 4)?;
    world.expect_counter("default", "stamped", 7, "SYNs on both interfaces")?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_ours(&world.ns, "c1", 1)?;
    world.syns_to("10.78.0.2:9", 1)?;
    world.expect_counter("default", "stamped", 8, "SYNs in the end")?;
    world.ok("-i c1 --destroy")?;
    expect_bare(&world.ns, "c1")?;
    expect_no_state(&world.lab)
}

pub fn two_instances_share_an_interface() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    world.ok("-i c0 --attach --quiet --token 2222222222222222 --instance blue")?;
    expect_ours(&world.ns, "c0", 2)?;
    // The younger stands in front; the other finds the SYN stamped.
    world.expect_token("2222222222222222", "the token")?;
    let read = |instance, name| counter(&world.lab, &world.ns, instance, name);
    ensure_eq!(read("blue", "stamped")?, 1, "stamped by blue");
    ensure_eq!(read("default", "already_stamped")?, 1, "found stamped by default");

    world.ok("-i c0 --attach --quiet")?;
    expect_ours(&world.ns, "c0", 2)?;
    world.ok("-i c0 --detach --instance blue")?;
    expect_ours(&world.ns, "c0", 1)?;
    world.expect_token("1111111111111111", "the token that is left")?;
    world.ok("-i c0 --destroy --instance blue")?;
    expect_ours(&world.ns, "c0", 1)?;
    ensure_eq!(read("default", "stamped")?, 1, "stamped by default");
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}
