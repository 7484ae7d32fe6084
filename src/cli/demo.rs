//! `forkring demo`: the whole path on real input. Every file under a folder goes in through `Submit`, its digest comes
//! back through `GetUpdates`, and is checked against one that was computed apart.
//!
//! The server is a child process, this very program with `serve`, so that nothing here can disturb its forking. It ends
//! when we do, however we do. Memory is bounded by a window over what is in flight; no list of files is kept.

mod files;
mod report;
mod server;
mod stream;
mod window;

use std::{
    env,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
};

use anyhow::bail;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use tokio::sync::mpsc;

use super::{BadUsage, Python, block_on, interrupt::on_interrupt, print, print_json, say};
use crate::config::{ByteSize, Config, WORKERS, whole_number};
use files::Files;
use report::Report;
use stream::{Outgoing, Pending};
use window::Window;

/// The pool that hashes.
const POOL: &str = "sha256";
/// Room for what a message has beside its payload.
const ENVELOPE: u64 = 1024;
/// How many files that could not be sent are named; the rest are counted.
const NAMED: u64 = 10;

/// See it work: hash every file under a folder through worker processes and check every digest
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  forkring demo                             the sources in cargo's registry, or else what the system has
  forkring demo /usr/share/doc --workers 4
  forkring demo --json

Exit code 1 when a digest was wrong or a result missing. Symbolic links are not followed; what cannot be read or is
larger than --max-message is named and left out. Where /dev/shm is small, lower --max-message.")]
pub struct DemoArgs {
    /// Hash the files under this folder
    dir: Option<PathBuf>,

    /// Worker processes [default: one per core]
    #[arg(long, value_name = "N", value_parser = whole_number(WORKERS))]
    workers: Option<u16>,

    /// Files that may be on their way at a time
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = whole_number(1..=u32::MAX))]
    in_flight: u32,

    /// Leave larger files out; the server's memory goes with it [default: 64MiB, or what fits]
    #[arg(long, value_name = "SIZE")]
    max_message: Option<ByteSize>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What the threads that read the files share with the one that speaks gRPC.
struct Shared {
    files: Mutex<Files>,
    window: Window,
    pending: Pending,
    next_id: AtomicU64,
    unreadable: AtomicU64,
    too_large: AtomicU64,
    largest: u64,
    bar: ProgressBar,
}

/// Runs the demo to its verdict.
pub fn run(args: DemoArgs, python: Option<&Python>) -> anyhow::Result<()> {
    let dir = match args.dir {
        Some(dir) => dir,
        None => default_dir().ok_or_else(|| BadUsage("found nothing to hash: name a folder".into()))?,
    };
    let files = Files::under(&dir).map_err(|error| BadUsage(format!("cannot read {}: {error}", dir.display())))?;
    let mut config = Config { pools: vec![format!("{POOL}=sha256").parse()?], ..Config::default() };
    config.max_message = args.max_message;
    config.arena = args.max_message.map(|largest| ByteSize::new((largest.bytes().saturating_mul(5) / 4).max(1 << 20)));
    config.workers = args.workers.unwrap_or(config.workers);
    config.validate()?;
    config.arena = Some(ByteSize::new(crate::server::geometry(&config)?.request_bytes));

    // Before any thread: the child's parent must be this thread, with which it ends.
    let mut server = server::Server::start(&config, python)?;
    let interrupted = on_interrupt()?;
    let largest = config.max_message().bytes().saturating_sub(ENVELOPE);
    let shared = Arc::new(Shared {
        files: Mutex::new(files),
        window: Window::new(args.in_flight, config.max_message().bytes()),
        pending: Pending::default(),
        next_id: AtomicU64::new(1),
        unreadable: AtomicU64::new(0),
        too_large: AtomicU64::new(0),
        largest,
        bar: progress_bar(&dir),
    });
    let items = start_readers(&shared, args.in_flight);
    let run = stream::Run { addr: server.addr(), shared: &shared, workers: config.workers, items, interrupted };
    let outcome = block_on(run.finish());
    shared.window.close();
    shared.bar.finish_and_clear();
    let mut report = match outcome {
        Ok(report) => report,
        Err(error) => return Err(server.blame(error)),
    };
    server.stop()?;
    report.unreadable = shared.unreadable.load(Relaxed);
    report.too_large = shared.too_large.load(Relaxed);
    finish(&report, &dir, args.json)
}

