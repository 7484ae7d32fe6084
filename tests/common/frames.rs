//! A client that writes and reads HTTP/2 frames by hand, in the order that the test wants.

use std::collections::HashMap;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

use super::{Server, soon};

/// Types of frames.
pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const WINDOW_UPDATE: u8 = 8;
/// Flags of frames.
pub const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;

/// One connection.
#[derive(Debug)]
pub struct Frames {
    stream: TcpStream,
    /// Bytes that are written together, by [`Frames::flush`] or before anything is read.
    out: Vec<u8>,
    /// How the server ended each stream that it has ended.
    ends: HashMap<u32, End>,
    /// Streams that the server reset, and the codes.
    pub resets: Vec<(u32, u32)>,
    /// A GOAWAY has come.
    is_told: bool,
    /// The fields of [`Frames::short_call`] are in the peer's table.
    is_indexed: bool,
}

/// How the server ended a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By END_STREAM.
    Answered,
    /// By RST_STREAM before END_STREAM, with this code.
    Reset(u32),
}

/// A frame that came.
#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frames {
    pub async fn connect(server: &Server) -> Self {
        let stream = TcpStream::connect(&server.addr).await.expect("a connection");
        stream.set_nodelay(true).expect("a socket");
        let mut frames = Frames {
            stream,
            out: Vec::new(),
            ends: HashMap::new(),
            resets: Vec::new(),
            is_told: false,
            is_indexed: false,
        };
        frames.out.extend(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
        frames.write(SETTINGS, 0, 0, &[]);
        frames
    }

    /// Writes a frame with the next [`Frames::flush`].
    pub fn write(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        self.out.extend(&(payload.len() as u32).to_be_bytes()[1..]);
        self.out.extend([kind, flags]);
        self.out.extend(stream.to_be_bytes());
        self.out.extend(payload);
    }

    /// Sends what was written.
    pub async fn flush(&mut self) {
        let out = std::mem::take(&mut self.out);
        soon("the server to read", self.stream.write_all(&out)).await.expect("an open connection");
    }

    /// Begins a request for this path on a stream: 1, 3, 5 and so on.
    pub fn begin(&mut self, stream: u32, path: &str, headers: &[(&str, &str)]) {
        let mut block = Vec::new();
        let pseudo = [(":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost")];
        let has_type = headers.iter().any(|(name, _)| *name == "content-type");
        let grpc = [("te", "trailers"), ("content-type", "application/grpc")];
        let grpc = &grpc[..if has_type { 1 } else { 2 }];
        for (name, value) in pseudo.iter().chain(grpc).chain(headers) {
            // Literal, not indexed, not compressed.
            block.push(0);
            for text in [name, value] {
                literal(&mut block, text);
            }
        }
        self.write(HEADERS, END_HEADERS, stream, &block);
    }

    /// Begins a call.
    pub fn call(&mut self, stream: u32) {
        self.begin(stream, "/forkring.v1.Dispatcher/Call", &[]);
    }

    pub fn data(&mut self, stream: u32, bytes: &[u8]) {
        self.write(DATA, 0, stream, bytes);
    }

    /// Begins a call by the shortest HEADERS that there can be: after the first, its fields are in the peer's table.
    pub fn short_call(&mut self, stream: u32) {
        const FIELDS: [(&str, &str); 6] = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", "/forkring.v1.Dispatcher/Call"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ];
        let mut block = Vec::new();
        if std::mem::replace(&mut self.is_indexed, true) {
            // The dynamic table begins at 62, with the latest field (RFC 7541, section 2.3.3).
            block.extend((62..62 + FIELDS.len() as u8).rev().map(|index| 0x80 | index));
        } else {
            for (name, value) in FIELDS {
                // Literal with incremental indexing.
                block.push(0x40);
                literal(&mut block, name);
                literal(&mut block, value);
            }
        }
        self.write(HEADERS, END_HEADERS, stream, &block);
    }

    /// END_STREAM in a frame of its own.
    pub fn end(&mut self, stream: u32) {
        self.write(DATA, END_STREAM, stream, &[]);
    }

    /// Trailers, which end the stream.
    pub fn trailers(&mut self, stream: u32) {
        let mut block = vec![0];
        literal(&mut block, "x-checksum");
        literal(&mut block, "1");
        self.write(HEADERS, END_HEADERS | END_STREAM, stream, &block);
    }

    pub fn window_update(&mut self, stream: u32, increment: u32) {
        self.write(WINDOW_UPDATE, 0, stream, &increment.to_be_bytes());
    }

    pub fn reset(&mut self, stream: u32) {
        const CANCEL: u32 = 8;
        self.write(RST_STREAM, 0, stream, &CANCEL.to_be_bytes());
    }

    /// Waits for the end of a stream.
    pub async fn end_of(&mut self, stream: u32) -> End {
        loop {
            if let Some(end) = self.ends.get(&stream) {
                return *end;
            }
            let frame = self.read().await.expect("an open connection");
            assert_ne!(
                frame.kind,
                GOAWAY,
                "the server ends the connection: {:?}",
                frame.payload.escape_ascii().to_string()
            );
        }
    }

    /// The same of a server that drains, and says so by GOAWAY.
    pub async fn end_while_draining(&mut self, stream: u32) -> End {
        loop {
            if let Some(end) = self.ends.get(&stream) {
                return *end;
            }
            self.read().await.expect("an open connection");
        }
    }

    /// Waits until the server has handled every frame that was sent so far.
    pub async fn settle(&mut self) {
        assert!(self.is_open().await, "the server has ended the connection");
    }

    /// The same; returns false if the server ends the connection instead.
    pub async fn is_open(&mut self) -> bool {
        self.write(PING, 0, 0, b"settled?");
        loop {
            match self.read().await {
                None => return false,
                Some(frame) if frame.kind == GOAWAY => {
                    self.is_told = true;
                    return false;
                }
                Some(frame) if frame.kind == PING && frame.flags == ACK => return true,
                Some(_) => {}
            }
        }
    }

    /// Reads up to the end of the connection. Returns whether a GOAWAY said why.
    pub async fn closed(&mut self) -> bool {
        while let Some(frame) = self.read().await {
            self.is_told |= frame.kind == GOAWAY;
        }
        self.is_told
    }

    /// How the server ended a stream, if it has.
    pub fn end_if_known(&self, stream: u32) -> Option<End> {
        self.ends.get(&stream).copied()
    }

    /// The next frame, if its beginning is there.
    pub async fn read_at_once(&mut self) -> Option<Frame> {
        let mut first = [0];
        let peeked = tokio::select! {
            biased;
            peeked = self.stream.peek(&mut first) => peeked.expect("an open connection"),
            () = std::future::ready(()) => return None,
        };
        assert_ne!(peeked, 0, "the server has closed the connection");
        self.read_without_credit().await
    }

    /// The next frame; `None` if the server has closed the connection. The server may send as much again.
    pub async fn read(&mut self) -> Option<Frame> {
        let frame = self.read_without_credit().await?;
        // The connection's window, which the tests would use up otherwise.
        if frame.kind == DATA && !frame.payload.is_empty() {
            self.window_update(0, frame.payload.len() as u32);
        }
        Some(frame)
    }

    /// The same, but the server may not send more for it.
    pub async fn read_without_credit(&mut self) -> Option<Frame> {
        if !self.out.is_empty() {
            let out = std::mem::take(&mut self.out);
            soon("the server to read", self.stream.write_all(&out)).await.ok()?;
        }
        let mut head = [0; 9];
        soon("a frame", self.stream.read_exact(&mut head)).await.ok()?;
        let len = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; len as usize];
        soon("a frame", self.stream.read_exact(&mut payload)).await.ok()?;
        let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
        let frame = Frame { kind: head[3], flags: head[4], stream, payload };
        match frame.kind {
            SETTINGS if frame.flags & ACK == 0 => self.write(SETTINGS, ACK, 0, &[]),
            DATA | HEADERS if frame.flags & END_STREAM != 0 => _ = self.ends.entry(stream).or_insert(End::Answered),
            RST_STREAM => {
                let code = frame.payload.first_chunk().map_or(0, |code| u32::from_be_bytes(*code));
                self.resets.push((stream, code));
                self.ends.entry(stream).or_insert(End::Reset(code));
            }
            _ => {}
        }
        Some(frame)
    }
}

/// A text with its length before it, as HPACK has it (RFC 7541, section 5).
fn literal(block: &mut Vec<u8>, text: &str) {
    let len = text.len();
    match len {
        0..127 => block.push(len as u8),
        _ => {
            block.push(127);
            let mut rest = len - 127;
            while rest >= 128 {
                block.push((rest % 128) as u8 | 128);
                rest /= 128;
            }
            block.push(rest as u8);
        }
    }
    block.extend(text.as_bytes());
}
