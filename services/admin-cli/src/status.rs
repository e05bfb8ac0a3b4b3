//! `kvasirctl status`: is it well, and if not, what.

use clap::Args;

use crate::{
    gather,
    output::{Answer, Output},
    render,
    session::Session,
};

/// How it is asked.
#[derive(Clone, Debug, Args)]
pub(crate) struct StatusArgs {
    /// Exit with 3 if something is wrong: a member that is not ready (and not leaving), or anything that status warns of
    #[arg(long)]
    check: bool,
}

/// Asks everybody. For people it is one screen: of a large cluster only those that are not ready are shown, `-o wide` shows all.
pub(crate) async fn run(args: StatusArgs, session: &Session) -> anyhow::Result<Answer> {
    let report = gather::gather(session).await?;
    let text = session.output().show(&report, || render::status(&report, session.output() == Output::Wide));
    Ok(Answer { text, unwell: args.check && report.problems() > 0 })
}
