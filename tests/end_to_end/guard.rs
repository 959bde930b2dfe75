//! The guard at the server, at native and generic XDP and at TC: who has a token connects, who has none does not, and
//! when it is gone nothing is left of it.

use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::lab::{PATIENCE, Running, wait_until};
use crate::segment::TOKEN;
use crate::sockets::{Listener, connect, exchange, expect_dropped};
use crate::support::ensure_eq;
use crate::support::sh;
use crate::world::{FAMILIES, Family, Hook, IN, OFFLOADS, OUT, World};
use crate::{NET, case, with};

/// How the guard is asked for, and what it must then be.
pub const HOOKS: [(&str, &str); 3] =
    [("auto", "clsact ingress"), ("xdp", "xdp native"), ("tc", "clsact ingress")];

const DESTINATIONS: &str = "dst = ['10.0.0.0/8', 'fd00::/8']";

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for (hook, shown) in HOOKS {
        for (tx, offload) in OFFLOADS {
            cases.push(case(
                &format!("guard: --hook {hook} {offload} lets in who has a token"),
                NET,
                move || lets_in(hook, shown, tx),
            ));
        }
        cases.push(case(&format!("guard: --hook {hook} leaves an interface as it was"), NET, move || {
            leaves(hook, shown)
        }));
        cases.push(case(
            &format!("guard: --hook {hook} checks keyed tokens behind source NAT"),
            &with("nft"),
            move || behind_nat(hook),
        ));
    }
    cases.push(case("guard: generic XDP is used where the driver cannot, and it says so", NET, generic));
    cases.push(case("guard: somebody else's ingress filter stays", NET, foreign_filter));
    cases.push(case("guard: a guard can move from one hook to the other", NET, moves));
    cases.push(case("guard: a failed attach of the guard leaves nothing", NET, fails));
    cases.push(case("guard: observe counts and drops nothing", NET, observes));
    cases.push(case("guard: an event says what the guard decided", NET, events));
    cases.push(case(
        "guard: --query says where it is and what it was told, of one instance if asked",
        NET,
        queries,
    ));
    cases.push(case("guard: the stamp's destroy leaves a guard of the instance at work", NET, shares));
    cases
}

pub fn write(world: &World, name: &str, text: &str) -> Result<String> {
    Ok(world.lab.file(name, text)?.display().to_string())
}

pub fn rules(world: &World, mode: &str, accepts: &str) -> Result<String> {
    write(
        world,
        "guard.toml",
        &format!("[[rule]]\nname = 'all'\n{DESTINATIONS}\nmode = '{mode}'\n{accepts}\n"),
    )
}

pub const STATIC: &str = "tokens = '4e45544f4b454e31'";
pub const KEYED: &str = "keys = 'edge'";

/// What a policy of the client says to stamp keyed tokens.
pub fn keyed_policy(world: &World) -> Result<String> {
    world.lab.ok("key new edge")?;
    write(world, "policy.toml", "default = { action = 'stamp', token = { tag = 17, key = 'edge' } }")
}

pub fn place(world: &World) -> String {
    format!("--netns {} --iface {IN}", world.server)
}

pub fn attach(world: &World, hook: &str, rules: &str) -> Result<Value> {
    let said =
        world.lab.ok(&format!("guard {} --attach --hook {hook} --json --rules {rules}", place(world)))?;
    serde_json::from_str(&said).with_context(|| format!("reading {said}"))
}

/// One record of `guard --query`.
pub fn query(world: &World, kind: &str) -> Result<Value> {
    let text = world.lab.ok(&format!("guard {} --query --json", place(world)))?;
    for line in text.lines() {
        let record: Value = serde_json::from_str(line)?;
        if record["type"] == kind {
            return Ok(record);
        }
    }
    bail!("no {kind} in {text}")
}

fn expect_valid(world: &World, wanted: u64) -> Result<()> {
    let counters = query(world, "guard_counters")?;
    world.expect_count(counters["valid"].as_u64().context("no counter")?, wanted, "valid")
}

