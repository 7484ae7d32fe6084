//! What a segment was made for: who adopts it has to want the same.
//!
//! Sizes and counts decide where everything is; the pools' names, in their order, what lanes and workers mean. The format is
//! the ABI version, and the layout hash tells builds apart that forgot to change it.

use std::{
    io,
    mem::size_of,
    os::fd::AsFd,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
};

use rustix::fs::fstat;
use zerocopy::FromBytes;

use super::{ABI, BLOCK, Header, Layout, inspect::read_at};
use crate::process;

/// A pool in the segment, which its name and its place among the others identify: lanes are numbered by them.
#[derive(FromBytes)]
#[repr(C)]
pub(super) struct PoolLine {
    workers: AtomicU32,
    name_len: AtomicU32,
    name: [AtomicU64; NAME / 8],
}

/// The most bytes of a pool's name.
const NAME: usize = 64;
const _: () = assert!(size_of::<PoolLine>() <= BLOCK as usize);

/// A pool as it is in the segment: its name and how many workers it has.
pub type PoolShape = (String, u16);

impl PoolLine {
    pub(super) fn set(&self, name: &str, workers: u16) {
        self.workers.store(workers.into(), Relaxed);
        self.name_len.store(name.len().min(NAME) as u32, Relaxed);
        for (word, bytes) in self.name.iter().zip(name.as_bytes().chunks(8)) {
            let mut padded = [0; 8];
            padded[..bytes.len()].copy_from_slice(bytes);
            word.store(u64::from_le_bytes(padded), Relaxed);
        }
    }

    fn get(&self) -> PoolShape {
        let name: Vec<u8> = self.name.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        let len = (self.name_len.load(Relaxed) as usize).min(NAME);
        let workers = self.workers.load(Relaxed).try_into().unwrap_or(u16::MAX);
        (String::from_utf8_lossy(&name[..len]).into_owned(), workers)
    }
}

/// In what a left segment is not what is wanted, as the end of a sentence about it.
pub(super) fn differs(
    object: &impl AsFd,
    header: &Header,
    wanted: &Layout,
    pools: &[PoolShape],
) -> io::Result<Option<String>> {
    let abi = header.abi.load(Relaxed);
    if abi != ABI {
        return Ok(Some(format!("it was another version of forkring (segment format {abi}; this one's is {ABI})")));
    }
    if header.boot_id.each_ref().map(|word| word.load(Relaxed)) != process::boot_id()? {
        return Ok(Some("that was before this machine was booted, and its times mean nothing now".to_owned()));
    }
    let size = fstat(object)?.st_size as u64;
    let is_whole = |made: &Layout| made.total == size && made.hash() == header.layout_hash.load(Relaxed);
    let Some(made) = Layout::of(header.geometry()).ok().filter(is_whole) else {
        return Ok(Some("it was another build of forkring, which lays memory out differently".to_owned()));
    };

    let (then, now) = (&made.geometry, &wanted.geometry);
    let mut all = Vec::new();
    let mut compare = |what: &str, then: String, now: String| {
        if then != now {
            all.push(format!("{what} {then}, not {now}"));
        }
    };
    compare("--capacity", then.items.to_string(), now.items.to_string());
    compare(
        "--arena",
        arenas_text(then.request_bytes, then.result_bytes),
        arenas_text(now.request_bytes, now.result_bytes),
    );
    compare("--dead-letters", size_text(then.letter_bytes), size_text(now.letter_bytes));
    compare("fronts", then.fronts.to_string(), now.fronts.to_string());
    let mut pools = pools.to_vec();
    pools.resize(now.pools as usize, PoolShape::default());
    compare("the pools and workers", pools_text(&read_pools(object, &made)?), pools_text(&pools));
    Ok((!all.is_empty()).then(|| format!("it was served with {}", all.join("; with "))))
}

fn read_pools(object: &impl AsFd, layout: &Layout) -> io::Result<Vec<PoolShape>> {
    let line = |at| read_at::<PoolLine>(object, layout.pool(at))?.ok_or(io::ErrorKind::UnexpectedEof.into());
    (0..layout.geometry.pools.into()).map(|at| line(at).map(|line| line.get())).collect()
}

/// As `--pool` has them.
fn pools_text(pools: &[PoolShape]) -> String {
    let each: Vec<_> = pools.iter().map(|(name, workers)| format!("{name}:{workers}")).collect();
    each.join(" ")
}

/// As `--arena` has it, which is for requests and results alike.
fn arenas_text(requests: u64, results: u64) -> String {
    if requests == results {
        size_text(requests)
    } else {
        format!("{} and {}", size_text(requests), size_text(results))
    }
}

/// In the largest unit that makes it whole.
fn size_text(bytes: u64) -> String {
    let units = [("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let unit = units.into_iter().find(|(_, shift)| bytes != 0 && bytes.trailing_zeros() >= *shift);
    unit.map_or_else(|| bytes.to_string(), |(unit, shift)| format!("{}{unit}", bytes >> shift))
}
