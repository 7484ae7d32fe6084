//! Why a configuration is refused. Each line says what is wrong and what to change.

use std::path::PathBuf;

use super::ByteSize;
use crate::segment::{MAX_POOLS, MAX_WORKERS};

/// Why a configuration was refused: what is wrong and what to do about it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read the configuration {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The file cannot be a configuration.
    #[error("the configuration {} is not text in UTF-8 of at most {}", path.display(), super::LARGEST_FILE)]
    NotText {
        /// The file.
        path: PathBuf,
    },
    /// The file is not TOML, or has a key or a value that means nothing.
    #[error("{}:{line}:{column}: {message}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// From 1.
        column: usize,
        /// The key and what is wrong with it.
        message: String,
    },
    /// The server's name cannot name a segment.
    #[error("`{}` is not a server name: use 1 to 64 of a-z, 0-9, _ and -", .0.escape_debug())]
    Name(String),
    /// A number is out of its range.
    #[error("{key} is {value}: choose from {least} to {most}")]
    Range {
        /// Which option.
        key: &'static str,
        /// What it was.
        value: u32,
        /// The least that it may be.
        least: u32,
        /// The most that it may be.
        most: u32,
    },
    /// No gRPC message can be that large, or none fits at all.
    #[error("max_message is {0}: choose from 1 byte to just under 4GiB, the most that gRPC can carry")]
    MaxMessage(ByteSize),
    /// A partition smaller than a page, or larger than can be managed.
    #[error("arena is {0}: choose from 4KiB to 64GiB")]
    ArenaBounds(ByteSize),
    /// Too little for any letter, or more than can be managed.
    #[error("dead_letters is {0}: choose 0, to keep none, or from 64KiB to 64GiB")]
    DeadLetters(ByteSize),
    /// The largest message would not fit the arena.
    #[error(
        "max_message is {max_message}, which needs an arena of {needed}, but arena is {arena}: raise arena to {needed} or lower max_message to {fits}"
    )]
    Arena {
        /// The largest message.
        max_message: ByteSize,
        /// The arena as it is.
        arena: ByteSize,
        /// The arena as it would have to be.
        needed: ByteSize,
        /// The largest message that the arena can hold.
        fits: ByteSize,
    },
    /// A spin that would burn a core.
    #[error("spin is {0}: choose auto, off, or up to 1s (a wake costs some 50us, so longer gains nothing)")]
    Spin(String),
    /// No client could send anything.
    #[error("body_timeout is 0: give clients some time, such as 10s")]
    BodyTimeout,
    /// A pool's name has other characters than it may.
    #[error("`{}` is not a pool name: use 1 to 64 of A-Z, a-z, 0-9, ., _ and -", .0.escape_debug())]
    PoolName(String),
    /// A pool without a handler.
    #[error("pool {0} has no handler: name one, such as echo, sha256, sleep:10ms or exec:COMMAND")]
    NoHandler(String),
    /// A pool with no or too many workers.
    #[error(
        "pool {pool} has {workers} workers: choose from 1 to {MAX_WORKERS}, the most that all pools may have together"
    )]
    PoolWorkers {
        /// Which pool.
        pool: String,
        /// How many it asked for.
        workers: u16,
    },
    /// Workers that could not start.
    #[error(
        "pool {pool} has a worker_memory of {memory}: give its workers at least {}, or 0 for no limit",
        super::LEAST_MEMORY
    )]
    WorkerMemory {
        /// Which pool.
        pool: String,
        /// What it was.
        memory: ByteSize,
    },
    /// What cannot be set in an environment.
    #[error("pool {pool}: {name:?} is not the name of an environment variable, or its value has a zero byte")]
    Variable {
        /// Which pool.
        pool: String,
        /// The name.
        name: String,
    },
    /// A CPU that is not there or that the process is kept from.
    #[error("pool {pool}: affinity names CPU {cpu}, but this process may use only {allowed}")]
    Cpu {
        /// Which pool.
        pool: String,
        /// Which CPU.
        cpu: u16,
        /// What would do.
        allowed: String,
    },
    /// Two pools of one name.
    #[error("pool {0} is there twice: rename one of the two")]
    DuplicatePool(String),
    /// More pools than fit a segment.
    #[error("there are {0} pools: {MAX_POOLS} are the most")]
    TooManyPools(usize),
    /// More workers than fit a segment.
    #[error(
        "the pools have {0} workers together: choose from 1 to {MAX_WORKERS}; lower --workers or the pools' own counts"
    )]
    TooManyWorkers(u32),
}
