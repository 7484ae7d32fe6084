//! Conservation, audited from the bytes of a segment by code that is not the server's: it decodes the format as
//! `docs/design.md` documents it and shares no definition with what it audits.
//!
//! It reads a copy. So what it says holds for a segment at rest, and whoever asks while something is under way asks
//! again.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use super::{Server, processes};

const MAGIC: &[u8] = b"forkring";
const BLOCK: u64 = 128;
const PAGE: u64 = 4096;
const PRIORITIES: u64 = 4;
const RECORD: u64 = 256;
const INLINE: u64 = 64;
/// Partial results of an item that may wait.
const WINDOW: u64 = 4;
/// The owners of items that the supervisor completed, and of those that a front ended because they had expired.
const SUPERVISOR: u64 = 0xfff;
const FRONT: u64 = 0xffe;

/// Phases of an item.
pub const FREE: u64 = 0;
pub const READY: u64 = 1;
pub const CLAIMED: u64 = 2;
pub const DONE: u64 = 3;

/// An item's word, taken apart.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Word {
    pub generation: u64,
    pub lane: u64,
    pub owner: u64,
    pub phase: u64,
    pub attempts: u64,
}

impl fmt::Debug for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let phase = ["FREE", "READY", "CLAIMED", "DONE"].get(self.phase as usize).unwrap_or(&"?");
        let Word { generation, lane, owner, attempts, .. } = self;
        write!(f, "{phase}, generation {generation}, lane {lane}, owner {owner}, attempts {attempts}")
    }
}

/// A copy of a segment.
pub struct Copy {
    bytes: Vec<u8>,
    items: u64,
    fronts: u64,
    workers: u64,
    pools: u64,
    request_bytes: u64,
    result_bytes: u64,
    lines: u64,
    registry: u64,
    doors: u64,
    idle: u64,
    lanes: u64,
    lane_cells: u64,
    returns: u64,
    return_entries: u64,
    table: u64,
    results: u64,
}

impl Copy {
    /// Reads a segment; what is wrong with its header, if anything is.
    pub fn read(path: &Path) -> Result<Self, String> {
        let bytes = fs::read(path).map_err(|error| format!("cannot read {path:?}: {error}"))?;
        if bytes.len() < PAGE as usize || &bytes[..8] != MAGIC {
            return Err("no header".to_owned());
        }
        let mut copy = Copy {
            bytes,
            items: 0,
            fronts: 0,
            workers: 0,
            pools: 0,
            request_bytes: 0,
            result_bytes: 0,
            lines: 0,
            registry: 0,
            doors: 0,
            idle: 0,
            lanes: 0,
            lane_cells: 0,
            returns: 0,
            return_entries: 0,
            table: 0,
            results: 0,
        };
        copy.items = copy.u32(48);
        copy.fronts = copy.u32(52);
        copy.workers = copy.u32(56);
        copy.pools = copy.u32(60);
        copy.request_bytes = copy.u64(64);
        copy.result_bytes = copy.u64(72);
        copy.lane_cells = (2 * copy.items).next_power_of_two();
        copy.return_entries = copy.items.next_power_of_two().min(4096);
        // The parts follow each other, each from a multiple of its alignment on.
        let mut end = PAGE;
        let mut place = |bytes: u64, align: u64| {
            let start = end.next_multiple_of(align);
            end = start + bytes;
            start
        };
        let participants = 1 + copy.fronts + copy.workers;
        copy.lines = place(copy.pools * BLOCK, BLOCK);
        copy.registry = place(participants * BLOCK, BLOCK);
        copy.doors = place(participants * BLOCK, BLOCK);
        copy.idle = place(copy.pools * 2 * BLOCK, BLOCK);
        copy.lanes = place(copy.pools * PRIORITIES * copy.lane_stride(), BLOCK);
        copy.returns = place(copy.workers * copy.fronts * copy.return_stride(), BLOCK);
        copy.table = place(copy.items * RECORD, RECORD);
        place(0, PAGE);
        let (letter_bytes, letters) = (copy.u64(80), copy.u64(80) / 1024);
        if letters > 0 {
            place(BLOCK + (48 * letters).next_multiple_of(BLOCK) + letter_bytes, PAGE);
        }
        place(8 * letters, PAGE);
        place(copy.fronts * copy.request_bytes, PAGE);
        copy.results = place(copy.workers * copy.result_bytes, PAGE);
        let total = place(0, PAGE);
        if total != copy.bytes.len() as u64 {
            return Err(format!("{} bytes, and by its geometry {total}", copy.bytes.len()));
        }
        Ok(copy)
    }

