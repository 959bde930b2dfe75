//! Changing a guard that is at work: its rules and keys under load, what it shows of them, and somebody else's program
//! in its place.

use std::collections::HashSet;
use std::fs;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::guard::{HOOKS, KEYED, STATIC, attach, keyed_policy, looks, place, query, rules, write};
use crate::lab::{Running, kernel_counter, wait_until};
use crate::sockets::{Listener, exchange, expect_dropped};
use crate::support::{ensure_eq, sh, share_of};
use crate::world::{FAMILIES, Family, Hook, IN, OUT, World};
use crate::{NET, case, guard, sys};

/// How many times rules are loaded while connections are opened, in each family.
const LOADS: usize = 250;

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for (hook, _) in HOOKS {
        if hook == "auto" {
            continue;
        }
        for family in FAMILIES {
            let name = family.name();
            cases.push(case(
                &format!("guard: --hook {hook}: a rotation of keys over {name} drops nothing valid"),
                NET,
                move || under_load(hook, family, rotate),
            ));
            cases.push(case(
                &format!(
                    "guard: --hook {hook}: loading rules over {name} again and again drops nothing valid"
                ),
                NET,
                move || under_load(hook, family, reload),
            ));
        }
    }
    cases.push(case("guard: somebody else's XDP program stays", NET, foreign_stays));
    cases.push(case("guard: an attach that fails leaves the rules that run", NET, rules_stay));
    cases.push(case("guard: what is redirected to a veth does not pass it by", NET, passed_by));
    cases.push(case("guard: rules that mark are not at XDP, however they come there", NET, marks));
    cases.push(case("guard: --force pushes out somebody else's XDP program, and says so", NET, forced));
    cases.push(case("guard: --force cannot push out a program that a BPF link holds", NET, held));
    cases.push(case(
        "guard: --watch --rules loads the file again whenever it changes, and on SIGHUP",
        NET,
        watches,
    ));
    cases.push(case("guard: --show counts by rule, and --diff says what would change", NET, shows));
    cases
}

/// A guard under load.
struct Load<'a> {
    world: &'a World,
    rules: String,
    hook: &'static str,
    opened: AtomicU64,
    done: AtomicBool,
}

impl Load<'_> {
    /// Waits for some more connections.
    fn wait_for_more(&self, more: u64) -> Result<()> {
        let target = self.opened.load(Ordering::Relaxed) + more;
        wait_until("more connections", || {
            ensure!(!self.done.load(Ordering::Relaxed), "a connection failed");
            Ok((self.opened.load(Ordering::Relaxed) >= target).then_some(()))
        })
    }

    fn load_rules(&self) -> Result<()> {
        let rules = &self.rules;
        self.world.lab.ok(&format!("guard --load --netns {} --rules {rules}", self.world.server)).map(drop)
    }
}

/// Every SYN without a token that is right would be dropped and come again a second later; none may. What comes again is
/// the second of two connections that happen to have the same ISN in one slot, and so the same token: docs/guard.md.
fn under_load(hook: &'static str, family: Family, change: fn(&Load<'_>) -> Result<()>) -> Result<()> {
    let world = World::new(true)?;
    let policy = keyed_policy(&world)?;
    let rules = rules(&world, "drop", KEYED)?;
    attach(&world, hook, &rules)?;
    // Such a SYN finds the next slot before anybody's patience ends.
    world.attach(&format!("--policy {policy} --slot 8"))?;
    let listener = Listener::open(&world, family)?;
    let load = Load { world: &world, rules, hook, opened: AtomicU64::new(0), done: AtomicBool::new(false) };
    let isns = thread::scope(|scope| {
        let client = scope.spawn(|| {
            let isns = (|| {
                let mut isns = HashSet::new();
                while !load.done.load(Ordering::Relaxed) {
                    isns.insert(exchange(&world, &listener)?.isn);
                    load.opened.fetch_add(1, Ordering::Relaxed);
                }
                Ok::<_, anyhow::Error>(isns.len() as u64)
            })();
            load.done.store(true, Ordering::Relaxed);
            isns
        });
        let changed = change(&load);
        load.done.store(true, Ordering::Relaxed);
        let isns = client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        changed.map(|()| isns)
    })?;
    let counters = query(&world, "guard_counters")?;
    let opened = load.opened.load(Ordering::Relaxed);
    println!("{opened} connections with {isns} ISNs");
    let replayed = counters["replayed"].as_u64().context("no counter")?;
    ensure!(replayed == 0 || isns < opened, "of {isns} ISNs of {opened} connections, {counters}");
    ensure_eq!(counters["dropped"], replayed, "dropped of {counters}");
    // One that gets lost beside the guard would come again unseen. A machine that stands still for a second sends one again
    // that was accepted.
    let sent = opened + kernel_counter(&world.client, "TcpExtTCPSynRetrans")?;
    ensure_eq!(
        (&counters["seen"], &counters["valid"]),
        (&sent.into(), &(sent - replayed).into()),
        "of {counters}"
    );
    world.expect_no_bad_packets()
}