fn lets_in(hook: &str, shown: &str, tx: bool) -> Result<()> {
    let world = World::new(tx)?;
    let listeners = FAMILIES.map(|family| Listener::open(&world, family));
    let listeners = listeners.into_iter().collect::<Result<Vec<_>>>()?;
    let attached = attach(&world, hook, &rules(&world, "drop", STATIC)?)?;
    ensure_eq!(attached["hook"], shown, "hook");
    for listener in &listeners {
        expect_dropped(&world, listener.addr)?;
    }
    let dropped = query(&world, "guard_counters")?;
    ensure!(dropped["missing"].as_u64() >= Some(2) && dropped["missing"] == dropped["dropped"], "{dropped}");
    world.attach("")?;
    for listener in &listeners {
        for _ in 0..3 {
            exchange(&world, listener)?.check_stamped(TOKEN)?;
        }
    }
    expect_valid(&world, 6)?;
    // Another token is none.
    world.attach("--token 0000000000000001")?;
    for listener in &listeners {
        expect_dropped(&world, listener.addr)?;
    }
    let wrong = query(&world, "guard_counters")?;
    ensure!(wrong["wrong_static"].as_u64() >= Some(2), "{wrong}");
    world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
    for listener in &listeners {
        exchange(&world, listener)?;
    }
    world.expect_no_bad_packets()
}

/// What `ip` shows of an interface once it is up, which the kernel says a moment after it was set up.
pub fn link(ns: &str, iface: &str) -> Result<String> {
    wait_until(&format!("{iface} of {ns} to be up"), || {
        let shown = sh(&format!("ip -n {ns} -d link show {iface}"))?;
        Ok(shown.contains("state UP").then_some(shown))
    })
}

/// What can be seen of both ends of the cable.
pub fn looks(world: &World) -> Result<String> {
    let mut text = String::new();
    for (ns, iface) in [(&world.server, IN), (&world.client, OUT)] {
        text.push_str(&link(ns, iface)?);
        for command in [
            format!("tc -n {ns} qdisc show dev {iface}"),
            format!("ip netns exec {ns} ethtool -k {iface}"),
            format!("ip netns exec {ns} ethtool -l {iface} 2>&1 || true"),
        ] {
            text.push_str(&sh(&command)?);
        }
    }
    Ok(text)
}

fn leaves(hook: &str, shown: &str) -> Result<()> {
    let world = World::new(true)?;
    let before = looks(&world)?;
    let rules = rules(&world, "drop", STATIC)?;
    for round in 0..3 {
        attach(&world, hook, &rules)?;
        let again = attach(&world, hook, &rules)?;
        ensure_eq!(again["replaced"], true, "whether it was replaced");
        ensure_eq!(query(&world, "guard_hook")?["hook"], shown, "hook");
        ensure!(looks(&world)? != before, "nothing to be seen of it");
        world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
        ensure_eq!(looks(&world)?, before, "round {round}");
        ensure!(!world.lab.run.join("bpf").exists(), "state was left");
    }
    let output = world.lab.run(&format!("guard {} --query", place(&world)))?;
    ensure_eq!(output.status.code(), Some(1), "query where it is not");
    Ok(())
}

fn behind_nat(hook: &str) -> Result<()> {
    let (world, router) = World::routed(true, Hook::Client)?;
    sh(&format!(
        "ip netns exec {router} nft 'add table inet nat; \
         add chain inet nat out {{ type nat hook postrouting priority 100; }}; \
         add rule inet nat out oifname {OUT} masquerade'"
    ))?;
    let policy = keyed_policy(&world)?;
    attach(&world, hook, &rules(&world, "drop", KEYED)?)?;
    for family in FAMILIES {
        let listener = Listener::open(&world, family)?;
        expect_dropped(&world, listener.addr)?;
        world.attach(&format!("--policy {policy}"))?;
        let mut client = connect(&world.lab, &world.client, listener.addr, PATIENCE)?;
        let mut server = listener.accept()?;
        ensure!(
            server.stream.peer_addr()?.ip() != world.client_addr(family),
            "the source was not translated"
        );
        crate::sockets::echo(&mut client, &mut server.stream)?;
        world.lab.ok(&format!("{} --detach", world.place()))?;
    }
    expect_valid(&world, 2)?;
    Ok(())
}

