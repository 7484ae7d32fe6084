//! Default sizes: the arenas and the largest message follow from how much shared memory the machine has.
//!
//! They go by the *size* of `/dev/shm` and not by what is free in it. So a server that is started again chooses the same
//! sizes whatever else has been reserved meanwhile, among it the segment that a killed predecessor left for it to adopt.

use super::ByteSize;

/// A server with default sizes takes one part in so many of `/dev/shm`.
const SHARE: u64 = 4;
/// The most that a partition gets by default.
const MOST_ARENA: u64 = 80 << 20;
/// The least that a partition gets by default, even if that exceeds the share: it holds a message of 4 MiB, the largest that
/// gRPC's clients take unless told otherwise.
const LEAST_ARENA: u64 = 5 << 20;
/// The largest message by default, if the arena has room for it.
const MOST_MESSAGE: u64 = 64 << 20;

/// The quantities from which the default sizes are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Room {
    /// Bytes of `/dev/shm`, free or not.
    pub shm: u64,
    /// Bytes that a segment needs beside its partitions.
    pub fixed: u64,
    /// The number of partitions of a segment: one for requests and one for each worker's results.
    pub partitions: u64,
}

/// Returns how large each partition is by default. A configured largest message always fits.
pub(super) fn default_arena(room: Room, max_message: Option<ByteSize>) -> ByteSize {
    let share = (room.shm / SHARE).saturating_sub(room.fixed) / room.partitions.max(1);
    // Whole MiB are easier to read.
    let arena = (share & !((1 << 20) - 1)).max(LEAST_ARENA);
    let Some(max_message) = max_message.map(ByteSize::bytes) else { return ByteSize::new(arena.min(MOST_ARENA)) };
    // A quarter more than the largest message, so that others fit beside it, as in the largest default sizes.
    let most = max_message.saturating_mul(5) / 4;
    ByteSize::new(arena.min(MOST_ARENA.max(most)).max(arena_for(max_message)))
}

/// Returns the largest message by default: as large as fits the arena.
pub(super) fn default_max_message(arena: Option<ByteSize>) -> ByteSize {
    let arena = arena.map_or(MOST_ARENA, ByteSize::bytes);
    ByteSize::new(largest_message(arena).min(MOST_MESSAGE))
}

/// Returns the smallest arena that holds a message of so many bytes: an arena hands blocks out in size classes an eighth
/// apart, and a block of the largest class must fit.
pub(super) fn arena_for(max_message: u64) -> u64 {
    (max_message * 9).div_ceil(8)
}

/// Returns the largest message that an arena holds; rounded down to whole KiB unless that is 0.
pub(super) fn largest_message(arena: u64) -> u64 {
    let fits = (u128::from(arena) * 8 / 9) as u64;
    if fits < 1024 { fits } else { fits & !1023 }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;

    #[test]
    fn default_sizes_follow_the_shared_memory_of_the_machine() {
        // `/dev/shm`, workers and --max-message; the arena and the largest message.
        for (shm, workers, max_message, arena, message) in [
            // Docker's default.
            (64 * MIB, 2, None, 5 * MIB, 4551 << 10),
            (GIB, 4, None, 48 * MIB, 43690 << 10),
            (GIB, 40, None, 5 * MIB, 4551 << 10),
            (16 * GIB, 4, None, 80 * MIB, 64 * MIB),
            (24 * GIB, 256, None, 23 * MIB, 20935 << 10),
            (24 * GIB, 1024, None, 5 * MIB, 4551 << 10),
            (0, 1, None, 5 * MIB, 4551 << 10),
            (u64::MAX, 1, None, 80 * MIB, 64 * MIB),
            // A configured largest message fits, whatever the share is.
            (GIB, 4, Some(64 * MIB), 72 * MIB, 64 * MIB),
            (24 * GIB, 256, Some(64 * MIB), 72 * MIB, 64 * MIB),
            (16 * GIB, 4, Some(128 * MIB), 160 * MIB, 128 * MIB),
            (GIB, 4, Some(4096), 48 * MIB, 4096),
        ] {
            let room = Room { shm, fixed: 14 * MIB, partitions: workers + 1 };
            let max_message = max_message.map(ByteSize::new);
            let chosen = default_arena(room, max_message);
            assert_eq!(chosen, ByteSize::new(arena), "{room:?} {max_message:?}");
            let largest = max_message.unwrap_or_else(|| default_max_message(Some(chosen)));
            assert_eq!(largest, ByteSize::new(message), "{room:?}");
            assert!(arena_for(largest.bytes()) <= chosen.bytes(), "{room:?}");
            let total = room.fixed + room.partitions * chosen.bytes();
            assert!(max_message.is_some() || total <= shm / 4 || arena == LEAST_ARENA, "{room:?}: {total}");
        }
    }

    #[test]
    fn the_largest_message_follows_from_an_arena_that_somebody_chose() {
        for (arena, message) in [(4096, 3 << 10), (16 * MIB, 14563 << 10), (72 * MIB, 64 * MIB), (GIB, 64 * MIB)] {
            assert_eq!(default_max_message(Some(ByteSize::new(arena))), ByteSize::new(message), "{arena}");
        }
        assert_eq!(default_max_message(None), ByteSize::new(MOST_MESSAGE));
    }
}