/// All three steps, more than once around. Client and server share the keys here, so that a step reaches both at once.
fn rotate(load: &Load<'_>) -> Result<()> {
    let (lab, rounds) = (&load.world.lab, share_of(3)?);
    for _ in 0..rounds {
        for step in ["add", "sign"] {
            lab.ok(&format!("key rotate edge --step {step}"))?;
            load.load_rules()?;
            load.wait_for_more(20)?;
            attach(load.world, load.hook, &load.rules)?;
            load.wait_for_more(20)?;
        }
        wait_until("the old key to be idle", || {
            Ok(lab.ok("key rotate edge --step retire --idle 1").ok().map(drop))
        })?;
        load.load_rules()?;
        load.wait_for_more(20)?;
    }
    let keys = lab.ok("key list --json")?;
    ensure_eq!(keys.matches("\"retired\"").count(), rounds, "retired keys in {keys}");
    Ok(())
}

fn reload(load: &Load<'_>) -> Result<()> {
    let (begin, loads, seconds) = (Instant::now(), share_of(LOADS)?, share_of(10)?.max(4));
    let mut done = 0;
    // On a slow machine as many as there is time for.
    while done < loads && begin.elapsed() < Duration::from_secs(seconds as u64) {
        load.load_rules()?;
        done += 1;
    }
    println!("{done} loads in {:?}", begin.elapsed());
    load.wait_for_more(20)?;
    ensure!(load.opened.load(Ordering::Relaxed) >= done as u64, "fewer connections than loads");
    Ok(())
}

/// Puts somebody else's program on the server's interface, and returns how that looks.
fn attach_foreign(world: &World, flags: u32) -> Result<String> {
    world.lab.within(&world.server, || sys::attach_xdp(IN, &sys::load_foreign_xdp()?, flags))?;
    let there = link(world)?;
    ensure!(there.contains("prog/xdp"), "{there}");
    Ok(there)
}

fn link(world: &World) -> Result<String> {
    guard::link(&world.server, IN)
}

fn foreign_stays() -> Result<()> {
    for flags in [libbpf_sys::XDP_FLAGS_DRV_MODE, libbpf_sys::XDP_FLAGS_SKB_MODE] {
        let world = World::new(true)?;
        let empty = link(&world)?;
        let before = attach_foreign(&world, flags)?;
        let rules = rules(&world, "drop", STATIC)?;
        let refused =
            world.lab.run(&format!("guard {} --attach --hook xdp --rules {rules}", place(&world)))?;
        let said = String::from_utf8(refused.stderr)?;
        ensure!(
            refused.status.code() == Some(1)
                && said.contains("somebody else's program foreign_xdp (id")
                && said.contains("--force"),
            "{said}"
        );
        ensure_eq!(link(&world)?, before, "somebody else's program");
        // There is another place, and taking ours away does not take theirs.
        ensure_eq!(attach(&world, "auto", &rules)?["hook"], "clsact ingress", "hook");
        world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
        ensure_eq!(link(&world)?, before, "somebody else's program");
        // What it says to do does it, from where it was said.
        let (_, remedy) = said.trim_end().split_once("remove it first: ").context("no remedy")?;
        sh(remedy)?;
        ensure_eq!(link(&world)?, empty, "after {remedy}");
    }
    Ok(())
}

