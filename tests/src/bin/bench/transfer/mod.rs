//! The transfer engine beside other transfer engines and beside what bounds it, between two processes on loopback.
//!
//! Everybody moves the same blocks in the same order through the same working set, one batch after the other, and takes turns
//! with all others in every repetition; who goes first changes. Ratios are taken within a repetition. What polls while it
//! waits is stopped while others are measured. Nobody is measured before a check that the bytes asked for are moved.
//!
//! **Expected**, from what each has to do, and written down before the first whole run:
//!
//! | | expected | because |
//! | --- | --- | --- |
//! | `tcp` / Mooncake TCP, 64 KiB to 64 MiB | 2 to 2.5 | both copy twice through the kernel; Mooncake one connection per request and a poll, ours two, which fill two cores |
//! | `tcp` / plain socket loop, from 1 MiB | 1.2 to 1.5 | two connections against one |
//! | `auto` (shm) / memcpy, 16 MiB | 0.95 | it is a memcpy, and a thread is woken per batch |
//! | `auto` / NIXL same host | 1.1 (16 MiB) to 3 (4 KiB) | its cma is one copy, too, but by the kernel, page by page |
//! | 4 KiB read, one at a time | 1.5 to 2 µs, NIXL 3.5 to 4 | no system call against one, and Python's share in NIXL's |
//! | processor time, `tcp` / Mooncake | 0.5 | nobody polls; both ends copy once |
//! | processor time, `auto` / NIXL | 0.5 | the owner sleeps, NIXL's polls |
//! | `ucx` (its tcp: what of UCX can be fenced on one host) | 1 to 2 GB/s, as NIXL TCP | the same library |
//! | `local` above a memcpy, 4 KiB | 1 to 2 µs | allocation of the batch, a table of grants, a clock read twice |

mod goals;
mod mooncake;
mod nixl;
mod ours;
mod plan;

use std::{
    fmt::Display,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::Result;

use self::{
    mooncake::Mooncake,
    nixl::Nixl,
    ours::Ours,
    plan::{Carrier, Found, Load, SINGLE, Way},
};
use crate::{Options, report::Report};

/// Another repetition is begun only if it will have ended by then, in a whole run and in a quick one.
const LIMIT: [Duration; 2] = [Duration::from_mins(14), Duration::from_secs(220)];
/// As many repetitions as keep a whole run below a quarter of an hour.
const REPETITIONS: usize = 5;
/// How long each figure is measured, in a whole run and in a quick one.
const SECONDS: [f64; 2] = [0.5, 0.3];

/// Measures, and says how far it is: a run takes minutes.
pub fn run(options: &Options) -> Result<Report> {
    let repetitions = options.repetitions.min(REPETITIONS);
    let dir = tempfile::tempdir()?;
    let mut found = Found::default();
    let quick = usize::from(repetitions < REPETITIONS);
    let (seconds, limit) = (SECONDS[quick], LIMIT[quick]);
    let mut carriers = Carriers::start(dir.path(), seconds, &mut found)?;
    let started = Instant::now();
    let loads = plan::loads();
    for repetition in 0..repetitions {
        let elapsed = started.elapsed();
        if repetition > 0 && elapsed + elapsed / repetition as u32 > limit {
            println!("the machine is busy: {repetition} repetitions are all there is time for");
            break;
        }
        for (index, load) in loads.iter().enumerate() {
            let (done, all) = (repetition * loads.len() + index, repetitions * loads.len());
            let elapsed = started.elapsed().as_secs();
            println!("{elapsed:>4} s  {done:>3} of {all}  {} x {}", load.batch, load.name());
            let mut turn = Carriers::of(load);
            let first = repetition % turn.len();
            turn.rotate_left(first);
            for carrier in turn {
                carriers.measure(carrier, load, &mut found)?;
            }
        }
    }
    println!("{:>4} s  done", started.elapsed().as_secs());
    let mut report = Report::new("transfer");
    goals::rows(&found, &carriers.auto).into_iter().for_each(|row| report.push(row));
    Ok(report)
}

/// All that is running.
struct Carriers<'a> {
    ours: Ours<'a>,
    mooncake: Option<Mooncake>,
    nixl_host: Option<Nixl>,
    nixl_tcp: Option<Nixl>,
    /// What `auto` chose.
    auto: String,
    /// How long each figure is measured.
    seconds: f64,
}

