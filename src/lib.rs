//! x
#[allow(clippy::all, missing_docs)]
pub mod skel { include!(concat!(env!("OUT_DIR"), "/netoken.skel.rs")); }