fn rules_stay() -> Result<()> {
    let world = World::new(true)?;
    attach(&world, "xdp", &rules(&world, "drop", STATIC)?)?;
    let listener = Listener::open(&world, Family::V4)?;
    expect_dropped(&world, listener.addr)?;
    let before = shown(&world, "all")?;
    let other = write(
        &world,
        "good.toml",
        "slots = { length = 8 }\n[[rule]]\nname = 'other'\ndst = '192.0.2.1'\nmode = 'drop'\ntokens = '0000000000000001'\n",
    )?;
    // The second interface refuses: that of another instance is there.
    let lo = format!("--netns {} --iface lo", world.server);
    world.lab.ok(&format!("guard {lo} --attach --hook xdp --instance other --rules {other}"))?;
    let both = format!("guard {} --iface lo --attach --hook xdp --rules {other}", place(&world));
    let output = world.lab.run(&both)?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && said.contains("instance 'other'"), "{said}");
    ensure_eq!(shown(&world, "all")?["says"], before["says"], "the rules");
    let text = world.lab.ok("guard --show")?;
    ensure!(text.contains("guard.toml, loaded") && text.contains("slots = { length = 16,"), "{text}");
    expect_dropped(&world, listener.addr)
}

/// Where there is no skb, what is refused would go on without a mark.
fn marks() -> Result<()> {
    let world = World::new(true)?;
    let drops = rules(&world, "drop", STATIC)?;
    let marks = write(
        &world,
        "marks.toml",
        &fs::read_to_string(&drops)?
            .replace("mode = 'drop'", "mode = 'mark'\nmark = { valid = 1, refused = 2 }"),
    )?;
    let refused = |arguments: &str| -> Result<()> {
        let output = world.lab.run(&format!("guard --netns {} --attach {arguments}", world.server))?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(
            output.status.code() == Some(1) && said.contains("mode 'mark' needs an skb"),
            "{arguments}: {said}"
        );
        Ok(())
    };
    let output = world.lab.run(&format!("guard {} --attach --rules {marks}", place(&world)))?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(said.contains(": clsact ingress (not at XDP: the rules mark"), "{said}");
    // The rules that run count as much as those that are given.
    world.lab.ok(&format!("guard {} --detach", place(&world)))?;
    refused(&format!("--iface {IN} --hook xdp"))?;
    world.lab.ok(&format!("guard {} --attach", place(&world)))?;
    ensure_eq!(query(&world, "guard_hook")?["hook"], "clsact ingress", "hook");
    refused(&format!("--iface {IN} --hook xdp"))?;
    ensure_eq!(query(&world, "guard_hook")?["hook"], "clsact ingress", "hook");

    // And so do the other interfaces of the instance.
    ensure_eq!(attach(&world, "xdp", &drops)?["hook"], "xdp native", "hook");
    refused(&format!("--iface lo --hook tc --rules {marks}"))?;
    let text = world.lab.ok("guard --show")?;
    ensure!(text.contains("mode drop"), "{text}");
    // Two of one command share a program, of which one may not stay there either.
    world.lab.ok(&format!("guard {} --iface lo --attach --hook xdp --rules {drops}", place(&world)))?;
    refused(&format!("--iface lo --hook tc --rules {marks}"))?;
    world.lab.ok(&format!("guard --netns {} --iface lo --detach", world.server))?;
    // From XDP they move together.
    ensure_eq!(attach(&world, "tc", &marks)?["hook"], "clsact ingress", "hook");
    Ok(())
}

