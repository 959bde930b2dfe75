//! `--attach`: puts the classifier on interfaces and streams what it does.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

use super::args::{AttachOptions, PolicySource, Scope};
use super::detach;
use crate::events::reader::Reader;
use crate::events::show::{Names, Output, Record};
use crate::events::stream::{self, End};
use crate::events::watch::Watch;
use crate::hooks::clsact::{Attachment, Hooks, remove_unused};
use crate::hooks::link::{find_link, link_header_len};
use crate::hooks::netlink::Link;
use crate::netns::Netns;
use crate::policy::Policy;
use crate::privileges;
use crate::program::{Maps, Program, Settings};
use crate::state::{Instance, Lock, State};
use crate::token::Token;

pub(super) fn run(scope: &Scope, options: &AttachOptions) -> Result<()> {
    let policy = match &options.policy {
        PolicySource::Keep => None,
        PolicySource::Token(token) => Some(Policy::stamp_all(*token)),
        PolicySource::File(path) => Some(Policy::from_file(path)?),
    };
    privileges::check(&format!("attaching to {}", scope.ifaces.join(", ")))?;

    let state = State::create()?;
    let instance = state.instance(&scope.instance);
    let lock = state.lock()?;
    let mut job = Job {
        scope,
        options,
        hooks: Hooks::open(&state)?,
        instance: &instance,
        netns: Netns::current()?.inode(),
        done: Vec::new(),
    };
    let attached = job.targets().and_then(|targets| {
        let reading = if options.quiet { None } else { Some(state.lock_reader(&instance)?) };
        instance.create()?;
        let (maps, note) = job.attach_all(&lock, &targets, policy.as_ref())?;
        Ok((targets, maps, note, reading))
    });
    let (targets, maps, note, reading) = match attached {
        Ok(attached) => attached,
        Err(error) => {
            job.undo(&lock);
            drop(job);
            // Nothing half done stays behind; what was there before is kept.
            remove_unused(&state, &lock, &instance.name).ok();
            state.remove_if_empty(lock).ok();
            return Err(error);
        }
    };

    let links: Vec<Link> = targets.into_iter().map(|target| target.link).collect();
    let names: Names = links.iter().map(|link| ((job.netns, link.index), link.name.clone())).collect();
    let mut output = Output::new(scope.json, names);
    // Before anybody is told that we are attached, so that the stream misses nothing of what follows.
    let reader = if options.quiet { None } else { Some(Reader::open(&maps)?) };
    let told = job.tell(&mut output, &note);
    let netns = job.netns;
    drop((job, lock));
    let Some(mut reader) = reader else {
        return told;
    };

    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("preparing for Ctrl-C")?;
    let mut watch = Watch::start(&state, &instance.name, netns, links)?;
    let end = stream::run(&maps, &mut reader, &mut output, &mut watch, &stop)?;
    let left: Vec<String> = watch.links().iter().map(|link| link.name.clone()).collect();
    drop((watch, reader, reading));
    if options.detach_on_exit && !left.is_empty() {
        detach::remove(scope, &left, true, &state)?;
        let lock = state.lock()?;
        return state.remove_if_empty(lock);
    }
    for name in &left {
        eprintln!("still attached to {name}; remove it with: netoken {} --destroy", scope.flags(name));
    }
    match end {
        End::Asked => Ok(()),
        End::NothingLeft => bail!("streaming: no interface is left that netoken is attached to"),
    }
}

/// An interface that can be attached to.
struct Target {
    link: Link,
    l2_len_bytes: u32,
}

struct Job<'a> {
    scope: &'a Scope,
    options: &'a AttachOptions,
    hooks: Hooks<'a>,
    instance: &'a Instance,
    netns: u32,
    done: Vec<(Link, Attachment)>,
}

impl Job<'_> {
    /// All of them, before anything is changed.
    fn targets(&mut self) -> Result<Vec<Target>> {
        let links = self.hooks.links()?;
        let netns = self.scope.netns.as_deref().unwrap_or_default();
        self.scope
            .ifaces
            .iter()
            .map(|name| {
                let link = find_link(&links, name, netns)?.clone();
                Ok(Target { l2_len_bytes: link_header_len(&link)?, link })
            })
            .collect()
    }

    /// Returns the maps, and what to say of the policy.
    fn attach_all(
        &mut self,
        lock: &Lock,
        targets: &[Target],
        policy: Option<&Policy>,
    ) -> Result<(Maps, String)> {
        let mut ready: Option<(Maps, String)> = None;
        for target in targets {
            let settings = Settings {
                l2_len_bytes: target.l2_len_bytes,
                sample: self.options.sample,
                netns_ino: self.netns,
                option_kind: self.options.option_kind,
                exid: self.options.exid,
                faults: 0,
            };
            let program = Program::load(settings, Some(&self.instance.pins))?;
            let first = ready.is_none();
            let running = program.maps.policy()?.is_some();
            // A policy that runs is replaced when all else has worked; one that does not must be there first.
            if first && !running {
                let default = Policy::stamp_all(Token::DEFAULT);
                program.maps.set_policy(policy.unwrap_or(&default))?;
            }
            let attachment =
                self.hooks.attach(lock, &target.link, &self.instance.name, &program, self.options.place)?;
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
            maps.set_policy(policy)?;
        }
        Ok((maps, note))
    }

    /// Takes back what was newly attached. What was replaced in place goes on stamping.
    fn undo(&mut self, lock: &Lock) {
        for (link, attachment) in std::mem::take(&mut self.done) {
            if !attachment.replaced {
                self.hooks.detach(lock, &link, &self.instance.name).ok();
            }
            if attachment.made_qdisc {
                self.hooks.destroy_clsact(lock, &link).ok();
            }
        }
    }

    fn tell(&self, output: &mut Output, note: &str) -> Result<()> {
        for (link, attachment) in &self.done {
            let Attachment { filter, replaced, made_qdisc } = attachment;
            if output.is_json() {
                output.record(&Record::Attached {
                    interface: &link.name,
                    priority: filter.priority,
                    handle: filter.handle,
                    replaced: *replaced,
                    made_qdisc: *made_qdisc,
                })?;
                continue;
            }
            eprintln!(
                "{} {} egress (priority {}, handle {:#x}){}",
                if *replaced { "replaced in place on" } else { "attached to" },
                link.name,
                filter.priority,
                filter.handle,
                if *made_qdisc { ", made a clsact qdisc for it" } else { "" }
            );
        }
        if !output.is_json() {
            eprintln!("{note}");
        }
        Ok(output.flush()?)
    }
}
