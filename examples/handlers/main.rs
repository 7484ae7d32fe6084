//! A tour of what handlers can do, and of what becomes of those that go wrong: one pool for each.
//!
//!     cargo run --example handlers
//!     cargo run --bin forkring -- call crash README.md
//!
//! With names as arguments only those pools are served; settings come from a file, as with `forkring serve --config`:
//!
//!     cargo run --example handlers -- --config settings.toml fail panic

mod items;
mod many;

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use clap::Parser;
use forkring::{
    Code, Failure, Handler, Item, Pool, Program, Reply, Server, config::Config, process::now, sdk::Attached,
};
use items::{hold, note, number, text, wait};

/// Serve handlers that succeed, fail, panic and crash
#[derive(Parser)]
struct Options {
    /// A TOML file with the server's settings
    #[arg(long)]
    config: Option<PathBuf>,

    /// Be a worker of the pool `program` or `many`, as whose worker the server starts us
    #[arg(long, hide = true)]
    worker: bool,

    /// The pools to serve; all of them if none is named
    pools: Vec<String>,
}

const POOLS: [&str; 19] = [
    "fail",
    "panic",
    "big",
    "buffer",
    "metadata",
    "remaining",
    "count",
    "crash",
    "always_crash",
    "crash_until",
    "cancel",
    "hold",
    "hog",
    "scribble",
    "wild",
    "trace",
    "parts",
    "program",
    "many",
];

fn pool(name: &str) -> Option<Pool> {
    Some(match name {
        "fail" => Pool::new(name, fail),
        "panic" => Pool::new(name, panic),
        "big" => Pool::new(name, big),
        "buffer" => Pool::new(name, buffer),
        "metadata" => Pool::new(name, metadata),
        "remaining" => Pool::new(name, remaining),
        "count" => Pool::with_handler(name, Count::default()),
        "crash" => Pool::new(name, crash),
        "always_crash" => Pool::new(name, always_crash),
        "crash_until" => Pool::new(name, crash_until),
        "cancel" => Pool::new(name, cancel),
        "hold" => Pool::new(name, hold),
        "hog" => Pool::new(name, hog),
        "scribble" => Pool::new(name, scribble),
        "wild" => Pool::new(name, wild),
        "trace" => Pool::with_handler(name, Trace::default()),
        "parts" => Pool::new(name, parts),
        "program" | "many" => Pool::program(name, Program::new("/proc/self/exe").args(["--worker"])),
        _ => return None,
    })
}

/// Returns an error with a code and a reason of its own. Any other error would be INTERNAL, reason HANDLER_FAILED.
fn fail(item: &Item<'_>, _: &mut Reply<'_, '_>) -> Result<(), Failure> {
    match item.payload() {
        b"" => Err(io::Error::other("an item without a name").into()),
        row => Err(Failure::new(Code::NotFound, "NO_SUCH_ROW", format_args!("no row `{}`", text(row)?))),
    }
}

/// A panic is the item's failure; the worker lives on.
fn panic(item: &Item<'_>, _: &mut Reply<'_, '_>) -> Result<(), Failure> {
    panic!("{}", text(item.payload())?)
}

/// Writes as many bytes as the payload says, piece by piece: too many are the item's failure.
fn big(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    for _ in 0..number(item)? {
        reply.write(b"x")?;
    }
    Ok(())
}

/// Lends the memory that the result will be sent from, and fills it in place.
fn buffer(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let buffer = reply.buffer(number(item)?)?;
    for (at, byte) in buffer.iter_mut().enumerate() {
        *byte = at as u8;
    }
    Ok(())
}

/// Shows what came beside the payload; `Reply` is an `io::Write`.
fn metadata(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let mut pairs: Vec<_> = item.all_metadata().collect();
    pairs.sort_unstable();
    for (key, value) in pairs {
        writeln!(reply, "{key}={value}")?;
    }
    Ok(())
}

/// How many milliseconds are left until the item's deadline.
fn remaining(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    match item.remaining() {
        Some(left) => write!(reply, "{}", left.as_millis())?,
        None => write!(reply, "as long as it takes")?,
    }
    Ok(())
}

