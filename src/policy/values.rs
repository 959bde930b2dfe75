//! What a condition compares with: prefixes, ranges of numbers, marks, interfaces and cgroups, and lists of them.
//! How each is written and read back; which packets it fits is said in `docs/policy.md`.

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};

/// An address and how many of its leading bits count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Prefix {
    addr: IpAddr,
    bits: u8,
}

impl Prefix {
    /// The prefix in the one address space that the kernel side uses: IPv4 mapped into IPv6.
    pub fn mapped(self) -> (Ipv6Addr, u8) {
        match self.addr {
            IpAddr::V4(addr) => (addr.to_ipv6_mapped(), self.bits + 96),
            IpAddr::V6(addr) => (addr, self.bits),
        }
    }

    /// 4 or 6.
    pub(crate) fn family(self) -> u8 {
        if self.addr.is_ipv4() { 4 } else { 6 }
    }

    /// True for IPv6.
    pub fn is_v6(self) -> bool {
        self.addr.is_ipv6()
    }

    /// Bits that count, in its own family.
    pub fn bits(self) -> u8 {
        self.bits
    }

    /// True if every address in `other` is in this one.
    pub fn covers(self, other: Prefix) -> bool {
        if self.is_v6() != other.is_v6() || self.bits > other.bits {
            return false;
        }
        let (ours, bits) = self.mapped();
        let differs = u128::from(ours) ^ u128::from(other.mapped().0);
        differs.checked_shr(128 - u32::from(bits)).unwrap_or(0) == 0
    }

    /// True if the address is in it.
    pub fn contains(self, addr: IpAddr) -> bool {
        let bits = if addr.is_ipv4() { 32 } else { 128 };
        self.covers(Prefix { addr, bits })
    }

    /// The order in which what a prefix covers follows it.
    fn order(self) -> (bool, u128, u8) {
        (self.is_v6(), u128::from(self.mapped().0), self.bits)
    }
}

impl FromStr for Prefix {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (addr, bits) = match text.split_once('/') {
            Some((addr, bits)) => (addr, Some(bits)),
            None => (text, None),
        };
        let addr: IpAddr =
            addr.parse().map_err(|_| anyhow!("'{addr}' is neither an IPv4 nor an IPv6 address"))?;
        let width = if addr.is_ipv4() { 32 } else { 128 };
        let bits = match bits {
            None => width,
            Some(bits) => digits(bits).filter(|bits| *bits <= width).with_context(|| {
                format!("prefix length '{bits}' of {addr} is not a number from 0 to {width}")
            })?,
        };
        let prefix = Prefix { addr, bits };
        let (mapped, mapped_bits) = prefix.mapped();
        let host_bits = u128::MAX.checked_shr(mapped_bits.into()).unwrap_or(0);
        if u128::from(mapped) & host_bits != 0 {
            let network = Ipv6Addr::from(u128::from(mapped) & !host_bits);
            let network =
                network.to_ipv4_mapped().filter(|_| addr.is_ipv4()).map_or(IpAddr::V6(network), IpAddr::V4);
            bail!("{text} has bits set behind its prefix length; did you mean {network}/{bits}?");
        }
        if matches!(addr, IpAddr::V6(addr) if addr.to_ipv4_mapped().is_some() && bits >= 96) {
            bail!("{text} is an IPv4-mapped address, which is never on the wire; write it as IPv4");
        }
        Ok(prefix)
    }
}

/// A number without sign.
fn digits<T: FromStr>(text: &str) -> Option<T> {
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok()).flatten()
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr, self.bits)
    }
}

/// Numbers from `first` to `last`, both included: ports and user ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Range {
    /// The smallest.
    pub first: u32,
    /// The largest, not below `first`.
    pub last: u32,
}

impl Range {
    /// Just this number.
    pub fn one(number: u32) -> Range {
        Range { first: number, last: number }
    }

    /// How many numbers it has.
    pub fn count(self) -> u64 {
        u64::from(self.last) - u64::from(self.first) + 1
    }

    /// Reads `7` or `7-9`, none above `max`.
    ///
    /// # Errors
    /// It is neither, or empty.
    pub fn parse(text: &str, max: u32) -> Result<Range> {
        let number = |text: &str| {
            let text = text.trim();
            digits(text)
                .filter(|n| *n <= max)
                .with_context(|| format!("'{text}' is not a number from 0 to {max}"))
        };
        let (first, last) = match text.split_once('-') {
            // A number below zero is no range.
            Some((first, last)) if !first.trim().is_empty() => (number(first)?, number(last)?),
            _ => (number(text)?, number(text)?),
        };
        if first > last {
            bail!("the range {first}-{last} is empty; did you mean {last}-{first}?");
        }
        Ok(Range { first, last })
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.first == self.last {
            true => write!(f, "{}", self.first),
            false => write!(f, "{}-{}", self.first, self.last),
        }
    }
}

