//! A second opinion on every decision of the policy: a matcher that was written from `docs/policy.md` alone, reads the
//! TOML with the general parser, and goes through the rules one by one. It shares nothing with the program: not the
//! types, not the parsing of addresses and ranges, not the order in which anything is looked up.

use std::fs;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use netoken::netns::Netns;
use netoken::policy::Policy;
use netoken::policy::ask::{Ask, Sender, Syn};
use netoken::policy::compile::Refused;
use netoken::program::Settings;
use netoken::types::Verdict;
use toml::{Table, Value};

use crate::packet::syn;
use crate::random::{Random, seed};
use crate::run::{Bench, How};
use crate::support::{ensure_eq, sh, share_of};

/// Pairs of a policy and a packet, at least.
const PAIRS: usize = 120_000;
const PACKETS_EACH: usize = 60;
const THREADS: usize = 8;

/// What the policy decides: the number of a rule (0 for the default) and its action; nothing if nothing matches.
type Decided = Option<(u32, String)>;

/// What the documentation calls the world: names that the kernel resolves.
struct World {
    /// Path and numbers of the cgroup, from the root down.
    cgroups: Vec<(String, Vec<u64>)>,
    netns: u32,
}

fn reference(policy: &Table, syn: &Syn, world: &World) -> Decided {
    let rules = policy.get("rule").and_then(Value::as_array);
    for (at, rule) in rules.into_iter().flatten().enumerate() {
        let rule = rule.as_table().expect("a table");
        if rule.iter().all(|(key, value)| condition(key, value, syn, world, policy)) {
            return Some((at as u32 + 1, rule["action"].as_str().expect("text").to_string()));
        }
    }
    let default = policy.get("default")?;
    Some((0, default["action"].as_str().expect("text").to_string()))
}

fn condition(key: &str, value: &Value, syn: &Syn, world: &World, policy: &Table) -> bool {
    let (negated, field) = match key.strip_prefix("not_") {
        Some(field) => (true, field),
        None => (false, key),
    };
    let values: Vec<&Value> = match value {
        Value::Array(list) => list.iter().collect(),
        one => vec![one],
    };
    let any = |fits: &dyn Fn(&Value) -> bool| values.iter().any(|value| fits(value));
    let holds = match field {
        "name" | "action" | "token" | "when_full" => return true,
        "src" => any(&|value| address(value, syn.src, policy)),
        "dst" => any(&|value| address(value, syn.dst, policy)),
        "src_port" => any(&|value| number(value, syn.src_port.into(), "ports", policy)),
        "port" => any(&|value| number(value, syn.port.into(), "ports", policy)),
        "mark" => any(&|value| mark(value, syn.mark)),
        "interface" => any(&|value| value.as_str() == Some("lo") && syn.interface == (world.netns, 1)),
        "uid" => match &syn.sender {
            None => return false,
            Some(sender) => any(&|value| number(value, sender.uid.into(), "", policy)),
        },
        "cgroup" => match &syn.sender {
            None => return false,
            Some(sender) => any(&|value| {
                let (_, ids) =
                    world.cgroups.iter().find(|(path, _)| Some(&**path) == value.as_str()).expect("known");
                // It or below: the way from the root begins with the way to the one that is named.
                sender.cgroups.starts_with(ids)
            }),
        },
        other => panic!("the documentation has no key {other}"),
    };
    holds != negated
}

/// Bit by bit, as one would on paper.
fn address(value: &Value, addr: IpAddr, policy: &Table) -> bool {
    let text = value.as_str().expect("text");
    if let Some(set) = text.strip_prefix('@') {
        return match &policy["prefixes"][set] {
            Value::Array(list) => list.iter().any(|value| address(value, addr, policy)),
            one => address(one, addr, policy),
        };
    }
    let (network, bits) = text.split_once('/').unwrap_or((text, ""));
    let network: IpAddr = network.parse().expect("an address");
    let bytes = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    };
    let (network, addr) = (bytes(network), bytes(addr));
    let bits = if bits.is_empty() { network.len() * 8 } else { bits.parse().expect("a number") };
    let bit = |bytes: &[u8], at: usize| bytes[at / 8] >> (7 - at % 8) & 1;
    network.len() == addr.len() && (0..bits).all(|at| bit(&network, at) == bit(&addr, at))
}

