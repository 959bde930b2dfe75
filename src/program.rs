//! Loads the classifier. The one place that drives the generated skeleton; what leaves it is file
//! descriptors and typed settings. How a policy gets into the maps is in [`crate::policy::install`].

use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Context, Result};
use libbpf_rs::skel::{OpenSkel, Skel, SkelBuilder};
use libbpf_rs::{MapHandle, OpenObject};
use plain::Plain;

use crate::clock;
use crate::events::buffer::set_reader;
use crate::inner;
use crate::kernel::Kernel;
use crate::keys::live::LiveKeys;
use crate::object::{map, messages, pin_below, settings_among, wanted};
use crate::pins::{Wanted, expect, open};
use crate::skel::types::rodata;
use crate::skel::{NetokenSkelBuilder, OpenNetokenSkel};
use crate::types::Config;

// SAFETY: integers without hidden padding, which types.h asserts.
unsafe impl Plain for Config {}

/// The name that `tc filter show` and `bpftool prog` print.
pub const PROGRAM_NAME: &str = "netoken_egress";
/// The same for interfaces without a link header.
pub const PROGRAM_NAME_L3: &str = "netoken_egress3";

/// The kind byte of the option, RFC 6994: 253 unless said otherwise.
pub const DEFAULT_KIND: u8 = 253;
/// The experiment identifier behind it, host order.
pub const DEFAULT_EXID: u16 = 0x4e54;

/// What a device puts in front of the network header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkHeader {
    /// 14 bytes.
    Ethernet,
    /// Nothing: tun, WireGuard, PPP and the like.
    None,
}

/// What is fixed for one loaded program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// What stands in front of the network header, which decides which program is loaded.
    pub link_header: LinkHeader,
    /// One event for each `sample` SYNs of the same verdict; at least 1.
    pub sample: u32,
    /// Inode number of the interface's network namespace.
    pub netns_ino: u32,
    /// Kind byte of the option, 253 or 254.
    pub option_kind: u8,
    /// Experiment identifier, host order.
    pub exid: u16,
    /// MTU of the interface in bytes; only used by kernels that cannot ask for it, before 5.12.
    pub mtu_bytes: u32,
    /// Bits of [`crate::types::Fault`]: helpers that a test makes fail. 0 outside tests.
    pub faults: u32,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            link_header: LinkHeader::Ethernet,
            sample: 1,
            netns_ino: 0,
            option_kind: DEFAULT_KIND,
            exid: DEFAULT_EXID,
            mtu_bytes: 0xffff,
            faults: 0,
        }
    }
}

impl Settings {
    /// What of it the classifier reads on this kernel: where two are equal, one program does for both.
    pub fn as_read(self) -> Settings {
        let mtu_bytes =
            if Kernel::probe().has_check_mtu { Settings::default().mtu_bytes } else { self.mtu_bytes };
        Settings { mtu_bytes, ..self }
    }
}

/// All maps that an instance keeps for its stamp.
const KEPT: [&str; 13] = [
    "policies",
    "policy_entries",
    "policy_records",
    "policy_sets",
    "hits",
    "more_hits",
    "counters",
    "events",
    "live",
    "clock",
    "keys",
    "rings",
    "key_counts",
];

/// Which of the programs is loaded.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Attach,
    Ask,
}

/// The maps that an instance keeps. Pinned maps and those of a program that was never pinned look the same.
#[derive(Debug)]
pub struct Maps {
    /// Array of one map: the generation of the policy in use.
    pub policies: MapHandle,
    /// The hash tables of two slots, one of which is in use.
    pub policy_entries: MapHandle,
    /// The records of two slots.
    pub policy_records: MapHandle,
    /// The sets of two slots.
    pub policy_sets: MapHandle,
    /// The first hit counters.
    pub hits: MapHandle,
    /// Further hit counters, in chunks.
    pub more_hits: MapHandle,
    /// Per CPU, by verdict.
    pub counters: MapHandle,
    /// Perf event array.
    pub events: MapHandle,
    /// Array of one: what an attached program is told.
    pub live: MapHandle,
    /// Array of one: what makes a wall clock.
    pub clock: MapHandle,
    /// What keyed tokens are made with.
    pub keys: LiveKeys,
}

/// A loaded classifier. Dropping it unloads it, unless it is attached somewhere.
#[derive(Debug)]
pub struct Program {
    fd: OwnedFd,
    /// The maps that it uses.
    pub maps: Maps,
}

impl AsFd for Program {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn opened(storage: &mut MaybeUninit<OpenObject>) -> Result<OpenNetokenSkel<'_>> {
    let (opened, _) = messages(|| NetokenSkelBuilder::default().open(storage));
    opened.context("opening the classifier that is built into this program")
}

impl Program {
    /// Makes the maps of an instance where there are none yet, without loading the classifier. Another program of
    /// the instance then shares them.
    ///
    /// # Errors
    /// The kernel refused it, or the maps that are pinned are of another version.
    pub fn make_maps(pins: &Path) -> Result<Maps> {
        let kernel = Kernel::probe();
        let mut storage = MaybeUninit::uninit();
        let mut open = opened(&mut storage)?;
        pin_below(pins, open.open_object_mut(), &KEPT)?;
        open.progs.netoken_egress.set_autoload(false);
        open.progs.netoken_egress3.set_autoload(false);
        let (loaded, log) = messages(|| open.load());
        loaded.map_err(|error| kernel.explain_load("the classifier", error.into(), &log))?;
        let maps = Maps::open(pins)?;
        clock::publish(&maps.clock, None)?;
        Ok(maps)
    }

