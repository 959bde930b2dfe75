//! Rules about who sends: real users, real cgroups, and SYNs that nobody on this host sends. And rules about the interface,
//! where another one looks alike.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::segment::Segment;
use crate::sockets::{Listener, connect, exchange};
use crate::support::{Need, ensure_eq, sh};
use crate::wire::{Checksum, Frame, LINUX_OPTIONS, Tap};
use crate::world::{FAMILIES, Family, Hook, IN, OUT, World};
use crate::{case, with};

const UID: u32 = 54321;
/// For SYNs that no rule is about.
const NOBODY: &str = "default = { action = 'stamp', token = 'nobody--' }\n";

pub fn cases() -> Vec<Trial> {
    let bridge = [with("ip"), vec![Need::Works("ip link add br0 type bridge")]].concat();
    vec![
        case("a rule for a user is for what that user opens", &with("setpriv"), users),
        case("a rule for a cgroup is for what is opened in it and below", &with("findmnt"), cgroups),
        case("a cgroup that is made again is picked up by a reload", &with("findmnt"), made_again),
        case("what is forwarded or written raw matches no rule about its sender", &with("findmnt"), nobody),
        case("what comes through a bridge matches no rule about its sender", &bridge, bridged),
        case("an interface is told from one with the same index elsewhere", &with("ip"), same_index),
        case("rules for interfaces of one name in two namespaces stay apart", &with("ip"), same_name),
        case("a rule follows its interface when that is renamed", &with("ip"), renamed),
    ]
}

fn load(world: &World, rules: &str, more: &str) -> Result<()> {
    let path = world.lab.run.join("senders.toml");
    fs::write(&path, format!("{NOBODY}{rules}"))?;
    world.lab.ok(&format!("policy load {} {more}", path.display())).map(drop)
}

fn rule(name: &str, condition: &str) -> String {
    format!("[[rule]]\nname = '{name}'\n{condition}\naction = 'stamp'\ntoken = '{name}'\n")
}

/// Connects from the client in a process of its own, which `before` prepares.
fn connect_as(world: &World, before: &str, to: SocketAddr) -> Result<()> {
    let shell = format!("{before} bash -c 'exec 3<>/dev/tcp/{}/{}'", to.ip(), to.port());
    // Not `ip netns exec`, which hides the cgroups behind a /sys of its own.
    let output = Command::new("nsenter")
        .args([&format!("--net=/run/netns/{}", world.client), "sh", "-c", &shell])
        .output()
        .context("starting a client")?;
    ensure!(output.status.success(), "{shell}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn expect(world: &World, listener: &Listener, before: &str, token: &str) -> Result<()> {
    connect_as(world, before, listener.addr)?;
    let token: [u8; 8] = token.as_bytes().try_into()?;
    listener.accept()?.syn.check_stamped(token).with_context(|| format!("opened by: {before}"))
}

fn users() -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    let as_user = |uid: u32| format!("setpriv --reuid {uid} --clear-groups");
    for family in FAMILIES {
        let listener = Listener::open(&world, family)?;
        load(&world, &(rule("the-user", &format!("uid = {UID}")) + &rule("not-root", "not_uid = 0")), "")?;
        expect(&world, &listener, &as_user(UID), "the-user")?;
        expect(&world, &listener, &as_user(UID + 1), "not-root")?;
        expect(&world, &listener, "", "nobody--")?;
        // Ranges at their edges, and a name.
        load(
            &world,
            &(rule("a--range", &format!("uid = '{UID}-{}'", UID + 1)) + &rule("the-root", "uid = 'root'")),
            "",
        )?;
        for (uid, token) in
            [(UID - 1, "nobody--"), (UID, "a--range"), (UID + 1, "a--range"), (UID + 2, "nobody--")]
        {
            expect(&world, &listener, &as_user(uid), token)?;
        }
        expect(&world, &listener, "", "the-root")?;
    }
    Ok(())
}

/// A cgroup of our own, which is gone with what is in it when this is dropped.
struct Cgroup {
    root: PathBuf,
    name: String,
}

impl Cgroup {
    fn new(case: &str) -> Result<Cgroup> {
        let root = sh("findmnt -n -t cgroup2 -o TARGET | head -n 1")?.trim().to_string();
        ensure!(!root.is_empty(), "no cgroup2 is mounted");
        let cgroup = Cgroup { root: root.into(), name: format!("netoken-{case}-{}", std::process::id()) };
        cgroup.make("")?;
        Ok(cgroup)
    }

    fn dir(&self, below: &str) -> PathBuf {
        self.root.join(&self.name).join(below)
    }

    /// As a policy names it.
    fn path(&self, below: &str) -> String {
        format!("/{}{}{below}", self.name, if below.is_empty() { "" } else { "/" })
    }

