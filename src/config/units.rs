//! The values that people write in flags, environment variables and files: sizes, durations, ways to spin, log formats.
//!
//! One parser each, used by clap and by serde alike, so that a value means the same wherever it stands, and so that a
//! bad one is answered by the same line.

use std::{
    borrow::Cow,
    collections::BTreeMap,
    fmt::{self, Display},
    marker::PhantomData,
    ops::RangeInclusive,
    str::FromStr,
    time::Duration,
};

use serde::{Deserialize, Deserializer, de};

/// Why a value cannot be read; says what would be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{}` is not {wanted}", given.escape_debug())]
pub struct InvalidValue {
    given: String,
    wanted: Cow<'static, str>,
}

/// Makes an [`InvalidValue`] of what was given.
pub(super) fn invalid(given: &str, wanted: &'static str) -> InvalidValue {
    InvalidValue { given: given.to_owned(), wanted: wanted.into() }
}

/// Returns a parser of whole numbers in this range, whose errors name the range.
pub fn whole_number<T>(range: RangeInclusive<T>) -> impl Fn(&str) -> Result<T, InvalidValue> + Clone
where
    T: FromStr + PartialOrd + Display + Clone,
{
    move |text| {
        let digits = text.trim();
        // The standard library's parsers accept a sign, which is refused here.
        let number = digits.parse().ok().filter(|_| digits.bytes().all(|b| b.is_ascii_digit()));
        number.filter(|number| range.contains(number)).ok_or_else(|| {
            let wanted = format!("a whole number from {} to {}", range.start(), range.end());
            InvalidValue { given: text.to_owned(), wanted: wanted.into() }
        })
    }
}

/// A number of bytes: `4096`, `64k`, `64KiB`, `80MiB`, `1g`. Units are powers of 1024 and their case does not matter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

/// Units of a [`ByteSize`], the largest first.
const SIZES: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

impl ByteSize {
    /// So many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// So many MiB. Saturates.
    pub const fn mib(mib: u64) -> Self {
        Self(mib.saturating_mul(1 << 20))
    }

    /// The number of bytes.
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl FromStr for ByteSize {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        let error = || invalid(text, "a size: give bytes, or a number with k, m or g, such as 80MiB");
        let (number, unit) = split_unit(text);
        let factor = match unit.to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kb" | "kib" => 1 << 10,
            "m" | "mb" | "mib" => 1 << 20,
            "g" | "gb" | "gib" => 1 << 30,
            "t" | "tb" | "tib" => 1 << 40,
            _ => return Err(error()),
        };
        let number: u64 = number.parse().map_err(|_| error())?;
        number.checked_mul(factor).map(Self).ok_or_else(error)
    }
}

impl fmt::Display for ByteSize {
    /// In the largest unit that divides it, so that what is printed can be read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SIZES.iter().find(|(_, factor)| self.0 != 0 && self.0.is_multiple_of(*factor)) {
            Some((unit, factor)) => write!(f, "{}{unit}", self.0 / factor),
            None => write!(f, "{}", self.0),
        }
    }
}

/// Units of a duration, in nanoseconds, the largest first.
const TIMES: [(&str, u64); 6] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Reads `10ms`, `1.5s`, `2m` or a plain `0`.
pub fn parse_duration(text: &str) -> Result<Duration, InvalidValue> {
    let error = || invalid(text, "a duration: give a number with ns, us, ms, s, m or h, such as 1.5s");
    let (number, unit) = split_unit(text);
    let factor = match unit {
        "" if number == "0" => 1,
        "µs" | "μs" => 1_000,
        _ => TIMES.iter().find(|(name, _)| *name == unit).ok_or_else(error)?.1,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    // Nine digits are as fine as a nanosecond of the second gets; `is_ascii_digit` keeps a sign out.
    if fraction.is_empty() || fraction.len() > 9 || !fraction.bytes().all(|b| b.is_ascii_digit()) {
        return Err(error());
    }
    let whole: u64 = whole.parse().map_err(|_| error())?;
    let part: u64 = fraction.parse().map_err(|_| error())?;
    let nanos = u128::from(whole) * u128::from(factor)
        + u128::from(part) * u128::from(factor) / 10_u128.pow(fraction.len() as u32);
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| error())
}

/// Writes a duration in the largest unit that divides it, so that [`parse_duration`] reads it back.
pub fn format_duration(duration: Duration) -> String {
    let nanos = duration.as_nanos();
    match TIMES.iter().find(|(_, factor)| nanos != 0 && nanos.is_multiple_of(u128::from(*factor))) {
        Some((unit, factor)) => format!("{}{unit}", nanos / u128::from(*factor)),
        None => "0".to_owned(),
    }
}

