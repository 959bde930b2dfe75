//! Attaching the classifier to interfaces, finding it again, and taking it away: what is ours, and nothing else.
//!
//! [`netlink`] reads what the kernel has; [`clsact`] decides and changes.

pub mod clsact;
pub mod link;
pub mod netlink;
