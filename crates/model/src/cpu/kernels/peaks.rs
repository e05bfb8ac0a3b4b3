//! The loops behind [`limits`](crate::cpu::limits): nothing but multiply-adds, nothing but loads.

use super::{Isa, LANES, Variant};

/// `steps` rounds of independent fused multiply-adds in registers; returns the floating-point operations done.
pub(crate) fn f32(isa: Isa, steps: usize) -> usize {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` proves its instructions.
        Variant::Avx512Bf16 | Variant::Avx512 => unsafe { x86::f32_avx512(steps) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Variant::Avx2 => unsafe { x86::f32_avx2(steps) },
        Variant::Portable => {
            let mut sums = std::hint::black_box([[1.0f32; LANES]; 4]);
            let factor = std::hint::black_box([0.5f32; LANES]);
            for _ in 0..steps {
                for sum in &mut sums {
                    for (sum, factor) in sum.iter_mut().zip(factor) {
                        *sum = sum.mul_add(factor, factor);
                    }
                }
            }
            std::hint::black_box(sums);
            steps * 4 * LANES * 2
        }
    }
}

/// The same of bf16 products; `None` where there is no instruction for them.
pub(crate) fn bf16(isa: Isa, steps: usize) -> Option<usize> {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` proves its instructions.
        Variant::Avx512Bf16 => Some(unsafe { x86::bf16_avx512(steps) }),
        _ => {
            let _ = steps;
            None
        }
    }
}

/// Touches every cache line; returns something that depends on all of them.
pub(crate) fn read(isa: Isa, bytes: &[u8]) -> u64 {
    match isa.0 {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `Isa` proves its instructions.
        Variant::Avx512Bf16 | Variant::Avx512 => unsafe { x86::read_avx512(bytes) },
        _ => {
            let mut sums = [0u64; 8];
            for line in bytes.as_chunks::<64>().0 {
                for (sum, word) in sums.iter_mut().zip(line.as_chunks::<8>().0) {
                    *sum ^= u64::from_ne_bytes(*word);
                }
            }
            sums.into_iter().fold(0, |all, sum| all ^ sum)
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::{arch::x86_64::*, hint::black_box};

    /// Sums enough to cover the latency of two multiply-adds per cycle.
    const SUMS: usize = 24;

    #[target_feature(enable = "avx512f")]
    pub(super) fn f32_avx512(steps: usize) -> usize {
        let mut sums = black_box([_mm512_set1_ps(1.0); SUMS]);
        let (a, b) = (black_box(_mm512_set1_ps(0.5)), black_box(_mm512_set1_ps(0.25)));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
        steps * SUMS * 16 * 2
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16_avx512(steps: usize) -> usize {
        let mut sums = black_box([_mm512_set1_ps(1.0); SUMS]);
        let a = black_box(_mm512_cvtne2ps_pbh(_mm512_set1_ps(0.5), _mm512_set1_ps(0.25)));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, a);
            }
        }
        black_box(sums);
        steps * SUMS * 32 * 2
    }

    #[target_feature(enable = "avx2,fma")]
    pub(super) fn f32_avx2(steps: usize) -> usize {
        const SUMS: usize = 12; // of sixteen registers
        let mut sums = black_box([_mm256_set1_ps(1.0); SUMS]);
        let (a, b) = (black_box(_mm256_set1_ps(0.5)), black_box(_mm256_set1_ps(0.25)));
        for _ in 0..steps {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(a, b, *sum);
            }
        }
        black_box(sums);
        steps * SUMS * 8 * 2
    }

    /// Four streams a thread: one alone leaves some of the memory's parallelism unused.
    #[target_feature(enable = "avx512f")]
    pub(super) fn read_avx512(bytes: &[u8]) -> u64 {
        const STREAMS: usize = 4;
        let part = bytes.len() / STREAMS / 64 * 64;
        let mut sums = [_mm512_setzero_si512(); STREAMS];
        for at in (0..part).step_by(64) {
            for (stream, sum) in sums.iter_mut().enumerate() {
                // SAFETY: 64 bytes at `at` of a part that lies inside `bytes`.
                let line = unsafe { _mm512_loadu_si512(bytes.as_ptr().add(stream * part + at).cast()) };
                *sum = _mm512_xor_si512(*sum, line);
            }
        }
        let all = sums.into_iter().fold(_mm512_setzero_si512(), |all, sum| _mm512_xor_si512(all, sum));
        _mm512_reduce_add_epi64(all) as u64
    }
}
