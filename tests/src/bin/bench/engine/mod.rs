//! The engine beside llama.cpp and transformers, on the same random weights, and beside what the machine can do at most.
//!
//! Everybody computes the same prompts from the same weights on as many threads, and takes turns with the others in every
//! repetition; who goes first changes. Ratios are taken within a repetition. A rival stays loaded and is stopped while
//! others are measured; of a rival only the forward pass is timed, of ours the whole step (scheduler, cache and sampler
//! too). Before anything counts, llama.cpp and we must write the same tokens for the same prompt.
//!
//! All round activations to bf16 before they are multiplied by bf16 weights: llama.cpp and torch always do, we by a setting
//! (`engine.compute: fast`). Our default, activations in f32, has rows of its own.
//!
//! llama.cpp takes flash attention or leaves it: the first repetition measures both, and what was faster for a load counts.

mod goals;
mod ours;
mod plan;
mod python;

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use self::{
    ours::Ours,
    plan::{Found, Load, SHAPE, SMOKE_SHAPE, Who},
    python::Python,
};
use crate::{Options, report::Report};

/// Another repetition is begun only if it will have ended by then, in a whole run and in a quick one.
const LIMIT: [Duration; 2] = [Duration::from_mins(13), Duration::from_secs(240)];
/// As many repetitions as keep a whole run at about a quarter of an hour.
const REPETITIONS: usize = 5;
/// Both programs round differently, so they part sooner or later; random weights and a wrong conversion part at once.
const TOKENS_ALIKE: usize = 8;

/// Measures, and says how far it is: a run takes minutes.
pub fn run(options: &Options) -> Result<Report> {
    let repetitions = options.repetitions.min(REPETITIONS);
    let quick = repetitions < REPETITIONS;
    let dir = tempfile::tempdir()?;
    let mut found = Found::default();
    let shape = if options.smoke { SMOKE_SHAPE } else { SHAPE };
    println!("preparing {shape}");
    let ours = Ours::prepare(shape, &mut found)?;
    let mut rivals = python::start_all(&ours, dir.path(), &mut found);
    check_tokens(&ours, rivals.iter_mut().find(|rival| rival.who() == Who::Llama))?;

    let started = Instant::now();
    let say = |what: &str| println!("{:>4} s  {what}", started.elapsed().as_secs());
    for repetition in 0..repetitions {
        let elapsed = started.elapsed();
        if repetition > 0 && elapsed + elapsed / repetition as u32 > LIMIT[usize::from(quick)] {
            println!("the machine is busy: {repetition} repetitions are all there is time for");
            break;
        }
        for load in plan::loads(repetition, quick) {
            say(&format!("repetition {} of {repetitions}: {}", repetition + 1, load.name()));
            let mut turn = load.who(repetition);
            let first = repetition % turn.len();
            turn.rotate_left(first);
            for who in turn {
                measure(who, load, &ours, &mut rivals, &mut found)?;
            }
        }
        if repetition < plan::scenarios(quick) {
            say("a long prompt among writers");
            ours.mixed(&mut found)?;
            say("a shared beginning");
            ours.prefix(&mut found)?;
        }
    }
    say("operations of the cache");
    ours.cache(&mut found);
    say("done");
    let mut report = Report::new(if options.smoke { "engine-smoke" } else { "engine" });
    goals::rows(&found).into_iter().for_each(|row| report.push(row));
    Ok(report)
}

fn measure(who: Who, load: Load, ours: &Ours, rivals: &mut [Python], found: &mut Found) -> Result<()> {
    if found.is_missing(who) {
        return Ok(());
    }
    let figure = match rivals.iter_mut().find(|rival| rival.who() == who) {
        Some(rival) => rival.measure(load),
        None => Ok(ours.measure(who, load, found)?),
    };
    match figure {
        Ok(tokens_per_s) => found.add(who, load, tokens_per_s),
        // A rival may break; its row says how, and the others go on.
        Err(error) => found.miss(who, &format!("{error:#}")),
    }
    Ok(())
}

fn check_tokens(ours: &Ours, llama: Option<&mut Python>) -> Result<()> {
    let Some(llama) = llama else { return Ok(()) };
    let (mine, theirs) = (ours.tokens()?, llama.tokens()?);
    let alike = mine.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
    println!("llama.cpp and we write the same first {alike} of {} tokens", mine.len().min(theirs.len()));
    ensure!(alike >= TOKENS_ALIKE, "that is not the same model: we wrote {mine:?}, llama.cpp {theirs:?}");
    Ok(())
}
