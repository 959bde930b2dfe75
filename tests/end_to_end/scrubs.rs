//! Tokens that end at the guard: the host sees NOPs, its checksum is right, and the connection works, whoever computes
//! the checksum and wherever the packet goes on to.

use std::io::Write;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use crate::devices::{TUN, has_tun, read_syn_ack};
use crate::guard::{HOOKS, STATIC, attach, query, rules, write};
use crate::lab::{Lab, PATIENCE, Running, ip, wait_until};
use crate::segment::{Segment, TOKEN};
use crate::sockets::{Listener, connect, echo, exchange};
use crate::support::ensure_eq;
use crate::wire::{Frame, LINUX_OPTIONS, Tap};
use crate::world::{FAMILIES, Family, Hook, IN, OFFLOADS, OUT, World};
use crate::{NET, case, case_if, sys};

const CONNECTIONS: u64 = 5;
/// What Linux sends, and a token.
const OPTIONS_LEN: usize = 32;

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for (hook, shown) in HOOKS {
        for (tx, offload) in OFFLOADS {
            for (mode, verdict) in [("drop", "valid"), ("observe", "wrong_static"), ("scrub", "scrubbed")] {
                cases.push(case(
                    &format!("guard: --hook {hook} {offload} scrubs in mode {mode}"),
                    NET,
                    move || scrubs(hook, shown, tx, mode, verdict),
                ));
            }
            cases.push(case(
                &format!("guard: --hook {hook} {offload} scrubs what a router forwards"),
                NET,
                move || forwarded(hook, tx),
            ));
        }
    }
    for (tx, offload) in OFFLOADS {
        cases.push(case(&format!("guard: generic XDP {offload} scrubs"), NET, move || generic(tx)));
    }
    for family in FAMILIES {
        cases.push(case_if(
            &format!("guard: scrubs {} on a tun device, which has no link header", family.name()),
            NET,
            move || tun(family),
            has_tun,
        ));
    }
    cases.push(case("guard: an event says that a token was scrubbed", NET, event));
    cases
}

/// Rules that scrub. Without one to accept, they accept another token than the one that is stamped.
fn scrubbing(world: &World, mode: &str) -> Result<String> {
    let accepts = match mode {
        "scrub" => "",
        "observe" => "tokens = '0000000000000001'\nscrub = true",
        _ => &format!("{STATIC}\nscrub = true"),
    };
    rules(world, mode, accepts)
}

/// Fails unless there were NOPs in the place of a token.
fn check_scrubbed(syn: &Segment) -> Result<()> {
    syn.check_not_stamped()?;
    ensure_eq!(syn.options_len, OPTIONS_LEN, "length of the options");
    Ok(())
}

fn scrubs(hook: &str, shown: &str, tx: bool, mode: &str, verdict: &str) -> Result<()> {
    let world = World::new(tx)?;
    let attached = attach(&world, hook, &scrubbing(&world, mode)?)?;
    ensure_eq!(attached["hook"], shown, "hook");
    world.attach("")?;
    for family in FAMILIES {
        let listener = Listener::open(&world, family)?;
        for _ in 0..CONNECTIONS {
            check_scrubbed(&exchange(&world, &listener)?)?;
        }
    }
    let counters = query(&world, "guard_counters")?;
    let found = counters[verdict].as_u64().context("no counter")?;
    world.expect_count(found, 2 * CONNECTIONS, &format!("{verdict} of {counters}"))?;
    ensure_eq!(counters["dropped"], 0, "dropped of {counters}");
    world.expect_no_bad_packets()
}

/// Behind the router there is no device that computes a checksum, so that what it sends shows whether it is right.
fn forwarded(hook: &str, tx: bool) -> Result<()> {
    let (world, router) = World::routed(tx, Hook::Client)?;
    world.lab.ethtool(&router, &format!("-K {OUT} tx off"))?;
    let rules = scrubbing(&world, "drop")?;
    world.lab.ok(&format!("guard --netns {router} --iface {IN} --attach --hook {hook} --rules {rules}"))?;
    world.attach("")?;
    let tap = Tap::receiver(&world.lab, &world.server, IN)?;
    for family in FAMILIES {
        let listener = Listener::open(&world, family)?;
        for _ in 0..CONNECTIONS {
            let mut client = connect(&world.lab, &world.client, listener.addr, PATIENCE)?;
            let mut server = listener.accept()?;
            echo(&mut client, &mut server.stream)?;
            check_scrubbed(&server.syn)?;
            let syn = tap.syn_of(&server.syn)?;
            check_scrubbed(&syn)?;
            syn.check_sums()?;
        }
    }
    world.expect_no_bad_packets()
}

