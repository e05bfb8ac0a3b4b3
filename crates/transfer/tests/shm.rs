//! Shared memory between real processes: what becomes of the fence when the other one is stopped, killed or restarted.
//!
//! The other process is this binary again, running [`the_other_process`] with a role. It is told what to do, and answers, line
//! by line.

#![cfg(target_os = "linux")]
#![expect(clippy::unwrap_used, reason = "an error here is a failed test")]

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    process::{Child, ChildStdin, Command, Stdio},
    sync::mpsc::{self, Receiver},
    thread,
    time::{Duration, Instant},
};

use kvasir_transfer::{
    Access, Batch, Config, Error, Grant, GrantRange, LocalNet, Op, Range, Refusal, TransferEngine, Transports,
};
use kvasir_types::{
    Deadline, GrantKey, Incarnation, RegionInfo, SegmentDescriptor, SegmentId, TransportAddress, TransportKind,
};
use rustix::process::{Pid, Signal, kill_process};

const LEN: u64 = 32 << 20;
/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(30);
const ROLE: &str = "KVASIR_SHM_TEST_ROLE";
/// What marks a line as meant for the other process, among those of the test harness.
const MARK: &str = "@ ";

fn engine() -> TransferEngine {
    let config = Config {
        transports: Transports::Named(vec![TransportKind::Shm]),
        fence_grace: Duration::from_millis(50),
        ..Config::default()
    };
    TransferEngine::new(config, LocalNet::new(), LEN as usize).unwrap()
}

fn grant(engine: &TransferEngine, access: Access) -> Grant {
    engine.grant(vec![GrantRange { offset: 0, len: LEN, access }]).unwrap()
}

fn batch(op: Op, target: &SegmentDescriptor, key: GrantKey, len: u64) -> Batch {
    Batch::new(op, target.clone(), key, vec![Range { local: 0, remote: 0, len }], Deadline::after(LONG))
}

fn bytes(engine: &TransferEngine) -> Vec<u8> {
    let mut bytes = vec![0; LEN as usize];
    engine.read_bytes(0, &mut bytes).unwrap();
    bytes
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let until = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < until, "waited in vain until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

fn within_limit<T: Send + 'static>(what: &str, body: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || drop(sender.send(body())));
    receiver.recv_timeout(LONG).unwrap_or_else(|_| panic!("{what} did not end"))
}

/// A descriptor in one line: all that a peer needs.
fn write_down(target: &SegmentDescriptor) -> String {
    format!("{} {} {}", target.segment.0, target.incarnation.0, target.transports[0].address)
}

fn read_back<'a>(mut words: impl Iterator<Item = &'a str>) -> SegmentDescriptor {
    let mut number = || words.next().unwrap().parse().unwrap();
    let (segment, incarnation) = (SegmentId(number()), Incarnation(number()));
    let address = words.next().unwrap().to_owned();
    SegmentDescriptor {
        name: String::new(),
        segment,
        incarnation,
        len: LEN,
        regions: vec![RegionInfo { base: 0, len: LEN, shared: true }],
        transports: vec![TransportAddress { kind: TransportKind::Shm, address }],
    }
}

/// Not a test: the other process of those below. Without a role it has nothing to do.
#[test]
#[ignore = "not a test: the other process of those beside it: cargo nextest run -p kvasir-transfer --test shm"]
fn the_other_process() {
    let Ok(role) = env::var(ROLE) else { return };
    let engine = engine();
    let say = |line: String| {
        let mut out = std::io::stdout().lock();
        writeln!(out, "\n{MARK}{line}").unwrap();
        out.flush().unwrap();
    };
    let lines = std::io::stdin().lines().map_while(Result::ok);
    match role.as_str() {
        // Writes all of a peer's segment over and over until it is not let in any more.
        "writer" => {
            engine.write_bytes(0, &vec![7; LEN as usize]).unwrap();
            say("ready".into());
            for line in lines {
                let mut words = line.split(' ');
                let key = GrantKey(words.next().unwrap().parse().unwrap());
                let target = read_back(words);
                let error = loop {
                    if let Err(error) = engine.submit(batch(Op::Write, &target, key, LEN)).wait() {
                        break error;
                    }
                };
                say(format!("ended {error:?}"));
            }
        }
        // Lets its memory be read.
        "owner" => {
            let fill = lines.into_iter().next().unwrap().parse().unwrap();
            engine.write_bytes(0, &vec![fill; LEN as usize]).unwrap();
            let (one, other) = (grant(&engine, Access::Read), grant(&engine, Access::Read));
            say(format!("owner {} {} {}", one.key().0, other.key().0, write_down(&engine.descriptor())));
            let _ = std::io::stdin().read_line(&mut String::new());
        }
        other => panic!("no such role: {other}"),
    }
}

