//! Stop strings, wherever token boundaries fall.
//!
//! The law: the answer ends as soon as one of the stop strings is complete; it and all after it are cut. If two are
//! complete at the same character, the longer one is cut. How the text came in pieces makes no difference.
//!
//! Text that could be the beginning of a stop string is held back until it is clear what it is.

/// Looks for the stop strings of one answer.
pub(crate) struct StopScanner {
    stops: Vec<String>,
    /// Not given out yet: a proper beginning of a stop string.
    held: String,
}

impl StopScanner {
    /// One for these stop strings, none of them empty.
    pub(crate) fn new(stops: Vec<String>) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        Self { stops, held: String::new() }
    }

    /// Takes new text and appends to `out` what is certainly not part of a stop string. `true`: a stop string was found
    /// and the answer is over.
    pub(crate) fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        for c in text.chars() {
            self.held.push(c);
            let complete = self.stops.iter().filter(|stop| self.held.ends_with(stop.as_str())).map(String::len).max();
            if let Some(len) = complete {
                out.push_str(&self.held[..self.held.len() - len]);
                self.held.clear();
                return true;
            }
        }
        let certain = self.held.len() - self.longest_beginning();
        out.extend(self.held.drain(..certain));
        false
    }

    /// The end: what was held back is text after all.
    pub(crate) fn finish(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
    }

    /// Bytes at the end of the held text that a stop string begins with.
    fn longest_beginning(&self) -> usize {
        let longest = self.stops.iter().map(|stop| stop.len() - 1).max().unwrap_or(0);
        let from = self.held.len().saturating_sub(longest);
        let mut starts = self.held.char_indices().map(|(at, _)| at).skip_while(|&at| at < from);
        let start = starts.find(|&at| self.stops.iter().any(|stop| stop.starts_with(&self.held[at..])));
        start.map_or(0, |at| self.held.len() - at)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The law, said plainly.
    fn cut(text: &str, stops: &[String]) -> (String, bool) {
        for (at, c) in text.char_indices() {
            let seen = &text[..at + c.len_utf8()];
            if let Some(len) = stops.iter().filter(|stop| seen.ends_with(stop.as_str())).map(String::len).max() {
                return (seen[..seen.len() - len].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn scan(pieces: &[&str], stops: &[String]) -> (String, bool) {
        let (mut scanner, mut out) = (StopScanner::new(stops.to_vec()), String::new());
        for piece in pieces {
            if scanner.push(piece, &mut out) {
                return (out, true);
            }
        }
        scanner.finish(&mut out);
        (out, false)
    }

    fn strings(texts: &[&str]) -> Vec<String> {
        texts.iter().map(|text| (*text).to_owned()).collect()
    }

    #[test]
    fn a_stop_string_over_three_pieces_is_found_and_cut() {
        assert_eq!(scan(&["one E", "N", "D two"], &strings(&["END"])), ("one ".to_owned(), true));
    }

    #[test]
    fn only_what_may_be_a_beginning_is_held_back() {
        let (mut scanner, mut out) = (StopScanner::new(strings(&["\n\nHuman:"])), String::new());
        assert!(!scanner.push("hello\n", &mut out));
        assert_eq!(out, "hello");
        assert!(!scanner.push("\nHumor", &mut out));
        assert_eq!(out, "hello\n\nHumor");
    }

    #[test]
    fn what_was_held_back_comes_out_at_the_end() {
        assert_eq!(scan(&["abcEN"], &strings(&["END"])), ("abcEN".to_owned(), false));
    }

    #[test]
    fn of_two_that_end_together_the_longer_one_is_cut() {
        assert_eq!(scan(&["xabc"], &strings(&["bc", "abc"])), ("x".to_owned(), true));
    }

    proptest! {
        #[test]
        fn however_the_pieces_fall_it_is_the_cut_of_the_whole(
            text in "[abé]{0,24}",
            stops in prop::collection::vec("[abé]{1,4}", 0..4),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let mut ends: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
            let mut at: Vec<usize> = cuts.iter().map(|cut| *cut.get(&ends)).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            ends.clear();
            let pieces: Vec<&str> = at.windows(2).map(|pair| &text[pair[0]..pair[1]]).collect();
            prop_assert_eq!(scan(&pieces, &stops), cut(&text, &stops));
        }
    }
}
