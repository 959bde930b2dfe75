//! What other people's tools make of a stamped SYN: nftables, tcpdump, and a web server and its client.

use std::fs;
use std::process::Command;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;

use crate::lab::{PATIENCE, Running, host};
use crate::nginx::nginx;
use crate::segment::TOKEN;
use crate::sockets::{Listener, connect, exchange, expect_dropped};
use crate::support::{ensure_eq, sh};
use crate::wire::Tap;
use crate::world::{FAMILIES, Family, IN, World};
use crate::{case, with};

const CONNECTIONS: u64 = 4;
/// Matches a SYN, in nftables.
const SYN: &str = "tcp flags syn / fin,syn,rst,ack";

pub fn cases() -> Vec<Trial> {
    let mut cases =
        vec![case("tcpdump reads the option, and finds every checksum right", &with("tcpdump"), tcpdump)];
    for family in FAMILIES {
        let name = family.name();
        let nft = with("nft");
        cases.push(case(&format!("nftables counts stamped SYNs over {name}"), &nft, move || counted(family)));
        cases.push(case(
            &format!("nftables lets stamped SYNs over {name} in, and no others"),
            &nft,
            move || gate(family),
        ));
        cases.push(case(
            &format!("a retransmitted SYN over {name} carries the same token, and is counted"),
            &nft,
            move || retransmitted(family),
        ));
        let web = [with("nginx"), with("curl")].concat();
        cases.push(case(&format!("curl and nginx talk over {name}"), &web, move || web_server(family)));
    }
    cases
}

/// Matches the token, in nftables, 32 bits into the option.
fn token_rule() -> String {
    format!("tcp option @253,32,64 {:#x}", u64::from_be_bytes(TOKEN))
}

fn counted(family: Family) -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    world.nft("add table inet lab; add counter inet lab kind; add counter inet lab exid; add counter inet lab token")?;
    world.server_rules(&[
        &format!("{SYN} tcp option 253 exists counter name kind"),
        &format!("{SYN} tcp option @253,16,16 0x4e54 counter name exid"),
        &format!("{SYN} {} counter name token", token_rule()),
    ])?;
    let listener = Listener::open(&world, family)?;
    for _ in 0..CONNECTIONS {
        exchange(&world, &listener)?;
    }
    for counter in ["kind", "exid", "token"] {
        let what = format!("SYNs that nftables knows by their {counter}");
        world.expect_count(world.server_counted(counter)?, CONNECTIONS, &what)?;
    }
    world.expect_counters(&[("stamped", CONNECTIONS)])
}

fn gate(family: Family) -> Result<()> {
    let world = World::new(true)?;
    world.server_rules(&[&format!("{SYN} {} accept", token_rule()), &format!("{SYN} drop")])?;
    let listener = Listener::open(&world, family)?;
    expect_dropped(&world, listener.addr)?;
    world.attach("")?;
    exchange(&world, &listener)?.check_stamped(TOKEN)?;
    world.attach("--token 1122334455667788")?;
    expect_dropped(&world, listener.addr)
}

fn retransmitted(family: Family) -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    // The first of a thousand.
    world.server_rules(&[&format!("{SYN} numgen inc mod 1000 0 drop")])?;
    let listener = Listener::open(&world, family)?;
    let tap = Tap::receiver(&world.lab, &world.server, IN)?;
    let saved = exchange(&world, &listener)?;
    saved.check_stamped(TOKEN)?;
    let (first, second) = (tap.next_syn(listener.addr.port())?.1, tap.next_syn(listener.addr.port())?.1);
    for syn in [&first, &second] {
        syn.check_stamped(TOKEN)?;
        syn.check_sums()?;
        ensure_eq!(syn.isn, saved.isn, "ISN of both");
    }
    world.expect_no_bad_packets()?;
    ensure_eq!(world.counters()?["stamped"], 1 + world.sent_again()?, "SYNs stamped, each time");
    world.expect_counters(&[("stamped", 2)])
}

fn tcpdump() -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &world.server]);
    // In immediate mode every packet takes as much of the buffer as the longest may need.
    command.args([
        "tcpdump",
        "--immediate-mode",
        "-s",
        "2000",
        "-B",
        "8192",
        "-l",
        "-n",
        "-vv",
        "-i",
        IN,
        "tcp",
    ]);
    let mut tcpdump = Running::start(&mut command)?;
    tcpdump.wait_for("tcpdump to listen", |line| line.contains("listening on"))?;
    for family in FAMILIES {
        let listener = Listener::open(&world, family)?;
        for _ in 0..CONNECTIONS {
            exchange(&world, &listener)?;
            let line = tcpdump.wait_for("a SYN", |line| line.contains("Flags [S],"))?;
            ensure!(line.contains("unknown-253 0x4e544e45544f4b454e31"), "no token in {line}");
            ensure!(line.contains("(correct)"), "a wrong checksum in {line}");
        }
    }
    let wrong = tcpdump.seen.iter().find(|line| line.contains("incorrect") || line.contains("bad cksum"));
    ensure!(wrong.is_none(), "tcpdump found {wrong:?}");
    Ok(())
}

fn web_server(family: Family) -> Result<()> {
    let world = World::new(true)?;
    world.attach("")?;
    let dir = world.lab.run.join("web");
    fs::create_dir(&dir)?;
    let page: String = (0..100_000).map(|at| format!("{at}\n")).collect();
    fs::write(dir.join("page"), &page)?;
    let addr = host(world.server_addr(family), 8080);
    let _nginx = nginx(&world.server, &addr, &dir)?;
    // Fails at once, and not after all of curl's patience, if nginx does not listen.
    drop(connect(&world.lab, &world.client, (world.server_addr(family), 8080).into(), PATIENCE)?);
    for _ in 0..CONNECTIONS {
        let got = sh(&format!(
            "ip netns exec {} curl --silent --show-error --fail --noproxy '*' --max-time 20 'http://{addr}/page'",
            world.client
        ))?;
        ensure!(got == page, "{} bytes of another page than the {} of ours", got.len(), page.len());
    }
    world.expect_no_bad_packets()?;
    world.expect_counters(&[("stamped", 1 + CONNECTIONS)])
}
