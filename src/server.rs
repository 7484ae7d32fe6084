//! The server as a library: pools of closures, served until a signal.

use std::{
    collections::BTreeMap,
    error::Error as _,
    fmt, io,
    net::{SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::ExitStatus,
    time::Duration,
};

use socket2::{Domain, Protocol, Socket, Type};

use crate::{
    builtin::{Builtin, BuiltinError},
    config::{Affinity, ByteSize, Config, ConfigError, Listen, PoolSpec, Room},
    handler::{Failure, Handler, Item, Reply},
    process::{self, DeadChildren, ForkError},
    program::Program,
    segment::{self, Geometry, Layout, SegmentError, SegmentOwner, Terms},
    supervisor::{App, PoolPlan, Signals, Supervisor, SupervisorError, Work},
};

/// Connections that wait in the kernel until the front accepts them, as they do while it is restarted.
const BACKLOG: i32 = 1024;

/// Why a server did not start, or ended badly. Its `Debug` is that line, too, for a `main` that returns it.
#[derive(thiserror::Error)]
#[allow(missing_docs)]
pub enum ServerError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("pool `{pool}`: {error}")]
    Handler { pool: String, error: BuiltinError },
    #[error("pool `{pool}`: `{program}` cannot be run: {error}")]
    Program { pool: String, program: String, error: io::Error },
    #[error("pool `{pool}` cannot run `{handler}`, its check ended with {status}: the reason is in the lines above")]
    Check { pool: String, handler: String, status: ExitStatus },
    #[error("pool `{pool}` cannot run `{handler}`: to import it ended the process ({status}), and not by an exception")]
    CutShort { pool: String, handler: String, status: ExitStatus },
    #[error(
        "pool `{pool}` cannot run `{handler}`: `{python}` has no package forkring; install the wheel in that Python (scripts/wheel), or name another one by --python"
    )]
    NoPackage { pool: String, handler: String, python: String },
    #[error("{0} is for handlers in Python, MODULE:FUNCTION, and there is none")]
    NoPython(&'static str),
    #[error("two pools are named `{0}`: give each its own name")]
    DuplicatePool(String),
    #[error("there is no pool: give at least one, as in --pool hash=sha256")]
    NoPool,
    #[error(
        "cannot listen on {listen}: the host `{host}` has no address that this machine knows ({error}); give an IP address, or a host's name that resolves"
    )]
    Resolve { listen: Listen, host: String, error: io::Error },
    #[error("cannot listen on {address}: {error}{}", instead(error))]
    Listen { address: SocketAddr, error: io::Error },
    #[error(transparent)]
    Segment(#[from] SegmentError),
    #[error(transparent)]
    Fork(#[from] ForkError),
    #[error(transparent)]
    Supervisor(#[from] SupervisorError),
}

impl fmt::Debug for ServerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)?;
        let mut text = self.to_string();
        let mut source = self.source();
        while let Some(cause) = source {
            // Some errors repeat their source in their own text.
            let cause_text = cause.to_string();
            if !text.ends_with(&cause_text) {
                write!(f, ": {cause_text}")?;
            }
            (text, source) = (cause_text, cause.source());
        }
        Ok(())
    }
}

/// Returns a hint for an address that the server cannot listen on.
fn instead(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::AddrNotAvailable => {
            "; this machine has no such address: choose one of its own, or 0.0.0.0 for all of them"
        }
        io::ErrorKind::PermissionDenied => "; a port below 1024 takes privileges: choose a higher one",
        io::ErrorKind::AddrInUse => "; stop what listens there, or choose another --listen (port 0 takes a free one)",
        _ => "",
    }
}

/// A named set of workers that run one handler.
pub struct Pool {
    name: String,
    workers: Option<u16>,
    item_timeout: Option<Duration>,
    worker_memory: Option<ByteSize>,
    worker_env: BTreeMap<String, String>,
    affinity: Option<Affinity>,
    work: Work,
}

