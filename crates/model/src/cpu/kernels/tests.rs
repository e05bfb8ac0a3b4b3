//! The law of the directory, checked: right within rounding against `f64`, and the same bits from every variant, in every
//! tile.

use proptest::prelude::*;

use super::{elementwise::exp, *};

/// A matrix of one dtype with its exact values.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    pub(super) bytes: Vec<u8>,
    pub(super) values: Vec<f32>,
    pub(super) dtype: Dtype,
}

pub(super) fn stored(values: &[f32], dtype: Dtype) -> Stored {
    let mut bytes = Vec::new();
    for &value in values {
        match dtype {
            Dtype::Bf16 => bytes.extend(half::bf16::from_f32(value).to_le_bytes()),
            Dtype::F16 => bytes.extend(half::f16::from_f32(value).to_le_bytes()),
            Dtype::F32 => bytes.extend(value.to_le_bytes()),
            Dtype::I8 => bytes.push((value * 31.0).round() as i8 as u8),
            Dtype::F8 => bytes.push(crate::weights::fp8::from_f32(value)),
        }
    }
    let mut exact = vec![0.0; values.len()];
    crate::weights::widen(&bytes, dtype, &mut exact);
    Stored { bytes, values: exact, dtype }
}

pub(super) fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(vec![Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::I8, Dtype::F8])
}

pub(super) fn floats(len: usize) -> impl Strategy<Value = Vec<f32>> {
    prop::collection::vec(-4.0f32..4.0, len)
}

/// Activations, matrix, tokens, rows, columns.
fn products() -> impl Strategy<Value = (Vec<f32>, Stored, usize, usize, usize)> {
    (1usize..14, 1usize..14, 1usize..70, dtypes()).prop_flat_map(|(tokens, rows, cols, dtype)| {
        (floats(tokens * cols), floats(rows * cols)).prop_map(move |(x, w)| (x, stored(&w, dtype), tokens, rows, cols))
    })
}

/// What computes products: variant, activations, matrix, tokens, rows, columns.
pub(super) type Run = fn(Isa, &[f32], &Stored, usize, usize, usize) -> Vec<f32>;

/// In every variant the products are the exact ones of `x`, as `run` takes it, within rounding.
pub(super) fn are_exact(
    run: Run,
    x: &[f32],
    taken: impl Fn(f32) -> f64,
    w: &Stored,
    [tokens, rows, cols]: [usize; 3],
) -> Result<(), TestCaseError> {
    for isa in Isa::available() {
        let out = run(isa, x, w, tokens, rows, cols);
        for t in 0..tokens {
            for r in 0..rows {
                let terms = (0..cols).map(|k| taken(x[t * cols + k]) * f64::from(w.values[r * cols + k]));
                let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                let error = (f64::from(out[t * rows + r]) - sum).abs();
                prop_assert!(error <= magnitude * 1e-6 + 1e-12, "{isa:?} [{t}][{r}]: off by {error:e} of {magnitude}");
            }
        }
    }
    Ok(())
}

/// Every variant gives the same bits, for all tokens and for each of them alone.
pub(super) fn are_the_same(
    run: Run,
    x: &[f32],
    w: &Stored,
    [tokens, rows, cols]: [usize; 3],
) -> Result<(), TestCaseError> {
    let expected = bits(&run(Isa::detect(), x, w, tokens, rows, cols));
    for isa in Isa::available() {
        prop_assert_eq!(&bits(&run(isa, x, w, tokens, rows, cols)), &expected, "{:?}", isa);
        for t in 0..tokens {
            let alone = run(isa, &x[t * cols..(t + 1) * cols], w, 1, rows, cols);
            prop_assert_eq!(&bits(&alone), &expected[t * rows..(t + 1) * rows], "{:?}, token {} alone", isa, t);
        }
    }
    Ok(())
}

