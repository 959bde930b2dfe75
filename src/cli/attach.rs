//! `--attach`: puts the classifier on interfaces and streams what it does.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};

use super::args::{AttachOptions, PolicySource, Scope};
use super::detach;
use super::loads::Loads;
use super::policy::{Progress, put as put_policy, read_by as read_policy};
use super::reload::Reload;
use super::signals::Signals;
use super::told::{Before, RISK, filters_remark, lost_note, slots_note};
use crate::clock;
use crate::events::reader::Reader;
use crate::events::rules::RuleNames;
use crate::events::show::{Output, Record};
use crate::events::stream::{self, End};
use crate::events::watch::{Left, Watch};
use crate::files::Files;
use crate::hooks::egress::{Done, Egress, Hook};
use crate::hooks::link::link_header;
use crate::hooks::netlink::{Link, Netlink};
use crate::hooks::tcx;
use crate::hooks::unused::remove_unused_pins;
use crate::keys::file::{HeldKeys, keys_for, keys_unless};
use crate::netns::{Netns, tool};
use crate::pins::Renewal;
use crate::policy::read::Checked;
use crate::policy::{Policy, running};
use crate::privileges;
use crate::program::{LinkHeader, Maps, Program, Settings};
use crate::realtime;
use crate::rings;
use crate::state::{EventsOf, Instance, Lock, ReaderLock, Remembered, State, instance_flag};
use crate::token::Token;
use crate::token::keyed::Slots;

pub(super) fn run(scope: &Scope, options: &AttachOptions) -> Result<()> {
    let progress = Progress::new(scope.json);
    let files = Files::default();
    let given = match &options.policy {
        PolicySource::Keep => None,
        PolicySource::Token(token) => Some(Given::Token(Policy::stamp_all(*token))),
        PolicySource::File(path) => {
            Some(Given::File(path, read_policy(&files, path, options.allow_missing, &progress)?))
        }
    };
    let doing = format!("attaching to {}", scope.ifaces.join(", "));
    privileges::check(&doing)?;
    realtime::check(&doing)?;
    let targets = targets(scope)?;

    let (state, lock) = State::create()?;
    let instance = state.instance(&scope.instance);
    let is_new = !instance.pins.exists();
    let mut job = Job {
        options,
        state: &state,
        instance: &instance,
        is_new,
        keys: None,
        progress: &progress,
        slots: (None, None),
        renewal: None,
        restored: None,
        done: Vec::new(),
    };
    let attached = (|| {
        let rings = given.as_ref().map(|given| given.policy().rings()).unwrap_or_default();
        job.keys = keys_for(&scope.instance, rings)
            .with_context(|| format!("attaching to {}", scope.ifaces.join(", ")))?;
        // Before anything is attached: what a signal ends from here on is taken back, or left by a stream as its end leaves it.
        let signals = Signals::catch(!options.quiet && matches!(given, Some(Given::File(..))))?;
        let attached = job.attach(&lock, &targets, given.as_ref(), &signals)?;
        Ok((attached, signals))
    })();
    let (Attached { maps, reading, note, had_policy }, signals) = match attached {
        Ok(attached) => attached,
        Err(error) => return Err(job.give_up(lock, error)),
    };
    let links: Vec<Link> = targets.into_iter().map(|target| target.link).collect();
    let prepared = match options.quiet {
        true => Ok(None),
        false => Stream::prepare(&state, &instance, &maps, links).map(Some),
    };
    let prepared = prepared.and_then(|stream| {
        let output = Output::new(scope.json, RuleNames::of(&instance), Arc::clone(&signals.stop))
            .context("preparing standard output")?;
        running::confirm(&instance, &maps)?;
        if options.quiet {
            signals.go_on(&doing)?;
        }
        // Last of all, so that no failure leaves another policy than there was.
        if had_policy {
            given.as_ref().map_or(Ok(()), |given| given.put(&instance, &maps, &progress))?;
        }
        job.set_slots(&maps)?;
        Ok((stream, output, job.renewal.take().and_then(Renewal::finish)))
    });
    let (stream, mut output, taken_over) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            drop(reading);
            return Err(job.give_up(lock, error));
        }
    };

    // Who listens may take their time, and nobody else has to wait for that. A stream may run for months, and has no use for
    // secrets.
    drop((job.keys.take(), lock));
    if let Some(taken_over) = taken_over {
        note!("instance '{}': {taken_over}", instance.name);
    }
    let told = job.tell(&mut output, &note).context("writing to standard output");
    if given.is_none() {
        tell_stale(&instance, &maps);
    }
    drop(job);
    let Some(mut stream) = stream else {
        return told;
    };
    let identity = stream.watch.identity();
    let mut reload = match &given {
        Some(Given::File(path, _)) => {
            let load = |files: &Files| {
                let progress = Progress::none();
                let checked = read_policy(files, path, options.allow_missing, &progress)?;
                let doing = "loading the policy again";
                let (state, lock) = State::create_unless(Some(&signals.stop)).context(doing)?;
                if instance.identity(EventsOf::Stamp) != identity {
                    // What there was to lock may have been made for that alone.
                    state.remove_if_empty(lock)?;
                    bail!("{doing}: instance '{}' was destroyed", instance.name);
                }
                let rings = checked.policy.rings();
                if !rings.is_empty() {
                    let keys = keys_unless(Some(&signals.stop), &scope.instance, rings.iter().copied());
                    let load = |keys: HeldKeys| rings::load(&instance, &maps.keys, &keys, rings);
                    keys.context(doing)?.map_or(Ok(()), load)?;
                }
                put_policy(&instance, &maps, &checked, path, &progress)?;
                Ok(checked.policy.summary())
            };
            Some(Reload::new("policy", files, options.watch, &signals, load))
        }
        _ => None,
    };
    // If the telling failed, so will the stream, at once and for the same reason.
    let mut each_look = || {
        reload.iter_mut().for_each(Reload::look);
        Ok(())
    };
    let end =
        stream::run(&maps, &mut stream.reader, &mut output, &mut stream.watch, &signals.stop, &mut each_look);
    let Stream { reader, watch } = stream;
    let left = watch.end();
    drop((reader, reading));
    leave(scope, options, &instance, &left, &signals.stop)?;
    match end? {
        End::Asked => Ok(()),
        End::NothingLeft => bail!("streaming: no interface is left here that netoken is attached to"),
        End::Destroyed => bail!("streaming: instance '{}' was destroyed", instance.name),
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
        instance: &'a Instance,
        maps: &'a Maps,
        links: Vec<Link>,
    ) -> Result<Stream<'a>> {
        let watch = Watch::start(state, instance, links)?;
        Ok(Stream { reader: Reader::open(maps)?, watch })
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

    fn put(&self, instance: &Instance, maps: &Maps, progress: &Progress) -> Result<()> {
        match self {
            Given::Token(policy) => running::load(instance, maps, policy, "the command line", None)?,
            Given::File(path, checked) => put_policy(instance, maps, checked, path, progress)?,
        };
        Ok(())
    }
}

