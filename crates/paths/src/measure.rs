//! The end that moves the bytes, and tells how that goes.

use std::{collections::VecDeque, pin::Pin, time::Duration};

use futures_util::{Stream, StreamExt, stream};
use kvasir_cluster::{Member, View};
use kvasir_proto::{check_protocol, convert, v1};
use kvasir_transfer::{Batch, Error, Op, Range, Report, Transfer, TransferEngine};
use kvasir_types::{Deadline, GrantKey, PROTOCOL_VERSION, SegmentDescriptor};
use tokio::time::{Instant, timeout};
use tonic::{Request, Status, Streaming, metadata::AsciiMetadataValue};

use crate::{
    Inner, Scratch, short,
    steps::{Plan, Step, Times},
};

/// Transfers at a time, where several are.
const SEVERAL: usize = 4;
/// Between two words about a step.
const TELL: Duration = Duration::from_millis(250);
/// For so long nobody else uses this thread.
const BREATH: Duration = Duration::from_millis(1);
/// For the peer to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// For one transfer.
const TRANSFER: Duration = Duration::from_secs(5);

/// What comes of a measurement, as it comes.
pub type Measuring = Pin<Box<dyn Stream<Item = Result<v1::MeasureEvent, Status>> + Send>>;

pub(crate) async fn begin(
    own: &Inner,
    asked: v1::MeasureRequest,
    token: Option<AsciiMetadataValue>,
) -> Result<Measuring, Status> {
    check_protocol(asked.protocol_version).map_err(|error| Status::failed_precondition(error.to_string()))?;
    let plan = Plan::new(&asked).map_err(Status::invalid_argument)?;
    let address = find(&own.members.borrow().clone(), own.id.as_str(), &asked.peer)?;
    let bytes = plan.scratch(SEVERAL);
    let scratch = own.scratch(bytes)?;
    let borrowed = borrow(own, &asked.peer, &address, bytes, plan.time, token).await?;
    let run = Run {
        engine: own.engine.clone(),
        borrowed,
        peer: short(&asked.peer),
        local: scratch.base(),
        _scratch: scratch,
        steps: plan.steps.len(),
        waiting: plan.steps.into(),
        now: None,
        step_time: plan.step_time,
        step_bytes: plan.step_bytes,
        over: false,
    };
    let events = stream::unfold(run, |mut run| async move {
        let event = run.next().await?;
        Some((event, run))
    });
    Ok(events.boxed())
}

/// Where the peer is called.
fn find(view: &View, own: &str, name: &str) -> Result<String, Status> {
    let others = || view.members.iter().filter(|member| member.segment.is_some() && member.id.as_str() != own);
    if name == own {
        return Err(Status::invalid_argument(format!("{own} is at both ends: name another member")));
    }
    let named: Vec<&Member> = others().filter(|member| member.id.as_str() == name).collect();
    match named[..] {
        [member] => Ok(member.grpc.clone()),
        [] => {
            let names: Vec<&str> = others().map(|member| member.id.as_str()).take(32).collect();
            let (name, names) = (short(name), names.join(", "));
            Err(Status::not_found(format!("{own} knows no worker or store node {name:?}; there are: {names}")))
        }
        _ => Err(Status::failed_precondition(format!("several members are called {name:?}: give them different ids"))),
    }
}

/// The peer's memory, for as long as this is held.
struct Borrowed {
    call: Streaming<v1::Lent>,
    segment: SegmentDescriptor,
    grant: GrantKey,
    offset: u64,
}

