//! Turns the lists of sources into what the kernel searches, and puts it there. Nested prefixes become ranges that do
//! not overlap, by their boundaries, sorted and in pages. If one page is not enough, there is one with the first boundary
//! of each, and so on. In a page the kernel begins where the slot of an address says.
//!
//! A source is on a list if any entry around it has not ended. So a range has to know only when the last one of those
//! ends, and it does not matter how many entries are around one another.

use std::cmp::Reverse;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use plain::Plain;

use super::program::GuardMaps;
use super::rules::{Listed, Rules};
use super::types::{Size, SourceList, SourcePage};
use crate::inner;

// SAFETY: integers and arrays of them, without hidden padding, which guard_types.h asserts.
unsafe impl Plain for SourcePage {}

/// Of ranges that stay on a list: a time that never comes.
const FOR_EVER: u64 = u64::MAX;
/// Of ranges that are not on it.
const NOT_LISTED: u64 = 0;

const PAGE: usize = Size::SOURCE_PAGE_BOUNDARIES.0 as usize;
const SLOTS: usize = Size::SOURCE_PAGE_SLOTS.0 as usize;
const LEVELS: u32 = Size::SOURCE_LEVELS.0;

/// What holds from an address on, up to the next boundary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Boundary {
    /// The address as the kernel compares it: an IPv4 address stands in the upper half.
    addr: u128,
    /// Unix time at which it is no longer on the list.
    expires_ns: u64,
}

impl Boundary {
    fn of_entry(listed: &Listed) -> (Boundary, u128) {
        let (addr, bits) = listed.src.mapped();
        let (addr, bits) = match listed.src.is_v6() {
            true => (addr.to_bits(), bits),
            false => (addr.to_bits() << 96 >> 32, bits - 64),
        };
        let until = listed.until.map(|time| time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default());
        let expires_ns = until.map_or(FOR_EVER, |until| u64::try_from(until.as_nanos()).unwrap_or(FOR_EVER));
        (Boundary { addr, expires_ns }, addr | u128::MAX.checked_shr(bits.into()).unwrap_or(0))
    }
}

/// The boundaries of one family, rising; the first is at the lowest address.
fn boundaries(list: &[Listed], family: u8) -> Vec<Boundary> {
    let of_family = list.iter().filter(|listed| listed.src.family() == family);
    let mut entries: Vec<(Boundary, u128)> = of_family.map(Boundary::of_entry).collect();
    entries.sort_unstable_by_key(|(begin, last)| (begin.addr, Reverse(*last)));

    let mut ranges = Ranges { all: vec![Boundary { addr: 0, expires_ns: NOT_LISTED }], around: Vec::new() };
    for (begin, last) in entries {
        ranges.leave_behind(begin.addr);
        let expires_ns = begin.expires_ns.max(ranges.now());
        ranges.go_on(Boundary { expires_ns, ..begin });
        ranges.around.push((last, expires_ns));
    }
    ranges.leave_behind(u128::MAX);
    ranges.all
}

/// Ranges up to some address.
struct Ranges {
    all: Vec<Boundary>,
    /// The entries around it, the widest first: its last address, and when the last of those around that one ends.
    around: Vec<(u128, u64)>,
}

impl Ranges {
    fn now(&self) -> u64 {
        self.around.last().map_or(NOT_LISTED, |(_, expires_ns)| *expires_ns)
    }

    /// Ends what ends in front of an address.
    fn leave_behind(&mut self, addr: u128) {
        while let Some((last, _)) = self.around.pop_if(|(last, _)| *last < addr) {
            self.go_on(Boundary { addr: last + 1, expires_ns: self.now() });
        }
    }

    /// Adds a boundary, if there is anything new behind it.
    fn go_on(&mut self, next: Boundary) {
        self.all.pop_if(|before| before.addr == next.addr);
        if self.all.last().is_none_or(|before| before.expires_ns != next.expires_ns) {
            self.all.push(next);
        }
    }
}