/// Removes all of it, or says how to.
fn leave(
    scope: &Scope,
    options: &AttachOptions,
    instance: &Instance,
    left: &Left,
    stop: &AtomicBool,
) -> Result<()> {
    if options.detach_on_exit {
        // What ended the stream is done with: another signal ends the wait for other commands.
        stop.store(false, Ordering::Relaxed);
        let locked = State::create_unless(Some(stop))
            .with_context(|| format!("detaching from {}", scope.ifaces.join(", ")));
        let (state, lock) = locked.inspect_err(|_| still_attached(scope, left))?;
        return detach::remove(scope, left, &state, lock);
    }
    if !left.is_replaced_by(instance) {
        still_attached(scope, left);
    }
    Ok(())
}

fn still_attached(scope: &Scope, left: &Left) {
    for watched in &left.links {
        let name = &watched.link.name;
        note!("still attached to {name}; remove it with: netoken {} --destroy", scope.flags(name));
    }
}

/// An interface that can be attached to.
struct Target {
    link: Link,
    link_header: LinkHeader,
}

/// What an attach leads to.
struct Attached {
    maps: Maps,
    /// The right to read their events.
    reading: Option<ReaderLock>,
    /// What to say of the policy.
    note: String,
    /// The instance had a policy before.
    had_policy: bool,
}

struct Job<'a> {
    options: &'a AttachOptions,
    state: &'a State,
    instance: &'a Instance,
    /// It had no pins before.
    is_new: bool,
    /// Until all is done: what a rotation gave to maps that an attach takes back would be lost with them.
    keys: Option<HeldKeys>,
    progress: &'a Progress,
    /// Before and now.
    slots: (Option<Slots>, Option<Slots>),
    renewal: Option<Renewal>,
    /// The number of the policy that was remembered last, if the maps had none.
    restored: Option<Option<u64>>,
    /// With what to say of the place that the program takes.
    done: Vec<(Link, Done, Vec<String>)>,
}

