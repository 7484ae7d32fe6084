//! Results and measurements, for people and for programs.

use std::{
    fmt::Write as _,
    io::{self, Write as _},
};

use serde::Serialize;

use crate::proto::v1::{Rejection, Status, Timing, WorkResult};

/// How much of a payload a line for people shows.
const SHOWN: usize = 1000;

/// A result as a line of JSON. What is not known is null: a failed item has no payload, and of one that failed in a call
/// the server does not say who worked on it.
#[derive(Debug, Serialize)]
pub struct ResultLine<'a> {
    id: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    ok: bool,
    /// Only when it is text.
    payload: Option<&'a str>,
    payload_hex: Option<String>,
    error: Option<StatusLine<'a>>,
    attempts: Option<u32>,
    worker: Option<u32>,
    timing: Option<TimingLine>,
}

/// A status in JSON.
#[derive(Debug, Serialize)]
pub struct StatusLine<'a> {
    code: &'static str,
    reason: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    traceback: &'a str,
}

#[derive(Debug, Serialize)]
struct TimingLine {
    queued_ns: u64,
    worked_ns: u64,
    returned_ns: u64,
}

impl<'a> ResultLine<'a> {
    /// Of a result that came.
    pub fn of(result: &'a WorkResult, file: Option<&'a str>) -> Self {
        let error = result.status.as_ref().filter(|status| status.code != 0).map(StatusLine::of);
        let payload = error.is_none().then_some(&result.payload);
        Self {
            id: result.id,
            file,
            ok: error.is_none(),
            payload: payload.and_then(|payload| std::str::from_utf8(payload).ok()),
            payload_hex: payload.map(|payload| hex(payload)),
            error,
            attempts: Some(result.attempts),
            // Of an item that no worker took, 0 would be the first one.
            worker: (result.attempts > 0).then_some(result.worker),
            timing: result.timing.as_ref().map(|timing: &Timing| TimingLine {
                queued_ns: timing.queued_ns,
                worked_ns: timing.worked_ns,
                returned_ns: timing.returned_ns,
            }),
        }
    }

    /// Of a call that failed.
    pub fn failed(id: u64, status: &'a Status, file: Option<&'a str>) -> Self {
        Self {
            id,
            file,
            ok: false,
            payload: None,
            payload_hex: None,
            error: Some(StatusLine::of(status)),
            attempts: None,
            worker: None,
            timing: None,
        }
    }
}

impl<'a> StatusLine<'a> {
    fn of(status: &'a Status) -> Self {
        let Status { reason, message, traceback, .. } = status;
        Self { code: status.code_name(), reason, message, traceback }
    }
}

/// Shows on stderr where in the handler an item failed, if that is known.
pub fn say_traceback(traceback: &str) {
    if !traceback.is_empty() {
        let shown = |c: char| if c.is_control() && !matches!(c, '\n' | '\t') { '\u{fffd}' } else { c };
        let text: String = traceback.chars().map(shown).collect();
        // With no stderr there is nobody to tell.
        let _ = writeln!(io::stderr(), "{text}");
    }
}

/// A refused item in JSON.
#[derive(Debug, Serialize)]
pub struct RejectionLine<'a> {
    id: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<&'a str>,
    error: Option<StatusLine<'a>>,
}

impl<'a> RejectionLine<'a> {
    /// Of a receipt's rejection.
    pub fn of(rejection: &'a Rejection, file: Option<&'a str>) -> Self {
        Self { id: rejection.id, file, error: rejection.status.as_ref().map(StatusLine::of) }
    }
}

/// Bytes as lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The bytes as text that a terminal can show as it is.
pub fn printable(bytes: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(bytes).ok()?;
    text.chars().all(|c| !c.is_control() || matches!(c, '\n' | '\r' | '\t')).then_some(text)
}

/// A payload on one line: text with its line ends escaped, or else hexadecimal; cut when long.
pub fn on_one_line(payload: &[u8]) -> String {
    let cut = payload.len() > SHOWN;
    let mut line = match printable(payload) {
        Some(text) => {
            let shown: String = text.chars().take(SHOWN).collect();
            shown.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r").replace('\t', "\\t")
        }
        None => format!("0x{}", hex(payload.get(..SHOWN / 2).unwrap_or(payload))),
    };
    if cut {
        let _ = write!(line, "… ({} bytes)", payload.len());
    }
    line
}

/// Nanoseconds to three digits, as in `12.3 µs`.
pub fn nanos(nanos: u64) -> String {
    let value = nanos as f64;
    let (value, unit) = match nanos {
        0..1_000 => return format!("{nanos} ns"),
        1_000..1_000_000 => (value / 1e3, "µs"),
        1_000_000..1_000_000_000 => (value / 1e6, "ms"),
        _ => (value / 1e9, "s"),
    };
    let digits = match value {
        ..10.0 => 2,
        ..100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_one_line_whatever_it_is() {
        assert_eq!(on_one_line(b""), "");
        assert_eq!(on_one_line("grün\n\\".as_bytes()), "grün\\n\\\\");
        assert_eq!(on_one_line(&[0, 255]), "0x00ff");
        assert_eq!(on_one_line(b"\x1b[31m"), "0x1b5b33316d");
        assert_eq!(on_one_line(&[b'a'; 2000]), format!("{}… (2000 bytes)", "a".repeat(1000)));
        assert_eq!(on_one_line(&[0; 2000]), format!("0x{}… (2000 bytes)", "00".repeat(500)));
    }

    #[test]
    fn times_have_three_digits() {
        for (value, text) in [
            (0, "0 ns"),
            (999, "999 ns"),
            (1_000, "1.00 µs"),
            (12_345, "12.3 µs"),
            (123_456, "123 µs"),
            (1_500_000, "1.50 ms"),
            (61_000_000_000, "61.0 s"),
        ] {
            assert_eq!(nanos(value), text);
        }
    }

    #[test]
    fn a_line_of_json_tells_text_from_bytes_and_success_from_failure() {
        let json = |line: &ResultLine| serde_json::to_value(line).expect("a plain value");
        let result = WorkResult { id: 7, payload: "hi".into(), attempts: 1, worker: 3, ..Default::default() };
        let line = json(&ResultLine::of(&result, None));
        assert_eq!(line["payload"], "hi");
        assert_eq!(line["payload_hex"], "6869");
        assert_eq!((line["ok"].as_bool(), line.get("file")), (Some(true), None));

        let status =
            Status { code: 13, message: "it broke".into(), reason: "HANDLER_FAILED".into(), ..Default::default() };
        assert!(json(&ResultLine::failed(1, &status, None))["error"].get("traceback").is_none());
        let status = Status { traceback: "line 7".into(), ..status };
        let failed = WorkResult { id: 1, status: Some(status.clone()), ..Default::default() };
        let pushed = json(&ResultLine::of(&failed, Some("f")));
        assert_eq!((pushed["attempts"].as_u64(), pushed["worker"].is_null()), (Some(0), true), "no worker took it");
        let called = json(&ResultLine::failed(1, &status, Some("f")));
        assert_eq!((called["attempts"].is_null(), called["worker"].is_null()), (true, true), "it is not known");
        for line in [pushed, called] {
            let fields = [&line["payload"], &line["payload_hex"], &line["timing"]];
            assert!(fields.iter().all(|field| field.is_null()), "{line}");
            assert_eq!(line["ok"], false);
            assert_eq!(line["error"]["code"], "INTERNAL");
            assert_eq!(line["error"]["traceback"], "line 7");
            assert_eq!(line["error"]["reason"], "HANDLER_FAILED");
            assert_eq!(line["file"], "f");
        }
    }
}
