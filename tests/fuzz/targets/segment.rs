//! A segment full of garbage: whoever attaches to it and works in it neither panics, nor hangs, nor looks beyond it.
//!
//! The input is a program: what front, workers and supervisor do, and in between what somebody scribbles, wherever a
//! worker can, and over the header.
#![no_main]

use std::{
    fs::{self, File},
    io,
    ops::Range,
    os::{
        fd::AsFd as _,
        unix::{fs::FileExt as _, process::ExitStatusExt as _},
    },
    process::ExitStatus,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use forkring::{
    Code, Failure,
    dispatch::{
        Bells, DeadLetters, Death, Front, Kind, Offer, Outcome, Topology, Worker, adopt, sweep_front, sweep_worker,
    },
    fuzzing,
    process::now,
    segment::{Geometry, INLINE, MIN_LETTER_BYTES, PREFIX, Segment, SegmentError, SegmentOwner, Slot, Stage},
};

/// Of each pool.
const WORKERS: [u16; 2] = [2, 1];
const GEOMETRY: Geometry = Geometry {
    items: 8,
    fronts: 1,
    workers: 3,
    pools: 2,
    request_bytes: 8192,
    result_bytes: 8192,
    letter_bytes: MIN_LETTER_BYTES,
};
/// Words of the item table.
const ITEMS: u64 = GEOMETRY.items as u64 * 32;
const ARENAS: u64 = 4 * 8192;
const PAGE: usize = 4096;
/// Larger than any block.
const PAYLOAD: [u8; 1 << 14] = [7; 1 << 14];

/// The one segment of this process, and what all of it but the arenas was at first.
struct World {
    owner: SegmentOwner,
    file: File,
    control: Vec<u8>,
    /// The word that the item table begins with.
    items: u64,
    bells: Arc<Bells>,
}

thread_local! {
    static WORLD: World = World::new().expect("a segment");
}

impl World {
    fn new() -> io::Result<Self> {
        let name = format!("fuzz-{}", std::process::id());
        let owner = SegmentOwner::create(&name, GEOMETRY).map_err(io::Error::other)?;
        // A fuzzer that found something removes nothing.
        fs::remove_file(format!("/dev/shm/{PREFIX}{name}"))?;
        let file = File::from(owner.object().as_fd().try_clone_to_owned()?);
        let mut control = vec![0; (owner.layout().total() - ARENAS) as usize];
        file.read_exact_at(&mut control, 0)?;
        let items = Self::find_items(&owner, &file, control.len())?;
        Ok(World { owner, file, control, items, bells: Bells::new(1, 3)? })
    }

    /// Where it is nobody says, so the first item gets an id to look for.
    fn find_items(owner: &SegmentOwner, file: &File, len: usize) -> io::Result<u64> {
        const ID: u64 = 0x6964_6964_6964_6964;
        let segment = Segment::attach(owner.object(), owner.name(), Slot::Supervisor).map_err(io::Error::other)?;
        segment.item(0).id.store(ID, Relaxed);
        let mut control = vec![0; len];
        file.read_exact_at(&mut control, 0)?;
        // The id is the second word of the record.
        let at = control.chunks(8).position(|word| word == ID.to_le_bytes()).map(|word| word as u64 - 1);
        at.ok_or(io::Error::other("there is no item"))
    }

    /// Changes the word `at`, counted from the first of these and round to it again.
    fn scribble(&self, words: Range<u64>, program: &mut Program<'_>) -> Option<()> {
        let at = 8 * (words.start + program.number()? % (words.end - words.start));
        let mut word = [0; 8];
        self.file.read_exact_at(&mut word, at).expect("a word");
        let new = program.word(u64::from_le_bytes(word))?;
        self.file.write_all_at(&new.to_le_bytes(), at).expect("room for it");
        Some(())
    }

    fn attach(&self, slot: Slot) -> Result<Segment, SegmentError> {
        Segment::attach(self.owner.object(), self.owner.name(), slot)
    }
}

/// What is left of the input.
struct Program<'a>(&'a [u8]);

impl Program<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*byte)
    }

    fn number(&mut self) -> Option<u64> {
        Some(u64::from(self.byte()?) << 8 | u64::from(self.byte()?))
    }

    /// Another word than this: a bit or a small number away, or anything.
    fn word(&mut self, word: u64) -> Option<u64> {
        let (how, shift) = (self.byte()?, self.byte()? % 64);
        Some(match how % 4 {
            0 => word ^ 1 << shift,
            1 => word.wrapping_add(u64::from(self.byte()?) << shift),
            2 => u64::from(self.byte()?) << shift,
            _ => self.number()? << 48 | self.number()? << 32 | self.number()? << 16 | self.number()?,
        })
    }
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    WORLD.with(|world| {
        world.file.write_all_at(&world.control, 0).expect("room for it");
        let mut program = Program(input);
        while !program.0.is_empty() {
            session(world, &mut program);
        }
    });
});

