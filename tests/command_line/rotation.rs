//! `netoken key rotate`: the three steps, on one host and on several, and what they wait for.

use std::fs;
use std::time::{Duration, SystemTime};

use anyhow::{Result, ensure};

use crate::keys::{expect_made, run, secret, states, write_policy};
use crate::lab::{Lab, wait_until};
use crate::support::ensure_eq;
use crate::world::World;

pub fn a_rotation_in_three_steps() -> Result<()> {
    let lab = Lab::new()?;
    run(&lab, "key list")?.code(0)?.err(&["there are no keys", "netoken key new"])?;
    run(&lab, "key rotate edge")?.code(1)?.err(&["it has none", "netoken key new edge"])?;
    run(&lab, "key new edge")?.code(0)?.err(&[
        "key 0 of ring 'edge' (signing)",
        "edge-0.key",
        "netoken key load",
    ])?;
    run(&lab, "key rotate edge --step retire")?.code(1)?.err(&["not due", "--step add"])?;
    run(&lab, "key rotate edge")?.code(0)?.err(&["key 1 of ring 'edge' (verify-only)"])?;
    ensure_eq!(states(&lab)?, [(0, "signing".to_string()), (1, "verify-only".to_string())], "added");
    run(&lab, "key rotate edge")?.code(0)?.err(&["key 1 of ring 'edge' signs"])?;
    ensure_eq!(states(&lab)?, [(0, "verify-only".to_string()), (1, "signing".to_string())], "signs");
    // There is one ring, and one key of it signs.
    let make = format!(
        "token make --json --keys {}/default --tag 1 --src 1.2.3.4:5 --dst 1.2.3.4:5 --isn 1",
        lab.keys().display()
    );
    ensure!(run(&lab, &make)?.code(0)?.out.contains("\"key_id\":1"), "another key than the signing one");
    // It signed until now, and nothing here counts what came of it.
    run(&lab, "key rotate edge")?.code(1)?.err(&["retiring key 0", "not known (key 1 signs since then)"])?;
    run(&lab, "key rotate edge --idle 0")?.code(0)?.err(&[
        "retired key 0",
        "edge-0.key to each",
        "netoken key load",
    ])?;
    ensure_eq!(states(&lab)?, [(0, "retired".to_string()), (1, "signing".to_string())], "retired");
    ensure!(secret(&lab, "edge-0.key").is_err(), "a retired key still has a secret");
    // Another ring has ids of its own, and its first key signs, unless it is not to.
    run(&lab, "key new other --verify-only")?.code(0)?.err(&["key 2 of ring 'other' (verify-only)"])?;
    run(&lab, &make)?.code(1)?.err(&["3 keys, of several rings", "--key RING"])?;
    run(&lab, "key new other --id 1")?.code(1)?.err(&["ring 'edge' has a key with that id", "--id"])?;
    let shown = run(&lab, "key list")?.code(0)?;
    ensure!(shown.err.contains("no key of ring 'other' signs"), "{shown:#?}");
    for id in 3..16 {
        run(&lab, &format!("key new other --verify-only --id {id}"))?.code(0)?;
    }
    // The id of a retired key is free again; then all are in use.
    run(&lab, "key new last")?.code(0)?.err(&["key 0 of ring 'last' (signing)"])?;
    run(&lab, "key new more")?.code(1)?.err(&["all 16 are live", "retire", "remove its files"])?;
    Ok(())
}

/// A host that checks gets the next key before it signs, and perhaps nothing of the one before ever again.
pub fn a_new_key_alone_is_enough_for_another_host() -> Result<()> {
    let (here, there) = (Lab::new()?, Lab::new()?);
    let copy = |name: &str| -> Result<()> {
        let to = there.keys().join("default");
        fs::create_dir_all(&to)?;
        fs::copy(here.keys().join("default").join(name), to.join(name))?;
        Ok(())
    };
    run(&here, "key new edge")?.code(0)?;
    copy("edge-0.key")?;
    run(&here, "key rotate edge")?.code(0)?;
    run(&here, "key rotate edge")?.code(0)?.err(&["edge-1.key"])?;
    copy("edge-1.key")?;
    ensure_eq!(
        states(&there)?,
        [(0, "verify-only".to_string()), (1, "signing".to_string())],
        "both files sign"
    );
    run(&here, "key rotate edge --force")?.code(0)?;
    copy("edge-0.key")?;
    ensure_eq!(states(&there)?, [(0, "retired".to_string()), (1, "signing".to_string())], "retired there");
    Ok(())
}