fn finish(report: &Report, dir: &Path, json: bool) -> anyhow::Result<()> {
    if report.answered() == 0 && report.wrong() == 0 {
        return Err(BadUsage(format!("no file under {} could be hashed", dir.display())).into());
    }
    if json {
        print_json(&report.json(dir))?;
    } else {
        print(report.text(dir))?;
    }
    match report.wrong() {
        0 => Ok(()),
        wrong => bail!("{wrong} of {} items went wrong", report.answered() + report.missing + report.rejected),
    }
}

/// The first of these that is there: cargo's sources, the Rust toolchain, what the system shares.
fn default_dir() -> Option<PathBuf> {
    let home = env::var_os("HOME").map(PathBuf::from);
    let of = |variable, folder| env::var_os(variable).map(PathBuf::from).or_else(|| Some(home.as_ref()?.join(folder)));
    let candidates = [
        of("CARGO_HOME", ".cargo").map(|cargo| cargo.join("registry/src")),
        of("RUSTUP_HOME", ".rustup").map(|rustup| rustup.join("toolchains")),
        Some(PathBuf::from("/usr/lib/rustlib")),
        Some(PathBuf::from("/usr/share")),
    ];
    let has_files = |dir: &PathBuf| Files::under(dir).is_ok_and(|mut files| files.next().is_some());
    candidates.into_iter().flatten().find(has_files)
}

/// Shown on a terminal only. The total becomes known while the files are already on their way.
fn progress_bar(dir: &Path) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr());
    if bar.is_hidden() {
        return bar;
    }
    let template = "{bar:30} {bytes}/{total_bytes}  {binary_bytes_per_sec}  {msg}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    if let Ok(files) = Files::under(dir) {
        let bar = bar.clone();
        thread::spawn(move || {
            let sizes = files.flatten().filter_map(|path| path.symlink_metadata().ok());
            bar.set_length(sizes.map(|meta| meta.len()).sum());
        });
    }
    bar
}

/// Starts the threads that read and hash the files. The channel ends when they have.
fn start_readers(shared: &Arc<Shared>, in_flight: u32) -> mpsc::Receiver<Outgoing> {
    // Half of the cores: the workers are to have the others. Two at least, so that one hashes while the other opens files.
    let readers = thread::available_parallelism().map_or(1, |cores| cores.get() / 2).clamp(2, 8);
    // The window is what bounds it.
    let (sender, receiver) = mpsc::channel(in_flight as usize);
    for _ in 0..readers {
        let (shared, sender) = (Arc::clone(shared), sender.clone());
        thread::spawn(move || shared.read(&sender));
    }
    receiver
}

impl Shared {
    /// Reads files and passes them on until there is none, or nobody receives them any more.
    fn read(&self, items: &mpsc::Sender<Outgoing>) {
        loop {
            // A reader that panicked was between two files.
            let next = self.files.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).next();
            let path = match next {
                None => return,
                Some(Ok(path)) => path,
                Some(Err(error)) => {
                    self.leave_out(&self.unreadable, &error);
                    continue;
                }
            };
            let payload = match files::read(&path, self.largest) {
                Ok(Some(payload)) => payload,
                Ok(None) => {
                    let why = format!("{} is larger than --max-message", path.display());
                    self.leave_out(&self.too_large, &why);
                    continue;
                }
                Err(error) => {
                    self.leave_out(&self.unreadable, &format!("{}: {error}", path.display()));
                    continue;
                }
            };
            if !self.window.enter(payload.len() as u64) {
                return;
            }
            let id = self.next_id.fetch_add(1, Relaxed);
            if items.blocking_send(Outgoing::new(id, path, payload)).is_err() {
                return;
            }
        }
    }

    fn leave_out(&self, count: &AtomicU64, why: &dyn std::fmt::Display) {
        match count.fetch_add(1, Relaxed) {
            ..NAMED => self.bar.suspend(|| say(format_args!("left out: {why}"))),
            NAMED => self.bar.suspend(|| say("left out: and more, which are only counted")),
            _ => {}
        }
    }
}
