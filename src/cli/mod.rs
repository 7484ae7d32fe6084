//! The command line: one file a command, and here what they share.
//!
//! Every command ends with 0 (done), 1 (the work failed) or 2 (bad usage, configuration or environment), and says why in
//! one line on stderr. What a program would read goes to stdout, with `--json` as one object a line.

mod bench;
mod call;
mod dead;
mod demo;
mod doctor;
mod input;
mod interrupt;
mod limits;
mod serve;
mod show;
mod submit;
mod updates;
mod variables;

use std::{
    any::TypeId,
    env,
    ffi::OsString,
    io::{self, Write as _},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use rustix::io::Errno;

use clap::{
    CommandFactory as _, FromArgMatches as _, Parser, Subcommand,
    error::{ContextKind, ContextValue, ErrorKind},
};

use crate::{
    client::{Client, ConnectError},
    config::{ConfigError, format_duration, parse_duration},
    server::ServerError,
};

/// A gRPC server whose requests are worked on by processes, over lock-free rings in shared memory.
#[derive(Debug, Parser)]
#[command(
    name = "forkring",
    version,
    after_help = "\
Examples:
  forkring demo                             see it work: hash many files, check every digest
  forkring serve --pool hash:4=sha256       a server with four workers that hash
  forkring call hash README.md              one item in, its result out
  forkring doctor                           is this machine set up for it?

Exit codes: 0 done, 1 the work failed, 2 bad usage, configuration or environment."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::ServeArgs>),
    Call(call::CallArgs),
    Submit(submit::SubmitArgs),
    Updates(updates::UpdatesArgs),
    Dead(dead::DeadArgs),
    Demo(demo::DemoArgs),
    Doctor(doctor::DoctorArgs),
    Bench(bench::BenchArgs),
}

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    ExitCode::from(run(env::args_os().collect(), None))
}

/// How a Python interpreter runs this command line. Without one, the program's own file does.
#[derive(Clone, Debug)]
pub struct Python {
    /// The interpreter. Handlers in Python run in it unless the command says otherwise.
    pub interpreter: PathBuf,
    /// The arguments of the interpreter that come before those of a command, such as `-m forkring`.
    pub arguments: Vec<OsString>,
}

/// Runs a command; the first argument is the program's name. `python` says how this process was started, if that was by
/// Python. Returns the exit code.
pub fn run(arguments: Vec<OsString>, python: Option<Python>) -> u8 {
    let cli = match parse(&arguments) {
        Ok(cli) => cli,
        Err(error) => return refuse(&error, &arguments),
    };
    let mistaken = variables::unknown(&Cli::command(), env::vars_os());
    if let Some(mistaken) = mistaken {
        say(mistaken);
        return 2;
    }
    let outcome = match cli.command {
        Command::Serve(args) => serve::run(*args, python.map(|python| python.interpreter)),
        Command::Call(args) => call::run(args),
        Command::Submit(args) => submit::run(args),
        Command::Updates(args) => updates::run(args),
        Command::Dead(args) => dead::run(args),
        Command::Demo(args) => demo::run(args, python.as_ref()),
        Command::Doctor(args) => doctor::run(args),
        Command::Bench(args) => bench::run(args),
    };
    match outcome {
        Ok(()) => 0,
        // `forkring updates | head -1`: the reader has what it wanted.
        Err(error) if error.is::<StdoutClosed>() => 0,
        Err(error) => {
            say(chain(&error));
            exit_code(&error)
        }
    }
}

/// Reads a command line and runs nothing: what is wrong with it.
pub(crate) fn check(arguments: &[OsString]) -> Result<(), String> {
    parse(arguments).map(drop).map_err(|error| usage_line(&error, arguments))
}

fn parse(arguments: &[OsString]) -> Result<Cli, clap::Error> {
    Cli::from_arg_matches(&prepared(Cli::command()).try_get_matches_from(arguments)?)
}

/// Treats empty variables as unset. Also lets the values of parsed options (numbers, sizes, durations) begin with a hyphen, so that
/// `--grace -5s` is answered by the parser of durations and not as an unknown option.
fn prepared(command: clap::Command) -> clap::Command {
    let prepare = |arg: clap::Arg| {
        let value = arg.get_env().and_then(env::var_os);
        let arg = if value.is_some_and(|value| value.is_empty()) { arg.env(None::<&str>) } else { arg };
        // Options that take a text or a path have no parser that would refuse another option in its place.
        let is_parsed = ![TypeId::of::<String>(), TypeId::of::<OsString>(), TypeId::of::<PathBuf>()]
            .iter()
            .any(|text| arg.get_value_parser().type_id() == *text);
        match arg.get_action().takes_values() && is_parsed {
            true if arg.is_positional() => arg.allow_negative_numbers(true),
            true => arg.allow_hyphen_values(true),
            false => arg,
        }
    };
    command.mut_args(prepare).mut_subcommands(prepared)
}

