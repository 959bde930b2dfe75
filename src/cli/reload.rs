//! Loads the file of a streaming process again: on SIGHUP and, if that is asked for, when it changes. A file that is wrong
//! is told and changes nothing.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Result;

use super::signals::Signals;
use crate::files::{Files, Stamp};

/// How often files are looked at. A look follows names and links anew, so it does not matter how a file is replaced:
/// written in place, renamed over, or behind a link that is moved, as Kubernetes does it.
const PAUSE: Duration = Duration::from_millis(250);

/// How to load a file, and what it was like when it was last read, with all that it names.
pub(super) struct Reload<'a, L> {
    /// What is in the file.
    what: &'static str,
    load: L,
    files: Files,
    /// A change is enough.
    watch: bool,
    signals: &'a Signals,
    /// At the last look. A file that still changes is not read.
    seen: Vec<Option<Stamp>>,
    next_look: Instant,
    /// The file is not there, which was told.
    is_gone: bool,
}

impl<'a, L: FnMut(&Files) -> Result<String>> Reload<'a, L> {
    /// For a file that is in use, and was read by way of `files`. `load` reads it, puts it into use, and says what that is
    /// in one line.
    pub fn new(what: &'static str, files: Files, watch: bool, signals: &'a Signals, load: L) -> Self {
        let seen = files.as_read();
        Reload { what, load, files, watch, signals, seen, next_look: Instant::now() + PAUSE, is_gone: false }
    }

    /// Loads it again if that is asked for or due.
    pub fn look(&mut self) {
        let asked = self.signals.reload.swap(false, Ordering::Relaxed);
        if !asked && !self.has_changed() {
            return;
        }
        let files = Files::default();
        match (self.load)(&files) {
            Ok(summary) => note!("{} loaded again: {summary}", self.what),
            // There is no load after this one.
            Err(error) if self.signals.is_stopped() => note!("netoken: {error:#}"),
            Err(error) => {
                let error = format!("{error:#}");
                // In one piece: nobody else's line comes between them.
                note!("netoken: {}\nnetoken: {}", error.trim_end(), self.what_now());
            }
        }
        self.seen = files.as_read();
        self.files = files;
    }

    /// What a person needs to know after a load that failed. Not every reason is in a file that is watched.
    fn what_now(&self) -> String {
        let save = if self.watch { ", save the file" } else { "" };
        let signal = match self.signals.hears_hangup {
            true => format!("{}: kill -HUP {}", if self.watch { ", or" } else { "" }, std::process::id()),
            false => String::new(),
        };
        format!("still in use: the {} as loaded before; when this is mended{save}{signal}", self.what)
    }

    fn has_changed(&mut self) -> bool {
        if !self.watch || Instant::now() < self.next_look {
            return false;
        }
        self.next_look = Instant::now() + PAUSE;
        let now = self.files.now();
        let is_calm = now == self.seen;
        self.seen = now;
        if !is_calm {
            return false;
        }
        let is_there = self.seen.first().is_some_and(Option::is_some);
        if !is_there && !self.is_gone {
            let path = self.files.first().unwrap_or_default();
            note!("{} is gone; still in use: the {} as loaded before", path.display(), self.what);
        }
        self.is_gone = !is_there;
        // Not that it is gone: what runs goes on without it.
        is_there && self.seen != self.files.as_read()
    }
}