fn number(value: &Value, number: i64, sets: &str, policy: &Table) -> bool {
    let text = match value {
        Value::Integer(one) => return *one == number,
        other => other.as_str().expect("text"),
    };
    if let Some(set) = text.strip_prefix('@') {
        return policy[sets][set]
            .as_array()
            .expect("a list")
            .iter()
            .any(|v| self::number(v, number, sets, policy));
    }
    match text.split_once('-') {
        Some((first, last)) => {
            (first.parse::<i64>().expect("a number")..=last.parse().expect("a number")).contains(&number)
        }
        None => text.parse::<i64>().expect("a number") == number,
    }
}

fn mark(value: &Value, mark: u32) -> bool {
    let parse = |text: &str| match text.strip_prefix("0x") {
        Some(hex) => u32::from_str_radix(hex, 16).expect("a number"),
        None => text.parse().expect("a number"),
    };
    match value {
        Value::Integer(one) => i64::from(mark) == *one,
        other => {
            let text = other.as_str().expect("text");
            let (value, mask) = match text.split_once('/') {
                Some((value, mask)) => (parse(value), parse(mask)),
                None => (parse(text), u32::MAX),
            };
            (0..32).all(|bit| mask >> bit & 1 == 0 || value >> bit & 1 == mark >> bit & 1)
        }
    }
}

// ---- random policies and packets, over few enough values that they meet

fn pick<'a, T>(random: &mut Random, list: &'a [T]) -> &'a T {
    &list[random.below(list.len())]
}

fn random_prefix(random: &mut Random) -> String {
    let v6 = random.next() & 1 == 0;
    let addr = random_addr(random, v6);
    let width = if addr.is_ipv4() { 32 } else { 128 };
    let bits = match random.below(4) {
        0 => *pick(random, &[0, 1, width - 1, width]),
        1 => random.below(width as usize + 1) as u32,
        _ => *pick(random, if width == 32 { &[8, 16, 24, 32] } else { &[32, 48, 64, 128] }),
    };
    let cut = |value: u128, width: u32| {
        if bits == 0 { 0 } else { value >> (width - bits) << (width - bits) }
    };
    match addr {
        IpAddr::V4(addr) => {
            let network = std::net::Ipv4Addr::from(cut(u32::from(addr).into(), 32) as u32);
            if bits == 32 && random.below(2) == 0 {
                format!("{network}")
            } else {
                format!("{network}/{bits}")
            }
        }
        IpAddr::V6(addr) => format!("{}/{bits}", std::net::Ipv6Addr::from(cut(addr.into(), 128))),
    }
}

/// Few addresses, which differ in bits at the edges of prefixes.
fn random_addr(random: &mut Random, v6: bool) -> IpAddr {
    if v6 {
        let mut addr = 0x2001_0db8_u128 << 96;
        for at in [0, 1, 63, 64, 79, 80, 95, 127] {
            addr ^= u128::from(random.below(4) == 0) << at;
        }
        return std::net::Ipv6Addr::from(addr).into();
    }
    let mut addr = 0x0a00_0001_u32;
    for at in [0, 1, 7, 8, 15, 16, 23, 31] {
        addr ^= u32::from(random.below(4) == 0) << at;
    }
    std::net::Ipv4Addr::from(addr).into()
}

const PORTS: [u16; 8] = [0, 1, 79, 80, 443, 8000, 65534, 65535];
const MARKS: [u32; 6] = [0, 1, 0x10, 0x11, 0x8000_0000, u32::MAX];
const UIDS: [u32; 6] = [0, 1, 1000, 1001, 65534, u32::MAX - 1];

fn random_number(random: &mut Random, values: &[u32]) -> String {
    let (one, other) = (*pick(random, values), *pick(random, values));
    match random.below(3) {
        0 => format!("\"{}-{}\"", one.min(other), one.max(other)),
        1 => format!("\"{one}\""),
        _ => format!("{one}"),
    }
}

fn random_value(random: &mut Random, key: &str, world: &World) -> String {
    let ports = PORTS.map(u32::from);
    match key {
        "src" | "dst" if random.below(6) == 0 => format!("\"@p{}\"", random.below(3)),
        "src" | "dst" => format!("\"{}\"", random_prefix(random)),
        "src_port" | "port" if random.below(6) == 0 => format!("\"@q{}\"", random.below(2)),
        "src_port" | "port" => random_number(random, &ports),
        "mark" => match random.below(2) {
            0 => format!("{}", pick(random, &MARKS)),
            _ => {
                let mask = *pick(random, &[0, 1, 0xf0, 0xff, 0x8000_0001, u32::MAX]);
                format!("\"{:#x}/{mask:#x}\"", pick(random, &MARKS) & mask)
            }
        },
        "interface" => format!("\"{}\"", pick(random, &["lo", "none0"])),
        "cgroup" => format!("\"{}\"", pick(random, &world.cgroups).0),
        _ => random_number(random, &UIDS),
    }
}

