//! An HTTP/1.1 answer, a piece at a time: status, headers, and a body by length, in chunks or up to the connection's end.
//!
//! Written for one purpose, holding thousands of answers on one core: nothing is copied but lines that are torn between two
//! pieces. Whatever a server sends, no line and no number grows without bound.

/// Longest line of a head, and of a chunk's length.
const MAX_LINE: usize = 16 << 10;
/// Most lines of a head.
const MAX_HEADERS: usize = 256;

/// An answer being read.
#[derive(Debug)]
pub(super) struct Response {
    phase: Phase,
    /// What has come of the present line, if it is torn.
    torn: Vec<u8>,
    headers: usize,
    /// 0 until the status line is there.
    status: u16,
    length: Option<u64>,
    chunked: bool,
    /// Whether the connection may carry another request after this.
    keeps: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Status,
    Headers,
    Sized(u64),
    ChunkSize,
    Chunk(u64),
    ChunkEnd,
    Trailers,
    UntilEnd,
    Done,
}

/// What is no HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not HTTP/1.1: {0}")]
pub(super) struct NotHttp(&'static str);

impl Default for Response {
    fn default() -> Self {
        Self {
            phase: Phase::Status,
            torn: Vec::new(),
            headers: 0,
            status: 0,
            length: None,
            chunked: false,
            keeps: true,
        }
    }
}

impl Response {
    /// Its status, 0 until that is there.
    pub(super) fn status(&self) -> u16 {
        self.status
    }

    /// Whether it is complete.
    pub(super) fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// Whether the connection may carry another request.
    pub(super) fn keeps(&self) -> bool {
        self.keeps && self.is_done()
    }

    /// The connection has ended: whether the answer is complete by that.
    pub(super) fn end(&mut self) -> bool {
        self.keeps = false;
        if self.phase == Phase::UntilEnd {
            self.phase = Phase::Done;
        }
        self.is_done()
    }

    /// Takes what has come; `body` gets the status and the body's bytes. Bytes after the answer's end make the connection useless.
    pub(super) fn feed(&mut self, mut bytes: &[u8], body: &mut impl FnMut(u16, &[u8])) -> Result<(), NotHttp> {
        while !bytes.is_empty() {
            match &mut self.phase {
                Phase::Done => {
                    self.keeps = false;
                    return Ok(());
                }
                Phase::UntilEnd => {
                    body(self.status, bytes);
                    return Ok(());
                }
                Phase::Sized(left) | Phase::Chunk(left) => {
                    let now = bytes.len().min(usize::try_from(*left).unwrap_or(usize::MAX));
                    let (piece, rest) = bytes.split_at(now);
                    *left -= now as u64;
                    let over = *left == 0;
                    body(self.status, piece);
                    bytes = rest;
                    if over {
                        let chunk = matches!(self.phase, Phase::Chunk(_));
                        self.phase = if chunk { Phase::ChunkEnd } else { Phase::Done };
                    }
                }
                Phase::Status | Phase::Headers | Phase::ChunkSize | Phase::ChunkEnd | Phase::Trailers => {
                    let Some(at) = bytes.iter().position(|&byte| byte == b'\n') else {
                        self.torn.extend_from_slice(bytes);
                        return if self.torn.len() > MAX_LINE { Err(NotHttp("a line without end")) } else { Ok(()) };
                    };
                    let (line, rest) = (&bytes[..at], &bytes[at + 1..]);
                    bytes = rest;
                    if self.torn.is_empty() {
                        self.line(line.strip_suffix(b"\r").unwrap_or(line))?;
                    } else {
                        let mut whole = std::mem::take(&mut self.torn);
                        whole.extend_from_slice(line);
                        if whole.len() > MAX_LINE {
                            return Err(NotHttp("too long a line"));
                        }
                        self.line(whole.strip_suffix(b"\r").unwrap_or(&whole))?;
                        whole.clear();
                        self.torn = whole;
                    }
                }
            }
        }
        Ok(())
    }

    fn line(&mut self, line: &[u8]) -> Result<(), NotHttp> {
        match self.phase {
            Phase::Status => {
                let text = std::str::from_utf8(line).map_err(|_| NotHttp("no status line"))?;
                let (version, rest) = text.split_once(' ').ok_or(NotHttp("no status line"))?;
                if !version.starts_with("HTTP/1.") {
                    return Err(NotHttp("another protocol"));
                }
                self.keeps = version != "HTTP/1.0";
                self.status = rest.get(..3).and_then(|status| status.parse().ok()).ok_or(NotHttp("no status"))?;
                self.phase = Phase::Headers;
            }
            Phase::Headers if line.is_empty() => {
                // Interim answers (100 Continue and the like) come before the one that is meant.
                self.phase = match (self.status, self.chunked, self.length) {
                    (100..=199, ..) => Phase::Status,
                    (204 | 304, ..) => Phase::Done,
                    (_, true, _) => Phase::ChunkSize,
                    (_, false, Some(0)) => Phase::Done,
                    (_, false, Some(length)) => Phase::Sized(length),
                    (_, false, None) => Phase::UntilEnd,
                };
            }
            Phase::Headers => self.header(line)?,
            Phase::ChunkSize => {
                let digits = line.split(|&byte| byte == b';').next().unwrap_or_default();
                let text = std::str::from_utf8(digits).map_err(|_| NotHttp("no chunk"))?.trim();
                let size = u64::from_str_radix(text, 16).map_err(|_| NotHttp("no chunk"))?;
                self.phase = if size == 0 { Phase::Trailers } else { Phase::Chunk(size) };
            }
            Phase::ChunkEnd if line.is_empty() => self.phase = Phase::ChunkSize,
            Phase::ChunkEnd => return Err(NotHttp("a chunk longer than it said")),
            Phase::Trailers if line.is_empty() => self.phase = Phase::Done,
            Phase::Trailers => {}
            Phase::Sized(_) | Phase::Chunk(_) | Phase::UntilEnd | Phase::Done => {}
        }
        Ok(())
    }

    fn header(&mut self, line: &[u8]) -> Result<(), NotHttp> {
        self.headers += 1;
        if self.headers > MAX_HEADERS {
            return Err(NotHttp("too many headers"));
        }
        let colon = line.iter().position(|&byte| byte == b':').ok_or(NotHttp("a header without a colon"))?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.eq_ignore_ascii_case(b"content-length") {
            let length = std::str::from_utf8(value).ok().and_then(|value| value.parse().ok());
            self.length = Some(length.ok_or(NotHttp("no length"))?);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.chunked = value.to_ascii_lowercase().ends_with(b"chunked");
        } else if name.eq_ignore_ascii_case(b"connection") && value.eq_ignore_ascii_case(b"close") {
            self.keeps = false;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNKED: &[u8] =
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nx: y\r\n\r\n5\r\nhello\r\n6;x=1\r\n world\r\n0\r\n\r\n";

    fn read(pieces: &[&[u8]]) -> Result<(Response, Vec<u8>), NotHttp> {
        let (mut response, mut body) = (Response::default(), Vec::new());
        for piece in pieces {
            response.feed(piece, &mut |_, bytes| body.extend_from_slice(bytes))?;
        }
        Ok((response, body))
    }

    #[test]
    fn however_an_answer_is_torn_it_is_the_same() {
        for cut in 0..=CHUNKED.len() {
            let (response, body) = read(&[&CHUNKED[..cut], &CHUNKED[cut..]]).unwrap();
            assert_eq!((response.status(), body.as_slice()), (200, b"hello world".as_slice()), "cut at {cut}");
            assert!(response.keeps());
        }
        let bytes: Vec<&[u8]> = CHUNKED.chunks(1).collect();
        assert_eq!(read(&bytes).unwrap().1, b"hello world");
    }

    #[test]
    fn a_body_ends_by_its_length_or_with_the_connection() {
        let (response, body) = read(&[b"HTTP/1.1 429 Slow\r\nContent-Length: 2\r\n\r\nno"]).unwrap();
        assert_eq!((response.status(), body.as_slice(), response.keeps()), (429, b"no".as_slice(), true));
        let (response, _) = read(&[b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"]).unwrap();
        assert_eq!((response.is_done(), response.keeps()), (true, false));
        let (mut response, body) = read(&[b"HTTP/1.0 200 OK\r\n\r\nall of it"]).unwrap();
        assert!(!response.is_done() && response.end() && body == b"all of it");
        let (mut response, _) = read(&[b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nhalf"]).unwrap();
        assert!(!response.end(), "broken off");
        let (response, _) = read(&[b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nab"]).unwrap();
        assert!(!response.keeps(), "what nobody asked for");
        let (response, body) = read(&[b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No\r\n\r\n"]).unwrap();
        assert_eq!((response.status(), response.is_done(), body.len()), (204, true, 0));
    }

    #[test]
    fn what_is_no_http_is_refused_and_nothing_grows_without_bound() {
        let long = vec![b'x'; MAX_LINE + 2];
        let many = [b"HTTP/1.1 200 OK\r\n".to_vec(), b"a: b\r\n".repeat(MAX_HEADERS + 1)].concat();
        for bad in [
            b"SSH-2.0-x\r\n".as_slice(),
            b"HTTP/2 200\r\n",
            b"HTTP/1.1 x\r\n",
            b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n",
            b"HTTP/1.1 200 OK\r\nno colon\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\nabc\r\n",
            &long,
            &many,
        ] {
            assert!(read(&[bad]).is_err(), "{:?}", String::from_utf8_lossy(&bad[..bad.len().min(80)]));
        }
    }
}
