//! Where netoken keeps things between two commands: a directory below /run with a BPF file system of its own.
//!
//! ```text
//! /run/netoken/lock                     held by a command that changes something
//! /run/netoken/bpf/<instance>/<map>     the pins of an instance, see `pins`
//! /run/netoken/<instance>.policy/       what is remembered of its policy, see `policy::running`
//! /run/netoken/<instance>.guard/        what is remembered of its guard, see `guard::running`
//! /run/netoken/<instance>.reader        held by the process that reads the events; says which it is
//! ```
//!
//! Not /sys/fs/bpf, because `ip netns exec` mounts a new /sys. For the same reason the file system is mounted
//! where the first process sees it, and reached through a descriptor that works in every mount namespace.

mod changing;
mod instance;
mod locks;
mod remembered;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileType};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::libc::{mode_t, uid_t};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, fstat};
use nix::sys::statfs::statfs;

pub(crate) use changing::Changing;
pub use instance::Instance;
pub(crate) use locks::wait_for;
pub use locks::{EventsOf, Lock, ReaderLock};
pub(crate) use remembered::Remembered;

/// Names another directory than /run/netoken.
pub const DIR_VARIABLE: &str = "NETOKEN_RUN";
const DEFAULT_DIR: &str = "/run/netoken";
const DEFAULT_INSTANCE: &str = "default";
/// Directories that iproute2 makes in a BPF file system where it loads a program, and its bind mounts or symbolic links.
const IPROUTE2: [&str; 3] = ["tc", "ip", "xdp"];
/// Files that the kernel puts at the top of a BPF file system.
const OF_THE_KERNEL: [&str; 2] = ["maps.debug", "progs.debug"];
/// How long others may take to close what they have open in the BPF file system.
const BUSY: Duration = Duration::from_secs(3);
/// `BPF_FS_MAGIC` of include/uapi/linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

/// The directory, open.
#[derive(Debug)]
pub struct State {
    path: PathBuf,
    dir: OwnedFd,
}

/// Tells an instance from one of the same name that was destroyed before: the file of a pin, by device and inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity(u64, u64);

impl State {
    /// Opens the directory, making it and mounting its BPF file system if that is not done yet, and keeps other
    /// commands from changing anything until the lock is dropped.
    ///
    /// # Errors
    /// It cannot be made or mounted; the message says what to do.
    pub fn create() -> Result<(State, Lock)> {
        State::create_unless(None)
    }

    /// The same, for who handles signals: waits for other commands only until `stop` is set.
    ///
    /// # Errors
    /// It cannot be made or mounted, or `stop` was set while another command held the lock.
    pub fn create_unless(stop: Option<&AtomicBool>) -> Result<(State, Lock)> {
        loop {
            let path = dir_path();
            let made = path.clone();
            // Nothing if the last user removes it between the two steps.
            let dir = in_first_mount_namespace(move || {
                check_no_link(&made)?;
                make_dir(&made)?;
                match open_dir(&made) {
                    Err(error) if error.downcast_ref() == Some(&Errno::ENOENT) => Ok(None),
                    other => other.map(Some),
                }
            })?;
            let Some(dir) = dir else { continue };
            let state = State { path, dir };
            // Nothing if the command that we waited for has removed all of it.
            if let Some(lock) = state.lock(stop)? {
                // Under the lock: two file systems on one directory would hide each other's pins.
                if let Err(error) = state.mount() {
                    fs::remove_file(state.below("lock")).ok();
                    fs::remove_dir(&state.path).ok();
                    return Err(error);
                }
                return Ok((state, lock));
            }
        }
    }

    /// The same for an instance that exists; nothing if it does not, or not any more.
    ///
    /// # Errors
    /// The directory is there and cannot be used.
    pub fn with_instance(name: &str) -> Result<Option<(State, Lock)>> {
        let is_there = |state: &State| state.instance(name).exists();
        if !State::find()?.is_some_and(|state| is_there(&state)) {
            return Ok(None);
        }
        let (state, lock) = State::create()?;
        if !is_there(&state) {
            // It was destroyed while we waited, perhaps with all the rest.
            state.remove_if_empty(lock)?;
            return Ok(None);
        }
        Ok(Some((state, lock)))
    }

