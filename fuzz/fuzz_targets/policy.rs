//! `cargo +nightly fuzz run policy -- -max_total_time=60`: any text as a policy.

#![no_main]

#[path = "../../tests/support/any_policy.rs"]
mod any_policy;

libfuzzer_sys::fuzz_target!(|text: &str| any_policy::check(text));
