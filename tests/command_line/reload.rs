//! A process that streams loads its file again: when it is told to, and when the file changes.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::Signal;
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::lab::{Running, wait_until};
use crate::rules::{dir, write};
use crate::support::ensure_eq;
use crate::world::World;

/// A streaming process with a policy file, and a first token that is stamped.
fn stream(world: &World, path: &Path, flags: &str) -> Result<Running> {
    let args = world.args(&format!("-i c0 --attach {flags} --policy {}", path.display()));
    let mut stream = Running::start(&mut world.lab.netoken(&args))?;
    stream.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
    Ok(stream)
}

fn token(text: &str) -> String {
    format!("default = {{ action = 'stamp', token = '{}' }}\n", text.repeat(16))
}

fn expect(world: &World, text: &str) -> Result<()> {
    world.expect_token(&text.repeat(16), "the token after a reload")
}

pub fn sighup_loads_the_file_again() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let path = write(dir.path(), "p.toml", &token("1"))?;
    let mut stream = stream(&world, &path, "")?;
    expect(&world, "1")?;
    write(dir.path(), "p.toml", &token("2"))?;
    expect(&world, "1")?;
    stream.signal(Signal::SIGHUP)?;
    stream.wait_for("the reload", |line| line.contains("policy loaded again: default: stamp 2222"))?;
    expect(&world, "2")?;
    // What is wrong is told and changes nothing, and the process goes on.
    write(dir.path(), "p.toml", "defalt = 1\n")?;
    stream.signal(Signal::SIGHUP)?;
    stream.wait_for("the error", |line| line.contains("p.toml:1:1"))?;
    let now = format!("policy as loaded before; when this is mended: kill -HUP {}", stream.child.id());
    stream.wait_for("what is in use", |line| line.contains("still in use") && line.ends_with(&now))?;
    expect(&world, "2")?;
    // Nor does a file that is cut off.
    write(dir.path(), "p.toml", "")?;
    stream.signal(Signal::SIGHUP)?;
    stream.wait_for("the error", |line| line.contains("neither a rule nor a default"))?;
    expect(&world, "2")?;
    write(dir.path(), "p.toml", &token("3"))?;
    stream.signal(Signal::SIGHUP)?;
    stream.wait_for("the reload", |line| line.contains("stamp 3333"))?;
    expect(&world, "3")?;
    stream.signal(Signal::SIGTERM)?;
    ensure_eq!(stream.end()?.0, Some(0), "exit code");
    Ok(())
}

pub fn watch_notices_every_way_of_changing_a_file() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    // As Kubernetes lays out a ConfigMap: the file is a link through a link to a directory.
    let data = |name: &str, text: &str| -> Result<PathBuf> {
        let data = dir.path().join(name);
        fs::create_dir(&data)?;
        write(&data, "p.toml", text)?;
        Ok(data)
    };
    symlink(data("data-1", &token("1"))?, dir.path().join("..data"))?;
    let path = dir.path().join("p.toml");
    symlink("..data/p.toml", &path)?;
    let mut stream = stream(&world, &path, "--watch")?;
    expect(&world, "1")?;
    let reloaded = |stream: &mut Running, text: &str| -> Result<()> {
        stream.wait_for("the reload", |line| line.contains(&format!("stamp {}", text.repeat(16))))?;
        expect(&world, text)
    };

    symlink(data("data-2", &token("2"))?, dir.path().join("..next"))?;
    fs::rename(dir.path().join("..next"), dir.path().join("..data"))?;
    reloaded(&mut stream, "2")?;
    // In place.
    fs::write(&path, token("3"))?;
    reloaded(&mut stream, "3")?;
    // As an editor does it: a new file takes the name.
    write(dir.path(), "p.toml~", &token("4"))?;
    fs::rename(dir.path().join("p.toml~"), &path)?;
    reloaded(&mut stream, "4")?;
    // Away for a while, and there again.
    fs::remove_file(&path)?;
    let gone = format!("{} is gone; still in use: the policy as loaded before", path.display());
    stream.wait_for("that it is gone", |line| line.contains(&gone))?;
    expect(&world, "4")?;
    write(dir.path(), "p.toml", &token("5"))?;
    reloaded(&mut stream, "5")?;
    // A file that it names.
    write(dir.path(), "list.txt", "192.0.2.1\n")?;
    fs::write(&path, token("6") + "[[rule]]\nname = 'l'\ndst = 'file:list.txt'\naction = 'skip'\n")?;
    reloaded(&mut stream, "6")?;
    write(dir.path(), "list.txt", "10.77.0.2\n")?;
    wait_until("the list to be read", || {
        let syn = world.one_syn()?;
        Ok(crate::world::token(&syn).is_none().then_some(()))
    })
}

