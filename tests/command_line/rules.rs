//! `netoken policy`, as one types it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::{Lab, NETOKEN, Running};
use crate::said::{Said, netoken, said};
use crate::support::{ensure_eq, sh};
use crate::world::World;

const EXAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/examples/policy.toml");

/// A directory for files of a case, gone when it is dropped.
pub fn dir() -> Result<tempfile::TempDir> {
    Ok(tempfile::tempdir()?)
}

fn stamp(name: &str, conditions: &str, token: &str) -> String {
    format!("[[rule]]\nname = '{name}'\n{conditions}\naction = 'stamp'\ntoken = '{token}'\n")
}

pub fn write(dir: &Path, name: &str, text: &str) -> Result<PathBuf> {
    let path = dir.join(name);
    fs::write(&path, text)?;
    Ok(path)
}

fn policy(lab: &Lab, args: &str) -> Result<Said> {
    said(&mut lab.netoken(&format!("policy {args}")))
}

/// The lines of `--json`, of one type.
fn records(text: &str, kind: &str) -> Result<Vec<Value>> {
    let lines: Vec<Value> = text.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(lines.into_iter().filter(|line| line["type"] == kind).collect())
}

pub fn all_errors_are_shown_in_one_run_with_their_lines() -> Result<()> {
    let dir = dir()?;
    write(dir.path(), "list.txt", "10.0.0.0/8\n# fine\n10.0.0.256\n")?;
    write(dir.path(), "more.toml", "default = { action = 'skip' }\n[[rule]]\nname = 'b'\naction = 'skip'\n")?;
    let text = "include = 'more.toml'\nmising = 'warn'\n[prefixes]\na = ['@a']\n\
        [[rule]]\nname = 'b'\ndst = 'file:list.txt'\nport = '9-5'\nprot = 1\naction = 'skip'\n\
        [[rule]]\nname = 'c'\nsrc = ['1.2.3.4' '5.6.7.8']\naction = 'stamp'\n\
        [[rule]]\nname = 'd'\ncgroup = 'relative'\ninterface = 'none0'\nmark = '0x100000000'\naction = 'drop'\ntoken = 'x'\n";
    let path = write(dir.path(), "p.toml", text)?;
    let found = netoken(&["policy", "check", &path.display().to_string()])?.code(1)?;
    for (place, what) in [
        ("more.toml:1:1", "main file only"),
        ("p.toml:2:1", "did you mean 'missing'"),
        ("p.toml:4:1", "contains itself"),
        ("list.txt:3:1", "10.0.0.256"),
        ("p.toml:8:8", "did you mean 5-9"),
        ("p.toml:9:1", "did you mean 'port'"),
        ("p.toml:13:", "missing comma"),
        ("p.toml:17:10", "begins with '/'"),
        ("p.toml:18:13", "no interface 'none0'"),
        ("p.toml:19:8", "32 bits"),
        ("p.toml:21:1", "action \"stamp\" only"),
    ] {
        ensure!(
            found.err.contains(place) && found.err.contains(what),
            "{place} {what} expected: {}",
            found.err
        );
    }
    // With the line itself, and a pointer below it.
    ensure!(found.err.contains("port = '9-5'\n") && found.err.contains("^^^^^"), "{}", found.err);

    let path = write(dir.path(), "twice.toml", &(stamp("x", "", "a") + &stamp("x", "mark = 1", "b")))?;
    let found = netoken(&["policy", "check", &path.display().to_string()])?.code(1)?;
    ensure!(
        found.err.contains("twice.toml:7:8") && found.err.contains("two rules are called 'x'"),
        "{}",
        found.err
    );
    Ok(())
}

pub fn a_good_file_is_checked_without_rights_and_warnings_are_told() -> Result<()> {
    let found = netoken(&["policy", "check", "--shapes", EXAMPLE])?.code(0)?;
    ensure!(found.out.contains("6 rules") && found.out.contains("mark/0xf0"), "{found:#?}");

    let dir = dir()?;
    let text = stamp("wide", "dst = '10.0.0.0/8'", "a") + &stamp("narrow", "dst = '10.1.0.0/16'", "b");
    let path = write(dir.path(), "covered.toml", &text)?;
    let found = netoken(&["policy", "check", &path.display().to_string()])?.code(0)?;
    ensure!(
        found.err.contains("'narrow' can never match") && found.err.contains("covered.toml:7:8"),
        "{found:#?}"
    );

    let path = write(dir.path(), "missing.toml", &stamp("x", "interface = 'none0'", "a"))?;
    let path = path.display().to_string();
    netoken(&["policy", "check", &path])?.code(1)?;
    let found = netoken(&["policy", "check", "--allow-missing", &path])?.code(0)?;
    ensure!(found.err.contains("warning: there is no interface 'none0'"), "{found:#?}");

    // Nobody has less: the user who runs this, or root without any capability.
    let mut command = Command::new(NETOKEN);
    if nix::unistd::geteuid().is_root() {
        command = Command::new("setpriv");
        command.args(["--bounding-set", "-all", "--inh-caps", "-all", "--ambient-caps", "-all", NETOKEN]);
    }
    said(command.args(["policy", "check", EXAMPLE]))?.code(0)?;
    Ok(())
}