/// From an attach to the next.
fn session(world: &World, program: &mut Program<'_>) -> Option<()> {
    let segments = [Slot::Front(0), Slot::Worker(0), Slot::Worker(1), Slot::Worker(2)].map(|slot| world.attach(slot));
    let [Ok(front), Ok(a), Ok(b), Ok(c)] = &segments else {
        world.file.write_all_at(&world.control[..PAGE], 0).expect("room for it");
        return program.byte().map(drop);
    };
    let topology = Topology::new(WORKERS);
    let workers = [a, b, c];
    let supervisor = world.attach(Slot::Supervisor).ok()?;
    // Nobody fetches what is in a worker's way: it must not wait for that.
    supervisor.set_stage(Stage::Stopping);
    let (mut front, _) = Front::attach(front, topology.clone(), world.bells.clone(), 0);
    let mut workers: Vec<_> = workers
        .into_iter()
        .zip(0..)
        .map(|(segment, n)| Worker::attach(segment, topology.clone(), world.bells.clone(), n).expect("a free slot"))
        .collect();
    let mut held = Vec::new();
    let mut dead = DeadLetters::new(vec!["a".to_owned(), "b".to_owned()]);
    loop {
        match program.byte()? % 32 {
            0 => world.scribble(0..PAGE as u64 / 8, program)?,
            1..=3 => world.scribble(PAGE as u64 / 8..world.items, program)?,
            4..=6 => world.scribble(world.items..world.items + ITEMS, program)?,
            // Dead letters and arenas.
            7 => world.scribble(world.items + ITEMS..world.owner.layout().total() / 8, program)?,
            8..=13 => offer(&mut front, program)?,
            14..=18 => work(&mut workers[usize::from(program.byte()?) % 3], program)?,
            19..=22 => {
                while let Some(completion) = front.collect() {
                    let mut line = [0; INLINE];
                    let inline = front.inline_result(&completion, &mut line).map(<[u8]>::len);
                    let bytes = front.arena_result(&completion).map(<[u8]>::to_vec);
                    take_parts(&mut front, completion.index);
                    if let Outcome::Failure(code) = completion.outcome {
                        fuzzing::failure(code, bytes.as_deref().unwrap_or(&line[..inline.unwrap_or(0)]));
                    }
                    held.push(completion.index);
                }
                while let Some(index) = front.noticed() {
                    take_parts(&mut front, index);
                }
            }
            23..=25 => held.pop().into_iter().for_each(|index| front.release(index)),
            26..=27 => front.cancel(u32::from(program.byte()?) % GEOMETRY.items),
            28..=29 => {
                let death = Death {
                    worker: u16::from(program.byte()?) % 3,
                    pid: 7,
                    status: ExitStatus::from_raw(9),
                    cause: "killed by SIGKILL".to_owned(),
                    failure: Failure::new(Code::Aborted, "WORKER_CRASHED", "it was killed"),
                };
                sweep_worker(&supervisor, &topology, &world.bells, &death, 2, &mut dead);
                let letters = front.segment().letters().expect("a front's");
                let (before, last) = letters.range();
                let numbers = (before..last).take(20).filter_map(|number| number.checked_add(1));
                for number in numbers.filter(|number| letters.read(*number, true).is_some()) {
                    letters.mark_gone(number);
                }
            }
            30 => {
                front.ring();
                if front.somebody_is_late() {
                    front.ring_next();
                }
            }
            // The end of this front, or of all.
            _ => {
                match program.byte()? % 2 {
                    0 => sweep_front(&supervisor, &world.bells, 0),
                    _ => drop(adopt(&supervisor)),
                }
                return Some(());
            }
        }
    }
}

fn offer(front: &mut Front<'_>, program: &mut Program<'_>) -> Option<()> {
    let (bits, len, extra) = (program.byte()?, program.number()? as usize % 9000, program.byte()?);
    let Ok(mut request) = front.request(len) else { return Some(()) };
    front.write(&mut request, &PAYLOAD[..len]);
    let offer = Offer {
        pool: u16::from(bits & 1),
        priority: u32::from(bits >> 1 & 3),
        id: len as u64,
        offered: now(),
        deadline: 0,
        kind: if bits & 8 != 0 { Kind::Submit } else { [Kind::Call, Kind::Stream][usize::from(extra & 1)] },
        subscription: if bits & 8 != 0 { &PAYLOAD[..usize::from(bits >> 4)] } else { &[] },
        metadata: &PAYLOAD[..usize::from(extra)],
    };
    if front.offer(&offer, &mut request).is_err() {
        front.discard(request);
    }
    Some(())
}

/// All that there are, unless they are broken.
fn take_parts(front: &mut Front<'_>, index: u32) {
    while let Some(Ok(partial)) = front.partial(index) {
        let mut bytes = 0;
        if front.take_partial(&partial, |piece| bytes += piece.len()) {
            assert_eq!(bytes, partial.len);
        }
    }
    front.taken(index);
}

fn work(worker: &mut Worker<'_>, program: &mut Program<'_>) -> Option<()> {
    let (first, second) = (program.number()? as usize % 9000, usize::from(program.byte()?));
    worker.chain();
    let Some(claimed) = worker.take() else { return Some(()) };
    let _ = claimed.is_cancelled();
    if let Some((item, mut reply)) = worker.open(&claimed, 9000) {
        // As handlers do: they read all of it.
        let sum = item.payload().iter().fold(0u64, |sum, byte| sum.wrapping_add(u64::from(*byte)));
        let _ = (sum, item.all_metadata().count(), item.is_cancelled());
        for part in PAYLOAD[..first].chunks(1800).take(second % 8) {
            let _ = reply.write(part);
            let _ = reply.try_send();
        }
        let _ = reply.write(&PAYLOAD[..first]);
        let _ = reply.write(&PAYLOAD[..second]);
        drop(item);
        reply.complete(claimed, (second == 1).into(), now(), now());
        return Some(());
    }
    worker.reply(&claimed, 100).complete(claimed, 13, now(), now());
    Some(())
}
