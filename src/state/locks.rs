//! Who may change the state, and who reads the events of an instance. Each lock is a file that says who holds it, for
//! whoever has to wait or is refused.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use super::{DIR_VARIABLE, Instance, State, in_first_mount_namespace};

/// What the name of a reader's file ends in.
const READER: &str = "reader";
/// How late one who waits for the lock may notice that it is to stop.
const LOOK: Duration = Duration::from_millis(50);

/// Held while something is changed, so that two commands cannot both find nothing and both attach.
#[derive(Debug)]
pub struct Lock {
    held: Flock<File>,
    /// So that who fails for lack of descriptors can still look at what is to be taken back.
    spare: Option<OwnedFd>,
}

impl Lock {
    /// To be called before that look.
    pub(super) fn free_spare(&mut self) {
        self.spare = None;
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Or the next to wait would be told a process that has ended.
        self.held.set_len(0).ok();
    }
}

/// Whose events: each kind has a buffer of its own in an instance, and so a reader of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventsOf {
    /// What became of the SYNs that went out.
    Stamp,
    /// What was decided of the packets that came in.
    Guard,
}

/// Held by the one process that reads the events of an instance.
#[derive(Debug)]
pub struct ReaderLock {
    path: PathBuf,
    /// Where the state is, for every process.
    state: PathBuf,
    _lock: Flock<File>,
}

impl State {
    /// Waits until no other command changes anything, or `stop` is set. Nothing if the directory was removed meanwhile.
    pub(super) fn lock(&self, stop: Option<&AtomicBool>) -> Result<Option<Lock>> {
        let spare = Some(self.dir.try_clone().context("keeping a spare descriptor")?);
        let path = self.below("lock");
        let file = match lock_file(&path, &self.path.join("lock")) {
            Err(_) if !path.parent().is_some_and(|dir| fs::metadata(dir).is_ok_and(|m| m.nlink() > 0)) => {
                return Ok(None);
            }
            other => other?,
        };
        let held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => held,
            Err((mut file, _)) => {
                let holder = holder(&mut file);
                note!("waiting for {holder} to finish");
                match wait_for(file, stop) {
                    Ok(Some(held)) => held,
                    Ok(None) => bail!("stopped while waiting for {holder} to finish"),
                    Err(errno) => bail!("locking {}/lock: {errno}", self.path.display()),
                }
            }
        };
        if !same_file(&held, &path) {
            return Ok(None);
        }
        let mut lock = Lock { held, spare };
        // Only a name for who waits.
        sign(&mut lock.held).ok();
        Ok(Some(lock))
    }

    /// Becomes the one reader of an instance's events of one kind.
    ///
    /// # Errors
    /// Another process reads them; the message names it.
    pub fn lock_reader(&self, instance: &Instance, of: EventsOf) -> Result<ReaderLock> {
        let (kind, whose, instead) = match of {
            EventsOf::Stamp => {
                ("", "events", "stop that one, or attach with --quiet, or use another --instance")
            }
            EventsOf::Guard => (".guard", "guard's events", "stop that one"),
        };
        let name = format!("{}{kind}.{READER}", instance.name);
        let path = self.below(&name);
        loop {
            let file = lock_file(&path, &self.path.join(&name))?;
            match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                Ok(mut held) if same_file(&held, &path) => {
                    // Only a name for who is refused.
                    sign(&mut held).ok();
                    return Ok(ReaderLock { path, state: self.path.clone(), _lock: held });
                }
                Ok(_) => continue,
                Err((mut file, _)) => {
                    bail!(
                        "reading the {whose} of instance '{}': {} already reads them, and an event has one reader; {instead}",
                        instance.name,
                        holder(&mut file)
                    );
                }
            }
        }
    }

    /// A reader that was killed leaves its file, which would keep the directory.
    pub(super) fn remove_dead_readers(&self) {
        for entry in fs::read_dir(self.below("")).into_iter().flatten().flatten() {
            let path = entry.path();
            if path.extension().is_none_or(|extension| extension != READER) {
                continue;
            }
            let Ok(file) = File::open(&path) else { continue };
            // Removed while it is held: one who waits for it sees that it is not the one with that name any more.
            if let Ok(_held) = Flock::lock(file, FlockArg::LockExclusiveNonblock) {
                fs::remove_file(&path).ok();
            }
        }
    }
}

impl Drop for ReaderLock {
    fn drop(&mut self) {
        fs::remove_file(&self.path).ok();
        // A destroy meanwhile has left the directory for this file alone; with anything else in it, it stays.
        let state = self.state.clone();
        in_first_mount_namespace(move || Ok(fs::remove_dir(state)?)).ok();
    }
}

/// Waits for a lock that another process holds, or until `stop` is set; nothing then.
pub(crate) fn wait_for(mut file: File, stop: Option<&AtomicBool>) -> Result<Option<Flock<File>>, Errno> {
    let Some(stop) = stop else {
        return Flock::lock(file, FlockArg::LockExclusive).map(Some).map_err(|(_, errno)| errno);
    };
    // A signal that is handled does not end a wait in the kernel: the handlers ask for it to go on.
    while !stop.load(Ordering::Relaxed) {
        thread::sleep(LOOK);
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(held) => return Ok(Some(held)),
            Err((same, Errno::EWOULDBLOCK)) => file = same,
            Err((_, errno)) => return Err(errno),
        }
    }
    Ok(None)
}

fn lock_file(path: &Path, shown: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(path)
        .with_context(|| {
            format!("opening the lock {}; {DIR_VARIABLE} can name another place", shown.display())
        })
}

/// Writes into a lock who holds it.
fn sign(lock: &mut File) -> io::Result<()> {
    let arguments: Vec<_> = std::env::args_os().map(|one| one.to_string_lossy().into_owned()).collect();
    lock.set_len(0)?;
    // Who waited has read what the one before wrote.
    lock.rewind()?;
    write!(lock, "process {} ({})", std::process::id(), arguments.join(" "))
}

/// Who holds a lock, as far as that is written in it.
pub(super) fn holder(lock: &mut File) -> String {
    let mut holder = String::new();
    lock.read_to_string(&mut holder).ok();
    if holder.is_empty() { "another netoken command".to_string() } else { holder }
}

fn same_file(held: &File, path: &Path) -> bool {
    match (held.metadata(), fs::metadata(path)) {
        (Ok(ours), Ok(there)) => (ours.dev(), ours.ino()) == (there.dev(), there.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waited_signs_in_the_place_of_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("lock");
        fs::write(
            &path,
            "process 1 (somebody with a long command line, longer than that of this test by far)",
        )
        .unwrap();
        let mut file = lock_file(&path, &path).unwrap();
        assert!(holder(&mut file).starts_with("process 1 "));
        sign(&mut file).unwrap();
        let said = fs::read_to_string(&path).unwrap();
        assert!(said.starts_with(&format!("process {} (", std::process::id())), "{said:?}");
    }
}
