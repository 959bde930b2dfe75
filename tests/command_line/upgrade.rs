//! Another version of netoken was there before: its maps have other shapes, or other names. What is in use goes on, and
//! what cannot is told.

use std::fs;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};
use std::process::Output;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use netoken::guard::program::GuardMaps;
use netoken::types::Counter;

use crate::lab::OBSERVE;
use crate::look::{expect_bare, expect_no_state, expect_ours, map_id, ours, records};
use crate::rules::{dir, write};
use crate::said::Said;
use crate::state::{kill_while_it_fills, with_more_and_more};
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// A map with keys of four bytes that is of no use to us.
pub fn made(kind: MapType, value: usize, entries: u32, inner: Option<&MapHandle>) -> Result<MapHandle> {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        inner_map_fd: inner.map_or(0, |inner| inner.as_fd().as_raw_fd() as u32),
        ..Default::default()
    };
    MapHandle::create(kind, Some("other"), 4, value as u32, entries, &options).context("making a map")
}

/// Puts a map where another one is pinned.
pub fn pin_instead(world: &World, name: &str, mut map: MapHandle) -> Result<()> {
    let pin = world.lab.run.join("bpf/default").join(name);
    fs::remove_file(&pin).context("removing the pin")?;
    map.pin(&pin).context("pinning another map")
}

