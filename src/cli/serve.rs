//! `forkring serve`: flags over environment over file over defaults, then the server.
//!
//! No thread is started here: the supervisor forks, and forks only while it is alone.

use std::{
    env,
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    time::Duration,
};

use rustix::process::{Pid, Signal, getppid, set_parent_process_death_signal};
use tracing_subscriber::{EnvFilter, filter::LevelFilter};

use super::{
    BadUsage,
    limits::{self, Limit},
};
use crate::{
    config::{
        ATTEMPTS, Affinity, ByteSize, CAPACITY, CONNECTIONS, Config, InvalidValue, Listen, LogFormat, PoolSpec, RESETS,
        Spin, Variable, WORKERS, parse_duration, parse_flag, whole_number,
    },
    server::Server,
};

/// One pool a line; a value that clap splits could not hold a verbatim handler.
pub(super) const POOLS: &str = "FORKRING_POOLS";
/// Which log lines are written, as in `info` or `forkring=debug`.
pub(super) const FILTER: &str = "FORKRING_LOG";

/// Serve gRPC; hand each item to a worker process
#[derive(Debug, Default, clap::Args)]
#[command(after_help = "\
Handlers:
  echo              the item is the result
  echo:SIZE         the same, streamed in parts of SIZE bytes (over Process)
  sha256            the result is the item's SHA-256 digest, 32 bytes
  sleep:DURATION    the item is the result, later (for load tests)
  exec:COMMAND...   the item on the stdin of a fresh process, its stdout the result;
                    there is no shell: a pipe takes exec:sh -c 'sort | uniq'
  MODULE:FUNCTION   a function or class in Python, also as FILE.py:FUNCTION

Examples:
  forkring serve --pool hash:4=sha256
  forkring serve app:handle --workers 4
  forkring serve --pool hash=sha256 --pool 'count=exec:wc -c' --listen 0.0.0.0:50051
  FORKRING_POOLS='hash:4=sha256' forkring serve
  forkring serve --config forkring.toml

A file has the same options, with _ for -, and a table for each pool:
  capacity = 10000
  arena = \"256MiB\"
  [[pool]]
  name = \"hash\"
  workers = 4
  handler = \"sha256\"
  item_timeout = \"5s\"

A flag beats its environment variable, which beats the file; --pool and FORKRING_POOLS replace all of the file's pools.
FORKRING_LOG chooses the log lines: error, warn, info (the default), debug, trace.
SIGTERM and SIGINT drain: what was accepted is finished; a second one ends at once.
What a server that was killed had accepted for subscribers, the next of its name and settings finishes (or see --fresh).")]
pub struct ServeArgs {
    /// A handler in Python; its pool has the function's name
    #[arg(value_name = "MODULE:FUNCTION")]
    app: Option<String>,

    /// Where to serve gRPC; port 0 takes a free one [default: 127.0.0.1:50051]
    #[arg(long, env = "FORKRING_LISTEN", value_name = "HOST:PORT")]
    listen: Option<Listen>,

    /// Name of the server and its segment, /dev/shm/forkring-NAME [default: forkring]
    #[arg(long, env = "FORKRING_NAME")]
    name: Option<String>,

    /// Throw away what a server of this name that died has left, instead of finishing it
    #[arg(long, env = "FORKRING_FRESH", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = parse_flag)]
    fresh: Option<bool>,

    /// A pool of workers and what they run; repeatable [env: FORKRING_POOLS, one pool a line]
    #[arg(long, value_name = "NAME[:WORKERS]=HANDLER")]
    pool: Vec<PoolSpec>,

    /// Workers of a pool that names no count [default: one per core]
    #[arg(long, env = "FORKRING_WORKERS", value_name = "N", value_parser = whole_number(WORKERS))]
    workers: Option<u16>,

    /// How many items may be in the server at a time [default: 16384]
    #[arg(long, env = "FORKRING_CAPACITY", value_name = "ITEMS", value_parser = whole_number(CAPACITY))]
    capacity: Option<u32>,

    /// Payload memory for requests, and of each worker for results [default: a quarter of /dev/shm for all, but 5 to 80MiB each]
    #[arg(long, env = "FORKRING_ARENA", value_name = "SIZE")]
    arena: Option<ByteSize>,

    /// The largest message, at most 8/9 of the arena [default: 64MiB, or what fits]
    #[arg(long, env = "FORKRING_MAX_MESSAGE", value_name = "SIZE")]
    max_message: Option<ByteSize>,

