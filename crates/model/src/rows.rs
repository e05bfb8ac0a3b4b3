//! What comes of a step: rows of logits, whole or as many of the likeliest tokens as somebody needs.

use kvasir_types::TokenId;

/// So many of the likeliest tokens are listed where a row need not be whole; all, of a smaller vocabulary.
pub const LIKELIEST: usize = 256;

/// The rows of logits that were asked for: input by input in the batch's order, and position by position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logits {
    /// Length of a row.
    pub vocab: usize,
    /// All rows, one after the other.
    pub rows: Vec<f32>,
}

impl Logits {
    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len().checked_div(self.vocab).unwrap_or(0)
    }

    /// Whether no input asked for logits.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The rows in order.
    pub fn iter(&self) -> impl Iterator<Item = &[f32]> {
        self.rows.chunks_exact(self.vocab.max(1))
    }
}

/// How much of a row somebody needs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Need {
    /// All of it.
    #[default]
    Whole,
    /// The likeliest tokens.
    Likeliest,
    /// The tokens that a draw may choose: those for which logit × `scale` + `G` is greatest, `G` the standard Gumbel value
    /// −ln(−ln u) of the token's random number u = (b + ½) / 2⁵², b the upper 52 bits of
    /// [`kvasir_types::mix`]`(noise + (token + 1) × 0x9e3779b97f4a7c15)`.
    Drawn {
        /// What the random numbers are made of.
        noise: u64,
        /// By what logits are multiplied, above 0.
        scale: f32,
    },
}

/// A token with its logit.
pub type Likely = (f32, TokenId);

/// One row.
#[derive(Debug, PartialEq)]
pub enum Row<'a> {
    /// All of it.
    Whole(&'a mut [f32]),
    /// As many as are enough.
    Few {
        /// The [`LIKELIEST`] tokens that are possible at all, in order; the lower one first of two that are as likely. Where a draw
        /// is what they are needed for, those that it may choose, in no order that matters. None where a logit is NaN or +∞.
        tokens: &'a [Likely],
        /// The largest logit of the row.
        max: f32,
    },
}

/// The same rows, some of them whole.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rows {
    vocab: usize,
    whole: Vec<f32>,
    few: Vec<Likely>,
    places: Vec<Place>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Whole(usize),
    Few { first: usize, count: usize, max: f32 },
}

impl Rows {
    /// None yet.
    pub fn new(vocab: usize) -> Self {
        Self { vocab, ..Self::default() }
    }

    /// One more. What is not a row's length is none.
    pub fn push_whole(&mut self, row: &[f32]) {
        if row.len() == self.vocab {
            self.places.push(Place::Whole(self.whole.len()));
            self.whole.extend_from_slice(row);
        }
    }

    /// One more, of which these tokens are enough, and the largest logit of all.
    pub fn push_few(&mut self, tokens: impl IntoIterator<Item = Likely>, max: f32) {
        let first = self.few.len();
        self.few.extend(tokens);
        self.places.push(Place::Few { first, count: self.few.len() - first, max });
    }

    /// Length of a whole row.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// One of them.
    pub fn row(&mut self, index: usize) -> Option<Row<'_>> {
        Some(match *self.places.get(index)? {
            Place::Whole(at) => Row::Whole(&mut self.whole[at..at + self.vocab]),
            Place::Few { first, count, max } => Row::Few { tokens: &self.few[first..first + count], max },
        })
    }

    /// All of them, which are whole.
    pub(crate) fn into_logits(self) -> Logits {
        debug_assert!(self.few.is_empty(), "nobody asked for less");
        Logits { vocab: self.vocab, rows: self.whole }
    }
}

impl From<Logits> for Rows {
    fn from(logits: Logits) -> Self {
        let Logits { vocab, rows: whole } = logits;
        let places = (0..whole.len().checked_div(vocab).unwrap_or(0)).map(|row| Place::Whole(row * vocab)).collect();
        Self { vocab, whole, few: Vec::new(), places }
    }
}

/// The likeliest tokens of a whole row, as [`Row::Few`] says.
pub fn likeliest(row: &[f32]) -> Vec<Likely> {
    if row.iter().any(|logit| logit.is_nan() || *logit == f32::INFINITY) {
        return Vec::new();
    }
    let possible = row.iter().zip(0..).filter(|(logit, _)| **logit > f32::NEG_INFINITY);
    let mut likeliest: Vec<Likely> = possible.map(|(&logit, token)| (logit, TokenId(token))).collect();
    likeliest.sort_by(|a, b| b.0.partial_cmp(&a.0).unwrap_or(std::cmp::Ordering::Equal));
    likeliest.truncate(LIKELIEST);
    likeliest
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_were_put_in() {
        let mut rows = Rows::new(3);
        rows.push_whole(&[1.0, 2.0, 3.0]);
        rows.push_whole(&[1.0]);
        rows.push_few([(2.0, TokenId(7)), (1.0, TokenId(1))], 2.5);
        rows.push_few([], f32::NAN);
        rows.push_whole(&[4.0, 5.0, 6.0]);
        assert_eq!((rows.len(), rows.vocab()), (4, 3));
        assert_eq!(rows.row(0), Some(Row::Whole(&mut [1.0, 2.0, 3.0])));
        assert_eq!(rows.row(1), Some(Row::Few { tokens: &[(2.0, TokenId(7)), (1.0, TokenId(1))], max: 2.5 }));
        assert!(matches!(rows.row(2), Some(Row::Few { tokens: [], .. })));
        assert_eq!(rows.row(3), Some(Row::Whole(&mut [4.0, 5.0, 6.0])));
        assert_eq!(rows.row(4), None);
        let logits = Logits { vocab: 2, rows: vec![0.0, 1.0, 2.0, 3.0] };
        let mut rows = Rows::from(logits.clone());
        assert_eq!(rows.row(1), Some(Row::Whole(&mut [2.0, 3.0])));
        assert_eq!(rows.into_logits(), logits);
    }

    #[test]
    fn the_likeliest_tokens_are_in_order_and_possible() {
        let row = [0.5, f32::NEG_INFINITY, -0.0, 2.0, 0.0, 2.0];
        let tokens: Vec<u32> = likeliest(&row).iter().map(|(_, token)| token.0).collect();
        assert_eq!(tokens, [3, 5, 0, 2, 4]);
        assert_eq!(likeliest(&[1.0, f32::NAN]), []);
        assert_eq!(likeliest(&vec![0.0; 1000]).len(), LIKELIEST);
    }
}
