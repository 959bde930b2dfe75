//! TCP Fast Open: a SYN with data is stamped in front of its data, or left alone, and the data arrive in it.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use nix::sys::signal::SigSet;
use socket2::{Domain, Socket, Type};

use crate::lab::{PATIENCE, kernel_counter};
use crate::segment::{KIND_FASTOPEN, Segment, TOKEN};
use crate::sockets::{Listener, echo};
use crate::support::ensure_eq;
use crate::world::{FAMILIES, Family, OFFLOADS, World};
use crate::{NET, case, sys};

/// Both sides of net.ipv4.tcp_fastopen, with cookies, and without.
const COOKIES: &str = "0x3";
const NO_COOKIES: &str = "0x207";
const SIZES: [usize; 3] = [1, 100, 1200];

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = family.name();
        for (tx, offload) in OFFLOADS {
            cases.push(case(
                &format!("data in a SYN over {name} {offload} arrive in it, behind the token"),
                NET,
                move || without_cookie(family, tx),
            ));
        }
        cases.push(case(&format!("a SYN over {name} with data and a cookie is stamped"), NET, move || {
            with_cookie(family, false)
        }));
        cases.push(case(
            &format!("a SYN over {name} with data and no room is left alone, and the data arrive in it"),
            NET,
            move || with_cookie(family, true),
        ));
    }
    cases
}

/// A world in which both sides do Fast Open.
pub fn world(tx: bool, mode: &str) -> Result<World> {
    let world = World::new(tx)?;
    for ns in [&world.client, &world.server] {
        world.set(ns, "ipv4/tcp_fastopen", mode)?;
    }
    Ok(world)
}

/// Listens for connections that may bring data in their SYN.
pub fn listener(world: &World, addr: SocketAddr) -> Result<Listener> {
    Listener::open_with(&world.lab, &world.server, addr, |socket| {
        sys::set_option(socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN, &64i32.to_ne_bytes())
            .context("TCP_FASTOPEN")
    })
}

/// Connects and sends in one call, which comes back when the connection is there.
pub fn connect_with_data(world: &World, to: SocketAddr, data: &[u8]) -> Result<Socket> {
    world.lab.within(&world.client, || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        // The SIGCHLD of a child of another thread would end the wait, and a second call would send the data again.
        SigSet::all().thread_block()?;
        let sent = socket.send_to_with_flags(data, &to.into(), libc::MSG_FASTOPEN).context("MSG_FASTOPEN")?;
        ensure_eq!(sent, data.len(), "bytes taken by the kernel");
        Ok(socket)
    })
}

/// One connection whose data come first; returns the SYN that opened it.
fn open(world: &World, listener: &Listener, size: usize) -> Result<Segment> {
    let sent: Vec<u8> = (0..size).map(|at| (at * 31 + 5) as u8).collect();
    let mut client: TcpStream = connect_with_data(world, listener.addr, &sent)?.into();
    let mut server = listener.accept()?;
    let mut got = vec![0; size];
    server.stream.read_exact(&mut got).context("receiving the data of the SYN")?;
    ensure_eq!(got == sent, true, "the data arrived as they were sent");
    echo(&mut client, &mut server.stream)?;
    Ok(server.syn)
}

/// SYNs whose data were taken, as the server and the client count them.
fn expect_data_in_syns(world: &World, count: u64) -> Result<()> {
    ensure_eq!(world.server_counter("TcpExtTCPFastOpenPassive")?, count, "SYNs with data at the server");
    ensure_eq!(world.server_counter("TcpExtTCPFastOpenPassiveFail")?, 0, "SYNs whose data were refused");
    let acked = kernel_counter(&world.client, "TcpExtTCPFastOpenActive")?;
    ensure_eq!(acked, count, "SYNs whose data were acknowledged, at the client");
    world.expect_no_bad_packets()
}

fn without_cookie(family: Family, tx: bool) -> Result<()> {
    let world = world(tx, NO_COOKIES)?;
    world.attach("")?;
    let listener = listener(&world, (world.server_addr(family), 0).into())?;
    for size in SIZES {
        let syn = open(&world, &listener, size)?;
        syn.check_stamped(TOKEN)?;
        let headers = if family == Family::V4 { 40 } else { 60 };
        ensure_eq!(syn.ip_len, headers + syn.options_len + size, "length of a SYN with {size} bytes");
    }
    expect_data_in_syns(&world, SIZES.len() as u64)?;
    world.expect_counters(&[("stamped", SIZES.len() as u64)])
}

/// With timestamps, a cookie of 8 bytes leaves no room for the token.
fn with_cookie(family: Family, timestamps: bool) -> Result<()> {
    let world = world(false, COOKIES)?;
    for ns in [&world.client, &world.server] {
        world.set(ns, "ipv4/tcp_timestamps", if timestamps { "1" } else { "0" })?;
    }
    world.attach("")?;
    let listener = listener(&world, (world.server_addr(family), 0).into())?;
    // The first asks for a cookie, which is short, and brings no data.
    open(&world, &listener, 10)?.check_stamped(TOKEN)?;
    for size in SIZES {
        let syn = open(&world, &listener, size)?;
        ensure_eq!(syn.has(KIND_FASTOPEN), true, "the SYN has a cookie");
        if timestamps {
            syn.check_not_stamped()?;
        } else {
            syn.check_stamped(TOKEN)?;
        }
    }
    let count = SIZES.len() as u64;
    expect_data_in_syns(&world, count)?;
    match timestamps {
        true => world.expect_counters(&[("stamped", 1), ("no_room", count)]),
        false => world.expect_counters(&[("stamped", 1 + count)]),
    }
}
