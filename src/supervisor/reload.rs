//! Reloading, for development: when a file changes that a handler was imported from, its workers are replaced one after
//! the other.
//!
//! # What it promises
//!
//! - No item is failed or tried again by it: a worker finishes what it has and takes nothing more.
//! - Workers are replaced only by what was looked at (`Program::check`) and found in order. While it is not, they go on with
//!   what they have.
//! - Nothing is polled: the kernel tells of changes (inotify).
//!
//! What is watched are folders, for the files that the last good import was made of, because editors replace a file rather
//! than write it. While the import fails, each `.py` in them counts: it may be one that was missing.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    ffi::OsStr,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use rustix::{
    fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags},
    io::Errno,
};

use super::{Event, Supervisor};
use crate::{
    crash_point::crash_point,
    program::{Check, Program},
    segment::{Slot, Stage},
};

/// Who writes one file often writes more.
const PAUSE: Duration = Duration::from_millis(50);

/// What the workers of some pools have imported.
#[derive(Debug)]
pub(crate) struct App {
    program: Program,
    /// Of the first worker.
    variables: Vec<(String, String)>,
    pools: Vec<u16>,
    files: BTreeSet<PathBuf>,
    /// The last look at it was in vain.
    is_broken: bool,
    has_changed: bool,
    check: Option<Check>,
}

impl App {
    /// One that was imported from these files.
    pub fn new(program: Program, variables: Vec<(String, String)>, files: Vec<PathBuf>) -> Self {
        let files = files.into_iter().collect();
        App { program, variables, pools: Vec::new(), files, is_broken: false, has_changed: false, check: None }
    }

    /// Whether it is what a pool runs; if so, that is noted.
    pub fn is_of(&mut self, pool: u16, program: &Program, variables: &[(String, String)]) -> bool {
        let is = self.program == *program && self.variables == variables;
        if is {
            self.pools.push(pool);
        }
        is
    }

    fn is_made_of(&self, file: &Path) -> bool {
        self.files.contains(file) || self.is_broken && file.extension() == Some(OsStr::new("py"))
    }
}

/// Files that are watched, and workers that are being replaced.
#[derive(Debug)]
pub(super) struct Reload {
    apps: Vec<App>,
    inotify: OwnedFd,
    /// By their watches; a folder may have several names.
    folders: BTreeMap<i32, BTreeSet<PathBuf>>,
    /// When to look at what has changed.
    pub(super) due: Option<Instant>,
    /// Seats whose workers are to be replaced, in order.
    queue: VecDeque<usize>,
    /// The seat whose worker is being replaced.
    current: Option<usize>,
}

impl Reload {
    pub(super) fn new(apps: Vec<App>) -> io::Result<Self> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let (folders, queue) = (BTreeMap::new(), VecDeque::new());
        let mut reload = Reload { apps, inotify, folders, due: None, queue, current: None };
        reload.watch();
        Ok(reload)
    }

    /// Closes the descriptors: in a child, right after the fork. The checks go on, they are the supervisor's.
    pub(super) fn leave(self) {
        self.apps.into_iter().filter_map(|app| app.check).for_each(Check::leave);
    }

    fn watch(&mut self) {
        let folders: BTreeSet<_> =
            self.apps.iter().flat_map(|app| &app.files).filter_map(|file| file.parent()).collect();
        for folder in folders {
            let flags = WatchFlags::CLOSE_WRITE | WatchFlags::MOVED_TO | WatchFlags::ONLYDIR;
            match inotify::add_watch(&self.inotify, folder, flags) {
                Ok(watch) => drop(self.folders.entry(watch).or_default().insert(folder.to_owned())),
                Err(error) => tracing::warn!(%error, folder = %folder.display(), "cannot watch for changes"),
            }
        }
    }

    /// What tells of changes, and of the ends of looks at them.
    pub(super) fn fds(&self) -> impl Iterator<Item = (Event, BorrowedFd<'_>)> {
        let checks = self.apps.iter().enumerate();
        let checks = checks.filter_map(|(at, app)| Some((Event::Checked(at), app.check.as_ref()?.as_fd())));
        checks.chain([(Event::Files, self.inotify.as_fd())])
    }

    /// The processes that look.
    pub(super) fn pids(&self) -> impl Iterator<Item = u32> {
        self.apps.iter().filter_map(|app| Some(app.check.as_ref()?.pid()))
    }

    /// Reads which files were written.
    pub(super) fn note_changes(&mut self, now: Instant) -> io::Result<()> {
        let mut buffer = [MaybeUninit::uninit(); 1 << 12];
        let mut events = inotify::Reader::new(&self.inotify, &mut buffer);
        loop {
            let event = match events.next() {
                Ok(event) => event,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            };
            let is_all = event.events().contains(ReadFlags::QUEUE_OVERFLOW);
            let name = event.file_name().map(|name| OsStr::from_bytes(name.to_bytes()));
            let folders = self.folders.get(&event.wd()).into_iter().flatten();
            let files: Vec<_> = name.map(|name| folders.map(|folder| folder.join(name)).collect()).unwrap_or_default();
            if event.events().contains(ReadFlags::IGNORED) {
                // The folder is gone.
                self.folders.remove(&event.wd());
            }
            for app in &mut self.apps {
                if is_all || files.iter().any(|file| app.is_made_of(file)) {
                    app.has_changed = true;
                    self.due = Some(now + PAUSE);
                }
            }
        }
    }

    /// Looks at what has changed.
    fn look(&mut self) {
        self.due = None;
        for app in self.apps.iter_mut().filter(|app| app.has_changed) {
            app.has_changed = false;
            // A look that is under way is at what was, and is ended by this.
            app.check = None;
            match app.program.start_check(app.variables.clone()) {
                Ok(check) => app.check = check,
                Err(error) => tracing::warn!(%error, "cannot look at a changed file"),
            }
        }
    }

    /// Takes note of what a look has found. The pools that are to have new workers.
    fn finish(&mut self, at: usize) -> io::Result<Vec<u16>> {
        let Some(check) = self.apps[at].check.take() else { return Ok(Vec::new()) };
        let (status, files) = check.finish()?;
        crash_point!("reload.checked");
        let app = &mut self.apps[at];
        app.is_broken = !status.success();
        let handler = &app.program;
        if app.is_broken {
            app.files.extend(files);
            tracing::warn!(%handler, "a changed file cannot be imported, as the lines above say: the workers go on with what they have");
        } else {
            app.files = files.into_iter().collect();
            tracing::info!(%handler, "a file was changed: the workers are replaced, one after the other");
        }
        let pools = if app.is_broken { Vec::new() } else { app.pools.clone() };
        self.watch();
        Ok(pools)
    }
}