pub fn counters_of_rules_that_keep_their_name_survive_a_reload() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let first = stamp("kept", "port = 9", "kept") + &stamp("gone", "port = 10", "gone");
    let path = write(dir.path(), "p.toml", &first)?.display().to_string();
    let refused = policy(&world.lab, &format!("load {path}"))?.code(1)?;
    ensure!(refused.err.contains("no such instance") && refused.err.contains("--attach"), "{refused:#?}");
    world.ok(&format!("-i c0 --attach --quiet --policy {path}"))?;
    world.syns_to("10.77.0.2:9", 3)?;
    world.syns_to("10.77.0.2:10", 2)?;

    let hits = || -> Result<Vec<(String, u64)>> {
        let shown = world.lab.ok("policy show --json")?;
        let rules = records(&shown, "rule")?;
        let pair = |rule: &Value| {
            (rule["name"].as_str().unwrap_or("").to_string(), rule["hits"].as_u64().unwrap_or(99))
        };
        Ok(rules.iter().map(pair).collect())
    };
    ensure_eq!(hits()?, [("kept".to_string(), 3), ("gone".to_string(), 2)], "before");
    let second = stamp("new", "port = 11", "new")
        + &stamp("more", "port = 10", "more")
        + &stamp("kept", "port = 9", "other");
    write(dir.path(), "p.toml", &second)?;
    let diff = world.lab.ok(&format!("policy diff {path}"))?;
    for line in ["- gone: port 10", "+ new: port 11", "- kept: port 9 -> stamp 6b65707400000000"] {
        ensure!(diff.contains(line), "{line} expected in\n{diff}");
    }
    world.lab.ok(&format!("policy load {path}"))?;
    let expected = [("new".to_string(), 0), ("more".to_string(), 0), ("kept".to_string(), 3)];
    ensure_eq!(hits()?, expected, "after");
    world.syns_to("10.77.0.2:9", 1)?;
    ensure_eq!(hits()?[2].1, 4, "hits of the rule that was kept");
    // A number that was somebody's begins at zero, also two reloads later.
    write(dir.path(), "p.toml", &(second.clone() + &stamp("later", "port = 12", "l")))?;
    world.lab.ok(&format!("policy load {path}"))?;
    ensure!(hits()?.contains(&("later".to_string(), 0)), "{:?}", hits()?);

    let shown = world.lab.ok("policy show --json")?;
    let last = records(&shown, "rule")?[2]["last_hit"].as_str().context("never hit")?.to_string();
    let age = humantime::parse_rfc3339(&last)?.elapsed().unwrap_or_default();
    ensure!(age.as_secs() < 60, "the last hit was {last}");
    let text = world.lab.ok("policy show --toml")?;
    let again = write(dir.path(), "again.toml", &text)?;
    ensure_eq!(
        world.lab.ok(&format!("policy diff {}", again.display()))?,
        "no difference\n",
        "what show --toml printed"
    );
    ensure_eq!(world.lab.ok(&format!("policy diff {path}"))?, "no difference\n", "what was loaded");
    Ok(())
}

pub fn rules_are_added_and_removed() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    world.lab.ok("policy add --name one --dst 10.77.0.2 --action stamp --token 2222222222222222")?;
    world.expect_token("2222222222222222", "the token of a rule that was added")?;
    world.lab.ok(
        "policy add --name two --dst 10.77.0.0/24 --not port=9 --action stamp --token 3333333333333333",
    )?;
    world.expect_token("3333333333333333", "the token of the first rule")?;
    world.lab.ok("policy add --name three --after two --src 10.77.0.1 --action drop")?;
    let shown = world.lab.ok("policy show --json")?;
    let names: Vec<Value> = records(&shown, "rule")?.iter().map(|rule| rule["name"].clone()).collect();
    ensure_eq!(
        names,
        ["two", "three", "one"].map(Value::from).into_iter().chain([Value::Null]).collect::<Vec<_>>(),
        "rules"
    );
    for (args, words) in [
        ("add --name one --action skip", "there is one of that name"),
        ("add --name x --action skip --before four", "no rule 'four'"),
        ("add --name x --action stmp", "an action is"),
        ("add --name x --action skip --dst 10.0.0.1/8", "did you mean 10.0.0.0/8"),
        ("del thre", "did you mean 'three'"),
        ("del one --netns nosuch", "opening the network namespace /run/netns/nosuch"),
    ] {
        let refused = policy(&world.lab, args)?.code(1)?;
        ensure!(refused.err.contains(words), "{args}: {refused:#?}");
    }
    world.lab.ok("policy del two three")?;
    world.expect_token("2222222222222222", "the token when two are gone")?;
    world.lab.ok("policy del one")?;
    world.expect_token("1111111111111111", "the default")?;
    ensure!(world.lab.ok("policy show")?.contains("(changed by hand)"), "the source");
    Ok(())
}