/// What Cilium does for a container: the packet is taken from one end of a veth, and given to the stack behind the other.
fn passed_by() -> Result<()> {
    let (world, router) = World::routed(true, Hook::Client)?;
    world.ask_nobody(&router)?;
    let filter = world.lab.within(&router, || sys::attach_redirect(IN, OUT, true))?;
    let listener = Listener::open(&world, Family::V4)?;
    exchange(&world, &listener)?;
    let rules = rules(&world, "drop", STATIC)?;
    let output = world.lab.run(&format!("guard {} --attach --rules {rules}", place(&world)))?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(said.contains("clsact ingress (not at XDP: bpf_redirect_peer()"), "{said}");
    expect_dropped(&world, listener.addr)?;
    world.attach("")?;
    exchange(&world, &listener)?;
    // Who wants XDP is told.
    let output = world.lab.run(&format!("guard {} --attach --hook xdp", place(&world)))?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(said.contains("guard moved on") && said.contains("passes XDP of a veth by; --hook tc"), "{said}");
    let query = world.lab.ok(&format!("guard {} --query", place(&world)))?;
    ensure!(query.contains("passes XDP of a veth by; --hook tc"), "{query}");
    // There it stays, unless a place of a filter is named.
    let said = world.lab.run(&format!("guard {} --attach", place(&world)))?.stderr;
    ensure!(String::from_utf8(said)?.contains("guard replaced in place on in0: xdp native"), "it moved");
    let said = world.lab.run(&format!("guard {} --attach --priority 3", place(&world)))?.stderr;
    ensure!(String::from_utf8(said)?.contains("guard moved on in0: clsact ingress"), "it is not said");
    drop(filter);
    Ok(())
}

fn forced() -> Result<()> {
    for (flags, shown) in
        [(libbpf_sys::XDP_FLAGS_DRV_MODE, "xdp native"), (libbpf_sys::XDP_FLAGS_SKB_MODE, "xdp generic")]
    {
        let world = World::new(true)?;
        let empty = looks(&world)?;
        let before = attach_foreign(&world, flags)?;
        let listener = Listener::open(&world, Family::V4)?;
        let rules = rules(&world, "drop", STATIC)?;
        // What fails behind it puts theirs back.
        let other = format!("--netns {} --iface lo --instance other", world.server);
        world.lab.ok(&format!("guard {other} --attach --hook xdp --rules {rules}"))?;
        let both = format!("{} --iface lo --attach --hook xdp --force --rules {rules}", place(&world));
        let output = world.lab.run(&format!("guard {both}"))?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1) && said.contains("instance 'other'"), "{said}");
        ensure_eq!(link(&world)?, before, "somebody else's program");
        world.lab.ok(&format!("guard {other} --destroy"))?;

        let said = world
            .lab
            .ok(&format!("guard {} --attach --hook xdp --force --json --rules {rules}", place(&world)))?;
        let attached: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        ensure_eq!((&attached["hook"], &attached["replaced"]), (&shown.into(), &false.into()), "{said}");
        ensure_eq!(attached["pushed_out"]["name"], "foreign_xdp", "{said}");
        expect_dropped(&world, listener.addr)?;
        // Once it is ours there is nobody to push out.
        let said = world
            .lab
            .ok(&format!("guard {} --attach --hook xdp --force --json --rules {rules}", place(&world)))?;
        ensure!(said.contains("\"replaced\":true") && !said.contains("pushed_out"), "{said}");
        world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
        ensure_eq!(looks(&world)?, empty, "what is left");
        exchange(&world, &listener)?;
    }
    // At TC nobody has to go, and nobody does.
    let world = World::new(true)?;
    let before = attach_foreign(&world, libbpf_sys::XDP_FLAGS_DRV_MODE)?;
    let rules = rules(&world, "drop", STATIC)?;
    let said = world
        .lab
        .ok(&format!("guard {} --attach --hook tc --force --json --rules {rules}", place(&world)))?;
    ensure!(said.contains("clsact ingress") && !said.contains("pushed_out"), "{said}");
    world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
    ensure_eq!(link(&world)?, before, "somebody else's program");
    Ok(())
}

