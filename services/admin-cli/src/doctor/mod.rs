//! `kvasirctl doctor`: what is wrong with a cluster or a machine, and what to do about it. It looks, and changes nothing.

mod cluster;
mod folder;
mod machine;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;

use crate::{output::Answer, render::Table, session::Session};

/// Whom to look at; nothing: the cluster, then this machine.
#[derive(Clone, Debug, Args)]
pub(crate) struct DoctorArgs {
    #[command(subcommand)]
    command: Option<DoctorCommand>,
}

#[derive(Clone, Debug, Subcommand)]
enum DoctorCommand {
    /// etcd, members, versions, clocks, layouts, tokenizers
    Cluster,
    /// This machine: limits, memory, RDMA devices, ports, a model's folder
    Machine(MachineArgs),
}

/// What is to be on this machine.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct MachineArgs {
    /// A model's folder: whether it is readable and complete
    #[arg(long, value_name = "FOLDER")]
    model: Option<PathBuf>,
    /// A port that a service is to listen on: whether it is free; may be repeated
    #[arg(long, value_name = "PORT", value_delimiter = ',')]
    port: Vec<u16>,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing.
    Note,
    /// To be mended.
    Problem,
}

/// Something that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    pub(crate) level: Level,
    /// What was looked at.
    pub(crate) what: String,
    /// What was found.
    pub(crate) found: String,
    /// What to do; empty if nothing.
    pub(crate) remedy: String,
}

impl Finding {
    pub(crate) fn ok(what: &str, found: impl Into<String>) -> Self {
        Self { level: Level::Ok, what: what.to_owned(), found: found.into(), remedy: String::new() }
    }

    pub(crate) fn note(what: &str, found: impl Into<String>, remedy: &str) -> Self {
        Self { level: Level::Note, remedy: remedy.to_owned(), ..Self::ok(what, found) }
    }

    pub(crate) fn problem(what: &str, found: impl Into<String>, remedy: &str) -> Self {
        Self { level: Level::Problem, remedy: remedy.to_owned(), ..Self::ok(what, found) }
    }
}

/// Looks, and says what was found. Unwell if something is to be mended.
pub(crate) async fn run(args: DoctorArgs, session: &Session) -> anyhow::Result<Answer> {
    let findings = match args.command {
        Some(DoctorCommand::Cluster) => cluster::look(session).await?,
        Some(DoctorCommand::Machine(args)) => machine::look(&args),
        None => all(session).await?,
    };
    let unwell = findings.iter().any(|finding| finding.level == Level::Problem);
    Ok(Answer { text: session.output().show(&findings, || table(&findings)), unwell })
}

/// The cluster, then this machine.
pub(crate) async fn all(session: &Session) -> anyhow::Result<Vec<Finding>> {
    let mut findings = cluster::look(session).await?;
    findings.extend(machine::look(&MachineArgs::default()));
    Ok(findings)
}

fn table(findings: &[Finding]) -> String {
    let mut table = Table::new(&["", "WHAT", "FOUND"]);
    for finding in findings {
        let sign = match finding.level {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Problem => "MEND",
        };
        table.row(vec![sign.to_owned(), finding.what.clone(), finding.found.clone()]);
        if !finding.remedy.is_empty() {
            table.row(vec![String::new(), String::new(), format!("→ {}", finding.remedy)]);
        }
    }
    let problems = findings.iter().filter(|finding| finding.level == Level::Problem).count();
    let end = match problems {
        0 => "nothing to mend".to_owned(),
        1 => "one thing to mend".to_owned(),
        problems => format!("{problems} things to mend"),
    };
    format!("{}\n{end}\n", table.render())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_mended_says_how() {
        let findings = [
            Finding::ok("etcd", "answers in 1 ms"),
            Finding::note("huge pages", "none", "vm.nr_hugepages"),
            Finding::problem("clock", "3 s behind", "start chrony"),
        ];
        insta::assert_snapshot!(table(&findings), @r"
              WHAT        FOUND
        ok    etcd        answers in 1 ms
        note  huge pages  none
                          → vm.nr_hugepages
        MEND  clock       3 s behind
                          → start chrony

        one thing to mend
        ");
    }
}