/// All of them, before anything is changed.
fn targets(scope: &Scope) -> Result<Vec<Target>> {
    let links = Netlink::connect()?.links()?;
    let target = |link: Link| Ok(Target { link_header: link_header(&link)?, link });
    scope.find(&links)?.into_iter().map(target).collect()
}

impl Job<'_> {
    /// Attaches to all of them. A policy that runs is left to be replaced when all else has worked; one that does
    /// not must be there first.
    fn attach(
        &mut self,
        lock: &Lock,
        targets: &[Target],
        given: Option<&Given<'_>>,
        signals: &Signals,
    ) -> Result<Attached> {
        let reading = if self.options.quiet {
            None
        } else {
            Some(self.state.lock_reader(self.instance, EventsOf::Stamp)?)
        };
        self.instance.create()?;
        self.renewal = Some(self.instance.renew(Program::wanted_maps()?)?);
        let mut note = None;
        let mut had_policy = false;
        let mut hooks = Egress::open(self.state)?;
        let netns_ino = Netns::current()?.inode();
        let load = |settings| Program::load(settings, Some(&self.instance.pins));
        let mut loads = Loads::new();
        for target in targets {
            let (hook, place, name) = (self.options.hook, self.options.place, &self.instance.name);
            let hook = hooks.hook_for(&target.link, name, hook, place)?;
            let ours = hooks.loaded(&target.link, &self.instance.name)?;
            let lost = ours.iter().filter(|loaded| loaded.instance.is_none()).count();
            let before = Before::of(ours.into_iter().next());
            let told = self.options.said.over(&before);
            let settings = Settings {
                link_header: target.link_header,
                sample: told.sample,
                netns_ino,
                option_kind: told.option_kind,
                exid: told.exid,
                mtu_bytes: target.link.mtu_bytes,
                faults: 0,
            };
            let first = note.is_none();
            // At tcx an interface takes its program with it to another namespace, and is found there by that.
            let own;
            let program = if hook == Hook::Tcx && !first {
                own = load(settings)?;
                &own
            } else {
                loads.get(settings.as_read(), load)?
            };
            if first {
                self.renewal.as_mut().map_or(Ok(()), Renewal::carry_over)?;
                // Where nobody goes by others, what is attached begins with these.
                let slots = if self.is_new { self.wanted_slots(&program.maps)? } else { None };
                clock::publish(&program.maps.clock, slots)?;
                let named = given.map(|given| given.policy().rings()).unwrap_or_default();
                let load_keys = |keys| rings::load(self.instance, &program.maps.keys, keys, named);
                self.keys.as_deref().map_or(Ok(()), load_keys)?;
            }
            let mut running = program.maps.policy()?.is_some();
            if first && !running {
                self.restored = Some(Remembered(&self.instance.policy_dir).newest());
            }
            let of_other_version = self.renewal.as_ref().is_some_and(|renewal| renewal.lacks("policies"));
            // What a program went by whose maps are gone may be remembered as well.
            let may_be = (!self.is_new || lost > 0) && running::is_remembered(self.instance);
            if first && !running && given.is_none() && (of_other_version || may_be) {
                running = running::restore(self.instance, &program.maps)?;
            }
            if first && !running {
                let default = Given::Token(Policy::stamp_all(Token::DEFAULT));
                given.unwrap_or(&default).put(self.instance, &program.maps, self.progress)?;
            }
            // Behind what takes time.
            if self.options.quiet {
                signals.go_on(&format!("attaching to {}", target.link.name))?;
            }
            let done = hooks.attach(lock, &target.link, name, program.as_fd(), hook, place)?;
            let notes = lost_note(lost).into_iter().chain(before.note(&told)).collect();
            self.done.push((target.link.clone(), done, notes));
            if first {
                note = Some(match (given, running) {
                    (Some(given), _) => format!("policy: {}", given.policy().summary()),
                    (None, true) => format!("policy: as instance '{}' had it", self.instance.name),
                    (None, false) => format!(
                        "policy: stamp every SYN with the default token {} (--token or --policy changes it)",
                        Token::DEFAULT
                    ),
                });
                had_policy = running;
            }
        }
        let first = note.zip(loads.into_first());
        let (note, Program { maps, .. }) = first.context("there is no interface to attach to")?;
        Ok(Attached { maps, reading, note, had_policy })
    }

    /// To be done when all else has worked: who makes and checks tokens already goes by these at once.
    fn set_slots(&mut self, maps: &Maps) -> Result<()> {
        self.slots = clock::change_slots(&maps.clock, self.wanted_slots(maps)?)?;
        Ok(())
    }

    /// Nothing is said of which of them are accepted: that is for the guard to say.
    fn wanted_slots(&self, maps: &Maps) -> Result<Option<Slots>> {
        let now = clock::slots(&clock::published(&maps.clock)?).unwrap_or_default();
        let wanted = |length_s| Slots::new(length_s, now.behind(), now.ahead());
        self.options.slot_s.map(wanted).transpose()
    }

    /// Takes back what was done; returns the reason. Nothing half done stays behind, and what was there before
    /// is kept.
    fn give_up(mut self, lock: Lock, reason: anyhow::Error) -> anyhow::Error {
        self.undo(&lock);
        if self.restored.is_some() {
            // Beside a guard the maps stay, and the next attach would go by a policy of which nothing is remembered.
            let removed = self.instance.maps().and_then(|maps| maps.remove_policy());
            if let Err(error) = removed {
                note!("netoken: {error:#}");
            }
        }
        drop(self.renewal.take());
        if let Some(number) = self.restored {
            Remembered(&self.instance.policy_dir).forget_newer(number);
        }
        if self.is_new {
            remove_unused_pins(self.state, &lock, &self.instance.name).ok();
        }
        self.state.remove_if_empty(lock).ok();
        reason
    }

    /// Last things first.
    fn undo(&mut self, lock: &Lock) {
        for (link, done, _) in std::mem::take(&mut self.done).iter().rev() {
            let undone = Egress::open(self.state)
                .and_then(|mut hooks| hooks.undo(lock, link, &self.instance.name, done));
            if let Err(error) = undone {
                note!("netoken: {error:#}");
            }
        }
    }

    fn tell(&self, output: &mut Output, note: &str) -> Result<()> {
        for (link, done, notes) in &self.done {
            let (replaced, made_qdisc) = (done.replaced(), done.made_qdisc());
            if output.is_json() {
                output.record(&Record::Attached {
                    interface: &link.name,
                    hook: done.hook().name(),
                    priority: done.filter().map(|filter| filter.priority),
                    handle: done.filter().map(|filter| filter.handle),
                    replaced,
                    made_qdisc,
                })?;
            } else {
                note!("{}", told(link, done));
            }
            if let Some(remark) = tcx::remark(done.tcx_before(), RISK, done.hook().to_the_front()) {
                note!("{}: {remark}", link.name);
            }
            if let Some(remark) = filters_remark(done.filters_before(), RISK) {
                note!("{}: {remark}", link.name);
            }
            if !link.is_up {
                note!("{} is down: nothing leaves by it until: {} link set {0} up", link.name, tool("ip"));
            }
            notes.iter().for_each(|note| note!("{}: {note}", link.name));
            if self.options.detach_on_exit && (replaced || done.moved()) {
                note!(
                    "{} was stamped before, and will not be when this ends: --detach-on-exit removes it as well",
                    link.name
                );
            }
        }
        if let Some(changed) = slots_note(&self.instance.name, self.slots) {
            note!("{changed}");
        }
        if !output.is_json() {
            note!("{note}");
        }
        Ok(output.flush()?)
    }
}

