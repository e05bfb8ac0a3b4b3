//! The law of the kernels for products of packed pairs, and what packing does to each type.

use proptest::prelude::*;

use super::*;
use crate::cpu::kernels::tests::{Stored, bits, dtypes, floats, stored};

/// A product: `rows × inner` times `inner × cols`, and which pairs of it.
#[derive(Debug, Clone)]
struct Case {
    a: Vec<f32>,
    b: Stored,
    c: Vec<f32>,
    rows: usize,
    inner: usize,
    cols: usize,
    pairs: Range<usize>,
    fresh: bool,
}

fn cases() -> impl Strategy<Value = Case> {
    (1usize..14, 1usize..70, 1usize..150, dtypes(), any::<bool>()).prop_flat_map(|(rows, inner, cols, dtype, fresh)| {
        let pairs = inner.div_ceil(2);
        let range = (0..=pairs, 0..=pairs).prop_map(|(a, b)| a.min(b)..a.max(b));
        let c = floats(rows * cols.next_multiple_of(LANES));
        (floats(rows * inner), floats(inner * cols), c, range).prop_map(move |(a, b, c, pairs)| Case {
            a,
            b: stored(&b, dtype),
            c,
            rows,
            inner,
            cols,
            pairs,
            fresh,
        })
    })
}

/// Runs it with b packed by its rows or, transposed, by its columns.
fn run(isa: Isa, case: &Case, by_columns: bool) -> Vec<f32> {
    let Case { a, b, c, rows, inner, cols, pairs, fresh } = case;
    let size = b.dtype.bytes();
    let mut packed = Pairs::default();
    // What was there before is not to be seen.
    packed.lines.resize(4096, Line([[0x7fc0; 2]; LANES]));
    if by_columns {
        let element = |row: usize, col: usize| &b.bytes[(row * cols + col) * size..][..size];
        let columns: Vec<Vec<u8>> =
            (0..*cols).map(|col| (0..*inner).flat_map(|row| element(row, col)).copied().collect()).collect();
        let columns: Vec<&[u8]> = columns.iter().map(Vec::as_slice).collect();
        pack_columns(isa, &columns, b.dtype, *inner, &mut packed);
    } else {
        let rows: Vec<&[u8]> = b.bytes.chunks(cols * size).collect();
        pack_rows(isa, &rows, b.dtype, *cols, &mut packed);
    }
    let stride = inner.next_multiple_of(2);
    let mut left = vec![0; rows * stride];
    for (a, left) in a.chunks(*inner).zip(left.chunks_mut(stride)) {
        to_operand(isa, a, 1.0, &mut left[..*inner]);
    }
    let width = cols.div_ceil(LANES);
    let mut out = vec![Line::default(); rows * width];
    flat(&mut out).copy_from_slice(c);
    let left = Left::new(&left, stride, *rows);
    multiply(isa, left, &packed, pairs.clone(), width, Out::new(&mut out, width), *fresh);
    flat(&mut out).to_vec()
}

fn rounded(value: f32) -> f64 {
    half::bf16::from_f32(value).to_f64()
}

proptest! {
    #[test]
    fn a_product_is_the_exact_one_of_rounded_factors(case in cases()) {
        let Case { a, b, c, rows, inner, cols, pairs, fresh } = &case;
        let stride = cols.next_multiple_of(LANES);
        for isa in Isa::available() {
            let out = run(isa, &case, false);
            for (row, col) in (0..*rows).flat_map(|row| (0..*cols).map(move |col| (row, col))) {
                let start = if *fresh { 0.0 } else { f64::from(c[row * stride + col]) };
                let terms = (2 * pairs.start..(2 * pairs.end).min(*inner))
                    .map(|k| rounded(a[row * inner + k]) * rounded(b.values[k * cols + col]));
                let (sum, size) = terms.fold((start, start.abs()), |(sum, size), term| (sum + term, size + term.abs()));
                let error = (f64::from(out[row * stride + col]) - sum).abs();
                prop_assert!(error <= size * 2e-6 + 1e-12, "{isa:?} [{row}][{col}]: off by {error:e} of {size}");
            }
        }
    }

    #[test]
    fn every_variant_packing_and_row_returns_the_same_bits(case in cases()) {
        let expected = bits(&run(Isa::detect(), &case, false));
        let stride = case.cols.next_multiple_of(LANES);
        for isa in Isa::available() {
            for by_columns in [false, true] {
                prop_assert_eq!(&bits(&run(isa, &case, by_columns)), &expected, "{:?} {}", isa, by_columns);
            }
            for row in 0..case.rows {
                let alone = Case {
                    a: case.a[row * case.inner..(row + 1) * case.inner].to_vec(),
                    c: case.c[row * stride..(row + 1) * stride].to_vec(),
                    rows: 1,
                    ..case.clone()
                };
                let alone = bits(&run(isa, &alone, false));
                prop_assert_eq!(&alone, &expected[row * stride..(row + 1) * stride], "{:?}, row {} alone", isa, row);
            }
        }
    }
}