/// Handle to it. It goes when this goes.
struct Other {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Other {
    fn start(role: &str) -> Self {
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", "the_other_process", "--ignored", "--nocapture", "--test-threads=1"])
            .env(ROLE, role)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if let Some(line) = line.strip_prefix(MARK) {
                    let _ = sender.send(line.to_owned());
                }
            }
        });
        Self { child, stdin, lines }
    }

    /// A process that writes when it is told to.
    fn writer() -> Self {
        let writer = Self::start("writer");
        assert_eq!(writer.hear(), "ready");
        writer
    }

    /// A process whose memory holds `fill` everywhere; its segment and two keys to read it.
    fn owner(fill: u8) -> (Self, SegmentDescriptor, [GrantKey; 2]) {
        let mut owner = Self::start("owner");
        owner.say(&fill.to_string());
        let line = owner.hear();
        let mut words = line.split(' ').skip(1);
        let keys = [(); 2].map(|()| GrantKey(words.next().unwrap().parse().unwrap()));
        (owner, read_back(words), keys)
    }

    fn say(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").unwrap();
    }

    fn hear(&self) -> String {
        self.lines.recv_timeout(LONG).expect("the other process says something")
    }

    fn write(&mut self, target: &TransferEngine, key: GrantKey) {
        self.say(&format!("{} {}", key.0, write_down(&target.descriptor())));
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }

    /// Stops it; returns when no thread of it runs any more.
    fn stop(&self) {
        self.signal(Signal::STOP);
        let tasks = format!("/proc/{}/task", self.child.id());
        wait_until("every thread has stopped", || {
            let stats = fs::read_dir(&tasks).unwrap().flatten();
            // `pid (name) state …`, and no name here has a parenthesis.
            let mut stats = stats.filter_map(|task| fs::read_to_string(task.path().join("stat")).ok());
            stats.all(|stat| stat.split(") ").nth(1).is_some_and(|rest| rest.starts_with('T')))
        });
    }

    fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.child.wait().unwrap();
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A writer stopped in the midst of a copy into `owner`, and the revocation that waits for it.
fn stopped_inside(owner: &TransferEngine) -> (Other, thread::JoinHandle<()>) {
    let mut writer = Other::writer();
    for attempt in 0..100 {
        owner.write_bytes(0, &vec![0; LEN as usize]).unwrap();
        let grant = grant(owner, Access::Write);
        writer.write(owner, grant.key());
        wait_until("a byte has landed", || {
            let mut first = [0];
            owner.read_bytes(0, &mut first).unwrap();
            first == [7]
        });
        thread::sleep(Duration::from_micros(100 * (attempt % 10)));
        writer.stop();
        let before = owner.stats().held_fences;
        let revoking = thread::spawn(move || grant.revoke().wait());
        // Either it was between two copies, or it is waited for, and said to be after the grace.
        wait_until("the fence is down or held", || revoking.is_finished() || owner.stats().held_fences > before);
        if owner.stats().held_fences > before {
            assert!(!revoking.is_finished());
            return (writer, revoking);
        }
        revoking.join().unwrap();
        writer.signal(Signal::CONT);
        assert!(writer.hear().starts_with("ended Refused"));
    }
    panic!("never stopped inside a copy");
}

/// After the fence the memory is its owner's alone.
fn no_late_byte(owner: &TransferEngine, meanwhile: impl FnOnce()) {
    owner.write_bytes(0, &vec![0xee; LEN as usize]).unwrap();
    meanwhile();
    assert!(bytes(owner).iter().all(|&byte| byte == 0xee));
}

#[test]
fn a_stopped_writer_keeps_its_range_fenced_until_it_goes_on() {
    let owner = engine();
    let (writer, revoking) = stopped_inside(&owner);
    assert_eq!(owner.stats().held_fences, 1);
    assert!(!revoking.is_finished());
    writer.signal(Signal::CONT);
    within_limit("the revocation", move || revoking.join().unwrap());
    no_late_byte(&owner, || assert!(writer.hear().starts_with("ended Refused")));
    assert_eq!(owner.stats().accepted_connections, 1, "it said that it left, and is as welcome as before");
}

