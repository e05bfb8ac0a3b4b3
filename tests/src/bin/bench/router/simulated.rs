//! How good the router's choices of workers are, by simulation (docs/simulator.md): `kv-aware` beside round robin, beside a
//! cache without limit, and beside `least-loaded` where nothing is shared. No clock is in it, so every run on every machine
//! finds the same.

use anyhow::Result;
use kvasir_replay::{CONVERSATION, trace::Trace};
use kvasir_simulate::{
    Plan, PolicyName, Profile, Shape, Workload,
    figures::{Figures, Slo},
    profile, run,
};

use crate::report::Row;

/// Workers of each kind.
const WORKERS: usize = 16;
/// The default profile's worker, with keys and values in one byte each: a worker then has room for 2.56 million tokens. Three
/// fifths of the time it computes prompts at this pace of the recorded hour …
const ONE_BYTE: [&str; 2] = ["kv.token_bytes=163840", "kv.room_tokens=2560000"];
const SPEED: f64 = 2.5;
/// … and three quarters at this one if nothing is found.
const UNIQUE_SPEED: f64 = 2.0;
/// As `kvasir-simulate` has it.
const SLO: Slo = Slo { ttft_ms: 5000.0, tpot_ms: 50.0 };

/// All rows.
pub fn rows() -> Result<Vec<Row>> {
    let shared = conversation(Shape { speed: SPEED, ..Shape::default() })?;
    let [ours, turns] = [PolicyName::KvAware, PolicyName::RoundRobin].map(|policy| figures(&shared, policy, &ONE_BYTE));
    let [ours, turns] = [ours?, turns?];
    let small = figures(&shared, PolicyName::KvAware, &[])?;
    let unique = conversation(Shape { speed: UNIQUE_SPEED, unique: true, ..Shape::default() })?;
    let [alone, load] =
        [PolicyName::KvAware, PolicyName::LeastLoaded].map(|policy| figures(&unique, policy, &ONE_BYTE));
    let [alone, load] = [alone?, load?];
    let what = |what: &str| format!("simulated conversations, {WORKERS} + {WORKERS} workers: {what}");
    let unlike = |what: &str| format!("simulated, {WORKERS} + {WORKERS} workers, nothing shared: {what}");
    let (found, bound) = (ours.hit_rate * 100.0, ours.bound * 100.0);
    Ok(vec![
        Row::new(what("mean TTFT"), ours.ttft_ms.mean, "ms").beside("round-robin", turns.ttft_ms.mean).at_most(0.769),
        Row::new(what("prompt tokens found"), found, "%").beside("one cache without limit", bound).at_least(0.95),
        Row::new(what("the same, two bytes a key and value"), small.hit_rate * 100.0, "%")
            .beside("one cache without limit", bound),
        Row::new(unlike("mean TTFT"), alone.ttft_ms.mean, "ms").beside("least-loaded", load.ttft_ms.mean).at_most(1.02),
        Row::new(unlike("good requests a second"), alone.good_per_second, "/s")
            .beside("least-loaded", load.good_per_second)
            .at_least(0.98),
    ])
}

fn conversation(shape: Shape) -> Result<Workload> {
    Ok(Workload::new(Trace::read(CONVERSATION.as_bytes())?, shape)?)
}

fn figures(workload: &Workload, policy: PolicyName, settings: &[&str]) -> Result<Figures> {
    let settings: Vec<String> = settings.iter().map(|&setting| setting.to_owned()).collect();
    let text = Profile::named(profile::DEFAULT).expect("it comes with the simulator");
    let plan = Plan {
        prefill: WORKERS,
        decode: WORKERS,
        profile: Profile::read(text, &settings)?,
        index_delay_ms: 20,
        load_interval_ms: 100,
        store_tokens: 0,
        steering: None,
    };
    Ok(Figures::of(policy.as_str(), workload, &plan, SLO, &run(workload, &plan, policy, |_| {})?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_simulation_is_to_reach_it_reaches() {
        let rows = rows().unwrap();
        assert_eq!(rows.iter().filter(|row| row.met == Some(true)).count(), 4);
        assert!(
            rows.iter().all(|row| row.met != Some(false)),
            "{:?}",
            rows.iter().map(|row| row.ratio).collect::<Vec<_>>()
        );
    }
}
