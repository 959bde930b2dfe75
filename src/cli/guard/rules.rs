//! `netoken guard --load`: gives an instance its keys, its slots and its rules.

use std::sync::atomic::AtomicBool;

use anyhow::{Result, bail};

use super::{Lists, Record, of_instance, print_json};
use crate::cli::args::Scope;
use crate::cli::outdated;
use crate::cli::told::slots_note;
use crate::clock;
use crate::guard::program::GuardMaps;
use crate::guard::rules::Rules;
use crate::guard::running;
use crate::hooks::loaded::Role;
use crate::keys::file::{HeldKeys, KeyDir};
use crate::keys::{self, Key};
use crate::note::quoted;
use crate::privileges;
use crate::rings;
use crate::state::{EventsOf, Identity, Instance, State, instance_flag};
use crate::token::keyed::Slots;

/// The instance's keys, which must suffice for the rules; nothing if it has no key directory.
/// Waits for who changes them until `stop` is set.
pub(super) fn load_keys(
    doing: &str,
    instance: &str,
    rules: Option<&Rules>,
    stop: Option<&AtomicBool>,
) -> Result<Option<HeldKeys>> {
    keys::guard_process()?;
    let dir = KeyDir::of_instance(instance);
    let held = dir.hold_unless(stop)?;
    let keys = held.as_deref().unwrap_or_default();
    for ring in rules.map(Rules::rings).unwrap_or_default() {
        if !keys.iter().any(|key| key.ring() == ring && key.is_live()) {
            bail!(
                "{doing}: the rules accept tokens of key ring '{ring}', of which there is no key in {}; copy the key \
                 file of the host that makes them there, or make one with: netoken key new {ring}{}",
                dir.path().display(),
                instance_flag(instance)
            );
        }
    }
    Ok(held)
}

/// Slots before and now.
pub(super) type SlotsChange = (Option<Slots>, Option<Slots>);

/// Gives an instance its keys, its slots and its rules, which are from the file `source`.
pub(super) fn set_rules(
    instance: &Instance,
    maps: &GuardMaps,
    rules: &Rules,
    source: &str,
    keys: Option<&[Key]>,
) -> Result<SlotsChange> {
    keys.map_or(Ok(()), |keys| rings::load(instance, &maps.keys, keys, rules.rings()))?;
    // What fails is the rules, and then the slots are as they were, too.
    running::load(instance, maps, rules, source)?;
    clock::change_slots(&maps.clock, rules.slots)
}

/// What ends the loads of a process that lives on between them.
pub(super) struct Ends<'a> {
    /// It is set by signals.
    pub stop: &'a AtomicBool,
    /// Another instance of the same name is none of its business.
    pub identity: Option<Identity>,
}

/// Puts rules, which are from the file `source`, into use where the guard is attached, and says so.
pub(super) fn load(scope: &Scope, rules: &Rules, source: &str, ends: Option<&Ends<'_>>) -> Result<()> {
    let changed = put(scope, rules, source, ends)?;
    tell_slots(scope, changed);
    if scope.json {
        return print_json(&Record::GuardLoaded {
            instance: &scope.instance,
            rules: rules.rules.len(),
            lists: Lists::of(rules),
        });
    }
    note!("instance '{}' has new rules: {}", scope.instance, rules.summary_now());
    State::find()?.map_or(Ok(()), |state| outdated::tell(&state, &scope.instance, true))
}

/// The same without a word. Returns what became of the slots.
pub(super) fn put(
    scope: &Scope,
    rules: &Rules,
    source: &str,
    ends: Option<&Ends<'_>>,
) -> Result<SlotsChange> {
    let doing = format!("loading rules into instance '{}'", scope.instance);
    privileges::check(&doing)?;
    let stop = ends.map(|ends| ends.stop);
    let (state, lock) = State::create_unless(stop)?;
    let loaded = (|| {
        let keys = load_keys(&doing, &scope.instance, Some(rules), stop)?;
        let instance = state.instance(&scope.instance);
        if ends.is_some_and(|ends| ends.identity != instance.identity(EventsOf::Guard)) {
            bail!("{doing}: it was destroyed");
        }
        let programs = of_instance(&state, &scope.instance)?;
        if programs.is_empty() {
            bail!(
                "{doing}: its guard is not attached; it gets rules when it is: netoken guard {} --attach --rules {}",
                scope.flags("NAME"),
                quoted(source)
            );
        }
        // Where it is attached at XDP there is nothing that could be marked.
        if rules.marks() && programs.iter().any(|p| p.role == Role::GuardXdp) {
            bail!("{doing}: {NO_MARKS}");
        }
        set_rules(&instance, &GuardMaps::open(&instance.pins)?, rules, source, keys.as_deref())
    })();
    state.remove_if_empty(lock)?;
    loaded
}

/// Says it if they have changed.
pub(super) fn tell_slots(scope: &Scope, changed: SlotsChange) {
    if let Some(note) = slots_note(&scope.instance, changed) {
        note!("{note}");
    }
}

pub(super) const NO_MARKS: &str = "mode 'mark' needs an skb, which XDP does not have; attach with --hook tc";