    /// How long to look for work before sleeping: auto, off or a duration [default: auto]
    #[arg(long, env = "FORKRING_SPIN", value_name = "SPIN")]
    spin: Option<Spin>,

    /// A TOML file with any of these options
    #[arg(long, env = "FORKRING_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,

    /// How long a drain may take [default: 30s]
    #[arg(long, env = "FORKRING_GRACE", value_name = "DURATION", value_parser = parse_duration)]
    grace: Option<Duration>,

    /// How often an item is given to a worker, should workers die of it [default: 3]
    #[arg(long, env = "FORKRING_MAX_ATTEMPTS", value_name = "N", value_parser = whole_number(ATTEMPTS))]
    max_attempts: Option<u8>,

    /// Memory for items that killed that many workers, see `forkring dead`; 0 keeps none [default: 8MiB]
    #[arg(long, env = "FORKRING_DEAD_LETTERS", value_name = "SIZE")]
    dead_letters: Option<ByteSize>,

    /// How long a worker may take for an item, 0 for as long as it likes; repeatable: of one pool, or of all others
    #[arg(long, env = "FORKRING_ITEM_TIMEOUT", value_name = "[POOL=]DURATION", value_delimiter = ',', value_parser = timeout)]
    item_timeout: Vec<Limit<Duration>>,

    /// How much memory a worker may have (RLIMIT_DATA), 0 for no limit; repeatable: of one pool, or of all others
    #[arg(long, env = "FORKRING_WORKER_MEMORY", value_name = "[POOL=]SIZE", value_delimiter = ',', value_parser = memory)]
    worker_memory: Vec<Limit<ByteSize>>,

    /// An environment variable of workers, {worker} being the worker's number in its pool and {slot} its number over all pools;
    /// repeatable: of one pool, or of all
    #[arg(long, env = "FORKRING_WORKER_ENV", value_name = "[POOL:]NAME=VALUE", value_delimiter = '\n')]
    worker_env: Vec<Variable>,

    /// Which CPU each worker keeps to: auto (one after the other), off, or a list such as 0-3,8; dealt out in turn over all pools
    /// with the same setting; repeatable: of one pool, or of all others [default: off]
    #[arg(long, env = "FORKRING_AFFINITY", value_name = "[POOL=]CPUS", value_delimiter = '\n', value_parser = affinity)]
    affinity: Vec<Limit<Affinity>>,

    /// Import handlers in Python once, and fork the workers from there: they share that memory
    #[arg(long, env = "FORKRING_PRELOAD", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = parse_flag)]
    preload: Option<bool>,

    /// For development: when a file changes that a handler in Python is imported from, replace its workers one by one
    #[arg(long, env = "FORKRING_RELOAD", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = parse_flag)]
    reload: Option<bool>,

    /// Submitted items that may be pending or wait for subscribers [default: half the capacity]
    #[arg(long, env = "FORKRING_OUTBOX", value_name = "ITEMS", value_parser = whole_number(CAPACITY))]
    outbox: Option<u32>,

    /// How many clients may be connected at a time [default: 4096]
    #[arg(long, env = "FORKRING_MAX_CONNECTIONS", value_name = "N", value_parser = whole_number(CONNECTIONS))]
    max_connections: Option<u32>,

    /// How many streams a second one connection may reset before the server could begin with them; a client that resets more for
    /// ten seconds, or ten times as many at once, is disconnected [default: 10000]
    #[arg(long, env = "FORKRING_MAX_RESETS", value_name = "N", value_parser = whole_number(RESETS))]
    max_resets: Option<u32>,

    /// How long a client may take for the next 64 KiB of a message that it has begun, or for its end [default: 10s]
    #[arg(long, env = "FORKRING_BODY_TIMEOUT", value_name = "DURATION", value_parser = parse_duration)]
    body_timeout: Option<Duration>,

    /// The interpreter of Python handlers [default: the one of `forkring`, if it was installed by pip, or else python3]
    #[arg(long, env = "FORKRING_PYTHON", value_name = "FILE")]
    python: Option<PathBuf>,

    /// How log lines look: text or json [default: text]
    #[arg(long, env = "FORKRING_LOG_FORMAT", value_name = "FORMAT")]
    log: Option<LogFormat>,

    /// Log failed items (exceptions, exit codes, crashes): at most ten lines a second, and one that counts the rest
    #[arg(long, env = "FORKRING_LOG_FAILURES", value_name = "BOOL", num_args = 0..=1, require_equals = true,
          default_missing_value = "true", value_parser = parse_flag)]
    log_failures: Option<bool>,

    /// Drain when this process, our parent, ends
    #[arg(long, hide = true, value_name = "PID", value_parser = whole_number(1..=i32::MAX))]
    parent: Option<i32>,
}

