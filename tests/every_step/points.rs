//! That no point is forgotten: each that is in the source is passed in the house, or killed at in a test that is named.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What is wrong with the points of the source, of which these are `passed`, and those `elsewhere` named in other tests.
pub fn faults(passed: &BTreeSet<String>, elsewhere: &[(&str, &[&str])]) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let texts = sources(&root.join("src"));
    let names: BTreeSet<&str> = texts.iter().flat_map(|text| names(text)).collect();
    let mut faults = Vec::new();
    let mut known: BTreeSet<&str> = passed.iter().map(String::as_str).collect();
    for (file, points) in elsewhere {
        let text = read(&root.join(file));
        for point in *points {
            if !text.contains(point) {
                faults.push(format!("{file} does not name {point}"));
            }
            if !known.insert(point) {
                faults.push(format!("{point} need not be named for {file}: it is passed"));
            }
        }
    }
    faults.extend(names.difference(&known).map(|name| format!("nobody passes {name}")));
    faults.extend(known.difference(&names).map(|name| format!("there is no point {name} in the source")));
    faults
}

/// All files of a folder and of those in it.
fn sources(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path());
    let all = |path: PathBuf| if path.is_dir() { sources(&path) } else { vec![read(&path)] };
    entries.flat_map(all).collect()
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path:?}: {error}"))
}

/// The names of the points in a text.
fn names(text: &str) -> impl Iterator<Item = &str> {
    text.split("crash_point!(\"").skip(1).filter_map(|rest| rest.split('"').next())
}