    fn mount(&self) -> Result<()> {
        let bpf = self.path.join("bpf");
        in_first_mount_namespace(move || {
            if is_bpffs(&bpf) {
                return Ok(());
            }
            make_dir(&bpf)?;
            let source: Option<&str> = Some("bpf");
            let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
            mount(source, &bpf, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| {
                fs::remove_dir(&bpf).ok();
                mount_error(&bpf, errno)
            })
        })
    }

    /// Opens the directory if it is there, and has been put into use.
    ///
    /// # Errors
    /// It is there and cannot be opened, or is not root's alone.
    pub fn find() -> Result<Option<State>> {
        let path = dir_path();
        let wanted = path.clone();
        let dir = in_first_mount_namespace(move || {
            check_no_link(&wanted)?;
            let is_used = is_bpffs(&wanted.join("bpf"));
            match open_dir(&wanted) {
                Err(error) if !is_used && error.is::<Errno>() => Ok(None),
                dir => dir.map(|dir| is_used.then_some(dir)),
            }
        })?;
        Ok(dir.map(|dir| State { path, dir }))
    }

    /// A path below the directory that is valid in this process, whatever its mount namespace.
    pub fn below(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.dir.as_raw_fd())).join(name)
    }

    /// The instance of that name, whether it exists or not.
    pub fn instance(&self, name: &str) -> Instance {
        Instance {
            name: name.to_string(),
            pins: self.below("bpf").join(name),
            policy_dir: self.below(&format!("{name}.policy")),
            guard_dir: self.below(&format!("{name}.guard")),
        }
    }

    /// Every instance that has pins, and what is left of one whose attach was killed.
    ///
    /// # Errors
    /// They cannot be listed, which is not the same as that there are none.
    pub fn instances(&self) -> Result<Vec<Instance>> {
        let mut found = Vec::new();
        // The kernel may have put files of its own at the top.
        for (path, _) in entries(&self.below("bpf"))?.iter().filter(|(_, kind)| kind.is_dir()) {
            let name = path.file_name().and_then(OsStr::to_str).filter(|name| check_name(name).is_ok());
            let instance = name.map(|name| self.instance(name));
            if let Some(instance) = instance
                && instance.is_ours()?
            {
                found.push(instance);
            }
        }
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    /// Removes the BPF file system and the directory if no instance is left, and nobody else's pin. `lock` shows that
    /// nobody is about to make one.
    ///
    /// # Errors
    /// What is in it cannot be listed, or the file system is in use by somebody else.
    pub fn remove_if_empty(&self, mut lock: Lock) -> Result<()> {
        lock.free_spare();
        if !self.instances()?.is_empty() {
            return Ok(());
        }
        self.remove_dead_readers();
        if let Some(pin) = foreign_pin(&self.below("bpf"))? {
            let bpf = self.path.join("bpf");
            note!(
                "{} stays mounted: somebody else has pinned {} in it",
                bpf.display(),
                pin.strip_prefix(self.below("bpf")).unwrap_or(&pin).display()
            );
            return Ok(());
        }
        let path = self.path.clone();
        in_first_mount_namespace(move || {
            unmount(&path.join("bpf"))?;
            fs::remove_dir(path.join("bpf")).ok();
            fs::remove_file(path.join("lock")).ok();
            // Not empty while a reader still runs, which then removes it at its end.
            fs::remove_dir(&path).ok();
            Ok(())
        })
    }
}

/// Whether an instance may have that name, which becomes that of a directory of a BPF file system: those have no dots.
///
/// # Errors
/// It may not; the message says why.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if name.is_empty() || name.len() > 32 || !name.chars().all(fits) {
        bail!("an instance name is 1 to 32 letters, digits, '-' or '_'");
    }
    if IPROUTE2.contains(&name) {
        bail!("tc and ip make a directory of that name among those of instances; choose another");
    }
    Ok(())
}

