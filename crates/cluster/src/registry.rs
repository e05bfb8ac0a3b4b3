//! The seam between services and whatever keeps the members.

use std::sync::Arc;

use async_trait::async_trait;
use kvasir_types::{MemberId, Role};
use tokio::sync::watch;

use crate::{Change, Document, Error, Event, Found, Member, Noted, Office, Scope, Settings, View};

/// Registers this process's members and shows everybody's. One contract suite runs against every implementation.
///
/// Dropping a registry is what a crash is: its members are no longer kept, and leave when their leases end (in memory: at
/// once). So hold it for as long as they live.
#[async_trait]
pub trait Registry: Send + Sync {
    /// Puts a member into the cluster and keeps it there until it is deregistered or this process is gone. When this
    /// returns, it is published; everybody's view (this one too) shows it a moment later. Registering the same incarnation again replaces its record.
    ///
    /// # Errors
    /// [`Error::Taken`] if another living process has the name; before that is said, it gets the time of a lease to turn
    /// out dead.
    async fn register(&self, member: Member) -> Result<(), Error>;

    /// Replaces the record of a registered member. If the registry is away, the record is published when it is back.
    ///
    /// # Errors
    /// [`Error::NotRegistered`] if this registry does not hold the member.
    async fn update(&self, member: Member) -> Result<(), Error>;

    /// Takes a member out of the cluster at once. A member that is not there is not an error.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if nobody could be told; the member then leaves when its lease ends.
    async fn deregister(&self, id: &MemberId, role: Role) -> Result<(), Error>;

    /// Takes an office if nobody holds it, and says who does. A registered member of this process holds it until it is
    /// deregistered or its lease ends; asking again is how to know that it still does. Offices are named like members.
    ///
    /// # Errors
    /// [`Error::NotRegistered`] if this registry does not hold the member; [`Error::Unreachable`] if nobody could be asked:
    /// then it is not known who holds it, and nobody should act.
    async fn claim_office(&self, office: &MemberId, candidate: &MemberId, role: Role) -> Result<Office, Error>;

    /// The members, now and whenever they change. Reading never waits.
    fn view(&self) -> watch::Receiver<Arc<View>>;

    /// Something happened. Never waits: the cluster's history gets it a moment later, or it is counted as lost.
    fn note(&self, event: Event);

    /// What happened after the event of that key, oldest first; an empty key: all that is still known.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if nobody could be asked.
    async fn events(&self, after: &str) -> Result<Vec<Noted>, Error>;

    /// How many events this process did not get into the history.
    fn events_lost(&self) -> u64;

    /// What operators have set for services while they run, now and whenever it changes; `None` until it was read. Reading
    /// never waits; while the registry is away, it is what was seen last.
    fn settings(&self) -> watch::Receiver<Option<Arc<Settings>>>;

    /// What is set for a scope as of now, rather than as it was last seen.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if nobody could be asked.
    async fn settings_of(&self, scope: &Scope) -> Result<Option<Found>, Error>;

    /// Writes what is set for a scope over what its writer has seen (`document.revision`; 0: nothing), and its changes into
    /// the history: both or neither. Its new revision.
    ///
    /// # Errors
    /// [`Error::Changed`] if somebody else has written in between; [`Error::TooManySettings`]; [`Error::Unreachable`] if
    /// nobody could be asked: then it is not known whether it was written.
    async fn set(&self, scope: &Scope, document: &Document, changes: &[Change]) -> Result<u64, Error>;

    /// The last changes, at most 256, oldest first.
    ///
    /// # Errors
    /// [`Error::Unreachable`] if nobody could be asked.
    async fn changes(&self) -> Result<Vec<Change>, Error>;

    /// Whether the last thing asked of the registry got an answer.
    fn answers(&self) -> bool;
}
