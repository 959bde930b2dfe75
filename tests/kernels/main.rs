//! What `scripts/kernels` asks each kernel beside the tests of the product: that it has what the table `expected`
//! says, no less and no more, and that its verifier takes every program, within the limits of `verifier-limits`.
//!
//! NETOKEN_TEST_KERNEL names the column of both tables, and NETOKEN_TEST_OBJECTS a folder with a folder of BPF
//! objects for each compiler. Without them, on any other machine, what this build holds is loaded.

mod expected;
#[path = "../support/mod.rs"]
mod support;
mod table;
mod verifier;

use std::process::ExitCode;

fn main() -> ExitCode {
    let column = std::env::var("NETOKEN_TEST_KERNEL").ok();
    let mut cases = vec![expected::case(column.clone())];
    cases.extend(verifier::cases(column.as_deref()));
    support::run(cases)
}
