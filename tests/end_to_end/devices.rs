//! What lies in front of IP: VLAN tags that the device keeps beside the packet, and no link header at all.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsFd;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Socket, Type};

use crate::lab::{Lab, OBSERVE, PATIENCE, ip};
use crate::segment::{Segment, TOKEN};
use crate::skbs::{Bench, payload};
use crate::support::ensure_eq;
use crate::wire::{Checksum, LINUX_OPTIONS};
use crate::world::{FAMILIES, Family, OUT};
use crate::{NET, case, case_if, sys};

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = family.name();
        for (tags, what) in [(1, "a VLAN tag"), (2, "two VLAN tags")] {
            cases.push(case(
                &format!("a SYN over {name} with {what} beside the packet is stamped"),
                NET,
                move || vlan(family, tags),
            ));
        }
        cases.push(case_if(
            &format!("a SYN over {name} through a tun device, which has no link header, is stamped"),
            NET,
            move || tun(family),
            has_tun,
        ));
    }
    cases.push(case_if("that a device has another link header since is told", NET, link_changed, has_tun));
    cases
}

/// A filter in front of ours pushes the tags. The last stays in the skb's metadata, an earlier one is in the
/// packet.
fn vlan(family: Family, tags: usize) -> Result<()> {
    let bench = Bench::new(family, 9000)?;
    let world = &bench.world;
    let pushed = [(0x8100, 7), (0x88a8, 9)];
    // Its filter keeps the program.
    drop(world.lab.within(&world.client, || sys::attach_vlan_push(OUT, &pushed[..tags]))?);
    world.attach("--priority 10")?;

    let on_the_wire: Vec<(u16, u16)> = pushed[..tags].iter().rev().copied().collect();
    let mut sent = 0;
    for checksum in [Checksum::Partial, Checksum::Complete] {
        for (len, linear) in [(0, 0), (100, 0), (1, 0), (5000, 14), (5000, 100)] {
            let syn = bench.expect_stamped(&LINUX_OPTIONS, &payload(len), (checksum, linear))?;
            ensure_eq!(syn.tags, on_the_wire, "tags");
            sent += 1;
        }
    }
    world.expect_counters(&[("stamped", sent)])
}

pub const TUN: &str = "tun0";

pub fn has_tun() -> Result<(), String> {
    match sys::in_nowhere(|| sys::open_tun(TUN)) {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) | Err(error) => Err(format!("no tun devices here: {error:#}")),
    }
}

fn tun(family: Family) -> Result<()> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("client")?;
    let mut device = lab.within(&ns, || sys::open_tun(TUN))?;
    ip(&ns, [format!("link set {TUN} up")])?;
    let bits = if family == Family::V4 { 24 } else { 64 };
    lab.addr(&ns, TUN, &format!("{}/{bits}", family.addr(9, 1)))?;
    let place = format!("--netns {ns} --iface {TUN}");
    lab.ok(&format!("{place} --attach --quiet"))?;

    let to = std::net::SocketAddr::new(family.addr(9, 2), 80);
    let (socket, from) = lab.within(&ns, || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        let started = socket.connect(&to.into()).err().and_then(|error| error.raw_os_error());
        ensure_eq!(started, Some(libc::EINPROGRESS), "connecting to {to}");
        let from = socket.local_addr()?.as_socket().context("no address")?;
        Ok((socket, from))
    })?;
    let syn = read_syn(&mut device)?;
    drop(socket);
    syn.check_stamped(TOKEN)?;
    syn.check_sums()?;
    ensure_eq!((syn.src, syn.dst), (from, to), "the flow");
    let counters = lab.ok(&format!("{place} --query --json"))?;
    ensure!(counters.contains("\"no_policy\":0") && !counters.contains("\"stamped\":0"), "{counters}");
    Ok(())
}

/// As a bond has with its first port: what is attached skips a header that is not there, or none.
fn link_changed() -> Result<()> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("client")?;
    let device = lab.within(&ns, || sys::open_tun(TUN))?;
    let place = format!("--netns {ns} --iface {TUN}");
    let rules = lab.file("guard.toml", OBSERVE)?;
    let guard = format!("--attach --rules {}", rules.display());
    for (command, first, again) in
        [("", "--attach --quiet", "--attach --quiet"), ("guard ", &guard, "--attach")]
    {
        let says = |changed: bool| {
            let remedy = format!("attach again: netoken {command}--iface {TUN} --netns {ns} --attach");
            let query = |form: &str| lab.ok(&format!("{command}{place} --query{form}"));
            let (text, json) = (query("")?, query(" --json")?);
            ensure_eq!(text.contains(&remedy), changed, "{text}");
            ensure_eq!(json.contains("\"link_changed\":true"), changed, "{json}");
            anyhow::Ok(())
        };
        lab.ok(&format!("{command}{place} {first}"))?;
        says(false)?;
        sys::set_link_type(&device, libc::ARPHRD_ETHER)?;
        says(true)?;
        lab.ok(&format!("{command}{place} {again}"))?;
        says(false)?;
        sys::set_link_type(&device, libc::ARPHRD_NONE)?;
        says(true)?;
        lab.ok(&format!("{command}{place} {again}"))?;
        says(false)?;
    }
    Ok(())
}

fn read_syn(device: &mut File) -> Result<Segment> {
    read_segment(device, "a SYN", Segment::is_syn)
}

pub fn read_syn_ack(device: &mut File) -> Result<Segment> {
    read_segment(device, "a SYN-ACK", |segment| segment.flags & 0x12 == 0x12)
}

/// The first that fits among what the kernel sends through the device, which is IPv6's own chatter else.
fn read_segment(device: &mut File, what: &str, fits: impl Fn(&Segment) -> bool) -> Result<Segment> {
    let deadline = Instant::now() + PATIENCE;
    let mut packet = vec![0; 1 << 16];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        if poll(&mut [PollFd::new(device.as_fd(), PollFlags::POLLIN)], timeout)? == 0 {
            bail!("waited {PATIENCE:?} for {what} in the tun device");
        }
        let len = device.read(&mut packet)?;
        if let Ok(segment) = Segment::from_ip(&packet[..len])
            && fits(&segment)
        {
            return Ok(segment);
        }
    }
}
