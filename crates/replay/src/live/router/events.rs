//! Server-sent events out of bytes that come in any pieces.

/// Longest line: far more than a chunk with one token.
const MAX_LINE: usize = 1 << 20;

/// What a stream said next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The data of an event.
    Data(String),
    /// `[DONE]`: nothing follows.
    Done,
}

/// A line is longer than any event.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// Cuts a stream into events. Each of them is one line `data: …`, as OpenAI has it.
#[derive(Default)]
pub(super) struct Events {
    line: Vec<u8>,
}

impl Events {
    /// Takes bytes as they come, gives the events that they complete.
    pub(super) fn feed(&mut self, bytes: &[u8]) -> Result<Vec<Event>, TooLong> {
        let mut events = Vec::new();
        let mut rest = bytes;
        while let Some(end) = rest.iter().position(|&byte| byte == b'\n') {
            self.line.extend_from_slice(&rest[..end]);
            rest = &rest[end + 1..];
            let line = String::from_utf8_lossy(&self.line);
            if let Some(data) = line.strip_prefix("data:") {
                events.push(match data.trim() {
                    "[DONE]" => Event::Done,
                    data => Event::Data(data.to_owned()),
                });
            }
            self.line.clear();
        }
        if self.line.len() + rest.len() > MAX_LINE {
            return Err(TooLong);
        }
        self.line.extend_from_slice(rest);
        Ok(events)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_do_not_depend_on_how_the_bytes_are_cut() {
        let text = "data: {\"a\": \"ä\"}\r\n\r\n: a comment\ndata:two\n\ndata: [DONE]\n\ndata: half".as_bytes();
        let data = |text: &str| Event::Data(text.to_owned());
        for size in 1..=text.len() {
            let mut events = Events::default();
            let found: Vec<_> = text.chunks(size).flat_map(|piece| events.feed(piece).unwrap()).collect();
            assert_eq!(found, [data("{\"a\": \"ä\"}"), data("two"), Event::Done], "cut every {size} bytes");
        }
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut events = Events::default();
        let piece = [b'x'; 1000];
        let fed = (0..2000).take_while(|_| events.feed(&piece).is_ok()).count();
        assert_eq!(fed, MAX_LINE / 1000);
    }
}