fn pins(world: &World) -> Result<Vec<String>> {
    let entries = fs::read_dir(world.lab.run.join("bpf/default"))?;
    let mut names: Vec<String> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

/// Makes pins look as if a version with another layout had made them.
fn rename(world: &World, names: &[&str]) -> Result<()> {
    let dir = world.lab.run.join("bpf/default");
    for pin in pins(world)?.iter().filter(|pin| names.iter().any(|name| pin.starts_with(name))) {
        fs::rename(dir.join(pin), dir.join(format!("{pin}-99")))?;
    }
    Ok(())
}

const POLICY: [&str; 2] = ["policies", "policy_"];
const RULES: [&str; 3] = ["guard_rules", "guard_lists", "guard_sources"];

/// Runs it, has it succeed, and returns what it said beside its output.
fn told(output: Output) -> Result<String> {
    Ok(Said::from_output(output)?.code(0)?.err)
}

fn attach(world: &World, flags: &str) -> Result<String> {
    told(world.run(&format!("-i c0 --attach --quiet {flags}"))?)
}

pub fn a_map_of_another_shape_is_replaced_and_the_loss_told() -> Result<()> {
    let world = World::new()?;
    attach(&world, "--token 1111111111111111")?;
    world.syns(3)?;
    let before = pins(&world)?;
    pin_instead(&world, "counters", made(MapType::Array, 48, 3, None)?)?;
    // Until then nothing takes it for what it is not.
    let query = Said::from_output(world.run("--query")?)?.code(1)?;
    ensure!(
        query.err.contains("'counters' is of another layout") && query.err.contains("--attach"),
        "{query:#?}"
    );
    ensure!(query.out.contains("clsact egress"), "what is attached is not shown: {query:#?}");
    let said = attach(&world, "")?;
    for expected in
        ["taken over from another version", "not kept: the counters", "policy: as instance 'default' had it"]
    {
        ensure!(said.contains(expected), "'{expected}' expected: {said}");
    }
    world.expect_token("1111111111111111", "the token")?;
    world.expect_counter("default", "syns", 1, "SYNs counted")?;
    ensure_eq!(pins(&world)?, before, "pins");
    // Once is enough.
    ensure!(!attach(&world, "")?.contains("another version"), "a second attach took over something");
    expect_ours(&world.ns, "c0", 1)?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn counters_of_a_version_with_fewer_verdicts_are_carried_over() -> Result<()> {
    let world = World::new()?;
    attach(&world, "")?;
    let fewer = made(MapType::PercpuArray, size_of::<Counter>(), 3, None)?;
    let cpus = libbpf_rs::num_possible_cpus()?;
    // The first field counts packets.
    let mut value = vec![0; size_of::<Counter>()];
    value[..8].copy_from_slice(&7u64.to_ne_bytes());
    let stamped = netoken::types::Verdict::VERDICT_STAMPED.0;
    fewer.update_percpu(&stamped.to_ne_bytes(), &vec![value; cpus], MapFlags::ANY)?;
    pin_instead(&world, "counters", fewer)?;
    let said = attach(&world, "")?;
    ensure!(said.contains("taken over") && !said.contains("not kept"), "{said}");
    world.syns(2)?;
    world.expect_counter("default", "stamped", 7 * cpus as u64 + 2, "SYNs stamped")?;
    Ok(())
}

pub fn an_attach_that_fails_leaves_the_maps_of_the_other_version() -> Result<()> {
    let world = World::new()?;
    attach(&world, "--token 1111111111111111")?;
    pin_instead(&world, "counters", made(MapType::Array, 48, 3, None)?)?;
    // It has more shapes than a policy can have, which is found when it is put into use, last of all.
    let dir = dir()?;
    let rule = |bits: u32| format!("[[rule]]\nname = '{bits}'\ndst = '::/{bits}'\naction = 'drop'\n");
    let path = write(dir.path(), "p.toml", &(0..=128).map(rule).collect::<String>())?;
    let refused = format!("-i c0 --attach --quiet --policy {}", path.display());
    let state = || -> Result<_> {
        let maps = ["counters", "policies", "keys"].map(|map| map_id(&world.lab, "default", map).ok());
        Ok((ours(&world.ns, "c0")?, maps, pins(&world)?, world.lab.ok("policy show --json").ok()))
    };
    let before = state()?;
    let said = world.fails(&refused)?;
    ensure!(said.contains("shapes"), "{said}");
    ensure_eq!(state()?, before, "what is there");
    world.expect_token("1111111111111111", "the token")?;
    // One that was killed has left what it set aside.
    let pins = world.lab.run.join("bpf/default");
    fs::rename(pins.join("keys"), pins.join("keys-aside"))?;
    world.fails(&refused)?;
    ensure_eq!(state()?, before, "what is there after one was killed");
    attach(&world, "")?;
    world.expect_token("1111111111111111", "the token at last")
}

pub fn what_another_version_has_compiled_is_compiled_again() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let dir = dir()?;
    let policy = "[[rule]]\nname = 'nine'\nport = 9\naction = 'stamp'\ntoken = '3333333333333333'\n\
                  [[rule]]\nname = 'any'\naction = 'stamp'\ntoken = '4444444444444444'\n";
    let path = write(dir.path(), "p.toml", policy)?;
    world.ok(&format!("-i c0 -i c1 --attach --quiet --policy {}", path.display()))?;
    world.syns(3)?;
    rename(&world, &POLICY)?;
    let query = Said::from_output(world.run("--query")?)?.code(1)?;
    let advice = format!("replace it: netoken --iface c1 --netns {} --attach", world.ns);
    ensure!(
        query.out.contains("another version of netoken is attached") || query.err.contains("another version"),
        "{query:#?}"
    );
    let said = attach(&world, "")?;
    ensure!(said.contains("taken over") && !said.contains("not kept"), "{said}");
    // The other interface goes on by what it had.
    let query = world.ok("--query")?;
    ensure!(query.contains(&advice) && !query.contains("--iface c0"), "'{advice}' expected: {query}");
    let hooks = records(&world.ok("--query --json")?, "hook")?;
    let outdated =
        |iface: &str| hooks.iter().any(|hook| hook["interface"] == iface && hook["outdated"] == true);
    ensure!(outdated("c1") && !outdated("c0"), "{hooks:#?}");
    world.expect_token("4444444444444444", "the token of a rule that was compiled again")?;
    world.syns(1)?;
    let rules = records(&world.lab.ok("policy show --json")?, "rule")?;
    ensure_eq!(
        rules.iter().map(|rule| rule["hits"].as_u64()).collect::<Vec<_>>()[..2],
        [Some(4), Some(1)],
        "hits of {rules:#?}"
    );
    ensure_eq!(world.lab.ok(&format!("policy diff {}", path.display()))?, "no difference\n", "the policy");
    let load = told(world.lab.run(&format!("policy load {}", path.display()))?)?;
    ensure!(load.contains("not changed: 1 program;"), "{load}");
    ensure!(!pins(&world)?.iter().any(|pin| pin.ends_with("-99")), "{:?}", pins(&world)?);
    world.ok("-i c1 --attach --quiet")?;
    ensure!(!world.ok("--query")?.contains("another version"), "something is still of another version");
    world.ok("-i c0 -i c1 --destroy")?;
    expect_no_state(&world.lab)
}

/// Nor does the next one take it for what was in use.
pub fn a_policy_of_an_attach_that_failed_is_forgotten() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    attach(&world, "--token 1111111111111111")?;
    rename(&world, &POLICY)?;
    sh(&format!("tc -n {} qdisc add dev c1 clsact", world.ns))?;
    let add = format!("tc -n {} filter add dev c1 egress pref 20", world.ns);
    sh(&format!("{add} protocol ip u32 match ip dst 192.0.2.1/32 classid 1:1"))?;
    let said = world.fails("-i c0 -i c1 --attach --quiet --priority 20 --token 2222222222222222")?;
    ensure!(said.contains("has that place"), "{said}");
    world.expect_token("1111111111111111", "the token after it")?;
    let said = attach(&world, "")?;
    ensure!(said.contains("policy: as instance 'default' had it"), "{said}");
    world.expect_token("1111111111111111", "the token of the next attach")
}

