//! Reads the files that a policy or rules are made of, and keeps what each was like before it was read: who compares
//! that with what is there now misses no change, whenever it came.

use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, poll};
use nix::time::{ClockId, clock_gettime};

/// Offsets in a file are kept in 32 bits.
const FILE_MAX_BYTES: u64 = 1 << 32;

/// How far the times of files may be ahead of the clock that they are taken from: newer kernels give a file that was
/// looked at a time between two ticks, and a tick is 10 ms at most. What is further ahead is from another clock.
const TICK: Duration = Duration::from_millis(10);

const BYTE_ORDER_MARK: char = '\u{feff}';

/// How long the writer of a pipe may take for the first and each further piece.
const PIPE_PATIENCE_MS: u16 = 5000;

/// The files that were read, in that order.
#[derive(Debug, Default)]
pub struct Files(Mutex<Vec<Seen>>);

#[derive(Debug)]
struct Seen {
    path: PathBuf,
    stamp: Option<Stamp>,
}

/// What tells one state of a file from another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified_ns: i128,
    changed_ns: i128,
}

impl Files {
    /// Reads a file as text.
    ///
    /// # Errors
    /// It cannot be read, is no UTF-8, is a device, whose text may never end, or a pipe into which nobody writes.
    pub fn read(&self, path: &Path) -> io::Result<String> {
        let found = fs::metadata(path);
        let opened = match &found {
            // Not even opened: that alone can do something to it.
            Ok(found) if is_device(found) => Err(io::Error::other("it is a device")),
            // Or a pipe into which nobody writes would keep whoever opens it, for ever.
            _ => File::options()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(path)
                .and_then(|file| Ok((file.metadata()?, file))),
        };
        let stamp = match &opened {
            // Of what is read, and not of what may have taken its name meanwhile.
            Ok((opened, _)) => Some(Stamp::of(opened)).filter(|stamp| stamp.is_settled(file_clock())),
            Err(_) => found.ok().as_ref().map(Stamp::of),
        };
        self.seen().push(Seen { path: path.to_path_buf(), stamp });
        let (opened, mut file) = opened?;
        if opened.len() >= FILE_MAX_BYTES {
            return Err(io::Error::other("it is larger than 4 GiB"));
        }
        let mut text = String::new();
        match opened.file_type().is_fifo() {
            true => Pipe(file).read_to_string(&mut text)?,
            false => file.read_to_string(&mut text)?,
        };
        // Some editors begin a file with a byte order mark, which nobody sees.
        if text.starts_with(BYTE_ORDER_MARK) {
            text.remove(0);
        }
        Ok(text)
    }

    /// How many were read, or tried to.
    pub fn len(&self) -> usize {
        self.seen().len()
    }

    /// True if none was.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The one that was read first, and that names the others.
    pub(crate) fn first(&self) -> Option<PathBuf> {
        self.seen().first().map(|seen| seen.path.clone())
    }

    /// What each was like before it was read. Nothing of one that was not there, and of one whose last change is so near
    /// that the next could look the same: what is found there later counts as a change of either.
    pub(crate) fn as_read(&self) -> Vec<Option<Stamp>> {
        self.seen().iter().map(|seen| seen.stamp).collect()
    }

    /// What is found by the same names now; nothing of what is not there.
    pub(crate) fn now(&self) -> Vec<Option<Stamp>> {
        let now = |seen: &Seen| fs::metadata(&seen.path).ok().as_ref().map(Stamp::of);
        self.seen().iter().map(now).collect()
    }

    fn seen(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.0.lock().unwrap_or_else(|e| e.into_inner())
    }
}

/// A pipe that is read without waiting for ever.
struct Pipe(File);

impl Read for Pipe {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PIPE_PATIENCE_MS)? {
            0 => Err(io::Error::other("it is a pipe, and nothing came out of it for 5 s")),
            _ => self.0.read(buffer),
        }
    }
}

impl Stamp {
    fn of(file: &Metadata) -> Stamp {
        let ns = |s: i64, ns: i64| i128::from(s) * 1_000_000_000 + i128::from(ns);
        let stamp = Stamp { device: file.dev(), inode: file.ino(), size: 0, modified_ns: 0, changed_ns: 0 };
        if !file.is_file() {
            // What comes out of a pipe comes once, and its times change with each use.
            return stamp;
        }
        Stamp {
            size: file.size(),
            modified_ns: ns(file.mtime(), file.mtime_nsec()),
            changed_ns: ns(file.ctime(), file.ctime_nsec()),
            ..stamp
        }
    }

