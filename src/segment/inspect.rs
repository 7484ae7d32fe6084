//! Looking at a segment from outside: by reading it, not by mapping it, so that an object that is cut meanwhile is an
//! error and never a SIGBUS.

use std::{io, mem::size_of, num::NonZeroU32, os::fd::AsFd, sync::atomic::Ordering::Relaxed};

use rustix::{
    fs::{FileType, FlockOperation, Mode, OFlags, flock, fstat},
    io::Errno,
    shm,
};
use zerocopy::FromBytes;

use super::{Geometry, Header, MAGIC, SegmentError, os_id};
use crate::process;

/// Returns the flags that keep an open from following a symbolic link and from waiting for a pipe's writer.
pub(super) fn as_it_is() -> shm::OFlags {
    shm::OFlags::from_bits_retain((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits())
}

/// A copy of what is in an object, or none if it ends before.
pub(super) fn read_at<T: FromBytes>(object: &impl AsFd, offset: u64) -> io::Result<Option<T>> {
    let mut bytes = vec![0; size_of::<T>()];
    let mut filled = 0;
    while filled < bytes.len() {
        match rustix::io::pread(object, &mut bytes[filled..], offset + filled as u64) {
            Ok(0) => return Ok(None),
            Ok(n) => filled += n,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(T::read_from_bytes(&bytes).ok())
}

impl Header {
    /// A private copy.
    pub(super) fn read(object: &impl AsFd) -> io::Result<Option<Header>> {
        read_at(object, 0)
    }

    pub(super) fn creator(&self) -> Option<NonZeroU32> {
        NonZeroU32::new(self.creator_pid.load(Relaxed))
    }

    /// Whether the process that made or adopted the segment lives. That it does not proves nothing: its children may.
    pub(super) fn is_creator_alive(&self) -> bool {
        self.creator().is_some_and(|pid| process::lives(pid.get(), self.creator_start.load(Relaxed)))
    }

    pub(super) fn geometry(&self) -> Geometry {
        let [items, fronts, workers, pools] = self.counts.each_ref().map(|count| count.load(Relaxed));
        let [request_bytes, result_bytes, letter_bytes] = self.bytes.each_ref().map(|bytes| bytes.load(Relaxed));
        Geometry { items, fronts, workers, pools, request_bytes, result_bytes, letter_bytes }
    }
}

/// What can be told of a segment from outside.
#[derive(Clone, Debug)]
pub struct SegmentInfo {
    /// Whether its server, or any child of it, lives.
    pub alive: bool,
    /// The supervisor's pid, once the header is written.
    pub creator: Option<NonZeroU32>,
    /// Bytes of the object.
    pub size: u64,
    /// Its ABI version, once the header is written.
    pub abi: Option<NonZeroU32>,
}

/// Looks at a segment by name, and changes nothing.
pub fn inspect(name: &str) -> Result<SegmentInfo, SegmentError> {
    let io = |what| move |error: io::Error| SegmentError::Io { what, name: name.to_owned(), error };
    let foreign = |why| SegmentError::Foreign { name: name.to_owned(), why };
    let object = match shm::open(os_id(name), shm::OFlags::RDONLY | as_it_is(), Mode::empty()) {
        Ok(object) => object,
        Err(Errno::LOOP) => return Err(foreign("it is a symbolic link")),
        Err(error) => return Err(io("open")(error.into())),
    };
    let stat = fstat(&object).map_err(|e| io("look at")(e.into()))?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(foreign("it is no regular file"));
    }
    let alive = match flock(&object, FlockOperation::NonBlockingLockShared) {
        Ok(()) => false,
        Err(Errno::WOULDBLOCK) => true,
        Err(error) => return Err(io("lock")(error.into())),
    };
    let mut info = SegmentInfo { alive, creator: None, size: stat.st_size as u64, abi: None };
    if let Some(header) = Header::read(&object).map_err(io("read"))? {
        match header.magic.load(Relaxed) {
            MAGIC => {
                info.creator = header.creator();
                info.abi = NonZeroU32::new(header.abi.load(Relaxed));
            }
            // Being made, or its maker died before it was.
            0 => {}
            _ => return Err(foreign("it has another magic number")),
        }
    }
    Ok(info)
}
