//! A state directory that cannot be, or is not, what it should be.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use nix::mount::{MntFlags, MsFlags};
use nix::sys::signal::Signal;

use crate::lab::{NETOKEN, OBSERVE, Running, wait_until};
use crate::look::{expect_bare, expect_no_state, expect_ours};
use crate::progress::write_policy;
use crate::said::said;
use crate::support::{ensure_eq, sh};
use crate::upgrade::{made, pin_instead};
use crate::world::World;

pub fn a_directory_that_cannot_be_made_is_an_error_with_a_remedy() -> Result<()> {
    let world = World::new()?;
    for dir in ["/proc/xyz", "/etc/hostname/below", "/sys/xyz", "/sys"] {
        let mut command = world.lab.netoken(&world.args("-i c0 --attach --quiet"));
        said(command.env("NETOKEN_RUN", dir))?.code(1)?.err(&[dir, "NETOKEN_RUN"]).context(dir)?;
        expect_bare(&world.ns, "c0")?;
    }
    Ok(())
}

/// Who can make links there could have root write through them.
pub fn a_directory_of_others_is_refused() -> Result<()> {
    let world = World::new()?;
    let dir = world.lab.run.join("theirs");
    let precious = world.lab.run.join("precious");
    fs::write(&precious, "precious")?;
    fs::create_dir(&dir)?;
    symlink(&precious, dir.join("lock"))?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let commands = [
        world.args("-i c0 --attach --quiet"),
        world.args("-i c0 --destroy"),
        world.args("--query"),
        format!("guard --netns {} -i c0 --attach --rules {}", world.ns, rules.display()),
        "guard --query".to_string(),
        "guard --show".to_string(),
        "policy show".to_string(),
    ];
    let refused = |dir: &Path, what: &[&str]| {
        for args in &commands {
            said(world.lab.netoken(args).env("NETOKEN_RUN", dir))?
                .code(1)?
                .err(what)
                .context(args.clone())?;
        }
        expect_bare(&world.ns, "c0")
    };
    let shown = dir.display().to_string();
    for (owner, mode, why) in [(0, 0o1777, "mode 1777"), (0, 0o770, "mode 770"), (65534, 0o700, "user 65534")]
    {
        chown(&dir, Some(owner), None)?;
        fs::set_permissions(&dir, Permissions::from_mode(mode))?;
        refused(&dir, &[&shown, why, "NETOKEN_RUN", "chmod"])?;
    }
    // A link is refused wherever it leads, and whatever stands behind its name.
    let link = world.lab.run.join("link");
    let inner = world.lab.run.join("inner");
    fs::create_dir(&inner)?;
    fs::set_permissions(&inner, Permissions::from_mode(0o700))?;
    for to in [&inner, &world.lab.run.join("nowhere")] {
        symlink(to, &link)?;
        for name in [link.clone(), link.join(""), link.join(".")] {
            let shown = format!("{}: it is a symbolic link", link.display());
            refused(&name, &[&shown, "remove it", "NETOKEN_RUN"])?;
        }
        fs::remove_file(&link)?;
    }
    ensure_eq!(fs::read_dir(&inner)?.count(), 0, "what is where the link led");
    ensure_eq!(fs::read_to_string(&precious)?, "precious", "what the link leads to");
    Ok(())
}

/// Also where the command runs in a mount namespace of its own and the state is made in the first one.
pub fn a_relative_directory_is_below_the_current_one() -> Result<()> {
    let world = World::new()?;
    for name in ["below", "./deeper/below"] {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &world.ns, NETOKEN, "-i", "c0", "--attach", "--quiet"]);
        said(command.current_dir(&world.lab.run).env("NETOKEN_RUN", name))?.code(0).context(name)?;
        ensure!(world.lab.run.join(name).join("bpf/default").exists(), "{name} is not where it should be");
        let mut command = world.lab.netoken(&world.args("-i c0 --destroy"));
        said(command.current_dir(&world.lab.run).env("NETOKEN_RUN", name))?.code(0).context(name)?;
        expect_bare(&world.ns, "c0")?;
    }
    Ok(())
}

