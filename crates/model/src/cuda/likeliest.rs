//! From logits on the device to what the host chooses tokens with: whole rows where it needs them, else a list of tokens, 3 KiB
//! instead of half a megabyte a row.
//!
//! What a draw may choose is listed by logits with noise, in `f32`. The host makes the noise in `f64`, of the same bits; so its
//! choice is among those listed if the last of them is further from the first than rounding can move either.

use super::{
    CudaBackend,
    abi::{self, Perturb, Pick, Shortlist},
    scratch::{LISTED, Space},
};
use crate::{Error, LIKELIEST, Likely, Need, Rows, SeqInput};

const _: () = assert!(LIKELIEST == abi::SHORTLIST, "what the kernel lists is what callers count with");

impl CudaBackend {
    /// What is needed of each row of logits that the caller gets.
    pub(super) fn needs(&self, batch: &[SeqInput<'_>], needs: &[Need]) -> Vec<Need> {
        let mut needs = needs.to_vec();
        needs.resize(batch.iter().map(|seq| seq.rows).sum(), Need::Whole);
        if self.model.output.rows > abi::SHORTLIST_VOCAB {
            needs.fill(Need::Whole);
        }
        needs
    }

    /// Brings the logits to the host. `order` says which of the caller's rows each row here is.
    pub(super) fn fetch(&mut self, order: &[usize], needs: &[Need]) -> Result<(), Error> {
        let is_whole = |row: &usize| needs[*row] == Need::Whole;
        let mut first = 0;
        for run in order.chunk_by(|a, b| is_whole(a) == is_whole(b)) {
            if is_whole(&run[0]) {
                self.fetch_whole(first, run.len())?;
            }
            first += run.len();
        }
        if order.iter().all(is_whole) {
            return Ok(());
        }
        // Of all rows: one launch, and most often all are wanted.
        let (rows, vocab) = (order.len(), self.model.output.rows);
        let logits = self.scratch.at(Space::Logits);
        let mut by = logits;
        if needs.iter().any(|need| matches!(need, Need::Drawn { .. })) {
            by = self.scratch.at(Space::Noisy);
            let (noise, scale) = self.noise.slice()[..2 * rows].split_at_mut(rows);
            for (row, &to) in order.iter().enumerate() {
                let drawn = match needs[to] {
                    Need::Drawn { noise, scale } => (noise, scale),
                    Need::Whole | Need::Likeliest => (0, 0.0),
                };
                noise[row] = drawn.0;
                // Two to a word.
                let half = 32 * (row % 2);
                scale[row / 2] = scale[row / 2] & !(0xffff_ffff << half) | u64::from(drawn.1.to_bits()) << half;
            }
            let at = self.scratch.at(Space::Noise);
            // SAFETY: pinned memory of this backend, written again by its next step, which waits for this one.
            unsafe { self.stream.upload(at, self.noise.as_ptr().cast(), 16 * rows)? };
            let args = Perturb {
                logits,
                noise: at,
                scale: at + 8 * rows as u64,
                out: by,
                rows: rows as u32,
                vocab: vocab as u32,
                ld: vocab as u32,
                pad: 0,
            };
            let grid = [rows, vocab.div_ceil(abi::ROW_THREADS as usize), 1];
            self.stream.launch(self.kernels.perturb, grid, abi::ROW_THREADS, &args)?;
        }
        let tokens = self.scratch.at(Space::Likeliest);
        let list = 4 * (rows * abi::SHORTLIST) as u64;
        let (values, summary) = (tokens + 2 * list, tokens + 3 * list);
        let args = Shortlist {
            logits: by,
            tokens,
            values: tokens + list,
            summary,
            rows: rows as u32,
            vocab: vocab as u32,
            ld: vocab as u32,
            ..Shortlist::default()
        };
        self.stream.launch(self.kernels.shortlist, [rows, 1, 1], abi::SHORTLIST_THREADS, &args)?;
        let max = summary + 8 * rows as u64;
        let (rows_here, vocab) = (rows as u32, vocab as u32);
        let args = Pick { logits, tokens, values, max, rows: rows_here, vocab, ld: vocab, pad: 0 };
        self.stream.launch(self.kernels.pick, [rows, 1, 1], abi::SHORTLIST_THREADS, &args)?;
        // SAFETY: pinned memory of this backend with room for as many words of each row, read after the stream was waited for.
        unsafe { self.stream.download(self.likeliest.as_ptr().cast(), tokens, 4 * rows * LISTED) }
    }

    fn fetch_whole(&self, first: usize, count: usize) -> Result<(), Error> {
        let vocab = self.model.output.rows;
        let (at, from) = (first * vocab, self.scratch.at(Space::Logits));
        // SAFETY: pinned memory of this backend with room for all rows, of which these are some; read after the stream was
        // waited for.
        unsafe { self.stream.download(self.logits.as_ptr().add(at).cast(), from + 4 * at as u64, 4 * count * vocab) }
    }

    /// What was brought, in the caller's order.
    pub(super) fn rows(&mut self, order: &[usize], needs: &[Need]) -> Result<Rows, Error> {
        let (vocab, count) = (self.model.output.rows, order.len());
        let mut row_of = vec![0; count];
        order.iter().enumerate().for_each(|(row, &to)| row_of[to] = row);
        let mut rows = Rows::new(vocab);
        for (row, need) in row_of.into_iter().zip(needs) {
            let few = (*need != Need::Whole).then(|| self.listed(row, count, *need));
            if let Some(Some((tokens, max))) = few {
                rows.push_few(tokens, max);
                continue;
            }
            if few.is_some() {
                // The list does not tell: the row does.
                self.fetch_whole(row, 1)?;
                self.stream.wait()?;
            }
            rows.push_whole(&self.logits.slice()[row * vocab..][..vocab]);
        }
        Ok(rows)
    }

    /// The tokens that were listed of a row, and its largest logit; nothing where they may not be enough.
    fn listed(&mut self, row: usize, rows: usize, need: Need) -> Option<(Vec<Likely>, f32)> {
        let words = self.likeliest.slice();
        let list = |which: usize| &words[(which * rows + row) * abi::SHORTLIST..][..abi::SHORTLIST];
        let (tokens, listed_by, logits) = (list(0), list(1), list(2));
        let summary = &words[3 * rows * abi::SHORTLIST..];
        let max = f32::from_bits(summary[2 * rows + row]);
        // What is no number, or infinite, shows in the sum.
        let sound = f32::from_bits(summary[2 * row + 1]).is_finite();
        let count = tokens.iter().position(|&token| token == abi::NONE).unwrap_or(abi::SHORTLIST);
        if let Need::Drawn { scale, .. } = need {
            let (first, last) = (f32::from_bits(listed_by[0]), f32::from_bits(listed_by[abi::SHORTLIST - 1]));
            let rounding = 1e-3 + 1e-6 * (first.abs() + last.abs() + (max * scale).abs());
            // Sound sums may be beyond `f32` all the same, with a small temperature.
            if !sound || (count == abi::SHORTLIST && first - last <= rounding) {
                return None;
            }
        }
        let count = if sound { count } else { 0 };
        let tokens = tokens[..count].iter().zip(logits);
        let tokens = tokens.map(|(&token, &logit)| (f32::from_bits(logit), kvasir_types::TokenId(token)));
        Some((tokens.collect(), max))
    }
}
