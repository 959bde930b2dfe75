//! Parses the command line, runs it, and turns the outcome into an exit code.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let args = netoken::cli::Args::parse();
    match netoken::cli::run(args) {
        // Somebody who reads only the first lines has had what they wanted.
        Err(error) if netoken::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "netoken: {error:#}");
            ExitCode::FAILURE
        }
        Ok(()) => ExitCode::SUCCESS,
    }
}
