//! Loads the guard and gives it its rules. The one place that drives the guard's skeleton; what leaves it is file
//! descriptors and typed settings.

use std::collections::BTreeSet;
use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow};
use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, OpenObject};
use plain::Plain;

use super::compile::RingNumbers;
use super::rules::Rules;
use super::sources;
use super::types::{Config, Mode, Size, Table};
use crate::clock;
use crate::guard_skel::types::rodata;
use crate::guard_skel::{GuardSkelBuilder, OpenGuardSkel};
use crate::inner;
use crate::kernel::Kernel;
use crate::keys::RingName;
use crate::keys::live::LiveKeys;
use crate::object::{map, messages, pin_below, settings_among, wanted};
use crate::pins::{Wanted, expect, open};
use crate::program::{DEFAULT_EXID, DEFAULT_KIND};

/// The names that `tc filter show`, `ip link` and `bpftool prog` print.
pub const PROGRAM_NAME: &str = "netoken_guard";
/// The same for interfaces without a link header.
pub const PROGRAM_NAME_L3: &str = "netoken_guard3";
/// The same for XDP.
pub const PROGRAM_NAME_XDP: &str = "netoken_guardx";

// SAFETY: integers and arrays of them, without hidden padding, which guard_types.h asserts.
unsafe impl Plain for Table {}

// SAFETY: the same.
unsafe impl Plain for Config {}

/// What the guard was told that has these maps, as the kernel keeps it; nothing if another version of netoken has
/// loaded it.
pub(crate) fn config_among(map_ids: &[u32]) -> Option<Config> {
    static LEN_BYTES: OnceLock<Option<u32>> = OnceLock::new();
    let len_bytes = *LEN_BYTES.get_or_init(|| {
        let mut storage = MaybeUninit::uninit();
        Some(opened(&mut storage).ok()?.maps.rodata.value_size())
    });
    settings_among(map_ids, len_bytes?, offset_of!(rodata, config))
}

/// Which of the programs to load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// For TC ingress of an interface with an Ethernet header.
    Tc,
    /// For TC ingress of an interface whose packets begin with layer 3.
    TcLayer3,
    /// For XDP, native or generic.
    Xdp,
}

/// What is fixed for one loaded program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Which of the programs.
    pub kind: Kind,
    /// One event for each `sample` packets of the same verdict; at least 1.
    pub sample: u32,
    /// Inode number of the interface's network namespace.
    pub netns_ino: u32,
    /// Kind byte of the option, 253 or 254.
    pub option_kind: u8,
    /// Experiment identifier, host order.
    pub exid: u16,
    /// Steps at which a test makes the program believe that it failed, [`crate::types::Fault`]; 0 otherwise.
    pub faults: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            kind: Kind::Tc,
            sample: 1,
            netns_ino: 0,
            option_kind: DEFAULT_KIND,
            exid: DEFAULT_EXID,
            faults: 0,
        }
    }
}

/// The maps of the guard of an instance.
#[derive(Debug)]
pub struct GuardMaps {
    /// Array of one: the rules in use.
    pub rules: MapHandle,
    /// By generation, list and family: the page where the search for a source begins.
    pub lists: MapHandle,
    /// By generation: the pages that others lead to, if there are any.
    pub sources: MapHandle,
    /// By flow: accepted connections of rules that scrub, and the tokens that opened them.
    pub peers: MapHandle,
    /// By source: those that are blocked because they were refused too often; see [`super::blocked`].
    pub auto_blocked: MapHandle,
    /// Array of one, per CPU.
    pub counters: MapHandle,
    /// Perf event array.
    pub events: MapHandle,
    /// Array of one: what an attached program is told.
    pub live: MapHandle,
    /// Array of one: what makes a wall clock. Shared with the stamp.
    pub clock: MapHandle,
    /// What keyed tokens are checked with. Shared with the stamp.
    pub keys: LiveKeys,
}

/// All maps that an instance keeps for its guard; the last four are shared with the stamp.
const KEPT: [&str; 15] = [
    "guard_rules",
    "guard_lists",
    "guard_sources",
    "guard_accepted",
    "guard_peers",
    "guard_refused",
    "guard_auto_blocked",
    "guard_alarms",
    "guard_counters",
    "guard_events",
    "guard_live",
    "clock",
    "keys",
    "rings",
    "key_counts",
];

/// A loaded guard. Dropping it unloads it, unless it is attached somewhere.
#[derive(Debug)]
pub struct GuardProgram {
    fd: OwnedFd,
    /// The maps that it uses.
    pub maps: GuardMaps,
}

impl AsFd for GuardProgram {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn opened(storage: &mut MaybeUninit<OpenObject>) -> Result<OpenGuardSkel<'_>> {
    let (opened, _) = messages(|| GuardSkelBuilder::default().open(storage));
    opened.context("opening the guard that is built into this program")
}

impl GuardProgram {
    /// The maps of the guard of an instance as this version makes them.
    ///
    /// # Errors
    /// The guard that is built in cannot be opened.
    pub(crate) fn wanted_maps() -> Result<Vec<Wanted>> {
        let mut storage = MaybeUninit::uninit();
        let mut open = opened(&mut storage)?;
        wanted(open.open_object_mut(), &KEPT)
    }

