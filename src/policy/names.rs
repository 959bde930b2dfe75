//! Asks the kernel which interface, cgroup or user a policy means by a name. Each is asked once, and of interfaces each
//! network namespace for all that it has.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::{Context, Result, anyhow, bail};
use nix::unistd::User;

use super::values::Interface;
use crate::hooks::link::find_link;
use crate::hooks::netlink::{Link, Netlink};
use crate::netns::{Netns, NoSuchNetns};
use crate::state::in_first_mount_namespace;

/// The root of every cgroup hierarchy has this number.
const ROOT_ID: u64 = 1;

/// What is known so far. Interfaces without a namespace are those of the thread that made it, and of its threads.
#[derive(Debug, Default)]
pub struct Names {
    interfaces: Mutex<HashMap<String, Interface>>,
    cgroups: Mutex<HashMap<String, (u8, u64)>>,
    users: Mutex<HashMap<String, Option<u32>>>,
    mount: Mutex<Option<PathBuf>>,
    /// By what they are called; the one without a name is that of the thread. What hindered a look is known as well.
    places: Mutex<HashMap<String, Result<Arc<Place>, Hindrance>>>,
    /// What those are called that can be found, by their numbers.
    called: OnceLock<HashMap<u32, String>>,
}

/// Why a network namespace was not looked into.
#[derive(Clone, Debug)]
enum Hindrance {
    NoSuch(NoSuchNetns),
    Other(String),
}

impl From<anyhow::Error> for Hindrance {
    fn from(error: anyhow::Error) -> Hindrance {
        match error.downcast::<NoSuchNetns>() {
            Ok(none) => Hindrance::NoSuch(none),
            Err(other) => Hindrance::Other(format!("{other:#}")),
        }
    }
}

impl From<Hindrance> for anyhow::Error {
    fn from(hindrance: Hindrance) -> anyhow::Error {
        match hindrance {
            Hindrance::NoSuch(none) => none.into(),
            Hindrance::Other(text) => anyhow!(text),
        }
    }
}

/// A network namespace as it was when it was looked into.
#[derive(Debug)]
struct Place {
    inode: u32,
    given_name: Option<String>,
    links: Vec<Link>,
}

impl Place {
    fn look(name: &str) -> Result<Place> {
        let netns = if name.is_empty() { Netns::current()? } else { Netns::open(name)? };
        let links = netns.run(|| Netlink::connect()?.links())?;
        Ok(Place { inode: netns.inode(), given_name: netns.given_name(), links })
    }

    /// The index of an interface by its name, or an alternative one; 0 if there is none.
    fn index(&self, name: &str) -> u32 {
        find_link(&self.links, name, "").map_or(0, |link| link.index)
    }
}

impl Names {
    /// Names whose meaning was found out before; of two interfaces that had a name one after the other, the last counts.
    pub fn known(interfaces: &[(String, u32, u32)], cgroups: &[(String, u8, u64)]) -> Names {
        let names = Names::default();
        for (name, netns, index) in interfaces {
            let known = Interface { name: name.as_str().into(), netns: *netns, index: *index };
            names.interfaces.lock().unwrap_or_else(|e| e.into_inner()).insert(name.clone(), known);
        }
        for (path, level, id) in cgroups {
            remember(&names.cgroups, path, || Ok((*level, *id))).ok();
        }
        names
    }

    /// The index of an interface in a network namespace that is known by its number, 0 if there is no such interface;
    /// nothing if the namespace cannot be found.
    pub fn interface_in(&self, netns: u32, name: &str) -> Option<u32> {
        self.place_of(netns).map(|place| place.index(name))
    }

    /// Whether an interface that was known by its index is still there, under whatever name.
    pub fn has_index(&self, netns: u32, index: u32) -> bool {
        let place = self.place_of(netns);
        place.is_some_and(|place| place.links.iter().any(|link| link.index == index))
    }

    /// The number of the network namespace that has a name now; nothing if none has it.
    pub fn netns(&self, name: &str) -> Option<u32> {
        self.place(name).ok().map(|place| place.inode)
    }

    /// The interface of that name, or of that name in a network namespace like `blue:eth0`. It is called by its
    /// namespace too if that has a name, so that it is known whoever reads the policy, and wherever.
    ///
    /// # Errors
    /// The namespace does not exist, which is [`NoSuchNetns`], or cannot be entered.
    pub fn interface(&self, name: &str) -> Result<Interface> {
        remember(&self.interfaces, name, || {
            // A colon cannot be in the name of an interface.
            let (netns, short) = match name.split_once(':') {
                Some(("", _) | (_, "")) => bail!("it is written like eth0, or like blue:eth0"),
                Some(both) => both,
                None => ("", name),
            };
            let place = self.place(netns)?;
            let full = match &place.given_name {
                Some(given) if netns.is_empty() => format!("{given}:{name}"),
                _ => name.to_string(),
            };
            Ok(Interface { name: full.into(), netns: place.inode, index: place.index(short) })
        })
    }