/// Opens a pipe for writing when somebody is about to read it.
fn pipe_to(reader: &mut Running, path: &Path) -> Result<File> {
    wait_until("the pipe to be read", || {
        ensure!(reader.child.try_wait()?.is_none(), "it has ended: {:#?}", reader.seen);
        match OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path) {
            Ok(pipe) => Ok(Some(pipe)),
            Err(error) if error.raw_os_error() == Some(Errno::ENXIO as i32) => Ok(None),
            Err(error) => Err(error).context("opening the pipe"),
        }
    })
}

/// A list that is a pipe keeps the process between the two files for as long as it takes.
pub fn a_change_while_files_are_read_is_not_missed() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let pipe = dir.path().join("list");
    mkfifo(&pipe, Mode::S_IRWXU)?;
    let policy = token("1") + "[[rule]]\nname = 'l'\ndst = 'file:list'\naction = 'skip'\n";
    let path = write(dir.path(), "p.toml", &policy)?;
    let args = world.args(&format!("-i c0 --attach --watch --policy {}", path.display()));
    let mut stream = Running::start(&mut world.lab.netoken(&args))?;
    let mut list = pipe_to(&mut stream, &pipe)?;
    write(dir.path(), "p.toml", &token("2"))?;
    list.write_all(b"192.0.2.1\n")?;
    drop(list);
    stream.wait_for("the policy", |line| line.contains("policy: 1 rule, default: stamp 1111"))?;
    stream.wait_for("the reload", |line| line.contains("policy loaded again: default: stamp 2222"))?;
    expect(&world, "2")?;
    // The same for a file that the policy did not name before.
    write(dir.path(), "p.toml", &policy)?;
    let mut list = pipe_to(&mut stream, &pipe)?;
    write(dir.path(), "p.toml", &token("3"))?;
    list.write_all(b"192.0.2.1\n")?;
    drop(list);
    stream.wait_for("the reload", |line| line.contains("policy loaded again: default: stamp 3333"))?;
    expect(&world, "3")?;
    stream.signal(Signal::SIGTERM)?;
    ensure_eq!(stream.end()?.0, Some(0), "exit code");

    let rules = "[[rule]]\nname = 'all'\ndst = '::/0'\nmode = 'observe'\ntokens = '0000000000000001'\n";
    let path = write(dir.path(), "guard.toml", rules)?;
    let shown = path.display();
    world.lab.ok(&format!("guard --netns {} -i c0 --attach --rules {shown}", world.ns))?;
    write(dir.path(), "guard.toml", &format!("exempt_file = 'list'\n{rules}"))?;
    let mut watch = Running::start(&mut world.lab.netoken(&format!("guard --watch --rules {shown}")))?;
    let mut list = pipe_to(&mut watch, &pipe)?;
    write(dir.path(), "guard.toml", rules)?;
    list.write_all(b"192.0.2.1\n")?;
    drop(list);
    watch.wait_for("the rules", |line| line.contains("has new rules: 1 rule, 1 prefix exempt"))?;
    watch.wait_for("the reload", |line| line.contains("rules loaded again: 1 rule, 0 prefixes exempt"))?;
    write(dir.path(), "guard.toml", "[[rul]]\n")?;
    watch.wait_for("the error", |line| line.contains("guard.toml"))?;
    watch.wait_for("what to do", |line| {
        line.contains("still in use: the rules") && line.contains("save the file")
    })?;
    watch.signal(Signal::SIGTERM)?;
    ensure_eq!(watch.end()?.0, Some(0), "exit code");
    Ok(())
}

