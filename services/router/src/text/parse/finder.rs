//! A marker in text that comes in pieces.

/// Looks for one marker.
#[derive(Clone, Debug)]
pub(super) struct Finder {
    marker: &'static str,
    /// So many of its bytes have just been read.
    matched: usize,
}

impl Finder {
    /// One for `marker`.
    pub(super) fn new(marker: &'static str) -> Self {
        Self { marker, matched: 0 }
    }

    /// The next character. What can't be part of the marker any more goes to `out`. True if the marker ends here.
    pub(super) fn push(&mut self, c: char, out: &mut String) -> bool {
        if self.matched == 0 && !self.marker.starts_with(c) {
            out.push(c); // nearly every character
            return false;
        }
        let mut read = self.marker[..self.matched].to_owned();
        read.push(c);
        let kept = read.char_indices().map(|(at, _)| at).find(|&at| self.marker.starts_with(&read[at..]));
        let kept = kept.unwrap_or(read.len());
        out.push_str(&read[..kept]);
        self.matched = read.len() - kept;
        let found = self.matched == self.marker.len();
        if found {
            self.matched = 0;
        }
        found
    }

    /// The end, or the end of looking: what was held back.
    pub(super) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.marker[..std::mem::take(&mut self.matched)]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_is_found_wherever_it_begins() {
        for (text, rest, found) in [
            ("a<ab>b", "ab", 1),
            ("a<<ab>b", "a<b", 1),
            ("<a<ab><ab", "<a<ab", 1),
            ("<ab><ab>", "", 2),
            ("é<é", "é<é", 0),
        ] {
            let (mut finder, mut out, mut seen) = (Finder::new("<ab>"), String::new(), 0);
            for c in text.chars() {
                seen += usize::from(finder.push(c, &mut out));
            }
            finder.finish(&mut out);
            assert_eq!((out.as_str(), seen), (rest, found), "{text}");
        }
    }
}