async fn borrow(
    own: &Inner,
    peer: &str,
    address: &str,
    bytes: u64,
    time: Duration,
    token: Option<AsciiMetadataValue>,
) -> Result<Borrowed, Status> {
    let unreachable = |error: tonic::transport::Error| {
        Status::unavailable(format!("{} at {address} is not reached: {}", short(peer), kvasir_runtime::chain(&error)))
    };
    let endpoint = kvasir_rpc::endpoint(address)
        .map_err(unreachable)?
        .connect_timeout(PATIENCE)
        // One that was stopped answers no ping: the call, and with it the measurement, is over.
        .http2_keep_alive_interval(Duration::from_secs(1))
        .keep_alive_timeout(Duration::from_secs(2))
        .keep_alive_while_idle(true);
    let asked = async {
        let channel = own.rpc.connect(&endpoint).await.map_err(unreachable)?;
        // It has moved everything, or given up, by then.
        let time_ms = (time + 2 * TRANSFER).as_millis() as u64;
        let mut request = Request::new(v1::LendRequest { protocol_version: PROTOCOL_VERSION, bytes, time_ms });
        if let Some(token) = token {
            request.metadata_mut().insert("authorization", token);
        }
        let told = |status: Status| {
            let (code, why) = (status.code(), short_text(status.message()));
            match code {
                tonic::Code::Unimplemented => Status::failed_precondition(format!("{} is too old for it", short(peer))),
                _ => Status::new(code, format!("{}: {why}", short(peer))),
            }
        };
        let mut call = v1::paths_client::PathsClient::new(channel).lend(request).await.map_err(told)?.into_inner();
        let lent = call.message().await.map_err(told)?;
        Ok((call, lent))
    };
    let silent = |_| Err(Status::unavailable(format!("{}: silence for {} s", short(peer), PATIENCE.as_secs())));
    let (call, lent) = timeout(PATIENCE, asked).await.unwrap_or_else(silent)?;
    let nonsense = |why: String| Status::internal(format!("{} lends nonsense: {why}", short(peer)));
    let lent = lent.ok_or_else(|| nonsense("nothing".to_owned()))?;
    let segment = lent.segment.as_ref().ok_or_else(|| nonsense("no segment".to_owned()))?;
    let segment = SegmentDescriptor::try_from(segment).map_err(|error| nonsense(error.to_string()))?;
    Ok(Borrowed { call, segment, grant: convert::grant_key(lent.grant), offset: lent.offset })
}

fn short_text(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(300).collect()
}

/// A measurement that goes on.
struct Run {
    engine: TransferEngine,
    borrowed: Borrowed,
    peer: String,
    local: u64,
    /// Given back with it.
    _scratch: Scratch,
    steps: usize,
    waiting: VecDeque<Step>,
    now: Option<Now>,
    step_time: Duration,
    step_bytes: u64,
    over: bool,
}

/// A step that goes on.
struct Now {
    step: Step,
    began: Instant,
    /// Bytes that may still be moved.
    left: u64,
    times: Times,
    alone: u64,
    moved: u64,
    transport: String,
    several: Option<Several>,
}

/// Its second half.
struct Several {
    began: Instant,
    moved: u64,
    took: Duration,
    /// Each with the place in scratch memory that is its own.
    flying: VecDeque<(u64, Transfer)>,
}

impl Drop for Several {
    fn drop(&mut self) {
        self.flying.iter().for_each(|(_, transfer)| transfer.cancel());
    }
}

impl Run {
    /// The next word about it; `None` when all is told.
    async fn next(&mut self) -> Option<Result<v1::MeasureEvent, Status>> {
        if self.over {
            return None;
        }
        if self.now.is_none() {
            let step = self.waiting.pop_front()?;
            self.now = Some(Now {
                step,
                began: Instant::now(),
                left: self.step_bytes,
                times: Times::default(),
                alone: 0,
                moved: 0,
                transport: String::new(),
                several: None,
            });
        }
        let told = self.advance().await;
        self.over |= told.is_err();
        Some(told)
    }

