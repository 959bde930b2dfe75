//! Loads the classifier. The one place that drives the generated skeleton; what leaves it is file
//! descriptors and typed settings. How a policy gets into the maps is in [`crate::policy::install`].

use std::mem::{MaybeUninit, offset_of};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::{Mutex, OnceLock};

use anyhow::{Context, Result};
use libbpf_rs::skel::{OpenSkel, SkelBuilder};
use libbpf_rs::{MapCore, MapFlags, MapHandle, OpenMapMut, PrintLevel};
use plain::Plain;

use crate::clock;
use crate::events::buffer::set_reader;
use crate::inner;
use crate::kernel::Kernel;
use crate::keys::live::LiveKeys;
use crate::pins::{Wanted, expect, open, path_of};
use crate::skel::types::rodata;
use crate::skel::{NetokenSkelBuilder, OpenNetokenMaps};
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
#[derive(Clone, Copy, Debug)]
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

impl Program {
    /// Makes the maps of an instance where there are none yet, without loading the classifier. Another program of
    /// the instance then shares them.
    ///
    /// # Errors
    /// The kernel refused it, or the maps that are pinned are of another version.
    pub fn make_maps(pins: &Path) -> Result<Maps> {
        let kernel = Kernel::probe();
        let mut storage = MaybeUninit::uninit();
        let (opened, _) = messages(|| NetokenSkelBuilder::default().open(&mut storage));
        let mut open = opened.context("opening the classifier that is built into this program")?;
        pin_below(pins, kept(&mut open.maps))?;
        open.progs.netoken_egress.set_autoload(false);
        open.progs.netoken_egress3.set_autoload(false);
        let (loaded, log) = messages(|| open.load());
        loaded.map_err(|error| kernel.explain_load(error.into(), &log))?;
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
        let (opened, _) = messages(|| NetokenSkelBuilder::default().open(&mut storage));
        let mut open = opened.context("opening the classifier that is built into this program")?;
        Ok(kept(&mut open.maps).into_iter().map(|map| Wanted::new(map)).collect())
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
        let (opened, _) = messages(|| NetokenSkelBuilder::default().open(&mut storage));
        let mut open = opened.context("opening the classifier that is built into this program")?;

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
            pin_below(dir, kept(&mut open.maps))?;
        }

        let (attaches, header) = (purpose == Purpose::Attach, settings.link_header);
        open.progs.netoken_egress.set_autoload(attaches && header == LinkHeader::Ethernet);
        open.progs.netoken_egress3.set_autoload(attaches && header == LinkHeader::None);
        open.progs.netoken_ask.set_autoload(purpose == Purpose::Ask);

        let (loaded, log) = messages(|| open.load());
        let skel = loaded.map_err(|error| kernel.explain_load(error.into(), &log))?;
        let own = |map: &libbpf_rs::Map<'_>| MapHandle::try_from(map).context("keeping a map open");
        let program = match (purpose, settings.link_header) {
            (Purpose::Ask, _) => &skel.progs.netoken_ask,
            (Purpose::Attach, LinkHeader::Ethernet) => &skel.progs.netoken_egress,
            (Purpose::Attach, LinkHeader::None) => &skel.progs.netoken_egress3,
        };
        let program = Program {
            fd: program.as_fd().try_clone_to_owned().context("keeping the program open")?,
            maps: Maps {
                policies: own(&skel.maps.policies)?,
                policy_entries: own(&skel.maps.policy_entries)?,
                policy_records: own(&skel.maps.policy_records)?,
                policy_sets: own(&skel.maps.policy_sets)?,
                hits: own(&skel.maps.hits)?,
                more_hits: own(&skel.maps.more_hits)?,
                counters: own(&skel.maps.counters)?,
                events: own(&skel.maps.events)?,
                live: own(&skel.maps.live)?,
                clock: own(&skel.maps.clock)?,
                keys: LiveKeys {
                    keys: own(&skel.maps.keys)?,
                    rings: own(&skel.maps.rings)?,
                    counts: own(&skel.maps.key_counts)?,
                },
            },
        };
        clock::publish(&program.maps.clock, None)?;
        Ok(program)
    }
}