/// veth takes XDP programs itself, loopback does not.
fn generic() -> Result<()> {
    let world = World::new(true)?;
    let rules = write(
        &world,
        "guard.toml",
        &format!("[[rule]]\nname = 'all'\ndst = '127.0.0.0/8'\nmode = 'drop'\n{STATIC}\n"),
    )?;
    let before = sh(&format!("ip -n {} -d link show lo", world.server))?;
    let place = format!("--netns {} --iface lo", world.server);
    let output = world.lab.run(&format!("guard {place} --attach --hook xdp --rules {rules}"))?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.success() && said.contains("xdp generic (natively the driver refused"), "{said}");
    let listener = Listener::open_with(&world.lab, &world.server, ([127, 0, 0, 1], 0).into(), |_| Ok(()))?;
    let refused = connect(&world.lab, &world.server, listener.addr, crate::sockets::DROPPED);
    ensure!(refused.is_err(), "a connection without a token was opened");
    world.lab.ok(&format!("{place} --attach --quiet"))?;
    connect(&world.lab, &world.server, listener.addr, PATIENCE)?;
    world.lab.ok(&format!("guard {place} --destroy"))?;
    ensure_eq!(sh(&format!("ip -n {} -d link show lo", world.server))?, before, "what is left");
    // Nobody asked for XDP at any price.
    let output = world.lab.run(&format!("guard {place} --attach --rules {rules}"))?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(
        output.status.success() && said.contains("clsact ingress (not at XDP: attaching to lo"),
        "{said}"
    );
    Ok(())
}

/// Ours comes in front, so that theirs, which ends the way of every packet, does not let any pass it by.
fn foreign_filter() -> Result<()> {
    let world = World::new(true)?;
    let (server, rules) = (&world.server, rules(&world, "drop", STATIC)?);
    sh(&format!("tc -n {server} qdisc add dev {IN} clsact"))?;
    let add = |priority: u32| {
        sh(&format!(
            "tc -n {server} filter add dev {IN} ingress pref {priority} protocol ip u32 match u32 0 0 classid 1:1"
        ))
    };
    let there =
        || sh(&format!("tc -n {server} filter show dev {IN} ingress; tc -n {server} qdisc show dev {IN}"));
    add(7)?;
    let before = there()?;
    let listener = Listener::open(&world, Family::V4)?;
    attach(&world, "tc", &rules)?;
    expect_dropped(&world, listener.addr)?;
    ensure_eq!(query(&world, "guard_hook")?["filters_before"], 0, "filters before ours");
    add(2)?;
    ensure_eq!(query(&world, "guard_hook")?["filters_before"], 1, "filters before ours");
    sh(&format!("tc -n {server} filter del dev {IN} ingress pref 2"))?;
    world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
    ensure_eq!(there()?, before, "somebody else's filter");

    add(1)?;
    let output = world.lab.run(&format!("guard {} --attach --hook tc --rules {rules}", place(&world)))?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && said.contains("a filter of priority 1 is there"), "{said}");
    attach(&world, "xdp", &rules)?;
    expect_dropped(&world, listener.addr)
}

fn moves() -> Result<()> {
    let world = World::new(true)?;
    let rules = rules(&world, "drop", STATIC)?;
    let before = looks(&world)?;
    let listener = Listener::open(&world, Family::V6)?;
    for (hook, shown) in [
        ("tc", "clsact ingress"),
        ("xdp", "xdp native"),
        ("tc", "clsact ingress"),
        ("auto", "clsact ingress"),
        ("xdp", "xdp native"),
        ("auto", "xdp native"),
    ] {
        attach(&world, hook, &rules)?;
        let text = world.lab.ok(&format!("guard {} --query --json", place(&world)))?;
        ensure_eq!(text.matches("guard_hook").count(), 1, "hooks in {text}");
        ensure_eq!(query(&world, "guard_hook")?["hook"], shown, "hook");
        expect_dropped(&world, listener.addr)?;
    }
    world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
    ensure_eq!(looks(&world)?, before, "what is left");
    Ok(())
}