    /// Loads the guard. With `pins`, its maps are those that are pinned in this directory; what is not there yet is
    /// created and pinned.
    ///
    /// # Errors
    /// The kernel refused it; the message says why and what to do.
    pub fn load(settings: Settings, pins: Option<&Path>) -> Result<GuardProgram> {
        let kernel = Kernel::probe();
        let mut storage = MaybeUninit::uninit();
        let mut open = opened(&mut storage)?;

        let data = open.maps.rodata_data.as_deref_mut().context("the guard has no settings")?;
        data.config = Config {
            sample: settings.sample,
            netns_ino: settings.netns_ino,
            exid: settings.exid,
            option_kind: settings.option_kind,
            faults: settings.faults,
            ..Default::default()
        };
        data.has_tai = kernel.has_tai.into();
        if let Some(dir) = pins {
            pin_below(dir, open.open_object_mut(), &KEPT)?;
        }
        open.progs.netoken_guard.set_autoload(settings.kind == Kind::Tc);
        open.progs.netoken_guard3.set_autoload(settings.kind == Kind::TcLayer3);
        open.progs.netoken_guardx.set_autoload(settings.kind == Kind::Xdp);

        let (loaded, log) = messages(|| open.load());
        let skel = loaded.map_err(|error| kernel.explain_load("the guard", error.into(), &log))?;
        let program = match settings.kind {
            Kind::Tc => &skel.progs.netoken_guard,
            Kind::TcLayer3 => &skel.progs.netoken_guard3,
            Kind::Xdp => &skel.progs.netoken_guardx,
        };
        let program = GuardProgram {
            fd: program.as_fd().try_clone_to_owned().context("keeping the program open")?,
            maps: GuardMaps::by_name(|name| map(skel.object(), name))?,
        };
        clock::publish(&program.maps.clock, None)?;
        Ok(program)
    }
}

impl GuardMaps {
    /// Opens what is pinned below `dir`.
    ///
    /// # Errors
    /// A pin is missing or not readable.
    pub fn open(dir: &Path) -> Result<GuardMaps> {
        expect(dir, &GuardProgram::wanted_maps()?)?;
        GuardMaps::by_name(|name| open(dir, name))
    }

    fn by_name(map: impl Fn(&str) -> Result<MapHandle>) -> Result<GuardMaps> {
        Ok(GuardMaps {
            rules: map("guard_rules")?,
            lists: map("guard_lists")?,
            sources: map("guard_sources")?,
            peers: map("guard_peers")?,
            auto_blocked: map("guard_auto_blocked")?,
            counters: map("guard_counters")?,
            events: map("guard_events")?,
            live: map("guard_live")?,
            clock: map("clock")?,
            keys: LiveKeys::by_name(map)?,
        })
    }

    /// The rules in use, or nothing if none ever were.
    ///
    /// # Errors
    /// The kernel refused to read them.
    pub fn table(&self) -> Result<Option<Table>> {
        let Some(map) = inner::get(&self.rules, 0).context("looking for the rules in use")? else {
            return Ok(None);
        };
        let bytes = map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).context("reading the rules in use")?;
        let mut table = Table::default();
        let read = table.copy_from_bytes(&bytes.context("the rules in use are empty")?);
        read.map_err(|_| anyhow!("the rules in use are of another version of netoken"))?;
        Ok(Some(table))
    }

    /// Whether a rule in use wants marks, which XDP does not have.
    ///
    /// # Errors
    /// The kernel refused to read them.
    pub fn marks(&self) -> Result<bool> {
        let table = self.table()?;
        Ok(table
            .is_some_and(|table| table.rules.iter().any(|rule| u32::from(rule.mode) == Mode::MODE_MARK.0)))
    }

    /// The rings that rules in use name and that have no key.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub fn rings_without_key(&self) -> Result<BTreeSet<RingName>> {
        let Some(table) = self.table()? else { return Ok(BTreeSet::new()) };
        let named = table.rules.iter().fold(0, |bits, rule| bits | rule.accept.rings);
        self.keys.without_key(|number| named & 1 << number != 0)
    }

    /// Puts rules and lists into use, without remembering anything of them: see [`super::running::load`].
    ///
    /// # Errors
    /// The kernel refused; what is in use is then unchanged.
    pub fn set_rules(&self, rules: &Rules) -> Result<()> {
        self.install(rules, 0, &[])
    }

    /// Puts rules and lists into use. A packet sees the old ones or these. `rows` are where the rules are counted.
    pub(super) fn install(&self, rules: &Rules, number: u64, rows: &[u8]) -> Result<()> {
        let numbers: RingNumbers = rules
            .rings()
            .into_iter()
            .map(|ring| Ok((ring, self.keys.ring_number(ring)?)))
            .collect::<Result<_>>()?;
        let running = self.table()?.map_or(1, |table| table.generation);
        let generation = (running + 1) % Size::GUARD_GENERATIONS.0 as u8;
        sources::install(self, generation, rules).context("filling the lists of sources")?;
        let mut table = rules.table(generation, |ring| numbers[&ring]);
        table.number = number;
        table.rules.iter_mut().zip(rows).for_each(|(rule, row)| rule.row = *row);
        let next = inner::create(MapType::Array, "guard_table", size_of::<u32>(), size_of::<Table>(), 1, 0)?;
        // SAFETY: plain data without padding.
        let bytes = unsafe { plain::as_bytes(&table) };
        next.update(&0u32.to_ne_bytes(), bytes, MapFlags::ANY).context("filling the table of rules")?;
        inner::put(&self.rules, 0, &next).context("putting the rules into use")?;
        // Only now: the update has waited for those who still used them. Pages that stay take memory until rules of that
        // generation come again, and are no failure of these, which are in use.
        inner::take(&self.sources, running.into()).ok();
        Ok(())
    }
}
