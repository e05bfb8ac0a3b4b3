//! `kvasirctl status`: is it well, and if not, what.

use clap::Args;

use crate::{gather, output::Answer, render, session::Session};

/// How it is asked.
#[derive(Clone, Debug, Args)]
pub(crate) struct StatusArgs {
    /// Exit with 3 if something is wrong: a member that is not ready, or anything that status warns of
    #[arg(long)]
    check: bool,
}

/// Asks everybody.
pub(crate) async fn run(args: StatusArgs, session: &Session) -> anyhow::Result<Answer> {
    let report = gather::gather(session).await?;
    let text = session.output().show(&report, || render::status(&report));
    Ok(Answer { text, unwell: args.check && !report.is_well() })
}