    fn make(&self, below: &str) -> Result<()> {
        let dir = self.dir(below);
        fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))
    }

    /// What a shell says to go there.
    fn enter(&self, below: &str) -> String {
        format!("echo $$ > {}/cgroup.procs &&", self.dir(below).display())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // From below, and until the last process that was in it is gone.
        sh(&format!(
            "for i in $(seq 50); do find {0} -depth -type d -exec rmdir {{}} \\; 2>/dev/null; [ -d {0} ] || break; sleep 0.1; done",
            self.dir("").display()
        ))
        .ok();
    }
}

fn cgroups() -> Result<()> {
    let world = World::new(false)?;
    let cgroup = Cgroup::new("in")?;
    for below in ["a", "a/b", "c"] {
        cgroup.make(below)?;
    }
    world.attach("")?;
    let rules = rule("cgroup-c", &format!("cgroup = '{}'", cgroup.path("c")))
        + &rule("cgroup-b", &format!("cgroup = '{}'\nuid = '0-10'", cgroup.path("a/b")))
        + &rule("cgroup-a", &format!("cgroup = '{}'", cgroup.path("a")))
        + &rule("elsewher", &format!("not_cgroup = '{}'", cgroup.path("")));
    load(&world, &rules, "")?;
    for family in FAMILIES {
        let listener = Listener::open(&world, family)?;
        for (below, token) in [("a", "cgroup-a"), ("a/b", "cgroup-b"), ("c", "cgroup-c"), ("", "nobody--")] {
            expect(&world, &listener, &cgroup.enter(below), token)?;
        }
        expect(&world, &listener, "", "elsewher")?;
    }
    Ok(())
}

fn made_again() -> Result<()> {
    let world = World::new(false)?;
    let cgroup = Cgroup::new("again")?;
    cgroup.make("a")?;
    world.attach("")?;
    let rules = rule("cgroup-a", &format!("cgroup = '{}'", cgroup.path("a")));
    load(&world, &rules, "")?;
    let listener = Listener::open(&world, Family::V4)?;
    expect(&world, &listener, &cgroup.enter("a"), "cgroup-a")?;
    expect_stale(&world, false, "is gone")?;

    crate::lab::wait_until("the cgroup to be empty", || Ok(fs::remove_dir(cgroup.dir("a")).ok()))?;
    expect_stale(&world, true, "is gone")?;
    cgroup.make("a")?;
    expect_stale(&world, true, "is another one now")?;
    expect(&world, &listener, &cgroup.enter("a"), "nobody--")?;
    load(&world, &rules, "")?;
    expect_stale(&world, false, "")?;
    expect(&world, &listener, &cgroup.enter("a"), "cgroup-a")
}

fn expect_stale(world: &World, is_stale: bool, what: &str) -> Result<()> {
    let shown = world.lab.ok("policy show --json")?;
    let rule =
        shown.lines().map(serde_json::from_str::<Value>).find(|l| l.as_ref().is_ok_and(|l| l["rule"] == 1));
    let stale = rule.context("no rule")??["stale"].clone();
    match stale.as_str() {
        Some(text) => ensure!(is_stale && text.contains(what), "stale: {text}"),
        None => ensure!(!is_stale, "not stale: {shown}"),
    }
    Ok(())
}

/// Every rule asks for the sender, with and without negation.
fn about_senders() -> String {
    rule("any-user", "uid = '0-4294967295'")
        + &rule("not-user", "not_uid = 12345")
        + &rule("a-cgroup", "cgroup = '/'")
        + &rule("ncgroup-", "not_cgroup = '/'")
}

/// No rule about a sender decides over what the client opens.
fn expect_no_sender(world: &World) -> Result<()> {
    world.attach("")?;
    load(world, &about_senders(), "")?;
    for family in FAMILIES {
        let listener = Listener::open(world, family)?;
        exchange(world, &listener)?.check_stamped(*b"nobody--")?;
    }
    Ok(())
}

/// A bridge leaves a packet its socket, whose user has another number in a user namespace of its own.
fn bridged() -> Result<()> {
    expect_no_sender(&World::bridged()?)
}

fn nobody() -> Result<()> {
    let (world, _router) = World::routed(false, Hook::Router)?;
    expect_no_sender(&world)?;

    let world = World::new(false)?;
    world.attach("")?;
    load(&world, &about_senders(), "")?;
    let (receiver, sender) =
        (Tap::receiver(&world.lab, &world.server, IN)?, Tap::sender(&world.lab, &world.client, OUT)?);
    for family in FAMILIES {
        let to = SocketAddr::new(world.server_addr(family), 2000);
        let frame = Frame::syn(world.client_addr(family), to, &LINUX_OPTIONS, b"")?;
        sender.send(&frame, Checksum::Partial, 0)?;
        let (_, arrived): (_, Segment) = receiver.next_syn(to.port())?;
        arrived.check_stamped(*b"nobody--")?;
        // A rule for any user is right where there is one.
        let listener = Listener::open(&world, family)?;
        exchange(&world, &listener)?.check_stamped(*b"any-user")?;
    }
    Ok(())
}

