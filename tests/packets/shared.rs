//! What the classifier shares with the guard, called through `token.bpf.c`: SipHash, making and checking a token.
//! Held against the vectors and the library.

use std::mem::offset_of;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::{MapCore, MapHandle, Object, ObjectBuilder};
use netoken::clock::{self, Source};
use netoken::kernel::Kernel;
use netoken::keys::live::LiveKeys;
use netoken::keys::{Key, Secret, rotate};
use netoken::token::keyed::{Bind, Flow, Refusal, Slots, Stamp, Verifier, make};
use netoken::token::{Token, TokenSpec};
use netoken::types::{Accept, Check, Clock, Flow as RawFlow};
use serde_json::Value;

use crate::keyed::{flow_of, random_packet, random_secret, ring};
use crate::random::Random;
use crate::run::{How, test_run};
use crate::support::{ensure_eq, share_of};

const VECTORS: &str = include_str!("../data/token-vectors.json");
const NS: u64 = 1_000_000_000;
/// Bytes of an Ethernet header, in front of an order.
const ORDER_OFF: usize = 14;
/// `struct token_order` of token.bpf.c.
const ORDER_LEN: usize = 80;
const SPEC_AT: usize = 0;
const ACCEPT_AT: usize = 16;
const TOKEN_AT: usize = 24;
const FLOW_AT: usize = 32;
const RESULT_AT: usize = 76;

/// A folder with the compiled test program, for machines without a compiler.
const COMPILED: &str = "NETOKEN_TEST_COMPILED";
const OBJECT: &str = "token.bpf.o";

/// Compiles the test program into a folder.
pub fn compile(to: &Path) -> Result<PathBuf> {
    let object = to.join(OBJECT);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let types = root.join("vmlinux").join(std::env::consts::ARCH);
    let own = root.join("src/bpf");
    SkeletonBuilder::new()
        .source(root.join("tests/packets/token.bpf.c"))
        .obj(&object)
        .clang(std::env::var("CLANG").unwrap_or_else(|_| "clang".to_string()))
        .clang_args([
            "-I",
            &types.to_string_lossy(),
            "-I",
            &own.to_string_lossy(),
            "-mcpu=v3",
            "-Wall",
            "-Werror",
        ])
        .build()
        .context("compiling tests/packets/token.bpf.c")?;
    Ok(object)
}

/// The loaded test program, with keys and a clock of its own.
struct Shared {
    object: Object,
    keys: LiveKeys,
    clock: MapHandle,
}

impl Shared {
    fn load(source: Source) -> Result<Shared> {
        let dir = tempfile::tempdir().context("making a directory for the test program")?;
        let object = match std::env::var_os(COMPILED) {
            Some(dir) => Path::new(&dir).join(OBJECT),
            None => compile(dir.path())?,
        };
        let mut open = ObjectBuilder::default().open_file(&object).context("opening the test program")?;
        let mut settings = open
            .maps_mut()
            .find(|map| map.name().to_string_lossy().contains("rodata"))
            .context("the test program has no settings")?;
        // The only one it has.
        let data = settings.initial_value_mut().context("the test program's settings are empty")?;
        data[0] = (source == Source::Tai).into();
        let object = open.load().context("loading the test program")?;
        let map = |name: &str| {
            let map =
                object.maps().find(|map| map.name() == name).with_context(|| format!("no map {name}"))?;
            MapHandle::try_from(&map).context("keeping a map open")
        };
        let (keys, rings, counts) = (map("keys")?, map("rings")?, map("key_counts")?);
        let clock = map("clock")?;
        let shared = Shared { object, keys: LiveKeys { keys, rings, counts }, clock };
        clock::publish(&shared.clock, None)?;
        Ok(shared)
    }

    /// Runs a program on an order, and returns the order as it then is.
    fn run(&self, program: &str, order: &[u8]) -> Result<Vec<u8>> {
        let program = self
            .object
            .progs()
            .find(|found| found.name() == program)
            .with_context(|| format!("no program {program}"))?;
        let frame = [&[0; ORDER_OFF], order].concat();
        let (returned, mut out) = test_run(program.as_fd(), &frame, How::default())?;
        ensure!(returned == 0, "the program returned {returned}");
        Ok(out.split_off(ORDER_OFF))
    }

