use std::cmp::Ordering;

use proptest::prelude::*;

use super::*;

fn tempered(temperature: f32, top_k: u32, top_p: f32, min_p: f32, seed: u64) -> Sampling {
    Sampling { temperature, top_k, top_p, min_p, seed, ..Sampling::default() }
}

/// What the definition says, by sorting everything: each token's probability.
fn exact(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap_or(Ordering::Equal).then(a.cmp(&b)));
    let max = f64::from(logits[order[0]]);
    let weight = |index: usize| ((f64::from(logits[index]) - max) / f64::from(sampling.temperature)).exp();
    if sampling.top_k > 0 {
        order.truncate(sampling.top_k as usize);
    }
    order.retain(|&index| weight(index) >= f64::from(sampling.min_p));
    let total: f64 = order.iter().map(|&index| weight(index)).sum();
    let mut probabilities = vec![0.0; logits.len()];
    let mut sum = 0.0;
    for index in order {
        if sampling.top_p < 1.0 && sum >= f64::from(sampling.top_p) * total {
            break;
        }
        probabilities[index] = weight(index);
        sum += weight(index);
    }
    probabilities.iter_mut().for_each(|p| *p /= sum);
    probabilities
}

/// Pearson's statistic of some draws, and the limit that a right sampler does not pass: mean + 5 standard deviations of
/// the chi-squared distribution, far less than 1 in 1000 by chance, and the seeds are fixed.
fn chi_squared(expected: &[f64], draws: impl Iterator<Item = TokenId>) -> (f64, f64) {
    let mut counts = vec![0usize; expected.len()];
    draws.for_each(|token| counts[token.0 as usize] += 1);
    let n = counts.iter().sum::<usize>() as f64;
    let (mut statistic, mut cells) = (0.0, 0.0);
    for (&count, &p) in counts.iter().zip(expected) {
        if p == 0.0 {
            assert_eq!(count, 0, "a truncated token was drawn");
        } else {
            statistic += (count as f64 - p * n).powi(2) / (p * n);
            cells += 1.0;
        }
    }
    (statistic, cells - 1.0 + 5.0 * (2.0f64 * (cells - 1.0)).sqrt())
}

const LOGITS: [f32; 8] = [1.5, -0.3, 0.0, 2.1, 0.7, -1.0, 1.5, 0.2];

#[test]
fn draws_follow_the_exact_distribution_over_positions_and_over_seeds() {
    for (temperature, top_k, top_p, min_p) in [
        (1.0, 0, 1.0, 0.0),
        (0.6, 0, 1.0, 0.0),
        (1.7, 4, 1.0, 0.0),
        (1.0, 0, 0.8, 0.0),
        (1.3, 6, 0.9, 0.0),
        (0.9, 3, 0.5, 0.0),
        (1.2, 0, 1.0, 0.3),
        (1.2, 4, 0.9, 0.2),
    ] {
        let expected = exact(&LOGITS, &tempered(temperature, top_k, top_p, min_p, 0));
        let draw = |seed, position| {
            sample(&LOGITS, &tempered(temperature, top_k, top_p, min_p, seed), position).unwrap().token
        };
        for seed in [0, 1, 2, u64::MAX] {
            let (statistic, limit) = chi_squared(&expected, (0..20_000).map(|position| draw(seed, position)));
            assert!(statistic <= limit, "T={temperature} k={top_k} p={top_p} m={min_p} seed={seed}: {statistic}");
        }
        let (statistic, limit) = chi_squared(&expected, (0..20_000).map(|seed| draw(seed, 12)));
        assert!(statistic <= limit, "T={temperature} k={top_k} p={top_p} m={min_p} over seeds: {statistic}");
    }
}

#[test]
fn draws_from_a_large_vocabulary_follow_the_distribution_by_parts() {
    // 3,000 tokens in 12 blocks; groups of 300 tokens, one of which holds most of the probability.
    let logits: Vec<f32> =
        (0..3000).map(|i| ((i * 7919) % 1000) as f32 / 300.0 + if i / 300 == 4 { 2.0 } else { 0.0 }).collect();
    let fine = exact(&logits, &tempered(0.8, 0, 1.0, 0.0, 0));
    let coarse: Vec<f64> = fine.chunks(300).map(|group| group.iter().sum()).collect();
    let mut sampler = Sampler::default();
    let history = History::default();
    let draws = (0..20_000).map(|position| {
        let sampling = tempered(0.8, 0, 1.0, 0.0, 3);
        let ask = Ask { sampling: &sampling, position, history: &history, eos: &[], mask: None };
        TokenId(sampler.sample(&mut logits.clone(), ask).unwrap().token.0 / 300)
    });
    let (statistic, limit) = chi_squared(&coarse, draws);
    assert!(statistic <= limit, "{statistic} > {limit}");
}

