//! Attaching the classifier to interfaces, finding it again, and taking it away: what is ours, and nothing else.
//!
//! [`netlink`] reads what the kernel has; [`clsact`] and [`xdp`] decide and change.

pub mod clsact;
pub mod link;
pub mod netlink;
pub mod xdp;
