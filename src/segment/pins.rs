//! Pins: requests that are looked at after their item's end.
//!
//! Rust's borrows end with the item. A handler in another language may keep a view of its payload, and no one can take a
//! pointer back; but the front gives the memory to another item as soon as this one is completed.
//!
//! # What it promises
//!
//! From [`pin`](Segment::pin) until the [`Pin`] is dropped, the bytes stay what they are, at the address where they are,
//! and are nobody else's. It does not delay the item.
//!
//! # Why that holds
//!
//! The pages under the bytes are replaced in this process by private copies, in one step that other threads cannot see
//! half done (`mremap`). What is read later from these pages must not be the copies: [`Segment::read_request`]
//! looks at a second mapping then, in which nothing is ever replaced. What was read from it cannot be pinned, and whoever
//! may have to pin copies it instead.

use std::{
    fmt, io,
    ops::Range,
    ptr,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use rustix::mm::{
    MapFlags, MprotectFlags, MremapFlags, ProtFlags, mmap_anonymous, mprotect, mremap, mremap_fixed, munmap,
};

use super::{PAGE, Segment};

/// Those of one view.
#[derive(Debug, Default)]
pub(super) struct Pins {
    /// Whether there are any. Relaxed: it is set before an item is completed, by whoever may ask for the next.
    any: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Where the second mapping is, once there is one.
    second: Option<usize>,
    /// The pages that are private now, as offsets in the view; neighbours may share one.
    pages: Vec<Range<usize>>,
}

impl Pins {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics halfway.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where to read what is at this offset of the view that begins at `view`.
    #[inline]
    pub(super) fn address(&self, view: *mut u8, offset: usize, len: usize) -> *mut u8 {
        if self.any.load(Relaxed) { self.look(view, offset, len) } else { view.wrapping_add(offset) }
    }

    #[cold]
    fn look(&self, view: *mut u8, offset: usize, len: usize) -> *mut u8 {
        let state = self.state();
        let wanted = offset..offset + len;
        match state.second {
            Some(second) if state.pages.iter().any(|pages| pages.start < wanted.end && wanted.start < pages.end) => {
                ptr::with_exposed_provenance_mut::<u8>(second).wrapping_add(offset)
            }
            _ => view.wrapping_add(offset),
        }
    }
}

/// Bytes of a request that stay.
pub struct Pin<'s> {
    segment: &'s Segment,
    pages: Range<usize>,
}

impl fmt::Debug for Pin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pin").field("pages", &self.pages).finish()
    }
}

impl Segment {
    /// Whether bytes that an item's payload consists of are in the segment, so that they must be pinned before
    /// their item is completed if they are looked at after that. Others are a copy, or must be copied.
    pub fn can_pin(&self, bytes: &[u8]) -> bool {
        self.offset_of(bytes).is_some()
    }

    fn offset_of(&self, bytes: &[u8]) -> Option<usize> {
        let view = self.requests.as_ref()?;
        let offset = bytes.as_ptr().addr().checked_sub(view.map.as_ptr().addr())?;
        (!bytes.is_empty() && offset.checked_add(bytes.len())? <= view.map.len()).then_some(offset)
    }

    /// Keeps the bytes of a claimed item's payload as they are, whatever becomes of the item.
    pub fn pin(&self, bytes: &[u8]) -> io::Result<Pin<'_>> {
        let (Some(offset), Some(view)) = (self.offset_of(bytes), &self.requests) else {
            return Err(io::Error::other("only a payload in the segment can be pinned"));
        };
        let page = PAGE as usize;
        let pages = offset / page * page..(offset + bytes.len()).next_multiple_of(page);
        let (base, len) = (view.map.as_mut_ptr(), pages.len());
        let mut state = self.pins.state();
        if state.second.is_none() {
            // SAFETY: an old size of 0 leaves the shared mapping at `base` alone and maps the same pages elsewhere.
            let second = unsafe { mremap(base.cast(), 0, view.map.len(), MremapFlags::MAYMOVE) }?;
            state.second = Some(second.expose_provenance());
        }
        // SAFETY: the new mapping overlaps nothing. The pages are copied from the view, in which they are readable: partitions
        // begin and end with pages. They are atomic to no one: bytes of others on the first and last page may be written
        // while they are copied, and are never read in the copy, because `address` leads around these pages. Then the
        // copy takes the place of the pages, whose bytes that anybody may look at are the same before and after; the view
        // keeps its extent.
        unsafe {
            let copy = mmap_anonymous(ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)?;
            ptr::copy_nonoverlapping(base.add(pages.start), copy.cast(), len);
            let moved = mprotect(copy, len, MprotectFlags::READ)
                .and_then(|()| mremap_fixed(copy, len, len, MremapFlags::MAYMOVE, base.add(pages.start).cast()));
            if let Err(error) = moved {
                let _ = munmap(copy, len);
                return Err(error.into());
            }
        }
        state.pages.push(pages.clone());
        self.pins.any.store(true, Relaxed);
        Ok(Pin { segment: self, pages })
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let (pins, Some(view)) = (&self.segment.pins, &self.segment.requests) else { return };
        let mut state = pins.state();
        if let Some(at) = state.pages.iter().position(|pages| *pages == self.pages) {
            state.pages.swap_remove(at);
        }
        let Some(second) = state.second else { return };
        let second = ptr::with_exposed_provenance_mut::<u8>(second);
        let page = PAGE as usize;
        for at in self.pages.clone().step_by(page) {
            // Others may have pinned the first and the last one, too.
            if state.pages.iter().any(|pages| pages.contains(&at)) {
                continue;
            }
            // SAFETY: an old size of 0 maps the page of the second mapping once more, in place of the copy, which nobody
            // looks at any longer.
            let restored = unsafe {
                let (from, to) = (second.add(at).cast(), view.map.as_mut_ptr().add(at).cast());
                mremap_fixed(from, 0, page, MremapFlags::MAYMOVE, to)
            };
            if restored.is_err() {
                // It stays a copy, and readers are led around it.
                state.pages.push(at..at + page);
            }
        }
        pins.any.store(!state.pages.is_empty(), Relaxed);
    }
}