#[test]
fn greedy_takes_the_lowest_of_equal_tokens() {
    let sampled = sample(&[0.0, 3.0, -1.0, 3.0], &Sampling::default(), 0).unwrap();
    assert_eq!((sampled.token, sampled.logprob, sampled.top.len()), (TokenId(1), None, 0));
    let top_1 = sample(&[0.0, 3.0, -1.0, 3.0], &tempered(1.0, 1, 1.0, 0.0, 9), 0).unwrap();
    assert_eq!(top_1.token, TokenId(1));
    let cold = sample(&[0.0, 3.0, -1.0, 3.0], &tempered(1e-30, 0, 1.0, 0.0, 9), 0).unwrap();
    assert_eq!(cold.token, TokenId(1));
}

#[test]
fn logprobs_are_of_the_raw_distribution_and_stable() {
    // exp(10_000) is infinite in any float: only the stable form gets through.
    let logits = [10_000.0, 10_000.0 + 2f32.ln(), f32::NEG_INFINITY];
    let sampling = Sampling { logprobs: Some(20), ..tempered(0.1, 1, 0.3, 0.0, 0) };
    let sampled = sample(&logits, &sampling, 0).unwrap();
    assert_eq!(sampled.token, TokenId(1));
    let told: Vec<_> = sampled.top.iter().map(|top| top.token.0).collect();
    assert_eq!(told, [1, 0, 2]);
    assert!((sampled.logprob.unwrap() - (2.0f32 / 3.0).ln()).abs() < 1e-3);
    assert!((sampled.top[1].logprob - (1.0f32 / 3.0).ln()).abs() < 1e-3);
    assert_eq!(sampled.top[2].logprob, f32::NEG_INFINITY);
    let none = sample(&logits, &Sampling { logprobs: Some(0), ..sampling }, 0).unwrap();
    assert!(none.logprob.is_some() && none.top.is_empty());
}

#[test]
fn logprobs_do_not_show_what_was_done_to_the_logits() {
    let bias = vec![(TokenId(3), -100.0), (TokenId(4), 50.0)];
    let sampling = Sampling { logprobs: Some(2), logit_bias: bias, ..Sampling::default() };
    let (raw, biased) =
        (Sampling { logit_bias: Vec::new(), ..sampling.clone() }, sample(&LOGITS, &sampling, 0).unwrap());
    assert_eq!(biased.token, TokenId(4));
    assert_eq!(biased.top, sample(&LOGITS, &raw, 0).unwrap().top);
    let total: f64 = LOGITS.iter().map(|&x| f64::from(x).exp()).sum();
    assert!((f64::from(biased.logprob.unwrap()) - (0.7 - total.ln())).abs() < 1e-5);
}

#[test]
fn penalties_are_those_of_vllm_and_openai() {
    let prompt = [1, 2, 2, 3].map(TokenId);
    let sampling = Sampling {
        repetition_penalty: 2.0,
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        continued: 1,
        ..Sampling::default()
    };
    let mut history = History::new(&sampling, &prompt);
    history.push(TokenId(5));
    history.push(TokenId(5));
    assert_eq!(history.answered(), 3);
    let mut row = LOGITS;
    history.penalize(&mut row, &sampling);
    // 1 and 2 are in the prompt, 3 once and 5 twice in the answer.
    assert_eq!(row, [1.5, -0.6, 0.0, 2.1 / 2.0 - 0.75, 0.7, -3.0, 1.5, 0.2]);
}