/// It is mended in the file that is wrong, and not in the one that names it.
pub fn a_list_that_is_mended_is_noticed() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let path = write(dir.path(), "p.toml", &token("1"))?;
    let mut stream = stream(&world, &path, "--watch")?;
    write(
        dir.path(),
        "p.toml",
        &(token("2") + "[[rule]]\nname = 'l'\ndst = 'file:list'\naction = 'skip'\n"),
    )?;
    stream.wait_for("the error", |line| line.contains("reading the list"))?;
    stream.wait_for("what to do", |line| {
        line.contains("still in use: the policy") && line.contains("save the file")
    })?;
    expect(&world, "1")?;
    write(dir.path(), "list", "192.0.2.300\n")?;
    stream.wait_for("the next error", |line| line.contains("list:1:1"))?;
    write(dir.path(), "list", "192.0.2.1\n")?;
    stream.wait_for("the reload", |line| line.contains("policy loaded again: 1 rule"))?;
    expect(&world, "2")
}

/// For another command, which may take long.
pub fn a_reload_that_waits_ends_with_a_signal() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let path = write(dir.path(), "p.toml", &token("1"))?;
    let rules = "[[rule]]\nname = 'all'\ndst = '::/0'\nmode = 'observe'\ntokens = '0000000000000001'\n";
    let rules = write(dir.path(), "guard.toml", rules)?.display().to_string();
    world.lab.ok(&format!("guard --netns {} -i c0 --attach --rules {rules}", world.ns))?;
    for signal in [Signal::SIGTERM, Signal::SIGINT] {
        let stream = stream(&world, &path, "")?;
        let mut watch = Running::start(&mut world.lab.netoken(&format!("guard --watch --rules {rules}")))?;
        watch.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
        for mut process in [stream, watch] {
            let lock = world.lab.hold_lock()?;
            process.signal(Signal::SIGHUP)?;
            process.wait_for("that it waits", |line| line.contains("waiting for"))?;
            process.signal(signal)?;
            let (code, lines) = process.end()?;
            drop(lock);
            ensure_eq!(code, Some(0), "exit code: {lines:#?}");
            let has = |word: &str| lines.iter().any(|line| line.contains(word));
            ensure!(has("stopped while waiting for") && !has("when this is mended"), "{lines:#?}");
        }
    }
    expect(&world, "1")
}

pub fn a_reload_that_waits_for_the_keys_ends_with_a_signal() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    world.lab.ok("key new edge")?;
    let policy = "default = { action = 'stamp', token = { tag = 17, key = 'edge' } }\n";
    let path = write(dir.path(), "p.toml", policy)?;
    let rules = "[[rule]]\nname = 'all'\ndst = '::/0'\nmode = 'observe'\nkeys = 'edge'\n";
    let rules = write(dir.path(), "guard.toml", rules)?.display().to_string();
    world.lab.ok(&format!("guard --netns {} -i c0 --attach --rules {rules}", world.ns))?;
    let stream = stream(&world, &path, "")?;
    let mut watch = Running::start(&mut world.lab.netoken(&format!("guard --watch --rules {rules}")))?;
    watch.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
    for mut process in [stream, watch] {
        let keys = File::open(world.lab.keys().join("default"))?;
        let held = Flock::lock(keys, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        process.signal(Signal::SIGHUP)?;
        process.wait_for("that it waits", |line| line.contains("to finish with the keys"))?;
        process.signal(Signal::SIGTERM)?;
        let (code, lines) = process.end()?;
        drop(held);
        ensure_eq!(code, Some(0), "exit code: {lines:#?}");
    }
    Ok(())
}
