//! Remembers what the kernel goes by, in a form that people and other versions can read: numbered files in a directory.
//!
//! ```text
//! <number>.toml    the text
//! <number>.next    what belongs to it, as JSON, until something goes by it
//! <number>.json    the same from then on
//! ```
//!
//! They are written before the kernel is told, which is told the number as well. So who has the number from the kernel finds
//! them, whenever a command was killed. Who has not, because the maps are gone or of another version, takes the newest
//! `.json`: a load that was killed has left none, and is not taken for what ran.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{make_dir, shown};

const TEXT: &str = "toml";
const BEGUN: &str = "next";
const CONFIRMED: &str = "json";

/// A directory of them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Remembered<'a>(pub &'a Path);

impl Remembered<'_> {
    /// The number of the newest that something went by.
    pub fn newest(self) -> Option<u64> {
        let files = self.numbered().into_iter();
        let confirmed =
            files.filter(|(_, path)| path.extension().is_some_and(|extension| extension == CONFIRMED));
        confirmed.map(|(number, _)| number).max()
    }

    /// The number that a next one follows. `running` is the one that the kernel has; where it has none, programs of another
    /// version may still go by the newest.
    pub fn before(self, running: Option<u64>) -> u64 {
        running.or_else(|| self.newest()).unwrap_or(0)
    }

    /// Remembers something and has it put into use, under the number that it returns. Where nothing ran before, nothing goes by it
    /// yet, and it is for an attach to confirm it; programs of another version may still go by older ones, which stay.
    ///
    /// # Errors
    /// It was not put into use; then all is remembered as it was.
    pub fn put(
        self,
        running: Option<u64>,
        text: &str,
        memory: &impl Serialize,
        put: impl FnOnce(u64) -> Result<()>,
    ) -> Result<u64> {
        let before = self.before(running);
        let number = before + 1;
        // A command that was killed may have left something.
        self.forget_newer(Some(before));
        let done = self.write(number, text, memory).and_then(|()| put(number));
        match (&done, running) {
            (Err(_), _) => self.forget_newer(Some(before)),
            (Ok(()), Some(_)) => {
                self.confirm(number);
                self.forget_all_but(number);
            }
            (Ok(()), None) => {}
        }
        done.map(|()| number)
    }

    /// Something goes by it.
    pub fn confirm(self, number: u64) {
        // If that fails it is still found by its number.
        fs::rename(self.path(number, BEGUN), self.path(number, CONFIRMED)).ok();
    }

    /// Forgets those with a higher number, or all if `number` is none.
    pub fn forget_newer(self, number: Option<u64>) {
        for (_, path) in self.numbered().into_iter().filter(|(found, _)| Some(*found) > number) {
            // What stays is removed by the next one.
            fs::remove_file(path).ok();
        }
    }

    fn forget_all_but(self, number: u64) {
        let kept = [TEXT, BEGUN, CONFIRMED].map(|kind| self.path(number, kind));
        for entry in fs::read_dir(self.0).into_iter().flatten().flatten() {
            if !kept.contains(&entry.path()) {
                // What stays is removed by the next one.
                fs::remove_file(entry.path()).ok();
            }
        }
    }

    /// The path of the text.
    pub fn text_path(self, number: u64) -> PathBuf {
        self.path(number, TEXT)
    }

    /// The text.
    ///
    /// # Errors
    /// It is gone.
    pub fn text(self, number: u64) -> Result<String> {
        let path = self.text_path(number);
        fs::read_to_string(&path).with_context(|| format!("reading {}", shown(&path).display()))
    }

    /// What belongs to it, or the part of that which is asked for.
    ///
    /// # Errors
    /// It is gone, or of another version.
    pub fn memory<T: DeserializeOwned>(self, number: u64) -> Result<T> {
        let read = |kind| fs::read_to_string(self.path(number, kind));
        let doing = || format!("reading {}", shown(&self.path(number, CONFIRMED)).display());
        // The first again: it may have been confirmed between two looks.
        let text = read(CONFIRMED).or_else(|_| read(BEGUN)).or_else(|_| read(CONFIRMED));
        serde_json::from_str(&text.with_context(doing)?).with_context(doing)
    }

    fn write(self, number: u64, text: &str, memory: &impl Serialize) -> Result<()> {
        let path = self.text_path(number);
        let write = || -> Result<()> {
            // For root alone: it may hold static tokens, and the directory above may be one that others can read. One that an
            // older version has made is not.
            make_dir(self.0)?;
            fs::set_permissions(self.0, Permissions::from_mode(0o700))?;
            fs::write(&path, text)?;
            fs::write(self.path(number, BEGUN), serde_json::to_vec(memory)?)?;
            Ok(())
        };
        write().with_context(|| format!("writing {}", shown(&path).display()))
    }

    fn path(self, number: u64, kind: &str) -> PathBuf {
        self.0.join(format!("{number}.{kind}"))
    }

    fn numbered(self) -> Vec<(u64, PathBuf)> {
        let paths = fs::read_dir(self.0).into_iter().flatten().flatten().map(|entry| entry.path());
        paths.filter_map(|path| Some((path.file_stem()?.to_str()?.parse().ok()?, path))).collect()
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn files(dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = entries.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn is(remembered: Remembered<'_>, number: u64, text: &str) {
        assert_eq!(remembered.text(number).unwrap(), text);
        assert_eq!(remembered.memory::<String>(number).unwrap(), text.to_uppercase());
    }

    #[test]
    fn what_nothing_went_by_is_found_by_its_number_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let remembered = Remembered(dir.path());
        let put =
            |running, text: &str| remembered.put(running, text, &text.to_uppercase(), |_| Ok(())).unwrap();
        assert_eq!(put(None, "one"), 1);
        is(remembered, 1, "one");
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(remembered.newest(), None);
        // The attach that wanted it was killed; the next one wants another.
        assert_eq!(put(None, "other"), 1);
        remembered.confirm(1);
        is(remembered, 1, "other");
        assert_eq!(
            (remembered.newest(), files(dir.path())),
            (Some(1), vec!["1.json".into(), "1.toml".into()])
        );
        // Where it runs, the change is all that there is to it.
        assert_eq!(put(Some(1), "two"), 2);
        is(remembered, 2, "two");
        assert_eq!(
            (remembered.newest(), files(dir.path())),
            (Some(2), vec!["2.json".into(), "2.toml".into()])
        );
        // Beside what another version goes by.
        assert_eq!(put(None, "three"), 3);
        assert_eq!(remembered.newest(), Some(2));
        is(remembered, 2, "two");
        remembered.forget_newer(Some(2));
        assert_eq!(files(dir.path()), ["2.json", "2.toml"]);
    }

    /// As a command leaves it that is killed while it fills maps, or right behind the moment at which its policy came into use.
    #[test]
    fn what_a_killed_load_wrote_is_nothing_unless_the_kernel_has_its_number() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = Remembered(dir.path());
        remembered.put(Some(6), "seven", &"SEVEN", |_| Ok(())).unwrap();
        let mut at_the_moment = Vec::new();
        let killed = remembered.put(Some(7), "eight", &"EIGHT", |number| {
            assert_eq!((number, remembered.newest()), (8, Some(7)));
            is(remembered, 8, "eight");
            is(remembered, 7, "seven");
            at_the_moment = files(dir.path());
            bail!("no memory")
        });
        assert_eq!(killed.unwrap_err().to_string(), "no memory");
        assert_eq!(at_the_moment, ["7.json", "7.toml", "8.next", "8.toml"]);
        assert_eq!(files(dir.path()), ["7.json", "7.toml"]);
        // A version that wrote its JSON at once left it under the name of what ran.
        fs::write(dir.path().join("8.json"), "\"half").unwrap();
        remembered
            .put(Some(7), "nine", &"NINE", |number| {
                assert_eq!((number, remembered.newest()), (8, Some(7)));
                Ok(())
            })
            .unwrap();
        is(remembered, 8, "nine");
    }
}
