//! What both queries do: look where programs of ours are attached, show that, and look into the instances, of which one
//! that cannot be read hides nothing of the others.

use std::io::{self, Write};
use std::ops::Not;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::args::Scope;
use super::table::table;
use super::told::{Remarks, Told};
use crate::events::model::since_epoch;
use crate::hooks::link::link_header;
use crate::hooks::loaded::{Loaded, Programs, TRIES, loaded_by};
use crate::hooks::netlink::{Filter, Link, Netlink};
use crate::netns::{Netns, look_into};
use crate::state::{Changing, Instance, State};

/// How long to wait for a command that changes something. One that stands still must not hide what is attached.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often to look whether it has finished.
const PAUSE: Duration = Duration::from_millis(10);

/// What is looked for.
pub(super) struct Kind {
    /// The `type` of its records.
    pub record: &'static str,
    /// What attaches it.
    pub command: &'static str,
    /// What a program may do that sees packets first.
    pub risk: &'static str,
}

/// Where a program of ours is on an interface.
pub(super) struct Place {
    pub hook: &'static str,
    pub program: u32,
    pub loaded: Loaded,
    /// None at tcx and at XDP.
    pub filter: Option<Filter>,
    pub filters_before: usize,
    pub tcx_before: usize,
    /// What puts ours in front of those at tcx.
    pub to_the_front: &'static str,
    /// What else a person has to know.
    pub remark: Option<String>,
}

/// One program of ours on an interface, as `--json` prints it.
#[derive(Serialize)]
pub(super) struct Hook {
    #[serde(rename = "type")]
    record: &'static str,
    /// Name of the network namespace; empty for the one that the command ran in.
    netns: String,
    netns_inode: u32,
    interface: String,
    hook: &'static str,
    program: u32,
    /// None at tcx and at XDP.
    handle: Option<u32>,
    priority: Option<u16>,
    /// None if the pins of its instance are gone.
    instance: Option<String>,
    /// When its program was loaded, RFC 3339 in UTC with seconds.
    since: String,
    /// Foreign filters that see a packet first and may end its way.
    filters_before: usize,
    /// Programs at tcx, in front of all filters.
    tcx_before: usize,
    /// Only if it is so: another version of netoken has loaded it, and no command changes what it goes by.
    #[serde(skip_serializing_if = "Not::not")]
    outdated: bool,
    /// Only if it is so: the device has another link header than its program skips, which finds nothing.
    #[serde(skip_serializing_if = "Not::not")]
    link_changed: bool,
    /// What its program was told; nothing if another version of netoken has loaded it.
    #[serde(flatten)]
    told: Option<Told>,
    #[serde(skip)]
    to_the_front: &'static str,
    #[serde(skip)]
    remark: Option<String>,
}

/// What is attached, and the instances that there are.
pub(super) struct Found {
    pub hooks: Vec<Hook>,
    pub instances: Vec<Instance>,
    /// By which the paths of the instances are valid.
    _state: Option<State>,
}

/// What was read of instances.
pub(super) struct Contents<T> {
    pub held: Vec<Held<T>>,
    /// What failed of those that have a hook.
    pub failed: Vec<anyhow::Error>,
    /// What is to be said of the others.
    notes: Vec<String>,
}

/// Looks for programs of ours: where an interface or a namespace was named only there, else everywhere that has a name.
/// `look` finds those of an interface among all that are loaded. Reads every instance that has a hook and, unless an
/// interface was named, those that have none and are `kept`.
pub(super) fn find<T>(
    scope: &Scope,
    kind: &Kind,
    look: impl Fn(&mut Netlink, &Link, &Programs) -> Result<Vec<Place>>,
    kept: impl Fn(&Instance) -> bool,
    read: impl Fn(&Instance) -> Result<T>,
) -> Result<(Found, Contents<T>)> {
    let deadline = Instant::now() + PATIENCE;
    let looked = loop {
        let before = Changing::now()?;
        let is_late = Instant::now() >= deadline;
        if matches!(before, Changing::Somebody(_)) && !is_late {
            thread::sleep(PAUSE);
            continue;
        }
        let looked = find_now(scope, kind, &look).map(|found| {
            let contents = found.read(scope, &kept, &read);
            (found, contents)
        });
        // What was half done looked like something that is broken.
        match Changing::now()? {
            after @ Changing::Nobody(_) if after == before => break looked,
            after if is_late => {
                note!("{after} has not finished: what it changes may be shown half done");
                break looked;
            }
            _ => {}
        }
    };
    let (found, contents) = looked?;
    contents.notes.iter().for_each(|note| note!("{note}"));
    Ok((found, contents))
}

/// The same once, whoever changes something meanwhile.
fn find_now(
    scope: &Scope,
    kind: &Kind,
    look: impl Fn(&mut Netlink, &Link, &Programs) -> Result<Vec<Place>>,
) -> Result<Found> {
    let places = match scope.ifaces.is_empty() && scope.netns.is_none() {
        true => Netns::all()?,
        false => vec![Netns::current()?],
    };
    let boot =
        SystemTime::now() - clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let named = scope.netns.as_deref().unwrap_or_default();
    let mut known = Known::now()?;
    let hooks = look_into(&places, |netns| {
        let name = if netns.name.is_empty() { named } else { &netns.name };
        let mut netlink = Netlink::connect()?;
        let mut found = Vec::new();
        for link in scope.find_or_all(netlink.links()?)? {
            let mut here = look(&mut netlink, &link, &known.programs)?;
            // Something was attached meanwhile, perhaps ours.
            for _ in 0..TRIES {
                if !known.programs.is_old() {
                    break;
                }
                known = Known::now()?;
                here = look(&mut netlink, &link, &known.programs)?;
            }
            here.retain(|place| scope.wants(place.loaded.instance.as_deref()));
            found.extend(here.into_iter().map(|at| hook(kind.record, name, netns.inode(), &link, at, boot)));
        }
        Ok(found)
    })?;
    Ok(Found { hooks, instances: known.instances, _state: known.state })
}