/// The number and what follows it, with no space around either.
fn split_unit(text: &str) -> (&str, &str) {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    (number, unit.trim_start())
}

/// Reads `true` or `false`, or another word for one of them.
pub fn parse_flag(text: &str) -> Result<bool, InvalidValue> {
    match text.to_ascii_lowercase().as_str() {
        "true" | "t" | "yes" | "y" | "on" | "1" => Ok(true),
        "false" | "f" | "no" | "n" | "off" | "0" => Ok(false),
        _ => Err(invalid(text, "true or false")),
    }
}

/// How long a process looks for work before it sleeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Spin {
    /// About as long as a wake costs, measured at start; not at all when there are more processes than cores.
    #[default]
    Auto,
    /// Not at all: sleep at once.
    Off,
    /// This long.
    For(Duration),
}

impl FromStr for Spin {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text {
            "auto" => Ok(Self::Auto),
            "off" => Ok(Self::Off),
            _ => match parse_duration(text) {
                Ok(Duration::ZERO) => Ok(Self::Off),
                Ok(duration) => Ok(Self::For(duration)),
                Err(_) => Err(invalid(text, "a way to spin: give auto, off, or a duration such as 50us")),
            },
        }
    }
}

impl fmt::Display for Spin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Off => f.write_str("off"),
            Self::For(duration) => f.write_str(&format_duration(*duration)),
        }
    }
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For programs: one JSON object a line.
    Json,
}

impl FromStr for LogFormat {
    type Err = InvalidValue;

    fn from_str(text: &str) -> Result<Self, InvalidValue> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(invalid(text, "a log format: give text or json")),
        }
    }
}

impl fmt::Display for LogFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
        })
    }
}

/// Reads a value with `parse`. A bare number is read as if it were in quotes: `arena = 4096` is as good as `"4096"`. So are
/// `true` and `false`, so that `parse` answers whatever is given.
pub(super) fn from_text<'de, D, T>(source: D, parse: impl Fn(&str) -> Result<T, InvalidValue>) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
{
    struct Text<T, F>(F, PhantomData<T>);

    impl<'de, T, F: Fn(&str) -> Result<T, InvalidValue>> de::Visitor<'de> for Text<T, F> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("one value belongs here, such as a number or a text in quotes")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            (self.0)(text).map_err(E::custom)
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_i128<E: de::Error>(self, number: i128) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_u128<E: de::Error>(self, number: u128) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_f64<E: de::Error>(self, number: f64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_bool<E: de::Error>(self, value: bool) -> Result<T, E> {
            self.visit_str(if value { "true" } else { "false" })
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, _: A) -> Result<T, A::Error> {
            Err(de::Error::custom("a list stands where one value belongs"))
        }

        fn visit_map<A: de::MapAccess<'de>>(self, _: A) -> Result<T, A::Error> {
            Err(de::Error::custom("a table or date stands where one value belongs"))
        }
    }

    source.deserialize_any(Text(parse, PhantomData))
}

/// For `#[serde(deserialize_with)]`.
pub(super) fn text<'de, D: Deserializer<'de>>(source: D) -> Result<String, D::Error> {
    from_text(source, |text| Ok(text.to_owned()))
}

/// For `#[serde(deserialize_with)]`.
pub(super) fn flag<'de, D: Deserializer<'de>>(source: D) -> Result<bool, D::Error> {
    from_text(source, parse_flag)
}

/// For `#[serde(deserialize_with)]`.
pub(super) fn some_flag<'de, D: Deserializer<'de>>(source: D) -> Result<Option<bool>, D::Error> {
    flag(source).map(Some)
}

/// For `#[serde(deserialize_with)]`.
pub(super) fn duration<'de, D: Deserializer<'de>>(source: D) -> Result<Duration, D::Error> {
    from_text(source, parse_duration)
}

/// For `#[serde(deserialize_with)]`.
pub(super) fn some_duration<'de, D: Deserializer<'de>>(source: D) -> Result<Option<Duration>, D::Error> {
    duration(source).map(Some)
}

/// For `#[serde(deserialize_with)]`.
pub(super) fn some_size<'de, D: Deserializer<'de>>(source: D) -> Result<Option<ByteSize>, D::Error> {
    ByteSize::deserialize(source).map(Some)
}

/// Reads names with their values, for `#[serde(deserialize_with)]`.
pub(super) fn variables<'de, D: Deserializer<'de>>(source: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Value(String);

    impl<'de> Deserialize<'de> for Value {
        fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
            text(source).map(Value)
        }
    }

    struct Variables;

    impl<'de> de::Visitor<'de> for Variables {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("give a table of names and values, such as { DEVICE = \"{worker}\" }")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut entries: A) -> Result<Self::Value, A::Error> {
            let mut variables = BTreeMap::new();
            while let Some((name, Value(value))) = entries.next_entry()? {
                variables.insert(name, value);
            }
            Ok(variables)
        }
    }

    source.deserialize_any(Variables)
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        from_text(source, str::parse)
    }
}

