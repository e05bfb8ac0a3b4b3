//! Whose blocks there are, and how much room each tenant may take.
//!
//! Every block has an **origin**, the model and the tenant it was computed for. Origins are numbered as they come. A tenant
//! with a quota has a **share** of its own: at most so many percent of each tier; past that, its new blocks displace its own
//! old ones. All tenants without a quota share what there is.

use std::collections::HashMap;

use super::{
    entry::{Level, OriginId},
    slab::BlockBytes,
};

/// Most origins told apart; what comes beyond counts as nobody's.
const MAX_ORIGINS: usize = u16::MAX as usize;
/// Most tenants with a share of their own; those beyond use the common one.
const MAX_SHARES: usize = 100;

/// Blocks that count against one quota. The first is everybody's who has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct ShareId(u8);

/// A model and a tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Origin {
    /// The model's fingerprint; zero: not told.
    pub(crate) model: [u8; 16],
    pub(crate) tenant: String,
}

/// How much of each tier tenants may take, in percent.
#[derive(Clone, Debug, Default)]
pub(crate) struct Limits {
    /// Of those that are named.
    pub(crate) tenants: HashMap<String, u8>,
    /// Of each other tenant; none: no limit. Blocks without a tenant have none either.
    pub(crate) others: Option<u8>,
}

struct Known {
    origin: Origin,
    share: ShareId,
    blocks: u64,
}

struct Share {
    percent: u8,
    bytes: [u64; 2],
}

/// All origins and shares.
pub(crate) struct Quotas {
    limits: Limits,
    origins: Vec<Known>,
    by_origin: HashMap<Origin, OriginId>,
    shares: Vec<Share>,
    by_tenant: HashMap<String, ShareId>,
}

impl Quotas {
    pub(crate) fn new(limits: Limits) -> Self {
        let mut quotas = Self {
            limits,
            origins: Vec::new(),
            by_origin: HashMap::new(),
            shares: vec![Share { percent: 100, bytes: [0; 2] }],
            by_tenant: HashMap::new(),
        };
        quotas.origin(&Origin::default());
        quotas
    }

    /// The number of an origin, a new one if it has none yet.
    pub(crate) fn origin(&mut self, origin: &Origin) -> OriginId {
        if let Some(&id) = self.by_origin.get(origin) {
            return id;
        }
        let known = Known { origin: origin.clone(), share: self.share_of(&origin.tenant), blocks: 0 };
        let at = if self.origins.len() < MAX_ORIGINS {
            self.origins.push(known);
            self.origins.len() - 1
        } else {
            // One whose blocks are all gone gives its number away; never the first.
            let Some(at) = (1..self.origins.len()).find(|&at| self.origins[at].blocks == 0) else {
                return OriginId(0);
            };
            self.by_origin.remove(&self.origins[at].origin);
            self.origins[at] = known;
            at
        };
        let id = OriginId(u16::try_from(at).expect("below MAX_ORIGINS"));
        self.by_origin.insert(origin.clone(), id);
        id
    }

    pub(crate) fn name(&self, id: OriginId) -> &Origin {
        &self.origins[usize::from(id.0)].origin
    }

    pub(crate) fn share(&self, id: OriginId) -> ShareId {
        self.origins[usize::from(id.0)].share
    }

    fn share_of(&mut self, tenant: &str) -> ShareId {
        let percent = match self.limits.tenants.get(tenant) {
            Some(&percent) => percent,
            None if tenant.is_empty() => return ShareId(0),
            None => match self.limits.others {
                Some(percent) => percent,
                None => return ShareId(0),
            },
        };
        if let Some(&share) = self.by_tenant.get(tenant) {
            return share;
        }
        if self.shares.len() >= MAX_SHARES {
            return ShareId(0);
        }
        let share = ShareId(u8::try_from(self.shares.len()).expect("below MAX_SHARES"));
        self.shares.push(Share { percent, bytes: [0; 2] });
        self.by_tenant.insert(tenant.to_owned(), share);
        share
    }

    /// Whether one more block of that size would be more than the share may have in that tier.
    pub(crate) fn is_over(&self, share: ShareId, level: Level, size: BlockBytes, capacity_bytes: u64) -> bool {
        let Share { percent, bytes } = &self.shares[usize::from(share.0)];
        let allowed = u128::from(capacity_bytes) * u128::from(*percent) / 100;
        *percent < 100 && u128::from(bytes[level as usize]) + u128::from(size.0) > allowed
    }

    pub(crate) fn took(&mut self, share: ShareId, level: Level, size: BlockBytes) {
        self.shares[usize::from(share.0)].bytes[level as usize] += size.0;
    }

    pub(crate) fn gave(&mut self, share: ShareId, level: Level, size: BlockBytes) {
        self.shares[usize::from(share.0)].bytes[level as usize] -= size.0;
    }

    pub(crate) fn entered(&mut self, origin: OriginId) {
        self.origins[usize::from(origin.0)].blocks += 1;
    }

    pub(crate) fn left(&mut self, origin: OriginId) {
        self.origins[usize::from(origin.0)].blocks -= 1;
    }

    /// Origins that have blocks, and how many.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = (&Origin, u64)> {
        self.origins.iter().filter(|known| known.blocks > 0).map(|known| (&known.origin, known.blocks))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(tenant: &str) -> Origin {
        Origin { model: [1; 16], tenant: tenant.into() }
    }

    #[test]
    fn tenants_with_a_quota_have_a_share_each_and_all_others_one() {
        let limits = Limits { tenants: HashMap::from([("small".into(), 10)]), others: None };
        let mut quotas = Quotas::new(limits);
        let [small, again, one, two] = ["small", "small", "one", "two"].map(|tenant| quotas.origin(&origin(tenant)));
        assert_eq!(small, again);
        assert_ne!(quotas.share(small), quotas.share(one));
        assert_eq!(quotas.share(one), quotas.share(two));
        let (share, size) = (quotas.share(small), BlockBytes(60));
        assert!(!quotas.is_over(share, Level::Memory, size, 1000));
        quotas.took(share, Level::Memory, size);
        assert!(quotas.is_over(share, Level::Memory, size, 1000), "120 of 100");
        assert!(!quotas.is_over(share, Level::Disk, size, 1000), "each tier by itself");
        assert!(!quotas.is_over(quotas.share(one), Level::Memory, BlockBytes(1000), 1000));
    }

    #[test]
    fn origins_past_the_limit_are_nobodys_until_one_is_free() {
        let mut quotas = Quotas::new(Limits::default());
        let ids: Vec<_> = (1..MAX_ORIGINS).map(|n| quotas.origin(&origin(&n.to_string()))).collect();
        ids.iter().for_each(|&id| quotas.entered(id));
        assert_eq!(quotas.origin(&origin("more")), OriginId(0));
        quotas.left(ids[77]);
        assert_eq!(quotas.origin(&origin("more")), ids[77]);
        assert_eq!(quotas.name(ids[77]).tenant, "more");
    }
}
