//! Parses the command line, runs it, and turns the outcome into an exit code.

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = netoken::cli::Args::parse();
    match netoken::cli::run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("netoken: {error:#}");
            ExitCode::FAILURE
        }
    }
}
