//! Network namespaces: which one we are in, which ones have names, and doing something in another one.

use std::collections::HashSet;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::statfs::fstatfs;

/// Where `ip netns add` keeps its namespaces.
const NAMED: &str = "/run/netns";
/// `NSFS_MAGIC` of include/uapi/linux/magic.h.
const NSFS_MAGIC: i64 = 0x6e73_6673;
/// The namespace of the calling thread: a command may have moved it.
const CURRENT: &str = "/proc/thread-self/ns/net";

/// There is no network namespace of that name or path; says so.
#[derive(Clone, Debug)]
pub struct NoSuchNetns(String);

impl fmt::Display for NoSuchNetns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoSuchNetns {}

/// A network namespace, held open.
#[derive(Debug)]
pub struct Netns {
    /// How a person calls it; empty for the one that the command was started in.
    pub name: String,
    file: File,
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Netns {
    /// The namespace that the calling thread is in.
    ///
    /// # Errors
    /// /proc is not mounted.
    pub fn current() -> Result<Netns> {
        let file = File::open(CURRENT).with_context(|| format!("opening {CURRENT}; is /proc mounted?"))?;
        Ok(Netns { name: String::new(), file })
    }

    /// A namespace by its name, as `ip netns` lists it, or by the path of its file.
    ///
    /// # Errors
    /// [`NoSuchNetns`] if there is none.
    /// There is none; the message lists those with a name.
    pub fn open(name_or_path: &str) -> Result<Netns> {
        let path = match name_or_path.contains('/') {
            true => PathBuf::from(name_or_path),
            false => Path::new(NAMED).join(name_or_path),
        };
        // Anything can have that name, also a pipe that would be waited for.
        let opened = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(&path);
        let file = opened.map_err(|error| {
            let names = names();
            let known = if names.is_empty() { "there are none".to_string() } else { names.join(", ") };
            let doing =
                format!("opening the network namespace {} (those with a name: {known})", path.display());
            match error.kind() {
                io::ErrorKind::NotFound => anyhow!(NoSuchNetns(format!("{doing}: {error}"))),
                _ => anyhow!(error).context(doing),
            }
        })?;
        // Entering would tell it too, but as one error number for several reasons.
        if !fstatfs(&file).is_ok_and(|fs| fs.filesystem_type().0 == NSFS_MAGIC) {
            bail!(
                "opening the network namespace {}: the file is not a network namespace; if `ip netns` made it, it is \
                 mounted in another mount namespace: try /proc/PID/ns/net of a process that runs in it",
                path.display()
            );
        }
        Ok(Netns { name: name_or_path.to_string(), file })
    }

    /// All namespaces that can be found: the current one, then those with a name.
    ///
    /// # Errors
    /// The current one cannot be opened.
    pub fn all() -> Result<Vec<Netns>> {
        let mut found = vec![Netns::current()?];
        let mut known: HashSet<u32> = found.iter().map(Netns::inode).collect();
        for name in names() {
            // One that was deleted a moment ago is no error: it holds nothing of ours any more. Nor is a bare file:
            // so looks, from another mount namespace, what `ip netns` has mounted in its own.
            let Ok(netns) = Netns::open(&name) else { continue };
            if known.insert(netns.inode()) {
                found.push(netns);
            }
        }
        Ok(found)
    }

    /// Those that have a name, and those that processes run in; each once.
    pub fn everywhere() -> Vec<Netns> {
        let named = names().into_iter().map(|name| Path::new(NAMED).join(name));
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        let of_processes = processes.map(|entry| entry.path().join("ns/net"));
        let mut known = HashSet::new();
        named
            .chain(of_processes)
            .filter(|path| fs::metadata(path).is_ok_and(|netns| known.insert(netns.ino())))
            .filter_map(|path| Netns::open(path.to_str()?).ok())
            .collect()
    }

    /// The number that identifies it while it exists; BPF programs report it in their events.
    pub fn inode(&self) -> u32 {
        // The kernel allocates these numbers as 32 bits (struct ns_common).
        self.file.metadata().map_or(0, |metadata| metadata.ino() as u32)
    }

    /// The name that `ip netns` gave it; nothing for the one of the first process, where a machine's own interfaces are.
    pub fn given_name(&self) -> Option<String> {
        let inode = |path: &Path| fs::metadata(path).map(|file| file.ino() as u32);
        if inode(Path::new("/proc/1/ns/net")).ok() == Some(self.inode()) {
            return None;
        }
        names().into_iter().find(|name| inode(&Path::new(NAMED).join(name)).ok() == Some(self.inode()))
    }

    /// How `--netns` can be told it: by the name that `ip netns` gave it, or else by the path that led to it.
    pub fn called(&self) -> String {
        self.given_name().unwrap_or_else(|| self.name.clone())
    }

    /// Moves the calling thread into it.
    ///
    /// # Errors
    /// The file is not a network namespace, or CAP_SYS_ADMIN is missing.
    pub fn enter(&self) -> Result<()> {
        // That it is of another kind was found out when it was opened.
        setns(&self.file, CloneFlags::CLONE_NEWNET).with_context(|| {
            format!("entering the network namespace '{}'; it needs CAP_SYS_ADMIN (try sudo)", self.name)
        })
    }

    /// Does something in it and comes back.
    ///
    /// # Errors
    /// It cannot be entered or left, or what was done there failed.
    pub fn run<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let home = Netns::current()?;
        if home.inode() == self.inode() {
            return f();
        }
        self.enter()?;
        let result = f();
        home.enter()?;
        result
    }
}

