//! A segment that was left behind with garbage for a header: it is adopted, refused or made anew, and never anything else.
#![no_main]

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
};

use forkring::{
    dispatch::adopt,
    segment::{Geometry, PREFIX, Segment, SegmentError, SegmentOwner, Slot, inspect},
};

const GEOMETRY: Geometry =
    Geometry { items: 4, fronts: 1, workers: 1, pools: 1, request_bytes: 4096, result_bytes: 4096, letter_bytes: 0 };
const PAGE: u64 = 4096;

/// A name, and the bytes of a segment of that name that was left behind.
struct World {
    name: String,
    segment: Vec<u8>,
}

thread_local! {
    static WORLD: World = World::new().expect("a segment");
}

impl World {
    fn new() -> io::Result<Self> {
        let name = format!("fuzz-header-{}", std::process::id());
        let _owner = SegmentOwner::create(&name, GEOMETRY).map_err(io::Error::other)?;
        Ok(World { segment: fs::read(path(&name))?, name })
    }

    fn file(&self) -> io::Result<File> {
        let _ = fs::remove_file(path(&self.name));
        File::options().read(true).write(true).create_new(true).mode(0o600).open(path(&self.name))
    }
}

fn path(name: &str) -> String {
    format!("/dev/shm/{PREFIX}{name}")
}

// First how long the object is, if it is not as long as it was; then words of the header and what they are changed by.
libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    WORLD.with(|world| {
        let Some((len, changes)) = input.split_first() else { return };
        let file = world.file().expect("a file");
        file.write_all_at(&world.segment, 0).expect("room for it");
        if len % 4 == 0 {
            file.set_len(u64::from(*len) * PAGE / 16).expect("room for it");
        }
        for change in changes.chunks_exact(10) {
            let (at, bytes) = change.split_at(2);
            let at = u64::from(u16::from_le_bytes([at[0], at[1]])) % (PAGE / 8) * 8;
            let mut word = [0; 8];
            // What is beyond the end of the object reads as nothing, and is not made longer.
            if file.read_exact_at(&mut word, at).is_ok() {
                word.iter_mut().zip(bytes).for_each(|(byte, change)| *byte ^= change);
                file.write_all_at(&word, at).expect("room for it");
            }
        }
        let _ = inspect(&world.name);
        match SegmentOwner::take(&world.name, GEOMETRY, &[], false) {
            Ok(owner) => {
                let segment = Segment::attach(owner.object(), owner.name(), Slot::Supervisor).expect("what was taken");
                assert_eq!(*segment.geometry(), GEOMETRY);
                adopt(&segment).expect("zeros");
            }
            Err(SegmentError::Io { what, error, .. }) => panic!("cannot {what}: {error}"),
            Err(error) => assert!(!error.to_string().contains('\n')),
        }
        let _ = fs::remove_file(path(&world.name));
    });
});
