//! How an item's metadata travels: key and value, each behind its length in 4 little-endian bytes, one pair after the
//! other. A key may come twice: the last one counts, as in protobuf.

/// Appends a pair.
pub fn push(bytes: &mut Vec<u8>, key: &str, value: &str) {
    for text in [key, value] {
        bytes.extend_from_slice(&(text.len() as u32).to_le_bytes());
        bytes.extend_from_slice(text.as_bytes());
    }
}

/// How long a pair becomes.
pub fn len(key: &str, value: &str) -> usize {
    8 + key.len() + value.len()
}

/// The pairs. Ends at the first thing that is no pair: the bytes come from shared memory.
pub fn pairs(mut bytes: &[u8]) -> impl Iterator<Item = (&str, &str)> {
    std::iter::from_fn(move || Some((text(&mut bytes)?, text(&mut bytes)?)))
}

fn text<'a>(bytes: &mut &'a [u8]) -> Option<&'a str> {
    let (len, rest) = bytes.split_first_chunk::<4>()?;
    let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
    *bytes = rest;
    std::str::from_utf8(text).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn pairs_come_out_as_they_went_in(given: Vec<(String, String)>) {
            let mut bytes = Vec::new();
            for (key, value) in &given {
                let before = bytes.len();
                push(&mut bytes, key, value);
                prop_assert_eq!(len(key, value), bytes.len() - before);
            }
            let given: Vec<_> = given.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
            prop_assert_eq!(pairs(&bytes).collect::<Vec<_>>(), given);
        }

        #[test]
        fn garbage_ends(bytes: Vec<u8>) {
            prop_assert!(pairs(&bytes).count() <= bytes.len() / 8);
        }
    }
}
