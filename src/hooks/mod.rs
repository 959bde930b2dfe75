//! Attaching the classifier to interfaces, finding it again, and taking it away: what is ours, and nothing else.
//!
//! [`netlink`] asks what the kernel has, `replies` reads the answers, [`loaded`] knows which programs are ours;
//! [`clsact`], [`tcx`] and [`xdp`] decide and change, [`egress`] knows where the stamp is, [`qdisc`] says what became of a
//! clsact qdisc, and [`unused`] ends an instance that nothing uses any more.

pub mod clsact;
pub mod egress;
pub mod link;
pub mod loaded;
pub mod netlink;
pub mod qdisc;
mod replies;
pub mod tcx;
pub mod unused;
pub mod xdp;