/// The instances and programs of one moment.
struct Known {
    state: Option<State>,
    instances: Vec<Instance>,
    programs: Programs,
}

impl Known {
    fn now() -> Result<Known> {
        // Also without any: what was attached goes on when its state is lost.
        let state = State::find()?;
        let instances = state.as_ref().map_or(Ok(Vec::new()), State::instances)?;
        let programs = loaded_by(&instances)?;
        Ok(Known { state, instances, programs })
    }
}

fn hook(
    record: &'static str,
    netns: &str,
    netns_inode: u32,
    link: &Link,
    at: Place,
    boot: SystemTime,
) -> Hook {
    Hook {
        record,
        netns: netns.to_string(),
        netns_inode,
        interface: link.name.clone(),
        hook: at.hook,
        program: at.program,
        handle: at.filter.as_ref().map(|filter| filter.handle),
        priority: at.filter.as_ref().map(|filter| filter.priority),
        told: Told::of(&at.loaded),
        outdated: at.loaded.is_outdated,
        link_changed: link_header(link).ok() != Some(at.loaded.link_header),
        since: humantime::format_rfc3339_seconds(since_epoch(boot + at.loaded.loaded_at)).to_string(),
        instance: at.loaded.instance,
        filters_before: at.filters_before,
        tcx_before: at.tcx_before,
        to_the_front: at.to_the_front,
        remark: at.remark,
    }
}

/// An instance, and what was read of it.
pub(super) struct Held<T> {
    pub instance: String,
    /// A program of it was found.
    pub is_attached: bool,
    pub held: T,
}

/// Where such programs are attached of which `is_meant` says by their instance that they matter, for a person.
pub(super) fn places(
    scope: &Scope,
    kind: &Kind,
    look: impl Fn(&mut Netlink, &Link, &Programs) -> Result<Vec<Place>>,
    is_meant: impl Fn(Option<&str>) -> bool,
) -> Result<Vec<String>> {
    let mut found: Vec<String> = find_now(scope, kind, look)?
        .hooks
        .iter()
        .filter(|hook| is_meant(hook.instance.as_deref()))
        .map(|hook| match hook.netns.is_empty() {
            true => hook.interface.clone(),
            false => format!("{} in {}", hook.interface, hook.netns),
        })
        .collect();
    found.dedup();
    Ok(found)
}

impl Found {
    /// Whether a program of that instance was found; of those whose pins are lost, if it is none.
    pub fn has_hook_of(&self, instance: Option<&str>) -> bool {
        self.hooks.iter().any(|hook| hook.instance.as_deref() == instance)
    }

    /// Whether there is an instance of that name, and of that kind.
    pub fn has_instance(&self, name: &str, kept: impl Fn(&Instance) -> bool) -> bool {
        self.instances.iter().any(|instance| instance.name == name && kept(instance))
    }

    fn read<T>(
        &self,
        scope: &Scope,
        kept: impl Fn(&Instance) -> bool,
        read: impl Fn(&Instance) -> Result<T>,
    ) -> Contents<T> {
        let mut done = Contents { held: Vec::new(), failed: Vec::new(), notes: Vec::new() };
        for instance in &self.instances {
            let name = Some(instance.name.as_str());
            let is_attached = self.hooks.iter().any(|hook| hook.instance.as_deref() == name);
            let is_meant = || scope.ifaces.is_empty() && scope.wants(name) && kept(instance);
            if !is_attached && !is_meant() {
                continue;
            }
            match read(instance) {
                Ok(held) => done.held.push(Held { instance: instance.name.clone(), is_attached, held }),
                Err(error) if is_attached => done.failed.push(error),
                // It may have been removed meanwhile; an attach that was killed leaves one without all of its maps.
                Err(error) if instance.pins.exists() => done.notes.push(format!(
                    "netoken: {error:#}; nothing is attached with it here, and the next --attach or --destroy mends it"
                )),
                Err(_) => {}
            }
        }
        done
    }

    /// Shows where it is attached, to a person.
    pub fn table(&self, out: &mut impl Write, kind: &Kind) -> io::Result<()> {
        let heads =
            ["NETNS", "INTERFACE", "HOOK", "PROGRAM", "HANDLE", "PRIORITY", "INSTANCE", "SINCE (UTC)"];
        let none = || "-".to_string();
        let row = |hook: &Hook| {
            [
                if hook.netns.is_empty() { none() } else { hook.netns.clone() },
                hook.interface.clone(),
                hook.hook.to_string(),
                hook.program.to_string(),
                hook.handle.map_or_else(none, |handle| format!("{handle:#x}")),
                hook.priority.map_or_else(none, |priority| priority.to_string()),
                hook.instance.clone().unwrap_or("(pins lost)".to_string()),
                hook.since.clone(),
            ]
        };
        table(out, heads, &self.hooks.iter().map(row).collect::<Vec<_>>())?;
        self.hooks.iter().try_for_each(|hook| {
            let remarks = Remarks {
                command: kind.command,
                netns: &hook.netns,
                interface: &hook.interface,
                instance: hook.instance.as_deref(),
                told: hook.told.as_ref(),
                outdated: hook.outdated,
                link_changed: hook.link_changed,
                filters_before: hook.filters_before,
                tcx_before: hook.tcx_before,
                risk: kind.risk,
                to_the_front: hook.to_the_front,
                remark: hook.remark.as_deref(),
            };
            remarks.write(out)
        })
    }
}