    async fn advance(&mut self) -> Result<v1::MeasureEvent, Status> {
        let tell = Instant::now() + TELL;
        let mut breath = Instant::now();
        loop {
            // Within the host transfers are over when they are submitted: nothing here would ever wait.
            if breath.elapsed() >= BREATH {
                tokio::task::yield_now().await;
                breath = Instant::now();
            }
            let now = self.now.as_mut().expect("`next` begins a step");
            let half = now.began + self.step_time / 2;
            let end = now.began + self.step_time;
            let at = Instant::now();
            let spent = now.left < now.step.size;
            // At least one of each kind, however little time there is.
            let first_half = at < half && now.left > self.step_bytes / 2;
            let alone = now.several.is_none() && (first_half || now.alone == 0) && !spent;
            if alone {
                let transfer = self.submit(0);
                let report = self.outcome(transfer).await?;
                let now = self.now.as_mut().expect("as above");
                now.times.add(report.elapsed);
                now.alone += 1;
                now.moved += report.bytes;
                now.transport = report.transport.to_string();
            } else {
                let fresh = || Several { began: at, moved: 0, took: Duration::ZERO, flying: VecDeque::new() };
                let several = now.several.get_or_insert_with(fresh);
                let fly = !spent && (at < end || several.moved == 0);
                if fly && several.flying.len() < SEVERAL {
                    let taken: Vec<u64> = several.flying.iter().map(|(place, _)| *place).collect();
                    let place = (0..SEVERAL as u64).find(|place| !taken.contains(place)).unwrap_or(0);
                    let transfer = self.submit(place);
                    self.several().flying.push_back((place, transfer));
                    continue;
                }
                match several.flying.pop_front() {
                    Some((_, transfer)) => {
                        let report = self.outcome(transfer).await?;
                        self.now.as_mut().expect("as above").moved += report.bytes;
                        let several = self.several();
                        several.moved += report.bytes;
                        several.took = several.began.elapsed();
                    }
                    None => {
                        let mut now = self.now.take().expect("as above");
                        let cut = if spent { "as many bytes as allowed were moved" } else { "" };
                        return Ok(self.event(&mut now, true, cut));
                    }
                }
            }
            if Instant::now() >= tell {
                let mut now = self.now.take().expect("as above");
                let event = self.event(&mut now, false, "");
                self.now = Some(now);
                return Ok(event);
            }
        }
    }

    fn several(&mut self) -> &mut Several {
        self.now.as_mut().and_then(|now| now.several.as_mut()).expect("its second half goes on")
    }

    fn submit(&mut self, place: u64) -> Transfer {
        let now = self.now.as_mut().expect("`next` begins a step");
        let Step { op, size } = now.step;
        now.left = now.left.saturating_sub(size);
        let at = place * size;
        let ranges = vec![Range { local: self.local + at, remote: self.borrowed.offset.saturating_add(at), len: size }];
        let deadline = Deadline::after(TRANSFER);
        self.engine.submit(Batch::new(op, self.borrowed.segment.clone(), self.borrowed.grant, ranges, deadline))
    }

    /// Waits for a transfer, as long as the peer lends its memory.
    async fn outcome(&mut self, transfer: Transfer) -> Result<Report, Status> {
        // Whichever comes first: a word of the peer's can only be that it is over, and stays in its stream.
        tokio::select! {
            outcome = transfer => outcome.map_err(|error: Error| {
                Status::unavailable(format!("transfers with {} fail: {}", self.peer, kvasir_runtime::chain(&error)))
            }),
            gone = self.borrowed.call.message() => Err(match gone {
                Err(status) => Status::unavailable(format!("{} is gone: {}", self.peer, short_text(status.message()))),
                Ok(_) => Status::unavailable(format!("{} has taken its memory back", self.peer)),
            }),
        }
    }

    fn event(&self, now: &mut Now, over: bool, cut: &str) -> v1::MeasureEvent {
        let rate = |several: &Several| several.moved as f64 / several.took.as_secs_f64().max(1e-9);
        let peers = self.engine.peers();
        let peer = peers.iter().find(|peer| peer.segment == self.borrowed.segment.segment);
        v1::MeasureEvent {
            step: (self.steps - self.waiting.len()) as u32,
            steps: self.steps as u32,
            over,
            way: match now.step.op {
                Op::Read => "read".to_owned(),
                Op::Write => "write".to_owned(),
            },
            size_bytes: now.step.size,
            alone: now.alone,
            p50_us: now.times.quantile_us(500),
            p99_us: now.times.quantile_us(990),
            bytes_per_second: now.several.as_ref().filter(|several| several.moved > 0).map_or(0.0, rate),
            moved_bytes: now.moved,
            transport: now.transport.clone(),
            reason: peer.map(|peer| peer.reason.clone()).unwrap_or_default(),
            cut: cut.to_owned(),
        }
    }
}
