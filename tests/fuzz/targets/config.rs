//! A configuration file: it is read or refused in one line, and what is accepted makes a layout.
#![no_main]

use std::path::Path;

use forkring::{
    config::{Config, Room},
    segment::{Geometry, Layout},
};

libfuzzer_sys::fuzz_target!(|text: &str| {
    let config = match Config::from_toml(text, Path::new("f.toml")) {
        Ok(config) => config,
        Err(error) => return assert_one_line(&error.to_string()),
    };
    if let Err(error) = config.validate() {
        return assert_one_line(&error.to_string());
    }
    if config.pools.is_empty() {
        return;
    }
    let room = Room { shm: 1 << 30, fixed: 1 << 24, partitions: 2 };
    let arena = config.arena_in(room).bytes();
    let geometry = Geometry {
        items: config.capacity,
        fronts: 1,
        workers: config.pools.iter().map(|pool| u32::from(config.workers_of(pool))).sum(),
        pools: config.pools.len() as u32,
        request_bytes: arena,
        result_bytes: arena,
        letter_bytes: config.dead_letters.bytes(),
    };
    Layout::of(geometry).expect("whatever is accepted can be laid out");
});

fn assert_one_line(message: &str) {
    assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
}
