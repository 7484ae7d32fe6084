//! The one typed configuration of a server, used by the library and the command line.
//!
//! Every option has a default that works, [`Config::from_toml`] lays a file over the defaults, and the command line
//! lays the environment and its flags over that. What contradicts itself is refused by [`Config::validate`] before
//! anything starts, with a line that says what to change.

mod error;
mod listen;
mod place;
mod pool;
mod sizes;
mod suggest;
mod units;

use std::{
    collections::BTreeMap,
    fs::File,
    io::Read as _,
    net::{Ipv4Addr, SocketAddr},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use serde::{Deserialize, Deserializer};

use crate::segment::{MAX_ITEMS, MAX_POOLS, MAX_WORKERS, MIN_LETTER_BYTES};

pub use error::ConfigError;
pub use listen::Listen;
pub use place::{Affinity, Place, Variable};
pub use pool::PoolSpec;
pub use sizes::Room;
pub(crate) use suggest::closest;
pub use units::{ByteSize, InvalidValue, LogFormat, Spin, format_duration, parse_duration, parse_flag, whole_number};

/// The allowed capacities, in items.
pub const CAPACITY: RangeInclusive<u32> = 1..=MAX_ITEMS;
/// The allowed numbers of workers of a pool. One pool may have as many as all pools together.
pub const WORKERS: RangeInclusive<u16> = 1..=MAX_WORKERS as u16;
/// The allowed numbers of attempts.
pub const ATTEMPTS: RangeInclusive<u8> = 1..=u8::MAX;
/// The allowed numbers of connections.
pub const CONNECTIONS: RangeInclusive<u32> = 1..=u32::MAX;
/// The allowed numbers of resets of a connection in a minute.
pub const RESETS: RangeInclusive<u32> = 1..=u32::MAX;
/// What a partition may have: the segment's own bounds, as round numbers.
const ARENAS: RangeInclusive<u64> = 1 << 12..=1 << 36;
/// What dead letters may have, if any.
const LETTERS: RangeInclusive<u64> = MIN_LETTER_BYTES..=1 << 36;
/// The largest message that may be allowed: gRPC counts its bytes in 32 bits, and a result's other fields need room.
pub const MAX_MESSAGE: u64 = u32::MAX as u64 - (1 << 20);
/// The largest configuration file. The bound keeps a device that never ends from being read into memory.
const LARGEST_FILE: ByteSize = ByteSize::mib(1);
/// A worker with less could not even start.
const LEAST_MEMORY: ByteSize = ByteSize::mib(8);
/// A longer spin than this is a mistake: it would burn a core for nothing.
const MAX_SPIN: Duration = Duration::from_secs(1);

/// How a server is set up.
///
/// ```
/// use forkring::config::{ByteSize, Config, PoolSpec};
///
/// let config = Config {
///     capacity: 1000,
///     arena: Some(ByteSize::mib(16)),
///     max_message: Some(ByteSize::mib(8)),
///     pools: vec!["hash:2=sha256".parse::<PoolSpec>()?],
///     ..Config::default()
/// };
/// config.validate()?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Where gRPC is served: an address, or the name of a host. Default: `127.0.0.1:50051`; port 0 takes a free one.
    pub listen: Listen,
    /// Names the segment, `/dev/shm/forkring-NAME`: one live server a name. Default: `forkring`.
    #[serde(deserialize_with = "units::text")]
    pub name: String,
    /// Throw away what a server of this name that died has left, instead of finishing it. Default: no.
    #[serde(deserialize_with = "units::flag")]
    pub fresh: bool,
    /// How many items may be in the server at a time. Default: 16384.
    #[serde(deserialize_with = "capacity")]
    pub capacity: u32,
    /// Payload memory of each partition: one for the front's requests, one for each worker's results. By
    /// default the arenas share a quarter of `/dev/shm`, each of 5 to 80 MiB and never smaller than
    /// [`max_message`](Self::max_message) needs. A server that adopts a segment keeps that segment's arenas.
    #[serde(deserialize_with = "units::some_size")]
    pub arena: Option<ByteSize>,
    /// The largest message, in and out; at most 8/9 of the arena. Default: see [`Config::max_message`].
    #[serde(deserialize_with = "units::some_size")]
    pub max_message: Option<ByteSize>,
    /// How long processes look for work before they sleep. Default: [`Spin::Auto`].
    pub spin: Spin,
    /// Workers of a pool that names no count. Default: the cores that this process may use.
    #[serde(deserialize_with = "workers")]
    pub workers: u16,
    /// How often an item is given to a worker before workers that die of it are its error. Default: 3.
    #[serde(deserialize_with = "attempts")]
    pub max_attempts: u8,
    /// Memory for dead letters: items that killed `max_attempts` workers, until they are requeued or dropped. When it is
    /// full, the oldest make room. Default: 8 MiB; 0 keeps none.
    pub dead_letters: ByteSize,
    /// How long a worker may take for an item before it is ended and the item counts as one it died of. Default: 0, as long
    /// as it likes. A pool may have [its own](PoolSpec::item_timeout).
    #[serde(deserialize_with = "units::duration")]
    pub item_timeout: Duration,
    /// How much memory a worker may have beside the segment. Default: 0, no limit. A pool may have
    /// [its own](PoolSpec::worker_memory).
    pub worker_memory: ByteSize,
    /// Environment variables of workers; in a value `{worker}` is the worker's number in its pool, from 0, and `{slot}` its
    /// number over all pools. Default: none beside the server's own. A pool may have [more](PoolSpec::worker_env).
    #[serde(deserialize_with = "units::variables")]
    pub worker_env: BTreeMap<String, String>,
    /// Which CPU each worker keeps to. Default: [`Affinity::Off`]. A pool may have [its own](PoolSpec::affinity).
    pub affinity: Affinity,
    /// Whether each pool with a handler in Python has one process that imports it and then forks the workers, which so share
    /// its memory. Default: no, each worker imports it for itself. A pool may have [its own](PoolSpec::preload).
    #[serde(deserialize_with = "units::flag")]
    pub preload: bool,
    /// Whether workers with a handler in Python are replaced, one after the other, when a file changes that it was imported
    /// from. For development. Default: no.
    #[serde(deserialize_with = "units::flag")]
    pub reload: bool,
    /// How long a drain may take before it is cut short. Default: 30 s; 0 does not wait.
    #[serde(deserialize_with = "units::duration")]
    pub grace: Duration,
    /// How many submitted items may be pending or wait as results for their subscribers; see [`Config::outbox`].
    #[serde(deserialize_with = "outbox")]
    pub outbox: Option<u32>,
    /// How many clients may be connected at a time. Default: 4096.
    #[serde(deserialize_with = "connections")]
    pub max_connections: u32,
    /// How many streams a second one connection may reset before the server could begin with them, for more than ten seconds. A
    /// client that resets more is disconnected. Default: 10000.
    #[serde(deserialize_with = "resets")]
    pub max_resets: u32,
    /// How long a client may take for the next 64 KiB of a message that it has begun to send, or for its end. Default: 10 s.
    #[serde(deserialize_with = "units::duration")]
    pub body_timeout: Duration,
    /// The interpreter of Python handlers; the package `forkring` must be installed there. Default: the one that
    /// the program was installed for by pip, or `python3`.
    #[serde(deserialize_with = "some_path")]
    pub python: Option<PathBuf>,
    /// How log lines look. Default: [`LogFormat::Text`].
    pub log: LogFormat,
    /// Whether failed items are logged, at most ten a second. Default: no.
    #[serde(deserialize_with = "units::flag")]
    pub log_failures: bool,
    /// The pools with a built-in or a Python handler. Default: none. In a file: `[[pool]]`.
    #[serde(rename = "pool", deserialize_with = "pool::list")]
    pub pools: Vec<PoolSpec>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 50051)).into(),
            name: "forkring".to_owned(),
            fresh: false,
            capacity: 16384,
            arena: None,
            max_message: None,
            spin: Spin::Auto,
            workers: available_cores(),
            max_attempts: 3,
            dead_letters: ByteSize::mib(8),
            item_timeout: Duration::ZERO,
            worker_memory: ByteSize::new(0),
            worker_env: BTreeMap::new(),
            affinity: Affinity::Off,
            preload: false,
            reload: false,
            grace: Duration::from_secs(30),
            outbox: None,
            max_connections: 4096,
            max_resets: 10_000,
            body_timeout: Duration::from_secs(10),
            python: None,
            log: LogFormat::Text,
            log_failures: false,
            pools: Vec::new(),
        }
    }
}