#[test]
fn a_writer_killed_in_mid_copy_releases_its_range() {
    let owner = engine();
    let (mut writer, revoking) = stopped_inside(&owner);
    assert!(!revoking.is_finished());
    writer.kill();
    within_limit("the revocation", move || revoking.join().unwrap());
    no_late_byte(&owner, || wait_until("its connection is gone", || owner.stats().accepted_connections == 0));
}

#[test]
fn a_writer_killed_at_any_moment_releases_its_range() {
    let owner = engine();
    for round in 0..5 {
        let mut writer = Other::writer();
        owner.write_bytes(0, &[0]).unwrap();
        let grant = grant(&owner, Access::Write);
        writer.write(&owner, grant.key());
        wait_until("a byte has landed", || bytes(&owner)[0] == 7);
        thread::sleep(Duration::from_micros(300 * round));
        writer.kill();
        within_limit("the revocation", move || grant.revoke().wait());
        no_late_byte(&owner, || {});
    }
}

#[test]
fn an_owner_that_shuts_down_does_not_wait_for_ever_for_a_stopped_writer() {
    let owner = engine();
    let (_writer, revoking) = stopped_inside(&owner);
    within_limit("shutdown", move || owner.shutdown());
    within_limit("the revocation", move || revoking.join().unwrap());
}

#[test]
fn revocations_in_the_storm_of_another_process_leave_no_late_byte() {
    let owner = engine();
    let mut writer = Other::writer();
    for round in 0..30 {
        owner.write_bytes(0, &[0]).unwrap();
        let grant = grant(&owner, Access::Write);
        writer.write(&owner, grant.key());
        wait_until("a byte has landed", || {
            let mut first = [0];
            owner.read_bytes(0, &mut first).unwrap();
            first == [7]
        });
        thread::sleep(Duration::from_micros(97 * round));
        if round % 2 == 0 {
            grant.revoke().wait();
        } else {
            drop(grant);
        }
        no_late_byte(&owner, || assert!(writer.hear().starts_with("ended Refused")));
    }
    let stats = owner.stats();
    assert_eq!((stats.refused.malformed, stats.accepted_connections), (0, 1));
    assert!(stats.owner.shm.written_bytes > 30 << 20);
}

#[test]
fn an_open_grant_needs_nothing_of_its_owner_and_a_closed_one_has_a_deadline() {
    let client = engine();
    let (other, target, [opened, unopened]) = Other::owner(5);
    client.submit(batch(Op::Read, &target, opened, LEN)).wait().unwrap();
    client.write_bytes(0, &vec![0; LEN as usize]).unwrap();
    other.stop();
    client.submit(batch(Op::Read, &target, opened, LEN)).wait().unwrap();
    assert!(bytes(&client).iter().all(|&byte| byte == 5));
    let mut asking = batch(Op::Read, &target, unopened, LEN);
    asking.deadline = Deadline::after(Duration::from_millis(100));
    let transfer = client.submit(asking);
    let result = within_limit("the transfer", move || transfer.wait());
    assert!(matches!(result, Err(Error::DeadlineExceeded)), "{result:?}");
    other.signal(Signal::CONT);
    client.submit(batch(Op::Read, &target, unopened, LEN)).wait().unwrap();
}

#[test]
fn the_keys_and_the_address_of_a_killed_owner_open_nothing() {
    let client = engine();
    let (mut first, old, [key, _]) = Other::owner(5);
    client.submit(batch(Op::Read, &old, key, LEN)).wait().unwrap();
    first.kill();
    wait_until("it is known to be gone", || client.stats().open_connections == 0);
    let result = client.submit(batch(Op::Read, &old, key, LEN)).wait();
    assert!(matches!(result, Err(Error::Unreachable { .. })), "{result:?}");

    // Another life, with other memory, at another address: what the old descriptor says of the segment is stale there.
    let (_second, new, [fresh, _]) = Other::owner(6);
    let mut moved = old.clone();
    moved.transports = new.transports.clone();
    let result = client.submit(batch(Op::Read, &moved, key, LEN)).wait();
    assert!(matches!(result, Err(Error::Stale { .. })), "{result:?}");
    let result = client.submit(batch(Op::Read, &new, key, LEN)).wait();
    assert!(matches!(result, Err(Error::Refused { refusal: Refusal::UnknownGrant, .. })), "{result:?}");
    client.submit(batch(Op::Read, &new, fresh, LEN)).wait().unwrap();
    assert!(bytes(&client).iter().all(|&byte| byte == 6));
}