pub fn an_edit_is_told_what_it_does_to_other_rules_and_to_itself() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let path = write(dir.path(), "p.toml", &stamp("all", "", "r{rule:4}"))?.display().to_string();
    world.ok(&format!("-i c0 --attach --quiet --policy {path}"))?;
    let refused = policy(&world.lab, "add --name x --interface none0 --action skip")?.code(1)?;
    ensure!(
        refused.err.contains("once it is there") && !refused.err.contains("--allow-missing"),
        "{refused:#?}"
    );
    let told = policy(&world.lab, "add --name behind --last --port 9 --action drop")?.code(0)?;
    ensure!(told.err.contains("'behind' can never match: 'all' matches all of it before"), "{told:#?}");
    ensure!(!told.err.contains("their number"), "{told:#?}");
    let told = policy(&world.lab, "add --name front --port 9 --action drop")?.code(0)?;
    ensure!(!told.err.contains("never match"), "{told:#?}");
    ensure!(told.err.contains("their number in it, which is another one now: 1"), "{told:#?}");
    world.expect_token("7200000002000000", "the token with the new number")?;
    // What is left can be loaded again.
    let refused = policy(&world.lab, "del all behind front")?.code(1)?;
    ensure!(refused.err.contains("default = { action = \"skip\" }"), "{refused:#?}");
    ensure_eq!(records(&world.lab.ok("policy show --json")?, "rule")?.len(), 3, "rules");
    world.lab.ok("policy del behind front").map(drop)
}

/// A file whose lists are empty is in use like any other.
pub fn a_policy_with_an_empty_list_is_shown_and_changed() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    write(dir.path(), "empty.txt", "")?;
    let text =
        stamp("all", "not_src = 'file:empty.txt'", "x") + &stamp("nobody", "dst = 'file:empty.txt'", "y");
    let path = write(dir.path(), "p.toml", &text)?.display().to_string();
    world.ok(&format!("-i c0 --attach --quiet --policy {path}"))?;
    for command in
        ["show", "show --toml", "add --name x --action skip", "test --dst 192.0.2.1 --port 1", "del x"]
    {
        policy(&world.lab, command)?.code(0).context(command)?;
    }
    ensure_eq!(world.lab.ok(&format!("policy diff {path}"))?, "no difference\n", "what was loaded");
    world.expect_token("7800000000000000", "the token of the rule that leaves nobody out")
}

/// That the name now means another one is told, and what a load would do about it.
pub fn an_interface_that_took_the_name_of_another_is_told() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let text = stamp("x", "interface = 'd0'", "x");
    let path = write(dir.path(), "p.toml", &text)?.display().to_string();
    sh(&format!("ip -n {} link add d0 type veth peer name e0", world.ns))?;
    world.ok(&format!("-i c0 --attach --quiet --policy {path}"))?;
    let ns = &world.ns;
    let stale = || -> Result<Value> {
        Ok(records(&world.lab.ok("policy show --json")?, "rule")?[0]["stale"].clone())
    };
    let diff = || world.lab.ok(&format!("policy diff --netns {ns} {path}"));
    sh(&format!("ip -n {ns} link set d0 name d1"))?;
    ensure_eq!(stale()?, Value::Null, "renamed");
    sh(&format!("ip -n {ns} link add d0 type veth peer name e1"))?;
    ensure_eq!(stale()?, format!("interface '{ns}:d0' is another one now"), "what is stale");
    let changed = diff()?;
    for line in ["- x: interface ", "+ x: interface "] {
        ensure!(changed.contains(&format!("{line}{ns}:d0 (index ")), "{changed}");
    }
    world.lab.ok(&format!("policy load --netns {ns} {path}"))?;
    ensure_eq!((stale()?, diff()?), (Value::Null, "no difference\n".to_string()), "after a load");
    let marks: Vec<String> = (0..600).map(|mark| mark.to_string()).collect();
    write(dir.path(), "p.toml", &stamp("x", &format!("not_mark = [{}]", marks.join(", ")), "x"))?;
    let refused = policy(&world.lab, &format!("diff {path}"))?.code(1)?;
    refused.err(&["rule 'x' has 600 checks", "p.toml:2:8"]).map(drop)
}