fn random_policy(random: &mut Random, world: &World) -> String {
    let mut text = "missing = 'warn'\n".to_string();
    if random.below(2) == 0 {
        text.push_str("default = { action = 'skip' }\n");
    }
    let list = |random: &mut Random, one: &dyn Fn(&mut Random) -> String, max: usize| {
        let items: Vec<String> = (0..=random.below(max)).map(|_| one(random)).collect();
        format!("[{}]", items.join(", "))
    };
    text.push_str("[prefixes]\n");
    for set in 0..3 {
        let prefixes = list(random, &|random| format!("\"{}\"", random_prefix(random)), 30);
        text.push_str(&format!("p{set} = {prefixes}\n"));
    }
    text.push_str("[ports]\n");
    for set in 0..2 {
        let ports = list(random, &|random| random_number(random, &PORTS.map(u32::from)), 6);
        text.push_str(&format!("q{set} = {ports}\n"));
    }
    // Now and then so many prefix lengths and ranges that shapes run out, and lists become sets.
    let rules = if random.below(8) == 0 { 40 } else { random.below(10) };
    for number in 0..rules {
        text.push_str(&format!("[[rule]]\nname = \"r{number}\"\n"));
        for key in ["interface", "src", "dst", "src_port", "port", "mark", "cgroup", "uid"] {
            for (negated, chance) in [("", 5), ("not_", 10)] {
                if random.below(chance) != 0 {
                    continue;
                }
                let value = match random.below(2) {
                    0 => random_value(random, key, world),
                    _ => list(random, &|random| random_value(random, key, world), 5),
                };
                text.push_str(&format!("{negated}{key} = {value}\n"));
            }
        }
        text.push_str(&format!("action = \"{}\"\n", pick(random, &["skip", "drop"])));
    }
    text
}

fn random_syn(random: &mut Random, world: &World) -> Syn {
    let v6 = random.below(2) == 0;
    let sender = (random.below(4) != 0)
        .then(|| Sender { uid: *pick(random, &UIDS), cgroups: pick(random, &world.cgroups).1.clone() });
    Syn {
        src: random_addr(random, v6),
        dst: random_addr(random, v6),
        src_port: *pick(random, &PORTS),
        port: *pick(random, &PORTS),
        mark: *pick(random, &MARKS),
        interface: (world.netns + u32::from(random.below(4) == 0), 1 + random.below(2) as u32),
        sender,
    }
}

// ---- the cases

/// Cgroups of our own, which are gone when it is dropped.
struct Cgroups {
    root: PathBuf,
    made: Vec<PathBuf>,
}

impl Cgroups {
    fn make() -> Result<Cgroups> {
        let root = sh("findmnt -n -t cgroup2 -o TARGET | head -n 1")?.trim().to_string();
        let mut cgroups = Cgroups { root: root.into(), made: Vec::new() };
        let name = format!("netoken-test-{}", std::process::id());
        for path in [name.clone(), format!("{name}/a"), format!("{name}/a/b"), format!("{name}/c")] {
            let dir = cgroups.root.join(path);
            fs::create_dir(&dir).with_context(|| format!("making {}", dir.display()))?;
            cgroups.made.push(dir);
        }
        Ok(cgroups)
    }

    /// Path and numbers from the root, for each.
    fn list(&self) -> Result<Vec<(String, Vec<u64>)>> {
        let mut list = vec![("/".to_string(), vec![fs::metadata(&self.root)?.ino()])];
        for dir in &self.made {
            let path = dir.strip_prefix(&self.root)?;
            let mut ids = Vec::new();
            for ancestor in path.ancestors() {
                ids.insert(0, fs::metadata(self.root.join(ancestor))?.ino());
            }
            list.push((format!("/{}", path.display()), ids));
        }
        Ok(list)
    }
}

impl Drop for Cgroups {
    fn drop(&mut self) {
        for dir in self.made.iter().rev() {
            fs::remove_dir(dir).ok();
        }
    }
}

