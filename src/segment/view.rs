//! A view: one mapping of a part of the object, in which atomics are looked at.
//!
//! # What it promises
//!
//! A reference that it gives is inside the mapping, aligned, and to a type that is valid whatever other processes write
//! there; and a forked child has no mapping.
//!
//! # Why that holds
//!
//! Offset and length are checked against the mapping each time. [`Shared`] is only for types that consist of atomics:
//! all that have it are listed here.

use std::{
    fs::File,
    io,
    mem::{align_of, size_of},
    os::fd::AsFd,
    slice,
    sync::atomic::AtomicU64,
};

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::{
    Door, Header, ItemRecord,
    identity::PoolLine,
    letters::{Counts, Entry},
    registry::Registration,
};

/// Types that may be looked at in shared memory: every bit pattern is a value, and every field is an atomic.
///
/// # Safety
///
/// The type must be `repr(C)` of atomics only.
pub(super) unsafe trait Shared {}
// SAFETY: all of these are, or are made of, atomics.
unsafe impl Shared for Header {}
// SAFETY: as above.
unsafe impl Shared for PoolLine {}
// SAFETY: as above.
unsafe impl Shared for Registration {}
// SAFETY: as above.
unsafe impl Shared for Door {}
// SAFETY: as above.
unsafe impl Shared for ItemRecord {}
// SAFETY: as above.
unsafe impl Shared for Counts {}
// SAFETY: as above.
unsafe impl Shared for Entry {}
// SAFETY: as above.
unsafe impl Shared for AtomicU64 {}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    Read,
    Write,
}

/// A mapping of a page-aligned part of the object.
#[derive(Debug)]
pub(super) struct View {
    pub(super) map: MmapRaw,
}

impl View {
    pub(super) fn map(object: &impl AsFd, offset: u64, len: u64, access: Access) -> io::Result<Self> {
        let file = File::from(object.as_fd().try_clone_to_owned()?);
        let mut options = MmapOptions::new();
        options.offset(offset).len(usize::try_from(len).map_err(io::Error::other)?);
        let map = match access {
            Access::Read => options.map_raw_read_only(&file)?,
            Access::Write => options.map_raw(&file)?,
        };
        map.advise(Advice::DontFork)?;
        Ok(View { map })
    }

    pub(super) fn slice<T: Shared>(&self, offset: u64, len: usize) -> &[T] {
        let offset = offset as usize;
        assert!(offset.is_multiple_of(align_of::<T>()), "misaligned");
        let end = size_of::<T>().checked_mul(len).and_then(|bytes| bytes.checked_add(offset));
        assert!(end.is_some_and(|end| end <= self.map.len()), "outside of the view");
        // SAFETY: in bounds and aligned (the mapping is page-aligned), as just checked; the memory lives as long as
        // `self`; `Shared` types are valid for any bits and may be changed by others while we look.
        unsafe { slice::from_raw_parts(self.map.as_ptr().add(offset).cast(), len) }
    }

    pub(super) fn at<T: Shared>(&self, offset: u64) -> &T {
        &self.slice(offset, 1)[0]
    }
}