/// A value of the bits of an skb's mark that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mark {
    /// No bit is set that does not count.
    pub value: u32,
    /// The bits that count.
    pub mask: u32,
}

impl FromStr for Mark {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let number = |text: &str| {
            let parsed = match text.strip_prefix("0x") {
                Some(hex) if hex.bytes().all(|b| b.is_ascii_hexdigit()) => u32::from_str_radix(hex, 16).ok(),
                Some(_) => None,
                None => digits(text),
            };
            parsed.with_context(|| format!("'{text}' is not a number of 32 bits, like 16 or 0x10"))
        };
        let (value, mask) = match text.split_once('/') {
            Some((value, mask)) => (number(value)?, number(mask)?),
            None => (number(text)?, u32::MAX),
        };
        if value & !mask != 0 {
            bail!(
                "{text} can never match: the value has bits that the mask leaves out; did you mean {:#x}/{mask:#x}?",
                value & mask
            );
        }
        Ok(Mark { value, mask })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mask {
            u32::MAX => write!(f, "{:#x}", self.value),
            mask => write!(f, "{:#x}/{mask:#x}", self.value),
        }
    }
}

/// An interface as the policy names it, and what the kernel called it when the policy was read.
#[derive(Clone, Debug)]
pub struct Interface {
    /// `eth0`, or `blue:eth0` for one in the network namespace `blue`.
    pub name: Arc<str>,
    /// Inode number of its network namespace.
    pub netns: u32,
    /// Its index there; 0 if there was none of that name.
    pub index: u32,
}

impl Interface {
    /// What the kernel goes by; where there was none, the name, which may come to mean one.
    pub fn identity(&self) -> (u32, u32, &str) {
        if self.index == 0 { (0, 0, &self.name) } else { (self.netns, self.index, "") }
    }
}

/// A cgroup as the policy names it, and what the kernel called it when the policy was read.
#[derive(Clone, Debug)]
pub struct Cgroup {
    /// From the root of the cgroup2 hierarchy, like `/system.slice`.
    pub path: Arc<str>,
    /// How many directories below the root it is.
    pub level: u8,
    /// The kernel's number for it; 0 if there was none.
    pub id: u64,
}

impl Cgroup {
    /// What the kernel goes by; where there was none, the path, which may come to mean one.
    pub fn identity(&self) -> (u64, &str) {
        if self.id == 0 { (0, &self.path) } else { (self.id, "") }
    }
}

/// What a policy says is the name; that decides whether two are the same.
macro_rules! is_its_name {
    ($type:ident, $name:ident) => {
        impl PartialEq for $type {
            fn eq(&self, other: &Self) -> bool {
                self.$name == other.$name
            }
        }
        impl Eq for $type {}
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.$name)
            }
        }
    };
}
is_its_name!(Interface, name);
is_its_name!(Cgroup, path);

/// Values of which one has to fit. A single one, which is the most frequent, needs no memory of its own.
#[derive(Clone, Debug)]
pub enum List<T> {
    /// Only this one.
    One(T),
    /// Any number of them; shared by the rules that name the same set.
    Many(Arc<[T]>),
}

impl<T> List<T> {
    /// All of them.
    pub fn all(&self) -> &[T] {
        match self {
            List::One(one) => std::slice::from_ref(one),
            List::Many(many) => many,
        }
    }
}

impl<T> From<Vec<T>> for List<T> {
    fn from(mut values: Vec<T>) -> Self {
        match values.len() {
            1 => List::One(values.remove(0)),
            _ => List::Many(values.into()),
        }
    }
}

impl<T: PartialEq> PartialEq for List<T> {
    fn eq(&self, other: &Self) -> bool {
        self.all() == other.all()
    }
}
impl<T: Eq> Eq for List<T> {}

/// Sorts, and leaves out what another one covers.
pub fn merge_prefixes(list: &mut Vec<Prefix>) {
    list.sort_unstable_by_key(|prefix| prefix.order());
    let mut last: Option<Prefix> = None;
    list.retain(|prefix| {
        let keep = !last.is_some_and(|last| last.covers(*prefix));
        if keep {
            last = Some(*prefix);
        }
        keep
    });
}