fn fails() -> Result<()> {
    let world = World::new(true)?;
    let before = looks(&world)?;
    let marks = write(
        &world,
        "marks.toml",
        &format!(
            "[[rule]]\nname = 'all'\n{DESTINATIONS}\nmode = 'mark'\nmark = {{ valid = 1, refused = 2 }}\n{STATIC}\n"
        ),
    )?;
    let keyed = rules(&world, "drop", KEYED)?;
    let good = write(
        &world,
        "good.toml",
        &format!("[[rule]]\nname = 'all'\n{DESTINATIONS}\nmode = 'drop'\n{STATIC}\n"),
    )?;
    for (arguments, expect) in [
        (format!("{} --attach", place(&world)), "has no rules yet"),
        (format!("{} --attach --hook xdp --rules {marks}", place(&world)), "--hook tc"),
        (format!("{} --attach --rules {keyed}", place(&world)), "netoken key new edge"),
        (format!("{} --attach --rules /nonexistent", place(&world)), "reading the rules"),
        (format!("{} --iface nosuch --attach --rules {good}", place(&world)), "no such interface"),
        (format!("--load --rules {good}"), "not attached"),
        ("--watch".to_string(), "not attached"),
    ] {
        let output = world.lab.run(&format!("guard {arguments}"))?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && said.contains(expect), "{arguments}: {said}");
        ensure_eq!(looks(&world)?, before, "{arguments}");
        ensure!(!world.lab.run.join("bpf").exists(), "{arguments} left state");
    }
    // Marks are for TC, and auto knows.
    ensure_eq!(attach(&world, "auto", &marks)?["hook"], "clsact ingress", "hook");
    Ok(())
}

fn observes() -> Result<()> {
    let world = World::new(true)?;
    attach(&world, "auto", &rules(&world, "observe", STATIC)?)?;
    let listener = Listener::open(&world, Family::V4)?;
    exchange(&world, &listener)?;
    world.attach("")?;
    exchange(&world, &listener)?;
    let counters = query(&world, "guard_counters")?;
    for (name, count) in [("missing", 1), ("valid", 1), ("seen", 2)] {
        let found = counters[name].as_u64().context("no counter")?;
        world.expect_count(found, count, &format!("{name} of {counters}"))?;
    }
    ensure_eq!(counters["dropped"], 0, "dropped of {counters}");
    // From here on it is enforced.
    world
        .lab
        .ok(&format!("guard --load --rules {}", rules(&world, "drop", "tokens = '0000000000000001'")?))?;
    expect_dropped(&world, listener.addr)
}

fn events() -> Result<()> {
    let world = World::new(true)?;
    attach(&world, "auto", &rules(&world, "drop", STATIC)?)?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch --json"))?;
    let listener = Listener::open(&world, Family::V6)?;
    // Events begin when the buffer is open, which nobody can see.
    let missing = crate::lab::wait_until("an event", || {
        expect_dropped(&world, listener.addr)?;
        Ok(watch.wait_within(std::time::Duration::from_millis(300), |line| line.contains("guarded")))
    })?;
    let event: Value = serde_json::from_str(&missing)?;
    let dst = listener.addr.ip().to_string();
    for (name, value) in [("verdict", "missing"), ("mode", "drop"), ("dst", &dst)] {
        ensure_eq!(event[name], *value, "{name} of {event}");
    }
    ensure_eq!(event["dport"], listener.addr.port(), "dport of {event}");
    ensure_eq!((&event["dropped"], &event["rule"]), (&Value::from(true), &Value::from(1)), "{event}");
    let netns_inode = fs::metadata(format!("/run/netns/{}", world.server))?.ino();
    ensure_eq!(event["netns_inode"], netns_inode, "netns_inode of {event}");
    let hook = query(&world, "guard_hook")?;
    ensure_eq!(hook["netns"], *world.server, "netns of {hook}");
    ensure_eq!(hook["netns_inode"], netns_inode, "netns_inode of {hook}");
    world.attach("")?;
    exchange(&world, &listener)?;
    let valid =
        watch.wait_for("a valid SYN", |line| line.contains("\"valid\"") && line.contains("guarded"))?;
    ensure!(valid.contains("4e45544f4b454e31"), "{valid}");
    let second = world.lab.run("guard --watch")?;
    ensure_eq!(second.status.code(), Some(1), "a second reader");
    watch.signal(nix::sys::signal::Signal::SIGINT)?;
    let (code, seen) = watch.end()?;
    ensure_eq!(code, Some(0), "exit code after {seen:?}");
    Ok(())
}

