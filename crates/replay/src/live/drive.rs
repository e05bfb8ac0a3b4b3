//! Who is next, and when: lanes take the trace's requests in order, wait for their time, and serve them.
//!
//! Without a clock the next request begins when one ends, so a slow server is asked less. With one, requests are due when
//! the trace says, and a request's time counts from then: who has to wait for a free lane was slow, not absent.

use std::{
    io::IsTerminal,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use serde::Serialize;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use crate::trace::{Request, Trace};

/// How often the line on a terminal changes.
const ON_TERMINAL: Duration = Duration::from_millis(200);
/// How often a line is written to a file.
const IN_FILE: Duration = Duration::from_secs(5);
/// No trace takes longer; a number of milliseconds from outside might.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// When requests go out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pace {
    /// As soon as an answer to another has come.
    Answers,
    /// When the trace says.
    Clock {
        /// So many times as fast.
        speed: f64,
    },
}

/// A request whose turn it is.
pub(crate) struct Turn<'a> {
    pub(crate) number: usize,
    pub(crate) request: &'a Request,
    /// What its time counts from.
    pub(crate) due: Instant,
}

/// Serves one request at a time.
pub(crate) trait Lane: Send + 'static {
    type Outcome: Send;

    /// It ends, sooner or later, by itself.
    fn serve(&mut self, turn: Turn<'_>) -> impl Future<Output = Self::Outcome> + Send;
}

/// Adds up what lanes tell.
pub(crate) trait Tally<O>: Send + 'static {
    fn add(&mut self, number: usize, outcome: O);

    /// How it stands, in a few words.
    fn line(&self) -> String;
}

/// What is driven.
pub(crate) struct Course {
    pub(crate) name: String,
    pub(crate) trace: Arc<Trace>,
    pub(crate) limit: usize,
    pub(crate) pace: Pace,
}

/// How it ended.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ended {
    pub(crate) seconds: f64,
    /// Before the end, because it was asked to.
    pub(crate) stopped: bool,
}

/// Serves the course's requests until all are, or until told to stop: once, what is under way is waited for; twice, it is
/// given up and counts for nothing.
pub(crate) async fn drive<L, T>(course: Course, lanes: Vec<L>, tally: T, stops: &mut mpsc::Receiver<()>) -> (T, Ended)
where
    L: Lane,
    T: Tally<L::Outcome>,
{
    let started = Instant::now();
    let total = course.trace.requests.len().min(course.limit);
    let (course, tally, done) = (Arc::new(course), Arc::new(Mutex::new(tally)), Arc::new(AtomicUsize::new(0)));
    let (next, (stop, stopping)) = (Arc::new(AtomicUsize::new(0)), watch::channel(false));
    let mut tasks = JoinSet::new();
    for lane in lanes {
        let turns = Turns { course: course.clone(), next: next.clone(), started, stopping: stopping.clone() };
        tasks.spawn(serve_all(lane, turns, tally.clone(), done.clone()));
    }
    let mut screen = Screen::new();
    loop {
        // All three can be waited for anew: a lane that ended is kept by the set, a tick by the interval, a stop by the channel.
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => break,
                Some(Ok(())) => {}
                Some(Err(error)) => std::panic::resume_unwind(error.into_panic()),
            },
            _ = screen.ticks.tick() => {
                screen.show(&format!("{}: {} of {total} requests, {}", course.name, done.load(Ordering::Relaxed), lock(&tally).line()));
            }
            Some(()) = stops.recv() => {
                if stop.send_replace(true) {
                    break;
                }
                screen.say("stopping: requests under way are waited for (once more: they are not)");
            }
        }
    }
    tasks.shutdown().await;
    screen.clear();
    let stopped = *stop.borrow() && done.load(Ordering::Relaxed) < total;
    let tally =
        Arc::into_inner(tally).expect("every lane has ended").into_inner().unwrap_or_else(PoisonError::into_inner);
    (tally, Ended { seconds: started.elapsed().as_secs_f64(), stopped })
}

/// What lanes have in common.
struct Turns {
    course: Arc<Course>,
    next: Arc<AtomicUsize>,
    started: Instant,
    stopping: watch::Receiver<bool>,
}

async fn serve_all<L: Lane, T: Tally<L::Outcome>>(
    mut lane: L,
    mut turns: Turns,
    tally: Arc<Mutex<T>>,
    done: Arc<AtomicUsize>,
) {
    let course = turns.course.clone();
    while !*turns.stopping.borrow() {
        let number = turns.next.fetch_add(1, Ordering::Relaxed);
        let Some(request) = course.trace.requests.get(number).filter(|_| number < course.limit) else { return };
        let due = match course.pace {
            Pace::Answers => Instant::now(),
            Pace::Clock { speed } => {
                let due = turns.started + after(&course.trace, request, speed);
                tokio::select! {
                    () = tokio::time::sleep_until(due) => {}
                    // An error: nobody can ask to stop any more, for there is nobody.
                    _ = turns.stopping.wait_for(|&stop| stop) => return,
                }
                due
            }
        };
        let outcome = lane.serve(Turn { number, request, due }).await;
        lock(&tally).add(number, outcome);
        done.fetch_add(1, Ordering::Relaxed);
    }
}