    /// Stops the clock, as far as a running one can be: two seconds into the slot of `unix`.
    fn set_clock(&self, source: Source, unix: Duration, slots: Slots) -> Result<()> {
        let mut clock = Clock { slot_ns: u64::from(slots.length_s()) * NS, ..Default::default() };
        let offset = (unix.as_nanos() as i64) - clock::as_seen(&clock, source)?.as_nanos() as i64;
        // The other one is wrong on purpose.
        match source {
            Source::Tai => clock.tai_offset_ns = offset,
            Source::Boottime => clock.boot_offset_ns = offset,
        }
        (clock.slots_behind, clock.slots_ahead) = (slots.behind(), slots.ahead());
        clock::write(&self.clock, &clock)
    }

    fn make(&self, spec: TokenSpec, flow: &Flow) -> Result<Option<Token>> {
        let number = spec.ring().map_or(Ok(0), |ring| self.keys.ring_number(ring))?;
        let mut order = [0; ORDER_LEN];
        let spec = spec.to_raw(0, "", |_| number)?;
        // SAFETY: plain data without padding.
        order[SPEC_AT..ACCEPT_AT].copy_from_slice(unsafe { plain::as_bytes(&spec) });
        put_flow(&mut order, flow);
        let done = self.run("make_one", &order)?;
        let token = Token(done[TOKEN_AT..TOKEN_AT + 8].try_into()?);
        Ok((done[RESULT_AT] != 0).then_some(token))
    }

    fn check(&self, token: Token, flow: &Flow, accept: Accept) -> Result<Check> {
        let mut order = [0; ORDER_LEN];
        // SAFETY: plain data without padding.
        order[ACCEPT_AT..TOKEN_AT].copy_from_slice(unsafe { plain::as_bytes(&accept) });
        order[TOKEN_AT..FLOW_AT].copy_from_slice(&token.0);
        put_flow(&mut order, flow);
        let done = self.run("check_one", &order)?;
        Ok(Check(u32::from_ne_bytes(done[RESULT_AT..RESULT_AT + 4].try_into()?)))
    }
}

fn put_flow(order: &mut [u8; ORDER_LEN], flow: &Flow) {
    let at = |field: usize| FLOW_AT + field;
    let mapped = |addr: std::net::IpAddr| match addr {
        std::net::IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(addr) => addr.octets(),
    };
    let mut put =
        |field: usize, bytes: &[u8]| order[at(field)..at(field) + bytes.len()].copy_from_slice(bytes);
    put(offset_of!(RawFlow, saddr), &mapped(flow.src().ip()));
    put(offset_of!(RawFlow, daddr), &mapped(flow.dst().ip()));
    put(offset_of!(RawFlow, sport_be), &flow.src().port().to_be_bytes());
    put(offset_of!(RawFlow, dport_be), &flow.dst().port().to_be_bytes());
    put(offset_of!(RawFlow, isn), &flow.isn().to_ne_bytes());
    put(offset_of!(RawFlow, family), &[if flow.src().is_ipv4() { 4 } else { 6 }]);
}

/// The clocks that can be read here: the one that is chosen, and the other one if there is one.
fn sources() -> Vec<Source> {
    let mut sources = vec![Source::Boottime];
    if Source::choose(Kernel::probe()) == Source::Tai {
        sources.push(Source::Tai);
    }
    sources
}

