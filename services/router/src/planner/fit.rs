//! Straight lines through what was measured: what an answer's next token costs, and what a prompt's tokens do.
//!
//! Least squares of the relative error, where what was measured lately counts more, no coefficient is below zero, and where
//! little is known a prior fills in. Pure: sums of measurements come in.

/// What is known of `y = Σ cᵢ·xᵢ`, `cᵢ ≥ 0`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit<const N: usize> {
    xx: [[f64; N]; N],
    xy: [f64; N],
    weight: f64,
}

impl<const N: usize> Default for Fit<N> {
    fn default() -> Self {
        Self { xx: [[0.0; N]; N], xy: [0.0; N], weight: 0.0 }
    }
}

/// After so many measurements, one counts half.
const HALF_LIFE: f64 = 60.0;
/// A prior counts like so many measurements.
const PRIOR: f64 = 4.0;

impl<const N: usize> Fit<N> {
    /// One more measurement. One that makes no sense is left out.
    pub fn add(&mut self, x: [f64; N], y: f64) {
        let sensible = x.iter().all(|x| x.is_finite() && *x >= 0.0) && y.is_finite() && y > 0.0;
        if !sensible || x.iter().all(|&x| x == 0.0) {
            return;
        }
        let keep = (-1.0 / HALF_LIFE).exp2();
        // Divided by what is to be explained: being wrong by a tenth is as bad for a short step as for a long one.
        let x = x.map(|x| x / y);
        for (row, &a) in self.xx.iter_mut().zip(&x) {
            for (cell, &b) in row.iter_mut().zip(&x) {
                *cell = *cell * keep + a * b;
            }
        }
        for (cell, &a) in self.xy.iter_mut().zip(&x) {
            *cell = *cell * keep + a;
        }
        self.weight = self.weight * keep + 1.0;
    }

    /// How many measurements it rests on, old ones counting less.
    pub fn weight(&self) -> f64 {
        self.weight
    }

    /// The coefficients; `None` if nothing was measured and there is no prior.
    pub fn solve(&self, prior: Option<[f64; N]>) -> Option<[f64; N]> {
        if self.weight == 0.0 {
            return prior;
        }
        let (mut xx, mut xy) = (self.xx, self.xy);
        for at in 0..N {
            // What does not vary can't be told apart from the rest: a little of the prior decides, or of nothing. The scale is
            // that of the measurements.
            let scale = if self.xx[at][at] > 0.0 { self.xx[at][at] / self.weight } else { 1.0 };
            let pull = scale * if prior.is_some() { PRIOR } else { 1e-9 * self.weight };
            xx[at][at] += pull;
            xy[at] += pull * prior.map_or(0.0, |prior| prior[at]);
        }
        let mut used = [true; N];
        loop {
            let found = eliminate(xx, xy, used)?;
            // Costs below nothing are noise: without the worst of them, again. At most N rounds.
            let worst = (0..N).filter(|&at| used[at] && found[at] < 0.0).min_by(|&a, &b| found[a].total_cmp(&found[b]));
            match worst {
                Some(at) => used[at] = false,
                None => return found.iter().all(|value| value.is_finite()).then_some(found),
            }
        }
    }
}

/// Gauss's elimination with pivots, over the unknowns that are used; the others are 0.
fn eliminate<const N: usize>(mut a: [[f64; N]; N], mut b: [f64; N], used: [bool; N]) -> Option<[f64; N]> {
    for at in (0..N).filter(|&at| !used[at]) {
        a[at] = [0.0; N];
        a.iter_mut().for_each(|row| row[at] = 0.0);
        (a[at][at], b[at]) = (1.0, 0.0);
    }
    for column in 0..N {
        let pivot = (column..N).max_by(|&x, &y| a[x][column].abs().total_cmp(&a[y][column].abs()))?;
        if a[pivot][column] == 0.0 || !a[pivot][column].is_finite() {
            return None;
        }
        a.swap(column, pivot);
        b.swap(column, pivot);
        let (row, value) = (a[column], b[column]);
        for other in (0..N).filter(|&other| other != column) {
            let factor = a[other][column] / row[column];
            for at in 0..N {
                a[other][at] -= factor * row[at];
            }
            b[other] -= factor * value;
        }
    }
    let mut found = [0.0; N];
    for at in 0..N {
        found[at] = b[at] / a[at][at];
    }
    Some(found)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn near(found: [f64; 3], expected: [f64; 3]) -> bool {
        found.iter().zip(expected).all(|(a, b)| (a - b).abs() <= 0.02 * b.abs() + 1e-9)
    }

    #[test]
    fn a_law_is_found_again_and_a_new_one_takes_its_place() {
        let mut fit = Fit::<3>::default();
        assert_eq!(fit.solve(None), None);
        assert_eq!(fit.solve(Some([1.0; 3])), Some([1.0; 3]));
        let mut learn = |law: [f64; 3], times: u32| {
            for at in 0..times {
                let x = [1.0, f64::from(at % 7 + 1), f64::from(at * 31 % 1000)];
                fit.add(x, x.iter().zip(law).map(|(x, c)| x * c).sum());
            }
            fit.solve(None).unwrap()
        };
        let (first, second) = ([0.01, 0.002, 1e-6], [0.02, 0.001, 4e-6]);
        assert!(near(learn(first, 50), first));
        assert!(near(learn(second, 2000), second));
    }

    #[test]
    fn what_never_varied_is_the_priors_and_nothing_costs_less_than_nothing() {
        let mut fit = Fit::<3>::default();
        // Always one answer of 100 tokens: only the sum is known.
        (0..1000).for_each(|_| fit.add([1.0, 1.0, 100.0], 0.03));
        let prior = [0.01, 0.01, 1e-4];
        let found = fit.solve(Some(prior)).unwrap();
        assert!((found[0] + found[1] + 100.0 * found[2] - 0.03).abs() < 1e-4, "{found:?}");
        assert!(found.iter().all(|&c| c > 0.0), "{found:?}");
        // Longer contexts that were faster.
        let mut fit = Fit::<3>::default();
        (1..100).for_each(|at| fit.add([1.0, 1.0, f64::from(at)], 0.05 / f64::from(at)));
        assert_eq!(fit.solve(None).unwrap()[2], 0.0);
        for senseless in [f64::NAN, f64::INFINITY, -1.0, 0.0] {
            let before = fit;
            fit.add([1.0, 1.0, 1.0], senseless);
            assert_eq!(fit, before);
        }
    }

    proptest! {
        #[test]
        fn whatever_is_measured_the_coefficients_are_finite_and_not_below_zero(
            all in prop::collection::vec(([0.0..1e6f64, 0.0..1e6, 0.0..1e9], 1e-9..1e6f64), 0..60),
        ) {
            let mut fit = Fit::<3>::default();
            all.into_iter().for_each(|(x, y)| fit.add(x, y));
            if let Some(found) = fit.solve(None) {
                prop_assert!(found.iter().all(|c| c.is_finite() && *c >= 0.0), "{found:?}");
            }
        }
    }
}
