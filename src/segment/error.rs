//! Why there is no segment: each a line that says what to do.

use std::{io, num::NonZeroU32};

use super::PREFIX;

/// Why there is no segment.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)]
pub enum SegmentError {
    #[error("a segment cannot have {n} {what}: from 1 to {most} are possible")]
    Geometry { what: &'static str, n: u64, most: u64 },
    #[error(
        "/dev/shm is too small: the server needs {need} MiB of shared memory and {free} of {size} MiB are free. \
         Give it more (Docker's default is 64 MiB: --shm-size=1g; elsewhere: mount -o remount,size=1g /dev/shm), \
         or ask for less with --arena and --max-message, {}--workers or --capacity",
        if *letters { "--dead-letters, " } else { "" }
    )]
    NoSpace { need: u64, free: u64, size: u64, letters: bool },
    #[error("the name `{name}` is in use by a live server{}. Stop it, or give this one another --name", of(*pid))]
    InUse { name: String, pid: Option<NonZeroU32> },
    #[error(
        "the server `{name}`{} is dead, but one of its processes still holds /dev/shm/{PREFIX}{name} (`fuser` on it \
         names them). End it, or give this server another --name",
        of(*pid)
    )]
    Dying { name: String, pid: Option<NonZeroU32> },
    #[error(
        "the server `{name}`{} has died and left what it had accepted in /dev/shm/{PREFIX}{name}, but {differs}. \
         Start it as it was started then to finish that work, or with --fresh to throw it away",
        of(*pid)
    )]
    Differs { name: String, pid: Option<NonZeroU32>, differs: String },
    #[error(
        "/dev/shm/{PREFIX}{name} is not a segment of this program ({why}). Remove it with `rm`, or use another --name"
    )]
    Foreign { name: String, why: &'static str },
    #[error("cannot {what} the segment /dev/shm/{PREFIX}{name}: {error}{}", whose(error))]
    Io { what: &'static str, name: String, error: io::Error },
}

/// Returns a hint for errors that concern `/dev/shm` rather than the segment.
fn whose(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::StorageFull => {
            "; `forkring doctor` says what /dev/shm lacks"
        }
        _ => "",
    }
}

fn of(pid: Option<NonZeroU32>) -> String {
    pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default()
}