/// Serves until drained.
pub fn run(mut args: ServeArgs, python: Option<PathBuf>) -> anyhow::Result<()> {
    if let Some(parent) = args.parent.take() {
        end_with(parent)?;
    }
    let mut config = args.into_config(variable(POOLS)?.as_deref())?;
    config.python = config.python.or(python);
    log_to_stderr(config.log, variable(FILTER)?.as_deref())?;
    let server = Server::from_config(config)?.bind()?;
    // For whoever started this with port 0. It may have no interest and have closed its end.
    let _ = writeln!(io::stdout(), "listening on {}", server.local_addr());
    server.run()?;
    Ok(())
}

impl ServeArgs {
    /// The file, or the defaults, with these laid over it.
    fn into_config(mut self, pools: Option<&str>) -> anyhow::Result<Config> {
        let mut config = self.config.as_deref().map_or_else(|| Ok(Config::default()), Config::from_file)?;
        lay(self.listen, &mut config.listen);
        lay(self.name, &mut config.name);
        lay(self.fresh, &mut config.fresh);
        lay(self.workers, &mut config.workers);
        lay(self.capacity, &mut config.capacity);
        lay(self.arena.map(Some), &mut config.arena);
        lay(self.max_message.map(Some), &mut config.max_message);
        lay(self.spin, &mut config.spin);
        lay(self.preload, &mut config.preload);
        lay(self.reload, &mut config.reload);
        lay(self.grace, &mut config.grace);
        lay(self.max_attempts, &mut config.max_attempts);
        lay(self.dead_letters, &mut config.dead_letters);
        lay(self.outbox.map(Some), &mut config.outbox);
        lay(self.max_connections, &mut config.max_connections);
        lay(self.max_resets, &mut config.max_resets);
        lay(self.body_timeout, &mut config.body_timeout);
        lay(self.python.map(Some), &mut config.python);
        lay(self.log, &mut config.log);
        lay(self.log_failures, &mut config.log_failures);
        if let Some(handler) = self.app {
            if handler.ends_with(".py") {
                return Err(BadUsage(format!("`{handler}` names no function: write {handler}:FUNCTION")).into());
            }
            let pool = handler.rsplit_once([':', '.']).and_then(|(_, name)| format!("{name}={handler}").parse().ok());
            let refusal = || BadUsage(format!("`{handler}` is no handler in Python: write MODULE:FUNCTION"));
            self.pool.push(pool.ok_or_else(refusal)?);
        }
        let environment = || pools.unwrap_or_default().lines().filter(|line| !line.trim().is_empty());
        if !self.pool.is_empty() {
            config.pools = self.pool;
        } else if environment().next().is_some() {
            let parsed: Result<_, _> = environment().map(|line| line.trim_start().parse()).collect();
            config.pools = parsed.map_err(|error| BadUsage(format!("{POOLS}: {error}")))?;
        }
        if config.pools.is_empty() {
            return Err(BadUsage("there is no pool: give at least one, such as --pool hash=sha256".into()).into());
        }
        let (timeouts, memory) = (self.item_timeout, self.worker_memory);
        limits::lay("--item-timeout", timeouts, &mut config, |all| &mut all.item_timeout, |one| &mut one.item_timeout)?;
        limits::lay(
            "--worker-memory",
            memory,
            &mut config,
            |all| &mut all.worker_memory,
            |one| &mut one.worker_memory,
        )?;
        limits::lay("--affinity", self.affinity, &mut config, |all| &mut all.affinity, |one| &mut one.affinity)?;
        limits::lay_variables(self.worker_env, &mut config)?;
        config.validate()?;
        Ok(config)
    }
}

fn timeout(text: &str) -> Result<Limit<Duration>, InvalidValue> {
    Limit::parse(text, parse_duration)
}

fn memory(text: &str) -> Result<Limit<ByteSize>, InvalidValue> {
    Limit::parse(text, str::parse)
}

fn affinity(text: &str) -> Result<Limit<Affinity>, InvalidValue> {
    Limit::parse(text, str::parse)
}

fn variable(name: &str) -> Result<Option<String>, BadUsage> {
    match env::var(name) {
        Ok(value) => Ok(Some(value)),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => Err(BadUsage(format!("{name} is not UTF-8"))),
    }
}