pub fn adding_is_possible_whatever_is_due() -> Result<()> {
    let lab = Lab::new()?;
    run(&lab, "key new edge")?.code(0)?;
    run(&lab, "key rotate edge")?.code(0)?;
    run(&lab, "key rotate edge --step add")?.code(0)?.err(&["key 2 of ring 'edge' (verify-only)"])?;
    run(&lab, "key rotate edge --step retire")?.code(1)?.err(&["not due", "--step sign"])?;
    run(&lab, "key rotate edge")?.code(0)?.err(&["key 2 of ring 'edge' signs"])?;
    // Retiring is due.
    run(&lab, "key rotate edge --step add")?.code(0)?.err(&["key 3 of ring 'edge' (verify-only)"])?;
    let help = run(&lab, "key rotate --help")?.code(0)?.out;
    let words: Vec<&str> = help.split_whitespace().collect();
    ensure!(words.join(" ").contains("add makes a key that only verifies, at any time"), "{help}");
    Ok(())
}

pub fn a_key_that_is_still_seen_is_not_retired() -> Result<()> {
    let world = World::new()?;
    let policy = write_policy(&world.lab)?;
    world.lab.ok("key new edge")?;
    world.ok(&format!("-i c0 --attach --quiet --policy {policy}"))?;
    world.syns(3)?;
    world.lab.ok("key rotate edge")?;
    world.lab.ok("key rotate edge")?;
    world.syns(1)?;
    expect_made(&world, 0, 3)?;
    expect_made(&world, 1, 1)?;
    run(&world.lab, "key rotate edge")?.code(1)?.err(&["retiring key 0", "used", "--force"])?;
    ensure_eq!(states(&world.lab)?[0].1, "verify-only", "state of the old one");
    // Idle for a second is enough if one says so; the clock of the kernel is a tick behind at most.
    wait_until("the key to be idle", || {
        Ok((run(&world.lab, "key rotate edge --step retire --idle 1")?.code == Some(0)).then_some(()))
    })?;
    ensure_eq!(states(&world.lab)?[0].1, "retired", "state of the old one");
    world.lab.ok("key rotate edge")?;
    world.lab.ok("key rotate edge")?;
    world.syns(1)?;
    run(&world.lab, "key rotate edge --force")?.code(0)?.err(&["retired key 1"])?;
    world.syns(1)?;
    expect_made(&world, 2, 2)?;
    Ok(())
}

/// Counters that begin with the instance know nothing of before.
pub fn a_key_is_not_idle_because_nobody_counted() -> Result<()> {
    let world = World::new()?;
    let policy = write_policy(&world.lab)?;
    let attach = format!("-i c0 --attach --quiet --policy {policy}");
    world.lab.ok("key new edge")?;
    world.ok(&attach)?;
    world.syns(1)?;
    world.lab.ok("key rotate edge")?;
    world.lab.ok("key rotate edge")?;
    world.ok("-i c0 --destroy")?;
    let refused =
        |why: &str| run(&world.lab, "key rotate edge")?.code(1)?.err(&["retiring key 0", why]).map(drop);
    refused("key 1 signs since then")?;
    // When it began to sign says nothing of what a host accepts.
    let long_ago = SystemTime::now() - Duration::from_secs(3600);
    let file = world.lab.keys().join("default/edge-1.key");
    fs::File::options().write(true).open(&file)?.set_modified(long_ago)?;
    world.ok(&attach)?;
    refused("instance 'default' counts since then")?;
    ensure_eq!(states(&world.lab)?[0].1, "verify-only", "state of the old one");
    world.ok("-i c0 --destroy")?;
    run(&world.lab, "key rotate edge")?.code(0)?.err(&["retired key 0"]).map(drop)
}