/// Dies of its item the first time. The item is given to another worker, which sees that it is not the first.
fn crash(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    if item.attempt() == 1 {
        std::process::abort();
    }
    write!(reply, "attempt {}", item.attempt())?;
    Ok(())
}

/// Dies of its item every time, until `max_attempts` have been made: ABORTED, reason WORKER_CRASHED, and a dead letter. Once
/// there is a file of the name that the metadata gives, it is mended, and echoes: `forkring dead requeue`.
fn always_crash(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    note(item, "journal", &format!("attempt {}", item.attempt()))?;
    if !item.metadata("mended").is_some_and(|file| Path::new(file).exists()) {
        std::process::abort();
    }
    reply.write(item.payload())?;
    Ok(())
}

/// Dies of its item until there is a file of the name that the metadata gives. With many `max_attempts` that is a crash
/// loop, which ends when somebody mends what was wrong.
fn crash_until(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    if item.metadata("until").is_some_and(|until| !PathBuf::from(until).exists()) {
        std::process::abort();
    }
    write!(reply, "attempt {}", item.attempt())?;
    Ok(())
}

/// Takes as many MiB of memory as the payload says, one by one, and writes to each. More than a worker may have
/// (`worker_memory`) is its death.
fn hog(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let mut all = Vec::new();
    for n in 0..number(item)? {
        all.push(vec![n as u8 | 1; 1 << 20]);
    }
    write!(reply, "{}", all.iter().map(Vec::len).sum::<usize>())?;
    Ok(())
}

