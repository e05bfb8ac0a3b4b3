//! The law of the fast products: right within bf16's rounding of activations, and the same bits from every variant, in
//! every group.

use proptest::prelude::*;

use super::{emulated, *};
use crate::cpu::kernels::{
    elementwise::pack,
    tests::{Stored, bits, dtypes, floats, stored},
};

/// Activations, matrix, tokens, rows, columns.
fn products() -> impl Strategy<Value = (Vec<f32>, Stored, usize, usize, usize)> {
    (prop_oneof![1usize..14, 17usize..40], 1usize..40, 1usize..140).prop_flat_map(|(tokens, rows, cols)| {
        (floats(tokens * cols), floats(rows * cols), dtypes().prop_filter("exact in bf16", |dtype| takes(*dtype)))
            .prop_map(move |(x, w, dtype)| (x, stored(&w, dtype), tokens, rows, cols))
    })
}

fn run(isa: Isa, x: &[f32], w: &Stored, tokens: usize, rows: usize, cols: usize) -> Vec<f32> {
    // Everything that is to be written holds something else first.
    let mut packed = vec![Step([0x7fc1; STEP]); tokens * steps(cols)];
    pack(isa, x, cols, &mut packed);
    let mut out = vec![f32::NAN; tokens * rows];
    let matrix = Matrix::new(&w.bytes, w.dtype, rows, cols);
    // SAFETY: one thread.
    unsafe { matmul(isa, Packed::new(&packed, tokens, cols), matrix, &Output::new(&mut out), 0, rows) };
    out
}

proptest! {
    #[test]
    fn a_fast_product_is_the_exact_one_of_rounded_activations((x, w, tokens, rows, cols) in products()) {
        for isa in Isa::available() {
            let out = run(isa, &x, &w, tokens, rows, cols);
            for t in 0..tokens {
                for r in 0..rows {
                    let rounded = |k: usize| half::bf16::from_f32(x[t * cols + k]).to_f64();
                    let terms = (0..cols).map(|k| rounded(k) * f64::from(w.values[r * cols + k]));
                    let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                    let error = (f64::from(out[t * rows + r]) - sum).abs();
                    prop_assert!(error <= magnitude * 1e-6 + 1e-12, "{isa:?} [{t}][{r}]: off by {error:e} of {magnitude}");
                }
            }
        }
    }

    #[test]
    fn every_variant_and_every_group_returns_the_same_bits((x, w, tokens, rows, cols) in products()) {
        let expected = bits(&run(Isa::detect(), &x, &w, tokens, rows, cols));
        for isa in Isa::available() {
            prop_assert_eq!(&bits(&run(isa, &x, &w, tokens, rows, cols)), &expected, "{:?}", isa);
            for t in 0..tokens {
                let alone = run(isa, &x[t * cols..(t + 1) * cols], &w, 1, rows, cols);
                prop_assert_eq!(&bits(&alone), &expected[t * rows..(t + 1) * rows], "{:?}, token {} alone", isa, t);
            }
        }
    }

    /// Numbers of every exponent, subnormal ones included: what the hardware flushes, we flush.
    #[test]
    fn numbers_of_every_size_agree(x in prop::collection::vec(any::<u32>(), 64), w in prop::collection::vec(any::<u16>(), 64)) {
        let x: Vec<f32> = x.into_iter().map(f32::from_bits).map(|x| if x.is_finite() { x } else { 1e-40 }).collect();
        let w: Vec<f32> = w.into_iter().map(emulated::widen).map(|w| if w.is_finite() { w } else { 1e-39 }).collect();
        let w = stored(&w, Dtype::Bf16);
        let expected = run(Isa::available().pop().unwrap(), &x, &w, 1, 1, 64);
        for isa in Isa::available() {
            let out = run(isa, &x, &w, 1, 1, 64);
            prop_assert!(bits(&out) == bits(&expected) || (out[0].is_nan() && expected[0].is_nan()), "{isa:?} {out:?} {expected:?}");
        }
    }
}

