//! A policy file at work: what it says by destination and port happens to real connections.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::fastopen;
use crate::lab::Running;
use crate::segment::{KIND_FASTOPEN, TOKEN};
use crate::sockets::{Listener, exchange, expect_dropped};
use crate::support::ensure_eq;
use crate::wire::{Checksum, Frame, Tap};
use crate::world::{FAMILIES, Family, IN, OUT, World};
use crate::{NET, case};

/// What a rule does to a SYN.
#[derive(Clone, Copy, Debug)]
enum Fate {
    Token([u8; 8]),
    Plain,
    Dropped,
}

use Fate::{Dropped, Plain, Token};

const POLICY: &str = r#"
default = { action = "stamp", token = "4e45544f4b454e31" }

[[rule]]
name = "left alone"
dst = "NET1"
port = 1001
action = "skip"

[[rule]]
name = "not sent"
dst = "NET1"
port = 1002
action = "drop"

[[rule]]
name = "a token of its own"
dst = "NET1"
port = 1003
action = "stamp"
token = "0102030405060708"

[[rule]]
name = "a host in it"
dst = "HOST3"
action = "skip"

[[rule]]
name = "a port in that network"
dst = "NETS"
port = 1005
action = "drop"

[[rule]]
name = "a network"
dst = "NETS"
action = "stamp"
token = "3333333333333333"
"#;

/// Network and port of a destination, its fate, and the number of the rule that decides it.
const TABLE: [(u8, u16, Fate, u64); 8] = [
    (1, 1000, Token(TOKEN), 0),
    (1, 1001, Plain, 1),
    (1, 1002, Dropped, 2),
    (1, 1003, Token([1, 2, 3, 4, 5, 6, 7, 8]), 3),
    (2, 1001, Token([0x33; 8]), 6),
    (2, 1005, Dropped, 5),
    (3, 1000, Plain, 4),
    // The first rule that matches decides, also against a later one with a port.
    (3, 1005, Plain, 4),
];

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = family.name();
        cases.push(case(
            &format!("a policy stamps, skips and drops SYNs over {name} by prefix and port"),
            NET,
            move || by_destination(family),
        ));
        cases.push(case(
            &format!("when_full = drop keeps a SYN over {name} without room from being sent"),
            NET,
            move || when_full(family),
        ));
        cases.push(case(
            &format!("when_full = drop refuses a Fast Open over {name} whose cookie takes the room"),
            NET,
            move || when_full_fastopen(family),
        ));
    }
    cases
}

fn write_policy(world: &World, text: &str) -> Result<String> {
    let path = world.lab.run.join("policy.toml");
    fs::write(&path, text)?;
    Ok(format!("--policy {}", path.display()))
}

/// The policy for network 1, for networks 2 and 3 together, and for the one host of 3 that is used.
fn policy(family: Family) -> String {
    let (net1, nets, host3) = match family {
        Family::V4 => ("10.1.0.0/16", "10.2.0.0/15", "10.3.0.2"),
        Family::V6 => ("fd00:1::/32", "fd00:2::/31", "fd00:3::2"),
    };
    POLICY.replace("NET1", net1).replace("NETS", nets).replace("HOST3", host3)
}

fn by_destination(family: Family) -> Result<()> {
    let world = World::new(false)?;
    world.add_server_net(2)?;
    world.add_server_net(3)?;
    let policy = write_policy(&world, &policy(family))?;
    let mut stream =
        Running::start(&mut world.lab.netoken(&format!("{} --attach --json {policy}", world.place())))?;
    stream.wait_for("the hook", |line| line.contains("\"attached\""))?;

    for (net, port, fate, rule) in TABLE {
        let addr = SocketAddr::new(family.addr(net, 2), port);
        let listener = Listener::open_with(&world.lab, &world.server, addr, |_| Ok(()))?;
        let what = format!("{fate:?} for {addr}");
        match fate {
            Token(token) => exchange(&world, &listener)?.check_stamped(token).context(what)?,
            Plain => exchange(&world, &listener)?.check_not_stamped().context(what)?,
            Dropped => expect_dropped(&world, addr).context(what)?,
        }
        let event = stream.wait_for("the event", |line| {
            let to = [format!("\"dst\":\"{}\"", addr.ip()), format!("\"dport\":{port},")];
            line.contains("\"type\":\"syn\"") && to.iter().all(|part| line.contains(part))
        })?;
        let event: Value = serde_json::from_str(&event)?;
        ensure_eq!(event["rule"], rule, "rule for {addr}");
        ensure_eq!(event["dropped"], matches!(fate, Dropped), "dropped, for {addr}");
    }
    world.expect_no_bad_packets()?;
    let counters = world.counters()?;
    // A SYN that is not sent may have been tried again before the client gave up.
    let dropped = counters["dropped"].as_u64().context("no counter")?;
    ensure_eq!((2..=6).contains(&dropped), true, "{dropped} dropped");
    world.expect_counters(&[("stamped", 3), ("skipped", 3), ("dropped", dropped), ("not_sent", dropped)])
}

const DROP_WHEN_FULL: &str = "default = { action = 'stamp', token = '4e45544f4b454e31', when_full = 'drop' }";

fn when_full(family: Family) -> Result<()> {
    let world = World::new(false)?;
    let policy = write_policy(&world, DROP_WHEN_FULL)?;
    world.attach(&policy)?;
    let receiver = Tap::receiver(&world.lab, &world.server, IN)?;
    let sender = Tap::sender(&world.lab, &world.client, OUT)?;
    let dst = SocketAddr::new(world.server_addr(family), 2000);
    let syn = |options: &[u8]| Frame::syn(world.client_addr(family), dst, options, b"data");
    // An option that takes 32 of 40 bytes; then one that leaves room.
    let full = [&[200u8, 32][..], &[7; 30]].concat();
    ensure!(sender.send(&syn(&full)?, Checksum::Partial, 0).is_err(), "the sender was not told");
    sender.send(&syn(&[200, 4, 0, 0])?, Checksum::Partial, 0)?;
    // What arrives first was sent second.
    let (_, arrived) = receiver.next_syn(dst.port())?;
    arrived.check_stamped(TOKEN)?;
    ensure_eq!(arrived.options.len(), 2, "options of what arrived");
    world.expect_counters(&[("stamped", 1), ("no_room", 1), ("not_sent", 1)])
}

fn when_full_fastopen(family: Family) -> Result<()> {
    let world = fastopen::world(false, "0x3")?;
    let listener = fastopen::listener(&world, (world.server_addr(family), 0).into())?;
    let policy = write_policy(&world, DROP_WHEN_FULL)?;
    world.attach(&policy)?;
    // The first asks for the cookie that the second then brings.
    drop(fastopen::connect_with_data(&world, listener.addr, b"first")?);
    listener.accept()?.syn.check_stamped(TOKEN)?;
    // That one is not sent; TCP is told so and asks for a new cookie, which leaves room.
    drop(fastopen::connect_with_data(&world, listener.addr, b"second")?);
    let syn = listener.accept()?.syn;
    syn.check_stamped(TOKEN)?;
    let asks = syn.options.iter().any(|(kind, body)| *kind == KIND_FASTOPEN && body.is_empty());
    ensure!(asks, "the second try has a cookie: {:02x?}", syn.options);
    world.expect_counters(&[("stamped", 2), ("no_room", 1), ("not_sent", 1)])
}