fn held() -> Result<()> {
    let world = World::new(true)?;
    let link = world.lab.within(&world.server, || sys::link_xdp(IN, &sys::load_foreign_xdp()?))?;
    let before = self::link(&world)?;
    let rules = rules(&world, "drop", STATIC)?;
    let attach = format!("guard {} --attach --hook xdp --force --rules {rules}", place(&world));
    let output = world.lab.run(&attach)?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(
        output.status.code() == Some(1) && said.contains("end the process that holds the link"),
        "{said}"
    );
    ensure_eq!(self::link(&world)?, before, "somebody else's program");
    drop(link);
    world.lab.ok(&attach).map(drop)
}

/// The rules that `guard --show --json` prints, by their names.
fn shown(world: &World, name: &str) -> Result<Value> {
    let text = world.lab.ok("guard --show --json")?;
    for line in text.lines() {
        let record: Value = serde_json::from_str(line)?;
        if record["type"] == "guard_rule" && record["name"] == name {
            return Ok(record);
        }
    }
    bail!("no rule '{name}' in {text}")
}

fn watches() -> Result<()> {
    let world = World::new(true)?;
    let path = rules(&world, "drop", STATIC)?;
    attach(&world, "auto", &path)?;
    let listener = Listener::open(&world, Family::V4)?;
    let mut watch = Running::start(&mut world.lab.netoken(&format!("guard --watch --rules {path}")))?;
    watch.wait_for("the first load", |line| line.contains("has new rules: 1 rule, 0 prefixes exempt"))?;
    expect_dropped(&world, listener.addr)?;
    rules(&world, "observe", STATIC)?;
    watch.wait_for("the change", |line| line.contains("rules loaded again: 1 rule"))?;
    exchange(&world, &listener)?;
    // What is wrong is told and changes nothing, and the process goes on.
    rules(&world, "drp", STATIC)?;
    let told = |line: &str| line.contains("checking the rules") || line.contains("unknown variant `drp`");
    watch.wait_for("the error", told)?;
    watch.signal(Signal::SIGHUP)?;
    watch.wait_for("the error again", |line| line.contains("checking the rules"))?;
    exchange(&world, &listener)?;
    // As an editor does it, and with a list.
    let list = write(&world, "exempt", "# nobody\n")?;
    let text = fs::read_to_string(&path)?.replace("drp", "drop");
    let next = write(&world, "guard.toml~", &format!("exempt_file = '{list}'\n{text}"))?;
    fs::rename(next, &path)?;
    watch.wait_for("the new file", |line| line.contains("rules loaded again: 1 rule, 0 prefixes exempt"))?;
    expect_dropped(&world, listener.addr)?;
    write(&world, "exempt", "0.0.0.0/0\n")?;
    watch.wait_for("the list", |line| line.contains("rules loaded again: 1 rule, 1 prefix exempt"))?;
    exchange(&world, &listener)?;
    watch.signal(Signal::SIGHUP)?;
    watch.wait_for("the signal", |line| line.contains("rules loaded again: 1 rule, 1 prefix exempt"))?;
    watch.signal(Signal::SIGTERM)?;
    ensure_eq!(watch.end()?.0, Some(0), "exit code");
    // It stays attached, and without a file SIGHUP ends the stream.
    exchange(&world, &listener)?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch"))?;
    watch.wait_for("the stream", |line| line.contains("watching"))?;
    watch.signal(Signal::SIGHUP)?;
    ensure_eq!(watch.end()?.0, Some(0), "exit code");
    Ok(())
}

