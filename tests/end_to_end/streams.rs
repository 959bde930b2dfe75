//! What `--attach` tells while it runs: one record for each SYN, and none lost without a word.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::Running;
use crate::segment::TOKEN;
use crate::sockets::{Listener, exchange};
use crate::support::{Hex, ensure_eq};
use crate::wire::{Checksum, Frame, LINUX_OPTIONS, Tap};
use crate::world::{FAMILIES, Family, OUT, World};
use crate::{NET, case, sys};

const CONNECTIONS: usize = 5;

pub fn cases() -> Vec<Trial> {
    let mut cases = vec![
        case("a reader that cannot keep up is told how many events it has lost", NET, || lost(1)),
        case("losses are told also if no event follows them", NET, || lost(0)),
    ];
    for family in FAMILIES {
        cases.push(case(
            &format!("every connection over {} is one record in the stream", family.name()),
            NET,
            move || records(family),
        ));
    }
    cases
}

/// Attaches, and waits until SYNs are stamped.
pub fn start(world: &World) -> Result<Running> {
    let mut stream = Running::start(&mut world.lab.netoken(&format!("{} --attach --json", world.place())))?;
    stream.wait_for("the hook", |line| line.contains("\"type\":\"attached\""))?;
    Ok(stream)
}

/// The next record of that type.
fn next(stream: &mut Running, kind: &str) -> Result<Value> {
    let wanted = format!("\"type\":\"{kind}\"");
    let line = stream.wait_for(kind, |line| line.contains(&wanted))?;
    serde_json::from_str(&line).with_context(|| format!("not JSON: {line}"))
}

fn records(family: Family) -> Result<()> {
    let world = World::new(false)?;
    let mut stream = start(&world)?;
    let listener = Listener::open(&world, family)?;
    let mut again = 0;
    for _ in 0..CONNECTIONS {
        let syn = exchange(&world, &listener)?;
        let mut record = next(&mut stream, "syn")?;
        // Of the SYN before, if that was sent again.
        while record["sport"] != syn.src.port() {
            again += 1;
            record = next(&mut stream, "syn")?;
        }
        for (name, expected) in [
            ("interface", Value::from(OUT)),
            ("src", syn.src.ip().to_string().into()),
            ("sport", syn.src.port().into()),
            ("dst", syn.dst.ip().to_string().into()),
            ("dport", syn.dst.port().into()),
            ("isn", syn.isn.into()),
            ("verdict", "stamped".into()),
            ("dropped", false.into()),
            ("rule", 0.into()),
            ("token", Hex(&TOKEN).to_string().into()),
            ("old_options_len", (syn.options_len - 12).into()),
            ("new_options_len", syn.options_len.into()),
        ] {
            ensure_eq!(record[name], expected, "{name} in {record}");
        }
    }
    let totals = next(&mut stream, "totals")?;
    ensure_eq!(totals["lost"], 0, "lost events");
    stream.signal(Signal::SIGINT)?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "exit code");
    let records = lines.iter().filter(|line| line.contains("\"type\":\"syn\"")).count();
    ensure!(again <= world.sent_again()?, "{again} records of SYNs that were not sent");
    world.expect_count(records as u64, CONNECTIONS as u64, "records of SYNs")?;
    world.expect_counters(&[("stamped", CONNECTIONS as u64)])
}

/// Sends many SYNs while the reader is stopped, from one CPU, and `more` when it has woken and read what there
/// is. Of each there must be a record, or it must be counted as lost.
fn lost(more: usize) -> Result<()> {
    const SYNS: usize = 20_000;
    let world = World::new(true)?;
    let mut stream = start(&world)?;
    let sender = Tap::sender(&world.lab, &world.client, OUT)?;
    let to = (world.server_addr(Family::V4), 5000).into();
    let frame = Frame::syn(world.client_addr(Family::V4), to, &LINUX_OPTIONS, b"")?;
    let send = |count: usize| (0..count).try_for_each(|_| sender.send(&frame, Checksum::Partial, 0));

    stream.pause()?;
    sys::on_one_cpu(|| -> Result<()> {
        send(SYNS)?;
        stream.signal(Signal::SIGCONT)?;
        totals_of(&mut stream, SYNS)?;
        if more > 0 {
            send(more)?;
            totals_of(&mut stream, SYNS + more)?;
        }
        Ok(())
    })??;
    stream.signal(Signal::SIGINT)?;
    let (_, lines) = stream.end()?;

    let seen = lines.iter().filter(|line| line.contains("\"type\":\"syn\"")).count();
    ensure!(seen < SYNS, "{SYNS} events fit the buffer");
    let last = lines.iter().rfind(|line| line.contains("\"type\":\"totals\"")).context("no totals")?;
    let last: Value = serde_json::from_str(last)?;
    let lost = last["lost"].as_u64().context("no number of lost events")? as usize;
    ensure_eq!(seen + lost, SYNS + more, "{seen} events seen and {lost} said to be lost");
    world.expect_counters(&[("stamped", (SYNS + more) as u64)])
}

/// Waits for totals of so many SYNs.
fn totals_of(stream: &mut Running, syns: usize) -> Result<()> {
    let all = format!("\"syns\":{syns},");
    stream.wait_for("totals", |line| line.contains("\"type\":\"totals\"") && line.contains(&all)).map(drop)
}