impl<'de> Deserialize<'de> for Spin {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        from_text(source, str::parse)
    }
}

impl<'de> Deserialize<'de> for LogFormat {
    fn deserialize<D: Deserializer<'de>>(source: D) -> Result<Self, D::Error> {
        from_text(source, str::parse)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::Listen, *};

    #[test]
    fn numbers_are_whole_and_in_their_range() {
        let parse = whole_number(1..=1000_u16);
        for (text, number) in [("1", 1), ("1000", 1000), (" 7 ", 7), ("007", 7)] {
            assert_eq!(parse(text), Ok(number), "{text}");
        }
        for text in ["", "0", "1001", "65536", "99999999999999999999", "-1", "+1", "1.0", "1e2", "0x1", "1k", "x", "١"]
        {
            let wanted = format!("`{text}` is not a whole number from 1 to 1000");
            assert_eq!(parse(text).map_err(|error| error.to_string()), Err(wanted));
        }
        assert_eq!(whole_number(0..=u64::MAX)("18446744073709551615"), Ok(u64::MAX));
    }

    #[test]
    fn flags_are_read() {
        for (text, flag) in [("true", true), ("FALSE", false), ("yes", true), ("off", false), ("1", true), ("0", false)]
        {
            assert_eq!(parse_flag(text), Ok(flag), "{text}");
        }
        for text in ["", "maybe", "2", "tru"] {
            let wanted = format!("`{text}` is not true or false");
            assert_eq!(parse_flag(text).map_err(|error| error.to_string()), Err(wanted));
        }
    }

    #[test]
    fn sizes_are_read_in_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("64", 64),
            ("64b", 64),
            ("64k", 64 << 10),
            ("64KB", 64 << 10),
            ("64KiB", 64 << 10),
            ("64 kib", 64 << 10),
            (" 80MiB ", 80 << 20),
            ("1g", 1 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize::new(bytes)), "{text}");
        }
        for text in ["", "k", "-1", "+1", "1.5g", "1x", "0x10", "1kk", "99999999999g", "18446744073709551616"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
    }

    #[test]
    fn durations_are_read_exactly() {
        for (text, nanos) in [
            ("0", 0),
            ("0s", 0),
            ("7ns", 7),
            ("10us", 10_000),
            ("10µs", 10_000),
            ("10ms", 10_000_000),
            ("1.5s", 1_500_000_000),
            ("0.000000001s", 1),
            ("30s", 30_000_000_000),
            ("2m", 120_000_000_000),
            ("1h", 3_600_000_000_000),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_nanos(nanos)), "{text}");
        }
        for text in ["", "5", "s", "-1s", "1.s", ".5s", "1.2.3s", "1.+5s", "0.0000000001s", "1d", "6000000h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn spin_and_log_format_are_read() {
        assert_eq!("auto".parse(), Ok(Spin::Auto));
        assert_eq!("off".parse(), Ok(Spin::Off));
        assert_eq!("0".parse(), Ok(Spin::Off));
        assert_eq!("50us".parse(), Ok(Spin::For(Duration::from_micros(50))));
        assert_eq!("json".parse(), Ok(LogFormat::Json));
        assert_eq!(
            "on".parse::<Spin>().map_err(|e| e.to_string()),
            Err("`on` is not a way to spin: give auto, off, or a duration such as 50us".to_owned())
        );
        assert!("xml".parse::<LogFormat>().is_err());
    }

    proptest! {
        #[test]
        fn what_a_size_prints_is_read_back(bytes in any::<u64>(), shift in 0_u32..64) {
            // Shifted, so that the round numbers that get a unit come up too.
            let size = ByteSize::new(bytes >> shift << shift);
            prop_assert_eq!(size.to_string().parse::<ByteSize>(), Ok(size));
        }

        #[test]
        fn what_a_duration_prints_is_read_back(nanos in any::<u64>(), unit in 0_usize..TIMES.len()) {
            let duration = Duration::from_nanos(nanos - nanos % TIMES[unit].1);
            prop_assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
        }

        #[test]
        fn no_text_breaks_the_parsers(text in "\\PC{0,12}") {
            let _ = (text.parse::<ByteSize>(), parse_duration(&text), text.parse::<Spin>());
            let _ = (text.parse::<Listen>(), whole_number(0..=u8::MAX)(&text));
        }
    }
}