    /// False if a change that comes now could get the same times. To be asked before the file is read.
    fn is_settled(&self, now: Duration) -> bool {
        let ahead_ns = self.changed_ns - now.as_nanos().cast_signed();
        !(0..=TICK.as_nanos().cast_signed()).contains(&ahead_ns)
    }
}

/// The clock that file systems go by, which stands still between two ticks.
fn file_clock() -> Duration {
    clock_gettime(ClockId::CLOCK_REALTIME_COARSE).map_or(Duration::ZERO, Duration::from)
}

fn is_device(file: &Metadata) -> bool {
    file.file_type().is_char_device() || file.file_type().is_block_device()
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Instant;

    use nix::sys::stat::Mode;
    use nix::unistd::mkfifo;

    use super::*;

    /// Reads a file until its last change is long enough ago to be told from the next.
    fn read_settled(path: &Path) -> Files {
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            let files = Files::default();
            files.read(path).unwrap();
            if files.as_read() == files.now() {
                return files;
            }
            assert!(Instant::now() < deadline, "a file that nobody changes has changed");
        }
    }

    #[test]
    fn what_nobody_changes_has_not_changed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "one").unwrap();
        let files = read_settled(&path);
        assert!(files.as_read()[0].is_some());
        // A look is no change.
        fs::read(&path).unwrap();
        assert_eq!(files.as_read(), files.now());
    }

    #[test]
    fn every_way_of_changing_a_file_is_a_change() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("file"), dir.path().join("other"));
        let ways: [&dyn Fn(); 4] = [
            &|| fs::write(&path, "two").unwrap(),
            &|| {
                fs::write(&other, "two").unwrap();
                fs::rename(&other, &path).unwrap();
            },
            &|| fs::remove_file(&path).unwrap(),
            // Of the same length, and with the time that it had.
            &|| {
                let before = fs::metadata(&path).unwrap().modified().unwrap();
                fs::write(&path, "two").unwrap();
                File::options().write(true).open(&path).unwrap().set_modified(before).unwrap();
            },
        ];
        for (number, way) in ways.iter().enumerate() {
            fs::write(&path, "one").unwrap();
            let files = read_settled(&path);
            way();
            assert_ne!(files.as_read(), files.now(), "way {number}");
        }
    }

    #[test]
    fn a_change_of_this_very_tick_is_not_settled() {
        let dir = tempfile::tempdir().unwrap();
        let stamp = Stamp::of(&fs::metadata(dir.path()).unwrap());
        let changed = Duration::from_secs(1_000_000_000);
        let stamp = Stamp { changed_ns: changed.as_nanos().cast_signed(), ..stamp };
        let ms = Duration::from_millis;
        for (now, settled) in [
            (changed, false),
            (changed - ms(5), false),
            (changed + ms(4), true),
            // Or it would be read again and again until that clock has caught up.
            (changed - ms(1000), true),
        ] {
            assert_eq!(stamp.is_settled(now), settled, "{now:?}");
        }
    }

    /// Kernels from 6.13 on see to it themselves.
    #[test]
    fn two_changes_within_a_tick_are_two() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        for round in 0..200 {
            fs::write(&path, "one").unwrap();
            let files = Files::default();
            assert_eq!(files.read(&path).unwrap(), "one");
            fs::write(&path, "two").unwrap();
            assert_ne!(files.as_read(), files.now(), "round {round}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_yet_changes_when_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let files = Files::default();
        files.read(&path).unwrap_err();
        assert_eq!((files.as_read(), files.now()), (vec![None], vec![None]));
        fs::write(&path, "one").unwrap();
        assert_ne!(files.as_read(), files.now());
    }

    #[test]
    fn a_byte_order_mark_is_no_text() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("list");
        fs::write(&path, "\u{feff}192.0.2.1\n").unwrap();
        assert_eq!(Files::default().read(&path).unwrap(), "192.0.2.1\n");
    }

    #[test]
    fn a_pipe_into_which_nobody_writes_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let error = Files::default().read(&path).unwrap_err();
        assert_eq!(error.to_string(), "it is a pipe, and nothing came out of it for 5 s");
    }

    #[test]
    fn what_comes_out_of_a_pipe_does_not_change_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let files = Files::default();
        thread::scope(|scope| {
            scope.spawn(|| fs::write(&path, "text").unwrap());
            assert_eq!(files.read(&path).unwrap(), "text");
        });
        assert_eq!(files.as_read(), files.now());
    }

    #[test]
    fn what_cannot_be_read_is_not_read_again_and_again() {
        let files = Files::default();
        assert!(files.read(Path::new("/dev/zero")).unwrap_err().to_string().contains("device"));
        assert!(files.read(Path::new("/")).is_err());
        assert!(files.as_read().iter().all(Option::is_some));
        assert_eq!(files.as_read(), files.now());
    }
}
