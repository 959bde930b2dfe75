//! `--attach`: puts the classifier on interfaces and streams what it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use libbpf_rs::MapHandle;

use super::args::{AttachOptions, PolicySource, Scope};
use super::detach;
use crate::clock;
use crate::events::reader::Reader;
use crate::events::show::{Names, Output, Record};
use crate::events::stream::{self, End};
use crate::events::watch::Watch;
use crate::hooks::clsact::{Attachment, Hooks, remove_unused};
use crate::hooks::link::link_header;
use crate::hooks::netlink::{Link, Netlink};
use crate::keys::file::KeyDir;
use crate::keys::{self, Key};
use crate::netns::Netns;
use crate::policy::Policy;
use crate::privileges;
use crate::program::{LinkHeader, Maps, Program, Settings};
use crate::state::{Instance, Lock, ReaderLock, State};
use crate::token::Token;

pub(super) fn run(scope: &Scope, options: &AttachOptions) -> Result<()> {
    let policy = match &options.policy {
        PolicySource::Keep => None,
        PolicySource::Token(token) => Some(Policy::stamp_all(*token)),
        PolicySource::File(path) => Some(Policy::from_file(path)?),
    };
    privileges::check(&format!("attaching to {}", scope.ifaces.join(", ")))?;
    let targets = targets(scope)?;
    let keys = load_keys(scope, policy.as_ref())?;

    let (state, lock) = State::create()?;
    let stop = Arc::new(AtomicBool::new(false));
    let instance = state.instance(&scope.instance);
    let is_new = !instance.pins.exists();
    let mut job = Job {
        options,
        state: &state,
        instance: &instance,
        is_new,
        keys: keys.as_deref(),
        done: Vec::new(),
        replaced: None,
    };
    // Before anything is attached: what a signal ends from here on, --detach-on-exit takes away again.
    let ready = if options.quiet { Ok(()) } else { stop_on_signal(&stop) };
    let attached = ready.and_then(|()| job.attach(&lock, &targets, policy.as_ref()));
    let (maps, reading, note) = match attached {
        Ok(attached) => attached,
        Err(error) => return Err(job.give_up(lock, error)),
    };
    let links: Vec<Link> = targets.into_iter().map(|target| target.link).collect();
    let prepared = match options.quiet {
        true => Ok(None),
        false => Stream::prepare(&state, &instance, &maps, links).map(Some),
    };
    let prepared = prepared.and_then(|stream| {
        let names = stream.as_ref().map_or(Names::new(), |stream| stream.watch.names());
        let output =
            Output::new(scope.json, names, Arc::clone(&stop)).context("preparing standard output")?;
        Ok((stream, output))
    });
    let (stream, mut output) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            drop(reading);
            return Err(job.give_up(lock, error));
        }
    };

    let told = job.tell(&mut output, &note).context("writing to standard output");
    // A stream may run for months, and has no use for secrets.
    drop((job, lock));
    drop(keys);
    let Some(mut stream) = stream else {
        return told;
    };
    // If the telling failed, so will the stream, at once and for the same reason.
    let end = stream::run(&maps, &mut stream.reader, &mut output, &mut stream.watch, &stop);
    let left: Vec<String> = stream.watch.links().iter().map(|link| link.name.clone()).collect();
    drop((stream, reading));
    leave(scope, options, &left)?;
    match end? {
        End::Asked => Ok(()),
        End::NothingLeft => bail!("streaming: no interface is left that netoken is attached to"),
    }
}

/// All that the stream needs. Made before anybody is told that we are attached, so that it misses nothing of
/// what follows, and so that an attach whose stream cannot begin is taken back.
struct Stream<'a> {
    reader: Reader<'a>,
    watch: Watch<'a>,
}

impl<'a> Stream<'a> {
    fn prepare(
        state: &'a State,
        instance: &Instance,
        maps: &'a Maps,
        links: Vec<Link>,
    ) -> Result<Stream<'a>> {
        let watch = Watch::start(state, &instance.name, Netns::current()?.inode(), links)?;
        Ok(Stream { reader: Reader::open(maps)?, watch })
    }
}

/// The instance's keys, which must suffice for the policy; nothing if it has no key directory.
fn load_keys(scope: &Scope, policy: Option<&Policy>) -> Result<Option<Vec<Key>>> {
    keys::guard_process()?;
    let dir = KeyDir::of_instance(&scope.instance);
    let keys = dir.load()?;
    for ring in policy.map(Policy::rings).unwrap_or_default() {
        if keys::signer(&keys, ring).is_none() {
            bail!(
                "attaching to {}: the policy makes tokens with key ring '{ring}', of which no key in {} signs; make one \
                 with: netoken key new {ring}",
                scope.ifaces.join(", "),
                dir.path().display()
            );
        }
    }
    Ok(dir.exists().then_some(keys))
}