/// Looks into each of them. What fails in one is told, and hides nothing of the others.
///
/// # Errors
/// It failed everywhere; so also where there is but one.
pub fn look_into<T>(places: &[Netns], mut look: impl FnMut(&Netns) -> Result<Vec<T>>) -> Result<Vec<T>> {
    let (mut found, mut failed) = (Vec::new(), Vec::new());
    for netns in places {
        match netns.run(|| look(netns)) {
            Ok(here) => found.extend(here),
            Err(error) => failed.push((netns, error)),
        }
    }
    let is_everywhere = failed.len() == places.len();
    for (netns, error) in failed {
        if is_everywhere {
            return Err(error);
        }
        let place = match netns.name.as_str() {
            "" => "this network namespace".to_string(),
            name => format!("network namespace '{name}'"),
        };
        note!("netoken: what is in {place} is not known: {error:#}");
    }
    Ok(found)
}

/// How the namespace is called that [`enter`] has entered.
static ENTERED: OnceLock<String> = OnceLock::new();

/// Moves the calling thread into the namespace that a command is to act on, for good, and remembers how a person called
/// it: the same name or path leads other tools there.
///
/// # Errors
/// There is none of that name, or it cannot be entered.
pub fn enter(name_or_path: &str) -> Result<()> {
    Netns::open(name_or_path)?.enter()?;
    ENTERED.get_or_init(|| name_or_path.to_string());
    Ok(())
}

/// How `ip` or `tc` is called to act where this command acts.
pub fn tool(name: &str) -> String {
    tool_in(name, ENTERED.get().map(String::as_str))
}

fn tool_in(name: &str, netns: Option<&str>) -> String {
    match netns {
        None => name.to_string(),
        // Neither of them takes a path.
        Some(path) if path.contains('/') => format!("nsenter --net={path} {name}"),
        Some(netns) => format!("{name} -n {netns}"),
    }
}

fn names() -> Vec<String> {
    let entries = fs::read_dir(NAMED).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_fails_in_one_namespace_hides_nothing_of_the_others() {
        let places = [Netns::current().unwrap(), Netns::current().unwrap(), Netns::current().unwrap()];
        let look = |fail: &[usize]| {
            let mut at = 0;
            look_into(&places, |_| {
                at += 1;
                if fail.contains(&at) { bail!("failure {at}") } else { Ok(vec![at, 10 * at]) }
            })
        };
        assert_eq!(look(&[]).unwrap(), [1, 10, 2, 20, 3, 30]);
        assert_eq!(look(&[2]).unwrap(), [1, 10, 3, 30]);
        assert_eq!(look(&[1, 2, 3]).unwrap_err().to_string(), "failure 1");
        let one = look_into(&places[..1], |_| -> Result<Vec<u8>> { bail!("the only one") });
        assert_eq!(one.unwrap_err().to_string(), "the only one");
    }

    #[test]
    fn tools_are_called_for_the_same_namespace() {
        assert_eq!(tool_in("tc", None), "tc");
        assert_eq!(tool_in("tc", Some("blue")), "tc -n blue");
        assert_eq!(tool_in("ip", Some("/proc/7/ns/net")), "nsenter --net=/proc/7/ns/net ip");
    }
}