impl Supervisor {
    /// A look at a changed app is over.
    pub(super) fn conclude(&mut self, at: usize) -> io::Result<()> {
        let Some(reload) = &mut self.reload else { return Ok(()) };
        let pools = reload.finish(at)?;
        let Some(reload) = &mut self.reload else { return Ok(()) };
        for pool in pools {
            let (first, count) = self.topology.workers(pool);
            // Seats of workers have their numbers.
            let seats = usize::from(first)..usize::from(first + count);
            reload.queue.retain(|seat| !seats.contains(seat));
            reload.queue.extend(seats.clone());
            reload.current = reload.current.filter(|seat| !seats.contains(seat));
            if let Some(nursery) = self.nurseries.iter_mut().find(|nursery| nursery.pool() == pool) {
                nursery.renew();
                self.seats[seats].iter_mut().for_each(|seat| seat.may_not_begin = true);
            }
        }
        Ok(())
    }

    /// Goes on with what is to be reloaded.
    pub(super) fn roll(&mut self, now: Instant, stage: Stage) {
        let Some(reload) = &mut self.reload else { return };
        if stage != Stage::Serving {
            // What is there finishes the work.
            reload.apps.iter_mut().for_each(|app| app.check = None);
            (reload.due, reload.current) = (None, None);
            reload.queue.clear();
            return;
        }
        if reload.due.is_some_and(|due| due <= now) {
            reload.look();
        }
        if let Some(at) = reload.current {
            let seat = &self.seats[at];
            if seat.child.is_none() || seat.is_retiring || !seat.record.has_arrived() {
                return;
            }
            reload.current = None;
        }
        let Some(&at) = reload.queue.front() else { return };
        if self.nurseries.iter().any(|nursery| nursery.is_of(at, &self.topology) && !nursery.is_ready()) {
            // Nobody is sent away before another can come.
            return;
        }
        reload.queue.pop_front();
        reload.current = Some(at);
        let seat = &mut self.seats[at];
        if seat.child.is_some() {
            seat.is_retiring = true;
            self.segment.set_liveness(seat.slot, seat.liveness());
            crash_point!("reload.retiring");
            if let Slot::Worker(number) = seat.slot
                && let Err(error) = self.bells.worker(number).ring()
            {
                tracing::error!(%error, "cannot ring a worker");
            }
            crash_point!("reload.rung");
            self.ring_fronts();
        } else if seat.restart_at.is_some() {
            // What it died of may be mended.
            seat.restart_at = Some(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_what_an_app_is_made_of_is_its_change() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = |name: &str| folder.path().join(name);
        fs::write(file("app.py"), "").expect("a file");
        let app = App::new(Program::new("none"), Vec::new(), vec![file("app.py")]);
        let mut reload = Reload::new(vec![app]).expect("inotify");
        let mut changes = |write: &dyn Fn()| {
            write();
            reload.note_changes(Instant::now()).expect("events");
            let has_changed = std::mem::take(&mut reload.apps[0].has_changed);
            assert_eq!(reload.due.take().is_some(), has_changed);
            has_changed
        };
        let write = |name: &str| fs::write(file(name), "x = 1").expect("a file");
        assert!(!changes(&|| ()));
        assert!(!changes(&|| write("other.py")));
        assert!(!changes(&|| drop(fs::read(file("app.py")))));
        assert!(changes(&|| write("app.py")));
        assert!(changes(&|| fs::rename(file("other.py"), file("app.py")).expect("renamed")));
        reload.apps[0].is_broken = true;
        let mut changes = |name: &str| {
            write(name);
            reload.note_changes(Instant::now()).expect("events");
            std::mem::take(&mut reload.apps[0].has_changed)
        };
        assert!(changes("missing.py") && !changes("notes.txt"));
    }
}
