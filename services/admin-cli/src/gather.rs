//! Asking: etcd who is there, then every member how it is.

use std::time::Duration;

use futures_util::{StreamExt, stream};
use kvasir_cluster::{EngineInfo, Member, View};
use kvasir_types::{Role, Stage};

use crate::{
    judge,
    probe::{self, Readiness, Way},
    report::{Live, MemberReport, Report, State},
    session::Session,
};

/// Members asked at the same time.
const AT_ONCE: usize = 256;

/// Asks everybody. Fails only if etcd can't be read.
pub(crate) async fn gather(session: &Session) -> anyhow::Result<Report> {
    let way = session.way()?;
    let view = session.view().await?;
    Ok(ask_all(&view, &way).await)
}

/// Asks the members of a view.
pub(crate) async fn ask_all(view: &View, way: &Way) -> Report {
    let members = stream::iter(&view.members).map(|member| ask(member, way)).buffered(AT_ONCE).collect().await;
    judge::report(&view.members, members)
}

async fn ask(member: &Member, way: &Way) -> MemberReport {
    if let Some(engine) = &member.engine {
        return of_engine(member, engine, way.limit).await;
    }
    let live = async {
        match member.role {
            Role::Router => None,
            Role::Prefill | Role::Decode => Some(probe::worker(&member.grpc, way).await),
            Role::KvStore => Some(probe::store(&member.grpc, way).await),
        }
    };
    let (live, readiness) = futures_util::future::join(live, probe::ready(&member.admin, way.limit)).await;
    let (state, reason) = state(member, live.as_ref(), readiness);
    MemberReport {
        role: member.role,
        works_as: member.works_as(),
        pinned: member.duty.pinned,
        id: member.id.to_string(),
        state,
        reason,
        version: member.version.clone(),
        protocol: member.protocol,
        incarnation: member.incarnation.to_string(),
        grpc: member.grpc.clone(),
        http: member.http.clone(),
        admin: member.admin.clone(),
        model: member.model.as_ref().map(|model| model.name.clone()),
        live: live.and_then(|answer| answer.ok().map(|answer| answer.live)),
    }
}

/// An engine of somebody else's says only whether it is well.
async fn of_engine(member: &Member, engine: &EngineInfo, limit: Duration) -> MemberReport {
    let address = engine.url.trim_start_matches("http://").trim_end_matches('/');
    let (state, reason) = match probe::health(address, limit).await {
        Readiness::Ready => (State::Ready, String::new()),
        Readiness::NotReady(why) => (State::NotReady, why),
        Readiness::Unknown(why) => (State::Unreachable, format!("http {address}: {why}")),
    };
    MemberReport {
        role: member.role,
        works_as: member.role,
        pinned: false,
        id: member.id.to_string(),
        state,
        reason,
        version: member.version.clone(),
        protocol: member.protocol,
        incarnation: member.incarnation.to_string(),
        grpc: String::new(),
        http: engine.url.clone(),
        admin: String::new(),
        model: Some(engine.model.clone()),
        live: None,
    }
}

/// What a member's answers add up to.
fn state(member: &Member, live: Option<&Result<probe::Answer, String>>, readiness: Readiness) -> (State, String) {
    let draining = member.draining || matches!(live, Some(Ok(answer)) if answer.draining);
    match (live, readiness) {
        (Some(Err(why)), _) => (State::Unreachable, format!("grpc {}: {why}", member.grpc)),
        (_, Readiness::Unknown(why)) => (State::Unreachable, format!("admin {}: {why}", member.admin)),
        _ if member.duty.stage == Stage::Cordoned => (State::Cordoned, "is given no new requests".to_owned()),
        _ if member.duty.stage == Stage::Drained => (State::Drained, "safe to delete".to_owned()),
        _ if draining => (State::Draining, "takes no new work".to_owned()),
        (_, Readiness::NotReady(why)) => (State::NotReady, why),
        (_, Readiness::Ready) => (State::Ready, String::new()),
    }
}

impl Live {
    /// A worker's numbers.
    pub(crate) fn worker(&self) -> Option<&crate::report::WorkerNumbers> {
        match self {
            Self::Worker(numbers) => Some(numbers),
            Self::Store(_) => None,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
