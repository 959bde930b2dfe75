//! `--attach`: puts the classifier on interfaces and streams what it does.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result, bail};

use super::args::{AttachOptions, PolicySource, Scope};
use super::detach;
use super::policy::{Progress, put as put_policy, read as read_with_progress};
use super::reload::Reload;
use crate::events::reader::Reader;
use crate::events::show::{Names, Output, Record};
use crate::events::stream::{self, End};
use crate::events::watch::Watch;
use crate::hooks::clsact::{Attachment, Hooks, remove_unused};
use crate::hooks::link::link_header_len;
use crate::hooks::netlink::{Link, Netlink};
use crate::netns::Netns;
use crate::policy::read::Checked;
use crate::policy::{Policy, running};
use crate::privileges;
use crate::program::{Maps, Program, Settings};
use crate::state::{Instance, Lock, ReaderLock, State};
use crate::token::Token;

pub(super) fn run(scope: &Scope, options: &AttachOptions) -> Result<()> {
    let given = match &options.policy {
        PolicySource::Keep => None,
        PolicySource::Token(token) => Some(Given::Token(Policy::stamp_all(*token))),
        PolicySource::File(path) => Some(Given::File(path, read_policy(path, options.allow_missing)?)),
    };
    privileges::check(&format!("attaching to {}", scope.ifaces.join(", ")))?;
    let targets = targets(scope)?;

    let (state, lock) = State::create()?;
    let instance = state.instance(&scope.instance);
    let is_new = !instance.pins.exists();
    let mut job = Job { options, state: &state, instance: &instance, done: Vec::new() };
    let (maps, reading, note) = match job.attach(&lock, &targets, given.as_ref()) {
        Ok(attached) => attached,
        Err(error) => {
            job.undo(&lock);
            // Nothing half done stays behind; what was there before is kept.
            if is_new {
                remove_unused(&state, &lock, &instance.name).ok();
            }
            state.remove_if_empty(lock).ok();
            return Err(error);
        }
    };

    let links: Vec<Link> = targets.into_iter().map(|target| target.link).collect();
    let netns = Netns::current()?.inode();
    let names: Names = links.iter().map(|link| ((netns, link.index), link.name.clone())).collect();
    let mut output = Output::new(scope.json, names);
    // Before anybody is told that we are attached, so that the stream misses nothing of what follows.
    let reader = if options.quiet { None } else { Some(Reader::open(&maps)?) };
    let told = job.tell(&mut output, &note).context("writing to standard output");
    drop((job, lock));
    let Some(mut reader) = reader else {
        return told;
    };

    let signals = Signals::catch(given.as_ref())?;
    let mut reload = match given {
        Some(Given::File(path, checked)) => {
            Some(Reload::new(path, options, &instance, &maps, checked.files, &signals.reload))
        }
        _ => None,
    };
    let mut watch = Watch::start(&state, &instance.name, netns, links)?;
    // If the telling failed, so will the stream, at once and for the same reason.
    let mut each_look = || reload.as_mut().map_or(Ok(()), Reload::look);
    let end = stream::run(&maps, &mut reader, &mut output, &mut watch, &signals.stop, &mut each_look);
    let left: Vec<String> = watch.links().iter().map(|link| link.name.clone()).collect();
    drop((watch, reader, reading));
    leave(scope, options, &left)?;
    match end? {
        End::Asked => Ok(()),
        End::NothingLeft => bail!("streaming: no interface is left that netoken is attached to"),
    }
}

/// A policy that the command line gives.
enum Given<'a> {
    Token(Policy),
    File(&'a Path, Checked),
}

impl Given<'_> {
    fn policy(&self) -> &Policy {
        match self {
            Given::Token(policy) => policy,
            Given::File(_, checked) => &checked.policy,
        }
    }

    fn put(&self, instance: &Instance, maps: &Maps) -> Result<()> {
        match self {
            Given::Token(policy) => running::load(instance, maps, policy, "the command line", None)?,
            Given::File(path, checked) => put_policy(instance, maps, checked, path, &Progress::new())?,
        };
        Ok(())
    }
}

fn read_policy(path: &Path, allow_missing: bool) -> Result<Checked> {
    read_with_progress(path, allow_missing, &Progress::new())
}

/// What other processes tell this one.
struct Signals {
    stop: Arc<AtomicBool>,
    reload: Arc<AtomicBool>,
}

impl Signals {
    /// Without a file that could be loaded again, SIGHUP ends the stream: the terminal is gone.
    fn catch(given: Option<&Given<'_>>) -> Result<Signals> {
        use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
        let signals = Signals { stop: Arc::default(), reload: Arc::default() };
        let hangup = if let Some(Given::File(..)) = given { &signals.reload } else { &signals.stop };
        for (signal, flag) in [(SIGINT, &signals.stop), (SIGTERM, &signals.stop), (SIGHUP, hangup)] {
            signal_hook::flag::register(signal, Arc::clone(flag)).context("preparing for signals")?;
        }
        Ok(signals)
    }
}