pub fn siphash_gives_its_published_results() -> Result<()> {
    let shared = Shared::load(Source::Boottime)?;
    let vectors: Value = serde_json::from_str(VECTORS)?;
    let results = vectors["siphash"]["results"].as_array().context("no results")?;
    let bytes: Vec<u8> = (0..64).collect();
    for (len, expected) in results.iter().enumerate() {
        // Key, message, length and result, as in `struct hash_order`.
        let mut order = [0u8; 16 + 64 + 8 + 8];
        order[..16].copy_from_slice(&bytes[..16]);
        order[16..16 + len].copy_from_slice(&bytes[..len]);
        order[80..88].copy_from_slice(&(len as u64).to_ne_bytes());
        // The program takes numbers; the message is a sequence of little-endian ones.
        if cfg!(target_endian = "big") {
            order[..80].chunks_exact_mut(8).for_each(<[u8]>::reverse);
        }
        let done = shared.run("hash_any", &order)?;
        let result = u64::from_ne_bytes(done[88..96].try_into()?).to_le_bytes();
        let result: String = result.iter().map(|byte| format!("{byte:02x}")).collect();
        ensure_eq!(result, expected.as_str().context("not text")?, "{len} bytes");
    }
    Ok(())
}

fn everything(shared: &Shared, key: &Key) -> Result<Accept> {
    let ring = shared.keys.ring_number(key.ring())?;
    let binds = Bind::ALL.iter().fold(0, |bits, bind| bits | 1 << bind.number());
    Ok(Accept { rings: 1 << ring, binds, any_tag: 1, ..Default::default() })
}

pub fn the_vectors_are_made_and_found_valid() -> Result<()> {
    let vectors: Value = serde_json::from_str(VECTORS)?;
    for source in sources() {
        let shared = Shared::load(source)?;
        for vector in vectors["tokens"].as_array().context("no tokens")? {
            let number = |name: &str| vector[name].as_u64().with_context(|| format!("no {name}"));
            let text = |name: &str| vector[name].as_str().with_context(|| format!("no {name}"));
            let end = |addr: &str, port: &str| -> Result<_> {
                Ok(std::net::SocketAddr::new(text(addr)?.parse()?, number(port)? as u16))
            };
            let flow = Flow::new(end("src", "sport")?, end("dst", "dport")?, number("isn")? as u32)?;
            let secret = Secret::from_hex(text("secret")?.as_bytes()).context("no secret")?;
            let mut keys = vec![Key::new(ring(1), number("key_id")? as u8, secret, SystemTime::UNIX_EPOCH)?];
            rotate::sign(&mut keys, ring(1))?;
            shared.keys.load(&keys)?;
            let slots = Slots::new(number("slot_s")? as u32, 1, 1)?;
            shared.set_clock(source, Duration::from_secs(number("unix_s")?), slots)?;
            let spec =
                TokenSpec::Keyed { tag: number("tag")? as u16, key: ring(1), bind: text("bind")?.parse()? };
            let token = shared.make(spec, &flow)?.context("no token")?;
            ensure_eq!(token.to_string(), text("token")?, "{vector} by {source:?}");
            let checked = shared.check(token, &flow, everything(&shared, &keys[0])?)?;
            ensure_eq!(checked, Check::CHECK_VALID, "{vector} by {source:?}");
        }
    }
    Ok(())
}

