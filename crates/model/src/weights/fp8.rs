//! 8-bit floats, OCP e4m3: sign, four bits of exponent (bias 7), three of mantissa; no infinities, one NaN of each sign.
//!
//! The largest is 448, the smallest normal one 2⁻⁶, the step below it 2⁻⁹. Every value is exact in bf16 and in f16.

/// The largest value.
pub(crate) const MAX: f32 = 448.0;

/// The value of a byte.
///
/// An `f32` with the same bits in the upper places has an exponent that is 120 too small, subnormal numbers included.
#[inline(always)]
pub(crate) fn to_f32(byte: u8) -> f32 {
    const REBIAS: f32 = f32::from_bits((120 + 127) << 23);
    let size = byte & 0x7f;
    let value = if size == 0x7f { f32::NAN } else { f32::from_bits(u32::from(size) << 20) * REBIAS };
    f32::from_bits(value.to_bits() | u32::from(byte & 0x80) << 24)
}

/// The nearest value, ties to even mantissas; what is beyond the largest becomes the largest, a NaN stays one.
#[inline(always)]
pub(crate) fn from_f32(value: f32) -> u8 {
    // Adding it leaves a number in steps of 2⁻⁹ in the low bits: rounding by the addition itself.
    const STEPS: f32 = 16_384.0;
    let bits = value.to_bits();
    let size = value.abs().min(MAX); // NaN becomes MAX, see below
    let normal = (size.to_bits() + 0x7_ffff + ((size.to_bits() >> 20) & 1)) >> 20;
    let small = (size + STEPS).to_bits() & 0xf;
    let size = if size < 0.015_625 { small } else { normal.wrapping_sub(120 << 3) & 0x7f };
    let size = if value.is_nan() { 0x7f } else { size };
    (size | (bits >> 24 & 0x80)) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_comes_back() {
        for byte in 0..=255u8 {
            let value = to_f32(byte);
            assert_eq!(value.is_nan(), byte & 0x7f == 0x7f);
            assert_eq!(from_f32(value), byte, "{value}");
        }
        assert_eq!((to_f32(0x7e), to_f32(0x08), to_f32(0x01)), (448.0, 0.015_625, 0.001_953_125));
    }

    #[test]
    fn rounding_is_to_the_nearest_and_ties_go_to_even() {
        let all: Vec<f32> = (0..0x7f).map(to_f32).collect();
        for (i, pair) in all.windows(2).enumerate() {
            let middle = (pair[0] + pair[1]) / 2.0;
            let even = if i % 2 == 0 { i } else { i + 1 };
            assert_eq!(usize::from(from_f32(middle)), even, "{middle}");
            assert_eq!(usize::from(from_f32(middle.next_down())), i);
            assert_eq!(usize::from(from_f32(middle.next_up())), i + 1);
            assert_eq!(usize::from(from_f32(-middle)), even | 0x80);
        }
        assert_eq!((from_f32(1e9), from_f32(f32::NEG_INFINITY), from_f32(f32::NAN) & 0x7f), (0x7e, 0xfe, 0x7f));
        assert_eq!((from_f32(1e-9), from_f32(-0.0)), (0, 0x80));
    }
}
