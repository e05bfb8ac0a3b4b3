//! A terminal that is drawn on: raw input, the alternate screen, and everything as it was before when it is over.

use std::io::{Read as _, Write as _};

use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::sync::mpsc::{Receiver, channel};

/// Keys that wait to be taken.
const KEYS: usize = 64;

/// The terminal while it is ours.
pub(super) struct Screen {
    before: Termios,
    keys: Receiver<u8>,
}

impl Screen {
    /// Takes it.
    pub(super) fn open() -> anyhow::Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)?;
        let (sender, keys) = channel(KEYS);
        // Reading blocks, so it has a thread, which ends with the process: no key, no end.
        std::thread::spawn(move || {
            let (mut stdin, mut key) = (std::io::stdin().lock(), [0]);
            while matches!(stdin.read(&mut key), Ok(1)) && sender.blocking_send(key[0]).is_ok() {}
        });
        print!("\x1b[?1049h\x1b[?25l");
        Ok(Self { before, keys })
    }

    /// The next key; none: there is no keyboard any more. Nothing is lost if the future is dropped.
    pub(super) async fn key(&mut self) -> Option<u8> {
        self.keys.recv().await
    }

    /// Draws from the top; what does not fit is cut off.
    pub(super) fn draw(&self, head: &str, body: &str) -> anyhow::Result<()> {
        // A serial line, or a terminal that nobody has told, has no size: then it is the usual one.
        let size = tcgetwinsize(std::io::stdout()).ok().filter(|size| size.ws_row > 0 && size.ws_col > 0);
        let (rows, columns) = size.map_or((24, 80), |size| (usize::from(size.ws_row), usize::from(size.ws_col)));
        let mut frame = "\x1b[H".to_owned();
        let lines: Vec<&str> = head.lines().chain(body.lines()).take(rows.max(2) - 1).collect();
        for line in lines {
            frame.extend(line.chars().take(columns.max(1)));
            frame += "\x1b[K\r\n";
        }
        frame += "\x1b[J";
        let mut out = std::io::stdout().lock();
        out.write_all(frame.as_bytes())?;
        Ok(out.flush()?)
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        print!("\x1b[?25h\x1b[?1049l");
        let _ = std::io::stdout().flush();
        // Nobody could be told; the shell sets its own modes again.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, &self.before);
    }
}
