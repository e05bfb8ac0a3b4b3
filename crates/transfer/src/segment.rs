//! Segments by name: found in a directory, kept, and looked up again when their owner has restarted.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
};

use kvasir_types::{Deadline, GrantKey, SegmentDescriptor};

use crate::{
    batch::{Batch, Op, Priority, Range, Report},
    engine::TransferEngine,
    error::Error,
};

/// What an owner publishes under its segment's name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// How to reach it.
    pub descriptor: SegmentDescriptor,
    /// The key of a grant meant for everybody who can read the directory; `None` where each user is given its own.
    pub grant: Option<GrantKey>,
}

/// Future of a lookup.
pub type Lookup<'a> = Pin<Box<dyn Future<Output = Result<Published, Error>> + Send + 'a>>;

/// Where segments are found by name: the cluster's metadata, or whatever a program keeps such things in.
///
/// The engine asks it when a segment is opened and when its owner is not there any more, never on the way of a transfer
/// that works.
pub trait Directory: Send + Sync {
    /// What is published under a name now; [`Error::UnknownSegment`] if nothing is.
    fn find<'a>(&'a self, name: &'a str) -> Lookup<'a>;
}

/// A segment opened by name: a handle that outlives its owner's restarts. Clones share what is known of it.
///
/// ```
/// use std::{sync::Arc, time::Duration};
///
/// use kvasir_transfer::{
///     Access, Allocation, Directory, Error, GrantRange, Lookup, Op, Priority, Published, Range, TransferEngine,
/// };
/// use kvasir_types::Deadline;
///
/// /// Knows one owner; a real one asks the cluster's metadata.
/// struct One(Published);
///
/// impl Directory for One {
///     fn find<'a>(&'a self, name: &'a str) -> Lookup<'a> {
///         Box::pin(async move {
///             let unknown = || Error::UnknownSegment { name: name.into(), reason: "not here".into() };
///             (name == self.0.descriptor.name).then(|| self.0.clone()).ok_or_else(unknown)
///         })
///     }
/// }
///
/// # fn main() -> Result<(), Error> {
/// let owner = TransferEngine::builder().name("weights").arena(Allocation::new(4096)).build()?;
/// owner.write_bytes(0, b"bytes for everybody")?;
/// let grant = owner.grant(vec![GrantRange { offset: 0, len: 4096, access: Access::Read }])?;
/// let published = Published { descriptor: owner.descriptor(), grant: Some(grant.key()) };
///
/// let engine = TransferEngine::builder().arena(Allocation::new(4096)).directory(Arc::new(One(published))).build()?;
/// let read = async {
///     let segment = engine.open("weights").await?;
///     let range = Range { local: 0, remote: 0, len: 19 };
///     segment.transfer(Op::Read, vec![range], Deadline::after(Duration::from_secs(5)), Priority::Normal).await
/// };
/// # let mut read = std::pin::pin!(read);
/// # let mut context = std::task::Context::from_waker(std::task::Waker::noop());
/// # while read.as_mut().poll(&mut context).is_pending() { std::thread::yield_now() }
/// # let mut bytes = [0; 19];
/// # engine.read_bytes(0, &mut bytes)?;
/// # assert_eq!(&bytes, b"bytes for everybody");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Segment(Arc<Inner>);

struct Inner {
    name: String,
    engine: TransferEngine,
    directory: Arc<dyn Directory>,
    known: Mutex<Published>,
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment").field("name", &self.0.name).finish()
    }
}

impl Segment {
    pub(crate) async fn open(
        engine: TransferEngine,
        directory: Arc<dyn Directory>,
        name: String,
    ) -> Result<Self, Error> {
        let known = directory.find(&name).await?;
        Ok(Self(Arc::new(Inner { name, engine, directory, known: Mutex::new(known) })))
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// What is known of it now.
    pub fn published(&self) -> Published {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks the directory again; whether another life of the owner was found.
    ///
    /// # Errors
    /// Those of the directory; what was known stays known.
    pub async fn refresh(&self) -> Result<bool, Error> {
        let found = self.0.directory.find(&self.0.name).await?;
        let mut known = self.0.known.lock().unwrap_or_else(PoisonError::into_inner);
        let another = found.descriptor.incarnation != known.descriptor.incarnation;
        *known = found;
        Ok(another)
    }

    /// Moves ranges under the published grant. If the owner turns out to have restarted, it is looked up again and the
    /// transfer goes to its new life: the old one's key is never used there.
    ///
    /// # Errors
    /// Those of [`TransferEngine::submit`]; [`Error::UnknownSegment`] if nothing, or no grant, is published any more.
    pub async fn transfer(
        &self,
        op: Op,
        ranges: Vec<Range>,
        deadline: Deadline,
        priority: Priority,
    ) -> Result<Report, Error> {
        let attempt = async || {
            let Published { descriptor, grant } = self.published();
            let reason = || "it publishes no grant".to_owned();
            let grant = grant.ok_or_else(|| Error::UnknownSegment { name: self.0.name.clone(), reason: reason() })?;
            let batch = Batch { priority, ..Batch::new(op, descriptor, grant, ranges.clone(), deadline) };
            self.0.engine.submit(batch).await
        };
        match attempt().await {
            Err(
                error @ (Error::Stale { .. }
                | Error::Unreachable { .. }
                | Error::Disconnected { .. }
                | Error::Resting { .. }
                | Error::Refused { .. }
                | Error::OutOfBounds { .. }),
            ) => {
                // A refusal may come from a grant that was published anew, too.
                let before = self.published();
                if self.refresh().await.is_err() || self.published() == before {
                    return Err(error);
                }
                attempt().await
            }
            other => other,
        }
    }
}