/// Lane by lane against the instruction, operands of all exponents and of tiny ones.
#[test]
#[cfg(target_arch = "x86_64")]
fn the_instruction_is_what_we_emulate() {
    if !Isa::detect().has_bf16() {
        return;
    }
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..60_000 {
        // A third: ordinary sizes; a third: any; a third: products around the smallest normal number.
        let (low, span) = [(117u64, 20u64), (0, 255), (50, 30)][round % 3];
        let mut operand = || {
            let r = random();
            ((r as u16) & 0x807f) | (((low + (r >> 32) % span) as u16) << 7)
        };
        let (x, w): ([u16; STEP], [u16; STEP]) =
            (std::array::from_fn(|_| operand()), std::array::from_fn(|_| operand()));
        let mut lanes: [f32; 16] = std::array::from_fn(|_| emulated::flush(emulated::widen(operand())));
        if round % 3 == 2 {
            lanes.iter_mut().for_each(|lane| *lane *= 1e-18);
            lanes = lanes.map(emulated::flush);
        }
        // Packing has flushed the activations; the weights are flushed when they are widened.
        let flushed = x.map(|x| if x & 0x7f80 == 0 { x & 0x8000 } else { x });
        let ours = emulated::step(lanes, &flushed, &w.map(|w| emulated::flush(emulated::widen(w))));
        // SAFETY: `has_bf16` proves the instruction.
        let theirs = unsafe { avx512::step_once(lanes, &x, &w) };
        for i in 0..16 {
            let same = ours[i].to_bits() == theirs[i].to_bits() || (ours[i].is_nan() && theirs[i].is_nan());
            assert!(
                same,
                "{:?} + {:?} · {:?}: {} here, {} there",
                lanes[i],
                &x[2 * i..2 * i + 2],
                &w[2 * i..2 * i + 2],
                ours[i],
                theirs[i]
            );
        }
    }
}

/// This thread's time on a processor: others may be at work beside a measurement.
fn cpu_seconds() -> f64 {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("Linux counts it");
    text.split(' ').next().and_then(|nanos| nanos.parse::<f64>().ok()).expect("nanoseconds first") / 1e9
}

#[test]
#[ignore = "a measurement: cargo test --release -p kvasir-model --lib speed_of_fast -- --ignored --nocapture"]
fn speed_of_fast_products() {
    let (isa, peak) = (Isa::detect(), crate::cpu::limits::peak_bf16(1).unwrap_or(f64::NAN));
    // Shapes of qwen3-0.6b, a panel at a time as `Linear` cuts them: panels of one large matrix, so that weights come from
    // where they come from in a model.
    for (tokens, cols, panel) in [
        (256, 1024, 64),
        (128, 2048, 32),
        (64, 3072, 16),
        (128, 3072, 16),
        (16, 1024, 64),
        (8, 1024, 64),
        (4, 1024, 64),
        (16, 3072, 16),
        (1, 1024, 64),
        (1, 3072, 16),
    ] {
        let rows = if tokens > 32 { 3072 } else { (64 << 20) / cols / panel * panel };
        let x: Vec<f32> = (0..tokens * cols).map(|i| (i % 17) as f32 - 8.0).collect();
        let w = vec![Step([0x3f80; STEP]); rows * cols / STEP];
        // SAFETY: plain numbers.
        let bytes = unsafe { std::slice::from_raw_parts(w.as_ptr().cast(), rows * cols * 2) };
        let mut packed = vec![Step::default(); tokens * steps(cols)];
        pack(isa, &x, cols, &mut packed);
        let mut out = vec![0.0; tokens * rows];
        let matrix = Matrix::new(bytes, Dtype::Bf16, rows, cols);
        let best = (0..3)
            .map(|_| {
                let (start, mut rounds) = (cpu_seconds(), 0.0);
                let output = Output::new(&mut out);
                // The kernel counts in steps of a few milliseconds.
                while cpu_seconds() - start < 0.2 {
                    for row in (0..rows).step_by(panel) {
                        let (x, w) = (Packed::new(&packed, tokens, cols), matrix.slice(row, panel));
                        // SAFETY: one thread.
                        unsafe { matmul(isa, x, w, &output, row, rows) };
                    }
                    rounds += 1.0;
                }
                (cpu_seconds() - start) / rounds
            })
            .fold(f64::MAX, f64::min);
        let flops = 2.0 * (tokens * rows * cols) as f64 / best;
        let bytes = 2.0 * (rows * cols) as f64 / best;
        println!(
            "{tokens:4} x {cols}: {:6.1} GFLOP/s, {:.2} of peak, weights {:.1} GB/s",
            flops / 1e9,
            flops / peak,
            bytes / 1e9
        );
    }
}
