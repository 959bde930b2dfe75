//! The lists of sources in the guard's file, and in files of their own: which prefixes, and until when.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use rustc_hash::FxHashSet;
use toml::Spanned;
use toml::value::{Datetime, Offset};

use super::forms::{ListedFile, UntilFile};
use super::rules::Listed;
use super::types::Size;
use super::wrong::{Text, Wrong};
use crate::files::Files;

/// Each may begin a range and end one, and for so many boundaries there is room in the pages of all levels.
const LIST_MAX: usize = (Size::SOURCE_PAGE_BOUNDARIES.0 as usize).pow(Size::SOURCE_LEVELS.0) / 2 - 1;

impl ListedFile {
    fn check(self) -> Result<Listed> {
        match self {
            ListedFile::Always(src) => Ok(Listed { src: src.parse()?, until: None }),
            ListedFile::Until(UntilFile { src, until }) => {
                Ok(Listed { src: src.parse()?, until: Some(time(&until.0)?) })
            }
        }
    }
}

/// As RFC 3339 and TOML write it; without an offset it is UTC.
fn time(text: &str) -> Result<SystemTime> {
    moment(text).with_context(|| {
        format!("'{text}' is no time; write it like 2026-12-01T00:00:00Z, or 2026-12-01T01:00:00+01:00")
    })
}

fn moment(text: &str) -> Option<SystemTime> {
    let Datetime { date: Some(date), time: Some(time), offset } = text.parse().ok()? else { return None };
    let second = time.second.unwrap_or_default();
    let utc = humantime::parse_rfc3339(&format!("{date}T{:02}:{:02}:{second:02}Z", time.hour, time.minute));
    let utc = utc.ok()? + Duration::from_nanos(time.nanosecond.unwrap_or_default().into());
    let Some(Offset::Custom { minutes }) = offset else { return Some(utc) };
    let away = Duration::from_secs(60 * u64::from(minutes.unsigned_abs()));
    if minutes > 0 { utc.checked_sub(away) } else { utc.checked_add(away) }
}

/// The prefixes of a list with their places, and those of the file that it names behind them.
pub(super) fn read(
    name: &str,
    inline: Vec<Spanned<ListedFile>>,
    file: Option<Spanned<String>>,
    of: &Text,
    dir: &Path,
    files: &Files,
    wrong: &mut Wrong,
) -> Vec<Listed> {
    let (mut listed, mut offsets) = (Vec::new(), Vec::new());
    for entry in inline {
        let offset = entry.span().start;
        if let Some(entry) = wrong.keep(entry.into_inner().check(), || format!("{}: '{name}'", of.at(offset)))
        {
            listed.push(entry);
            offsets.push(offset);
        }
    }
    let inline = listed.len();
    let file = file.and_then(|file| {
        let path = dir.join(file.get_ref());
        let doing = || format!("{}: reading the list {}", of.at(file.span().start), path.display());
        let text = wrong.keep(files.read(&path).map_err(Into::into), doing)?;
        let file = Text { name: path.display().to_string(), text };
        lines(&file, &mut listed, &mut offsets, wrong);
        Some(file)
    });
    if let Err((at, error)) = check(&listed) {
        let of = if at < inline { Some(of) } else { file.as_ref() };
        let place = of.map_or(String::new(), |of| of.at(offsets[at]));
        wrong.0.push(error.context(format!("{place}: '{name}'")));
    }
    listed
}

/// One prefix a line, and behind it, if it expires, when. A `#` begins a comment.
fn lines(file: &Text, listed: &mut Vec<Listed>, offsets: &mut Vec<usize>, wrong: &mut Wrong) {
    for line in file.text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(src) = words.next() else { continue };
        let offset = file.offset(src);
        let parsed = wrong.keep(src.parse(), || file.at(offset));
        let until = words.next();
        let until = until.map(|until| wrong.keep(time(until), || file.at_part(until)));
        if let Some(more) = words.next() {
            let error =
                anyhow!("'{more}' is one word too many; a line has a prefix and, if it expires, a time");
            wrong.0.push(error.context(file.at_part(more)));
        }
        if let Some(src) = parsed {
            listed.push(Listed { src, until: until.flatten() });
            offsets.push(offset);
        }
    }
}

