//! Segments by name: members of the cluster, as its metadata has them.

use std::sync::Arc;

use kvasir_cluster::View;
use kvasir_transfer::{Directory, Error, Lookup, Published};
use tokio::sync::watch;

/// Finds a member's memory by the member's id. Keys of grants are not in it: each peer is given its own.
pub(crate) struct Members {
    view: watch::Receiver<Arc<View>>,
}

impl Members {
    pub(crate) fn new(view: watch::Receiver<Arc<View>>) -> Self {
        Self { view }
    }

    fn published(&self, name: &str) -> Result<Published, Error> {
        let view = self.view.borrow();
        let unknown = |reason: &str| Error::UnknownSegment { name: name.to_owned(), reason: reason.to_owned() };
        let mut members = view.members.iter().filter(|member| member.id.as_str() == name);
        let member = members.next().ok_or_else(|| unknown("no member of the cluster has this id"))?;
        let descriptor = member.segment.clone().ok_or_else(|| unknown("this member offers no memory"))?;
        Ok(Published { descriptor, grant: None })
    }
}

impl Directory for Members {
    fn find<'a>(&'a self, name: &'a str) -> Lookup<'a> {
        Box::pin(async { self.published(name) })
    }
}

#[cfg(test)]
mod tests {
    use kvasir_cluster::{Member, MemoryHub};
    use kvasir_transfer::{Allocation, TransferEngine};
    use kvasir_types::{Incarnation, PROTOCOL_VERSION, Role};

    use super::*;

    #[tokio::test]
    async fn a_segment_opened_by_name_follows_its_member_through_a_restart() {
        let hub = MemoryHub::new();
        let registry = hub.registry();
        let owner = |name: &str| TransferEngine::builder().name(name).arena(Allocation::new(4096)).build().unwrap();
        let directory = Arc::new(Members::new(registry.view()));
        let client = TransferEngine::builder().directory(directory).build().unwrap();
        assert!(matches!(client.open("decode-0").await, Err(Error::UnknownSegment { .. })));

        let first = owner("decode-0");
        let mut member = Member {
            id: "decode-0".parse().unwrap(),
            incarnation: Incarnation(1),
            role: Role::Decode,
            grpc: String::new(),
            admin: String::new(),
            http: String::new(),
            protocol: PROTOCOL_VERSION,
            version: String::new(),
            model: None,
            segment: Some(first.descriptor()),
            store: None,
            engine: None,
            draining: false,
            duty: kvasir_cluster::Duty::default(),
        };
        registry.register(member.clone()).await.unwrap();
        let segment = client.open("decode-0").await.unwrap();
        assert_eq!(segment.published().descriptor, first.descriptor());
        assert!(!segment.refresh().await.unwrap(), "the same life");

        let second = owner("decode-0");
        member.segment = Some(second.descriptor());
        registry.update(member).await.unwrap();
        assert!(segment.refresh().await.unwrap(), "another life");
        assert_eq!(segment.published().descriptor, second.descriptor());
    }
}