/// Writes the lists of a generation that is not in use.
///
/// # Errors
/// A list is too long, or the kernel refused it.
pub(super) fn install(maps: &GuardMaps, generation: u8, rules: &Rules) -> Result<()> {
    let mut lists = Vec::new();
    for (list, number) in
        [(&rules.exempt, SourceList::SOURCES_EXEMPT), (&rules.blocked, SourceList::SOURCES_BLOCKED)]
    {
        let at = (u32::from(generation) * Size::SOURCE_LISTS.0 + number.0) * Size::SOURCE_FAMILIES.0;
        lists.extend([(at, boundaries(list, 4)), (at + 1, boundaries(list, 6))]);
    }
    let count = lists.iter().map(|(_, list)| pages_below(list.len())).sum();
    if count == 0 {
        inner::take(&maps.sources, generation.into())?;
        return lists.iter().try_for_each(|(at, list)| write(&maps.lists, *at, page(list, None)));
    }
    let (key, value) = (size_of::<u32>(), size_of::<SourcePage>());
    let flags = libbpf_sys::BPF_F_INNER_MAP;
    let pages = inner::create(MapType::Array, "guard_pages", key, value, count, flags)?;
    let mut next = 0;
    for (at, mut row) in lists {
        // From the lowest level upwards, until a page has room for what is left.
        let mut below = None;
        for _ in 1..LEVELS {
            if row.len() <= PAGE {
                break;
            }
            let first = next;
            for (chunk, number) in row.chunks(PAGE).zip(0..) {
                let below = below.map(|first: u32| first + number * PAGE as u32);
                write(&pages, next, page(chunk, below))?;
                next += 1;
            }
            row = row.chunks(PAGE).map(|chunk| chunk[0]).collect();
            below = Some(first);
        }
        if row.len() > PAGE {
            bail!("a list makes more ranges of addresses than there is room for");
        }
        write(&maps.lists, at, page(&row, below))?;
    }
    inner::put(&maps.sources, generation.into(), &pages)
}

/// How many pages a list takes beside the first one.
fn pages_below(boundaries: usize) -> usize {
    let rows = std::iter::successors(Some(boundaries), |row| (*row > PAGE).then(|| row.div_ceil(PAGE)));
    rows.skip(1).sum()
}

/// At most as many boundaries as a page has room for. `below` is the first of the pages that they lead to.
fn page(boundaries: &[Boundary], below: Option<u32>) -> Box<SourcePage> {
    let halves = |addr: u128| ((addr >> 64) as u64, addr as u64);
    let mut page = Box::new(SourcePage {
        leads_on: below.is_some().into(),
        first_page: below.unwrap_or_default(),
        ..Default::default()
    });
    for (entry, boundary) in page.boundaries.iter_mut().zip(boundaries) {
        (entry.high, entry.low) = halves(boundary.addr);
        entry.expires_ns = boundary.expires_ns;
    }

    // The first boundary of a list is far in front of the others, so the slots begin with the second.
    let (Some(begin), Some(end)) = (boundaries.get(1), boundaries.last()) else { return page };
    (page.high, page.low) = halves(begin.addr);
    let by_low = page.high == halves(end.addr).0;
    page.by_low = by_low.into();
    let offset = |addr: u128| match halves(addr.max(begin.addr)) {
        (_, low) if by_low => low - page.low,
        (high, _) => high - page.high,
    };
    let bits = u64::BITS - offset(end.addr).leading_zeros();
    page.shift = bits.saturating_sub(SLOTS.ilog2()) as u8;
    let mut last = 0;
    for (slot, before) in page.slots.iter_mut().take(SLOTS + 1).enumerate() {
        let is_before = |next: &Boundary| offset(next.addr) >> page.shift < slot as u64;
        while boundaries.get(last + 1).is_some_and(is_before) {
            last += 1;
        }
        *before = last as u8;
    }
    page
}