impl Pool {
    /// A pool whose workers run `handler`. Each worker is forked with its own copy of it.
    pub fn new(
        name: impl Into<String>,
        handler: impl FnMut(&Item<'_>, &mut Reply<'_, '_>) -> Result<(), Failure> + 'static,
    ) -> Self {
        Pool::with_handler(name, handler)
    }

    /// The same for a type that implements [`Handler`].
    pub fn with_handler(name: impl Into<String>, handler: impl Handler + 'static) -> Self {
        Pool::of(name.into(), Work::Handler(Box::new(handler)))
    }

    /// A pool whose workers are another program, which attaches by [`sdk`](crate::sdk).
    pub fn program(name: impl Into<String>, program: Program) -> Self {
        Pool::of(name.into(), Work::Program(program))
    }

    fn of(name: String, work: Work) -> Self {
        let (worker_env, affinity) = (BTreeMap::new(), None);
        Pool { name, workers: None, item_timeout: None, worker_memory: None, worker_env, affinity, work }
    }

    fn program_of(&self) -> Option<&Program> {
        match &self.work {
            Work::Program(program) => Some(program),
            Work::Handler(_) => None,
        }
    }

    /// How many workers; by default [`Config::workers`], one for each core.
    pub fn workers(mut self, workers: u16) -> Self {
        self.workers = Some(workers);
        self
    }

    /// How long a worker may take for an item, 0 for as long as it likes; by default [`Config::item_timeout`].
    ///
    /// One that takes longer gets SIGTERM, which is blocked in workers, and after a second, or the timeout if that is less,
    /// SIGKILL. The item is given to another worker or, out of attempts, fails with `DEADLINE_EXCEEDED` and the reason
    /// `ITEM_TIMEOUT`. A handler that wants to clean up reads SIGTERM from a signalfd and believes it if it comes from the
    /// parent of its process.
    pub fn item_timeout(mut self, timeout: Duration) -> Self {
        self.item_timeout = Some(timeout);
        self
    }

    /// How much memory a worker may have beside the segment, 0 for no limit; by default [`Config::worker_memory`].
    ///
    /// It is the kernel's `RLIMIT_DATA`: heap and threads' stacks, whether they are in use or not. An allocation beyond it
    /// fails, and that is the worker's death, unless the handler allocates by means that can fail.
    pub fn worker_memory(mut self, memory: ByteSize) -> Self {
        self.worker_memory = Some(memory);
        self
    }

    /// An environment variable of its workers, over those in [`Config::worker_env`]. In the value `{worker}` is the worker's
    /// number in this pool, from 0, as in `CUDA_VISIBLE_DEVICES={worker}`, and `{slot}` its number over all pools.
    pub fn worker_env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.worker_env.insert(name.into(), value.into());
        self
    }

    /// Which CPU each of its workers keeps to; by default [`Config::affinity`].
    pub fn affinity(mut self, affinity: Affinity) -> Self {
        self.affinity = Some(affinity);
        self
    }
}

/// A server that is being put together.
///
/// ```standalone_crate
/// # include!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/common/example.rs"));
/// # fn main() {
/// use forkring::{Pool, Server};
///
/// fn main() -> Result<(), forkring::ServerError> {
///     Server::new()
///         .listen(([127, 0, 0, 1], 50051).into())
/// #       .configure(example::settings)
///         .pool(Pool::new("shout", |item, reply| {
///             reply.write(&item.payload().to_ascii_uppercase())?;
///             Ok(())
///         }))
///         .run()
/// }
/// # example::run(main, async |client| {
/// #     let item = forkring::proto::v1::WorkItem::new("shout", "hello");
/// #     assert_eq!(client.call(item).await?.payload, "HELLO");
/// #     Ok(())
/// # });
/// # }
/// ```
#[derive(Default)]
pub struct Server {
    config: Config,
    pools: Vec<Pool>,
}

impl Server {
    /// A server with default settings and no pool.
    pub fn new() -> Self {
        Self::default()
    }

    /// A server with these settings, and the pools that they name.
    pub fn from_config(config: Config) -> Result<Self, ServerError> {
        let pools = config.pools.iter().map(|spec| {
            let python = config.python.as_deref().unwrap_or(Path::new("python3"));
            let preload = spec.preload.unwrap_or(config.preload);
            let pool = match spec.handler.parse::<Builtin>() {
                Ok(builtin) => {
                    builtin.check().map_err(|error| ServerError::Handler { pool: spec.name.clone(), error })?;
                    Pool::with_handler(&spec.name, builtin)
                }
                Err(error) => match Program::python(python, &spec.handler, preload, config.reload) {
                    Some(program) if matches!(error, BuiltinError::Unknown(_)) => Pool::program(&spec.name, program),
                    _ => return Err(ServerError::Handler { pool: spec.name.clone(), error }),
                },
            };
            let PoolSpec { workers, item_timeout, worker_memory, mut worker_env, affinity, .. } = spec.clone();
            if config.reload {
                // Python's copies of modules are as good as a second, which is too long.
                worker_env.entry("PYTHONDONTWRITEBYTECODE".to_owned()).or_insert_with(|| "1".to_owned());
            }
            Ok(Pool { workers, item_timeout, worker_memory, worker_env, affinity, ..pool })
        });
        let pools: Vec<_> = pools.collect::<Result<_, ServerError>>()?;
        let needs_python = [("preload", config.preload), ("reload", config.reload)];
        if let Some((option, _)) = needs_python.iter().find(|(_, is_set)| *is_set)
            && pools.iter().all(|pool| pool.program_of().is_none())
        {
            return Err(ServerError::NoPython(option));
        }
        Ok(Server { pools, config })
    }

