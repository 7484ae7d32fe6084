//! Whose a segment is: it is made, adopted, refused or thrown away here.
//!
//! # What it promises
//!
//! - **A name belongs to whoever has the lock** (`flock`) on its object. The supervisor takes it and its children inherit
//!   it, so the kernel lets it go when the last of them is dead. A lock that can be had therefore proves that nobody writes
//!   there any more: also no child that was forked and never registered, and no thread of a dying one, since a process
//!   closes its files only after its last thread has stopped. Pids are for messages, and for knowing that waiting is
//!   worth while.
//! - **A segment that was left behind is adopted or refused, never reinterpreted**: what it was made for is in it, and has to
//!   be what is wanted now.
//! - What is decided, is decided under the lock, and nothing is removed but under it. So of two servers that start
//!   under one name, one wins, and a death at any step leaves what the next one finds and knows: nothing, a segment without
//!   its magic number, which holds nothing and is made anew, or a whole one.
//!
//! # Why the object is not created by `shared_memory`
//!
//! Between its `O_EXCL` and our lock a second server could take the object for one that was left half made; and the
//! crate's `ftruncate` would then cut what that one has made of it. Here creation changes nothing (`O_CREAT` alone), and
//! sizing comes after the lock. The crate owns the name: it maps the object and unlinks it when its owner is dropped.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::atomic::Ordering::{Relaxed, Release},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FallocateFlags, FileType, FlockOperation, Mode, Stat, fallocate, flock, fstat, ftruncate, statvfs},
    io::Errno,
    process::geteuid,
    shm,
};
use shared_memory::{Shmem, ShmemConf};

use super::{
    ABI, Access, DIRECTORY, Geometry, Header, Layout, MAGIC, MAKING, PAGE, SegmentError, View,
    identity::{PoolLine, PoolShape, differs},
    inspect::{as_it_is, read_at},
    os_id,
};
use crate::{crash_point::crash_point, process};

/// How long the processes of a dead server may take to end. It was killed, and so are they: by the kernel, at once.
const PATIENCE: Duration = Duration::from_secs(10);
const LOOK_AGAIN: Duration = Duration::from_millis(2);

/// The owner's handle on a segment, for attaching.
pub struct SegmentOwner {
    // Dropped first: the name goes while it is still locked. `None` in a forked child.
    shmem: Option<Shmem>,
    name: String,
    object: OwnedFd,
    layout: Layout,
    left_by: Option<u32>,
}

impl SegmentOwner {
    /// A segment of nobody else's, whatever was left under that name, for pools that have no names.
    pub fn create(name: &str, geometry: Geometry) -> Result<Self, SegmentError> {
        Self::take(name, geometry, &[], true)
    }

    /// The segment of that name, with all of its memory reserved: a new one; or the one that a dead server left, if it
    /// was made for the same and nobody wants a `fresh` one.
    pub fn take(name: &str, geometry: Geometry, pools: &[PoolShape], fresh: bool) -> Result<Self, SegmentError> {
        Self::take_with(name, geometry, pools, Terms { fresh, least_arena: None })
    }

    /// Takes the segment of that name, as [`take`](Self::take) does, on these terms.
    pub fn take_with(name: &str, geometry: Geometry, pools: &[PoolShape], terms: Terms) -> Result<Self, SegmentError> {
        let mut taking = Taking { name, layout: Layout::of(geometry)?, pools };
        let object = taking.lock()?;
        crash_point!("segment.locked");
        match taking.look(&object)? {
            Found::Nothing => taking.make(object),
            Found::Half => {
                tracing::warn!(name, "made the segment anew: its maker had died before it was ready");
                taking.make(object)
            }
            Found::Left(header) if terms.fresh => {
                let pid = header.creator_pid.load(Relaxed);
                tracing::warn!(name, pid, "threw away the segment that a dead server left behind");
                taking.make(object)
            }
            Found::Left(header) => {
                if let Some(layout) = terms.least_arena.and_then(|least| with_arenas_of(&header, least, geometry)) {
                    taking.layout = layout;
                }
                taking.adopt(object, &header)
            }
        }
    }