impl Segment {
    /// For `drop`: nobody reads any more.
    pub(super) fn unmap_second(&mut self) {
        let len = self.requests.as_ref().map_or(0, |view| view.map.len());
        if let Some(second) = self.pins.state().second.take() {
            // SAFETY: the mapping was made in `pin` with this length, and borrows of it ended with `self`.
            let _ = unsafe { munmap(ptr::with_exposed_provenance_mut(second), len) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::{Geometry, SegmentOwner, Slot};

    const BYTES: u64 = 1 << 16;

    fn segments(test: &str) -> (SegmentOwner, Segment, Segment) {
        let geometry = Geometry {
            items: 8,
            fronts: 1,
            workers: 1,
            pools: 1,
            request_bytes: BYTES,
            result_bytes: BYTES,
            letter_bytes: 0,
        };
        let name = format!("unit-pin-{test}-{}", std::process::id());
        let owner = SegmentOwner::create(&name, geometry).expect("a segment");
        let front = Segment::attach(owner.object(), &name, Slot::Front(0)).expect("a front");
        let worker = Segment::attach(owner.object(), &name, Slot::Worker(0)).expect("a worker");
        (owner, front, worker)
    }

    #[test]
    fn pinned_bytes_stay_and_others_are_read_around_them() {
        let (_owner, front, worker) = segments("stay");
        assert!(front.write_request(0, 5000, &[1; 4000]));
        let kept = worker.read_request(0, 5000, 4000).expect("a payload");
        let pin = worker.pin(kept).expect("a pin");
        // The front gives the memory, and that beside it, to others.
        assert!(front.write_request(0, 4096, &[2; 8192]));
        assert_eq!(kept, [1; 4000]);
        for (offset, len) in [(4096, 100), (5000, 4000), (9000, 100), (12000, 200), (4000, 9000)] {
            let seen = worker.read_request(0, offset, len).expect("a payload");
            assert!(!worker.can_pin(seen), "it is in the second mapping");
            assert!(
                seen.iter().zip(offset..).all(|(byte, at)| *byte == if (4096..12288).contains(&at) { 2 } else { 0 })
            );
        }
        assert!(worker.can_pin(worker.read_request(0, 12288, 100).expect("a payload")));
        let at = kept.as_ptr();
        drop(pin);
        let seen = worker.read_request(0, 5000, 4000).expect("a payload");
        assert_eq!((seen.as_ptr(), seen), (at, &[2; 4000][..]), "the view is whole again");
        assert!(front.write_request(0, 5000, &[3; 4000]));
        assert_eq!(worker.read_request(0, 5000, 4000).expect("a payload"), [3; 4000]);
    }

    #[test]
    fn neighbours_on_a_page_are_pinned_one_by_one() {
        let (_owner, front, worker) = segments("neighbours");
        assert!(front.write_request(0, 0, &[1; 6000]));
        assert!(front.write_request(0, 6000, &[2; 6000]));
        let [one, two] = [0, 6000].map(|offset| worker.read_request(0, offset, 6000).expect("a payload"));
        let pins = [worker.pin(one), worker.pin(two)].map(|pin| pin.expect("a pin"));
        assert!(front.write_request(0, 0, &[9; 12000]));
        let [first, second] = pins;
        assert_eq!((one, two), (&[1; 6000][..], &[2; 6000][..]));
        drop(first);
        assert_eq!(two, [2; 6000], "the page between them is still the other's");
        assert_eq!(worker.read_request(0, 0, 6000).expect("a payload"), [9; 6000]);
        drop(second);
        assert!(worker.can_pin(worker.read_request(0, 4096, 4096).expect("a payload")));
        assert_eq!(worker.read_request(0, 0, 12000).expect("a payload"), [9; 12000]);
    }

    #[test]
    fn only_payloads_in_the_segment_are_pinned() {
        let (_owner, front, worker) = segments("only");
        assert!(worker.pin(&[0; 10]).is_err() && !worker.can_pin(&[0; 10]));
        assert!(front.write_request(0, 0, &[1; 10]));
        let payload = worker.read_request(0, 0, BYTES).expect("all of it");
        assert!(worker.can_pin(payload));
        for _ in 0..3 {
            drop(worker.pin(payload).expect("a pin"));
        }
    }
}
