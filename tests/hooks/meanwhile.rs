//! What goes while somebody looks at it or removes it.

use std::fs;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, ScopedJoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{TC_EGRESS, TcHook};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use netoken::hooks::clsact::attached;
use netoken::hooks::loaded::{Programs, loaded_by};
use netoken::hooks::netlink::{Netlink, Side};
use netoken::hooks::xdp::attached_xdp;
use nix::sys::signal::Signal;

use crate::foreign::ifindex;
use crate::lab::{Running, ip, wait_until};
use crate::look::{expect_bare, expect_no_state, expect_ours, records};
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// Group of include/uapi/linux/rtnetlink.h.
const RTNLGRP_TC: u32 = 4;

/// So many that the kernel lists them in many pieces.
const INTERFACES: usize = 100;
/// So many go at once.
const PIECE: usize = 5;

/// So many that they take a while to be removed one by one.
const FILTERS: u32 = 1000;

pub fn a_look_finds_what_is_there_while_interfaces_go() -> Result<()> {
    let world = World::new()?;
    ip(&world.ns, (0..INTERFACES).map(|at| format!("link add d{at} up type veth peer name e{at}")))?;
    world.second_cable()?;
    world.ok("-i c1 --attach --quiet")?;
    let index = ifindex(&world, "c1")?.cast_unsigned();
    let programs = loaded_by(&[])?;
    let (looks, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let look_on = |remove: &ScopedJoinHandle<'_, Result<()>>| {
        let mut netlink = Netlink::connect()?;
        while !remove.is_finished() {
            let look = looks.load(Ordering::Relaxed);
            let found = attached(&mut netlink, index, Side::Egress, &programs)?.len();
            ensure_eq!(found, 1, "filters of ours in look {look}");
            ensure!(netlink.has_clsact(index)?, "there is no clsact in look {look}");
            ensure!(netlink.links()?.iter().any(|link| link.index == index), "look {look}");
            looks.store(look + 1, Ordering::Release);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let remove = scope.spawn(|| {
            for (piece, first) in (0..INTERFACES).step_by(PIECE).enumerate() {
                // Whoever of the two gets the CPU: some go in one look, some in another.
                wait_until("one more look", || {
                    let go = looks.load(Ordering::Acquire) > piece || over.load(Ordering::Acquire);
                    Ok(go.then_some(()))
                })?;
                ip(&world.ns, (first..first + PIECE).map(|at| format!("link del d{at}")))?;
            }
            Ok(())
        });
        let looked = world.lab.within(&world.ns, || look_on(&remove));
        over.store(true, Ordering::Release);
        remove.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        looked
    })
}

/// Of one interface, by whatever takes it away; what is on the other is removed and told all the same.
pub fn what_goes_while_it_is_removed_is_gone() -> Result<()> {
    for (tool, command) in
        [("tc", "filter del dev c0 egress"), ("tc", "qdisc del dev c0 clsact"), ("ip", "link del c0")]
    {
        let mut tries = 0;
        while !goes_while_it_is_removed(tool, command).with_context(|| format!("{tool} {command}"))? {
            tries += 1;
            ensure!(tries < 10, "{tool} {command}: all were removed at once each time");
        }
    }
    Ok(())
}