fn run(isa: Isa, x: &[f32], w: &Stored, tokens: usize, rows: usize, cols: usize) -> Vec<f32> {
    let mut out = vec![f32::NAN; tokens * rows];
    let matrix = Matrix::new(&w.bytes, w.dtype, rows, cols);
    // SAFETY: one thread.
    unsafe { matmul(isa, Rows::new(x, cols, tokens), matrix, &Output::new(&mut out), 0, rows) };
    out
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

proptest! {
    #[test]
    fn a_product_is_the_exact_one_within_rounding((x, w, tokens, rows, cols) in products()) {
        are_exact(run, &x, f64::from, &w, [tokens, rows, cols])?;
    }

    #[test]
    fn every_variant_and_every_tile_returns_the_same_bits((x, w, tokens, rows, cols) in products()) {
        are_the_same(run, &x, &w, [tokens, rows, cols])?;
    }

    /// Blocks of weights that share a scale: right, the same bits in every variant, token by token and from any row on.
    #[test]
    fn blocks_of_weights_are_scaled_alike_by_every_variant(
        (tokens, rows, cols) in (1usize..8, 1usize..300, 1usize..300),
        dtype in dtypes(),
        seed in any::<u64>(),
        from in any::<prop::sample::Index>(),
    ) {
        let number = |i: usize| (((i as u64 + 1).wrapping_mul(seed | 1) >> 33) as f32 / (1u64 << 30) as f32) - 1.0;
        let x: Vec<f32> = (0..tokens * cols).map(number).collect();
        let w = stored(&(0..rows * cols).map(|i| number(i + 7919)).collect::<Vec<_>>(), dtype);
        let across = cols.div_ceil(BLOCK);
        let scale: Vec<f32> = (0..rows.div_ceil(BLOCK) * across).map(|i| 1.5 + number(i + 104_729)).collect();
        let matrix = Matrix::new(&w.bytes, dtype, rows, cols).with_blocks(&scale, 0);
        let run = |isa, x: &[f32], first: usize| {
            let (tokens, part) = (x.len() / cols, matrix.slice(first, rows - first));
            let mut out = vec![f32::NAN; tokens * (rows - first)];
            // SAFETY: one thread.
            unsafe { matmul(isa, Rows::new(x, cols, tokens), part, &Output::new(&mut out), 0, rows - first) };
            out
        };
        let expected = run(Isa::detect(), &x, 0);
        for t in 0..tokens {
            for r in 0..rows {
                let terms = (0..cols).map(|k| {
                    let scale = f64::from(scale[r / BLOCK * across + k / BLOCK]);
                    f64::from(x[t * cols + k]) * f64::from(w.values[r * cols + k]) * scale
                });
                let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs()));
                prop_assert!((f64::from(expected[t * rows + r]) - sum).abs() <= magnitude * 1e-6 + 1e-12);
            }
        }
        let first = from.index(rows);
        for isa in Isa::available() {
            prop_assert_eq!(bits(&run(isa, &x, 0)), bits(&expected));
            for t in 0..tokens {
                let alone = run(isa, &x[t * cols..(t + 1) * cols], first);
                prop_assert_eq!(bits(&alone), bits(&expected[t * rows + first..(t + 1) * rows]));
            }
        }
    }

    #[test]
    fn values_add_up_the_same_in_any_cut(
        (rows, tokens, dim, dtype) in (1usize..14, 1usize..40, 1usize..70, dtypes()),
        seed in any::<u64>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let number = |i: usize| (((i as u64 + 1).wrapping_mul(seed | 1) >> 33) as f32 / (1u64 << 30) as f32) - 1.0;
        let p: Vec<f32> = (0..rows * tokens).map(number).collect();
        let v = stored(&(0..tokens * dim).map(|i| number(i + 7919)).collect::<Vec<_>>(), dtype);
        let matrix = Matrix::new(&v.bytes, dtype, tokens, dim);
        let mut expected = vec![0.0f32; rows * dim];
        for r in 0..rows {
            for j in 0..tokens {
                for d in 0..dim {
                    expected[r * dim + d] = p[r * tokens + j].mul_add(v.values[j * dim + d], expected[r * dim + d]);
                }
            }
        }
        let cut = cut.index(tokens);
        for isa in Isa::available() {
            let mut acc = vec![0.0; rows * dim];
            accumulate(isa, Rows::new(&p, tokens, rows), matrix.slice(0, cut), &mut acc);
            accumulate(isa, Rows::new(&p[cut..], tokens, rows), matrix.slice(cut, tokens - cut), &mut acc);
            prop_assert_eq!(bits(&acc), bits(&expected), "{:?}", isa);
        }
    }

    #[test]
    fn elementwise_variants_agree_and_are_right(x in prop::collection::vec(-20.0f32..20.0, 1..100), eps in 1e-6f32..1e-3) {
        let weight: Vec<f32> = x.iter().map(|x| x * 0.01 + 1.0).collect();
        let mut all = Vec::new();
        for isa in Isa::available() {
            let mut normed = vec![0.0; x.len()];
            rms_norm(isa, &x, &weight, eps, &mut normed);
            let mut gated = x.clone();
            silu_mul(isa, &mut gated, &weight);
            let (mut scores, mut max, mut sum, mut acc) = (x.clone(), 1.0, 2.0, weight.clone());
            softmax_step(isa, &mut scores, &mut max, &mut sum, &mut acc);
            all.push((bits(&normed), bits(&gated), bits(&scores), bits(&acc), max.to_bits(), sum.to_bits()));

            let mean = x.iter().map(|&x| f64::from(x).powi(2)).sum::<f64>() / x.len() as f64;
            let largest = x.iter().copied().fold(1.0f32, f32::max);
            prop_assert_eq!(max, largest);
            let mut total = 2.0 * f64::from(1.0 - largest).exp();
            for i in 0..x.len() {
                let exact = f64::from(x[i]);
                let expected = exact / (mean + f64::from(eps)).sqrt() * f64::from(weight[i]);
                prop_assert!((f64::from(normed[i]) - expected).abs() <= expected.abs() * 1e-5);
                let expected = exact / (1.0 + (-exact).exp()) * f64::from(weight[i]);
                prop_assert!((f64::from(gated[i]) - expected).abs() <= expected.abs() * 1e-5 + 1e-12);
                let expected = (exact - f64::from(largest)).exp();
                prop_assert!((f64::from(scores[i]) - expected).abs() <= expected * 1e-5);
                total += expected;
            }
            prop_assert!((f64::from(sum) - total).abs() <= total * 1e-5);
        }
        prop_assert!(all.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn exp_is_within_two_units_in_the_last_place() {
    let mut worst = 0.0f64;
    for i in 0..2_000_000 {
        let x = -87.0 + i as f32 * (175.0 / 2_000_000.0);
        let exact = f64::from(x).exp();
        let unit = f64::from(f32::EPSILON) * exact; // at least one unit of the result's binade
        worst = worst.max((f64::from(exp(x)) - exact).abs() / unit);
    }
    assert!(worst <= 2.0, "{worst}");
}

#[test]
fn exp_keeps_its_ends() {
    assert_eq!(exp(0.0), 1.0);
    assert!(exp(f32::NEG_INFINITY) < 1e-37);
    assert!(exp(f32::INFINITY).is_finite());
    assert!(exp(f32::NAN).is_nan());
}

#[test]
#[ignore = "a measurement: cargo test --release -p kvasir-model --lib speed_of -- --ignored --nocapture"]
fn speed_of_the_kernels() {
    for (tokens, rows, cols) in [(192, 576, 192), (192, 192, 576), (24, 4096, 4096), (1, 576, 192), (1, 4096, 4096)] {
        let x: Vec<f32> = (0..tokens * cols).map(|i| (i % 17) as f32 - 8.0).collect();
        let w = stored(&(0..rows * cols).map(|i| (i % 13) as f32 - 6.0).collect::<Vec<_>>(), Dtype::Bf16);
        for isa in Isa::available() {
            let flops = 2 * tokens * rows * cols;
            let repeats = if isa.as_str() == "portable" { 1 } else { (2_000_000_000 / flops).max(1) };
            let best = (0..5)
                .map(|_| {
                    let start = std::time::Instant::now();
                    for _ in 0..repeats {
                        std::hint::black_box(run(isa, &x, &w, tokens, rows, cols));
                    }
                    start.elapsed() / repeats as u32
                })
                .min()
                .unwrap();
            let gflops = flops as f64 / best.as_nanos() as f64;
            println!("{:8} {tokens:4} x {rows:4} x {cols:4}: {best:>10.1?} {gflops:6.1} GFLOP/s", isa.as_str());
        }
    }
}

proptest! {
    #[test]
    fn stored_numbers_are_the_nearest(bits in prop::collection::vec(any::<u32>(), 1..300)) {
        let x: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
        for isa in Isa::available() {
            let (mut halves, mut bytes, mut operands) = (vec![0; x.len()], vec![0; x.len()], vec![0; x.len()]);
            to_bf16(isa, &x, &mut halves);
            to_fp8(isa, &x, &mut bytes);
            to_operand(isa, &x, 1.0, &mut operands);
            for (i, &x) in x.iter().enumerate() {
                let half = half::bf16::from_f32(x).to_bits();
                prop_assert_eq!((halves[i], bytes[i]), (half, crate::weights::fp8::from_f32(x)), "{:?} of {}", isa, x);
                prop_assert_eq!(operands[i], if x.is_subnormal() { half & 0x8000 } else { half }, "{:?} of {}", isa, x);
            }
        }
    }
}
