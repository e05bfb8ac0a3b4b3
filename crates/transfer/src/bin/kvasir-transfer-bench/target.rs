//! The side that owns the memory: fills it, opens it to initiators, checks it. The transfers themselves pass it by.

use std::{
    io::Read,
    net::{TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, ensure};
use kvasir_transfer::{Access, Grant, GrantRange};
use serde_json::json;

use crate::{
    cli::{self, Direction},
    control::{Answer, Ask, Line},
    engine::Buffer,
    measure::cpu_seconds,
};

/// Initiators served at once.
const LIMIT: usize = 64;

/// Serves until it is killed (or standard input ends, if that was asked for).
pub fn run(options: &cli::Target) -> Result<()> {
    let buffer = Arc::new(Buffer::new(&options.engine, options.buffer)?);
    let listener = TcpListener::bind(options.control).with_context(|| format!("listen on {}", options.control))?;
    let transports: Vec<_> = buffer.engine.descriptor().transports.iter().map(|way| way.kind.to_string()).collect();
    let ready =
        json!({"ready": true, "control": listener.local_addr()?, "buffer_bytes": buffer.len, "transports": transports});
    println!("{ready}");
    if options.until_eof {
        leave_at_eof();
    }
    let served = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let (stream, buffer, served) = (stream?, Arc::clone(&buffer), Arc::clone(&served));
        if served.fetch_add(1, Ordering::SeqCst) >= LIMIT {
            served.fetch_sub(1, Ordering::SeqCst);
            continue; // dropped, which hangs up
        }
        thread::Builder::new().name("bench-control".into()).spawn(move || {
            if let Err(error) = serve(&buffer, stream) {
                eprintln!("kvasir-transfer-bench: an initiator was turned away: {error:#}");
            }
            served.fetch_sub(1, Ordering::SeqCst);
        })?;
    }
    Ok(())
}

/// Ends the process when its standard input ends.
pub fn leave_at_eof() {
    thread::spawn(|| {
        let mut scrap = [0; 64];
        while matches!(std::io::stdin().read(&mut scrap), Ok(1..)) {}
        #[expect(clippy::disallowed_methods, reason = "nothing is to be finished: the one who started it is gone")]
        std::process::exit(0);
    });
}

/// Answers one initiator until it hangs up.
fn serve(buffer: &Buffer, stream: TcpStream) -> Result<()> {
    let mut line = Line::new(stream)?;
    let mut opened: Option<Grant> = None;
    while let Some(ask) = line.receive::<Ask>()? {
        let answer = answer(buffer, &mut opened, ask);
        line.send(&answer.unwrap_or_else(|error| Answer::Refused { reason: format!("{error:#}") }))?;
    }
    if let Some(grant) = opened {
        grant.revoke().wait();
    }
    Ok(())
}

fn answer(buffer: &Buffer, opened: &mut Option<Grant>, ask: Ask) -> Result<Answer> {
    match ask {
        Ask::Open { op, bytes } => {
            buffer.check(bytes)?;
            if let Some(before) = opened.take() {
                before.revoke().wait();
            }
            let access = match op {
                Direction::Read => Access::Read,
                Direction::Write => Access::Write,
            };
            let grant = buffer.engine.grant(vec![GrantRange { offset: buffer.base, len: bytes, access }])?;
            let key = opened.insert(grant).key().0;
            Ok(Answer::Opened { descriptor: buffer.engine.descriptor(), key, base: buffer.base })
        }
        Ask::Cpu => Ok(Answer::Cpu { seconds: cpu_seconds() }),
        Ask::Fill { seed, bytes } => {
            buffer.check(bytes)?;
            // Anything else: the pattern of no seed that an initiator uses.
            buffer.fill(seed.unwrap_or(u64::MAX), 0, bytes)?;
            Ok(Answer::Filled)
        }
        Ask::Check { seed, bytes } => {
            buffer.check(bytes)?;
            ensure!(bytes > 0, "nothing to check");
            Ok(Answer::Checked { first_wrong: buffer.first_wrong(seed, 0, 0, bytes)? })
        }
    }
}