/// Writes garbage all over the shared memory that its worker may write, as a wild pointer might, and dies. The payload is
/// where to begin in the garbage. Once, by the file that the metadata names: it may be given the item again.
fn scribble(item: &Item<'_>, _: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let once = item.metadata("once").ok_or_else(|| io::Error::other("no file"))?;
    OpenOptions::new().write(true).create_new(true).open(once)?;
    let mut state = (number(item)? as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    // The parts that are mapped for writing: START-END PERMISSIONS OFFSET DEVICE INODE PATH.
    let maps = std::fs::read_to_string("/proc/self/maps")?;
    let parts: Vec<_> =
        maps.lines().filter(|line| line.contains(" rw-s ") && line.contains("/dev/shm/forkring-")).collect();
    let path =
        parts.first().and_then(|part| part.split(' ').next_back()).ok_or_else(|| io::Error::other("no segment"))?;
    let segment = OpenOptions::new().read(true).write(true).open(path)?;
    let hex = |text: Option<&str>| u64::from_str_radix(text.unwrap_or_default(), 16).map_err(io::Error::other);
    for _ in 0..300 {
        // The control part comes first, and has the more to lose.
        let part = parts[(random(5) == 0) as usize % parts.len()];
        let mut words = part.split([' ', '-']);
        let len = hex(words.next()).and_then(|start| Ok(hex(words.next())? - start))?;
        let offset = hex(words.nth(2))?;
        let place = |random: &mut dyn FnMut(u64) -> u64| offset + random(len / 8) * 8;
        let mut bytes = vec![0; 8 << random(6)];
        match random(4) {
            0 => {}
            1 => bytes.fill(0xff),
            2 => bytes.iter_mut().for_each(|byte| *byte = random(256) as u8),
            // What looks like something.
            _ => drop(segment.read_at(&mut bytes, place(&mut random))?),
        }
        let at = place(&mut random);
        bytes.truncate((offset + len - at) as usize);
        segment.write_all_at(&bytes, at)?;
    }
    std::process::abort()
}

/// Writes to its payload in the shared memory, as a wild pointer might, and dies of it: nobody may write there. The next worker
/// holds the item as `hold` does.
fn wild(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    if item.attempt() == 1 {
        let byte: *mut u8 = std::ptr::with_exposed_provenance_mut(item.payload().as_ptr().expose_provenance());
        // SAFETY: none, it is meant to fault. The page is mapped for reading only, so nothing is written.
        #[allow(unsafe_code)]
        unsafe {
            byte.write_volatile(!item.payload()[0]);
        }
    }
    hold(item, reply)
}

/// Works until nobody waits for the result any more, and notes that in the file that the metadata names.
fn cancel(item: &Item<'_>, _: &mut Reply<'_, '_>) -> Result<(), Failure> {
    note(item, "journal", "began")?;
    while !item.is_cancelled() {
        thread::sleep(Duration::from_millis(1));
    }
    note(item, "journal", "cancelled")?;
    // Either the time is over or the client is gone; in neither case does it matter much what is said.
    Err(if item.remaining() == Some(Duration::ZERO) { Failure::deadline() } else { Failure::cancelled() })
}

/// Sends as many parts as the payload says, of as many bytes as the metadata says: over `Process` each as it is made. Before
/// the part that the metadata's `at` names it waits as `hold` does. What it has sent it notes.
fn parts(item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
    let parsed = |key| item.metadata(key).and_then(|text| text.parse::<usize>().ok());
    note(item, "journal", &format!("{} began in {}", item.id(), std::process::id()))?;
    for n in 0..number(item)? {
        if parsed("at") == Some(n) {
            wait(item);
        }
        reply.write(&vec![n as u8; parsed("size").unwrap_or(1)])?;
        if let Err(error) = reply.send() {
            note(item, "journal", &format!("{error} at {n}"))?;
            return Err(error.into());
        }
        note(item, "sent", &n.to_string())?;
    }
    reply.write(b"end")?;
    Ok(())
}

/// Leaves a trace of each execution: a line `ID ATTEMPT PID TIME` in the file that the variable JOURNAL names, which also
/// begins the result. Then it works for as many milliseconds as the metadata says, waits as `hold` does, and echoes.
#[derive(Default)]
struct Trace {
    journal: Option<File>,
}

impl Handler for Trace {
    fn handle(&mut self, item: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
        let words = format!("{} {} {} {}", item.id(), item.attempt(), std::process::id(), now());
        // Of 64 bytes each, no line lies in two pages, and so a death within the write cannot leave a half of one.
        let line = format!("{words:<63}\n");
        let journal = match &mut self.journal {
            Some(journal) => journal,
            none => {
                let path = std::env::var_os("JOURNAL").ok_or_else(|| io::Error::other("JOURNAL is not set"))?;
                none.insert(OpenOptions::new().create(true).append(true).open(path)?)
            }
        };
        journal.write_all(line.as_bytes())?;
        if let Some(millis) = item.metadata("millis").and_then(|millis| millis.parse().ok()) {
            thread::sleep(Duration::from_millis(millis));
        }
        wait(item);
        reply.write(line.as_bytes())?;
        reply.write(item.payload())?;
        Ok(())
    }
}

/// A handler with state: each worker has its own, from the moment it was forked.
#[derive(Default)]
struct Count {
    items: u64,
}

impl Handler for Count {
    fn handle(&mut self, _: &Item<'_>, reply: &mut Reply<'_, '_>) -> Result<(), Failure> {
        self.items += 1;
        write!(reply, "{}", self.items)?;
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    tracing_subscriber::fmt().with_writer(io::stderr).with_target(false).with_ansi(false).init();
    if options.worker {
        // Any program can be a worker; this one has only to be told that it is.
        let mut worker = Attached::from_env()?;
        let worked = if worker.pool() == "many" { many::work(&mut worker) } else { worker.run(&mut hold) };
        return worked.context("cannot wait for items");
    }
    let config = options.config.as_deref().map_or_else(|| Ok(Config::default()), Config::from_file)?;
    let mut server = Server::from_config(config)?;
    let named: Vec<_> = options.pools.iter().map(String::as_str).collect();
    for name in if named.is_empty() { &POOLS[..] } else { &named } {
        server = server.pool(pool(name).with_context(|| format!("there is no handler `{name}` here"))?);
    }
    let server = server.bind()?;
    println!("listening on {}", server.local_addr());
    server.run().context("the server ended badly")
}