    fn u64(&self, at: u64) -> u64 {
        let at = at as usize;
        u64::from_le_bytes(self.bytes[at..at + 8].try_into().expect("eight bytes"))
    }

    fn u32(&self, at: u64) -> u64 {
        let at = at as usize;
        u32::from_le_bytes(self.bytes[at..at + 4].try_into().expect("four bytes")).into()
    }

    fn lane_stride(&self) -> u64 {
        2 * BLOCK + (8 * self.lane_cells).next_multiple_of(BLOCK)
    }

    fn return_stride(&self) -> u64 {
        BLOCK + (8 * self.return_entries).next_multiple_of(BLOCK)
    }

    /// Where the record of an item is; it begins with the word.
    pub fn record(&self, item: u64) -> u64 {
        self.table + item * RECORD
    }

    /// The word of an item.
    pub fn word(&self, item: u64) -> Word {
        let word = self.u64(self.record(item));
        Word {
            generation: word >> 36,
            lane: word >> 28 & 0xff,
            owner: word >> 16 & 0xfff,
            phase: word >> 8 & 0xff,
            attempts: word & 0xff,
        }
    }

    /// The client's id of an item.
    pub fn id(&self, item: u64) -> u64 {
        self.u64(self.record(item) + 8)
    }

    /// The blocks of an item's partial results that nobody has taken yet: offset and bytes.
    pub fn partials(&self, item: u64) -> Vec<(u64, u64)> {
        let word = self.word(item);
        if ![CLAIMED, DONE].contains(&word.phase) || word.owner >= self.workers {
            return Vec::new();
        }
        let slots = (0..WINDOW).map(|slot| self.u64(self.record(item) + 160 + 8 * slot));
        let its = slots.filter(|slot| (slot >> 36, slot >> 35 & 1) == (word.generation, 1));
        let block = |slot: u64| {
            let at = (slot & ((1 << 35) - 1)) * 64;
            let is_inside = at + 8 <= self.result_bytes;
            let len = if is_inside { self.u64(self.results + word.owner * self.result_bytes + at) } else { u64::MAX };
            (at, len.saturating_add(64))
        };
        its.map(block).collect()
    }

    /// Whether a worker or the front sleeps for something that is in no lane.
    pub fn sleeps(&self, participant: u64) -> bool {
        self.u64(self.doors + participant * BLOCK) & 1 == 1
    }

    /// The items that are not FREE.
    pub fn in_use(&self) -> BTreeMap<u64, Word> {
        (0..self.items).map(|item| (item, self.word(item))).filter(|(_, word)| word.phase != FREE).collect()
    }