/// How a path of [`State::below`] is called outside of this process.
pub fn shown(path: &Path) -> PathBuf {
    let mut parts = path.components();
    // /, proc, self, fd and the number.
    let dir: PathBuf = parts.by_ref().take(5).collect();
    match dir.starts_with("/proc/self/fd").then(|| fs::read_link(&dir)) {
        Some(Ok(dir)) => dir.join(parts.as_path()),
        _ => path.to_path_buf(),
    }
}

/// Something that somebody else has pinned, at any depth. Directories and symbolic links hold nothing.
fn foreign_pin(bpf: &Path) -> Result<Option<PathBuf>> {
    let of_the_kernel = |path: &Path| OF_THE_KERNEL.iter().any(|name| bpf.join(name) == path);
    let mut dirs = vec![bpf.to_path_buf()];
    while let Some(dir) = dirs.pop() {
        for (path, kind) in entries(&dir)? {
            match () {
                () if kind.is_dir() => dirs.push(path),
                () if !kind.is_symlink() && !of_the_kernel(&path) => return Ok(Some(path)),
                () => {}
            }
        }
    }
    Ok(None)
}

/// What is in a directory; nothing if it is not there.
fn entries(dir: &Path) -> Result<Vec<(PathBuf, FileType)>> {
    let doing = || format!("listing {}", shown(dir).display());
    let is_gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
    let mut found = Vec::new();
    match fs::read_dir(dir) {
        Err(error) if is_gone(&error) => {}
        listed => {
            for entry in listed.with_context(doing)? {
                let entry = entry.with_context(doing)?;
                match entry.file_type() {
                    Err(error) if is_gone(&error) => {}
                    kind => found.push((entry.path(), kind.with_context(doing)?)),
                }
            }
        }
    }
    Ok(found)
}

/// The flag that leads another command to the same instance, with a space in front; nothing for the default.
pub(crate) fn instance_flag(name: &str) -> String {
    if name == DEFAULT_INSTANCE { String::new() } else { format!(" --instance {name}") }
}

/// The same of the instance whose pins are in that directory.
pub(crate) fn flag_of_pins(dir: &Path) -> String {
    dir.file_name().and_then(OsStr::to_str).map_or(String::new(), instance_flag)
}

/// Where state is kept, absolute.
pub(crate) fn dir_path() -> PathBuf {
    let path = dir_named(std::env::var_os(DIR_VARIABLE));
    // In another mount namespace the current directory is another one. Taken apart, it has no slash at its end, which would
    // lead through a link.
    std::path::absolute(&path).unwrap_or(path).components().collect()
}

/// An empty name is none, as with other variables of this kind.
fn dir_named(name: Option<OsString>) -> PathBuf {
    name.filter(|name| !name.is_empty()).map_or(PathBuf::from(DEFAULT_DIR), PathBuf::from)
}

fn make_dir(path: &Path) -> Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path).with_context(|| {
        format!("making the directory {}; {DIR_VARIABLE} can name another place", path.display())
    })
}

fn open_dir(path: &Path) -> Result<OwnedFd> {
    let doing = || format!("opening {}", path.display());
    let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let dir = open(path, flags, Mode::empty()).with_context(doing)?;
    let found = fstat(&dir).with_context(doing)?;
    check_owner(found.st_uid, found.st_mode).with_context(doing)?;
    Ok(dir)
}

/// Whoever made a link decides where it leads.
fn check_no_link(path: &Path) -> Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|found| found.is_symlink()) {
        bail!(
            "opening {}: it is a symbolic link, and whoever made it could lead root anywhere; remove it, or have \
             {DIR_VARIABLE} name the directory itself",
            path.display()
        );
    }
    Ok(())
}

/// Who can make files in the directory could make links there, through which root would write anywhere, or a policy.
fn check_owner(owner: uid_t, mode: mode_t) -> Result<()> {
    let writers = Mode::S_IWGRP | Mode::S_IWOTH;
    let why = match (owner, Mode::from_bits_truncate(mode).intersects(writers)) {
        (0, false) => return Ok(()),
        (0, true) => format!("others than root can write to it (mode {:o})", mode & 0o7777),
        (other, _) => format!("it belongs to user {other}"),
    };
    bail!(
        "{why}, who could put links or a policy there; {DIR_VARIABLE} has to name a directory of root's that nobody \
         else can write to (chown root, chmod go-w)"
    )
}