    /// The pid of the dead server that left this segment; none if it was made anew. Then nobody has looked at what is in
    /// it.
    pub fn left_by(&self) -> Option<u32> {
        self.left_by
    }

    /// The object, for [`super::Segment::attach`].
    pub fn object(&self) -> &OwnedFd {
        &self.object
    }

    /// Where everything is.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The server's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Dropping this leaves the segment in place: for a forked child, first thing, and for as long as it holds what was
    /// accepted.
    pub fn disown(&mut self) {
        self.shmem.iter_mut().for_each(|shmem| _ = shmem.set_owner(false));
    }

    /// Dropping this removes the segment's name. So it is from the start, unless the segment was adopted.
    pub fn own(&mut self) {
        self.shmem.iter_mut().for_each(|shmem| _ = shmem.set_owner(true));
    }

    /// Closes what only the process that made this has a use for: in a child, right after the fork. The locked object stays
    /// open, because the name is in use for as long as the child lives.
    pub fn leave(&mut self) {
        self.disown();
        // This unmaps a range that the fork left out (`LinuxDontFork`), and nothing has been mapped there since.
        self.shmem = None;
    }
}

/// The terms on which a server takes a segment that a dead server left.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// Whether the server throws the segment away instead of adopting it.
    pub fresh: bool,
    /// The smallest arenas that the server accepts in place of its own size. `None`: it accepts only arenas of its own size.
    pub least_arena: Option<u64>,
}

/// Returns the wanted layout with the arenas of the left segment, if those are large enough.
fn with_arenas_of(left: &Header, least: u64, wanted: Geometry) -> Option<Layout> {
    let Geometry { request_bytes, result_bytes, .. } = left.geometry();
    let is_enough = request_bytes == result_bytes && request_bytes >= least;
    Layout::of(Geometry { request_bytes, result_bytes, ..wanted }).ok().filter(|_| is_enough)
}

/// What there is under a name.
enum Found {
    Nothing,
    /// Being made when its maker died. It was never anybody's.
    Half,
    /// A whole one, with a copy of its header.
    Left(Box<Header>),
}

/// What a server wants.
struct Taking<'a> {
    name: &'a str,
    layout: Layout,
    pools: &'a [PoolShape],
}

