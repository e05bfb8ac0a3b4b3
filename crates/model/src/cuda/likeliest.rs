//! From logits on the device to what the host chooses tokens with: whole rows where it needs them, else the likeliest tokens,
//! 2 KiB instead of half a megabyte a row.

use super::{
    CudaBackend,
    abi::{self, Shortlist},
    scratch::{LISTED, Space},
};
use crate::{Error, LIKELIEST, Rows, SeqInput};

const _: () = assert!(LIKELIEST == abi::SHORTLIST, "what the kernel lists is what callers count with");

impl CudaBackend {
    /// Of each row of logits that the caller gets, whether the likeliest tokens are enough.
    pub(super) fn listed(&self, batch: &[SeqInput<'_>], few: &[bool]) -> Vec<bool> {
        // Of several ranks each has a part of the vocabulary: who puts parts together asks for whole ones.
        let can = self.config.vocab <= abi::SHORTLIST_VOCAB && self.model.output.rows == self.config.vocab;
        let of = |input: usize| can && few.get(input).copied().unwrap_or(false);
        batch.iter().enumerate().flat_map(|(input, seq)| std::iter::repeat_n(of(input), seq.rows)).collect()
    }

    /// Brings the logits to the host. `order` says which of the caller's rows each row here is.
    pub(super) fn fetch(&self, order: &[usize], few: &[bool]) -> Result<(), Error> {
        let vocab = self.model.output.rows;
        let (from, to) = (self.scratch.at(Space::Logits), self.logits.as_ptr());
        let mut first = 0;
        for run in order.chunk_by(|a, b| few[*a] == few[*b]) {
            let (at, count) = (first * vocab, run.len() * vocab);
            first += run.len();
            if !few[run[0]] {
                // SAFETY: pinned memory of this backend with room for all rows, of which these are some; read after the stream
                // was waited for.
                unsafe { self.stream.download(to.add(at).cast(), from + 4 * at as u64, 4 * count)? };
            }
        }
        if !few.contains(&true) {
            return Ok(());
        }
        // Of all rows: one launch, and most often all are wanted.
        let rows = order.len();
        let tokens = self.scratch.at(Space::Likeliest);
        let list = 4 * (rows * abi::SHORTLIST) as u64;
        let args = Shortlist {
            logits: from,
            tokens,
            values: tokens + list,
            summary: tokens + 2 * list,
            rows: rows as u32,
            vocab: vocab as u32,
            ld: vocab as u32,
            ..Shortlist::default()
        };
        self.stream.launch(self.kernels.shortlist, [rows, 1, 1], abi::SHORTLIST_THREADS, &args)?;
        // SAFETY: as above, with room for as many words of each row.
        unsafe { self.stream.download(self.likeliest.as_ptr().cast(), tokens, 4 * rows * LISTED) }
    }

    /// What was brought, in the caller's order.
    pub(super) fn rows(&mut self, order: &[usize], few: &[bool]) -> Rows {
        let (vocab, count) = (self.model.output.rows, order.len());
        let mut row_of = vec![0; count];
        order.iter().enumerate().for_each(|(row, &to)| row_of[to] = row);
        let (whole, words) = (self.logits.slice(), self.likeliest.slice());
        let mut rows = Rows::new(vocab);
        for (row, few) in row_of.into_iter().zip(few) {
            if !few {
                rows.push_whole(&whole[row * vocab..][..vocab]);
                continue;
            }
            let (tokens, rest) = words.split_at(count * abi::SHORTLIST);
            let (values, summary) = rest.split_at(count * abi::SHORTLIST);
            // What is no number, or infinite, shows in the sum.
            let sound = f32::from_bits(summary[2 * row + 1]).is_finite();
            let list = |words: &[u32]| words[row * abi::SHORTLIST..][..abi::SHORTLIST].to_vec();
            let listed =
                list(tokens).into_iter().zip(list(values)).take_while(|&(token, _)| sound && token != abi::NONE);
            rows.push_likeliest(listed.map(|(token, value)| (f32::from_bits(value), kvasir_types::TokenId(token))));
        }
        rows
    }
}