fn shows() -> Result<()> {
    let world = World::new(true)?;
    let none = world.lab.run("guard --show")?;
    let said = String::from_utf8(none.stderr)?;
    ensure!(none.status.code() == Some(1) && said.contains("there is no instance 'default'"), "{said}");
    let listeners = FAMILIES.map(|family| Listener::open(&world, family));
    let [v4, v6] = listeners;
    let (v4, v6) = (v4?, v6?);
    let rule = |name: &str, dst: &str| {
        format!("[[rule]]\nname = '{name}'\ndst = '{dst}'\nmode = 'drop'\n{STATIC}\n")
    };
    let load = |text: &str| -> Result<String> {
        let file = write(&world, "guard.toml", text)?;
        world.lab.ok(&format!("guard --load --rules {file}"))?;
        Ok(file)
    };
    let (four, six) = (rule("four", "10.0.0.0/8"), rule("six", "fd00::/8"));
    let file = write(&world, "guard.toml", &format!("blocked = ['192.0.2.1']\n{four}{six}"))?;
    attach(&world, "auto", &file)?;
    expect_dropped(&world, v4.addr)?;
    world.attach("")?;
    exchange(&world, &v4)?;
    for _ in 0..2 {
        exchange(&world, &v6)?;
    }
    let (of_four, of_six) = (shown(&world, "four")?, shown(&world, "six")?);
    ensure_eq!((&of_four["valid"], &of_six["valid"]), (&1.into(), &2.into()), "{of_four} {of_six}");
    ensure!(of_four["missing"].as_u64() >= Some(1) && of_six["missing"] == 0, "{of_four} {of_six}");
    ensure_eq!((&of_six["seen"], &of_six["rule"]), (&2.into(), &2.into()), "{of_six}");
    let text = world.lab.ok("guard --show")?;
    for line in [
        &format!("instance 'default': 2 rules, 0 prefixes exempt, 1 prefix blocked; from {file}, loaded "),
        "\nslots = { length = 16, behind = 1, ahead = 1 }\n",
        "\nrule 2 'six': dst fd00::/8, mode drop, tokens 4e45544f4b454e31\n  2 seen: 2 valid\n",
    ] {
        ensure!(text.contains(line), "no '{line}' in {text}");
    }

    // What is shown as a file is the same, and what is not the same is told.
    let copy = write(&world, "good.toml", &world.lab.ok("guard --show --toml")?)?;
    for file in [&file, &copy] {
        ensure_eq!(world.lab.ok(&format!("guard --diff {file}"))?, "no difference\n", "{file}");
    }
    let other = write(&world, "good.toml", &format!("{six}{}", rule("new", "10.0.0.0/8")))?;
    ensure_eq!(
        world.lab.ok(&format!("guard --diff {other}"))?,
        "- four: dst 10.0.0.0/8, mode drop, tokens 4e45544f4b454e31\n\
         + new: dst 10.0.0.0/8, mode drop, tokens 4e45544f4b454e31\n\
         - blocked: 192.0.2.1/32\n",
        "differences"
    );

    // A rule keeps its counters with its name, wherever it stands; one that comes begins with none, also where
    // another one was counted before.
    load(&format!("{six}{}", rule("second", "10.0.0.0/8")))?;
    load(&format!("{}{six}", rule("third", "10.0.0.0/8")))?;
    ensure_eq!(shown(&world, "six")?["valid"], 2, "valid");
    ensure_eq!(shown(&world, "third")?["seen"], 0, "seen by a rule that is new");
    exchange(&world, &v4)?;
    ensure_eq!(shown(&world, "third")?["valid"], 1, "valid");
    ensure_eq!(query(&world, "guard_counters")?["valid"], 4, "valid in all");

    // Attached again without rules it keeps what it has; gone, nothing of it is left.
    world.lab.ok(&format!("guard {} --detach", place(&world)))?;
    world.lab.ok(&format!("guard {} --attach", place(&world)))?;
    ensure_eq!(shown(&world, "third")?["valid"], 1, "valid");
    world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
    world.lab.ok(&format!("{} --destroy", world.place()))?;
    ensure!(!world.lab.run.exists(), "state was left");
    Ok(())
}