fn queries() -> Result<()> {
    let world = World::new(true)?;
    let (server, rules) = (&world.server, rules(&world, "drop", STATIC)?);
    let told = "--priority 7 --handle 8 --sample 10 --exid 0x1234";
    world.lab.ok(&format!("guard {} --attach --hook tc {told} --rules {rules}", place(&world)))?;
    let hook = query(&world, "guard_hook")?;
    for (name, value) in
        [("priority", 7), ("handle", 8), ("sample", 10), ("exid", 0x1234), ("option_kind", 253)]
    {
        ensure_eq!(hook[name], value, "{name} of {hook}");
    }
    // As one does for another version: what was said stays, and what is changed is told.
    for (flags, exid, note) in [
        ("", 0x1234, None),
        ("--exid 0x4e54", 0x4e54, Some(format!("{IN}: this attach changed --exid from 0x1234 to 0x4e54"))),
        ("--exid 0x1234", 0x1234, Some(format!("{IN}: this attach changed --exid from 0x4e54 to 0x1234"))),
    ] {
        let output = world.lab.run(&format!("guard {} --attach --hook tc {flags}", place(&world)))?;
        let said = String::from_utf8(output.stderr)?;
        let changes = said.lines().find(|line| line.contains("changed")).map(str::to_string);
        ensure_eq!(changes, note, "what '{flags}' said");
        let hook = query(&world, "guard_hook")?;
        ensure!(hook["exid"] == exid && hook["sample"] == 10, "after '{flags}': {hook}");
    }
    let shown = sh(&format!("tc -n {server} filter show dev {IN} ingress"))?;
    ensure!(shown.contains("pref 7 bpf") && shown.contains("handle 0x8 netoken_guard"), "{shown}");
    world.lab.ok(&format!(
        "guard --netns {server} --iface lo --attach --hook xdp --instance blue --rules {rules}"
    ))?;

    let all = world.lab.ok(&format!("guard --netns {server} --query"))?;
    for line in [
        format!("\n{IN} in {server}: ExID 0x1234, events for one of 10 SYNs\n"),
        "\n\ninstance 'blue': 0 seen".to_string(),
        "\n\ninstance 'default': 0 seen".to_string(),
    ] {
        ensure!(all.contains(&line), "no '{line}' in {all}");
    }
    ensure!(!all.contains("lo in"), "what is as usual is told in {all}");
    let blue = world.lab.ok(&format!("guard --netns {server} --query --instance blue"))?;
    ensure!(blue.contains(" lo ") && blue.contains("'blue'") && !blue.contains("default"), "{blue}");
    let none = world.lab.run("guard --query --instance nosuch")?;
    let said = String::from_utf8(none.stderr)?;
    ensure!(none.status.code() == Some(1) && said.contains("instance 'nosuch': there is none"), "{said}");

    // What is kept for the next attach is not forgotten.
    world.lab.ok(&format!("guard {} --detach", place(&world)))?;
    let all = world.lab.ok("guard --query")?;
    ensure!(all.contains("instance 'default', not attached here: 0 seen"), "{all}");
    ensure_eq!(
        world.lab.run(&format!("guard {} --query", place(&world)))?.status.code(),
        Some(1),
        "exit code"
    );

    // Without an interface all are meant, of one instance.
    let destroy = |more: &str| -> Result<String> {
        let output = world.lab.run(&format!("guard --netns {server} --destroy {more}"))?;
        ensure_eq!(output.status.code(), Some(0), "exit code");
        Ok(String::from_utf8(output.stderr)?)
    };
    let said = destroy("--instance blue")?;
    ensure!(said.starts_with("lo: guard removed\n"), "{said}");
    let said = destroy("")?;
    ensure!(said.contains("its rules and counters are removed"), "{said}");
    ensure!(!world.lab.run.exists(), "state was left");
    Ok(())
}

fn shares() -> Result<()> {
    let world = World::new(true)?;
    let listener = Listener::open(&world, Family::V4)?;
    world.attach("")?;
    attach(&world, "tc", &rules(&world, "drop", STATIC)?)?;
    exchange(&world, &listener)?;
    world.lab.ok(&format!("{} --destroy", world.place()))?;
    expect_dropped(&world, listener.addr)?;
    expect_valid(&world, 1)?;
    // The other way round.
    world.attach("")?;
    world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
    exchange(&world, &listener)?.check_stamped(TOKEN)?;
    world.lab.ok(&format!("{} --destroy", world.place()))?;
    ensure!(!world.lab.run.join("bpf").exists(), "state was left");
    Ok(())
}