impl Config {
    /// Reads a TOML file over the defaults. Does not [`validate`](Self::validate): other sources may yet follow.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(LARGEST_FILE.bytes() + 1).read_to_end(&mut bytes));
        read.map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        match String::from_utf8(bytes) {
            Ok(text) if text.len() as u64 <= LARGEST_FILE.bytes() => Self::from_toml(&text, path),
            _ => Err(ConfigError::NotText { path: path.to_owned() }),
        }
    }

    /// Reads TOML over the defaults; `path` is what errors call it.
    ///
    /// ```
    /// # use forkring::config::Config;
    /// let config = Config::from_toml("capacity = 100\n[[pool]]\nname = 'hash'\nhandler = 'sha256'", "my.toml".as_ref())?;
    /// assert_eq!(config.pools[0].to_string(), "hash=sha256");
    ///
    /// let error = Config::from_toml("capacity = 'many'", "my.toml".as_ref()).unwrap_err();
    /// let wanted = "my.toml:1:12: capacity: `many` is not a whole number from 1 to 1048576";
    /// assert_eq!(error.to_string(), wanted);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let offset = error.span().map_or(0, |span| span.start).min(text.len());
            let before = text.get(..offset).unwrap_or_default();
            let line_start = before.rfind('\n').map_or(0, |at| at + 1);
            // For a value of a wrong type, the expectation is itself a sentence that says what to write.
            let problem = error.message();
            let problem = match problem.split_once(", expected ") {
                Some((_, wanted)) if problem.starts_with("invalid type: ") => wanted,
                _ => problem,
            };
            // The parser's message names an unknown key, but not the key of a wrong value.
            let key = text.get(line_start..).unwrap_or_default().lines().next().and_then(|line| line.split_once('='));
            let message = match key.map(|(key, _)| key.trim()) {
                _ if problem.starts_with(UNKNOWN) => unknown_key(problem),
                Some(key) if !key.is_empty() && !problem.contains(&format!("`{key}`")) => format!("{key}: {problem}"),
                _ => problem.to_owned(),
            };
            ConfigError::Parse {
                path: path.to_owned(),
                line: before.matches('\n').count() + 1,
                column: before[line_start..].chars().count() + 1,
                message: message.replace('\n', ", "),
            }
        })
    }

    /// How many submitted items may be pending or wait for subscribers: half the capacity unless set, so that `Submit`
    /// without a subscriber cannot take the server from `Call` and `Process`.
    pub fn outbox(&self) -> u32 {
        self.outbox.unwrap_or((self.capacity / 2).max(1))
    }

    /// Returns the largest message, in and out. The default is 64 MiB, or what fits if the arena is smaller.
    pub fn max_message(&self) -> ByteSize {
        self.max_message.unwrap_or_else(|| sizes::default_max_message(self.arena))
    }

    /// Returns the arena: the configured one, or the default for this much room.
    pub fn arena_in(&self, room: Room) -> ByteSize {
        self.arena.unwrap_or_else(|| sizes::default_arena(room, self.max_message))
    }

    /// Returns the smallest arena that holds the configured largest message, or 0 if none is configured.
    pub fn least_arena(&self) -> u64 {
        self.max_message.map_or(0, |message| sizes::arena_for(message.bytes()))
    }

    /// How many workers the pool has.
    pub fn workers_of(&self, pool: &PoolSpec) -> u16 {
        pool.workers.unwrap_or(self.workers)
    }

    /// How long the pool's workers may take for an item, if not as long as they like.
    pub fn item_timeout_of(&self, pool: &PoolSpec) -> Option<Duration> {
        Some(pool.item_timeout.unwrap_or(self.item_timeout)).filter(|timeout| !timeout.is_zero())
    }

    /// How much memory each of the pool's workers may have, if there is a limit.
    pub fn worker_memory_of(&self, pool: &PoolSpec) -> Option<ByteSize> {
        Some(pool.worker_memory.unwrap_or(self.worker_memory)).filter(|memory| memory.bytes() != 0)
    }

    /// Where the pool's workers run, and with what environment, as if it were the first pool.
    pub fn place_of(&self, pool: &PoolSpec) -> Place {
        let mut variables = self.worker_env.clone();
        variables.extend(pool.worker_env.clone());
        Place::new(variables, self.affinity_of(pool))
    }

    /// The same for all pools, in order: slots are counted, and CPUs dealt out, over pools.
    pub fn places(&self) -> Vec<Place> {
        let workers = |pools: &[&PoolSpec]| pools.iter().map(|pool| self.workers_of(pool)).fold(0, u16::saturating_add);
        let place = |(at, pool): (usize, &PoolSpec)| {
            let before: Vec<_> = self.pools[..at].iter().collect();
            let alike = |other: &&PoolSpec| self.affinity_of(other) == self.affinity_of(pool);
            let on_these_cpus: Vec<_> = before.iter().copied().filter(alike).collect();
            self.place_of(pool).after(workers(&before), workers(&on_these_cpus))
        };
        self.pools.iter().enumerate().map(place).collect()
    }

    fn affinity_of<'a>(&'a self, pool: &'a PoolSpec) -> &'a Affinity {
        pool.affinity.as_ref().unwrap_or(&self.affinity)
    }

    /// Refuses what cannot work.
    pub fn validate(&self) -> Result<(), ConfigError> {
        if !is_name(&self.name, |b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b)) {
            return Err(ConfigError::Name(self.name.clone()));
        }
        in_range("capacity", self.capacity, CAPACITY)?;
        in_range("workers", self.workers, WORKERS)?;
        in_range("max_attempts", self.max_attempts, ATTEMPTS)?;
        in_range("outbox", self.outbox(), 1..=self.capacity)?;
        in_range("max_connections", self.max_connections, CONNECTIONS)?;
        in_range("max_resets", self.max_resets, RESETS)?;
        self.validate_sizes()?;
        if let Spin::For(duration) = self.spin
            && duration > MAX_SPIN
        {
            return Err(ConfigError::Spin(format_duration(duration)));
        }
        if self.body_timeout.is_zero() {
            return Err(ConfigError::BodyTimeout);
        }
        self.validate_pools()
    }

    fn validate_sizes(&self) -> Result<(), ConfigError> {
        // gRPC writes a message's length in 32 bits.
        if let Some(max_message) = self.max_message.filter(|size| !(1..=MAX_MESSAGE).contains(&size.bytes())) {
            return Err(ConfigError::MaxMessage(max_message));
        }
        if let Some(arena) = self.arena.filter(|size| !ARENAS.contains(&size.bytes())) {
            return Err(ConfigError::ArenaBounds(arena));
        }
        if self.dead_letters.bytes() != 0 && !LETTERS.contains(&self.dead_letters.bytes()) {
            return Err(ConfigError::DeadLetters(self.dead_letters));
        }
        match (self.arena, self.max_message) {
            (Some(arena), Some(max_message)) if arena.bytes() < self.least_arena() => Err(ConfigError::Arena {
                max_message,
                arena,
                needed: ByteSize::new(self.least_arena()),
                fits: ByteSize::new(sizes::largest_message(arena.bytes())),
            }),
            _ => Ok(()),
        }
    }

    fn validate_pools(&self) -> Result<(), ConfigError> {
        if self.pools.len() > MAX_POOLS as usize {
            return Err(ConfigError::TooManyPools(self.pools.len()));
        }
        let mut total = 0;
        for (at, pool) in self.pools.iter().enumerate() {
            pool.validate()?;
            if self.pools[..at].iter().any(|other| other.name == pool.name) {
                return Err(ConfigError::DuplicatePool(pool.name.clone()));
            }
            total += u32::from(self.workers_of(pool));
            if let Some(memory) = self.worker_memory_of(pool).filter(|memory| *memory < LEAST_MEMORY) {
                return Err(ConfigError::WorkerMemory { pool: pool.name.clone(), memory });
            }
            self.place_of(pool).validate(&pool.name)?;
        }
        if total > MAX_WORKERS {
            return Err(ConfigError::TooManyWorkers(total));
        }
        Ok(())
    }
}

