//! The regular files under a folder, one at a time: what is held is one open folder per level.

use std::{
    fs::{self, OpenOptions, ReadDir},
    io::{self, Read as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

/// See the module. Symbolic links are not followed, below the folder itself.
#[derive(Debug)]
pub struct Files {
    /// Only a file was named.
    single: Option<PathBuf>,
    open: Vec<(PathBuf, ReadDir)>,
}

impl Files {
    /// Of a folder, or a file alone.
    pub fn under(path: &Path) -> io::Result<Self> {
        if fs::metadata(path)?.is_file() {
            return Ok(Self { single: Some(path.to_owned()), open: Vec::new() });
        }
        Ok(Self { single: None, open: vec![(path.to_owned(), fs::read_dir(path)?)] })
    }
}

impl Iterator for Files {
    type Item = io::Result<PathBuf>;

    /// The next file, or what could not be looked into.
    fn next(&mut self) -> Option<Self::Item> {
        if let Some(file) = self.single.take() {
            return Some(Ok(file));
        }
        loop {
            let (folder, entries) = self.open.last_mut()?;
            let entry = match entries.next() {
                Some(Ok(entry)) => entry,
                Some(Err(error)) => {
                    // Asking again might give the same error for ever.
                    let error = named(folder, error);
                    self.open.pop();
                    return Some(Err(error));
                }
                None => {
                    self.open.pop();
                    continue;
                }
            };
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_file() => return Some(Ok(path)),
                Ok(kind) if kind.is_dir() => match fs::read_dir(&path) {
                    Ok(entries) => self.open.push((path, entries)),
                    Err(error) => return Some(Err(named(&path, error))),
                },
                Ok(_) => {}
                Err(error) => return Some(Err(named(&path, error))),
            }
        }
    }
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// All of a file; `None` when it is larger than `largest`, whatever its metadata says.
pub fn read(path: &Path, largest: u64) -> io::Result<Option<Vec<u8>>> {
    // It may have become a pipe since the folder was listed: do not wait for a writer.
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    let meta = file.metadata()?;
    if !meta.is_file() {
        return Err(io::Error::other("it is no longer a file"));
    }
    if meta.len() > largest {
        return Ok(None);
    }
    let mut payload = Vec::with_capacity(meta.len() as usize);
    file.take(largest + 1).read_to_end(&mut payload)?;
    Ok((payload.len() as u64 <= largest).then_some(payload))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("a/b")).expect("folders");
        fs::create_dir(at("empty")).expect("a folder");
        for (name, text) in [("top", "1"), ("a/one", "22"), ("a/b/two", "333"), ("a/none", "")] {
            fs::write(at(name), text).expect("a file");
        }
        symlink(at("a"), at("loop")).expect("a link");
        symlink("/etc/passwd", at("a/link")).expect("a link");
        drop(std::os::unix::net::UnixListener::bind(at("socket")).expect("a socket"));
        dir
    }

    #[test]
    fn every_regular_file_once_and_no_links() {
        let dir = tree();
        let files = Files::under(dir.path()).expect("a folder");
        let mut found: Vec<_> = files.map(|path| path.expect("a readable tree")).collect();
        found.sort();
        assert_eq!(found, ["a/b/two", "a/none", "a/one", "top"].map(|name| dir.path().join(name)));
        let top = dir.path().join("top");
        let single: Vec<_> = Files::under(&top).expect("a file").flatten().collect();
        assert_eq!(single, [top]);
        assert!(Files::under(&dir.path().join("nothing")).is_err());
    }

    #[test]
    fn a_file_up_to_the_limit_is_read() {
        let dir = tree();
        let two = dir.path().join("a/b/two");
        assert_eq!(read(&two, 3).expect("a file"), Some(b"333".to_vec()));
        assert_eq!(read(&two, 2).expect("a file"), None);
        // Its metadata say 0 bytes.
        assert_eq!(read(Path::new("/proc/self/status"), 10).expect("a file"), None);
        assert!(read(dir.path(), 10).is_err());
    }
}
