//! Parse, build, run, report, exit code.

use std::process::ExitCode;

fn main() -> ExitCode {
    roomwarden::cli::main()
}