/// False if the moment was missed.
fn goes_while_it_is_removed(tool: &str, command: &str) -> Result<bool> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok("-i c0 -i c1 --attach --quiet")?;
    let index = ifindex(&world, "c0")?;
    let hooks = records(&world.ok("-i c0 --query --json")?, "hook")?;
    let id = hooks[0]["program"].as_u64().context("no program")?;
    world.lab.within(&world.ns, || {
        let program = libbpf_rs::Program::fd_from_id(id as u32)?;
        for handle in 1..=FILTERS {
            let mut hook = TcHook::new(program.as_fd());
            hook.ifindex(index).attach_point(TC_EGRESS).priority(7).handle(handle).attach()?;
        }
        Ok(())
    })?;
    let count = || {
        world
            .lab
            .within(&world.ns, || Ok(Netlink::connect()?.filters(index.cast_unsigned(), Side::Egress)?.len()))
    };
    let all = count()?;
    let destroy = Running::start(&mut world.lab.netoken(&world.args("--destroy")))?;
    let stat = format!("/proc/{}/stat", destroy.child.id());
    // It goes a millisecond at a time, and stands between two requests while we look and while the other command runs.
    let left = wait_until("the first to be removed", || {
        destroy.signal(Signal::SIGCONT)?;
        thread::sleep(Duration::from_millis(1));
        destroy.pause()?;
        wait_until("it to stop", || {
            let stat = fs::read_to_string(&stat)?;
            Ok((stat.contains(") T ") || stat.contains(") Z ")).then_some(()))
        })?;
        Ok(Some(count()?).filter(|left| *left < all))
    })?;
    if left == 0 {
        return Ok(false);
    }
    sh(&format!("{tool} -n {} {command}", world.ns))?;
    destroy.signal(Signal::SIGCONT)?;

    let (code, lines) = destroy.end()?;
    ensure_eq!(code, Some(0), "the exit code; it said {lines:#?}");
    ensure!(lines.iter().any(|line| line.starts_with("c1: filter removed")), "{lines:#?}");
    expect_ours(&world.ns, "c1", 0)?;
    expect_bare(&world.ns, "c1")?;
    expect_no_state(&world.lab)?;
    Ok(true)
}

pub fn clsact_is_told_from_what_else_may_be_there() -> Result<()> {
    let world = World::new()?;
    let index = ifindex(&world, "c0")?.cast_unsigned();
    let expect = |expected: bool, what: &str| {
        let has = world.lab.within(&world.ns, || Netlink::connect()?.has_clsact(index))?;
        ensure_eq!(has, expected, "a clsact qdisc with {what}");
        Ok::<_, anyhow::Error>(())
    };
    let tc = |command: &str| sh(&format!("tc -n {} qdisc {command}", world.ns));
    expect(false, "nothing")?;
    world.ok("-i c0 --attach --quiet")?;
    expect(true, "ours")?;
    world.ok("-i c0 --destroy")?;
    expect(false, "nothing any more")?;
    tc("add dev c0 clsact")?;
    expect(true, "somebody else's")?;
    tc("del dev c0 clsact")?;
    tc("add dev c0 ingress")?;
    expect(false, "an ingress qdisc")?;
    tc("del dev c0 ingress")?;
    expect(false, "nothing")?;
    sh(&format!("ip -n {} link del c0", world.ns))?;
    expect(false, "no interface")?;
    // Nothing else is there then, and that is no error.
    world.lab.within(&world.ns, || {
        let mut netlink = Netlink::connect()?;
        ensure_eq!(netlink.filters(index, Side::Egress)?.len(), 0, "filters");
        ensure_eq!(netlink.chains(index, Side::Egress)?.len(), 0, "chains");
        ensure!(attached_xdp(index, &Programs::default())?.is_none(), "a program at XDP");
        Ok(())
    })
}

/// A stream looks when it gets notice of something; it must not be what it gets notice of.
pub fn who_looks_gives_nobody_notice() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let mut notices = world.lab.within(&world.ns, || Ok(Socket::new(NETLINK_ROUTE)?))?;
    notices.bind(&SocketAddr::new(0, 0))?;
    notices.add_membership(RTNLGRP_TC)?;
    notices.set_non_blocking(true)?;
    world.ok("-i c0 --query")?;
    world.lab.ok(&format!("guard --netns {} --query", world.ns))?;
    match notices.recv(&mut Vec::<u8>::with_capacity(4096), 0) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
        other => bail!("a notice: {other:?}"),
    }
    world.ok("-i c0 --detach")?;
    notices.recv(&mut Vec::<u8>::with_capacity(4096), 0).context("the socket gets no notices at all")?;
    Ok(())
}