    fn place(&self, name: &str) -> Result<Arc<Place>> {
        let look = || Ok(Place::look(name).map(Arc::new).map_err(Hindrance::from));
        Ok(remember(&self.places, name, look)??)
    }

    fn place_of(&self, inode: u32) -> Option<Arc<Place>> {
        let called = self.called.get_or_init(|| {
            let all = Netns::all().unwrap_or_default().into_iter();
            all.map(|netns| (netns.inode(), netns.name)).collect()
        });
        self.place(called.get(&inode)?).ok().filter(|place| place.inode == inode)
    }

    /// How far below the root a cgroup is, and its number; 0 if there is none.
    ///
    /// # Errors
    /// There is no cgroup2 file system, or one whose root is not the root of the hierarchy.
    pub fn cgroup(&self, path: &str) -> Result<(u8, u64)> {
        remember(&self.cgroups, path, || {
            let mount = self.cgroup_mount()?;
            let below = path.trim_matches('/');
            let level = below.split('/').filter(|part| !part.is_empty()).count();
            let level = u8::try_from(level).ok().filter(|level| *level < 32);
            let level = level.context("a cgroup at most 31 directories below the root can be matched")?;
            let dir = mount.join(below);
            let id = in_first_mount_namespace(move || {
                let metadata = fs::metadata(&dir).ok().filter(fs::Metadata::is_dir);
                // The number of a cgroup is the inode number of its directory (kernfs, from 5.5).
                Ok(metadata.map_or(0, |metadata| metadata.ino()))
            })?;
            Ok((level, id))
        })
    }

    /// The number of a user; nothing if there is none of that name.
    ///
    /// # Errors
    /// The list of users cannot be read.
    pub fn user(&self, name: &str) -> Result<Option<u32>> {
        remember(&self.users, name, || {
            let user = User::from_name(name).with_context(|| format!("looking for user '{name}'"))?;
            Ok(user.map(|user| user.uid.as_raw()))
        })
    }

    /// Where the cgroup2 hierarchy is mounted, in the mount namespace of the first process: `ip netns exec` hides it.
    fn cgroup_mount(&self) -> Result<PathBuf> {
        let mut known = self.mount.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(mount) = &*known {
            return Ok(mount.clone());
        }
        let mount = in_first_mount_namespace(|| {
            let mounts = fs::read_to_string("/proc/thread-self/mountinfo").context("listing mounts")?;
            let Some(mount) = mounts.lines().find_map(cgroup2_mount) else {
                bail!("no cgroup2 file system is mounted; mount one: mount -t cgroup2 none /sys/fs/cgroup");
            };
            let root = fs::metadata(&mount).with_context(|| format!("looking at {}", mount.display()))?;
            if root.ino() != ROOT_ID {
                bail!(
                    "{} is not the root of the cgroup hierarchy but a part of it, as in a container; rules about \
                     cgroups have to be loaded from outside of it",
                    mount.display()
                );
            }
            Ok(mount)
        })?;
        Ok(known.insert(mount).clone())
    }
}

/// The mount point in a line of mountinfo, if it is of cgroup2.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (before, after) = line.split_once(" - ")?;
    (after.split(' ').next() == Some("cgroup2")).then(|| before.split(' ').nth(4).map(PathBuf::from))?
}

fn remember<T: Clone>(
    known: &Mutex<HashMap<String, T>>,
    name: &str,
    ask: impl FnOnce() -> Result<T>,
) -> Result<T> {
    if let Some(value) = known.lock().unwrap_or_else(|e| e.into_inner()).get(name) {
        return Ok(value.clone());
    }
    let value = ask()?;
    known.lock().unwrap_or_else(|e| e.into_inner()).insert(name.to_string(), value.clone());
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_the_kernel_are_found() {
        let names = Names::default();
        let lo = names.interface("lo").unwrap();
        assert_eq!((lo.netns, lo.index), (Netns::current().unwrap().inode(), 1));
        assert_eq!(names.interface("nothing-such").unwrap().index, 0);
        assert!(names.interface("no-such-netns:lo").is_err());
        for half in [":lo", "no-such-netns:", ":"] {
            let error = names.interface(half).unwrap_err();
            assert!(
                !error.is::<NoSuchNetns>() && error.to_string().contains("like blue:eth0"),
                "{half}: {error}"
            );
        }
        let here = Netns::current().unwrap().inode();
        assert!(names.has_index(here, 1) && !names.has_index(here, 0x7fff_ffff));
        assert_eq!(names.user("root").unwrap(), Some(0));
        assert_eq!(names.user("nobody-of-this-name").unwrap(), None);
    }

    #[test]
    fn a_cgroup2_mount_is_told_from_others() {
        let line = "29 24 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw";
        assert_eq!(cgroup2_mount(line), Some("/sys/fs/cgroup".into()));
        assert_eq!(cgroup2_mount(&line.replace("cgroup2", "cgroup")), None);
    }
}