pub fn a_name_that_is_no_utf8_is_a_name() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let dir = crate::rules::dir()?;
    let path = dir.path().join(OsStr::from_bytes(b"b\xfcro.toml"));
    fs::write(&path, "default = { action = 'stamp', token = '2222222222222222' }\n")?;
    said(world.lab.netoken("policy load").arg(&path))?.code(0)?;
    world.expect_token("2222222222222222", "the token")?;
    let mut stream = Running::start(world.lab.netoken(&world.args("-i c0 --attach --policy")).arg(&path))?;
    stream.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
    stream.signal(Signal::SIGINT)?;
    ensure_eq!(stream.end()?.0, Some(0), "exit code");
    Ok(())
}

/// A file system that is small, until it is dropped.
struct Small<'a>(&'a Path);

impl Drop for Small<'_> {
    fn drop(&mut self) {
        nix::mount::umount2(self.0, MntFlags::MNT_DETACH).ok();
    }
}

pub fn a_directory_that_is_full_is_named_and_the_policy_stays() -> Result<()> {
    let world = World::new()?;
    let dir = &world.lab.run;
    nix::mount::mount(Some("tmpfs"), dir, Some("tmpfs"), MsFlags::empty(), Some("size=64k,mode=0700"))?;
    let _small = Small(dir);
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    let rules: String = (0..2000)
        .map(|n| format!("[[rule]]\nname = 'rule-{n}'\nport = {}\naction = 'skip'\n", n + 1))
        .collect();
    let elsewhere = crate::rules::dir()?;
    let path = crate::rules::write(elsewhere.path(), "p.toml", &rules)?;
    let shown = dir.join("default.policy/2.toml");
    said(&mut world.lab.netoken(&format!("policy load {}", path.display())))?
        .code(1)?
        .err(&[&format!("writing {}", shown.display()), "No space left on device"])?;
    world.expect_token("1111111111111111", "the token as before")?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")
}

/// What fails is a map, as a kernel that is really so old is not to be had. What the kernel says of its age it says
/// itself: by this personality it is a 2.6.
pub fn a_kernel_that_is_too_old_is_named() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    world.ok("-i c0 --detach")?;
    // From outside it looks as it should, and what it holds is too small.
    let small = made(MapType::Array, 4, 1, None)?;
    pin_instead(&world, "policies", made(MapType::ArrayOfMaps, 4, 1, Some(&small))?)?;
    let mut command = Command::new("setarch");
    command.args(["--uname-2.6", NETOKEN]).env("NETOKEN_RUN", &world.lab.run);
    command.args(world.args("-i c0 --attach --quiet").split_whitespace());
    said(&mut command)?.code(1)?.err(&[
        "loading the classifier",
        "this kernel is 2.6.",
        "needs 5.10 or later",
    ])?;
    expect_ours(&world.ns, "c0", 0)
}

pub fn a_query_names_a_broken_instance() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    fs::remove_file(world.lab.run.join("bpf/default/policies"))?;
    let said = said(&mut world.lab.netoken(&world.args("-i c0 --query")))?.code(1)?;
    ensure!(said.err.contains("instance 'default'") && said.err.contains("policies"), "{said:#?}");
    // The next attach repairs it, and of another instance it is told how.
    world.ok("-i c0 --attach --quiet")?;
    world.ok("-i c0 --attach --quiet --instance blue")?;
    fs::remove_file(world.lab.run.join("bpf/blue/policies"))?;
    let why = world.fails("-i c0 --query --instance blue")?;
    ensure!(why.contains("netoken --iface NAME --instance blue --attach"), "{why}");
    world.ok("-i c0 --destroy --instance blue")?;
    expect_ours(&world.ns, "c0", 1)?;
    expect_ours(&world.ns, "c0", 1)?;
    world.ok("-i c0 --query").map(drop)
}