/// What nobody can read is no reason to stamp by something else.
pub fn a_policy_that_cannot_be_read_any_more_is_asked_for() -> Result<()> {
    let world = World::new()?;
    attach(&world, "--token 1111111111111111")?;
    rename(&world, &POLICY)?;
    let policies = world.lab.run.join("default.policy");
    for file in fs::read_dir(&policies)? {
        fs::write(file?.path(), "of the future")?;
    }
    let said = world.fails("-i c0 --attach --quiet")?;
    ensure!(said.contains("carrying over the policy") && said.contains("--policy"), "{said}");
    world.expect_token("1111111111111111", "the token of what runs")?;
    attach(&world, "--token 2222222222222222")?;
    world.expect_token("2222222222222222", "the token that was asked for")
}

pub fn keys_of_another_shape_are_read_from_their_files() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    world.lab.ok("key new other")?;
    world.lab.ok("key new edge")?;
    let policy = "default = { action = 'stamp', token = { tag = 17, key = 'edge' } }\n";
    let path = write(dir.path(), "p.toml", policy)?;
    attach(&world, &format!("--policy {}", path.display()))?;
    world.syns(2)?;
    pin_instead(&world, "rings", made(MapType::Array, 48, 3, None)?)?;
    let said = attach(&world, "")?;
    ensure!(
        said.contains("taken over") && said.contains("not kept: keys that are in no file; what each"),
        "{said}"
    );
    world.syns(1)?;
    let keys = records(&world.lab.ok("key list --json")?, "key")?;
    let made = keys.iter().find(|key| key["ring"] == "edge").context("no key")?["made"].as_u64();
    ensure_eq!(made, Some(1), "tokens made with it: {keys:#?}");
    world.expect_counter("default", "stamped", 3, "SYNs stamped")?;
    Ok(())
}

/// Without its lists, the guard would drop who is exempt and let in who is blocked.
pub fn rules_and_lists_of_a_guard_are_compiled_again() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let rules = "exempt = ['10.77.0.1']\n[[rule]]\nname = 'all'\ndst = '10.77.0.2'\nmode = 'drop'\n\
                 tokens = '1111111111111111'\n";
    let path = write(dir.path(), "guard.toml", rules)?;
    let guard = |args: &str| world.lab.run(&format!("guard --netns {} {args}", world.server_ns));
    told(guard(&format!("-i s0 --attach --hook tc --rules {}", path.display()))?)?;
    world.one_syn().context("before")?;
    rename(&world, &RULES)?;
    world.one_syn().context("the program of the other version")?;
    for args in ["--show", "--query", "--unblock 10.0.0.1"] {
        let said = Said::from_output(guard(args)?)?.code(1)?;
        let expected = "another version of netoken was attached";
        ensure!(
            said.err.contains(expected) && said.err.contains("guard --iface NAME --attach"),
            "{args}: {said:#?}"
        );
    }
    let query = Said::from_output(guard("--query")?)?;
    let advice = format!("replace it: netoken guard --iface s0 --netns {} --attach", world.server_ns);
    ensure!(query.out.contains(&advice), "'{advice}' expected: {query:#?}");
    let load = Said::from_output(guard(&format!("--load --rules {}", path.display()))?)?.code(1)?;
    ensure!(load.err.contains("another version"), "{load:#?}");

    // What is remembered is needed: without it, what runs stays.
    let (memory, away) = (world.lab.run.join("default.guard"), world.lab.run.join("away"));
    fs::rename(&memory, &away)?;
    let refused = Said::from_output(guard("-i s0 --attach")?)?.code(1)?;
    ensure!(
        refused.err.contains("nothing is remembered") && refused.err.contains("--rules FILE"),
        "{refused:#?}"
    );
    fs::rename(&away, &memory)?;
    world.one_syn().context("the program of the other version after a failed attach")?;

    // An attach of the stamp leaves the guard alone.
    attach(&world, "")?;
    ensure!(
        pins(&world)?.iter().any(|pin| pin.starts_with("guard_rules") && pin.ends_with("-99")),
        "{:?}",
        pins(&world)?
    );
    let said = told(guard("-i s0 --attach")?)?;
    ensure!(said.contains("taken over") && said.contains("replaced in place"), "{said}");
    world.one_syn().context("the program of this version")?;
    let diff = Said::from_output(guard(&format!("--diff {}", path.display()))?)?.code(0)?;
    ensure_eq!(diff.out, "no difference\n", "the rules");
    let rule = records(&Said::from_output(guard("--show --json")?)?.out, "guard_rule")?;
    ensure_eq!(rule[0]["exempt"], 4, "counted by the rule: {rule:#?}");
    ensure!(!Said::from_output(guard("--query")?)?.code(0)?.out.contains("another version"), "a query");
    ensure!(!pins(&world)?.iter().any(|pin| pin.ends_with("-99")), "{:?}", pins(&world)?);
    told(guard("-i s0 --destroy")?)?;
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// What another version takes over is what ran.
pub fn rules_of_a_load_that_was_killed_are_forgotten() -> Result<()> {
    with_more_and_more(|sources| {
        let (world, dir) = (World::new()?, dir()?);
        let rule =
            "[[rule]]\nname = 'all'\ndst = '10.77.0.2'\nmode = 'observe'\ntokens = '1111111111111111'\n";
        let path = write(dir.path(), "guard.toml", rule)?.display().to_string();
        let guard = |args: &str| format!("guard --netns {} {args}", world.server_ns);
        world.lab.ok(&guard(&format!("-i s0 --attach --hook tc --rules {path}")))?;
        let blocked: Vec<String> =
            (0..sources).map(|n| format!("'2001:db8:{:x}:{:x}::/64'", n >> 16, n & 0xffff)).collect();
        let wrong = format!("blocked = [{}]\n{}", blocked.join(", "), rule.replace("observe", "drop"));
        let wrong = write(dir.path(), "wrong.toml", &wrong)?;
        let mut command = world.lab.netoken(&guard(&format!("--load --rules {}", wrong.display())));
        let is_in_use = || {
            let table = GuardMaps::open(&world.lab.run.join("bpf/default"))?.table()?;
            Ok(table.context("no rules")?.number != 1)
        };
        if !kill_while_it_fills(&mut command, &world.lab.run.join("default.guard"), 2, is_in_use)? {
            return Ok(false);
        }
        rename(&world, &RULES)?;
        world.lab.ok(&guard("-i s0 --attach"))?;
        ensure_eq!(world.lab.ok(&guard(&format!("--diff {path}")))?, "no difference\n", "the rules");
        // And the next load goes on from there.
        world.lab.ok(&guard(&format!("--load --rules {path}")))?;
        world.lab.ok(&guard("--show"))?;
        Ok(true)
    })
}

