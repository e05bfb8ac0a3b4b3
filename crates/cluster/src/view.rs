//! All members at a moment.

use kvasir_types::{Epoch, MemberId, Role};

use crate::Member;

/// All members that this process knows, ordered by role and name.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct View {
    /// Counts the changes this process has seen. Says nothing across processes.
    pub revision: u64,
    /// As of which change of the metadata this is known to be true. Comparable between processes: who has the greater one
    /// knows at least as much. Never goes back, and may go on without a change of the members being announced.
    pub epoch: Epoch,
    /// The members.
    pub members: Vec<Member>,
}

impl View {
    /// The members of a role, by name.
    pub fn role(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.role == role)
    }

    /// The members that work as this now, by role and name; see [`Member::works_as`].
    pub fn working_as(&self, role: Role) -> impl Iterator<Item = &Member> {
        self.members.iter().filter(move |member| member.works_as() == role)
    }

    /// The member of that role and name.
    pub fn get(&self, role: Role, id: &MemberId) -> Option<&Member> {
        self.members.iter().find(|member| member.role == role && member.id == *id)
    }
}
