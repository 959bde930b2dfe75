//! Sources that the guard blocks automatically, and alerts, as the command line shows them.

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::guard::{STATIC, attach, place, query, write};
use crate::lab::{Running, wait_until};
use crate::sockets::{Listener, exchange, expect_dropped};
use crate::support::ensure_eq;
use crate::world::{FAMILIES, World};
use crate::{NET, case};

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for hook in ["xdp", "tc"] {
        cases.push(case(
            &format!("guard: --hook {hook} blocks who is refused too often, and --unblock lets in again"),
            NET,
            move || blocks(hook),
        ));
    }
    cases.push(case("guard: --query shows nobody as blocked whom the rules let in", NET, lets_in));
    cases.push(case("guard: --watch shows alerts", NET, alerts));
    cases
}

fn rules(world: &World, settings: &str) -> Result<String> {
    let text = format!(
        "{settings}\n[[rule]]\nname = 'all'\ndst = ['10.0.0.0/8', 'fd00::/8']\nmode = 'drop'\n{STATIC}\n"
    );
    write(world, "guard.toml", &text)
}

fn blocks(hook: &str) -> Result<()> {
    let world = World::new(true)?;
    let settings = "auto_block = { refused = 2, within = '1h', block_for = '1h' }";
    attach(&world, hook, &rules(&world, settings)?)?;
    let query_text = || world.lab.ok(&format!("guard {} --query", place(&world)));
    for (family, shown) in FAMILIES.into_iter().zip(["10.1.0.1/32", "fd00:1::/64"]) {
        let listener = Listener::open(&world, family)?;
        ensure!(!query_text()?.contains("BLOCKED"), "somebody is blocked");
        let stamped = world.attach("").and_then(|()| exchange(&world, &listener));
        stamped.context("with its token, before")?;
        world.lab.ok(&format!("{} --detach", world.place()))?;
        for _ in 0..3 {
            expect_dropped(&world, listener.addr)?;
        }
        // A static token shows nobody that it comes from there.
        world.attach("")?;
        expect_dropped(&world, listener.addr)?;
        let counters = query(&world, "guard_counters")?;
        ensure!(counters["auto_blocked"].as_u64() >= Some(1), "{counters}");
        let blocked = query(&world, "guard_auto_blocked")?;
        ensure_eq!(blocked["src"], shown, "who is blocked in {blocked}");
        ensure!(blocked["refused"].as_u64() >= Some(1), "{blocked}");
        let until = humantime::parse_rfc3339(blocked["until"].as_str().context("no time")?)?;
        let left = until.duration_since(std::time::SystemTime::now())?;
        ensure!(left > Duration::from_secs(3000) && left <= Duration::from_secs(3600), "{left:?} left");
        let text = query_text()?;
        ensure!(text.contains("BLOCKED AUTOMATICALLY") && text.contains(shown), "{text}");

        let unblocked: Value =
            serde_json::from_str(&world.lab.ok(&format!("guard --unblock {shown} --json"))?)?;
        ensure_eq!(unblocked["sources"], 1, "sources of {unblocked}");
        exchange(&world, &listener)?;
        world.lab.ok(&format!("{} --detach", world.place()))?;
    }
    let output = world.lab.run("guard --unblock 10.1.0.1 --instance nosuch")?;
    ensure_eq!(output.status.code(), Some(1), "an instance that does not exist");
    let output = world.lab.run("guard --unblock 10.1.0.1/24")?;
    ensure_eq!(output.status.code(), Some(2), "a prefix that is none");
    Ok(())
}

/// What others have blocked stays in the map, and the guard does not look for it.
fn lets_in() -> Result<()> {
    let world = World::new(true)?;
    let with = |more: &str| {
        rules(&world, &format!("auto_block = {{ refused = 2, within = '1h', block_for = '1h'{more} }}"))
    };
    attach(&world, "tc", &with("")?)?;
    let listener = Listener::open(&world, FAMILIES[0])?;
    for _ in 0..4 {
        expect_dropped(&world, listener.addr)?;
    }
    world.attach("")?;
    let is_shown = || {
        Ok::<_, anyhow::Error>(world.lab.ok(&format!("guard {} --query", place(&world)))?.contains("BLOCKED"))
    };
    ensure!(is_shown()?, "nobody is blocked");
    for other in [true, false] {
        let file = if other { with(", v4_bits = 24")? } else { rules(&world, "")? };
        world.lab.ok(&format!("guard --load --rules {file}"))?;
        exchange(&world, &listener)?;
        ensure!(!is_shown()?, "who is let in is shown as blocked");
    }
    Ok(())
}

fn alerts() -> Result<()> {
    let world = World::new(true)?;
    attach(&world, "auto", &rules(&world, "alerts = { within = '1s', low = 1, critical = 1000 }")?)?;
    let listener = Listener::open(&world, FAMILIES[0])?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch --json"))?;
    // What comes before the buffer is open is told nobody; the next window raises it again.
    let line = wait_until("an alert", || {
        expect_dropped(&world, listener.addr)?;
        Ok(watch.wait_within(Duration::from_secs(1), |line| line.contains("guard_alert")))
    })?;
    let alert: Value = serde_json::from_str(&line)?;
    ensure_eq!((&alert["severity"], &alert["refused"]), (&Value::from("low"), &Value::from(1)), "{alert}");
    let netns_inode = std::fs::metadata(format!("/run/netns/{}", world.server))?.ino();
    ensure_eq!(alert["netns_inode"], netns_inode, "netns_inode of {alert}");
    ensure_eq!(alert["within_s"], 1.0, "within_s of {alert}");
    Ok(())
}
