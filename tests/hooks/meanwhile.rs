//! What goes while somebody looks.

use std::thread;

use anyhow::{Context, Result, bail, ensure};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use netoken::hooks::clsact::attached;
use netoken::hooks::loaded::loaded_by;
use netoken::hooks::netlink::{Netlink, Side};

use crate::foreign::ifindex;
use crate::lab::ip;
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// Group of include/uapi/linux/rtnetlink.h.
const RTNLGRP_TC: u32 = 4;

/// So many that the kernel lists them in many pieces.
const INTERFACES: usize = 100;

pub fn a_look_finds_what_is_there_while_interfaces_go() -> Result<()> {
    let world = World::new()?;
    ip(&world.ns, (0..INTERFACES).map(|at| format!("link add d{at} up type veth peer name e{at}")))?;
    world.second_cable()?;
    world.ok("-i c1 --attach --quiet")?;
    let index = ifindex(&world, "c1")?.cast_unsigned();
    let programs = loaded_by(&[])?;
    let looks = thread::scope(|scope| {
        let remove = scope.spawn(|| ip(&world.ns, (0..INTERFACES).map(|at| format!("link del d{at}"))));
        let looks = world.lab.within(&world.ns, || {
            let mut netlink = Netlink::connect()?;
            let mut looks = 0;
            while !remove.is_finished() {
                let found = attached(&mut netlink, index, Side::Egress, &programs)?.len();
                ensure_eq!(found, 1, "filters of ours in look {looks}");
                ensure!(netlink.has_clsact(index)?, "there is no clsact in look {looks}");
                ensure!(netlink.links()?.iter().any(|link| link.index == index), "look {looks}");
                looks += 1;
            }
            Ok(looks)
        })?;
        remove.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        Ok::<_, anyhow::Error>(looks)
    })?;
    ensure!(looks > 10, "{looks} looks in all");
    Ok(())
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