fn write(map: &MapHandle, at: u32, page: Box<SourcePage>) -> Result<()> {
    // SAFETY: plain data without hidden padding, which guard_types.h asserts.
    let bytes = unsafe { plain::as_bytes(&*page) };
    map.update(&at.to_ne_bytes(), bytes, MapFlags::ANY).context("writing a page of sources")
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
    use std::time::Duration;

    use super::*;

    fn listed(text: &str, until_s: Option<u64>) -> Listed {
        let until = until_s.map(|s| SystemTime::UNIX_EPOCH + Duration::from_secs(s));
        Listed { src: text.parse().unwrap_or_else(|error| panic!("{text}: {error:#}")), until }
    }

    /// Until when the boundaries say that an address is on the list.
    fn found(boundaries: &[Boundary], addr: IpAddr) -> u64 {
        let addr = match addr {
            IpAddr::V4(addr) => u128::from(addr.to_bits()) << 64,
            IpAddr::V6(addr) => addr.to_bits(),
        };
        boundaries[boundaries.partition_point(|boundary| boundary.addr <= addr) - 1].expires_ns
    }

    /// The same by a look at every entry.
    fn expected(list: &[Listed], addr: IpAddr) -> u64 {
        let around = list.iter().filter(|listed| listed.src.contains(addr));
        let ends = around.map(|listed| match listed.until {
            None => u64::MAX,
            Some(time) => time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos() as u64,
        });
        ends.max().unwrap_or(0)
    }

    fn check(list: &[Listed], addrs: &[IpAddr]) {
        let both = [boundaries(list, 4), boundaries(list, 6)];
        for boundaries in &both {
            assert_eq!(boundaries[0].addr, 0);
            assert!(boundaries.is_sorted_by(|a, b| a.addr < b.addr && a.expires_ns != b.expires_ns));
        }
        for addr in addrs {
            let found = found(&both[usize::from(addr.is_ipv6())], *addr);
            assert_eq!(found, expected(list, *addr), "{addr} of {list:?}");
        }
    }

    #[test]
    fn the_ends_of_the_address_space_are_no_special_case() {
        let addrs =
            ["0.0.0.0", "0.0.0.1", "127.255.255.255", "128.0.0.0", "255.255.255.254", "255.255.255.255"]
                .into_iter()
                .chain([
                    "::",
                    "::1",
                    "::ffff:255.255.255.255",
                    "8000::",
                    "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
                ]);
        let addrs: Vec<IpAddr> = addrs.map(|text| text.parse().unwrap()).collect();
        let entries = [
            ("0.0.0.0/0", None),
            ("::/0", None),
            ("0.0.0.0/0", Some(7)),
            ("::/0", Some(7)),
            ("0.0.0.0", None),
            ("255.255.255.255", None),
            ("::", None),
            ("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", None),
            ("128.0.0.0/1", None),
            ("0.0.0.0/1", Some(9)),
            ("8000::/1", None),
            ("::fffe:0:0/95", None),
        ];
        let entries = entries.map(|(text, until_s)| listed(text, until_s));
        check(&[], &addrs);
        for a in entries {
            for b in entries {
                for c in entries {
                    check(&[a, b, c], &addrs);
                }
            }
        }
    }

    #[test]
    fn what_is_next_to_one_another_becomes_one_range() {
        let both = [listed("10.0.0.0/9", None), listed("10.128.0.0/9", None), listed("10.1.0.0/16", Some(5))];
        let ranges = boundaries(&both, 4);
        let at = |addr: [u8; 4], expires_ns| Boundary {
            addr: u128::from(Ipv4Addr::from(addr).to_bits()) << 64,
            expires_ns,
        };
        assert_eq!(ranges, [at([0, 0, 0, 0], 0), at([10, 0, 0, 0], u64::MAX), at([11, 0, 0, 0], 0)]);
    }

    #[test]
    fn random_nested_prefixes_are_found_as_by_a_look_at_every_entry() {
        let mut state = 1u64;
        let mut below = |end: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % end
        };
        for _ in 0..300 {
            let (mut list, mut addrs) = (Vec::new(), Vec::new());
            for _ in 0..1 + below(40) {
                // Few bits differ, so that many are around others.
                let until_s = if below(2) == 0 { None } else { Some(1 + below(3)) };
                let (addr, bits) = if below(2) == 0 {
                    let bits = below(33) as u8;
                    let mask = u32::MAX.checked_shl(32 - u32::from(bits)).unwrap_or(0);
                    let addr = (below(4) << 30 | below(4) << 16 | below(4)) as u32 & mask;
                    for edge in [addr, addr.wrapping_sub(1), addr | !mask, (addr | !mask).wrapping_add(1)] {
                        addrs.push(Ipv4Addr::from_bits(edge).into());
                    }
                    (IpAddr::from(Ipv4Addr::from_bits(addr)), bits)
                } else {
                    let bits = below(129) as u8;
                    let mask = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0);
                    let part = |below: &mut dyn FnMut(u64) -> u64, at: u32| u128::from(below(4)) << at;
                    let addr = (part(&mut below, 126) | part(&mut below, 63) | part(&mut below, 0)) & mask;
                    for edge in [addr, addr.wrapping_sub(1), addr | !mask, (addr | !mask).wrapping_add(1)] {
                        addrs.push(Ipv6Addr::from_bits(edge).into());
                    }
                    (IpAddr::from(Ipv6Addr::from_bits(addr)), bits)
                };
                list.push(listed(&format!("{addr}/{bits}"), until_s));
            }
            check(&list, &addrs);
        }
    }
}
