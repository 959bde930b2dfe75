//! Loads the policy file of a streaming process again: on SIGHUP, and with `--watch` when a file changes. A file that is
//! wrong is told and changes nothing.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::args::AttachOptions;
use super::policy::{Progress, put, read};
use crate::program::Maps;
use crate::state::{Instance, State};

/// How often files are looked at. A look follows names and links anew, so it does not matter how a file is replaced:
/// written in place, renamed over, or behind a link that is moved, as Kubernetes does it.
const PAUSE: Duration = Duration::from_millis(250);

/// What tells one state of a file from another; nothing if it is not there.
type Stamp = Option<(u64, u64, u64, i64, i64)>;

/// The file, and what it was like when it was last loaded.
pub(super) struct Reload<'a> {
    path: &'a Path,
    options: &'a AttachOptions,
    instance: &'a Instance,
    maps: &'a Maps,
    /// The file and all that it names.
    files: Vec<PathBuf>,
    asked: &'a AtomicBool,
    loaded: Vec<Stamp>,
    /// At the last look. A file that still changes is not read.
    seen: Vec<Stamp>,
    next_look: Instant,
}

impl<'a> Reload<'a> {
    pub fn new(
        path: &'a Path,
        options: &'a AttachOptions,
        instance: &'a Instance,
        maps: &'a Maps,
        files: Vec<PathBuf>,
        asked: &'a AtomicBool,
    ) -> Reload<'a> {
        let stamps = stamps(&files);
        Reload {
            path,
            options,
            instance,
            maps,
            files,
            asked,
            loaded: stamps.clone(),
            seen: stamps,
            next_look: Instant::now() + PAUSE,
        }
    }

    /// Loads it again if that is asked for or due.
    ///
    /// # Errors
    /// None that comes from the file: those are told.
    pub fn look(&mut self) -> Result<()> {
        let asked = self.asked.swap(false, Ordering::Relaxed);
        if !asked && !self.has_changed() {
            return Ok(());
        }
        // Before it is read: what changes while it is read is a change.
        self.loaded = stamps(&self.files);
        match self.load() {
            Ok(summary) => note!("policy loaded again: {summary}"),
            Err(error) => note!("netoken: {error:#}"),
        }
        Ok(())
    }

    fn has_changed(&mut self) -> bool {
        if !self.options.watch || Instant::now() < self.next_look {
            return false;
        }
        self.next_look = Instant::now() + PAUSE;
        let now = stamps(&self.files);
        let is_calm = now == self.seen;
        self.seen = now;
        // Between two steps of a replacement a file may not be there.
        is_calm && self.seen != self.loaded && self.seen.first().is_some_and(Option::is_some)
    }

    fn load(&mut self) -> Result<String> {
        let progress = Progress::none();
        let checked = read(self.path, self.options.allow_missing, &progress)?;
        let (_state, _lock) = State::create().context("loading the policy again")?;
        put(self.instance, self.maps, &checked, self.path, &progress)?;
        if checked.files != self.files {
            self.files.clone_from(&checked.files);
            self.loaded = stamps(&self.files);
            self.seen.clone_from(&self.loaded);
        }
        Ok(checked.policy.summary())
    }
}

fn stamps(files: &[PathBuf]) -> Vec<Stamp> {
    let stamp = |path: &PathBuf| {
        let file = fs::metadata(path).ok()?;
        Some((file.dev(), file.ino(), file.size(), file.mtime(), file.mtime_nsec()))
    };
    files.iter().map(stamp).collect()
}
