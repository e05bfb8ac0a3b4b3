//! Every order of commands and steps, against the oracle.

use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{RngAlgorithm, TestRng, TestRunner},
};

use super::oracle::{World, given, op};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn every_order_of_commands_gives_the_scripts_answers_and_leaks_nothing(
        given in given(), ops in prop::collection::vec(op(), 1..100),
    ) {
        let mut world = World::new(given);
        ops.iter().for_each(|op| world.apply(op));
        world.finish();
    }
}

/// The same for 300,000 steps of the scheduler, in engines that live longer: what one request leaves behind is what later
/// ones find. A failure names the seed; the test above, being shrunk, usually tells more about the same mistake.
#[test]
fn hundreds_of_thousands_of_steps_lose_no_block_and_no_answer() {
    let (mut steps, mut preemptions, mut shared, mut forks, mut recalls, mut drafted) = (0, 0, 0, 0, 0, 0);
    for seed in 0u8.. {
        let mut random =
            TestRunner::new_with_rng(ProptestConfig::default(), TestRng::from_seed(RngAlgorithm::ChaCha, &[seed; 32]));
        let mut world = World::new(given().new_tree(&mut random).expect("a strategy without rejects").current());
        println!("seed {seed}: {:?}", world.given); // shown if the test fails
        for _ in 0..60 {
            for _ in 0..60 {
                let op = op().new_tree(&mut random).expect("a strategy without rejects").current();
                world.apply(&op);
            }
            world.finish();
        }
        let stats = world.rig.stats();
        steps += world.steps;
        preemptions += stats.preemptions;
        shared += stats.shared_tokens;
        forks += stats.forks;
        recalls += stats.recalls;
        drafted += stats.accepted_tokens;
        if steps >= 300_000 {
            let tried = [preemptions, shared, forks, recalls, drafted];
            println!("{steps} steps: {tried:?} preemptions, shared tokens, forks, recalls, accepted drafts");
            assert!(tried.into_iter().all(|count| count > 20), "not all is tried: {tried:?}");
            return;
        }
    }
}