/// How long after the first request.
fn after(trace: &Trace, request: &Request, speed: f64) -> Duration {
    let first = trace.requests.first().map_or(0, |first| first.at_ms);
    let seconds = request.at_ms.saturating_sub(first) as f64 / 1e3 / speed;
    Duration::try_from_secs_f64(seconds).unwrap_or(LONGEST).min(LONGEST)
}

fn lock<T>(tally: &Mutex<T>) -> MutexGuard<'_, T> {
    // Adding leaves nothing half done.
    tally.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where progress is shown: one line that changes on a terminal, a line now and then elsewhere.
struct Screen {
    on_terminal: bool,
    ticks: tokio::time::Interval,
}

impl Screen {
    fn new() -> Self {
        let on_terminal = std::io::stderr().is_terminal();
        let every = if on_terminal { ON_TERMINAL } else { IN_FILE };
        let mut ticks = tokio::time::interval_at(Instant::now() + every, every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
        Self { on_terminal, ticks }
    }

    fn show(&self, line: &str) {
        if self.on_terminal {
            eprint!("\r\x1b[K{line}");
        } else {
            eprintln!("{line}");
        }
    }

    fn say(&self, line: &str) {
        self.clear();
        eprintln!("{line}");
    }

    fn clear(&self) {
        if self.on_terminal {
            eprint!("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Numbers(Arc<AtomicUsize>);

    /// Takes as long as the prompt has tokens, and says when it was due.
    impl Lane for Numbers {
        type Outcome = Duration;

        async fn serve(&mut self, turn: Turn<'_>) -> Duration {
            self.0.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(turn.request.prompt_tokens.into())).await;
            turn.due.elapsed()
        }
    }

    #[derive(Default)]
    struct Told(Vec<(usize, Duration)>);

    impl Tally<Duration> for Told {
        fn add(&mut self, number: usize, outcome: Duration) {
            self.0.push((number, outcome));
        }

        fn line(&self) -> String {
            String::new()
        }
    }

    fn course(text: &str, limit: usize, pace: Pace) -> Course {
        Course { name: "test".to_owned(), trace: Arc::new(Trace::read(text.as_bytes()).unwrap()), limit, pace }
    }

    async fn run(course: Course, lanes: usize) -> (Vec<(usize, Duration)>, Ended) {
        let started = Arc::new(AtomicUsize::new(0));
        let lanes = (0..lanes).map(|_| Numbers(started.clone())).collect();
        let (_stop, mut stops) = mpsc::channel(1);
        let (mut told, ended) = drive(course, lanes, Told::default(), &mut stops).await;
        told.0.sort_unstable();
        (told.0, ended)
    }

    #[tokio::test(start_paused = true)]
    async fn each_request_is_served_once_however_many_lanes_there_are() {
        let text = (0..50).map(|n| format!("{n} {} 1\n", n % 7)).collect::<String>();
        for lanes in [1, 3, 80] {
            let (told, ended) = run(course(&text, 40, Pace::Answers), lanes).await;
            assert!(told.iter().map(|(number, _)| *number).eq(0..40) && !ended.stopped, "{lanes}");
        }
    }

    /// Two lanes, requests of a second each, due at once and after one and two seconds, twice as fast.
    #[tokio::test(start_paused = true)]
    async fn by_the_clock_waiting_for_a_lane_counts() {
        let text = "5000 1000 1\n5000 1000 1\n6000 1000 1\n7000 1000 1\n";
        let (told, ended) = run(course(text, 9, Pace::Clock { speed: 2.0 }), 2).await;
        let millis: Vec<_> = told.iter().map(|(_, took)| took.as_millis()).collect();
        assert_eq!(millis, [1000, 1000, 1500, 1000]);
        assert_eq!(ended, Ended { seconds: 2.0, stopped: false });
    }

    #[tokio::test(start_paused = true)]
    async fn told_to_stop_it_ends_what_it_has_begun_and_told_twice_it_does_not() {
        let text = "0 1000 1\n0 60000 1\n0 1000 1\n3600000 1 1\n";
        for (stops, served) in [(1, vec![0, 1]), (2, vec![0])] {
            let (tell, mut told_to) = mpsc::channel(2);
            let asking = async {
                tokio::time::sleep(Duration::from_millis(500)).await;
                tell.send(()).await.unwrap();
                tokio::time::sleep(Duration::from_secs(2)).await;
                if stops == 2 {
                    tell.send(()).await.unwrap();
                }
            };
            let started = Arc::new(AtomicUsize::new(0));
            let lanes = (0..2).map(|_| Numbers(started.clone())).collect();
            let driving = drive(course(text, 9, Pace::Answers), lanes, Told::default(), &mut told_to);
            let ((mut told, ended), ()) = futures_util::future::join(driving, asking).await;
            told.0.sort_unstable();
            assert!(told.0.iter().map(|(number, _)| *number).eq(served) && ended.stopped);
            assert_eq!(started.load(Ordering::Relaxed), 2);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn told_to_stop_it_does_not_wait_for_what_is_due_later() {
        let (tell, mut told_to) = mpsc::channel(2);
        tell.send(()).await.unwrap();
        let lanes = vec![Numbers(Arc::default())];
        let late = course("0 0 0\n18446744073709551615 1 1", 9, Pace::Clock { speed: 1e-9 });
        let (told, ended) = drive(late, lanes, Told::default(), &mut told_to).await;
        assert!(told.0.len() <= 1 && ended.stopped && ended.seconds < 1.0);
    }
}