impl<'a> Carriers<'a> {
    fn start(dir: &'a Path, seconds: f64, found: &mut Found) -> Result<Self> {
        let ours = Ours::start(dir)?;
        println!("checking that every byte arrives");
        ours.verify("auto")?;
        ours.verify("tcp")?;
        if let Err(error) = ours.verify("ucx") {
            say_missing(Carrier::Ucx, &error, found);
        }
        let mooncake = or_missing(Mooncake::start(dir), &[Carrier::Mooncake], found);
        let host = Nixl::start("nixl-host", "cma,posix,self,tcp", dir);
        let nixl_host = or_missing(host, &[Carrier::NixlHost], found);
        let nixl_tcp = or_missing(Nixl::start("nixl-tcp", "tcp,self", dir), &[Carrier::NixlTcp], found);
        Ok(Self { ours, mooncake, nixl_host, nixl_tcp, auto: String::new(), seconds })
    }

    /// Who carries a load, in an order in which those that are compared follow one another.
    fn of(load: &Load) -> Vec<Carrier> {
        use Carrier::{Auto, Local, Mooncake, NixlHost, NixlTcp, Socket, Tcp, Ucx};
        let mut carriers = vec![Mooncake, Tcp, Socket, NixlTcp, Ucx, NixlHost, Auto];
        if load.op == Way::Read {
            carriers.push(Local); // copies have one direction; a memcpy is measured with it
        }
        if load.block == SINGLE && load.batch == 1 {
            carriers.retain(|carrier| *carrier != Socket); // it has no single operations
        }
        carriers
    }

    fn measure(&mut self, carrier: Carrier, load: &Load, found: &mut Found) -> Result<()> {
        if found.is_missing(carrier) {
            return Ok(());
        }
        let seconds = self.seconds;
        let figure = match carrier {
            Carrier::Auto | Carrier::Tcp | Carrier::Ucx => {
                let (over, figure) = self.ours.transfer(carrier.name(), load, seconds)?;
                if carrier == Carrier::Auto {
                    self.auto = over;
                }
                Ok(figure)
            }
            Carrier::Local | Carrier::Memcpy => {
                let [memcpy, local] = self.ours.local(load, seconds)?;
                found.add(Carrier::Memcpy, *load, memcpy);
                Ok(local)
            }
            Carrier::Socket => self.ours.socket(load, seconds),
            Carrier::Mooncake => self.mooncake.as_ref().expect("not missing").transfer(load),
            Carrier::NixlHost => self.nixl_host.as_mut().expect("not missing").transfer(load, seconds),
            Carrier::NixlTcp => self.nixl_tcp.as_mut().expect("not missing").transfer(load, seconds),
        };
        match figure {
            Ok(figure) => found.add(carrier, *load, figure),
            // A rival may break; its row says how, and the others go on.
            Err(error) => say_missing(carrier, &error, found),
        }
        Ok(())
    }
}

fn or_missing<T>(started: Result<T>, carriers: &[Carrier], found: &mut Found) -> Option<T> {
    match started {
        Ok(started) => Some(started),
        Err(error) => {
            carriers.iter().for_each(|&carrier| say_missing(carrier, &error, found));
            None
        }
    }
}

fn say_missing(carrier: Carrier, error: &impl Display, found: &mut Found) {
    println!("{} is left out: {error:#}", carrier.name());
    found.miss(carrier, &format!("{error:#}"));
}
