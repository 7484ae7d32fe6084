//! Finds variables `FORKRING_…` in the environment that no option has, which are most likely misspelt.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
};

use crate::{config::closest, contract, program};

use super::serve::{FILTER, POOLS};

/// The prefix of all variables of this program.
const PREFIX: &str = "FORKRING_";
/// Variables that belong to no option, but to the server itself, to worker programs or to the tests.
const OTHERS: [&str; 11] = [
    POOLS,
    FILTER,
    contract::VARIABLE,
    contract::nursery::VARIABLE,
    program::FAILURES,
    "FORKRING_BIN",
    "FORKRING_CRASH",
    "FORKRING_STOP",
    "FORKRING_CRASHED",
    "FORKRING_PASSES",
    "FORKRING_SINCE",
];
/// The prefix of variables that control the tests.
const TESTS: &str = "FORKRING_TEST_";

/// Returns a line about the first variable that nothing reads, with the name that was probably meant.
pub fn unknown(command: &clap::Command, variables: impl Iterator<Item = (OsString, OsString)>) -> Option<String> {
    let mut known = BTreeSet::from(OTHERS.map(str::to_owned));
    collect(command, &mut known);
    let ours = variables.map(|(name, value)| (name.to_string_lossy().into_owned(), value));
    let ours = ours.filter(|(name, _)| name.starts_with(PREFIX) && !name.starts_with(TESTS) && !known.contains(name));
    // The smallest name is reported, so that the same environment always produces the same line.
    let (name, _) = ours.filter(|(name, value)| !is_of_a_service(name, &value.to_string_lossy())).min()?;
    let suffixes = known.iter().filter_map(|name| name.strip_prefix(PREFIX));
    let hint = match closest(&name[PREFIX.len()..], suffixes) {
        Some(meant) => format!("did you mean {PREFIX}{meant}?"),
        None => "`forkring help serve` lists them".to_owned(),
    };
    Some(format!("{name} is not a variable of forkring: {hint}"))
}

/// Returns whether a variable has this program's prefix.
pub fn is_ours(name: &OsStr) -> bool {
    name.as_encoded_bytes().starts_with(PREFIX.as_bytes())
}

/// Collects the variables of a command's options and of those of its commands.
fn collect(command: &clap::Command, names: &mut BTreeSet<String>) {
    names.extend(command.get_arguments().filter_map(|arg| Some(arg.get_env()?.to_string_lossy().into_owned())));
    command.get_subcommands().for_each(|command| collect(command, names));
}

/// Returns whether Kubernetes sets this variable, as it does in every pod for a service whose name begins with `forkring`:
/// `FORKRING_SERVICE_HOST`, `FORKRING_SERVICE_PORT_GRPC`, `FORKRING_PORT_50051_TCP_ADDR`, and a URL in `FORKRING_PORT`.
fn is_of_a_service(name: &str, value: &str) -> bool {
    let is_address = || {
        let words: Vec<_> = name.split('_').collect();
        words.windows(3).any(|words| {
            words[0] == "PORT"
                && !words[1].is_empty()
                && words[1].bytes().all(|b| b.is_ascii_digit())
                && ["TCP", "UDP", "SCTP"].contains(&words[2])
        })
    };
    name.ends_with("_SERVICE_HOST")
        || name.ends_with("_SERVICE_PORT")
        || name.contains("_SERVICE_PORT_")
        || name.ends_with("_PORT") && value.contains("://")
        || is_address()
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::{super::Cli, *};

    #[test]
    fn a_variable_that_nothing_reads_is_told_with_what_was_meant() {
        let unknown = |variables: &[(&str, &str)]| {
            unknown(&Cli::command(), variables.iter().map(|(name, value)| (name.into(), value.into())))
        };
        let fine = [
            ("FORKRING_CAPACITY", "1"),
            ("FORKRING_ADDR", "x"),
            ("FORKRING_POOLS", ""),
            ("FORKRING_LOG", "info"),
            ("FORKRING_LOG_FORMAT", "json"),
            ("FORKRING_WORKER", "{}"),
            ("FORKRING_WORKER_FAILURES", "5"),
            ("FORKRING_BIN", "x"),
            ("FORKRING_TEST_SEED", "1"),
            ("FORKRING_SERVICE_HOST", "10.0.0.1"),
            ("FORKRING_SERVICE_PORT", "50051"),
            ("FORKRING_GRPC_SERVICE_PORT_METRICS", "1"),
            ("FORKRING_PORT", "tcp://10.0.0.1:50051"),
            ("FORKRING_PORT_50051_TCP", "tcp://10.0.0.1:50051"),
            ("FORKRING_PORT_50051_TCP_PROTO", "tcp"),
            ("FORKRINGS", "x"),
            ("PATH", "x"),
        ];
        assert_eq!(unknown(&fine), None);
        for (name, hint) in [
            ("FORKRING_CAPACTY", "did you mean FORKRING_CAPACITY?"),
            ("FORKRING_LOGS", "did you mean FORKRING_LOG?"),
            ("FORKRING_POOL", "did you mean FORKRING_POOLS?"),
            ("FORKRING_capacity", "did you mean FORKRING_CAPACITY?"),
            ("FORKRING_PORT", "`forkring help serve` lists them"),
            ("FORKRING_", "`forkring help serve` lists them"),
        ] {
            let wanted = format!("{name} is not a variable of forkring: {hint}");
            assert_eq!(unknown(&[&fine[..2], &[(name, "50051")]].concat()), Some(wanted));
        }
        let first = unknown(&[("FORKRING_B", ""), ("FORKRING_A", "")]).expect("two of them");
        assert!(first.starts_with("FORKRING_A "), "{first}");
    }
}
