//! Suggestions for misspelt words.

/// Returns the known word that is most similar to `given`, if the edit distance is at most a third of the longer word.
pub(crate) fn closest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let given: Vec<char> = given.to_lowercase().chars().collect();
    let distances = known.into_iter().map(|word| {
        let letters: Vec<char> = word.to_lowercase().chars().collect();
        (distance(&given, &letters), letters.len().max(given.len()), word)
    });
    let alike = distances.filter(|(distance, longest, _)| 3 * distance <= *longest);
    alike.min_by_key(|(distance, ..)| *distance).map(|(.., word)| word)
}

/// Returns the edit distance: how many letters have to be inserted, removed, replaced or swapped with a neighbour to turn
/// `a` into `b`.
fn distance(a: &[char], b: &[char]) -> usize {
    // One row for each prefix of `a`: its distance to each prefix of `b`.
    let mut rows = vec![(0..=b.len()).collect::<Vec<_>>()];
    for (i, x) in a.iter().enumerate() {
        let mut row = vec![i + 1];
        for (j, y) in b.iter().enumerate() {
            let mut least = (rows[i][j] + usize::from(x != y)).min(rows[i][j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && *x == b[j - 1] && a[i - 1] == *y {
                least = least.min(rows[i - 1][j - 1] + 1);
            }
            row.push(least);
        }
        rows.push(row);
    }
    rows[a.len()][b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_similar_word_is_suggested_if_there_is_one() {
        let known = ["capacity", "workers", "worker_env", "log", "name", "pool"];
        for (given, wanted) in [
            ("capactiy", Some("capacity")),
            ("CAPACTY", Some("capacity")),
            ("worker", Some("workers")),
            ("worker-env", Some("worker_env")),
            ("logs", Some("log")),
            ("nmae", Some("name")),
            ("pools", Some("pool")),
            ("xyzzy", None),
            ("", None),
            ("listen", None),
        ] {
            assert_eq!(closest(given, known), wanted, "{given}");
        }
        assert_eq!(closest("name", []), None);
    }
}