    /// Where to listen; port 0 takes a free port. A host's name can be given by [`Config::listen`].
    pub fn listen(mut self, address: SocketAddr) -> Self {
        self.config.listen = address.into();
        self
    }

    /// The name of the server's shared memory, `/dev/shm/forkring-NAME`. One live server can have it; what one that died
    /// had accepted for subscribers, the next of the same name and settings finishes, unless [`Config::fresh`] is set.
    pub fn name(mut self, name: impl Into<String>) -> Self {
        self.config.name = name.into();
        self
    }

    /// Logs items that failed, at most ten lines a second; see [`Config::log_failures`]. The lines are `tracing` events.
    pub fn log_failures(mut self, log: bool) -> Self {
        self.config.log_failures = log;
        self
    }

    /// Changes any other setting.
    pub fn configure(mut self, change: impl FnOnce(&mut Config)) -> Self {
        change(&mut self.config);
        self
    }

    /// Adds a pool.
    pub fn pool(mut self, pool: Pool) -> Self {
        self.pools.push(pool);
        self
    }

    /// Gets all that the server needs: port and shared memory. Whatever can be wrong with the settings is said here.
    pub fn bind(mut self) -> Result<BoundServer, ServerError> {
        // Said now rather than at the first fork, when port and memory are taken.
        let threads = process::threads().map_err(ForkError::Io)?;
        if threads.len() != 1 {
            return Err(ForkError::Threads { names: threads }.into());
        }
        // Before the first child, which may be one that checks a program.
        let dead = DeadChildren::keep().map_err(SupervisorError::Io)?;
        self.config.pools.clear();
        for pool in &self.pools {
            // What a pool of closures may be called is what one of the command line may.
            let spec = PoolSpec {
                name: pool.name.clone(),
                workers: pool.workers,
                item_timeout: pool.item_timeout,
                worker_memory: pool.worker_memory,
                worker_env: pool.worker_env.clone(),
                affinity: pool.affinity.clone(),
                preload: pool.program_of().map(Program::has_nursery),
                handler: match &pool.work {
                    Work::Handler(_) => "closure".to_owned(),
                    Work::Program(program) => program.to_string(),
                },
            };
            self.config.pools.push(spec);
        }
        if self.pools.is_empty() {
            return Err(ServerError::NoPool);
        }
        self.config.validate()?;
        let config = &self.config;
        let places = config.places();
        let mut apps: Vec<App> = Vec::new();
        for (number, (pool, place)) in (0..).zip(self.pools.iter().zip(&places)) {
            let (Some(program), variables) = (pool.program_of(), place.variables(0)) else { continue };
            // One check for all pools that run the same in the same environment.
            if !apps.iter_mut().any(|app| app.is_of(number, program, &variables)) {
                let mut app = App::new(program.clone(), variables.clone(), check(pool, program, &variables)?);
                app.is_of(number, program, &variables);
                apps.push(app);
            }
        }
        let apps = if config.reload { apps } else { Vec::new() };
        let pools = self.pools.into_iter().zip(places).zip(&config.pools).map(|((pool, place), spec)| PoolPlan {
            name: pool.name,
            workers: config.workers_of(spec),
            work: pool.work,
            item_timeout: config.item_timeout_of(spec),
            memory: config.worker_memory_of(spec).map(ByteSize::bytes),
            place,
        });
        let pools: Vec<_> = pools.collect();
        let least_arena = self.config.arena.is_none().then(|| self.config.least_arena());
        let geometry = geometry(&self.config)?;
        let signals = Signals::block().map_err(SupervisorError::Io)?;
        let address = resolve(&self.config.listen)?;
        let listener = listen(address).map_err(|error| ServerError::Listen { address, error })?;
        let address = listener.local_addr().map_err(|error| ServerError::Listen { address, error })?;
        let shapes: Vec<_> = pools.iter().map(|pool| (pool.name.clone(), pool.workers)).collect();
        let terms = Terms { fresh: self.config.fresh, least_arena };
        let owner = SegmentOwner::take_with(&self.config.name, geometry, &shapes, terms)?;
        // An adopted segment may have other arenas; the default for the largest message follows from them.
        let arena = ByteSize::new(owner.layout().geometry().request_bytes);
        self.config.arena = Some(arena);
        let (mib, max_message) = (owner.layout().total().div_ceil(1 << 20), self.config.max_message());
        tracing::info!(mib, %arena, %max_message, "reserved the shared memory");
        let supervisor = Supervisor::new(self.config, pools, listener, owner, apps, signals)?;
        Ok(BoundServer { address, supervisor, _dead: dead })
    }