/// Formats an error and its causes as one line that repeats nothing. If the process ran out of file descriptors, the line says how to
/// raise the limit.
fn chain(error: &anyhow::Error) -> String {
    let mut line = String::new();
    for cause in error.chain().map(|cause| cause.to_string()) {
        if !line.ends_with(&cause) {
            line.push_str(if line.is_empty() { "" } else { ": " });
            line.push_str(&cause);
        }
    }
    let errno = error.chain().find_map(|cause| Errno::from_io_error(cause.downcast_ref::<io::Error>()?));
    if errno == Some(Errno::MFILE) {
        line.push_str("; raise the limit of open files (ulimit -n), or serve with fewer --workers");
    }
    line
}

fn exit_code(error: &anyhow::Error) -> u8 {
    let bad_usage = error.is::<BadUsage>()
        || error.is::<ConfigError>()
        || matches!(error.downcast_ref(), Some(error) if !matches!(error, ServerError::Supervisor(_)))
        || matches!(error.downcast_ref(), Some(ConnectError::Address(_)));
    if bad_usage { 2 } else { 1 }
}

/// Bad usage, configuration or environment.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct BadUsage(String);

/// Whoever read our stdout has gone.
#[derive(Debug, thiserror::Error)]
#[error("stdout was closed")]
struct StdoutClosed;

/// One line on stderr, whatever the message.
fn say(message: impl std::fmt::Display) {
    let line = message.to_string().lines().map(str::trim).filter(|l| !l.is_empty()).collect::<Vec<_>>().join(" ");
    // With no stderr there is nobody to tell.
    let _ = writeln!(io::stderr(), "forkring: {line}");
}

/// Writes to stdout at once. Unlike `print!` it does not panic when the reader has gone.
fn print(bytes: impl AsRef<[u8]>) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes.as_ref()).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        Err(error) => Err(anyhow::Error::new(error).context("cannot write to stdout")),
    }
}

/// Prints one value as a line of JSON.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(format!("{}\n", serde_json::to_string(value)?))
}

/// Where the server is. Global, so that it may come before or after a command of a command.
#[derive(Debug, clap::Args)]
struct Addr {
    /// The server: HOST:PORT or http://HOST:PORT
    #[arg(long, env = "FORKRING_ADDR", default_value = "http://127.0.0.1:50051", global = true)]
    addr: String,

    /// How long to wait for a server that is not there yet; 0 does not wait
    #[arg(long, env = "FORKRING_CONNECT_TIMEOUT", value_name = "DURATION", default_value = "10s", global = true,
          value_parser = parse_duration)]
    connect_timeout: Duration,
}

impl Addr {
    /// Runs `work` with a client of that server.
    fn run<T>(&self, work: impl AsyncFnOnce(Client) -> anyhow::Result<T>) -> anyhow::Result<T> {
        let client = async { Client::connect_telling(&self.addr, self.connect_timeout, || self.say_waiting()).await };
        block_on(async { work(client.await?).await })
    }

    /// Says that the command waits for its server.
    fn say_waiting(&self) {
        let patience = format_duration(self.connect_timeout);
        say(format_args!("waiting for a server at {} (--connect-timeout {patience})", self.addr));
    }
}

/// Runs a future on a runtime of this thread.
fn block_on<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(future)
}

/// Answers what clap could not parse: help in full, anything else in one line.
fn refuse(error: &clap::Error, arguments: &[OsString]) -> u8 {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = error.print();
            0
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            2
        }
        _ => {
            say(usage_line(error, arguments));
            2
        }
    }
}

/// Clap's paragraphs as one line: what is wrong, where it came from when that is not the command line, whom to ask.
fn usage_line(error: &clap::Error, arguments: &[OsString]) -> String {
    if error.kind() == ErrorKind::InvalidUtf8 {
        return format!("{} is not UTF-8", not_text(arguments));
    }
    let text = error.render().to_string();
    let what = text
        .lines()
        .map(str::trim)
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .filter(|line| !line.is_empty())
        .map(|line| line.strip_prefix("tip: ").map_or(line.to_owned(), |tip| format!("({tip})")))
        .collect::<Vec<_>>()
        .join(" ");
    let cli = Cli::command();
    // The root, the command that was named, and its subcommand.
    let mut commands = vec![&cli];
    for argument in arguments.iter().skip(1) {
        commands.extend(commands[commands.len() - 1].find_subcommand(argument));
    }
    let origin = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(arg)) => commands.iter().find_map(|command| environment_of(command, arg, arguments)),
        _ => None,
    };
    let origin = origin.map(|variable| format!(" (from {variable})")).unwrap_or_default();
    let name: String = commands.iter().skip(1).map(|command| format!("{} ", command.get_name())).collect();
    format!("{}{origin}; see `forkring {name}--help`", what.trim_start_matches("error: "))
}

