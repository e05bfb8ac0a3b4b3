//! Who is in the cluster: members, their leases, and the view everybody has of them.
//!
//! A service registers a [`Member`] (what it is, where it is, which model and layout it has) and watches the [`View`] of
//! all members. Two forms behind one trait, [`Registry`]: etcd for processes of their own ([`connect_etcd`]), memory for
//! services of one process and for tests ([`MemoryHub`]).
//!
//! Rules: reading the view never waits for anybody. The view is the last known one while etcd is away; requests go on with
//! it. A member that is gone leaves the view when its lease ends. A name has one holder: a second process that claims it
//! gets [`Error::Taken`]. This crate starts no task: [`connect_etcd`] returns a future beside the registry, which its
//! owner runs.
#![forbid(unsafe_code)]

mod config;
mod error;
mod etcd;
mod events;
mod member;
mod memory;
mod office;
mod registry;
mod settings;
mod view;

pub use config::{EtcdConfig, EtcdTls, RegistryConfig};
pub use error::Error;
pub use etcd::{add_engine, connect as connect_etcd, note_event, page as etcd_page, read_settings, remove_engine};
pub use events::{Audit, Event, EventKind, Noted, audit};
pub use member::{Duty, EngineInfo, Member, Mismatch, ModelInfo, StoreInfo};
pub use memory::MemoryHub;
pub use office::Office;
pub use registry::Registry;
pub use settings::{Change, Document, Found, NoScope, Scope, Settings, changed};
pub use view::View;