pub fn the_kernel_agrees_with_the_reference() -> Result<()> {
    let cgroups = Cgroups::make()?;
    let world = World { cgroups: cgroups.list()?, netns: Netns::current()?.inode() };
    let (seed, pairs) = (seed()?, share_of(PAIRS)?);
    // Most of the time is waiting for the kernel's grace periods, so several kernels' worth of maps wait at once.
    let decided = std::thread::scope(|scope| -> Result<[usize; 3]> {
        let world = &world;
        let work: Vec<_> = (1..=THREADS as u64)
            .map(|thread| scope.spawn(move || compare(Random(seed.wrapping_mul(thread) | 1), world, pairs)))
            .collect();
        let mut sum = [0; 3];
        for work in work {
            let counts = work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            sum.iter_mut().zip(counts).for_each(|(sum, count)| *sum += count);
        }
        Ok(sum)
    })?;
    println!("decided by nothing, default, rule: {decided:?}");
    ensure!(decided.iter().sum::<usize>() >= pairs, "too few pairs: {decided:?}");
    // Or else the policies would not ask much.
    ensure!(decided.iter().all(|count| *count > pairs / 40), "none, default, rule: {decided:?}");
    Ok(())
}

/// How often nothing, the default, and a rule decided.
fn compare(mut random: Random, world: &World, pairs: usize) -> Result<[usize; 3]> {
    let ask = Ask::load(None)?;
    let mut decided = [0usize; 3];
    let (mut used, mut refused) = (0, 0);
    while used < pairs.div_ceil(PACKETS_EACH * THREADS) {
        let text = random_policy(&mut random, world);
        let policy = Policy::from_toml(&text).with_context(|| text.clone())?;
        match ask.program.maps.set_policy(&policy) {
            // Beyond the limits, and said so.
            Err(error) if error.is::<Refused>() => {
                refused += 1;
                ensure!(refused <= used + 10, "too many are refused: {error:#}");
                continue;
            }
            other => other.with_context(|| text.clone())?,
        }
        used += 1;
        let table: Table = text.parse()?;
        for _ in 0..PACKETS_EACH {
            let syn = random_syn(&mut random, world);
            let expected = reference(&table, &syn, world);
            let answer = ask.about(&syn)?;
            let action = |number| if number == 3 { "drop" } else { "skip" };
            let got = answer.rule.map(|rule| (rule.id, action(rule.action).to_string()));
            ensure_eq!(got, expected, "{syn:?} with\n{text}");
            decided[expected.map_or(0, |(rule, _)| 1 + usize::from(rule > 0))] += 1;
        }
    }
    Ok(decided)
}

/// The same with frames through the classifier itself, as far as a frame can say it: no sender.
pub fn the_classifier_agrees_with_the_reference() -> Result<()> {
    let world = World { cgroups: vec![("/".into(), vec![1])], netns: Netns::current()?.inode() };
    let mut random = Random::seeded()?;
    let mut bench = Bench::load(Settings { netns_ino: world.netns, ..Settings::default() })?;
    let (rounds, mut used, mut refused) = (share_of(100)?, 0, 0);
    while used < rounds {
        let text = random_policy(&mut random, &world);
        match bench.set_policy(&text) {
            // Beyond the limits, and said so.
            Err(error) if error.is::<Refused>() => {
                refused += 1;
                ensure!(refused <= used + 10, "too many are refused: {error:#}");
                continue;
            }
            other => other?,
        }
        used += 1;
        let table: Table = text.parse()?;
        for _ in 0..60 {
            let about = Syn { interface: (world.netns, 1), sender: None, ..random_syn(&mut random, &world) };
            let mut packet = syn();
            (packet.src, packet.dst, packet.sport, packet.dport) =
                (about.src, about.dst, about.src_port, about.port);
            let expected = reference(&table, &about, &world);
            let verdict = match expected.as_ref().map(|(_, action)| &**action) {
                None => Verdict::VERDICT_NO_POLICY,
                Some("drop") => Verdict::VERDICT_DROPPED,
                Some(_) => Verdict::VERDICT_SKIPPED,
            };
            let what = format!("{about:?}: {expected:?} with\n{text}");
            let how = How { mark: about.mark, ..How::default() };
            let dropped = verdict == Verdict::VERDICT_DROPPED;
            bench.expect_untouched_how(&what, &packet.build(), verdict, dropped, how)?;
        }
    }
    Ok(())
}
