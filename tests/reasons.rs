//! The reasons of failures: each that the code has is in README's table, and no other.

use std::{collections::BTreeSet, fs, path::Path};

/// Names of gRPC codes. One is a reason, too.
const CODES: [&str; 8] = [
    "ALREADY_EXISTS",
    "DATA_LOSS",
    "FAILED_PRECONDITION",
    "INVALID_ARGUMENT",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
];

/// Whether this names a variable of the environment.
fn is_variable(name: &str) -> bool {
    ["FORKRING_", "GRPC_", "CARGO_"].iter().any(|prefix| name.starts_with(prefix))
        || name.ends_with("_HOME")
        || name == "OUT_DIR"
}

fn is_constant(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_uppercase())
        && text.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
}

/// Whether what is before a string is the code of a failure.
fn is_code(before: &str) -> bool {
    let before = before.trim_end();
    let code = before.strip_suffix(',').and_then(|before| before.rsplit_once("Code::"));
    before.ends_with("with_error_info(") || code.is_some_and(|(_, name)| name.chars().all(char::is_alphanumeric))
}

/// The strings of a source that look like reasons: constants of several words, and those behind a code.
fn reasons(source: &str, found: &mut BTreeSet<String>) {
    let source = source.split("#[cfg(test)]\nmod tests {").next().unwrap_or(source);
    let is_comment = |line: &&str| line.trim_start().starts_with("//");
    let source: Vec<_> = source.lines().filter(|line| !is_comment(line)).collect();
    let source = source.join("\n");
    for (at, _) in source.match_indices('"') {
        let (before, rest) = (&source[..at], &source[at + 1..]);
        let text = rest.split('"').next().unwrap_or_default();
        if is_constant(text) && (text.contains('_') || is_code(before)) {
            found.insert(text.to_owned());
        }
    }
}

fn walk(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in fs::read_dir(folder).expect("a folder of the project") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a name");
        if path.is_dir() && name != "tests" {
            walk(&path, found);
        } else if name != "tests.rs" && (name.ends_with(".rs") || name.ends_with(".py")) {
            reasons(&fs::read_to_string(&path).expect("a source"), found);
        }
    }
}

#[test]
fn every_reason_is_in_the_readme_and_every_one_there_is_in_the_code() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = BTreeSet::new();
    for folder in ["src", "python/src", "python/forkring"] {
        walk(&root.join(folder), &mut found);
    }
    let readme = fs::read_to_string(root.join("README.md")).expect("a readme");
    let (_, table) = readme.split_once("| reason | code | |\n").expect("the table of reasons");
    let rows = table.lines().take_while(|line| line.starts_with('|')).skip(1);
    let cells = rows.filter_map(|row| row.split('|').nth(1));
    let told: BTreeSet<_> =
        cells.flat_map(|cell| cell.split('`').filter(|word| is_constant(word))).map(str::to_owned).collect();
    let in_code: BTreeSet<_> =
        found.iter().filter(|name| !CODES.contains(&&***name) && !is_variable(name)).cloned().collect();
    assert!(in_code.len() > 30, "they are no longer found: {in_code:?}");
    assert_eq!(in_code.difference(&told).collect::<Vec<_>>(), [""; 0], "not in README's table");
    assert_eq!(told.difference(&found).collect::<Vec<_>>(), [""; 0], "in README's table and not in the code");
}
