//! `kvasirctl workers`: workers and store nodes in detail, and what an operator does with them.

use clap::{Args, Subcommand};

use crate::{
    gather,
    output::Answer,
    render,
    session::Session,
    stage::{self, StageCommand},
    worker::{self, WorkerCommand},
};

/// What is asked about workers; nothing: the list.
#[derive(Clone, Debug, Args)]
pub(crate) struct WorkersArgs {
    #[command(subcommand)]
    command: Option<WorkersCommand>,
}

/// What is asked about workers.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum WorkersCommand {
    /// All of them: addresses, blocks, work done
    List,
    #[command(flatten)]
    Stage(StageCommand),
    #[command(flatten)]
    Duty(WorkerCommand),
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(args: WorkersArgs, session: &Session) -> anyhow::Result<Answer> {
    match args.command.unwrap_or(WorkersCommand::List) {
        WorkersCommand::List => {
            let report = gather::gather(session).await?;
            Ok(session.output().show(&report.workers(), || render::workers(&report)).into())
        }
        WorkersCommand::Stage(command) => stage::run(command, session).await,
        WorkersCommand::Duty(command) => worker::run(command, session).await,
    }
}
