//! What a command line holds: each value alone, and the line as a whole. What is read prints as something that reads the
//! same.
#![no_main]

use std::{
    fmt::{Debug, Display},
    str::FromStr,
};

use forkring::{
    builtin::Builtin,
    config::{Affinity, ByteSize, Listen, LogFormat, PoolSpec, Spin, Variable, format_duration, parse_duration},
    fuzzing,
};

libfuzzer_sys::fuzz_target!(|text: &str| {
    comes_back::<PoolSpec>(text);
    comes_back::<ByteSize>(text);
    comes_back::<Spin>(text);
    comes_back::<LogFormat>(text);
    comes_back::<Affinity>(text);
    let _ = text.parse::<Variable>();
    let _ = text.parse::<Builtin>();
    if let Ok(duration) = parse_duration(text) {
        assert_eq!(parse_duration(&format_duration(duration)), Ok(duration));
    }
    if let Ok(address) = text.parse::<Listen>() {
        assert_eq!(address.to_string().parse(), Ok(address));
    }
    if let Err(message) = fuzzing::command_line(text.split('\0')) {
        assert!(!message.is_empty() && !message.contains('\n'), "{message:?}");
    }
});

fn comes_back<T: FromStr<Err: Debug + PartialEq> + Display + Debug + PartialEq>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        assert_eq!(value.to_string().parse(), Ok(value));
    }
}
