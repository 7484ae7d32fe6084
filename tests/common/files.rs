//! A folder of a test's own, by which its handlers tell it what they do and it tells them to go on.

use std::{fs, path::PathBuf};

use forkring::proto::v1::WorkItem;

use super::until;

/// See the module. Removed when dropped.
#[derive(Debug)]
pub struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    pub fn new() -> Self {
        Files { dir: tempfile::tempdir().expect("a temporary folder") }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The same as text, for arguments and metadata.
    pub fn name(&self, name: &str) -> String {
        self.path(name).to_str().expect("a path that is text").to_owned()
    }

    /// Makes a file, which may be what somebody waits for.
    pub fn make(&self, name: &str) {
        fs::write(self.path(name), "").expect("a file");
    }

    /// The lines of a file; none if it is not there.
    pub fn lines(&self, name: &str) -> Vec<String> {
        let text = fs::read_to_string(self.path(name)).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Waits until a file has so many lines.
    pub async fn lines_of(&self, name: &str, count: usize) -> Vec<String> {
        until(&format!("{count} lines in `{name}`"), || Some(self.lines(name)).filter(|lines| lines.len() >= count))
            .await
    }

    /// An item for the pool `hold` of the example `handlers`: it notes in `journal` that it began, and holds its
    /// worker until there is a file `until`.
    pub fn holding(&self, id: u64, until: &str) -> WorkItem {
        WorkItem::new("hold", format!("item {id}"))
            .with_id(id)
            .with_metadata("journal", self.name("journal"))
            .with_metadata("until", self.name(until))
    }

    /// Waits until so many items of the pool `hold` began in all; the pids of the workers that have them.
    pub async fn began(&self, count: usize) -> Vec<i32> {
        let lines = self.lines_of("journal", count).await;
        let pid = |line: &String| line.rsplit(' ').next()?.parse().ok();
        lines.iter().map(|line| pid(line).expect("a line of the handler's")).collect()
    }
}
