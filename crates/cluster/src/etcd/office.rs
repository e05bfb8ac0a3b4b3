//! Claiming an office: its key goes with the lease of the member that holds it.

use kvasir_types::MemberId;

use super::{Shared, Slot};
use crate::{Error, Office, office::Record};

/// Takes the office if its key is not there; says who has it.
pub(super) async fn claim(shared: &Shared, slot: &Slot, office: &MemberId) -> Result<Office, Error> {
    let key = format!("{}{office}", shared.offices);
    let (lease, member) = {
        let own = slot.own.lock().await;
        let not_registered = || Error::NotRegistered { role: slot.name.0, id: slot.name.1.clone() };
        // Between two leases (etcd was away for long) nothing is held.
        (own.lease.ok_or_else(not_registered)?, own.member.clone())
    };
    loop {
        if let Some(found) = shared.etcd.get(&key).await? {
            let ours = found.lease == lease;
            let term = found.revision.unsigned_abs();
            return match serde_json::from_slice::<Record>(&found.record) {
                Ok(record) => Ok(Office { holder: record.id, term, ours }),
                // Another version's, or somebody's by hand: held, at any rate.
                Err(_) => Ok(Office { holder: office.clone(), term, ours: false }),
            };
        }
        let record = Record { role: member.role, id: member.id.clone(), incarnation: member.incarnation };
        let record = serde_json::to_string(&record).expect("a record has no map with keys that are not text");
        if let Some(revision) = shared.etcd.put(&key, &record, lease, 0).await? {
            return Ok(Office { holder: member.id, term: revision.unsigned_abs(), ours: true });
        }
        // Somebody else was faster.
    }
}
