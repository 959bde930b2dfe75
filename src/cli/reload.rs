//! Loads the file of a streaming process again: on SIGHUP and, if that is asked for, when it changes. A file that is wrong
//! is told and changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

/// How often files are looked at. A look follows names and links anew, so it does not matter how a file is replaced:
/// written in place, renamed over, or behind a link that is moved, as Kubernetes does it.
const PAUSE: Duration = Duration::from_millis(250);

/// What tells one state of a file from another; nothing if it is not there.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// What is in use since a file was loaded.
pub(super) struct Loaded {
    /// In one line.
    pub summary: String,
    /// The file and all that it names.
    pub files: Vec<PathBuf>,
}

/// How to load a file, and what it was like when it was last loaded.
pub(super) struct Reload<'a, L> {
    /// What is in the file.
    what: &'static str,
    load: L,
    files: Vec<PathBuf>,
    /// A change is enough.
    watch: bool,
    asked: &'a AtomicBool,
    loaded: Vec<Stamp>,
    /// At the last look. A file that still changes is not read.
    seen: Vec<Stamp>,
    next_look: Instant,
}

impl<'a, L: FnMut() -> Result<Loaded>> Reload<'a, L> {
    /// For a file that was loaded just now, with all that it names. `load` reads it and puts it into use.
    pub fn new(
        what: &'static str,
        files: Vec<PathBuf>,
        watch: bool,
        asked: &'a AtomicBool,
        load: L,
    ) -> Reload<'a, L> {
        let loaded = stamps(&files);
        Reload {
            what,
            load,
            watch,
            asked,
            seen: loaded.clone(),
            loaded,
            files,
            next_look: Instant::now() + PAUSE,
        }
    }

    /// Loads it again if that is asked for or due.
    pub fn look(&mut self) {
        let asked = self.asked.swap(false, Ordering::Relaxed);
        if !asked && !self.has_changed() {
            return;
        }
        // Before it is read: what changes while it is read is a change.
        self.loaded = stamps(&self.files);
        match (self.load)() {
            Ok(Loaded { summary, files }) => {
                // What a file was like that it did not name before, when it was read, nobody knows: it is read once more.
                if files != self.files {
                    self.files = files;
                    self.asked.store(true, Ordering::Relaxed);
                }
                note!("{} loaded again: {summary}", self.what);
            }
            Err(error) => note!("netoken: {error:#}"),
        }
    }

    fn has_changed(&mut self) -> bool {
        if !self.watch || Instant::now() < self.next_look {
            return false;
        }
        self.next_look = Instant::now() + PAUSE;
        let now = stamps(&self.files);
        let is_calm = now == self.seen;
        self.seen = now;
        // Between two steps of a replacement a file may not be there.
        is_calm && self.seen != self.loaded && self.seen.first().is_some_and(Option::is_some)
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let file = fs::metadata(path).ok()?;
        Some((file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec()))
    };
    files.iter().map(stamp).collect()
}