#[test]
fn a_continued_history_is_the_one_that_was_written() {
    let tokens: Vec<_> = [4, 1, 1, 6, 2, 1].map(TokenId).to_vec();
    for continued in 0..=tokens.len() as u32 {
        let sampling = Sampling { frequency_penalty: 1.0, repetition_penalty: 1.5, continued, ..Sampling::default() };
        let fresh = Sampling { continued: 0, ..sampling.clone() };
        let (prompt, answer) = tokens.split_at(tokens.len() - continued as usize);
        let mut written = History::new(&fresh, prompt);
        answer.iter().for_each(|&token| written.push(token));
        let resumed = History::new(&sampling, &tokens);
        assert_eq!(resumed, written);
    }
}

#[test]
fn no_end_before_min_tokens_unless_nothing_else_is_left() {
    let row = [9.0, 8.0, 1.0, 2.0];
    let (eos, stop) = (TokenId(0), TokenId(1));
    let sampling = Sampling { min_tokens: 2, stop_token_ids: vec![stop, eos], ..Sampling::default() };
    let mut history = History::default();
    let mut sampler = Sampler::default();
    let mut next = |history: &History, mask: Option<&Mask>, ignore_eos| {
        let sampling = Sampling { ignore_eos, ..sampling.clone() };
        let ask = Ask { sampling: &sampling, position: 5, history, eos: &[eos], mask };
        sampler.sample(&mut row.clone(), ask).unwrap().token
    };
    assert_eq!(next(&history, None, false), TokenId(3));
    let only_ends = Mask::of(4, [eos, stop]);
    assert_eq!(next(&history, Some(&only_ends), false), eos);
    history.push(TokenId(3));
    assert_eq!(next(&history, None, false), TokenId(3));
    history.push(TokenId(3));
    assert_eq!(next(&history, None, false), eos);
}

#[test]
fn what_a_mask_forbids_is_never_chosen() {
    let vocab = 1000;
    let logits: Vec<f32> = (0..vocab).map(|i| ((i * 31) % 97) as f32 / 10.0).collect();
    for allowed in [vec![999], vec![0, 5, 31, 32, 33, 63, 64, 500], (0..vocab as u32).step_by(3).collect()] {
        let mask = Mask::of(vocab, allowed.iter().map(|&token| TokenId(token)));
        assert!((0..vocab as u32).all(|token| mask.allows(TokenId(token)) == allowed.contains(&token)));
        assert!(!mask.allows(TokenId(5000)));
        // A bias can't bring back what the mask forbids.
        let logit_bias = vec![(TokenId(1), 100.0)];
        let sampling = Sampling { logit_bias, logprobs: Some(3), ..tempered(2.0, 0, 1.0, 0.0, 1) };
        for position in 0..200 {
            let ask = Ask { sampling: &sampling, position, history: &History::default(), eos: &[], mask: Some(&mask) };
            let sampled = Sampler::default().sample(&mut logits.clone(), ask).unwrap();
            assert!(mask.allows(sampled.token), "{sampled:?}");
            assert!(sampled.logprob.unwrap().is_finite());
        }
    }
    let nothing = Mask::of(vocab, []);
    let sampling = Sampling::default();
    let ask = Ask { sampling: &sampling, position: 7, history: &History::default(), eos: &[], mask: Some(&nothing) };
    let error = Sampler::default().sample(&mut logits.clone(), ask).unwrap_err();
    assert!(matches!(error, Error::BadLogits { position: 7 }));
}

#[test]
fn logits_without_a_meaning_are_an_error_and_not_a_panic() {
    for bad in [&[][..], &[f32::NAN, 1.0], &[1.0, f32::INFINITY], &[f32::NEG_INFINITY; 3]] {
        for temperature in [0.0, 1.0] {
            for logprobs in [None, Some(2)] {
                let sampling = Sampling { logprobs, ..tempered(temperature, 2, 0.9, 0.1, 0) };
                let result = sample(bad, &sampling, 3);
                assert!(matches!(result, Err(Error::BadLogits { position: 3 })), "{bad:?}");
            }
        }
    }
}