/// `shown` is the same path as a person knows it.
fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|fs| fs.filesystem_type().0 == BPF_FS_MAGIC)
}

/// A query that reads a pin right now keeps the file system busy, for a moment.
fn unmount(path: &Path) -> Result<()> {
    let deadline = Instant::now() + BUSY;
    loop {
        match umount2(path, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) => return Ok(()),
            Err(Errno::EBUSY) if Instant::now() < deadline => thread::sleep(Duration::from_millis(10)),
            Err(errno) => {
                let remedy = match errno {
                    Errno::EBUSY => "a process has something open in it, which fuser -vm shows",
                    _ => "it needs CAP_SYS_ADMIN (try sudo)",
                };
                bail!("unmounting {}: {errno}; {remedy}; all else is done", path.display());
            }
        }
    }
}

fn mount_error(path: &Path, errno: Errno) -> anyhow::Error {
    let remedy = match errno {
        Errno::EPERM | Errno::EACCES => "it needs CAP_SYS_ADMIN (try sudo)".to_string(),
        Errno::ENODEV => "this kernel has no BPF file system; it needs CONFIG_BPF_SYSCALL".to_string(),
        _ => format!("mount it yourself (mount -t bpf bpf {}) or set {DIR_VARIABLE}", path.display()),
    };
    anyhow!("mounting a BPF file system on {}: {errno}; {remedy}", path.display())
}

/// Runs `f` in the mount namespace of the first process of the system. `ip netns exec` runs its command in a new
/// one, which ends with the command, and with it what was mounted there.
pub(crate) fn in_first_mount_namespace<T: Send>(f: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let Some(first) = first_mount_namespace() else { return f() };
    // A thread of its own: the namespace goes with the thread, and the process keeps its paths.
    thread::scope(|scope| {
        let work = scope.spawn(move || {
            unshare(CloneFlags::CLONE_FS).and_then(|()| setns(&first, CloneFlags::CLONE_NEWNS)).context(
                "entering the mount namespace of the first process; it needs CAP_SYS_ADMIN and CAP_SYS_CHROOT (try sudo)",
            )?;
            f()
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Nothing if that is where we are. Process 1 may have rights that we lack, and then cannot be looked at; the
/// outermost of our ancestors that can be is as good.
fn first_mount_namespace() -> Option<File> {
    let ours = fs::metadata("/proc/thread-self/ns/mnt").ok()?.ino();
    let mut ancestors = vec![1];
    let mut above = Vec::new();
    let mut pid = parent("self");
    while let Some(id) = pid.filter(|id| *id > 1) {
        above.push(id);
        pid = parent(&id.to_string());
    }
    ancestors.extend(above.into_iter().rev());
    let outermost = ancestors.iter().find_map(|pid| File::open(format!("/proc/{pid}/ns/mnt")).ok())?;
    (outermost.metadata().ok()?.ino() != ours).then_some(outermost)
}

fn parent(pid: &str) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:")).and_then(|id| id.trim().parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_of_others_is_refused() {
        assert!(check_owner(0, 0o040_700).is_ok() && check_owner(0, 0o040_755).is_ok());
        for (owner, mode, why) in
            [(0, 0o041_777, "mode 1777"), (0, 0o040_775, "775"), (7, 0o040_700, "user 7")]
        {
            let said = check_owner(owner, mode).unwrap_err().to_string();
            assert!(said.contains(why) && said.contains(DIR_VARIABLE), "{said}");
        }
    }

    #[test]
    fn the_directory_can_be_named() {
        assert_eq!(dir_named(None), Path::new("/run/netoken"));
        assert_eq!(dir_named(Some("".into())), Path::new("/run/netoken"));
        assert_eq!(dir_named(Some("/run/other".into())), Path::new("/run/other"));
    }
}