/// What is attached goes on without its state, and a query that does not find that says that nothing is there.
pub fn a_query_finds_what_is_attached_without_its_state() -> Result<()> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    let guard = |args: &str| format!("guard --netns {} -i c0 {args}", world.ns);
    world.lab.ok(&guard(&format!("--attach --hook tc --rules {}", rules.display())))?;
    nix::mount::umount(&world.lab.run.join("bpf"))?;
    // It is replaced and removed as one of any instance.
    let of_blue = world.args("-i c0 --query --instance blue");
    for query in [world.args("--query"), world.args("-i c0 --query"), guard("--query"), of_blue] {
        let out = world.lab.ok(&query)?;
        ensure!(
            out.contains("(pins lost)") && out.contains("its policy and counters are not in"),
            "{query}: {out}"
        );
    }
    // And an attach begins with the policy that is remembered, and says what is gone.
    let attached = said(&mut world.lab.netoken(&world.args("-i c0 --attach --quiet")))?.code(0)?;
    ensure!(attached.err.contains("takes the place of a program whose counters were lost"), "{attached:#?}");
    world.expect_token("1111111111111111", "the token that is remembered")?;
    nix::mount::umount(&world.lab.run.join("bpf"))?;
    // What is said there helps.
    world.lab.ok(&guard("--destroy"))?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")
}

/// A stamp and a guard on c0, both without their state. Beside the filter of somebody else no stamp can have priority 20,
/// and c1 takes no guard.
fn without_pins(world: &World) -> Result<()> {
    world.second_cable()?;
    sh(&format!("tc -n {} qdisc add dev c1 ingress", world.ns))?;
    let slots = "slots = { length = 8, behind = 2, ahead = 1 }\n";
    let rules = world.lab.file("guard.toml", format!("{slots}{OBSERVE}"))?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    let add = format!("tc -n {} filter add dev c0 egress pref 20", world.ns);
    sh(&format!("{add} protocol ip u32 match ip dst 192.0.2.1/32 classid 1:1"))?;
    let guard = format!("guard --netns {} -i c0 --attach --hook tc --rules {}", world.ns, rules.display());
    world.lab.ok(&guard)?;
    Ok(nix::mount::umount(&world.lab.run.join("bpf"))?)
}

/// What is remembered is what it will go by when it is attached again.
pub fn an_attach_that_fails_without_the_pins_forgets_nothing() -> Result<()> {
    let world = World::new()?;
    without_pins(&world)?;
    let guard = |args: &str| said(&mut world.lab.netoken(&format!("guard --netns {} {args}", world.ns)));
    world.fails("-i c0 --attach --quiet --priority 20 --token 2222222222222222")?;
    guard("-i c0 -i c1 --attach --hook tc")?.code(1)?.err(&["ingress qdisc"])?;
    let others = world.lab.file("others.toml", OBSERVE.replace("'all'", "'others'"))?;
    guard(&format!("-i c0 -i c1 --attach --hook tc --rules {}", others.display()))?.code(1)?;

    let attached = guard("-i c0 --attach")?.code(0)?;
    attached.err(&["c0: it takes the place of a program whose counters were lost"])?;
    let shown = guard("--show")?.code(0)?.out;
    for expected in ["rule 1 'all'", "slots = { length = 8, behind = 2, ahead = 1 }"] {
        ensure!(shown.contains(expected), "'{expected}' expected: {shown}");
    }
    said(&mut world.lab.netoken(&world.args("-i c0 --attach --quiet")))?
        .code(0)?
        .err(&["policy: as instance 'default' had it"])?;
    world.expect_token("1111111111111111", "the token that is remembered")
}

/// Whoever attaches next begins with nothing.
pub fn what_is_destroyed_without_its_pins_is_forgotten() -> Result<()> {
    let world = World::new()?;
    without_pins(&world)?;
    // What the guard goes by, and may want to go on with.
    let destroyed = said(&mut world.lab.netoken(&world.args("-i c0 --destroy")))?.code(0)?;
    destroyed.err(&["still used by its guard"])?;
    ensure!(world.lab.run.join("default.guard").exists(), "the rules of what is attached are forgotten");
    world.lab.ok(&format!("guard --netns {} -i c0 --destroy", world.ns))?;
    expect_no_state(&world.lab)
}

