//! What the kernel reports, from the perf buffer to the terminal.
//!
//! [`buffer`] and [`reader`] take events out of the kernel, [`model`] gives them a meaning, [`rules`] and [`interfaces`]
//! know what is called how, [`show`] prints them in [`columns`], [`watch`] notices, by `notices`, when an interface or a filter
//! disappears, [`stream`] runs all of it until it is told to stop, of which [`look`] knows.

pub mod buffer;
pub mod columns;
pub mod interfaces;
pub mod look;
pub mod model;
mod notices;
pub mod reader;
pub mod rules;
pub mod show;
pub mod stream;
pub mod watch;
