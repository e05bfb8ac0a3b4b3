//! Records of engines of others: put there by an operator, without a lease, and there until an operator takes them away.

use kvasir_types::{MemberId, Role};

use super::{call::Etcd, check, check_size, table::Table};
use crate::{Error, EtcdConfig, Member};

/// The roles that an engine may have.
const ROLES: [Role; 2] = [Role::Prefill, Role::Decode];

/// Writes an engine's record, in place of that engine's older one.
///
/// # Errors
/// [`Error::Taken`] if a worker, or an engine of another role, has the name.
pub async fn add_engine(config: &EtcdConfig, member: Member) -> Result<(), Error> {
    check(config)?;
    check_size(&member)?;
    let etcd = Etcd::new(config).await?;
    let table = Table::new(config.prefix.trim_end_matches('/'));
    loop {
        let mut expected = 0;
        for role in ROLES {
            let Some(found) = etcd.get(&table.key(&(role, member.id.clone()))).await? else { continue };
            let holder = Member::parse(&found.record).ok();
            if role != member.role || holder.as_ref().is_some_and(|holder| holder.engine.is_none()) {
                let holder = holder.map_or(member.incarnation, |holder| holder.incarnation);
                return Err(Error::Taken { role, id: member.id, holder });
            }
            expected = found.revision;
        }
        let key = table.key(&(member.role, member.id.clone()));
        if etcd.put(&key, &member.record(), 0, expected).await?.is_some() {
            return Ok(());
        }
        // Somebody else was there in between: look again.
    }
}

/// Takes an engine's record away; whether there was one. A worker's record stays.
pub async fn remove_engine(config: &EtcdConfig, id: &MemberId) -> Result<bool, Error> {
    check(config)?;
    let etcd = Etcd::new(config).await?;
    let table = Table::new(config.prefix.trim_end_matches('/'));
    let mut removed = false;
    for role in ROLES {
        let key = table.key(&(role, id.clone()));
        let Some(found) = etcd.get(&key).await? else { continue };
        if Member::parse(&found.record).is_ok_and(|member| member.engine.is_some()) {
            removed |= etcd.delete(&key, found.revision).await?;
        }
    }
    Ok(removed)
}