/// Everything that an instance keeps.
fn kept<'a, 'obj>(maps: &'a mut OpenNetokenMaps<'obj>) -> [&'a mut OpenMapMut<'obj>; 13] {
    [
        &mut maps.policies,
        &mut maps.policy_entries,
        &mut maps.policy_records,
        &mut maps.policy_sets,
        &mut maps.hits,
        &mut maps.more_hits,
        &mut maps.counters,
        &mut maps.events,
        &mut maps.live,
        &mut maps.clock,
        &mut maps.keys,
        &mut maps.rings,
        &mut maps.key_counts,
    ]
}

/// Loads them from their pins, or pins them.
pub(crate) fn pin_below<const N: usize>(dir: &Path, maps: [&mut OpenMapMut<'_>; N]) -> Result<()> {
    maps.into_iter().try_for_each(|map| {
        let path = path_of(dir, &map.name().to_string_lossy());
        map.set_pin_path(&path).with_context(|| format!("choosing {} as a pin", path.display()))
    })
}

impl Maps {
    /// Opens what is pinned below `dir`.
    ///
    /// # Errors
    /// A pin is missing or not readable.
    pub fn open(dir: &Path) -> Result<Maps> {
        expect(dir, &Program::wanted_maps()?)?;
        let open = |name: &str| open(dir, name);
        Ok(Maps {
            policies: open("policies")?,
            policy_entries: open("policy_entries")?,
            policy_records: open("policy_records")?,
            policy_sets: open("policy_sets")?,
            hits: open("hits")?,
            more_hits: open("more_hits")?,
            counters: open("counters")?,
            events: open("events")?,
            live: open("live")?,
            clock: open("clock")?,
            keys: LiveKeys { keys: open("keys")?, rings: open("rings")?, counts: open("key_counts")? },
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
        let (opened, _) = messages(|| NetokenSkelBuilder::default().open(&mut storage));
        Some(opened.ok()?.maps.rodata.value_size())
    });
    settings_among(map_ids, len_bytes?, offset_of!(rodata, config))
}

/// What stands at an offset of the read-only data of the program that has these maps. That is `len_bytes` long, if it is of
/// this version: longer than the skeleton knows, as compilers put constants of their own behind it.
pub(crate) fn settings_among<T: Plain + Default>(
    map_ids: &[u32],
    len_bytes: u32,
    offset: usize,
) -> Option<T> {
    let maps = map_ids.iter().filter_map(|id| MapHandle::from_map_id(*id).ok());
    let settings = maps.into_iter().find(|map| map.name().to_string_lossy().ends_with(".rodata"))?;
    let bytes = settings.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).ok()??;
    if bytes.len() != len_bytes as usize {
        return None;
    }
    let mut config = T::default();
    config.copy_from_bytes(bytes.get(offset..)?).ok()?;
    Some(config)
}

/// Runs `f` and returns with its result what libbpf had to say: the reasons, and the verifier's log.
pub(crate) fn messages<T>(f: impl FnOnce() -> T) -> (T, String) {
    static LOG: Mutex<String> = Mutex::new(String::new());
    // One at a time: libbpf has one printer for the whole process.
    static TURN: Mutex<()> = Mutex::new(());

    fn keep(_: PrintLevel, message: String) {
        LOG.lock().unwrap_or_else(|e| e.into_inner()).push_str(&message);
    }

    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let before = libbpf_rs::set_print(Some((PrintLevel::Warn, keep)));
    LOG.lock().unwrap_or_else(|e| e.into_inner()).clear();
    let result = f();
    libbpf_rs::set_print(before);
    let log = std::mem::take(&mut *LOG.lock().unwrap_or_else(|e| e.into_inner()));
    (result, log)
}