/// A policy that was kept may be about interfaces that are gone, or that are others now. All else is done: that this cannot
/// be found out is no failure.
fn tell_stale(instance: &Instance, maps: &Maps) {
    let (stale, source) = running::stale_interfaces(instance, maps).unwrap_or_default();
    let [first, others @ ..] = &stale[..] else { return };
    let flag = instance_flag(&instance.name);
    let more = if others.is_empty() { String::new() } else { format!(" (and {} more)", others.len()) };
    note!(
        "instance '{}': its policy does not mean what it says any more: {first}{more}; load it again: netoken policy \
         load FILE{flag} (it is from {source}); netoken policy show{flag} marks the rules",
        instance.name
    );
}

/// What was done on one interface.
fn told(link: &Link, done: &Done) -> String {
    let name = &link.name;
    let what = match (done.replaced(), done.moved()) {
        (true, _) => format!("replaced in place on {name} egress"),
        (false, true) => format!("moved on {name} egress"),
        (false, false) => format!("attached to {name} egress"),
    };
    let Some(filter) = done.filter() else { return format!("{what}, at tcx") };
    let qdisc = if done.made_qdisc() { ", made a clsact qdisc for it" } else { "" };
    format!("{what} (priority {}, handle {:#x}){qdisc}", filter.priority, filter.handle)
}