#[test]
fn two_distributions_drawn_with_the_same_noise_agree_as_often_as_theory_says() {
    let other = [1.2, -0.1, 0.4, 1.7, 1.0, -1.3, 1.5, 0.0];
    let sampling = tempered(0.9, 0, 1.0, 0.0, 0);
    let (p, q) = (exact(&LOGITS, &sampling), exact(&other, &sampling));
    // Of the Gumbel coupling: token j wins both with probability 1 / Σ max(p_i / p_j, q_i / q_j).
    let agree = |j: usize| 1.0 / p.iter().zip(&q).map(|(pi, qi)| (pi / p[j]).max(qi / q[j])).sum::<f64>();
    let expected: f64 = (0..p.len()).map(agree).sum();
    let distance: f64 = p.iter().zip(&q).map(|(p, q)| (p - q).abs()).sum::<f64>() / 2.0;
    assert!(expected >= (1.0 - distance) / (1.0 + distance));
    let n = 40_000;
    let same = |i: usize| sample(&LOGITS, &sampling, i).unwrap().token == sample(&other, &sampling, i).unwrap().token;
    let found = (0..n).filter(|&i| same(i)).count() as f64 / n as f64;
    let deviation = (expected * (1.0 - expected) / n as f64).sqrt();
    assert!((found - expected).abs() < 5.0 * deviation, "{found} instead of {expected}");
}

fn rows() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![4 => -8f32..8.0, 1 => Just(f32::NEG_INFINITY), 1 => Just(1.0)];
    prop::collection::vec(logit, 1..1500)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn what_is_drawn_was_possible_and_is_drawn_again(
        logits in rows(),
        temperature in 0.01f32..2.0,
        top_k in 0u32..600,
        top_p in prop_oneof![Just(1.0f32), 0.01f32..=1.0],
        min_p in prop_oneof![Just(0.0f32), 0f32..=1.0],
        seed: u64,
        position in 0usize..1000,
    ) {
        prop_assume!(logits.iter().any(|logit| logit.is_finite()));
        let sampling = tempered(temperature, top_k, top_p, min_p, seed);
        let sampled = sample(&logits, &sampling, position).unwrap();
        let token = sampled.token.0 as usize;
        prop_assert!(logits[token].is_finite());
        // At the rim the two ways of summing may differ in the last digits: the definition is asked with a little less cut.
        let looser = Sampling { top_p: (top_p * (1.0 + 1e-5)).min(1.0), min_p: min_p * (1.0 - 1e-5), ..sampling.clone() };
        prop_assert!(exact(&logits, &looser)[token] > 0.0, "impossible token drawn");
        prop_assert_eq!(sample(&logits, &sampling, position).unwrap(), sampled);
    }

    #[test]
    fn the_cuts_are_those_of_the_sorted_vocabulary(
        logits in rows(),
        temperature in 0.05f32..2.0,
        top_k in 1u32..600,
        top_p in 0.01f32..1.0,
    ) {
        prop_assume!(logits.iter().any(|logit| logit.is_finite()));
        let mut sampler = Sampler::default();
        let max = sampler.scan(&logits).unwrap();
        let blocks = Blocks { row: &logits, maxima: &sampler.maxima, max };
        let kept = |cut: Cut| {
            logits.iter().zip(0..).filter(|(logit, token)| logit.is_finite() && cut.keeps((**logit, *token))).count()
        };
        let (mut order, mut candidates) = (Vec::new(), Vec::new());
        blocks.likeliest(top_k as usize, Cut::NONE, &mut order, &mut candidates);
        let finite = logits.iter().filter(|logit| logit.is_finite()).count();
        prop_assert_eq!(candidates.len(), finite.min(top_k as usize));
        let cut = candidates.iter().copied().max_by(likelier).map(Cut).unwrap();
        prop_assert_eq!(kept(cut), candidates.len());

        candidates.clear();
        let cut = cut::top_p(blocks, temperature.recip(), top_p, Cut::NONE, &mut Vec::new(), &mut candidates);
        let possible = |top_p| exact(&logits, &tempered(temperature, 0, top_p, 0.0, 0)).iter().filter(|p| **p > 0.0).count();
        let (least, most) = (possible(top_p * (1.0 - 1e-5)), possible((top_p * (1.0 + 1e-5)).min(1.0)));
        prop_assert!((least..=most).contains(&kept(cut)), "{} kept, {}..={}", kept(cut), least, most);
    }

    #[test]
    fn top_logprobs_are_the_likeliest_in_order(logits in rows(), count in 0u8..=20) {
        prop_assume!(logits.iter().any(|logit| logit.is_finite()));
        let sampled = sample(&logits, &Sampling { logprobs: Some(count), ..Sampling::default() }, 0).unwrap();
        let mut order: Vec<usize> = (0..logits.len()).collect();
        order.sort_by(|&a, &b| logits[b].partial_cmp(&logits[a]).unwrap().then(a.cmp(&b)));
        let told: Vec<_> = sampled.top.iter().map(|top| top.token.0 as usize).collect();
        prop_assert_eq!(&told[..], &order[..(count as usize).min(order.len())]);
    }
}