    /// Serves until SIGTERM or SIGINT has drained it. This process becomes the supervisor and must have one thread.
    pub fn run(self) -> Result<(), ServerError> {
        self.bind()?.run()
    }
}

/// A server that has its port and its memory. Clients may connect already; they are served once it runs.
pub struct BoundServer {
    address: SocketAddr,
    supervisor: Supervisor,
    _dead: DeadChildren,
}

impl BoundServer {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Serves until SIGTERM or SIGINT has drained it.
    pub fn run(self) -> Result<(), ServerError> {
        Ok(self.supervisor.run()?)
    }
}

/// Returns how many of everything the segment of a server has. Its arenas follow from the size of `/dev/shm`, unless the
/// configuration says how large they are.
pub(crate) fn geometry(config: &Config) -> Result<Geometry, SegmentError> {
    let workers = config.pools.iter().map(|pool| u32::from(config.workers_of(pool))).sum();
    let with_arenas = |bytes| Geometry {
        items: config.capacity,
        fronts: 1,
        workers,
        pools: config.pools.len() as u32,
        request_bytes: bytes,
        result_bytes: bytes,
        letter_bytes: config.dead_letters.bytes(),
    };
    let (partitions, smallest) = (1 + u64::from(workers), 4096);
    let fixed = Layout::of(with_arenas(smallest))?.total() - partitions * smallest;
    let room = Room { shm: segment::shm_size(), fixed, partitions };
    Ok(with_arenas(config.arena_in(room).bytes()))
}

/// What is wrong with a pool's program is said before there is a port that clients could reach. It is looked at in the
/// environment of the first worker. The result is the files that it is made of, if it tells of any.
fn check(pool: &Pool, program: &Program, variables: &[(String, String)]) -> Result<Vec<PathBuf>, ServerError> {
    let (pool, handler, name) = (pool.name.clone(), program.to_string(), program.name().display().to_string());
    match program.check(variables.to_vec()) {
        Ok(Some((status, _))) if !status.success() => Err(if program.lacks_package() {
            ServerError::NoPackage { pool, handler, python: name }
        } else if program.was_cut_short(status) {
            ServerError::CutShort { pool, handler, status }
        } else {
            ServerError::Check { pool, handler, status }
        }),
        Ok(checked) => Ok(checked.map(|(_, files)| files).unwrap_or_default()),
        Err(error) => Err(ServerError::Program { pool, program: name, error }),
    }
}

/// Returns the address to listen on, and logs it if a host's name was given.
fn resolve(listen: &Listen) -> Result<SocketAddr, ServerError> {
    match listen {
        Listen::Address(address) => Ok(*address),
        Listen::Host { name: host, .. } => match listen.resolve() {
            Ok(address) => {
                tracing::info!(%host, %address, "resolved the host to listen on");
                Ok(address)
            }
            Err(error) => Err(ServerError::Resolve { listen: listen.clone(), host: host.clone(), error }),
        },
    }
}

/// The supervisor holds the listener, so that connections wait instead of being refused while a front is restarted.
fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_that_main_returns_reads_like_any_other() {
        assert_eq!(format!("{:?}", ServerError::NoPool), ServerError::NoPool.to_string());
        let error = ServerError::from(Config::from_file(Path::new("/no/such")).expect_err("no file"));
        let line = "cannot read the configuration /no/such: No such file or directory (os error 2)";
        assert_eq!(format!("{error:?}"), line);
        let error = ServerError::from(SupervisorError::Io(io::Error::other("no files")));
        assert_eq!(format!("{error:?}"), "cannot supervise: no files", "and it is said once");
    }
}
