//! Server-sent events out of bytes that come in any pieces: the part of the format that engines use.
//!
//! An event is its `data:` lines; other fields and comments are skipped. Lines end with LF, CRLF or CR LF in two pieces. What
//! is not an event yet is kept, up to a bound.

use bytes::BytesMut;

/// An event is longer than it may be.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("an event of over {limit} bytes")]
pub(crate) struct TooLong {
    limit: usize,
}

/// Reads a stream of events.
#[derive(Debug)]
pub(crate) struct Events {
    /// What came and makes no line yet.
    rest: BytesMut,
    /// How much of `rest` was looked at and has no end of line.
    seen: usize,
    /// The data of the event that is being read.
    data: Vec<u8>,
    /// Whether it has any `data:` line.
    any: bool,
    limit: usize,
}

impl Events {
    /// Of events of at most `limit` bytes.
    pub(crate) fn new(limit: usize) -> Self {
        Self { rest: BytesMut::new(), seen: 0, data: Vec::new(), any: false, limit }
    }

    /// Takes more bytes, and hands the data of each event that they complete to `event`, until that says it fails.
    pub(crate) fn push<E: From<TooLong>>(
        &mut self,
        bytes: &[u8],
        mut event: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest[self.seen..].iter().position(|&byte| byte == b'\n') {
            let line = self.rest.split_to(self.seen + end + 1);
            self.seen = 0;
            let line = &line[..line.len() - 1];
            let line = line.strip_suffix(b"\r").unwrap_or(line);
            if line.is_empty() {
                if std::mem::take(&mut self.any) {
                    let told = event(&self.data);
                    self.data.clear();
                    told?;
                }
                continue;
            }
            let Some(data) = line.strip_prefix(b"data:") else { continue };
            if std::mem::replace(&mut self.any, true) {
                self.data.push(b'\n');
            }
            self.data.extend_from_slice(data.strip_prefix(b" ").unwrap_or(data));
            self.bounded(self.data.len())?;
        }
        self.seen = self.rest.len();
        self.bounded(self.data.len() + self.seen)?;
        Ok(())
    }

    fn bounded(&self, len: usize) -> Result<(), TooLong> {
        if len > self.limit { Err(TooLong { limit: self.limit }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(events: &mut Events, bytes: &[u8]) -> Result<Vec<String>, TooLong> {
        let mut told = Vec::new();
        events.push(bytes, |data| {
            told.push(String::from_utf8_lossy(data).into_owned());
            Ok::<(), TooLong>(())
        })?;
        Ok(told)
    }

    #[test]
    fn only_data_makes_an_event() {
        let text = b": hello\n\ndata: {\"a\": 1}\n\nevent: x\r\ndata:b\r\ndata: c\r\nid: 7\r\n\r\nretry: 5\n\ndata: [DONE]\n\n";
        assert_eq!(read(&mut Events::new(100), text).unwrap(), ["{\"a\": 1}", "b\nc", "[DONE]"]);
        assert!(read(&mut Events::new(100), b"data: never ended\n").unwrap().is_empty());
    }

    #[test]
    fn what_never_ends_is_not_kept_for_ever() {
        let mut events = Events::new(64);
        let read = |events: &mut Events, bytes: &[u8]| read(events, bytes);
        let error = (0..100).find_map(|_| read(&mut events, b"data").err()).unwrap();
        assert_eq!(error.to_string(), "an event of over 64 bytes");
        let mut events = Events::new(64);
        assert!((0..100).any(|_| read(&mut events, b"data: x\n").is_err()), "lines of one event add up");
        let mut events = Events::new(64);
        assert!((0..100).all(|_| read(&mut events, b"data: x\n\n").is_ok()), "events don't");
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            parts in prop::collection::vec(prop_oneof![Just("data: a"), Just("data:b"), Just("\n"), Just("\r\n"), Just("\n\n"), Just(": c"), Just("x")], 0..40),
            cuts in prop::collection::vec(0usize..200, 0..10),
        ) {
            let text = parts.concat();
            let whole = read(&mut Events::new(1000), text.as_bytes()).unwrap();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(text.len())).collect();
            cuts.extend([0, text.len()]);
            cuts.sort_unstable();
            let mut events = Events::new(1000);
            let mut pieces = Vec::new();
            for cut in cuts.windows(2) {
                pieces.extend(read(&mut events, &text.as_bytes()[cut[0]..cut[1]]).unwrap());
            }
            prop_assert_eq!(pieces, whole);
        }

        #[test]
        fn no_bytes_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 0..20)) {
            let mut events = Events::new(256);
            for piece in pieces {
                if read(&mut events, &piece).is_err() {
                    break;
                }
                prop_assert!(events.rest.len() + events.data.len() <= 256 + 60);
            }
        }
    }
}