fn index(ns: &str, interface: &str) -> Result<u32> {
    let text = sh(&format!("ip -n {ns} -o link show dev {interface}"))?;
    Ok(text.split(':').next().unwrap_or_default().trim().parse()?)
}

fn same_index() -> Result<()> {
    let world = World::new(false)?;
    ensure_eq!(index(&world.client, OUT)?, index(&world.server, IN)?, "the case needs the same index");
    // One instance, one policy, attached in both namespaces.
    world.attach("")?;
    world.lab.ok(&format!("--netns {} --iface {IN} --attach --quiet", world.server))?;
    let check = |from_client: &str, from_server: &str| -> Result<()> {
        let listener = Listener::open(&world, Family::V4)?;
        exchange(&world, &listener)?.check_stamped(from_client.as_bytes().try_into()?)?;
        let addr = SocketAddr::new(world.client_addr(Family::V4), 0);
        let listener = Listener::open_with(&world.lab, &world.client, addr, |_| Ok(()))?;
        let _open = connect(&world.lab, &world.server, listener.addr, crate::lab::PATIENCE)?;
        listener.accept()?.syn.check_stamped(from_server.as_bytes().try_into()?)
    };
    let here = rule("the-one-", &format!("interface = '{OUT}'"));
    load(&world, &here, &format!("--netns {}", world.client))?;
    check("the-one-", "nobody--")?;
    let both = here + &rule("by--name", &format!("interface = '{}:{IN}'", world.server));
    load(&world, &both, &format!("--netns {}", world.client))?;
    check("the-one-", "by--name")?;
    let not = rule("not-one-", &format!("not_interface = '{}:{IN}'", world.server));
    load(&world, &not, &format!("--netns {}", world.client))?;
    check("not-one-", "nobody--")
}

/// Also over changes for which the policy is read again, by whoever is in which namespace.
fn same_name() -> Result<()> {
    let world = World::new(false)?;
    let sides = [(&world.client, "client--"), (&world.server, "server--")];
    let check = || -> Result<()> {
        for (ns, token) in sides {
            let addr = SocketAddr::new([127, 0, 0, 1].into(), 0);
            let listener = Listener::open_with(&world.lab, ns, addr, |_| Ok(()))?;
            let _open = connect(&world.lab, ns, listener.addr, crate::lab::PATIENCE)?;
            let stamped = listener.accept()?.syn.check_stamped(token.as_bytes().try_into()?);
            stamped.with_context(|| format!("on lo of {ns}"))?;
        }
        Ok(())
    };
    for (ns, _) in sides {
        world.lab.ok(&format!("--netns {ns} --iface lo --attach --quiet"))?;
    }
    load(&world, &rule("client--", "interface = 'lo'"), &format!("--netns {}", world.client))?;
    let add = |name: &str, condition: &str| {
        world.lab.ok(&format!("policy add --name {name} {condition} --action stamp --token {name}"))
    };
    add("server--", &format!("--interface lo --netns {}", world.server))?;
    check()?;
    add("neither-", "--mark 7")?;
    check()?;

    let toml = world.lab.ok("policy show --toml")?;
    for (ns, _) in sides {
        ensure!(toml.contains(&format!("'{ns}:lo'")) || toml.contains(&format!("\"{ns}:lo\"")), "{toml}");
    }
    let path = world.lab.run.join("shown.toml");
    fs::write(&path, toml)?;
    let same = world.lab.ok(&format!("policy diff {}", path.display()))?;
    ensure!(same.contains("no difference"), "{same}");
    world.lab.ok(&format!("policy load {}", path.display()))?;
    check()?;
    // The host's own is another one.
    fs::write(&path, format!("{NOBODY}{}", rule("client--", "interface = 'lo'")))?;
    let other = world.lab.run(&format!("policy diff {}", path.display()))?;
    let said = String::from_utf8(other.stdout)?;
    ensure!(said.contains("- client--: ") && said.contains("+ client--: "), "{said}");
    Ok(())
}

fn renamed() -> Result<()> {
    let world = World::new(false)?;
    world.attach("")?;
    load(&world, &rule("the-one-", &format!("interface = '{OUT}'")), &format!("--netns {}", world.client))?;
    let listener = Listener::open(&world, Family::V4)?;
    exchange(&world, &listener)?.check_stamped(*b"the-one-")?;
    let ns = &world.client;
    sh(&format!(
        "ip -n {ns} link set {OUT} down && ip -n {ns} link set {OUT} name other0 && ip -n {ns} link set other0 up"
    ))?;
    exchange(&world, &listener)?.check_stamped(*b"the-one-")?;
    expect_stale(&world, false, "")
}