/// As if it had been killed while it wrote down the policy that was to be the first.
pub fn what_a_killed_attach_began_to_remember_is_no_policy() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    world.ok("-i c0 --detach")?;
    let policies = MapHandle::from_pinned_path(world.lab.run.join("bpf/default/policies"))?;
    policies.delete(&0u32.to_ne_bytes())?;
    fs::remove_file(world.lab.run.join("default.policy/1.json"))?;
    world.ok("-i c0 --attach --quiet")?;
    world.expect_token("4e45544f4b454e31", "the default token")
}

/// Kills a command once it has written down a policy or rules and before they are in use, of which it takes the longer the
/// more there are. False if that moment was missed.
pub fn kill_while_it_fills(
    command: &mut Command,
    remembered: &Path,
    number: u64,
    is_in_use: impl FnOnce() -> Result<bool>,
) -> Result<bool> {
    let mut running = Running::start(command)?;
    wait_until("the command to write down what it puts into use", || {
        let is_there =
            ["next", "json"].iter().any(|kind| remembered.join(format!("{number}.{kind}")).exists());
        Ok((is_there || running.child.try_wait()?.is_some()).then_some(()))
    })?;
    running.child.kill()?;
    let ended = running.child.wait()?;
    match (ended.signal(), ended.code()) {
        (Some(_), _) => Ok(!is_in_use()?),
        (_, Some(0)) => Ok(false),
        _ => bail!("it failed by itself: {ended}"),
    }
}

/// With ever more to fill, until the moment was not missed.
pub fn with_more_and_more(try_with: impl Fn(usize) -> Result<bool>) -> Result<()> {
    for many in [1 << 16, 1 << 18, 1 << 20] {
        if try_with(many)? {
            return Ok(());
        }
    }
    bail!("even a million were in use before the command could be killed")
}

/// Where a guard is, the instance is there before the stamp has a policy.
pub fn a_policy_of_an_attach_that_was_killed_is_forgotten() -> Result<()> {
    with_more_and_more(|rules| {
        let (world, dir) = (World::new()?, crate::rules::dir()?);
        let guard =
            "[[rule]]\nname = 'all'\ndst = '10.0.0.0/8'\nmode = 'observe'\ntokens = '0000000000000001'\n";
        let guard = crate::rules::write(dir.path(), "guard.toml", guard)?;
        let attach =
            format!("guard --netns {} -i c0 --attach --hook tc --rules {}", world.ns, guard.display());
        world.lab.ok(&attach)?;
        let path = write_policy(dir.path(), rules)?;
        let mut command = world.lab.netoken(&world.args(&format!("-i c0 --attach --quiet --policy {path}")));
        let is_in_use = || {
            let policies = MapHandle::from_pinned_path(world.lab.run.join("bpf/default/policies"))?;
            Ok(policies.lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?.is_some())
        };
        if !kill_while_it_fills(&mut command, &world.lab.run.join("default.policy"), 1, is_in_use)? {
            return Ok(false);
        }
        world.ok("-i c0 --attach --quiet")?;
        world.expect_token("4e45544f4b454e31", "the default token")?;
        Ok(true)
    })
}

/// What ran goes on also when the maps are lost that know which one that was.
pub fn a_policy_of_a_load_that_was_killed_is_forgotten() -> Result<()> {
    with_more_and_more(|rules| {
        let (world, dir) = (World::new()?, crate::rules::dir()?);
        world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
        let path = write_policy(dir.path(), rules)?;
        let mut command = world.lab.netoken(&format!("policy load {path}"));
        let is_in_use = || {
            Ok(!world.lab.ok("policy show --json")?.lines().any(|line| line.contains("\"generation\":1,")))
        };
        if !kill_while_it_fills(&mut command, &world.lab.run.join("default.policy"), 2, is_in_use)? {
            return Ok(false);
        }
        nix::mount::umount(&world.lab.run.join("bpf"))?;
        world.ok("-i c0 --attach --quiet")?;
        world.expect_token("1111111111111111", "the token of what ran")?;
        Ok(true)
    })
}
