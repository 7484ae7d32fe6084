//! The `forkring` program; what it does is in `forkring::cli`.

fn main() -> std::process::ExitCode {
    forkring::cli::main()
}