/// In a map of the same shape, but another name, buckets had a lock that only the kernel may touch: with that one no
/// program of this version could be loaded.
pub fn tokens_that_another_version_has_seen_are_forgotten_and_that_is_told() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let rules = "[[rule]]\nname = 'all'\ndst = '10.77.0.2'\nmode = 'drop'\ntokens = '1111111111111111'\n";
    let path = write(dir.path(), "guard.toml", rules)?;
    let guard = |args: &str| world.lab.run(&format!("guard --netns {} -i s0 {args}", world.server_ns));
    told(guard(&format!("--attach --hook tc --rules {}", path.display()))?)?;
    let seen = world.lab.run.join("bpf/default/guard_accepted");
    let now = MapHandle::from_pinned_path(&seen).context("opening what was seen")?;
    let mut before = made(MapType::Array, now.value_size() as usize, now.max_entries(), None)?;
    before.pin(seen.with_file_name("guard_tokens")).context("pinning it as it was")?;
    fs::remove_file(&seen).context("removing the pin")?;
    let said = told(guard("--attach")?)?;
    ensure!(said.contains("not kept: which tokens were seen"), "{said}");
    ensure!(!pins(&world)?.iter().any(|pin| pin == "guard_tokens"), "{:?}", pins(&world)?);
    let id = |map: &MapHandle| Ok::<_, anyhow::Error>(map.info()?.info.id);
    ensure!(
        id(&MapHandle::from_pinned_path(&seen)?)? != id(&before)?,
        "the map of the other version is in use"
    );
    told(guard("--destroy")?)?;
    expect_no_state(&world.lab)
}

/// Both go by the same keys, which are made anew for both.
pub fn what_a_guard_loses_to_an_attach_of_the_stamp_is_told() -> Result<()> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = format!("guard --netns {} -i c0 --attach --hook tc --rules {}", world.ns, rules.display());
    told(world.lab.run(&guard)?)?;
    attach(&world, "")?;
    pin_instead(&world, "rings", made(MapType::Array, 48, 3, None)?)?;
    let said = attach(&world, "")?;
    for expected in
        ["its guard stays as it is", "not kept: ", "the guard's counters", "who is blocked automatically"]
    {
        ensure!(said.contains(expected), "'{expected}' expected: {said}");
    }
    Ok(())
}
