//! Any text as a policy; CONTRIBUTING.md says how to run it.

#![no_main]

#[path = "../../tests/support/any_policy.rs"]
mod any_policy;

libfuzzer_sys::fuzz_target!(|text: &str| any_policy::check(text));
