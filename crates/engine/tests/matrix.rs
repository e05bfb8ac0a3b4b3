//! Every checked-in model's reference answers, through the engine, for every way the engine can get to them.
//!
//! ```text
//! chunk {16, 64, all} × batch {1, 3, 16} × prefix cache {on, off} × speculation {off, n-gram, draft} × preemption {no, forced}
//! ```
//!
//! What a request is answered must not depend on any of these. "Forced" preemption: a pool that is too small for the
//! batch, and short online requests that push the others, which are offline, out at random moments.
//!
//! One test per chunk size and kind of speculation, so that they run side by side.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, VecDeque},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
};

use kvasir_engine::{
    Command, Config, DraftModel, Engine, Event, EventSink, Mode, ModelRunner, NGrams, Parts, Priority, Progress,
    Proposer, Request, SeqId, Stats,
};
use kvasir_model::{
    Folder,
    cpu::{CpuBackend, HostArena},
};
use kvasir_types::{BlockHash, FinishReason, KvDtype, Sampling, TokenId};

const BLOCK: u32 = 16;
/// Under this gap between the best and the second logit another correct implementation may choose differently.
const SURE: f32 = 0.05;

#[derive(serde::Deserialize)]
struct Golden {
    prompt_ids: Vec<u32>,
    output_ids: Vec<u32>,
    margin: f32,
}

fn models() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../models")
}

/// The demo model and one tiny model of every family.
fn folders() -> Vec<PathBuf> {
    let tiny = fs::read_dir(models().join("tiny")).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> = tiny.collect();
    all.sort();
    all.push(models().join("demo"));
    all
}

/// One model, loaded once, and what it is known to answer.
struct Subject {
    name: String,
    folder: Folder,
    cases: Vec<Case>,
}

struct Case {
    prompt: Arc<[TokenId]>,
    answer: Vec<TokenId>,
    /// Whether rounding cannot have tipped it.
    sure: bool,
}

impl Subject {
    /// Every `step`-th golden line of a folder.
    fn open(dir: &Path, step: usize) -> Self {
        let ids = |ids: &[u32]| ids.iter().copied().map(TokenId).collect::<Vec<_>>();
        let text = fs::read_to_string(dir.join("golden.jsonl")).unwrap();
        let lines = text.lines().step_by(step).map(|line| serde_json::from_str::<Golden>(line).unwrap());
        let cases = lines.map(|line| Case {
            prompt: ids(&line.prompt_ids).into(),
            answer: ids(&line.output_ids),
            sure: line.margin >= SURE,
        });
        let name = dir.file_name().unwrap().to_string_lossy().into_owned();
        Self { name, folder: Folder::open(dir).unwrap(), cases: cases.collect() }
    }

