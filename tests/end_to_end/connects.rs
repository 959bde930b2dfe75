//! Connections that programs open: whatever kind of SYN the kernel makes, they work, and the server sees the
//! token.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use socket2::{Domain, Protocol, Socket, Type};

use crate::lab::{PATIENCE, kernel_counter, wait_until};
use crate::segment::{ECE_CWR, KIND_MD5, KIND_MPTCP, TOKEN};
use crate::sockets::{Listener, connect_with, echo, exchange};
use crate::support::{Need, ensure_eq};
use crate::wire::Tap;
use crate::world::{FAMILIES, Family, Hook, IN, OFFLOADS, World};
use crate::{NET, case, case_if, sys, with};

const CONNECTIONS: u64 = 5;

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = family.name();
        for (tx, offload) in OFFLOADS {
            cases.push(case(
                &format!("connecting over {name} {offload} works and is stamped"),
                NET,
                move || direct(family, tx),
            ));
            cases.push(case(
                &format!("connecting over {name} {offload} works and is stamped at tcx"),
                &[NET, &[Need::Kernel(6, 6)]].concat(),
                move || works(&World::new(tx)?, family, "--hook tcx"),
            ));
            for hook in [Hook::Client, Hook::Router] {
                let on = hook.name();
                let what =
                    format!("a SYN over {name} {offload} stamped on the {on} is right behind a router");
                cases.push(case(&what, NET, move || routed(family, tx, hook)));
            }
        }
        cases.push(case(&format!("a SYN over {name} with ECN is stamped"), NET, move || {
            ecn(family, "1", ECE_CWR)
        }));
        cases.push(case_if(
            &format!("a SYN over {name} with accurate ECN is stamped and keeps its AE bit"),
            NET,
            move || ecn(family, "3", 0x100 | ECE_CWR),
            has_accurate_ecn,
        ));
        cases.push(case_if(
            &format!("an MPTCP SYN over {name} is stamped, and stays MPTCP"),
            NET,
            move || mptcp(family),
            has_mptcp,
        ));
        cases.push(case_if(
            &format!("a SYN over {name} with an MD5 signature is left alone, and connects"),
            NET,
            move || md5(family),
            has_md5,
        ));
    }
    cases.push(case("a router can ask for its neighbours as soon as it is made", NET, || {
        let (world, router) = World::routed(true, Hook::Router)?;
        asks_nobody_for_leave(&world, &router)
    }));
    cases.push(case("a SYN over IPv4 is right behind source NAT", &with("nft"), || {
        let (world, router) = World::routed(false, Hook::Router)?;
        crate::support::sh(&format!(
            "ip netns exec {router} nft 'add table ip nat; \
             add chain ip nat out {{ type nat hook postrouting priority 100; }}; \
             add rule ip nat out oifname {} masquerade'",
            crate::world::OUT
        ))?;
        works(&world, Family::V4, "")
    }));
    cases
}

fn direct(family: Family, tx: bool) -> Result<()> {
    works(&World::new(tx)?, family, "")
}

fn routed(family: Family, tx: bool, hook: Hook) -> Result<()> {
    works(&World::routed(tx, hook)?.0, family, "")
}

/// IFA_F_TENTATIVE of include/uapi/linux/if_addr.h: whether somebody else has the address is not known yet.
const TENTATIVE: u32 = 0x40;

/// Its link-local addresses become usable without a question whether they are anybody else's.
fn asks_nobody_for_leave(world: &World, ns: &str) -> Result<()> {
    // The columns are address, interface number, prefix length, scope, flags, name.
    let is_usable = |line: &str| {
        let flags = line.split_whitespace().nth(4).and_then(|flags| u32::from_str_radix(flags, 16).ok());
        line.starts_with("fe80") && flags.is_some_and(|flags| flags & TENTATIVE == 0)
    };
    wait_until("both link-local addresses", || {
        let table =
            world.lab.within(ns, || Ok(std::fs::read_to_string("/proc/thread-self/net/if_inet6")?))?;
        Ok((table.lines().filter(|line| is_usable(line)).count() == 2).then_some(()))
    })?;
    ensure_eq!(kernel_counter(ns, "Icmp6OutNeighborSolicits")?, 0, "neighbour solicitations");
    Ok(())
}

/// Before the hook is there no SYN is stamped, then every one is, and no kernel on the way complains.
fn works(world: &World, family: Family, flags: &str) -> Result<()> {
    let listener = Listener::open(world, family)?;
    let plain = exchange(world, &listener)?;
    plain.check_not_stamped()?;
    world.attach(flags)?;
    for _ in 0..CONNECTIONS {
        let syn = exchange(world, &listener)?;
        syn.check_stamped(TOKEN)?;
        ensure_eq!(syn.options_len, plain.options_len + 12, "length of the option list");
        ensure_eq!(syn.ip_len, plain.ip_len + 12, "length of the IP packet");
        ensure_eq!(syn.options.len(), plain.options.len() + 1, "number of options");
    }
    world.expect_no_bad_packets()?;
    world.expect_counters(&[("stamped", CONNECTIONS)])
}