/// No more prefixes of a family than there is room for, and none twice; or else which one is too many, and why.
fn check(list: &[Listed]) -> Result<(), (usize, anyhow::Error)> {
    for family in [4, 6] {
        let mut of_family = list.iter().enumerate().filter(|(_, listed)| listed.src.family() == family);
        if let Some((at, _)) = of_family.nth(LIST_MAX) {
            let count = LIST_MAX + 1 + of_family.count();
            let error = anyhow!("there are {count} prefixes of IPv{family}; there is room for {LIST_MAX}");
            return Err((at, error));
        }
    }
    let mut known = FxHashSet::with_capacity_and_hasher(list.len(), Default::default());
    match list.iter().enumerate().find(|(_, listed)| !known.insert(listed.src)) {
        Some((at, twice)) => Err((at, anyhow!("{} is listed twice", twice.src))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::rules::Rules;
    use super::*;

    const RULE: &str =
        "[[rule]]\nname = 'a'\ndst = '10.0.0.0/8'\nmode = 'drop'\ntokens = '0000000000000001'\n";

    #[test]
    fn a_time_is_what_rfc_3339_and_toml_write() {
        let until = |value: &str| {
            let text = format!("blocked = [{{ src = '1.2.3.4', until = {value} }}]\n{RULE}");
            Rules::from_toml(&text, Path::new(".")).map(|rules| rules.blocked[0].until.unwrap())
        };
        let (midnight, half) = (until("'2026-12-01T00:00:00Z'").unwrap(), Duration::from_millis(500));
        assert_eq!(midnight, SystemTime::UNIX_EPOCH + Duration::from_secs(1_796_083_200));
        for (text, expected) in [
            ("2026-12-01T00:00:00Z", midnight),
            ("2026-12-01t00:00:00z", midnight),
            ("2026-12-01T01:00:00+01:00", midnight),
            ("2026-11-30T18:30:00-05:30", midnight),
            ("2026-12-01T00:00:00.5Z", midnight + half),
            ("2026-12-01T01:00:00.500+01:00", midnight + half),
            ("2026-12-01T00:00:00", midnight),
            ("2026-12-01 00:00:00", midnight),
        ] {
            assert_eq!(until(&format!("'{text}'")).unwrap(), expected, "'{text}'");
            assert_eq!(until(text).unwrap(), expected, "{text}");
        }
        for value in
            ["2026-12-01", "'2026-12-01'", "00:00:00", "'1960-01-01T00:00:00Z'", "'2026-02-30T00:00:00Z'"]
        {
            let error = format!("{:#}", until(value).unwrap_err());
            let expected =
                format!("rules:1:12: 'blocked': '{}' is no time; write it like ", value.trim_matches('\''));
            assert!(error.contains(&expected), "{error}");
        }
        let error = format!("{:#}", until("5").unwrap_err());
        assert!(error.contains("rules:1:39: ") && error.contains("expected a time like 2026-"), "{error}");
    }

    #[test]
    fn lists_have_prefixes_and_times() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        fs::write(&path, "# a comment\n192.0.2.0/24\n\n2001:db8::1 2026-12-01T00:00:00Z # soon\n").unwrap();
        let text = format!("blocked_file = 'list'\nblocked = ['198.51.100.7']\n{RULE}");
        let rules = Rules::from_toml(&text, dir.path()).unwrap();
        assert_eq!(rules.blocked.len(), 3);
        let until = SystemTime::UNIX_EPOCH + Duration::from_secs(1_796_083_200);
        assert_eq!(rules.blocked[1], Listed { src: "192.0.2.0/24".parse().unwrap(), until: None });
        assert_eq!(rules.blocked[2], Listed { src: "2001:db8::1".parse().unwrap(), until: Some(until) });
        for (line, expect) in
            [("1.2.3.4 2026-12-01T00:00:00Z more", "list:1:30: 'more'"), ("x", "list:1:1: 'x'")]
        {
            fs::write(&path, line).unwrap();
            let error = format!("{:#}", Rules::from_toml(&text, dir.path()).unwrap_err());
            assert!(error.contains(expect), "{error}");
        }
    }

    #[test]
    fn a_list_that_is_too_long_is_refused() {
        let listed = |text: &str| Listed { src: text.parse().unwrap(), until: None };
        for (family, src) in [(4, "192.0.2.1"), (6, "2001:db8::1")] {
            let mut list = vec![listed(src); LIST_MAX];
            list.push(listed(if family == 4 { "::1" } else { "1.1.1.1" }));
            assert_eq!(check(&list).unwrap_err().1.to_string(), format!("{} is listed twice", list[0].src));
            list.push(listed(src));
            let error = format!("there are 8388608 prefixes of IPv{family}; there is room for 8388607");
            assert_eq!(check(&list).unwrap_err().1.to_string(), error);
        }
    }
}