fn stop_on_signal(stop: &Arc<AtomicBool>) -> Result<()> {
    let flag = Arc::clone(stop);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("preparing for Ctrl-C")
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
    link_header: LinkHeader,
}

struct Job<'a> {
    options: &'a AttachOptions,
    state: &'a State,
    instance: &'a Instance,
    /// The instance was not there before.
    is_new: bool,
    keys: Option<&'a [Key]>,
    done: Vec<(Link, Attachment)>,
    /// The policy that ran before ours took its place, and the maps in which it did.
    replaced: Option<(Maps, MapHandle)>,
}

/// All of them, before anything is changed.
fn targets(scope: &Scope) -> Result<Vec<Target>> {
    let links = Netlink::connect()?.links()?;
    let target = |link: Link| Ok(Target { link_header: link_header(&link)?, link });
    scope.find(&links)?.into_iter().map(target).collect()
}

impl Job<'_> {
    /// Returns the maps, the right to read their events, and what to say of the policy.
    fn attach(
        &mut self,
        lock: &Lock,
        targets: &[Target],
        policy: Option<&Policy>,
    ) -> Result<(Maps, Option<ReaderLock>, String)> {
        let reading = if self.options.quiet { None } else { Some(self.state.lock_reader(self.instance)?) };
        self.instance.create()?;
        let (maps, note) = self.attach_all(lock, targets, policy)?;
        Ok((maps, reading, note))
    }

    /// Returns the maps, and what to say of the policy.
    fn attach_all(
        &mut self,
        lock: &Lock,
        targets: &[Target],
        policy: Option<&Policy>,
    ) -> Result<(Maps, String)> {
        let mut ready: Option<(Maps, String)> = None;
        let mut hooks = Hooks::open(self.state)?;
        let netns_ino = Netns::current()?.inode();
        for target in targets {
            let settings = Settings {
                link_header: target.link_header,
                sample: self.options.sample,
                netns_ino,
                option_kind: self.options.option_kind,
                exid: self.options.exid,
                mtu_bytes: target.link.mtu_bytes,
                faults: 0,
            };
            let program = Program::load(settings, Some(&self.instance.pins))?;
            let first = ready.is_none();
            if first {
                clock::publish(&program.maps.clock, self.options.slots)?;
                self.keys.map_or(Ok(()), |keys| program.maps.keys.load(keys))?;
            }
            let running = program.maps.policy()?.is_some();
            // A policy that runs is replaced when all else has worked; one that does not must be there first.
            if first && !running {
                let default = Policy::stamp_all(Token::DEFAULT);
                program.maps.set_policy(policy.unwrap_or(&default))?;
            }
            let attachment =
                hooks.attach(lock, &target.link, &self.instance.name, &program, self.options.place)?;
            self.done.push((target.link.clone(), attachment));
            if first {
                let note = match (policy, running) {
                    (Some(policy), _) => format!("policy: {}", policy.summary()),
                    (None, true) => format!("policy: as instance '{}' had it", self.instance.name),
                    (None, false) => format!(
                        "policy: stamp every SYN with the default token {} (--token or --policy changes it)",
                        Token::DEFAULT
                    ),
                };
                ready = Some((program.maps, note));
            }
        }
        let (maps, note) = ready.context("there is no interface to attach to")?;
        if let Some(policy) = policy {
            if let Some(running) = maps.policy()? {
                self.replaced = Some((Maps::open(&self.instance.pins)?, running));
            }
            maps.set_policy(policy)?;
        }
        Ok((maps, note))
    }

    /// Takes back what was done; returns the reason. Nothing half done stays behind, and what was there before
    /// is kept.
    fn give_up(mut self, lock: Lock, reason: anyhow::Error) -> anyhow::Error {
        if let Some((maps, policy)) = self.replaced.take()
            && let Err(error) = maps.put_policy(&policy)
        {
            note!("netoken: {error:#}");
        }
        self.undo(&lock);
        if self.is_new {
            remove_unused(self.state, &lock, &self.instance.name).ok();
        }
        self.state.remove_if_empty(lock).ok();
        reason
    }

    /// Last things first.
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