/// Random tokens, right and wrong in every way, get the same answer from both.
pub fn kernel_and_library_check_alike() -> Result<()> {
    let mut random = Random::seeded()?;
    let source = Source::choose(Kernel::probe());
    let shared = Shared::load(source)?;
    let mut seen = std::collections::BTreeMap::new();
    for _ in 0..share_of(200)? {
        let mut keys = Vec::new();
        for id in 0..4 {
            keys.push(Key::new(ring(id % 2), id as u8, random_secret(&mut random), SystemTime::UNIX_EPOCH)?);
        }
        keys[3].retire();
        shared.keys.load(&keys)?;
        let (behind, ahead) = (random.below(8) as u32, random.below(8) as u32);
        let slots = Slots::new(16, behind, ahead)?;
        let unix = Duration::from_secs((random.next() >> 36) * 16 + 2);
        shared.set_clock(source, unix, slots)?;
        let now = slots.at(unix);
        for _ in 0..50 {
            let packet = random_packet(&mut random);
            let flow = flow_of(&packet)?;
            let stamp = Stamp {
                tag: random.next() as u16,
                key_id: random.below(5) as u8,
                bind: *random.one_of(&Bind::ALL),
                slot: now.wrapping_add(random.below(40) as u32).wrapping_sub(20),
            };
            let of = usize::from(stamp.key_id);
            let secret = keys.get(of).and_then(Key::secret);
            let mut token = match secret {
                Some(secret) => make(secret, stamp, &flow),
                None => make(&random_secret(&mut random), stamp, &flow),
            };
            if random.below(4) == 0 {
                token.0[random.below(8)] ^= 1 << random.below(8);
            }
            let binds: Vec<Bind> = Bind::ALL.into_iter().filter(|_| random.below(3) != 0).collect();
            let verifier = Verifier { keys: &keys, slots, binds: &binds };
            let expected = match verifier.check(token, &flow, unix) {
                Ok(_) => Check::CHECK_VALID,
                Err(Refusal::UnknownKey) => Check::CHECK_UNKNOWN_KEY,
                Err(Refusal::RetiredKey) => Check::CHECK_RETIRED_KEY,
                Err(Refusal::WrongTime) => Check::CHECK_WRONG_TIME,
                Err(Refusal::WrongMac) => Check::CHECK_WRONG_MAC,
            };
            let accept = Accept {
                rings: u16::MAX,
                binds: binds.iter().fold(0, |bits, bind| bits | 1 << bind.number()),
                any_tag: 1,
                ..Default::default()
            };
            let got = shared.check(token, &flow, accept)?;
            ensure_eq!(got, expected, "{stamp:?} {token} {flow:?} at slot {now}, {slots:?}, {binds:?}");
            *seen.entry(got.0).or_insert(0) += 1;
            if got != Check::CHECK_VALID {
                continue;
            }
            // What the kernel's side can refuse beyond that: rings and tags.
            let tag = u16::from_be_bytes([token.0[0], token.0[1]]);
            for (change, expected) in [
                (
                    Accept { rings: !(1 << shared.keys.ring_number(keys[of].ring())?), ..accept },
                    Check::CHECK_WRONG_RING,
                ),
                (Accept { any_tag: 0, tag_be: (tag ^ 1).to_be(), ..accept }, Check::CHECK_WRONG_TAG),
                (Accept { any_tag: 0, tag_be: tag.to_be(), ..accept }, Check::CHECK_VALID),
            ] {
                ensure_eq!(shared.check(token, &flow, change)?, expected, "{change:?}");
            }
        }
        let accepted: u64 = (0..4).map(|id| Ok(shared.keys.use_of(id)?.accepted)).sum::<Result<u64>>()?;
        *seen.entry(u32::MAX).or_insert(0) += accepted;
    }
    println!("answers by number: {seen:?}");
    ensure!([1, 2, 3, 6, 7].iter().all(|answer| seen.contains_key(answer)), "{seen:?}");
    // Each valid one was accepted twice, and each key set began to count anew.
    ensure_eq!(seen[&u32::MAX], 2 * seen[&1], "tokens counted as accepted");
    Ok(())
}

pub fn both_clocks_are_read_as_user_space_reads_them() -> Result<()> {
    let slots = Slots::new(1, 1, 1)?;
    for source in sources() {
        let shared = Shared::load(source)?;
        clock::publish(&shared.clock, Some(slots))?;
        let mut keys = vec![Key::new(ring(1), 0, Secret::random()?, SystemTime::UNIX_EPOCH)?];
        rotate::sign(&mut keys, ring(1))?;
        shared.keys.load(&keys)?;
        let flow = Flow::new("192.0.2.1:1".parse()?, "192.0.2.2:2".parse()?, 3)?;
        let spec = TokenSpec::Keyed { tag: 1, key: ring(1), bind: Bind::Flow };
        let token = shared.make(spec, &flow)?.context("no token")?;
        let verifier = Verifier { keys: &keys, slots, binds: &Bind::ALL };
        let valid = verifier.check(token, &flow, clock::now());
        ensure!(valid.is_ok(), "a token made by {source:?} just now: {valid:?}");
    }
    Ok(())
}