/// Sorts, and joins what touches.
pub fn merge_ranges(list: &mut Vec<Range>) {
    list.sort_unstable();
    let mut merged: Vec<Range> = Vec::with_capacity(list.len());
    for range in list.iter() {
        match merged.last_mut() {
            Some(last) if u64::from(range.first) <= u64::from(last.last) + 1 => {
                last.last = last.last.max(range.last);
            }
            _ => merged.push(*range),
        }
    }
    *list = merged;
}

/// True if a merged list has a prefix that covers this one.
pub fn some_covers(list: &[Prefix], prefix: Prefix) -> bool {
    let after = list.partition_point(|other| other.order() <= prefix.order());
    after > 0 && list[after - 1].covers(prefix)
}

/// True if a merged list has a prefix that shares an address with this one.
pub fn some_meets(list: &[Prefix], prefix: Prefix) -> bool {
    let after = list.partition_point(|other| other.order() < prefix.order());
    some_covers(list, prefix) || list.get(after).is_some_and(|next| prefix.covers(*next))
}

/// True if a merged list has a range with all of this one.
pub fn some_range_covers(list: &[Range], range: Range) -> bool {
    let after = list.partition_point(|other| other.first <= range.first);
    after > 0 && list[after - 1].last >= range.last
}

/// True if a merged list has a range that shares a number with this one.
pub fn some_range_meets(list: &[Range], range: Range) -> bool {
    let after = list.partition_point(|other| other.first <= range.last);
    after > 0 && list[after - 1].last >= range.first
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_at_their_edges() {
        for good in ["0.0.0.0/0", "::/0", "255.255.255.255/32", "ffff::/16", "::1/128", "10.0.0.1"] {
            assert!(good.parse::<Prefix>().is_ok(), "{good}");
        }
        assert_eq!("10.0.0.1".parse::<Prefix>().unwrap().to_string(), "10.0.0.1/32");
        for bad in
            ["10.0.0.0/+8", "10.0.0.0/", "/8", "10.0.0.0/33", "::/129", "10.0.0.0/8/8", "::ffff:1.2.3.4"]
        {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ranges_and_marks_at_their_edges() {
        assert_eq!(Range::parse("0-65535", 65535).unwrap().count(), 65536);
        assert_eq!(Range::parse("0-4294967295", u32::MAX).unwrap().count(), 1 << 32);
        for bad in ["", "-", "1-", "-1", "2-1", "65536", "1-65536", "+1", "1--2"] {
            assert!(Range::parse(bad, 65535).is_err(), "{bad}");
        }
        let negative = Range::parse("-1", 65535).unwrap_err().to_string();
        assert_eq!(negative, "'-1' is not a number from 0 to 65535");
        for good in ["0", "0/0", "0xffffffff", "0x10/0xf0", "4294967295"] {
            assert!(good.parse::<Mark>().is_ok(), "{good}");
        }
        for bad in ["", "0x", "0x1ffffffff", "1/0", "0x+1", "1/2/3"] {
            assert!(bad.parse::<Mark>().is_err(), "{bad}");
        }
    }

    #[test]
    fn lists_are_merged() {
        let parse = |list: &[&str]| list.iter().map(|p| p.parse().unwrap()).collect::<Vec<Prefix>>();
        let mut list = parse(&["10.1.0.0/16", "::/0", "10.0.0.0/8", "9.0.0.0/8", "10.0.0.0/8", "fd00::/8"]);
        merge_prefixes(&mut list);
        assert_eq!(list, parse(&["9.0.0.0/8", "10.0.0.0/8", "::/0"]));
        assert!(some_covers(&list, "10.255.0.0/16".parse().unwrap()));
        assert!(!some_covers(&list, "0.0.0.0/0".parse().unwrap()));
        assert!(some_meets(&list, "0.0.0.0/0".parse().unwrap()));
        assert!(!some_meets(&list, "11.0.0.0/8".parse().unwrap()));

        let mut ranges = [(5, 9), (1, 2), (3, 4), (20, u32::MAX), (21, 22)]
            .map(|(first, last)| Range { first, last })
            .to_vec();
        merge_ranges(&mut ranges);
        assert_eq!(ranges, [Range { first: 1, last: 9 }, Range { first: 20, last: u32::MAX }]);
        for first in 0..=25 {
            for last in first..=25 {
                let range = Range { first, last };
                let covers = ranges.iter().any(|r| r.first <= first && last <= r.last);
                let meets = ranges.iter().any(|r| r.first <= last && first <= r.last);
                assert_eq!(some_range_covers(&ranges, range), covers, "{range}");
                assert_eq!(some_range_meets(&ranges, range), meets, "{range}");
            }
        }
        assert!(!some_range_covers(&[], Range::one(1)) && !some_range_meets(&[], Range::one(1)));
    }
}
