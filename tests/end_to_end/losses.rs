//! Networks that lose packets and send them twice, as netem makes them: each SYN that arrives carries the token,
//! once, and is right.

use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use crate::lab::{kernel_counter, wait_until};
use crate::segment::{Segment, TOKEN};
use crate::sockets::{Listener, exchange};
use crate::support::{Need, ensure_eq, sh};
use crate::wire::Tap;
use crate::world::{FAMILIES, Family, Hook, IN, OUT, World};
use crate::{NET, case};

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    let needs = [NET, &[Need::Tool("tc"), Need::Works("tc qdisc add dev lo root netem")]].concat();
    for family in FAMILIES {
        let name = family.name();
        cases.push(case(
            &format!("a SYN over {name} that was lost is stamped again when sent again"),
            &needs,
            move || lost(family, true),
        ));
        cases.push(case(
            &format!("a SYN over {name} whose answer was lost is stamped again with the same token"),
            &needs,
            move || lost(family, false),
        ));
        for (hook, copies) in [(Hook::Client, "behind"), (Hook::Router, "in front of")] {
            cases.push(case(
                &format!(
                    "a SYN over {name} that is doubled {copies} the hook carries one token in each copy"
                ),
                &needs,
                move || doubled(family, hook),
            ));
        }
    }
    cases
}

fn netem(ns: &str, command: &str, interface: &str, what: &str) -> Result<()> {
    sh(&format!("tc -n {ns} qdisc {command} dev {interface} root netem {what}")).map(drop)
}

fn check(syn: &Segment, connection: &Segment) -> Result<()> {
    syn.check_stamped(TOKEN)?;
    syn.check_sums()?;
    ensure_eq!(syn.isn, connection.isn, "ISN");
    ensure_eq!(syn.options_len, connection.options_len, "length of the option list");
    Ok(())
}

/// How many SYNs netoken has stamped.
fn stamped(world: &World) -> Result<u64> {
    world.counters()?["stamped"].as_u64().context("no counter of stamped SYNs")
}

/// What netoken and the client's TCP have counted when the neighbours know each other, so that what is lost from
/// now on is what the case loses.
fn acquainted(world: &World, listener: &Listener) -> Result<(u64, u64)> {
    exchange(world, listener)?;
    Ok((stamped(world)?, kernel_counter(&world.client, RETRANSMITTED)?))
}

const RETRANSMITTED: &str = "TcpRetransSegs";

/// Everything is lost, at the client or at the server, until netoken has seen the first SYN.
fn lost(family: Family, at_client: bool) -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    let listener = Listener::open(&world, family)?;
    let (stamped_before, retransmitted_before) = acquainted(&world, &listener)?;
    // Only the client tries again: an answer that the server repeats may come before the client's second SYN.
    world.set(&world.server, "ipv4/tcp_synack_retries", "0")?;
    let tap = Tap::receiver(&world.lab, &world.server, IN)?;
    let (ns, interface) = if at_client { (&world.client, OUT) } else { (&world.server, IN) };
    netem(ns, "add", interface, "loss 100%")?;
    let connection = thread::scope(|scope| {
        let connecting = scope.spawn(|| exchange(&world, &listener));
        wait_until("the first SYN", || Ok((stamped(&world)? > stamped_before).then_some(())))?;
        if !at_client {
            tap.next_syn(listener.addr.port()).and_then(|(_, first)| first.check_stamped(TOKEN))?;
        }
        netem(ns, "change", interface, "loss 0%")?;
        connecting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    let (_, again) = tap.next_syn(listener.addr.port())?;
    check(&again, &connection)?;
    world.expect_no_bad_packets()?;
    // The first, and one for each time that it was sent again; data may have been as well.
    let more = stamped(&world)? - stamped_before;
    let retransmitted = kernel_counter(&world.client, RETRANSMITTED)? - retransmitted_before;
    ensure!((2..=1 + retransmitted).contains(&more), "{more} stamped, {retransmitted} segments sent again");
    world.expect_counters(&[("stamped", stamped_before + more)])
}

/// The network sends everything twice, behind the hook on the client, or in front of the one on the router.
fn doubled(family: Family, hook: Hook) -> Result<()> {
    let world = match hook {
        Hook::Client => World::new(false)?,
        Hook::Router => World::routed(false, hook)?.0,
    };
    world.attach("")?;
    let listener = Listener::open(&world, family)?;
    let (before, _) = acquainted(&world, &listener)?;
    netem(&world.client, "add", OUT, "duplicate 100%")?;
    let tap = Tap::receiver(&world.lab, &world.server, IN)?;
    let connection = exchange(&world, &listener)?;
    for _ in 0..2 {
        check(&tap.next_syn(listener.addr.port())?.1, &connection)?;
    }
    world.expect_no_bad_packets()?;
    world.expect_counters(&[("stamped", before + if hook == Hook::Client { 1 } else { 2 })])
}