    /// The maps of an instance as this version makes them.
    ///
    /// # Errors
    /// The classifier that is built in cannot be opened.
    pub(crate) fn wanted_maps() -> Result<Vec<Wanted>> {
        let mut storage = MaybeUninit::uninit();
        let mut open = opened(&mut storage)?;
        wanted(open.open_object_mut(), &KEPT)
    }

    /// Loads the classifier. With `pins`, its maps are those that are pinned in this directory; what is not
    /// there yet is created and pinned.
    ///
    /// # Errors
    /// The kernel refused it; the message says why and what to do.
    pub fn load(settings: Settings, pins: Option<&Path>) -> Result<Program> {
        Program::load_for(Purpose::Attach, settings, pins)
    }

    /// Loads the program that answers what the policy would decide. It is never attached: it is run with
    /// BPF_PROG_TEST_RUN.
    ///
    /// # Errors
    /// The kernel refused it; the message says why and what to do.
    pub fn load_ask(pins: Option<&Path>) -> Result<Program> {
        Program::load_for(Purpose::Ask, Settings::default(), pins)
    }

    fn load_for(purpose: Purpose, settings: Settings, pins: Option<&Path>) -> Result<Program> {
        let kernel = Kernel::probe();
        let mut storage = MaybeUninit::uninit();
        let mut open = opened(&mut storage)?;

        let data = open.maps.rodata_data.as_deref_mut().context("the classifier has no settings")?;
        data.config = Config {
            sample: settings.sample,
            netns_ino: settings.netns_ino,
            faults: settings.faults,
            exid: settings.exid,
            option_kind: settings.option_kind,
            has_check_mtu: kernel.has_check_mtu.into(),
            mtu_bytes: settings.mtu_bytes,
            has_cgroup_id: kernel.has_cgroup_id.into(),
            is_question: (purpose == Purpose::Ask).into(),
            pad: [0; 2],
        };
        data.has_tai = kernel.has_tai.into();
        if let Some(dir) = pins {
            pin_below(dir, open.open_object_mut(), &KEPT)?;
        }

        let (attaches, header) = (purpose == Purpose::Attach, settings.link_header);
        open.progs.netoken_egress.set_autoload(attaches && header == LinkHeader::Ethernet);
        open.progs.netoken_egress3.set_autoload(attaches && header == LinkHeader::None);
        open.progs.netoken_ask.set_autoload(purpose == Purpose::Ask);

        let (loaded, log) = messages(|| open.load());
        let skel = loaded.map_err(|error| kernel.explain_load("the classifier", error.into(), &log))?;
        let program = match (purpose, settings.link_header) {
            (Purpose::Ask, _) => &skel.progs.netoken_ask,
            (Purpose::Attach, LinkHeader::Ethernet) => &skel.progs.netoken_egress,
            (Purpose::Attach, LinkHeader::None) => &skel.progs.netoken_egress3,
        };
        let program = Program {
            fd: program.as_fd().try_clone_to_owned().context("keeping the program open")?,
            maps: Maps::by_name(|name| map(skel.object(), name))?,
        };
        clock::publish(&program.maps.clock, None)?;
        Ok(program)
    }
}

impl Maps {
    /// Opens what is pinned below `dir`.
    ///
    /// # Errors
    /// A pin is missing or not readable.
    pub fn open(dir: &Path) -> Result<Maps> {
        expect(dir, &Program::wanted_maps()?)?;
        Maps::by_name(|name| open(dir, name))
    }

    fn by_name(map: impl Fn(&str) -> Result<MapHandle>) -> Result<Maps> {
        Ok(Maps {
            policies: map("policies")?,
            policy_entries: map("policy_entries")?,
            policy_records: map("policy_records")?,
            policy_sets: map("policy_sets")?,
            hits: map("hits")?,
            more_hits: map("more_hits")?,
            counters: map("counters")?,
            events: map("events")?,
            live: map("live")?,
            clock: map("clock")?,
            keys: LiveKeys::by_name(map)?,
        })
    }

    /// Tells the attached programs whether somebody reads the events; without a reader they send none.
    ///
    /// # Errors
    /// The kernel refused to write it.
    pub fn set_reader(&self, has_reader: bool) -> Result<()> {
        set_reader(&self.live, has_reader)
    }

    /// The map of the policy in use, or nothing if none was ever set.
    ///
    /// # Errors
    /// The kernel refused to open it.
    pub fn policy(&self) -> Result<Option<MapHandle>> {
        inner::get(&self.policies, 0).context("looking for the policy in use")
    }
}

/// What the program was told that has these maps, as the kernel keeps it; nothing if another version of netoken has
/// loaded it.
pub fn config_among(map_ids: &[u32]) -> Option<Config> {
    static LEN_BYTES: OnceLock<Option<u32>> = OnceLock::new();
    let len_bytes = *LEN_BYTES.get_or_init(|| {
        let mut storage = MaybeUninit::uninit();
        Some(opened(&mut storage).ok()?.maps.rodata.value_size())
    });
    settings_among(map_ids, len_bytes?, offset_of!(rodata, config))
}