/// On loopback, whose driver has no XDP of its own.
fn generic(tx: bool) -> Result<()> {
    let world = World::new(true)?;
    if !tx {
        world.lab.ethtool(&world.server, "-K lo tx off")?;
    }
    let rules = write(
        &world,
        "guard.toml",
        &format!(
            "[[rule]]\nname = 'all'\ndst = ['127.0.0.0/8', '::1']\nmode = 'drop'\nscrub = true\n{STATIC}\n"
        ),
    )?;
    let lo = format!("--netns {} --iface lo", world.server);
    world.lab.ok(&format!("guard {lo} --attach --hook xdp --rules {rules}"))?;
    world.lab.ok(&format!("{lo} --attach --quiet"))?;
    for addr in ["127.0.0.1:0", "[::1]:0"] {
        let listener = Listener::open_with(&world.lab, &world.server, addr.parse()?, |_| Ok(()))?;
        let mut client = connect(&world.lab, &world.server, listener.addr, PATIENCE)?;
        let mut server = listener.accept()?;
        check_scrubbed(&server.syn)?;
        echo(&mut client, &mut server.stream)?;
    }
    world.expect_no_bad_packets()
}

/// The frame's IP packet is written into the device, and the answer is read out of it.
fn tun(family: Family) -> Result<()> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("server")?;
    let mut device = lab.within(&ns, || sys::open_tun(TUN))?;
    ip(&ns, [format!("link set {TUN} up")])?;
    let bits = if family == Family::V4 { 24 } else { 64 };
    lab.addr(&ns, TUN, &format!("{}/{bits}", family.addr(9, 1)))?;
    let text = format!(
        "[[rule]]\nname = 'all'\ndst = ['10.0.0.0/8', 'fd00::/8']\nmode = 'drop'\nscrub = true\n{STATIC}\n"
    );
    let path = lab.file("guard.toml", text)?;
    let place = format!("--netns {ns} --iface {TUN}");
    let said = lab.ok(&format!("guard {place} --attach --json --rules {}", path.display()))?;
    ensure!(said.contains("clsact ingress"), "{said}");

    let listener = Listener::open_with(&lab, &ns, (family.addr(9, 1), 0).into(), |_| Ok(()))?;
    let options = [&LINUX_OPTIONS[..], &[253, 12, 0x4e, 0x54], &TOKEN].concat();
    let frame = Frame::syn(family.addr(9, 2), listener.addr, &options, b"")?;
    device.write_all(&frame.bytes[14..])?;
    let answer = read_syn_ack(&mut device)?;
    ensure_eq!(answer.src, listener.addr, "who answers");
    // The rest of the handshake is nobody's; that the host took the SYN says that its checksum was right.
    ensure_eq!(crate::lab::kernel_counter(&ns, "TcpInCsumErrors")?, 0, "TcpInCsumErrors");
    let counters = lab.ok(&format!("guard {place} --query --json"))?;
    ensure!(counters.contains("\"valid\":1"), "{counters}");
    Ok(())
}

fn event() -> Result<()> {
    let world = World::new(true)?;
    attach(&world, "auto", &scrubbing(&world, "scrub")?)?;
    world.attach("")?;
    let listener = Listener::open(&world, Family::V4)?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch --json"))?;
    let line = wait_until("an event", || {
        exchange(&world, &listener)?;
        Ok(watch.wait_within(std::time::Duration::from_millis(300), |line| line.contains("guarded")))
    })?;
    let event: serde_json::Value = serde_json::from_str(&line).context(line)?;
    for (name, value) in [("verdict", "scrubbed"), ("mode", "scrub"), ("token", "4e45544f4b454e31")] {
        ensure_eq!(event[name], value, "{name} of {event}");
    }
    ensure_eq!(event["scrubbed"], true, "scrubbed of {event}");
    Ok(())
}
