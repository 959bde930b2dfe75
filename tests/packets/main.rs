//! Describes packets, runs them through the loaded classifier with BPF_PROG_TEST_RUN, and holds what comes
//! out against an oracle that was written from the RFCs. Nothing is attached anywhere.
//!
//! [`packet`] writes frames, [`run`] runs them, [`oracle`] judges; the other modules hold the cases.

mod mutate;
mod oracle;
mod packet;
mod run;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::process::ExitCode;

use support::{Need, case, run};

fn main() -> ExitCode {
    let needs = &[Need::Root];
    run(vec![
        case("every_combination_comes_out_right", needs, table::every_combination_comes_out_right),
        case("a_truncated_frame_leaves_as_it_came", needs, mutate::a_truncated_frame_leaves_as_it_came),
        case("mutants_get_what_the_oracle_says", needs, mutate::mutants_get_what_the_oracle_says),
    ])
}