pub fn the_kernel_says_which_rule_decides_and_why() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let text = stamp("database", "dst = '10.20.0.0/16'\nport = 5432", "db")
        + &stamp("user", "uid = [7, 'root']\nmark = '0x1/0x1'", "u")
        + &stamp("container", "cgroup = '/'", "c");
    let path = write(dir.path(), "p.toml", &text)?.display().to_string();
    world.ok(&format!("-i c0 --attach --quiet --policy {path}"))?;
    for from in [String::new(), format!("--file {path}")] {
        for (syn, expected) in [
            (
                "--dst 10.20.1.1 --port 5432",
                "rule 1 'database' decides: dst 10.20.0.0/16, port 5432 -> stamp",
            ),
            ("--dst 10.20.1.1 --port 5433", "no rule matches, and there is no default: no_policy"),
            ("--dst 10.20.1.1 --port 5433", "rule 1 'database' does not match: port 5432"),
            ("--dst fd00::1 --port 1 --uid root --mark 3", "rule 2 'user' decides: mark 0x1/0x1, uid 0,7"),
            ("--dst fd00::1 --port 1 --uid 8 --mark 3", "rule 3 'container' decides"),
        ] {
            let answer = world.lab.ok(&format!("policy test {from} {syn}"))?;
            ensure!(answer.contains(expected), "{from} {syn}: '{expected}' expected in\n{answer}");
        }
        let answer = world.lab.ok(&format!("policy test {from} --dst 10.20.1.1 --port 5432 --json"))?;
        let answer = &records(&answer, "decision")?[0];
        ensure!(answer["rule"] == 1 && answer["name"] == "database", "{answer}");
    }
    // To ask is not to hit.
    let shown = world.lab.ok("policy show --json")?;
    ensure!(records(&shown, "rule")?.iter().all(|rule| rule["hits"] == 0), "{shown}");
    Ok(())
}

pub fn the_example_can_be_used_as_it_says() -> Result<()> {
    let world = World::new()?;
    let attach = format!("-i c0 --attach --quiet --policy {EXAMPLE}");
    let refused = world.fails(&attach)?;
    ensure!(refused.contains("netoken key new edge"), "{refused}");
    world.lab.ok("key new edge")?;
    world.ok(&attach)?;
    let decides = |syn: &str, expected: &str| -> Result<()> {
        let answer = world.lab.ok(&format!("policy test {syn}"))?;
        ensure!(answer.contains(expected), "{syn}: '{expected}' expected in\n{answer}");
        Ok(())
    };
    decides("--src 10.17.1.1 --dst 192.0.2.9 --port 22", "rule 6 'tenant 17' decides")?;
    decides("--src 10.17.1.1 --dst 192.0.2.9 --port 22", "-> stamp tag 17 with key 'edge' bound to server")?;
    decides("--src 10.17.1.1 --src-port 2000 --dst 192.0.2.9 --port 443", "rule 5 'web of partners' decides")
}

/// Also while the numbers of the rules change: an event goes by the policy that decided.
pub fn the_stream_shows_rules_by_their_names() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let kept = stamp("kept \"ä\"", "port = 9", "kept");
    let path = write(dir.path(), "p.toml", &kept)?;
    let next = stamp("in front", "dst = '192.0.2.1'", "x") + &kept + &stamp("behind", "port = 10", "y");
    let next = write(dir.path(), "next.toml", &next)?;
    for (flags, shown, last) in [
        ("", "  kept \"ä\"  ", "  default  "),
        ("--json", r#""rule_name":"kept \"ä\"""#, r#""rule_name":null"#),
    ] {
        let args = world.args(&format!("-i c0 --attach {flags} --policy {}", path.display()));
        let mut stream = Running::start(&mut world.lab.netoken(&args))?;
        stream.wait_for("the attach", |line| line.contains("attached") || line.contains("replaced"))?;
        for policy in [&path, &next, &path] {
            world.lab.ok(&format!("policy load {}", policy.display()))?;
            world.syns(1)?;
            stream.wait_for(&format!("the name with {}", policy.display()), |line| {
                line.contains("10.77.0.2") && line.contains(shown)
            })?;
        }
        world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
        world.syns(1)?;
        stream.wait_for("the default", |line| line.contains("10.77.0.2") && line.contains(last))?;
        stream.signal(Signal::SIGTERM)?;
        ensure_eq!(stream.end()?.0, Some(0), "exit code");
    }
    Ok(())
}

