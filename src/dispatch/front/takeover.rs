//! A front's beginning: it takes over what its predecessor left, if there was one.

use super::*;

/// The golden ratio in the bits of a generation: its multiples lie as far apart as they can.
const SPREAD: u32 = 0x9e3_779b;

/// An item of a front's predecessor that was accepted for a subscription.
#[derive(Clone, Debug)]
pub struct Adopted {
    /// The item's index.
    pub index: u32,
    /// Whose update the result becomes.
    pub subscription: Vec<u8>,
    /// When it expires; 0: never.
    pub deadline: u64,
}

impl<'s> Front<'s> {
    /// Takes a front's slot over, and whatever its predecessor left: its calls are cancelled, because their callers
    /// are gone, and its submitted items are handed to the caller.
    ///
    /// # Panics
    ///
    /// If this view was not attached for that slot, or was used for it before: there is one front in a slot.
    pub fn attach(segment: &'s Segment, topology: Topology, bells: Arc<Bells>, number: u16) -> (Self, Vec<Adopted>) {
        assert!(segment.occupy(Slot::Front(number)), "the slot is not this view's, or is taken");
        let (first, count) = share(segment, number);
        let geometry = segment.geometry();
        let mut front = Front {
            segment,
            topology,
            bells,
            number,
            first,
            known: (0..count).map(|_| Known::unused()).collect(),
            free: Vec::with_capacity(count as usize),
            arena: Partition::around(geometry.request_bytes, 2 * count, Vec::new()),
            lanes: (0..lanes(segment)).map(|lane| segment.lane(lane)).collect(),
            consumers: (0..geometry.workers).map(|w| segment.consumer(w as u16, number)).collect(),
            cursor: 0,
            found: Vec::new(),
            noticed: VecDeque::new(),
            unhinted: Vec::new(),
            freed: 0,
            pushed: 0,
        };
        let mut adopted = Vec::new();
        let mut used = Vec::new();
        for index in (first..first + count).rev() {
            if !front.adopt(index, &mut adopted, &mut used) {
                front.free.push(index);
            }
        }
        if !used.is_empty() {
            front.arena = Partition::around(geometry.request_bytes, 2 * count, used);
        }
        // The oldest first, as it would have been. Each time is read once: it may change, if a worker runs wild.
        front.unhinted.sort_by_cached_key(|&index| segment.item(index).offered.load(Relaxed));
        segment.rescan(number).fetch_or(1, Release);
        crash_point!("attach.scanned");
        // What was freed just now a worker may wait for.
        for worker in 0..geometry.workers as u16 {
            wake(segment, &front.bells, Slot::Worker(worker));
        }
        crash_point!("attach.told");
        (front, adopted)
    }

    /// Looks at an item of the predecessor's; whether it is still in use.
    fn adopt(&mut self, index: u32, adopted: &mut Vec<Adopted>, used: &mut Vec<Span>) -> bool {
        let record = self.segment.item(index);
        let submitted = is_submitted(record);
        let word = loop {
            let word = Word::load(&record.word);
            match word.phase() {
                Phase::Free => {
                    if word.generation() == 0 {
                        // Never used. Records begin far from each other, so that no word of one follows in another.
                        Word::new(index.wrapping_mul(SPREAD), 0, 0, Phase::Free, 0).store(&record.word, word);
                    }
                    return false;
                }
                // The predecessor may have died before it pushed the hint; a second one does no harm.
                Phase::Ready if submitted => self.unhinted.push(index),
                Phase::Ready => {
                    if word.with(Phase::Free, 0).exchange(&record.word, word).is_err() {
                        continue;
                    }
                    crash_point!("attach.cancelled");
                    return false;
                }
                Phase::Claimed if !submitted => record.cancel(word.generation()),
                Phase::Done if !submitted => {
                    word.with(Phase::Free, 0).store(&record.word, word);
                    crash_point!("attach.freed");
                    return false;
                }
                Phase::Claimed | Phase::Done => {}
            }
            break word;
        };
        // Nobody would ever complete it: let the first look at it find it damaged.
        let is_broken = usize::from(word.lane()) >= self.lanes.len() || !word.may_end(self.segment.geometry().workers);
        let known = &mut self.known[(index - self.first) as usize];
        known.word = if is_broken { word.discarded() } else { word };
        known.id = record.id.load(Relaxed);
        known.payload_len = record.payload_len.load(Relaxed);
        known.deadline = record.deadline.load(Relaxed);
        let deadline = known.deadline;
        known.state = if submitted { State::Waiting } else { State::Abandoned };
        let (payload, extra) = request_spans(record);
        // A completed item's payload has been given back; its memory may be another's by now.
        let payload = payload.filter(|_| Word::load(&record.word).phase() != Phase::Done);
        used.extend(payload.into_iter().chain(extra));
        known.request = payload.map(Memory::Inherited);
        known.extra = extra.map(Memory::Inherited);
        if submitted {
            let bytes = extra_bytes(self.segment, self.number, record).unwrap_or_default();
            let len = subscription_len(record);
            let subscription = bytes.get(..len).unwrap_or_default().to_vec();
            adopted.push(Adopted { index, subscription, deadline });
        }
        true
    }
}