    fn runner(&self, blocks: usize) -> Box<ModelRunner<CpuBackend>> {
        let layout = self.folder.kv_layout(BLOCK, KvDtype::F16);
        let arena = HostArena::new(layout.block_bytes() * blocks).unwrap();
        Box::new(ModelRunner::new(CpuBackend::new(&self.folder, layout, arena, 1).unwrap()))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Speculation {
    Off,
    Ngram,
    Draft,
}

/// One way to serve.
#[derive(Clone, Copy, Debug)]
struct Way {
    chunk: usize,
    batch: usize,
    cache: bool,
    speculation: Speculation,
    preempt: bool,
}

/// What a client heard so far.
#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Said>>);

#[derive(Default)]
struct Said {
    tokens: Vec<TokenId>,
    end: Option<Result<FinishReason, String>>,
}

impl Heard {
    fn sink(&self) -> Box<dyn EventSink> {
        let heard = Arc::clone(&self.0);
        Box::new(move |event| {
            let mut heard = heard.lock().unwrap();
            match event {
                Event::Admitted(_) => {}
                Event::Token { sampled, .. } => heard.tokens.push(sampled.token),
                Event::Finished { reason, .. } => heard.end = Some(Ok(reason)),
                Event::Failed(error) => heard.end = Some(Err(error.to_string())),
            }
        })
    }
}

/// Serves every case in this way; the answers, and what the engine counted.
fn serve(subject: &Subject, draft: Option<&Subject>, way: Way) -> (Vec<Vec<TokenId>>, Stats) {
    let longest = subject.cases.iter().map(|case| case.prompt.len() + case.answer.len() + 1).max().unwrap();
    let one = longest.div_ceil(BLOCK as usize) + 1;
    // Room for everybody, or for one and a half of the longest.
    let groups = subject.folder.kv_groups().len();
    let blocks = groups * if way.preempt { one + one / 2 } else { one * (way.batch + 1) };
    let config = Config {
        max_batch_tokens: way.chunk.max(512),
        chunk_tokens: way.chunk,
        max_running: way.batch,
        prefix_cache: way.cache,
        ..Config::default()
    };
    let layout = subject.folder.kv_layout(BLOCK, KvDtype::F16);
    let proposer: Option<Box<dyn Proposer>> = match way.speculation {
        Speculation::Off => None,
        Speculation::Ngram => Some(Box::new(NGrams::default())),
        Speculation::Draft => {
            let draft = draft.unwrap();
            let blocks = (way.batch + 1) * one * draft.folder.kv_groups().len();
            let layout = draft.folder.kv_layout(BLOCK, KvDtype::F16);
            Some(Box::new(DraftModel::new(draft.runner(blocks), &layout, blocks, 64)))
        }
    };
    let parts = Parts { proposer, ..Parts::from(subject.runner(blocks)) };
    let mut engine = Engine::new(config, layout, blocks, parts);

    let root = BlockHash::root(subject.folder.fingerprint(), &layout, "");
    let mut number = 0u64;
    let request = |prompt: Arc<[TokenId]>, tokens: usize, priority: Priority| Request {
        id: "matrix".parse().unwrap(),
        prompt,
        root,
        sampling: Sampling { max_tokens: tokens as u32, ..Sampling::default() },
        mode: Mode::Generate,
        priority,
        choices: 1,
    };
    // Everybody twice, so that the second time there is something in the prefix cache.
    let count = subject.cases.len();
    let mut waiting: VecDeque<usize> = (0..2 * count).collect();
    let mut running: BTreeMap<usize, (SeqId, Heard)> = BTreeMap::new();
    let mut answers = vec![Vec::new(); 2 * count];
    let mut intruders: Vec<Heard> = Vec::new();
    for step in 0.. {
        assert!(step < 1_000_000, "{way:?}: no end");
        while running.len() < way.batch
            && let Some(case) = waiting.pop_front()
        {
            let Case { prompt, answer, .. } = &subject.cases[case % count];
            let heard = Heard::default();
            let request = request(Arc::clone(prompt), answer.len(), Priority::Offline);
            let (seq, command) = engine.intake().admit(request, heard.sink()).unwrap();
            engine.apply(command);
            engine.apply(Command::Compute(seq, None));
            running.insert(case, (seq, heard));
        }
        number = number.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        if way.preempt && number >> 33 & 15 == 0 {
            let len = 20 + (number >> 40) as usize % 60;
            let prompt: Vec<_> = (0..len as u32).map(|i| TokenId((i * 31 + step) % 1500 + 3)).collect();
            let heard = Heard::default();
            let request = request(prompt.into(), 3, Priority::Online);
            let (seq, command) = engine.intake().admit(request, heard.sink()).unwrap();
            engine.apply(command);
            engine.apply(Command::Compute(seq, None));
            intruders.push(heard);
        }
        let progress = engine.step();
        running.retain(|&case, (_, heard)| {
            let mut heard = heard.0.lock().unwrap();
            match heard.end.take() {
                None => true,
                Some(end) => {
                    end.unwrap_or_else(|error| panic!("{} case {case}, {way:?}: {error}", subject.name));
                    answers[case] = std::mem::take(&mut heard.tokens);
                    false
                }
            }
        });
        if running.is_empty() && waiting.is_empty() {
            break;
        }
        assert!(progress == Progress::Busy, "{way:?}: stuck");
    }
    while engine.step() == Progress::Busy {}
    for heard in intruders {
        assert!(matches!(heard.0.lock().unwrap().end, Some(Ok(_))), "{way:?}: an intruder was not served");
    }
    let stats = engine.stats();
    let counts = stats.blocks;
    assert_eq!(counts.free + counts.cached, counts.total, "{way:?}: blocks were lost");
    (answers, stats)
}

/// The ways of one test over one model: the answers are the reference's, or where rounding may tip them, those of the plainest
/// way.
fn check(subject: &Subject, other: &Subject, chunk: usize, speculation: Speculation, totals: &mut Totals) {
    let plain = Way { chunk: 1 << 20, batch: 1, cache: false, speculation: Speculation::Off, preempt: false };
    let mut expected: Vec<Vec<TokenId>> = subject.cases.iter().map(|case| case.answer.clone()).collect();
    if subject.cases.iter().any(|case| !case.sure) {
        expected = serve(subject, None, plain).0;
        expected.truncate(subject.cases.len());
    }
    for batch in [1, 3, 16] {
        for (cache, preempt) in [(true, false), (false, false), (true, true), (false, true)] {
            let way = Way { chunk, batch, cache, speculation, preempt };
            // A draft model that is always right, and one that hardly ever is.
            let draft = if batch == 3 { subject } else { other };
            let (answers, stats) = serve(subject, Some(draft), way);
            for (case, (answer, expected)) in answers.iter().zip(expected.iter().cycle()).enumerate() {
                assert_eq!(answer, expected, "{} case {case}, {way:?}", subject.name);
            }
            assert!(preempt || stats.preemptions == 0, "{way:?}: preempted in a pool with room");
            totals.preemptions += stats.preemptions;
            totals.drafted += stats.drafted_tokens;
            totals.accepted += stats.accepted_tokens;
            totals.cached += stats.cached_tokens;
        }
    }
}

/// That the ways were really gone: summed over all of a test's.
#[derive(Debug, Default)]
struct Totals {
    preemptions: u64,
    drafted: u64,
    accepted: u64,
    cached: u64,
}

fn every_model(chunk: usize, speculation: Speculation) {
    let subjects: Vec<Subject> =
        folders().iter().map(|dir| Subject::open(dir, if dir.ends_with("demo") { 7 } else { 2 })).collect();
    let mut totals = Totals::default();
    for (index, subject) in subjects.iter().enumerate() {
        let other = &subjects[(index + 1) % subjects.len()];
        check(subject, other, chunk, speculation, &mut totals);
    }
    println!("{totals:?}");
    assert!(totals.preemptions > 0 && totals.cached > 0, "{totals:?}");
    assert_eq!(totals.drafted > 0, speculation != Speculation::Off, "{totals:?}");
    assert_eq!(totals.accepted > 0, speculation != Speculation::Off, "{totals:?}");
}

macro_rules! matrix {
    ($($name:ident: $chunk:expr, $speculation:ident;)+) => {
        $(#[test]
        fn $name() {
            every_model($chunk, Speculation::$speculation);
        })+
    };
}

matrix! {
    chunks_of_16: 16, Off;
    chunks_of_64: 64, Off;
    whole_prompts: 4096, Off;
    chunks_of_16_with_ngrams: 16, Ngram;
    chunks_of_64_with_ngrams: 64, Ngram;
    whole_prompts_with_ngrams: 4096, Ngram;
    chunks_of_16_with_a_draft_model: 16, Draft;
    chunks_of_64_with_a_draft_model: 64, Draft;
    whole_prompts_with_a_draft_model: 4096, Draft;
}
