//! Names of interfaces. An event has the index of its interface, and the inode number of the network namespace that it
//! is in.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use super::notices::{Notices, Of};
use crate::hooks::netlink::Netlink;
use crate::netns::Netns;

/// How long names are good that nobody said have changed.
const GOOD: Duration = Duration::from_secs(10);
/// How often an unknown one is looked for.
const RETRY: Duration = Duration::from_secs(1);

/// Names of the interfaces in this network namespace and in those that have a name.
#[derive(Debug)]
pub struct Interfaces {
    names: HashMap<(u32, u32), String>,
    looked: Option<Instant>,
    /// Of this network namespace alone, as who waits for notices of another one keeps it; none if there was no descriptor.
    notices: Option<Notices>,
}

impl Interfaces {
    /// In the network namespace of the calling thread.
    pub fn here() -> Interfaces {
        Interfaces { names: HashMap::new(), looked: None, notices: Notices::open(&[Of::Links]).ok() }
    }

    /// Looks again if something was renamed. For a batch of events, as asking the kernel costs more than showing one.
    pub fn refresh(&mut self) {
        if self.notices.as_ref().is_some_and(|notices| notices.any().unwrap_or_default()) {
            self.look();
        }
    }

    /// The name; `#` and the index if it is not known. What is gone keeps the name that it had.
    pub fn name(&mut self, netns_inode: u32, ifindex: u32) -> String {
        let key = (netns_inode, ifindex);
        let good = if self.names.contains_key(&key) { GOOD } else { RETRY };
        if self.looked.is_none_or(|looked| looked.elapsed() >= good) {
            self.look();
        }
        self.names.get(&key).cloned().unwrap_or_else(|| format!("#{ifindex}"))
    }

    fn look(&mut self) {
        // A namespace that has just gone has no interfaces; and a name is not worth the end of a stream.
        for netns in Netns::all().unwrap_or_default() {
            let links = netns.run(|| Netlink::connect()?.links()).unwrap_or_default();
            self.names.extend(links.into_iter().map(|link| ((netns.inode(), link.index), link.name)));
        }
        self.looked = Some(Instant::now());
    }
}