fn lay<T>(given: Option<T>, over: &mut T) {
    if let Some(given) = given {
        *over = given;
    }
}

/// Asks the kernel for a SIGTERM when the parent ends, so that whoever started us cannot leave us behind, however it dies.
fn end_with(parent: i32) -> anyhow::Result<()> {
    set_parent_process_death_signal(Some(Signal::TERM))?;
    // It may have ended before the kernel was asked.
    if getppid().map(Pid::as_raw_nonzero).is_none_or(|ppid| ppid.get() != parent) {
        return Err(BadUsage(format!("process {parent} has ended: nobody is left to serve")).into());
    }
    Ok(())
}

fn log_to_stderr(format: LogFormat, filter: Option<&str>) -> anyhow::Result<()> {
    let filter = filter.filter(|filter| !filter.is_empty()).unwrap_or("info");
    // Taken for the name of a module, which there is not, it would silence all.
    let is_no_level = |word: &&str| !word.contains(['=', '[']) && word.parse::<LevelFilter>().is_err();
    if let Some(word) = filter.split(',').map(str::trim).find(is_no_level) {
        let levels = "give error, warn, info, debug, trace or off, or one for a module, as in forkring=debug";
        return Err(BadUsage(format!("{FILTER}: `{word}` is no level: {levels}")).into());
    }
    let filter = EnvFilter::builder().parse(filter).map_err(|_| {
        BadUsage(format!("{FILTER}: `{filter}` is no filter: give a level such as info or forkring=debug"))
    })?;
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr).with_target(false);
    // It would say on stderr that stderr cannot be written to, and panic because that cannot be said.
    let lines = lines.log_internal_errors(false);
    match format {
        LogFormat::Text => lines.with_ansi(io::stderr().is_terminal()).try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    }
    // A program that serves for the second time has its log already.
    .or(Ok(()))
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn file(text: &str) -> tempfile::NamedTempFile {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(text.as_bytes()).expect("a temporary file");
        file
    }

    fn pool(text: &str) -> PoolSpec {
        text.parse().expect("the test's own pool")
    }

    #[test]
    fn flags_go_over_the_file_and_the_file_over_defaults() {
        let file = file("capacity = 100\nname = 'filed'\n[[pool]]\nname = 'f'\nhandler = 'echo'");
        let args = ServeArgs { config: Some(file.path().into()), name: Some("flagged".into()), ..Default::default() };
        let config = args.into_config(None).expect("a good configuration");
        let wanted = Config { capacity: 100, name: "flagged".into(), pools: vec![pool("f=echo")], ..Config::default() };
        assert_eq!(config, wanted);
    }

    #[test]
    fn every_option_is_laid_over() {
        let wanted = Config {
            listen: "[::1]:1".parse().expect("the test's own address"),
            name: "n".into(),
            fresh: true,
            capacity: 7,
            arena: Some(ByteSize::mib(2)),
            max_message: Some(ByteSize::mib(1)),
            spin: Spin::Off,
            workers: 5,
            max_attempts: 9,
            dead_letters: ByteSize::mib(3),
            item_timeout: Duration::from_secs(3),
            worker_memory: ByteSize::mib(64),
            worker_env: [("A".into(), "{worker}".into())].into(),
            affinity: Affinity::Auto,
            preload: true,
            reload: true,
            grace: Duration::from_secs(1),
            outbox: Some(6),
            max_connections: 8,
            max_resets: 10,
            body_timeout: Duration::from_secs(2),
            python: Some("/p".into()),
            log: LogFormat::Json,
            log_failures: true,
            pools: vec![pool("a=echo"), pool("handle=app:handle")],
        };
        let args = ServeArgs {
            app: Some("app:handle".into()),
            listen: Some(wanted.listen.clone()),
            name: Some(wanted.name.clone()),
            fresh: Some(true),
            pool: vec![pool("a=echo")],
            workers: Some(5),
            capacity: Some(7),
            arena: wanted.arena,
            max_message: wanted.max_message,
            spin: Some(Spin::Off),
            config: None,
            grace: Some(wanted.grace),
            max_attempts: Some(9),
            dead_letters: Some(ByteSize::mib(3)),
            item_timeout: vec![timeout("3s").expect("the test's own limit")],
            worker_memory: vec![memory("64MiB").expect("the test's own limit")],
            worker_env: vec!["A={worker}".parse().expect("the test's own variable")],
            affinity: vec![affinity("auto").expect("the test's own limit")],
            preload: Some(true),
            reload: Some(true),
            outbox: Some(6),
            max_connections: Some(8),
            max_resets: Some(10),
            body_timeout: Some(wanted.body_timeout),
            python: Some("/p".into()),
            log: Some(LogFormat::Json),
            log_failures: Some(true),
            parent: None,
        };
        assert_eq!(args.into_config(None).expect("a good configuration"), wanted);
    }

    #[test]
    fn pools_come_from_flags_or_else_the_environment_or_else_the_file() {
        let file = file("[[pool]]\nname = 'f'\nhandler = 'echo'");
        let pools = |flags: &[&str], environment| {
            let pool = flags.iter().map(|text| pool(text)).collect();
            let args = ServeArgs { config: Some(file.path().into()), pool, ..Default::default() };
            args.into_config(environment).map(|config| config.pools).map_err(|error| error.to_string())
        };
        assert_eq!(pools(&["a=echo"], Some("b=echo")), Ok(vec![pool("a=echo")]));
        assert_eq!(pools(&[], Some("b=exec:a,b;c\n\n  c:2=echo\n")), Ok(vec![pool("b=exec:a,b;c"), pool("c:2=echo")]));
        assert_eq!(pools(&[], Some("")), Ok(vec![pool("f=echo")]));
        assert_eq!(pools(&[], None), Ok(vec![pool("f=echo")]));
        let error = pools(&[], Some("what")).expect_err("not a pool");
        assert!(error.starts_with("FORKRING_POOLS: `what` is not a pool"), "{error}");
    }

    #[test]
    fn limits_are_of_one_pool_or_of_all() {
        let config = |limits: &[&str]| {
            let item_timeout = limits.iter().map(|text| timeout(text).expect("the test's own limit")).collect();
            let args = ServeArgs { pool: vec![pool("a=echo"), pool("b=echo")], item_timeout, ..Default::default() };
            args.into_config(None)
        };
        let timeouts = |limits: &[&str]| {
            let config = config(limits).expect("a good configuration");
            config.pools.iter().map(|pool| config.item_timeout_of(pool)).collect::<Vec<_>>()
        };
        let seconds = |n| Some(Duration::from_secs(n));
        assert_eq!(timeouts(&[]), [None, None]);
        assert_eq!(timeouts(&["5s"]), [seconds(5), seconds(5)]);
        assert_eq!(timeouts(&["b=1s", "5s"]), [seconds(5), seconds(1)]);
        assert_eq!(timeouts(&["5s", "a=0"]), [None, seconds(5)]);
        let error = config(&["c=1s"]).expect_err("no such pool");
        assert!(error.is::<BadUsage>() && error.to_string().starts_with("--item-timeout c=…: there is no pool `c`"));
        assert!(timeout("a=b=1s").is_err() && timeout("a=").is_err() && memory("a=1x").is_err());
        assert!(config(&["=1s"]).is_err());
    }

    #[test]
    fn variables_are_of_one_pool_or_of_all() {
        let config = |given: &[&str]| {
            let worker_env = given.iter().map(|text| text.parse().expect("the test's own variable")).collect();
            let pool = vec![pool("a=echo"), pool("b=echo")];
            ServeArgs { pool, worker_env, ..Default::default() }.into_config(None)
        };
        let given = config(&["A=all", "b:A=one", "b:B={worker}"]).expect("a good configuration");
        let variables = given.pools.iter().map(|pool| given.place_of(pool).variables(2)).collect::<Vec<_>>();
        let pair = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        assert_eq!(variables, [vec![pair("A", "all")], vec![pair("A", "one"), pair("B", "2")]]);
        let error = config(&["c:A=1"]).expect_err("no such pool");
        assert!(error.is::<BadUsage>() && error.to_string().starts_with("--worker-env c:A=…: there is no pool `c`"));
    }

    #[test]
    fn no_pool_and_bad_filters_are_bad_usage() {
        let error = ServeArgs::default().into_config(None).expect_err("no pool");
        assert!(error.is::<BadUsage>() && error.to_string().contains("--pool hash=sha256"));
        let error = log_to_stderr(LogFormat::Text, Some("info=what=")).expect_err("not a filter");
        assert!(error.is::<BadUsage>() && error.to_string().starts_with("FORKRING_LOG: "), "{error}");
        for filter in ["verbose", "info,forkring", "forkring=debug,loud"] {
            let error = log_to_stderr(LogFormat::Text, Some(filter)).expect_err("no level");
            assert!(error.is::<BadUsage>() && error.to_string().contains("` is no level: give error, warn"), "{error}");
        }
    }
}