fn ecn(family: Family, mode: &str, flags: u16) -> Result<()> {
    let world = World::new(false)?;
    world.set(&world.client, "ipv4/tcp_ecn", mode)?;
    world.attach("")?;
    let syn = exchange(&world, &Listener::open(&world, family)?)?;
    ensure!(syn.flags & flags == flags, "the flags are {:#x}", syn.flags);
    syn.check_stamped(TOKEN)?;
    world.expect_no_bad_packets()?;
    world.expect_counters(&[("stamped", 1)])
}

fn has_accurate_ecn() -> Result<(), String> {
    // Before 5.15 any number is taken, and means nothing.
    let takes = |value: &'static str| {
        let set = sys::in_nowhere(|| std::fs::write("/proc/sys/net/ipv4/tcp_ecn", value));
        matches!(set, Ok(Ok(())))
    };
    if takes("3") && !takes("99") { Ok(()) } else { Err("this kernel has no accurate ECN".to_string()) }
}

/// include/uapi/linux/mptcp.h
const SOL_MPTCP: i32 = 284;
const MPTCP_INFO: i32 = 1;
const MPTCP_INFO_FALLBACK: u8 = 1;

/// Whether the connection has fallen back to TCP: a bit of `mptcpi_flags`, which stands at 8.
fn is_mptcp(socket: &impl std::os::fd::AsRawFd) -> Result<bool> {
    let info = sys::get_option(socket, SOL_MPTCP, MPTCP_INFO, 128).context("MPTCP_INFO")?;
    Ok(info.get(8).context("a short MPTCP_INFO")? & MPTCP_INFO_FALLBACK == 0)
}

fn has_mptcp() -> Result<(), String> {
    match Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) {
        Ok(_) => Ok(()),
        Err(error) => Err(format!("this kernel has no MPTCP: {error}")),
    }
}

fn mptcp(family: Family) -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    let tap = Tap::receiver(&world.lab, &world.server, IN)?;
    let addr = (world.server_addr(family), 8000).into();
    let new = || -> Result<Socket> {
        let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::MPTCP))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket)
    };
    // An MPTCP socket does not know TCP_SAVE_SYN.
    let listener = world.lab.within(&world.server, || {
        let socket = new()?;
        socket.bind(&std::net::SocketAddr::into(addr))?;
        socket.listen(16)?;
        Ok(socket)
    })?;
    let client = world.lab.within(&world.client, || {
        let socket = new()?;
        socket.connect_timeout(&addr.into(), PATIENCE)?;
        Ok(socket)
    })?;
    let (server, _) = sys::uninterrupted(|| listener.accept())?;
    ensure!(is_mptcp(&client)?, "the client fell back to TCP");
    echo(&mut client.into(), &mut server.into())?;

    let (_, syn) = tap.next_syn(addr.port())?;
    ensure!(syn.has(KIND_MPTCP), "no MP_CAPABLE in {:02x?}", syn.options);
    syn.check_stamped(TOKEN)?;
    syn.check_sums()?;
    ensure_eq!(world.server_counter("MPTcpExtMPCapableSYNRX")?, 1, "MP_CAPABLE SYNs at the server");
    ensure_eq!(world.server_counter("MPTcpExtMPCapableFallbackACK")?, 0, "connections that fell back");
    world.expect_counters(&[("stamped", 1)])
}

/// `struct tcp_md5sig` of include/uapi/linux/tcp.h: an address, lengths, and the key.
fn md5_key(peer: std::net::IpAddr) -> Vec<u8> {
    const KEY: &[u8] = b"signed";
    let mut bytes = vec![0; 128];
    match peer {
        std::net::IpAddr::V4(addr) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET as u16).to_ne_bytes());
            bytes[4..8].copy_from_slice(&addr.octets());
        }
        std::net::IpAddr::V6(addr) => {
            bytes[..2].copy_from_slice(&(libc::AF_INET6 as u16).to_ne_bytes());
            bytes[8..24].copy_from_slice(&addr.octets());
        }
    }
    bytes.extend([0, 0]);
    bytes.extend((KEY.len() as u16).to_ne_bytes());
    bytes.extend([0; 4]);
    bytes.extend(KEY);
    bytes.resize(128 + 8 + 80, 0);
    bytes
}

fn sign(socket: &Socket, peer: std::net::IpAddr) -> Result<()> {
    sys::set_option(socket, libc::IPPROTO_TCP, libc::TCP_MD5SIG, &md5_key(peer)).context("TCP_MD5SIG")
}

fn has_md5() -> Result<(), String> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).map_err(|error| error.to_string())?;
    sign(&socket, Family::V4.addr(0, 1)).map_err(|error| format!("this kernel has no {error:#}"))
}

fn md5(family: Family) -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    let (client, server) = (world.client_addr(family), world.server_addr(family));
    let listener =
        Listener::open_with(&world.lab, &world.server, (server, 0).into(), |socket| sign(socket, client))?;
    let mut near = connect_with(&world.lab, &world.client, listener.addr, PATIENCE, |s| sign(s, server))?;
    let mut far = listener.accept()?;
    echo(&mut near, &mut far.stream)?;
    ensure!(far.syn.has(KIND_MD5), "no signature in {:02x?}", far.syn.options);
    far.syn.check_not_stamped()?;
    ensure_eq!(world.server_counter("TcpExtTCPMD5Failure")?, 0, "wrong signatures");
    world.expect_no_bad_packets()?;
    world.expect_counters(&[("auth_option", 1)])
}