/// A device tells the likeliest tokens instead of the whole row where that is enough: nobody can tell the difference.
#[test]
fn the_likeliest_tokens_give_the_token_that_the_whole_row_gives() {
    let vocab = 3000;
    let mut sampler = Sampler::default();
    let mut chosen = std::collections::HashSet::new();
    for round in 0..60u64 {
        // Flat ones and peaked ones, many equal ones, impossible ones.
        let coarse = if round % 3 == 0 { 2.0 } else { 1e6 };
        let noise = |token: u64| (uniform(round, token) * coarse).round() / coarse;
        let mut row: Vec<f32> = (0..vocab).map(|token| (noise(token) * (round % 20 + 1) as f64) as f32).collect();
        row.iter_mut().step_by(7).for_each(|logit| *logit = f32::NEG_INFINITY);
        for (temperature, top_k, top_p, min_p) in [
            (0.0, 0, 1.0, 0.0),
            (1.0, 1, 0.5, 0.0),
            (0.7, 40, 0.9, 0.0),
            (1.3, 64, 0.99, 0.05),
            (2.0, 200, 0.6, 0.0),
            (5.0, 256, 1.0, 0.3),
            (1.0, 0, 1.0, 0.0),
            (0.3, 0, 1.0, 0.0),
            (20.0, 5000, 1.0, 0.0),
        ] {
            let sampling = tempered(temperature, top_k, top_p, min_p, round);
            let history = History::default();
            let ask = Ask { sampling: &sampling, position: 9, history: &history, eos: &[], mask: None };
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let tokens = match ask.need(vocab as usize, 0) {
                Need::Likeliest => kvasir_model::likeliest(&row),
                Need::Drawn { noise, scale } => drawable(&row, noise, scale).into_iter().take(3).rev().collect(),
                Need::Whole => panic!("{sampling:?}"),
            };
            let few = sampler.sample_row(Row::Few { tokens: &tokens, max }, ask).unwrap();
            let whole = sampler.sample_row(Row::Whole(&mut row.clone()), ask).unwrap();
            assert_eq!(few, whole, "round {round}, {sampling:?}");
            chosen.insert(whole.token);
        }
    }
    assert!(chosen.len() > 100, "{}", chosen.len());
    for bad in [f32::NAN, -f32::NAN, f32::INFINITY] {
        let listed = kvasir_model::likeliest(&[0.0, bad]);
        let sampling = Sampling::default();
        let history = History::default();
        let ask = Ask { sampling: &sampling, position: 9, history: &history, eos: &[], mask: None };
        assert!(matches!(
            sampler.sample_row(Row::Few { tokens: &listed, max: bad }, ask),
            Err(Error::BadLogits { position: 9 })
        ));
    }
}

#[test]
fn what_looks_at_a_whole_row_asks_for_it() {
    let history = History::default();
    let mask = Mask::of(10, [TokenId(1)]);
    let needs = |sampling: &Sampling, mask| {
        Ask { sampling, position: 0, history: &history, eos: &[], mask }.need(1000, 0) != Need::Whole
    };
    let greedy = Sampling { temperature: 0.0, ..Sampling::default() };
    assert!(needs(&greedy, None) && needs(&tempered(1.0, 256, 0.9, 0.0, 1), None));
    for whole in [
        tempered(1.0, 0, 0.9, 0.0, 1),
        tempered(1.0, 257, 1.0, 0.0, 1),
        tempered(1.0, 0, 1.0, 0.1, 1),
        Sampling { logprobs: Some(0), ..greedy.clone() },
        Sampling { presence_penalty: 0.1, ..greedy.clone() },
        Sampling { logit_bias: vec![(TokenId(1), 1.0)], ..greedy.clone() },
        Sampling { min_tokens: 1, ..greedy.clone() },
    ] {
        assert!(!needs(&whole, None), "{whole:?}");
    }
    assert!(!needs(&greedy, Some(&mask)));
}