    /// What is wrong in a segment in which nobody is in the middle of something.
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        self.check_lanes(&mut faults);
        self.check_returns(&mut faults);
        self.check_blocks(&mut faults);
        faults
    }

    /// What is wrong in one with nothing to do in it, whose hints have all been looked at since the last death.
    pub fn faults_when_idle(&self) -> Vec<String> {
        let mut faults = self.faults();
        faults.extend(self.in_use().iter().map(|(item, word)| format!("item {item}, id {}: {word:?}", self.id(*item))));
        for lane in 0..self.pools * PRIORITIES {
            let (_, held) = self.lane_extent(lane);
            if held > 0 {
                faults.push(format!("lane {lane} holds {held} hints"));
            }
        }
        faults
    }

    fn lane_ends(&self, lane: u64) -> (u64, u64) {
        let at = self.lanes + lane * self.lane_stride();
        (self.u64(at), self.u64(at + BLOCK))
    }

    /// The cell of a position: whether it is full, and by how many laps it is ahead.
    fn lane_cell(&self, lane: u64, position: u64) -> (u64, bool, u64) {
        let cells = self.lanes + lane * self.lane_stride() + 2 * BLOCK;
        let cell = self.u64(cells + 8 * (position & (self.lane_cells - 1)));
        let ahead = (cell >> 49).wrapping_sub(position / self.lane_cells) & 0x7fff;
        (cell, cell >> 48 & 1 == 1, ahead)
    }

    /// The position of a lane's first hint, if it has any, and how many there are. What the head's line has before it was
    /// emptied.
    fn lane_extent(&self, lane: u64) -> (u64, u64) {
        let (head, _) = self.lane_ends(lane);
        let line = self.lane_cells.min(8);
        let used = (head..head + line).take_while(|&position| self.lane_cell(lane, position).2 == 1).count() as u64;
        let first = head + used;
        let is_held = |position: &u64| matches!(self.lane_cell(lane, *position), (_, true, 0));
        (first, (first..first + self.lane_cells).take_while(is_held).count() as u64)
    }

    /// From the first hint to the last the cells are full at their lap, from there on they are empty at theirs; head and tail
    /// are at most a line behind; and a hint to an item that is READY is in the lane that the item's word names.
    fn check_lanes(&self, faults: &mut Vec<String>) {
        let mut hinted = vec![false; self.items as usize];
        for lane in 0..self.pools * PRIORITIES {
            let (first, held) = self.lane_extent(lane);
            let (head, tail) = self.lane_ends(lane);
            let end = first + held;
            if end.wrapping_sub(tail) > self.lane_cells.min(8) {
                faults.push(format!("lane {lane} ends at {end}, and has its head at {head} and its tail at {tail}"));
            }
            for position in end..first + self.lane_cells {
                let (cell, full, ahead) = self.lane_cell(lane, position);
                if full || ahead != 0 {
                    faults.push(format!("lane {lane}, position {position}: {cell:#x} is not empty at its lap"));
                }
            }
            for position in first..end {
                let (cell, ..) = self.lane_cell(lane, position);
                let (generation, item) = (cell >> 20 & 0xfff_ffff, cell & 0xf_ffff);
                if item >= self.items {
                    faults.push(format!("lane {lane} leads to item {item} of {}", self.items));
                } else {
                    let word = self.word(item);
                    hinted[item as usize] |= (word.phase, word.generation, word.lane) == (READY, generation, lane);
                }
            }
        }
        for (item, word) in self.in_use() {
            if word.phase == READY && !hinted[item as usize] {
                faults.push(format!("no hint leads to item {item}: {word:?}"));
            }
        }
    }

    /// Entries have the numbers of the last positions, each in its slot, and none is older than the ring is long. Those that
    /// were never used are as if from the lap before the first, of no item.
    fn check_returns(&self, faults: &mut Vec<String>) {
        const NO_ITEM: u64 = 0xf_ffff;
        for ring in 0..self.workers * self.fronts {
            let at = self.returns + ring * self.return_stride();
            let head = self.u64(at);
            let entry = |slot| (self.u64(at + BLOCK + 8 * slot) >> 20, self.u64(at + BLOCK + 8 * slot) & NO_ITEM);
            let used = (0..self.return_entries).map(entry).filter(|(_, item)| *item != NO_ITEM);
            let newest = used.map(|(number, _)| number).max().unwrap_or(0);
            if head > newest || newest - head > self.return_entries {
                faults.push(format!("return ring {ring} has its head at {head} and its newest entry at {newest}"));
            }
            for slot in 0..self.return_entries {
                // The newest position that this slot can have had.
                let back = (newest.wrapping_sub(slot + 1)) & (self.return_entries - 1);
                let (seen, item) = entry(slot);
                let is_used = newest > back;
                let wanted = newest.wrapping_sub(back) & ((1 << 44) - 1);
                if seen != wanted || if is_used { item >= self.items } else { item != NO_ITEM } {
                    faults.push(format!("return ring {ring}, slot {slot}: entry {seen} of item {item}, not {wanted}"));
                }
            }
        }
    }

    /// What items have of the arenas is inside of their partitions, and nobody's overlaps.
    fn check_blocks(&self, faults: &mut Vec<String>) {
        let mut blocks: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (item, word) in self.in_use() {
            let record = self.record(item);
            let front = (item / (self.items / self.fronts)).min(self.fronts - 1);
            let (payload, extra) = (self.u32(record + 40), self.u32(record + 44));
            if payload > INLINE && word.phase != DONE {
                blocks.entry(("request", front)).or_default().push((self.u64(record + 32), payload, item));
            }
            if extra > 0 && extra + if payload > INLINE { 0 } else { payload } > INLINE {
                blocks.entry(("request", front)).or_default().push((self.u64(record + 56), extra, item));
            }
            let result = self.u32(record + 132);
            if word.phase == DONE && ![SUPERVISOR, FRONT].contains(&word.owner) && result > INLINE {
                blocks.entry(("result", word.owner)).or_default().push((self.u64(record + 136), result, item));
            }
            for (at, bytes) in self.partials(item) {
                blocks.entry(("result", word.owner)).or_default().push((at, bytes, item));
            }
        }
        for ((arena, partition), mut blocks) in blocks {
            blocks.sort_unstable();
            let (count, bytes) = match arena {
                "request" => (self.fronts, self.request_bytes),
                _ => (self.workers, self.result_bytes),
            };
            if partition >= count
                || blocks.iter().any(|(at, len, _)| at.checked_add(*len).is_none_or(|end| end > bytes))
            {
                faults.push(format!("outside of {arena} partition {partition}: {blocks:?}"));
            }
            for pair in blocks.windows(2) {
                if pair[0].0.saturating_add(pair[0].1) > pair[1].0 {
                    faults.push(format!("in {arena} partition {partition} blocks overlap: {pair:?}"));
                }
            }
        }
    }

    /// What is wrong with who is there, in a server that waits for work: everybody lives, is known by pid and start time,
    /// and sleeps where it can be woken: the front and those workers that may have many items in hand at their own doors, too.
    fn faults_of_processes(&self, supervisor: i32, holders: &[u64]) -> Vec<String> {
        let mut faults = Vec::new();
        for n in 1..1 + self.fronts + self.workers {
            let at = self.registry + n * BLOCK;
            let (state, pid, start) = (self.u32(at), self.u32(at + 4) as i32, self.u64(at + 8));
            let lives = processes::children(supervisor).iter().any(|child| child.pid == pid);
            if state != 1 || !lives || processes::start_time(pid) != Some(start) {
                faults.push(format!("participant {n}: state {state}, pid {pid}, lives: {lives}"));
            }
        }
        for n in 0..1 + self.fronts + self.workers {
            let door = self.doors + n * BLOCK;
            let is_front = (1..1 + self.fronts).contains(&n);
            let is_holder = holders.iter().any(|worker| 1 + self.fronts + worker == n);
            let (sleeps, rescan) = (self.u64(door), self.u64(door + 8));
            if (sleeps, rescan) != ((is_front || is_holder).into(), 0) {
                faults.push(format!("the door of participant {n}: sleeps {sleeps}, rescan {rescan}"));
            }
        }
        for pool in 0..self.pools {
            let (at, count) = (self.idle + pool * 2 * BLOCK, self.u32(self.lines + pool * BLOCK));
            let words =
                |at| [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120].map(|i| self.u64(at + i));
            let mut all_idle = [0; 16];
            all_idle[0] = (1 << count) - 1;
            if words(at) != all_idle || words(at + BLOCK) != [0; 16] {
                faults.push(format!("pool {pool}: idle {:?}, spinning {:?}", words(at), words(at + BLOCK)));
            }
        }
        faults
    }
}

/// What keeps a server from being at rest: something is in its segment, or somebody is missing. `holders` are the workers that
/// may have many items in hand.
pub fn faults_at_rest(server: &Server, holders: &[u64]) -> Vec<String> {
    match Copy::read(&server.segment()) {
        Ok(copy) => [copy.faults_when_idle(), copy.faults_of_processes(server.pid(), holders)].concat(),
        Err(fault) => vec![fault],
    }
}
