//! A crew as large as one likes, without a cluster: to measure decisions on what they are made of (`examples/route-scale`).

use std::sync::Arc;

use kvasir_cluster::{Duty, Member, ModelInfo};
use kvasir_proto::v1;
use kvasir_rpc::Rpc;
use kvasir_types::{Incarnation, KvDtype, KvLayout, MemberId, ModelFingerprint, PROTOCOL_VERSION, Role};

use super::{Crew, Desk, Roster, Worker};
use crate::{
    cache::{Lookup, Number},
    route::{Ask, Decision, Policy},
};

/// Blocks' layout: a small model's.
const LAYOUT: KvLayout =
    KvLayout { block_size: 16, layers: 16, kv_heads: 8, k_dim: 128, v_dim: 128, dtype: KvDtype::F16 };

/// Workers of one model that tell how busy they are, half of them prefill workers; and a desk to decide at.
pub struct Rehearsal {
    crew: Crew,
    desk: Desk,
    workers: Workers,
}

/// The workers of a rehearsal, for whoever tells how busy they are. Cheap to clone.
#[derive(Clone)]
pub struct Workers(Arc<[Arc<Worker>]>);

impl Workers {
    /// How many they are.
    pub fn count(&self) -> usize {
        self.0.len()
    }

    /// The worker tells a load that follows from `dice`: each has measured itself, and is busy in its own way.
    pub fn tell(&self, at: usize, dice: u64) {
        let Some(worker) = self.0.get(at) else { return };
        let busy = (at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(dice) >> 7;
        worker.hears(v1::WorkerLoad {
            running: (busy % 40) as u32,
            waiting_tokens: busy % 8000,
            free_blocks: 1 << 16,
            prefill_tokens_per_second: 8000.0 + (at % 97) as f64,
            step_seconds: 0.02 + (at % 13) as f64 * 1e-4,
            handoff_bytes_per_second: 1e10,
            ..v1::WorkerLoad::default()
        });
    }
}

impl Rehearsal {
    /// Workers with these numbers in the index, the first half prefill workers. All have told a load.
    ///
    /// # Panics
    /// If the number of one makes no name: there are too many.
    pub fn new(numbers: &[Number]) -> Self {
        let worker = |(at, number): (usize, &Number)| {
            let role = if at < numbers.len() / 2 { Role::Prefill } else { Role::Decode };
            let worker = Worker::new(Rpc::default(), member(at, role), None);
            worker.pulse.set_number(Some(*number));
            worker
        };
        let workers: Vec<Arc<Worker>> = numbers.iter().enumerate().map(worker).collect();
        let (prefill, decode) = workers.split_at(numbers.len() / 2);
        let roster = Arc::new(Roster::new(prefill.to_vec(), decode.to_vec()));
        let told = Workers(workers.into());
        (0..numbers.len()).for_each(|at| told.tell(at, 0));
        Self { crew: Crew { roster, decode: None }, desk: Desk::default(), workers: told }
    }

    /// Its workers.
    pub fn workers(&self) -> Workers {
        self.workers.clone()
    }

    /// Where what is looked up lies.
    pub fn lookup(&mut self) -> &mut Lookup {
        &mut self.desk.lookup
    }

    /// Lays out what was looked up beside the workers' loads.
    pub fn lay_out(&mut self) {
        self.crew.lay_out(&mut self.desk);
    }

    /// Decides on what is laid out.
    pub fn decide(&self, policy: &impl Policy, ask: Ask) -> Option<Decision> {
        policy.decide(&Ask { token_bytes: self.crew.token_bytes(), ..ask }, &self.desk.pool)
    }
}

fn member(at: usize, role: Role) -> Member {
    let name = format!("{}-{at}", if role == Role::Prefill { "prefill" } else { "decode" });
    Member {
        id: name.parse::<MemberId>().expect("a number makes a name"),
        incarnation: Incarnation(at as u64 + 1),
        role,
        grpc: "127.0.0.1:1".to_owned(),
        admin: String::new(),
        http: String::new(),
        protocol: PROTOCOL_VERSION,
        version: String::new(),
        model: Some(ModelInfo {
            name: "rehearsal".to_owned(),
            fingerprint: ModelFingerprint([1; 16]),
            layout: LAYOUT,
            max_model_len: 1 << 17,
            tokenizer: String::new(),
        }),
        segment: None,
        store: None,
        engine: None,
        draining: false,
        duty: Duty::default(),
    }
}