/// Removes all of it, or says how to.
fn leave(scope: &Scope, options: &AttachOptions, left: &[String]) -> Result<()> {
    if options.detach_on_exit {
        return detach::remove(scope, left, true);
    }
    for name in left {
        note!("still attached to {name}; remove it with: netoken {} --destroy", scope.flags(name));
    }
    Ok(())
}

/// An interface that can be attached to.
struct Target {
    link: Link,
    l2_len_bytes: u32,
}

struct Job<'a> {
    options: &'a AttachOptions,
    state: &'a State,
    instance: &'a Instance,
    done: Vec<(Link, Attachment)>,
}

/// All of them, before anything is changed.
fn targets(scope: &Scope) -> Result<Vec<Target>> {
    let links = Netlink::connect()?.links()?;
    let target = |link: Link| Ok(Target { l2_len_bytes: link_header_len(&link)?, link });
    scope.find(&links)?.into_iter().map(target).collect()
}

impl Job<'_> {
    /// Returns the maps, the right to read their events, and what to say of the policy.
    fn attach(
        &mut self,
        lock: &Lock,
        targets: &[Target],
        given: Option<&Given<'_>>,
    ) -> Result<(Maps, Option<ReaderLock>, String)> {
        let reading = if self.options.quiet { None } else { Some(self.state.lock_reader(self.instance)?) };
        self.instance.create()?;
        let (maps, note) = self.attach_all(lock, targets, given)?;
        Ok((maps, reading, note))
    }

    /// Returns the maps, and what to say of the policy.
    fn attach_all(
        &mut self,
        lock: &Lock,
        targets: &[Target],
        given: Option<&Given<'_>>,
    ) -> Result<(Maps, String)> {
        let mut ready: Option<(Maps, String, bool)> = None;
        let mut hooks = Hooks::open(self.state)?;
        let netns_ino = Netns::current()?.inode();
        for target in targets {
            let settings = Settings {
                l2_len_bytes: target.l2_len_bytes,
                sample: self.options.sample,
                netns_ino,
                option_kind: self.options.option_kind,
                exid: self.options.exid,
                mtu_bytes: target.link.mtu_bytes,
                faults: 0,
            };
            let program = Program::load(settings, Some(&self.instance.pins))?;
            let first = ready.is_none();
            let running = program.maps.policy()?.is_some();
            // A policy that runs is replaced when all else has worked; one that does not must be there first.
            if first && !running {
                let default = Given::Token(Policy::stamp_all(Token::DEFAULT));
                given.unwrap_or(&default).put(self.instance, &program.maps)?;
            }
            let attachment =
                hooks.attach(lock, &target.link, &self.instance.name, &program, self.options.place)?;
            self.done.push((target.link.clone(), attachment));
            if first {
                let note = match (given, running) {
                    (Some(given), _) => format!("policy: {}", given.policy().summary()),
                    (None, true) => format!("policy: as instance '{}' had it", self.instance.name),
                    (None, false) => format!(
                        "policy: stamp every SYN with the default token {} (--token or --policy changes it)",
                        Token::DEFAULT
                    ),
                };
                ready = Some((program.maps, note, running));
            }
        }
        let (maps, note, running) = ready.context("there is no interface to attach to")?;
        if let Some(given) = given.filter(|_| running) {
            given.put(self.instance, &maps)?;
        }
        Ok((maps, note))
    }

    /// Takes back what was done, last things first.
    fn undo(&mut self, lock: &Lock) {
        for (link, attachment) in std::mem::take(&mut self.done).iter().rev() {
            let undone = Hooks::open(self.state)
                .and_then(|mut hooks| hooks.undo(lock, link, &self.instance.name, attachment));
            if let Err(error) = undone {
                note!("netoken: {error:#}");
            }
        }
    }

    fn tell(&self, output: &mut Output, note: &str) -> Result<()> {
        for (link, attachment) in &self.done {
            let Attachment { filter, made_qdisc, .. } = attachment;
            let replaced = attachment.replaced();
            if output.is_json() {
                output.record(&Record::Attached {
                    interface: &link.name,
                    priority: filter.priority,
                    handle: filter.handle,
                    replaced,
                    made_qdisc: *made_qdisc,
                })?;
                continue;
            }
            note!(
                "{} {} egress (priority {}, handle {:#x}){}",
                if replaced { "replaced in place on" } else { "attached to" },
                link.name,
                filter.priority,
                filter.handle,
                if *made_qdisc { ", made a clsact qdisc for it" } else { "" }
            );
        }
        if !output.is_json() {
            note!("{note}");
        }
        Ok(output.flush()?)
    }
}
