//! The supervisor's side: what a worker that scribbled over the segment may have left is put right.
//!
//! # What it promises
//!
//! Lanes are lanes again: each that does not fit together any more is emptied, and the fronts are told to push a hint for each
//! of their items that is READY. Made after every death of a worker, for whoever scribbles mostly dies of it. A worker that
//! scribbles and lives on is not found out.
//!
//! # What puts the rest right
//!
//! - Of an item, its front knows what it was offered as; a word that cannot have come of that is damage, and the item fails
//!   (`ITEM_DAMAGED`). See [`super::Front`].
//! - Return rings show their damage to their consumer ([`crate::ring::Consumer`]).
//! - Stage and registry are the supervisor's own, and it writes them again.
//! - The bits of sleepers: everybody is woken after a death.

use std::sync::atomic::Ordering::*;

use super::lanes;
use crate::segment::Segment;

/// Of a front's `rescan`: look at every item.
pub(super) const LOOK: u64 = 1;
/// Of a front's `rescan`: no READY item may have a hint any more.
pub(super) const HINT: u64 = 2;

/// Makes lanes anew that were scribbled over; how many. Ring the fronts after it.
pub fn mend(segment: &Segment) -> u32 {
    for pool in 0..segment.geometry().pools as u16 {
        // Whoever does spin has a companion more for a moment.
        segment.spinning(pool).iter().for_each(|word| word.store(0, Relaxed));
    }
    let mut mended = 0;
    for lane in (0..lanes(segment)).map(|lane| segment.lane(lane)).filter(|lane| !lane.is_sound()) {
        lane.reset();
        mended += 1;
    }
    if mended > 0 {
        for front in 0..segment.geometry().fronts {
            // I2: pairs with I2' in the front's scan, which pushes its hints behind the reset.
            segment.rescan(front as u16).fetch_or(LOOK | HINT, Release);
        }
    }
    mended
}