impl Taking<'_> {
    fn io(&self, what: &'static str) -> impl Fn(io::Error) -> SegmentError {
        io_error(self.name, what)
    }

    fn foreign(&self, why: &'static str) -> SegmentError {
        SegmentError::Foreign { name: self.name.to_owned(), why }
    }

    /// The object of the name, which may be empty, locked.
    fn lock(&self) -> Result<OwnedFd, SegmentError> {
        let began = Instant::now();
        let mut told = false;
        loop {
            let flags = shm::OFlags::CREATE | shm::OFlags::RDWR | as_it_is();
            let object = match shm::open(os_id(self.name), flags, Mode::RUSR | Mode::WUSR) {
                Ok(object) => object,
                Err(Errno::LOOP) => return Err(self.foreign("it is a symbolic link")),
                Err(Errno::ACCESS) => return Err(self.foreign("it is another user's")),
                Err(error) => return Err(self.io("open")(error.into())),
            };
            crash_point!("segment.made");
            match flock(&object, FlockOperation::NonBlockingLockExclusive) {
                // The name may be another object's by now, or nobody's: then this one is no use to anybody.
                Ok(()) if stat(self.name, &object)?.st_nlink == 0 => continue,
                Ok(()) => return Ok(object),
                Err(Errno::INTR) => continue,
                Err(Errno::WOULDBLOCK) => {}
                Err(error) => return Err(self.io("lock")(error.into())),
            }
            // Held by a live server; by one that starts and has not said yet who it is; by the last of a dead one, which
            // are being killed; or, for a moment, by somebody who only looks.
            let (name, header) = (self.name.to_owned(), Header::read(&object).map_err(self.io("read"))?);
            let pid = header.as_ref().and_then(Header::creator);
            if header.is_some_and(|header| header.is_creator_alive()) {
                return Err(SegmentError::InUse { name, pid });
            }
            if began.elapsed() > PATIENCE {
                return Err(SegmentError::Dying { name, pid });
            }
            if !told && began.elapsed() > PATIENCE / 20 {
                told = true;
                tracing::info!(name, pid, "waiting for the processes of a dead server to end");
            }
            thread::sleep(LOOK_AGAIN);
        }
    }

    /// What it is that was locked.
    fn look(&self, object: &OwnedFd) -> Result<Found, SegmentError> {
        let Stat { st_size, st_uid, st_mode, .. } = stat(self.name, object)?;
        if FileType::from_raw_mode(st_mode) != FileType::RegularFile {
            return Err(self.foreign("it is no regular file"));
        }
        let others = Mode::WGRP | Mode::WOTH;
        if st_uid != geteuid().as_raw() || Mode::from_raw_mode(st_mode).intersects(others) {
            return Err(self.foreign("others may write to it"));
        }
        if st_size == 0 {
            return Ok(Found::Nothing);
        }
        let Some(header) = Header::read(object).map_err(self.io("read"))? else {
            return Err(self.foreign("it is too small"));
        };
        let is_sized = (st_size as u64).is_multiple_of(PAGE);
        match header.magic.load(Relaxed) {
            MAGIC => Ok(Found::Left(Box::new(header))),
            MAKING if is_sized => Ok(Found::Half),
            // Not yet anybody's: a worker that writes zeros over a header leaves the rest of it, or the pools behind it.
            0 if is_sized && self.begins_with_zeros(object, st_size as u64).map_err(self.io("read"))? => {
                Ok(Found::Half)
            }
            0 => Err(self.foreign("its magic number is gone; if it was a server's of yours, a worker wrote over it")),
            _ => Err(self.foreign("it has another magic number")),
        }
    }

    /// Whether there is nothing in the header and in the page behind it, where the pools are.
    fn begins_with_zeros(&self, object: &OwnedFd, size: u64) -> io::Result<bool> {
        let pages = [0, PAGE].into_iter().filter(|at| *at < size);
        for at in pages {
            let page = read_at::<[[u64; 8]; PAGE as usize / 64]>(object, at)?;
            if page.is_none_or(|page| page.iter().flatten().any(|word| *word != 0)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A new segment in the locked object, whatever is in it.
    fn make(&self, object: OwnedFd) -> Result<SegmentOwner, SegmentError> {
        let made = self.fill(&object).and_then(|()| self.owner(object, None));
        if made.is_err() {
            // Still locked. Should it fail, the next server finds one that is half made.
            let _ = shm::unlink(os_id(self.name));
        }
        made.map(|mut owner| {
            owner.own();
            owner
        })
    }

    fn fill(&self, object: &OwnedFd) -> Result<(), SegmentError> {
        // To nothing first: so all of it is zeros, the magic number at once.
        for size in [0, self.layout.total] {
            ftruncate(object, size).map_err(|e| self.io("size")(e.into()))?;
            crash_point!("segment.sized");
        }
        let free = shm_space().map_or(u64::MAX, |(free, _)| free);
        self.reserve(object)?;
        self.tell_of_size(free);
        self.format(object).map_err(self.io("format"))
    }

    fn reserve(&self, object: &OwnedFd) -> Result<(), SegmentError> {
        loop {
            match fallocate(object, FallocateFlags::empty(), 0, self.layout.total) {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(Errno::NOSPC) => {
                    let (free, size) = shm_space().map_err(self.io("reserve"))?;
                    let (free, size) = (free >> 20, size >> 20);
                    let (need, letters) = (self.layout.total.div_ceil(1 << 20), self.layout.letter_slots() > 0);
                    return Err(SegmentError::NoSpace { need, free, size, letters });
                }
                Err(error) => return Err(self.io("reserve the memory of")(error.into())),
            }
        }
        crash_point!("segment.reserved");
        Ok(())
    }

    /// Logs a warning if the reservation took more than half of the bytes that were free before it.
    fn tell_of_size(&self, free: u64) {
        let reserved = self.layout.total;
        if leaves_little(reserved, free) {
            let (partitions, arena) = (1 + self.layout.geometry.workers, self.layout.geometry.result_bytes);
            tracing::warn!(
                name = self.name,
                reserved_mib = reserved.div_ceil(1 << 20),
                free_mib = free >> 20,
                partitions,
                arena_mib = arena >> 20,
                "reserved more than half of the shared memory that was free: one arena for requests and one for each \
                 worker's results; choose a smaller --arena or fewer --workers if others need it"
            );
        }
    }

    /// Fills the header in, `magic` last. All else starts as zeros, which `fallocate` gave.
    fn format(&self, object: &OwnedFd) -> io::Result<()> {
        let control = View::map(object, 0, self.layout.control, Access::Write)?;
        let header: &Header = control.at(0);
        header.magic.store(MAKING, Relaxed);
        let Geometry { items, fronts, workers, pools, request_bytes, result_bytes, letter_bytes } =
            self.layout.geometry;
        header.abi.store(ABI, Relaxed);
        header.set_creator()?;
        for (word, value) in header.boot_id.iter().zip(process::boot_id()?) {
            word.store(value, Relaxed);
        }
        header.layout_hash.store(self.layout.hash(), Relaxed);
        for (word, value) in header.counts.iter().zip([items, fronts, workers, pools]) {
            word.store(value, Relaxed);
        }
        for (word, value) in header.bytes.iter().zip([request_bytes, result_bytes, letter_bytes]) {
            word.store(value, Relaxed);
        }
        for (at, (name, workers)) in (0..pools.into()).zip(self.pools) {
            let line: &PoolLine = control.at(self.layout.pool(at));
            line.set(name, *workers);
        }
        header.close_gate()?;
        crash_point!("segment.filled");
        // S0: pairs with S0' in `attach`.
        header.magic.store(MAGIC, Release);
        crash_point!("segment.formatted");
        Ok(())
    }

    /// The left segment, if it is what is wanted.
    fn adopt(&self, object: OwnedFd, header: &Header) -> Result<SegmentOwner, SegmentError> {
        let differs = differs(&object, header, &self.layout, self.pools).map_err(self.io("read"))?;
        if let Some(differs) = differs {
            return Err(SegmentError::Differs { name: self.name.to_owned(), pid: header.creator(), differs });
        }
        // It has been, unless somebody copied the file, and then a hole would be a SIGBUS.
        self.reserve(&object)?;
        let owner = self.owner(object, Some(header.creator_pid.load(Relaxed)))?;
        let view = View::map(&owner.object, 0, PAGE, Access::Write).map_err(self.io("map"))?;
        view.at::<Header>(0).set_creator().map_err(self.io("own"))?;
        crash_point!("adopt.owned");
        Ok(owner)
    }

    /// The handle on an object that is locked and whole. It leaves the name alone for now.
    fn owner(&self, object: OwnedFd, left_by: Option<u32>) -> Result<SegmentOwner, SegmentError> {
        let failed = |error: String| self.io("open")(io::Error::other(error));
        let shmem = ShmemConf::new().os_id(os_id(self.name)).open().map_err(|error| failed(format!("{error:?}")))?;
        if stat(self.name, &object)?.st_nlink == 0 {
            return Err(failed("somebody removed it just now".to_owned()));
        }
        // SAFETY: the range is exactly the mapping that `shmem` owns.
        unsafe { rustix::mm::madvise(shmem.as_ptr().cast(), shmem.len(), rustix::mm::Advice::LinuxDontFork) }
            .map_err(|e| self.io("advise")(e.into()))?;
        Ok(SegmentOwner { shmem: Some(shmem), name: self.name.to_owned(), object, layout: self.layout, left_by })
    }
}

impl Header {
    fn set_creator(&self) -> io::Result<()> {
        let pid = std::process::id();
        self.creator_start.store(process::start_time(pid)?, Relaxed);
        self.creator_pid.store(pid, Relaxed);
        Ok(())
    }
}

fn stat(name: &str, object: &impl AsFd) -> Result<Stat, SegmentError> {
    fstat(object).map_err(|error| io_error(name, "look at")(error.into()))
}

/// Returns the bytes that are free in `/dev/shm`, and how many it has.
fn shm_space() -> io::Result<(u64, u64)> {
    let fs = statvfs(DIRECTORY)?;
    Ok((fs.f_bavail * fs.f_frsize, fs.f_blocks * fs.f_frsize))
}

/// Returns the size of `/dev/shm` in bytes, free or not; 0 if there is none.
pub fn shm_size() -> u64 {
    shm_space().map_or(0, |(_, size)| size)
}

/// Returns whether a reservation leaves others less than half of what was free.
fn leaves_little(reserved: u64, free: u64) -> bool {
    reserved > free / 2
}

fn io_error(name: &str, what: &'static str) -> impl Fn(io::Error) -> SegmentError {
    move |error| SegmentError::Io { what, name: name.to_owned(), error }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use std::num::NonZeroU32;

    use rustix::fs::Mode;

    use super::{
        super::{PREFIX, Segment, inspect},
        *,
    };
    use crate::segment::Slot;

    const GEOMETRY: Geometry = Geometry {
        items: 64,
        fronts: 1,
        workers: 3,
        pools: 2,
        request_bytes: 1 << 20,
        result_bytes: 1 << 20,
        letter_bytes: 0,
    };

    fn pools() -> Vec<PoolShape> {
        vec![("hash".to_owned(), 2), ("a".repeat(64), 1)]
    }

    /// The path of a name that no other test has. Whatever is there is removed when this is dropped.
    struct Path(String, tempfile::TempPath);

    fn path(test: &str) -> Path {
        let name = format!("unit-{test}-{}", std::process::id());
        let path = tempfile::TempPath::try_from_path(format!("{DIRECTORY}/{PREFIX}{name}")).unwrap();
        Path(name, path)
    }

    fn take(name: &str) -> Result<SegmentOwner, SegmentError> {
        SegmentOwner::take(name, GEOMETRY, &pools(), false)
    }

    /// A segment whose server is dead.
    fn leave(name: &str) {
        take(name).unwrap().disown();
        assert!(!inspect(name).unwrap().alive);
    }

    fn header(name: &str) -> (View, OwnedFd) {
        let object = shm::open(os_id(name), shm::OFlags::RDWR, Mode::empty()).unwrap();
        (View::map(&object, 0, PAGE, Access::Write).unwrap(), object)
    }

    #[test]
    fn a_live_name_is_refused_and_a_left_one_adopted() {
        let Path(name, _path) = &path("left");
        let owner = take(name).unwrap();
        assert_eq!(owner.left_by(), None);
        let error = take(name).err().unwrap();
        assert!(
            matches!(error, SegmentError::InUse { pid: Some(pid), .. } if pid.get() == std::process::id()),
            "{error}"
        );
        drop(owner);
        assert!(inspect(name).is_err(), "it was its owner's");

        leave(name);
        header(name).0.at::<Header>(0).creator_pid.store(7, Relaxed);
        // Once more after an adoption that was given up.
        for left_by in [7, std::process::id()] {
            let owner = take(name).unwrap();
            assert_eq!(owner.left_by(), Some(left_by));
            assert_eq!(inspect(name).unwrap().creator.map(NonZeroU32::get), Some(std::process::id()));
        }
        let mut owner = take(name).unwrap();
        owner.own();
        drop(owner);
        assert!(inspect(name).is_err());
    }

    #[test]
    fn what_was_made_for_something_else_is_refused_with_what_differs() {
        let Path(name, _path) = &path("differs");
        leave(name);
        let long = "a".repeat(64);
        let other = |change: fn(&mut Geometry), pools: &[PoolShape]| {
            let mut geometry = GEOMETRY;
            change(&mut geometry);
            match SegmentOwner::take(name, geometry, pools, false).err() {
                Some(error @ SegmentError::Differs { .. }) => error.to_string(),
                other => panic!("{other:?}"),
            }
        };
        for (error, says) in [
            (other(|g| g.items = 65, &pools()), "served with --capacity 64, not 65. Start".to_owned()),
            (
                other(|g| (g.request_bytes, g.result_bytes) = (3 << 19, 3 << 19), &pools()),
                "--arena 1MiB, not 1536KiB. Start".to_owned(),
            ),
            (other(|g| g.letter_bytes = 1 << 16, &pools()), "--dead-letters 0, not 64KiB. Start".to_owned()),
            (other(|g| g.fronts = 2, &pools()), "fronts 1, not 2. Start".to_owned()),
            (
                other(|_| (), &[pools()[1].clone(), pools()[0].clone()]),
                format!("pools and workers hash:2 {long}:1, not {long}:1 hash:2. Start"),
            ),
            (
                other(|g| g.workers = 4, &[("hash".to_owned(), 3), pools()[1].clone()]),
                format!("pools and workers hash:2 {long}:1, not hash:3 {long}:1. Start"),
            ),
            (
                other(|g| (g.items, g.workers, g.pools) = (1, 1, 1), &[("x".to_owned(), 1)]),
                format!("--capacity 64, not 1; with the pools and workers hash:2 {long}:1, not x:1. Start"),
            ),
        ] {
            assert!(error.contains(&says) && error.contains("--fresh"), "{error}");
        }
        assert!(take(name).is_ok(), "and is as it was");
    }

    #[test]
    fn arenas_of_a_left_segment_are_adopted_if_any_size_will_do() {
        let Path(name, _path) = &path("arenas");
        leave(name);
        let wanted = Geometry { request_bytes: 3 << 20, result_bytes: 3 << 20, ..GEOMETRY };
        let take = |geometry, least_arena| {
            SegmentOwner::take_with(name, geometry, &pools(), Terms { fresh: false, least_arena })
        };
        for least in [0, 1 << 20] {
            let owner = take(wanted, Some(least)).unwrap();
            assert_eq!((owner.layout().geometry(), owner.left_by().is_some()), (&GEOMETRY, true), "{least}");
        }
        for (geometry, least, says) in [
            (wanted, None, "--arena 1MiB, not 3MiB. Start"),
            (wanted, Some((1 << 20) + 1), "--arena 1MiB, not 3MiB. Start"),
            // Other differences are reported, and the arenas are not.
            (Geometry { items: 65, ..wanted }, Some(0), "served with --capacity 64, not 65. Start"),
        ] {
            let error = take(geometry, least).err().unwrap().to_string();
            assert!(error.contains(says), "{error}");
        }
        let owner = SegmentOwner::take_with(name, wanted, &pools(), Terms { fresh: true, least_arena: Some(0) });
        assert_eq!(owner.unwrap().layout().geometry(), &wanted, "what is thrown away says nothing");
    }

    #[test]
    fn a_reservation_is_unusual_if_it_takes_more_than_half_of_what_was_free() {
        for (reserved, free, unusual) in
            [(0, 0, false), (50, 100, false), (51, 100, true), (100, 100, true), (1, u64::MAX, false)]
        {
            assert_eq!(leaves_little(reserved, free), unusual, "{reserved} of {free}");
        }
    }

    #[test]
    fn another_format_boot_or_layout_is_refused_and_thrown_away_on_demand() {
        let Path(name, path) = &path("format");
        leave(name);
        let (view, _object) = header(name);
        let header: &Header = view.at(0);
        let refusal = || take(name).err().map(|error| error.to_string()).unwrap_or_default();
        for (break_it, says) in [
            ((|header| header.abi.store(1, Relaxed)) as fn(&Header), "another version of forkring (segment format 1;"),
            (|header| header.boot_id[1].store(7, Relaxed), "before this machine was booted"),
            (|header| header.layout_hash.store(7, Relaxed), "another build of forkring"),
            (|header| header.counts[2].store(u32::MAX, Relaxed), "another build of forkring"),
        ] {
            let before = fs::read(path).unwrap();
            break_it(header);
            let error = refusal();
            assert!(error.contains(says) && error.contains("--fresh"), "{error}");
            fs::write(path, before).unwrap();
        }
        header.abi.store(1, Relaxed);
        let owner = SegmentOwner::take(name, GEOMETRY, &pools(), true).unwrap();
        assert_eq!(owner.left_by(), None);
        assert!(Segment::attach(owner.object(), name, Slot::Supervisor).is_ok());
    }

    #[test]
    fn one_that_was_half_made_is_made_anew() {
        let Path(name, path) = &path("half");
        for left in [&[][..], &[0; PAGE as usize], &[0; 7 * PAGE as usize]] {
            fs::write(path, left).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
            let owner = take(name).unwrap();
            assert_eq!(owner.left_by(), None);
            assert!(Segment::attach(owner.object(), name, Slot::Supervisor).is_ok());
        }
        leave(name);
        // With a header that has all but its magic number.
        header(name).0.at::<Header>(0).magic.store(MAKING, Relaxed);
        assert_eq!(take(name).unwrap().left_by(), None);
    }

    #[test]
    fn one_whose_header_was_written_over_is_left_alone() {
        let Path(name, path) = &path("zeros");
        for zeros in [8, PAGE as usize] {
            leave(name);
            let mut whole = fs::read(path).unwrap();
            whole[..zeros].fill(0);
            fs::write(path, &whole).unwrap();
            for fresh in [false, true] {
                let error = SegmentOwner::take(name, GEOMETRY, &pools(), fresh).err().unwrap();
                assert!(error.to_string().contains("its magic number is gone"), "{error}");
            }
            assert!(fs::read(path).unwrap() == whole);
            fs::remove_file(path).unwrap();
        }
    }

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let Path(name, path) = &path("foreign");
        for (content, mode) in
            [(&b"x"[..], 0o600), (&[0; 100], 0o600), (&[7; 8192], 0o600), (&[0; 4097], 0o600), (&[0; 4096], 0o660)]
        {
            fs::write(path, content).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
            for fresh in [false, true] {
                let error = SegmentOwner::take(name, GEOMETRY, &pools(), fresh).err().unwrap();
                assert!(matches!(error, SegmentError::Foreign { .. }), "{error}");
            }
            assert_eq!(fs::read(path).unwrap(), content);
        }
        fs::remove_file(path).unwrap();

        // A pipe is not waited for, and a symbolic link is not followed.
        let elsewhere = tempfile::NamedTempFile::new().unwrap();
        let fifo = || rustix::fs::mknodat(rustix::fs::CWD, &**path, FileType::Fifo, Mode::from_raw_mode(0o600), 0);
        let link = || rustix::fs::symlink(elsewhere.path(), &**path);
        for (make, says) in [(&fifo as &dyn Fn() -> _, "it is no regular file"), (&link, "it is a symbolic link")] {
            make().unwrap();
            let error = SegmentOwner::take(name, GEOMETRY, &pools(), true).err().unwrap();
            assert!(error.to_string().contains(says), "{error}");
            let error = inspect(name).unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
            fs::remove_file(path).unwrap();
        }
        assert_eq!(fs::metadata(elsewhere.path()).unwrap().len(), 0);
    }

    #[test]
    fn more_than_there_is_says_how_much() {
        let Path(name, _path) = &path("huge");
        let fs = statvfs(DIRECTORY).unwrap();
        let huge = Geometry { request_bytes: fs.f_blocks * fs.f_frsize + (1 << 30), ..GEOMETRY };
        for (letter_bytes, named) in [(0, false), (1 << 16, true)] {
            let error = SegmentOwner::create(name, Geometry { letter_bytes, ..huge }).err().unwrap();
            assert!(matches!(error, SegmentError::NoSpace { letters, .. } if letters == named), "{error}");
            assert_eq!(error.to_string().contains("--dead-letters"), named, "{error}");
        }
        assert!(inspect(name).is_err(), "nothing is left behind");
    }
}