/// The cores that this process may use, as far as a pool can use them.
fn available_cores() -> u16 {
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    u16::try_from(cores.min(MAX_WORKERS as usize)).unwrap_or(u16::MAX)
}

fn is_name(name: &str, allowed: fn(u8) -> bool) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(allowed)
}

fn in_range<T>(key: &'static str, value: T, range: RangeInclusive<T>) -> Result<(), ConfigError>
where
    T: PartialOrd + Copy + Into<u32>,
{
    let (value, least, most) = (value.into(), (*range.start()).into(), (*range.end()).into());
    if (least..=most).contains(&value) { Ok(()) } else { Err(ConfigError::Range { key, value, least, most }) }
}

/// How the TOML parser begins its message about a key that it does not know.
const UNKNOWN: &str = "unknown field `";

/// Says which key was probably meant, of those that the parser's message lists, or which keys there are.
fn unknown_key(message: &str) -> String {
    let mut names = message.split('`').skip(1).step_by(2);
    let key = names.next().unwrap_or_default();
    let known: Vec<_> = names.collect();
    match closest(key, known.iter().copied()) {
        Some(meant) => format!("unknown key `{key}`: did you mean `{meant}`?"),
        None => format!("unknown key `{key}`: the keys here are {}", known.join(", ")),
    }
}

fn capacity<'de, D: Deserializer<'de>>(source: D) -> Result<u32, D::Error> {
    units::from_text(source, whole_number(CAPACITY))
}

fn workers<'de, D: Deserializer<'de>>(source: D) -> Result<u16, D::Error> {
    units::from_text(source, whole_number(WORKERS))
}

fn attempts<'de, D: Deserializer<'de>>(source: D) -> Result<u8, D::Error> {
    units::from_text(source, whole_number(ATTEMPTS))
}

fn outbox<'de, D: Deserializer<'de>>(source: D) -> Result<Option<u32>, D::Error> {
    units::from_text(source, whole_number(CAPACITY)).map(Some)
}

fn connections<'de, D: Deserializer<'de>>(source: D) -> Result<u32, D::Error> {
    units::from_text(source, whole_number(CONNECTIONS))
}

fn resets<'de, D: Deserializer<'de>>(source: D) -> Result<u32, D::Error> {
    units::from_text(source, whole_number(RESETS))
}

fn some_path<'de, D: Deserializer<'de>>(source: D) -> Result<Option<PathBuf>, D::Error> {
    units::text(source).map(|text| Some(text.into()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        Config::from_toml(text, Path::new("f.toml")).map_err(|error| error.to_string())
    }

    fn refusal(change: impl FnOnce(&mut Config)) -> String {
        let mut config = Config::default();
        change(&mut config);
        config.validate().map_or_else(|error| error.to_string(), |()| "accepted".to_owned())
    }

    fn variables(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    fn pools(specs: &[&str]) -> Vec<PoolSpec> {
        specs.iter().map(|spec| spec.parse().expect("the test's own spec")).collect()
    }

    #[test]
    fn the_defaults_are_valid() {
        let config = Config::default();
        assert_eq!(refusal(|_| ()), "accepted");
        assert_eq!((config.capacity, config.outbox()), (16384, 8192));
        assert_eq!(parse(""), Ok(config));
    }

    #[test]
    fn a_file_is_laid_over_the_defaults() {
        let text = r#"
            listen = "[::1]:7000"
            name = "hashes"
            fresh = true
            capacity = 1000
            arena = "16MiB"
            max_message = 4096
            spin = "50us"
            workers = 3
            max_attempts = 1
            dead_letters = "64KiB"
            item_timeout = "2s"
            worker_memory = "1GiB"
            worker_env = { DEVICE = "{worker}", MODE = "all" }
            affinity = "auto"
            preload = true
            reload = true
            grace = "1m"
            outbox = 10
            max_connections = 7
            max_resets = 9
            body_timeout = "1.5s"
            python = "/opt/python"
            log = "json"
            log_failures = true

            [[pool]]
            name = "hash"
            workers = 4
            handler = "sha256"

            [[pool]]
            name = "count"
            handler = "exec:wc -c"
            item_timeout = 0
            worker_memory = "8MiB"
            worker_env = { MODE = "one" }
            affinity = 0
            preload = false
        "#;
        let config = Config {
            listen: "[::1]:7000".parse().expect("the test's own address"),
            name: "hashes".to_owned(),
            fresh: true,
            capacity: 1000,
            arena: Some(ByteSize::mib(16)),
            max_message: Some(ByteSize::new(4096)),
            spin: Spin::For(Duration::from_micros(50)),
            workers: 3,
            max_attempts: 1,
            dead_letters: ByteSize::new(64 << 10),
            item_timeout: Duration::from_secs(2),
            worker_memory: ByteSize::mib(1024),
            worker_env: variables(&[("DEVICE", "{worker}"), ("MODE", "all")]),
            affinity: Affinity::Auto,
            preload: true,
            reload: true,
            grace: Duration::from_secs(60),
            outbox: Some(10),
            max_connections: 7,
            max_resets: 9,
            body_timeout: Duration::from_millis(1500),
            python: Some("/opt/python".into()),
            log: LogFormat::Json,
            log_failures: true,
            pools: vec![
                pools(&["hash:4=sha256"]).remove(0),
                PoolSpec {
                    item_timeout: Some(Duration::ZERO),
                    worker_memory: Some(ByteSize::mib(8)),
                    worker_env: variables(&[("MODE", "one")]),
                    affinity: Some(Affinity::Cpus(vec![0])),
                    preload: Some(false),
                    ..pools(&["count=exec:wc -c"]).remove(0)
                },
            ],
        };
        assert_eq!(parse(text).as_ref(), Ok(&config));
        let [hash, count] = &config.pools[..] else { panic!("two pools") };
        assert_eq!(config.item_timeout_of(hash), Some(Duration::from_secs(2)));
        assert_eq!(config.item_timeout_of(count), None, "a pool's own, which is none, beats the one for all");
        assert_eq!(config.worker_memory_of(hash), Some(ByteSize::mib(1024)));
        assert_eq!(config.worker_memory_of(count), Some(ByteSize::mib(8)));
        let places = [hash, count].map(|pool| config.place_of(pool).variables(3));
        assert_eq!(places[0], [("DEVICE".to_owned(), "3".to_owned()), ("MODE".to_owned(), "all".to_owned())]);
        assert_eq!(places[1], [("DEVICE".to_owned(), "3".to_owned()), ("MODE".to_owned(), "one".to_owned())]);
        assert_eq!(config.place_of(count).cpu(5), Some(0));
        assert_eq!(config.places().len(), 2);
        assert_eq!(config.validate().map_err(|error| error.to_string()), Ok(()));
    }

    #[test]
    fn a_bad_file_is_one_line_with_place_and_key() {
        for (text, wanted) in [
            ("\n  capactiy = 1", "f.toml:2:3: unknown key `capactiy`: did you mean `capacity`?"),
            ("max-message = 1", "f.toml:1:1: unknown key `max-message`: did you mean `max_message`?"),
            ("xyzzy = 1", "f.toml:1:1: unknown key `xyzzy`: the keys here are listen, name, "),
            ("capacity = 'x'", "f.toml:1:12: capacity: `x` is not a whole number from 1 to 1048576"),
            ("capacity = -1", "f.toml:1:12: capacity: `-1` is not a whole number from 1 to 1048576"),
            ("capacity = 1.5", "f.toml:1:12: capacity: `1.5` is not a whole number from 1 to 1048576"),
            ("capacity = true", "f.toml:1:12: capacity: `true` is not a whole number from 1 to 1048576"),
            ("capacity = [1]", "f.toml:1:12: capacity: a list stands where one value belongs"),
            ("capacity = { a = 1 }", "f.toml:1:12: capacity: a table or date stands where one value belongs"),
            ("capacity = 99999999999999999999", "f.toml:1:12: capacity: `99999999999999999999` is not a whole number"),
            ("workers = 0", "f.toml:1:11: workers: `0` is not a whole number from 1 to 1024"),
            ("max_attempts = 256", "f.toml:1:16: max_attempts: `256` is not a whole number from 1 to 255"),
            ("outbox = ''", "f.toml:1:10: outbox: `` is not a whole number from 1 to 1048576"),
            ("max_connections = 0", "f.toml:1:19: max_connections: `0` is not a whole number from 1 to 4294967295"),
            ("fresh = 'maybe'", "f.toml:1:9: fresh: `maybe` is not true or false"),
            ("worker_env = 'A=1'", "f.toml:1:14: worker_env: give a table of names and values, such as {"),
            ("pool = 'a=echo'", "f.toml:1:8: pool: each pool is a table of its own that begins with [[pool]]"),
            ("[pool]\nname = 'a'", "f.toml:1:1: each pool is a table of its own that begins with [[pool]]"),
            ("pool = ['a=echo']", "f.toml:1:9: pool: each pool is a table of its own that begins with [[pool]]"),
            ("[[pool]]\nname = 'a'\nhandler = 'echo'\nworkers = 'x'", "f.toml:4:11: workers: `x` is not a whole"),
            ("[[pool]]\nname = 'a'\nhandler = 'echo'\npreload = 2", "f.toml:4:11: preload: `2` is not true or"),
            ("arena = '1x'", "f.toml:1:9: arena: `1x` is not a size: give bytes"),
            ("grace = 5", "f.toml:1:9: grace: `5` is not a duration: give a number with"),
            ("spin = true", "f.toml:1:8: spin: `true` is not a way to spin: give auto, off,"),
            ("listen = 'localhost'", "f.toml:1:10: listen: `localhost` is not an address to listen on"),
            ("[[pool]]\nname = 'a'", "f.toml:1:1: missing field `handler`"),
            (
                "[[pool]]\nname = 'a'\nhandler = 'echo'\nworker = 1",
                "f.toml:4:1: unknown key `worker`: did you mean `workers`?",
            ),
            ("capacity", "f.toml:1:9: "),
            ("capacity = 1\ncapacity = 2", "f.toml:2:1: "),
            ("name = 'ü' x", "f.toml:1:12: name: "),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.starts_with(wanted) && !error.contains('\n'), "{text:?}: {error}");
        }
        let missing = Config::from_file(Path::new("/nonexistent/f.toml"));
        assert!(matches!(missing, Err(ConfigError::Read { .. })));
        for no_text in ["/dev/zero", "/proc/self/exe"] {
            let error = Config::from_file(Path::new(no_text)).expect_err("no configuration").to_string();
            assert_eq!(error, format!("the configuration {no_text} is not text in UTF-8 of at most 1MiB"));
        }
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_do() {
        for (found, wanted) in [
            (refusal(|c| c.name = "A".into()), "`A` is not a server name"),
            (refusal(|c| c.name.clear()), "`` is not a server name"),
            (refusal(|c| c.name = "a/b".into()), "`a/b` is not a server name"),
            (refusal(|c| c.name = "a".repeat(65)), "`aaa"),
            (refusal(|c| c.capacity = 0), "capacity is 0: choose from 1 to 1048576"),
            (refusal(|c| c.capacity = MAX_ITEMS + 1), "capacity is 1048577"),
            (refusal(|c| c.capacity = 1), "accepted"),
            (refusal(|c| c.workers = 0), "workers is 0: choose from 1 to 1024"),
            (refusal(|c| c.max_attempts = 0), "max_attempts is 0"),
            (refusal(|c| c.outbox = Some(0)), "outbox is 0"),
            (refusal(|c| c.outbox = Some(16385)), "outbox is 16385: choose from 1 to 16384"),
            (refusal(|c| c.max_connections = 0), "max_connections is 0"),
            (refusal(|c| c.max_resets = 0), "max_resets is 0"),
            (refusal(|c| c.max_message = Some(ByteSize::new(0))), "max_message is 0"),
            (refusal(|c| c.max_message = Some(ByteSize::mib(4096))), "max_message is 4GiB"),
            (
                refusal(|c| (c.arena, c.max_message) = (Some(ByteSize::mib(36)), Some(ByteSize::mib(64)))),
                "max_message is 64MiB, which needs an arena of 72MiB, but arena is 36MiB: raise arena to 72MiB or lower max_message to 32MiB",
            ),
            (refusal(|c| (c.arena, c.max_message) = (Some(ByteSize::mib(72)), Some(ByteSize::mib(64)))), "accepted"),
            (refusal(|c| c.arena = Some(ByteSize::mib(1))), "accepted"),
            (refusal(|c| c.max_message = Some(ByteSize::mib(1024))), "accepted"),
            (refusal(|c| c.arena = Some(ByteSize::new(4095))), "arena is 4095: choose from 4KiB to 64GiB"),
            (refusal(|c| c.arena = Some(ByteSize::mib(1 << 17))), "arena is 128GiB"),
            (refusal(|c| c.dead_letters = ByteSize::new(0)), "accepted"),
            (
                refusal(|c| c.dead_letters = ByteSize::new(65535)),
                "dead_letters is 65535: choose 0, to keep none, or from 64KiB",
            ),
            (refusal(|c| c.dead_letters = ByteSize::mib(1 << 17)), "dead_letters is 128GiB"),
            (refusal(|c| c.spin = Spin::For(Duration::from_secs(2))), "spin is 2s"),
            (refusal(|c| c.body_timeout = Duration::ZERO), "body_timeout is 0"),
            (refusal(|c| c.grace = Duration::ZERO), "accepted"),
            (refusal(|c| c.pools = pools(&["a=echo", "b=echo", "a=sha256"])), "pool a is there twice"),
            (refusal(|c| c.pools = pools(&["a:1024=echo"])), "accepted"),
            (refusal(|c| c.pools = pools(&["a:512=echo", "b:512=echo"])), "accepted"),
            (
                refusal(|c| c.pools = (0..5).flat_map(|i| pools(&[&format!("{i}:256=echo")])).collect()),
                "the pools have 1280 workers together: choose from 1 to 1024",
            ),
            (
                refusal(|c| {
                    c.workers = 600;
                    c.pools = pools(&["a=echo", "b=echo"]);
                }),
                "the pools have 1200 workers together: choose from 1 to 1024",
            ),
            (
                refusal(|c| {
                    let pool = PoolSpec { workers: Some(1025), ..pools(&["a=echo"]).remove(0) };
                    c.pools = vec![pool];
                }),
                "pool a has 1025 workers: choose from 1 to 1024",
            ),
            (
                refusal(|c| c.pools = (0..65).flat_map(|i| pools(&[&format!("{i}:1=echo")])).collect()),
                "there are 65 pools",
            ),
            (
                refusal(|c| {
                    let pool = PoolSpec { workers: Some(0), ..pools(&["a=echo"]).remove(0) };
                    c.pools = vec![pool];
                }),
                "pool a has 0 workers",
            ),
            (
                refusal(|c| {
                    c.pools = pools(&["a=echo"]);
                    c.worker_memory = ByteSize::mib(7);
                }),
                "pool a has a worker_memory of 7MiB: give its workers at least 8MiB",
            ),
            (
                refusal(|c| {
                    c.pools = pools(&["a=echo"]);
                    c.affinity = Affinity::Cpus(vec![0, 1023]);
                }),
                "pool a: affinity names CPU 1023, but this process may use only ",
            ),
            (
                refusal(|c| {
                    c.pools = pools(&["a=echo"]);
                    c.worker_env = variables(&[("A=B", "")]);
                }),
                "pool a: \"A=B\" is not the name of an environment variable",
            ),
        ] {
            assert!(found.starts_with(wanted), "{found} / {wanted}");
        }
    }

    proptest! {
        #[test]
        fn the_arena_that_a_refusal_names_is_enough_and_no_less(max_message in 4096_u64..=MAX_MESSAGE) {
            let (arena, max_message) = (Some(ByteSize::new(4096)), Some(ByteSize::new(max_message)));
            let mut config = Config { max_message, arena, ..Config::default() };
            let Err(ConfigError::Arena { needed, .. }) = config.validate() else { panic!("a page was enough") };
            config.arena = Some(ByteSize::new(needed.bytes() - 1));
            prop_assert!(config.validate().is_err());
            config.arena = Some(needed);
            prop_assert!(config.validate().is_ok());
        }

        #[test]
        fn no_file_breaks_the_parser(text in "[a-z\\[\\]=\"'\\n0-9ü ]{0,40}") {
            let _ = parse(&text);
        }
    }

    #[test]
    fn cpus_are_dealt_out_over_the_pools_that_share_them() {
        let pool = |name: &str, workers: u16, affinity: Option<&str>| PoolSpec {
            workers: Some(workers),
            affinity: affinity.map(|text| text.parse().expect("an affinity")),
            ..format!("{name}=echo").parse().expect("a pool")
        };
        let config = Config {
            affinity: Affinity::Cpus(vec![4, 5, 6]),
            worker_env: variables(&[("SLOT", "{slot}")]),
            pools: vec![
                pool("a", 2, None),
                pool("own", 3, Some("8,9")),
                pool("off", 1, Some("off")),
                pool("b", 2, None),
                pool("same", 1, Some("8,9")),
            ],
            ..Config::default()
        };
        let of = |place: &Place, workers: u16| -> Vec<_> {
            (0..workers).map(|n| (place.cpu(n), place.variables(n)[0].1.clone())).collect()
        };
        let wanted: [&[(Option<u16>, &str)]; 5] = [
            &[(Some(4), "0"), (Some(5), "1")],
            &[(Some(8), "2"), (Some(9), "3"), (Some(8), "4")],
            &[(None, "5")],
            &[(Some(6), "6"), (Some(4), "7")],
            &[(Some(9), "8")],
        ];
        for (place, wanted) in config.places().iter().zip(wanted) {
            let wanted: Vec<_> = wanted.iter().map(|(cpu, slot)| (*cpu, (*slot).to_owned())).collect();
            assert_eq!(of(place, wanted.len() as u16), wanted);
        }
    }
}