/// Names the argument or the variable that is not UTF-8.
fn not_text(arguments: &[OsString]) -> String {
    if let Some(argument) = arguments.iter().find(|argument| argument.to_str().is_none()) {
        return format!("the argument `{}`", argument.display());
    }
    let mut variables = env::vars_os().filter(|(name, value)| value.to_str().is_none() && variables::is_ours(name));
    variables.next().map_or("an argument".to_owned(), |(name, _)| name.display().to_string())
}

/// The variable that gave `arg` (as clap prints it: `--capacity <ITEMS>`) its value, if it was not the command line.
fn environment_of(command: &clap::Command, arg: &str, arguments: &[OsString]) -> Option<String> {
    let flag = arg.split([' ', '=']).next()?;
    let given = |argument: &OsString| argument.to_str().is_some_and(|a| a.split('=').next() == Some(flag));
    if arguments.iter().any(given) {
        return None;
    }
    let found = command.get_arguments().find(|a| a.get_long().is_some_and(|long| flag == format!("--{long}")))?;
    found.get_env().filter(|variable| env::var_os(variable).is_some()).map(|v| v.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use crate::supervisor::SupervisorError;

    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        for command in Cli::command().get_subcommands_mut() {
            let help = command.render_long_help().to_string();
            assert!(help.contains(&format!("forkring {}", command.get_name())), "{help}");
        }
    }

    fn line(arguments: &[&str]) -> String {
        let arguments: Vec<OsString> = ["forkring"].iter().chain(arguments).map(Into::into).collect();
        usage_line(&Cli::try_parse_from(&arguments).expect_err("bad usage"), &arguments)
    }

    #[test]
    fn bad_usage_is_one_line() {
        assert_eq!(
            line(&["serve", "--capacity", "x"]),
            "invalid value 'x' for '--capacity <ITEMS>': `x` is not a whole number from 1 to 1048576; see `forkring serve --help`"
        );
        assert_eq!(
            line(&["serve", "--capacitty", "1"]),
            "unexpected argument '--capacitty' found (a similar argument exists: '--capacity'); see `forkring serve --help`"
        );
        assert!(line(&["call"]).starts_with("the following required arguments were not provided: <POOL>"));
        assert!(line(&["nonsense"]).ends_with("see `forkring --help`"));
        assert!(line(&["dead"]).ends_with("see `forkring dead --help`"));
        assert!(line(&["dead", "requeue"]).ends_with("see `forkring dead requeue --help`"));
        assert!(line(&["dead", "--addr", "x:1", "drop", "x"]).ends_with("see `forkring dead drop --help`"));
    }

    #[test]
    fn a_cause_is_said_once_and_too_few_files_say_what_to_do() {
        let files = || io::Error::from(Errno::MFILE);
        let error = anyhow::Error::from(ServerError::from(SupervisorError::Io(files())));
        let wanted =
            "cannot supervise: Too many open files (os error 24); raise the limit of open files (ulimit -n), or";
        assert!(chain(&error).starts_with(wanted), "{}", chain(&error));
        assert_eq!(chain(&anyhow::anyhow!("b").context("a")), "a: b");
    }

    #[test]
    fn what_is_not_text_is_named() {
        use std::os::unix::ffi::OsStringExt as _;
        let arguments = vec!["forkring".into(), "serve".into(), "--name".into(), OsString::from_vec(vec![b'a', 0xff])];
        let error = Cli::try_parse_from(&arguments).expect_err("no text");
        assert_eq!(usage_line(&error, &arguments), "the argument `a\u{fffd}` is not UTF-8");
    }

    #[test]
    fn exit_codes_tell_bad_usage_from_failed_work() {
        assert_eq!(exit_code(&anyhow::anyhow!("the work failed")), 1);
        assert_eq!(exit_code(&BadUsage("what?".into()).into()), 2);
        assert_eq!(exit_code(&ConfigError::BodyTimeout.into()), 2);
        assert_eq!(exit_code(&ConnectError::Address("x".into()).into()), 2);
        assert_eq!(exit_code(&ServerError::NoPool.into()), 2);
        assert_eq!(exit_code(&ServerError::from(SupervisorError::Killed { left: 1, calls: 0, pending: 0 }).into()), 1);
        assert_eq!(exit_code(&anyhow::Error::from(BadUsage("what?".into())).context("a file")), 2);
    }
}