/// As one whose interface comes later: the rules behind it keep their numbers, and what is not to go out does not.
pub fn a_rule_about_a_namespace_that_comes_later_is_a_rule() -> Result<()> {
    let world = World::new()?;
    let late = world.ns.replace("-client", "-late");
    let dir = dir()?;
    let text = stamp("only there", &format!("interface = '{late}:lo'"), "there")
        + &format!("[[rule]]\nname = 'not there'\nnot_interface = '{late}:lo'\nport = 9\naction = 'drop'\n")
        + &stamp("both", &format!("interface = ['{late}:lo', 'c0']"), "both");
    let path = write(dir.path(), "p.toml", &text)?;
    let attach = format!("-i c0 --attach --quiet --policy {}", path.display());
    let refused = world.fails(&attach)?;
    ensure!(refused.contains(&late) && refused.contains("--allow-missing"), "{refused}");
    let told = Said::from_output(world.run(&format!("{attach} --allow-missing"))?)?.code(0)?;
    ensure!(told.err.contains("warning: ") && told.err.contains("policy: 3 rules"), "{told:#?}");
    let check = || -> Result<()> {
        let rules = records(&world.lab.ok("policy show --json")?, "rule")?;
        let names: Vec<&Value> = rules.iter().map(|rule| &rule["name"]).collect();
        ensure_eq!(names[..3], ["only there", "not there", "both"], "rules");
        let answer = world.lab.ok("policy test --dst 10.77.0.2 --port 9")?;
        ensure!(answer.contains("rule 2 'not there' decides"), "{answer}");
        world.expect_token("626f746800000000", "the token of the rule about another interface, too")
    };
    check()?;
    // Also after it was read again.
    world.lab.ok("policy add --name last --last --mark 7 --action skip")?;
    check()?;
    sh(&format!("ip netns add {late}"))?;
    let checked = check().and_then(|()| {
        let shown = world.lab.ok("policy show")?;
        ensure!(shown.contains(&format!("[stale: interface '{late}:lo' is there now;")), "{shown}");
        world.lab.ok(&format!("policy add --name more --interface {late}:lo --action skip"))?;
        world.ok(&attach)?;
        let shown = world.lab.ok("policy show")?;
        ensure!(!shown.contains("stale"), "{shown}");
        Ok(())
    });
    sh(&format!("ip netns del {late}"))?;
    checked
}

/// The kernel gives the number of a namespace that is gone to the next one; here that is what has another name now.
pub fn an_attach_that_keeps_a_policy_tells_which_interfaces_are_others() -> Result<()> {
    let mut world = World::new()?;
    let [blue, green] = world.lab.add_netns(["blue", "green"])?;
    let dir = dir()?;
    let path = write(dir.path(), "p.toml", &stamp("x", &format!("interface = '{blue}:lo'"), "x"))?;
    world.ok(&format!("-i c0 --attach --quiet --policy {}", path.display()))?;
    let expect = |what: Option<&str>| -> Result<()> {
        let told = Said::from_output(world.run("-i c0 --attach --quiet")?)?.code(0)?;
        let rules = records(&world.lab.ok("policy show --json")?, "rule")?;
        match what {
            None => {
                ensure!(!told.err.contains("load it again"), "{told:#?}");
                ensure_eq!(rules[0]["stale"], Value::Null, "{rules:#?}");
            }
            Some(what) => {
                let what = format!("interface '{blue}:lo' {what}");
                ensure_eq!(rules[0]["stale"], what, "{rules:#?}");
                for words in [&what, "load it again: netoken policy load FILE", &path.display().to_string()] {
                    ensure!(told.err.contains(words), "'{words}' expected: {told:#?}");
                }
            }
        }
        Ok(())
    };
    expect(None)?;
    let netns = |name: &str| format!("/run/netns/{name}");
    sh(&format!("ip netns del {green} && touch {1} && mount --bind {0} {1}", netns(&blue), netns(&green)))?;
    expect(None)?;
    sh(&format!("ip netns del {blue}"))?;
    expect(Some("is gone"))?;
    // With the index that it had in the other.
    sh(&format!("ip netns add {blue}"))?;
    expect(Some("is another one now"))?;
    world.lab.ok(&format!("policy load {}", path.display()))?;
    expect(None)
}
