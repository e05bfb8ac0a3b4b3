//! A member's record: what others must know to use it, and whether they may.
//!
//! Records are JSON. Unknown fields are skipped, so that an older process reads a newer one's record; fields that an
//! older process did not write get their default. What is read has been checked: see [`Member::parse`].

use kvasir_types::{
    Incarnation, KvLayout, MemberId, ModelFingerprint, PROTOCOL_VERSION, Role, SegmentDescriptor, Stage,
};
use serde::{Deserialize, Serialize};

/// Most bytes of a record. A full one has some 700.
pub(crate) const MAX_RECORD_BYTES: usize = 64 << 10;

/// Most characters of an address or a version in a record.
const MAX_TEXT: usize = 512;

/// Most ways to a segment that a record may offer.
const MAX_TRANSPORTS: usize = 16;

/// A service in the cluster.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Member {
    /// Its name, unique in its role.
    pub id: MemberId,
    /// Which life of it this is.
    pub incarnation: Incarnation,
    /// What it does.
    pub role: Role,
    /// `host:port` of its gRPC server; empty for routers.
    #[serde(default)]
    pub grpc: String,
    /// `host:port` of its admin page.
    #[serde(default)]
    pub admin: String,
    /// `host:port` of its HTTP API; empty for all but routers.
    #[serde(default)]
    pub http: String,
    /// Version of what it says to peers ([`PROTOCOL_VERSION`]).
    pub protocol: u32,
    /// Version of the program, for people.
    #[serde(default)]
    pub version: String,
    /// The model it serves; none for routers and store nodes.
    #[serde(default)]
    pub model: Option<ModelInfo>,
    /// The memory it offers to peers; none for routers.
    #[serde(default)]
    pub segment: Option<SegmentDescriptor>,
    /// What clients of a store node must know to use it; none for others.
    #[serde(default)]
    pub store: Option<StoreInfo>,
    /// What must be known of an engine of somebody else's; none for all others, which have a model and an address for gRPC
    /// instead. Such a record has no lease: routers find out by themselves whether the engine lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<EngineInfo>,
    /// Is given no new work: it is cordoned (see [`Duty::stage`]), or about to leave.
    #[serde(default)]
    pub draining: bool,
    /// What a worker is offered for at present.
    #[serde(default)]
    pub duty: Duty,
}

/// What a worker is offered for. Its role is part of its name and stays; what it works as can change while it runs. It
/// takes both kinds of work at any time, so that nobody who has not heard of a change yet is turned away.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Duty {
    /// Prefill or decode, if that is not its role.
    pub moved_to: Option<Role>,
    /// Only a person may change that.
    pub pinned: bool,
    /// How far it is on its way out of service; [`Member::draining`] unless it serves.
    #[serde(skip_serializing_if = "Stage::serves")]
    pub stage: Stage,
}

/// The model a worker serves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// What clients call it.
    pub name: String,
    /// Which weights.
    pub fingerprint: ModelFingerprint,
    /// How its KV blocks are laid out.
    pub layout: KvLayout,
    /// Most tokens of prompt and answer together.
    pub max_model_len: u32,
    /// BLAKE3 of tokenizer.json in hexadecimal; empty if unknown.
    #[serde(default)]
    pub tokenizer: String,
}

/// How a store node takes part in the division of blocks. Clients and nodes read it in the members' records, so that all
/// divide alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreInfo {
    /// Its share beside that of other nodes: by default, its memory in MiB.
    pub weight: f64,
    /// Nodes of one zone may fail together: copies go to different ones. Empty: a zone like any other.
    pub zone: String,
    /// Consecutive blocks of a prompt that are placed together, 1 to 1024. The same on all nodes.
    pub group_blocks: u32,
    /// On how many nodes each block is kept, 1 to 8. The same on all nodes.
    pub replicas: u32,
}

impl StoreInfo {
    /// Most blocks of a group.
    pub const MAX_GROUP_BLOCKS: u32 = 1024;
    /// Most copies of a block.
    pub const MAX_REPLICAS: u32 = 8;
    /// Most bytes of a zone's name.
    pub const MAX_ZONE: usize = 64;

    /// Whether it can be used; the error names the field and what is allowed.
    pub fn check(&self) -> Result<(), String> {
        let Self { weight, zone, group_blocks, replicas } = self;
        if !(weight.is_normal() && *weight > 0.0 && *weight <= 1e15) {
            return Err(format!("weight: {weight}, allowed is above 0 up to 1e15"));
        }
        if zone.len() > Self::MAX_ZONE || zone.chars().any(char::is_control) {
            return Err(format!("zone: allowed are up to {} bytes without control characters", Self::MAX_ZONE));
        }
        if !(1..=Self::MAX_GROUP_BLOCKS).contains(group_blocks) {
            return Err(format!("group_blocks: {group_blocks}, allowed is 1 to {}", Self::MAX_GROUP_BLOCKS));
        }
        if !(1..=Self::MAX_REPLICAS).contains(replicas) {
            return Err(format!("replicas: {replicas}, allowed is 1 to {}", Self::MAX_REPLICAS));
        }
        Ok(())
    }
}

impl Default for StoreInfo {
    fn default() -> Self {
        Self { weight: 256.0, zone: String::new(), group_blocks: 32, replicas: 1 }
    }
}

/// An engine of somebody else's that routers may use as a worker (`docs/external-engines.md`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct EngineInfo {
    /// Which protocol it speaks: `vllm`, `sglang`. A text, so that older processes read records of kinds they don't know.
    pub kind: String,
    /// It needs no partner for prompts, and takes none.
    pub alone: bool,
    /// `http://host:port`.
    pub url: String,
    /// Which of the routers' models it serves.
    pub model: String,
    /// What it calls that model; empty: the same.
    pub served_name: String,
    /// Engines of one kind and group go together and have the same weights.
    pub group: String,
    /// Where an SGLang prefill server waits for decode servers.
    pub bootstrap_port: Option<u16>,
    /// Most tokens of prompt and answer together; none: the model's.
    pub max_model_len: Option<u32>,
    /// It follows seeds though engines of its kind do not unless told to.
    pub deterministic: bool,
}

impl EngineInfo {
    fn texts(&self) -> [&str; 5] {
        [&self.kind, &self.url, &self.model, &self.served_name, &self.group]
    }
}

/// Why two members must not exchange blocks: the first thing that differs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what} differs: {ours} here, {theirs} there")]
pub struct Mismatch {
    /// What differs.
    pub what: &'static str,
    /// The value of the one that asked.
    pub ours: String,
    /// The value of the other.
    pub theirs: String,
}

impl ModelInfo {
    /// Whether KV blocks of the two mean the same. Names and limits may differ, weights and layout may not.
    pub fn pairs_with(&self, other: &Self) -> Result<(), Mismatch> {
        same("model fingerprint", &self.fingerprint, &other.fingerprint, ToString::to_string)?;
        same("kv layout", &self.layout, &other.layout, layout_text)
    }
}

impl Member {
    /// What it is offered for now: its role, unless it is a worker that was moved.
    pub fn works_as(&self) -> Role {
        match (self.role, self.duty.moved_to) {
            (Role::Prefill | Role::Decode, Some(to)) => to,
            (role, _) => role,
        }
    }

    /// Whether the two may work on the same request: same protocol, and same model where both have one. A store node has
    /// none: it keeps bytes by hash, and the hash names the model.
    pub fn compatible(&self, other: &Self) -> Result<(), Mismatch> {
        same("protocol", &self.protocol, &other.protocol, ToString::to_string)?;
        match (&self.model, &other.model) {
            (Some(ours), Some(theirs)) => ours.pairs_with(theirs),
            _ => Ok(()),
        }
    }

    /// Whether this build can talk to the member at all.
    pub fn speaks_our_protocol(&self) -> Result<(), Mismatch> {
        same("protocol", &PROTOCOL_VERSION, &self.protocol, ToString::to_string)
    }

    /// The record as it is stored.
    pub(crate) fn record(&self) -> String {
        serde_json::to_string(self).expect("a member has no map with keys that are not text")
    }

    /// Reads a record from outside; the error says what is wrong with it, in bounded length.
    pub(crate) fn parse(record: &[u8]) -> Result<Self, String> {
        if record.len() > MAX_RECORD_BYTES {
            return Err(format!("{} bytes, at most {MAX_RECORD_BYTES} are allowed", record.len()));
        }
        let short = |error: String| error.chars().take(200).collect::<String>();
        let member: Self = serde_json::from_slice(record).map_err(|error| short(error.to_string()))?;
        let texts = [&member.grpc, &member.admin, &member.http, &member.version];
        if texts.iter().any(|text| text.len() > MAX_TEXT || text.chars().any(char::is_control)) {
            return Err(format!("an address or version over {MAX_TEXT} bytes or with control characters"));
        }
        if let Some(model) = &member.model {
            model.layout.check().map_err(|error| error.to_string())?;
            if [&model.name, &model.tokenizer]
                .iter()
                .any(|text| text.len() > MAX_TEXT || text.chars().any(char::is_control))
            {
                return Err(format!("a model's name over {MAX_TEXT} bytes or with control characters"));
            }
        }
        if member.segment.as_ref().is_some_and(|segment| segment.transports.len() > MAX_TRANSPORTS) {
            return Err(format!("over {MAX_TRANSPORTS} transports"));
        }
        if !matches!(member.duty.moved_to, None | Some(Role::Prefill | Role::Decode)) {
            return Err("duty.moved_to: allowed are prefill and decode".to_owned());
        }
        if let Some(engine) = &member.engine
            && engine.texts().iter().any(|text| text.len() > MAX_TEXT || text.chars().any(char::is_control))
        {
            return Err(format!("engine: a text over {MAX_TEXT} bytes or with control characters"));
        }
        if let Some(store) = &member.store {
            store.check().map_err(|error| format!("store.{error}"))?;
        }
        Ok(member)
    }
}

fn same<T: PartialEq>(what: &'static str, ours: &T, theirs: &T, text: impl Fn(&T) -> String) -> Result<(), Mismatch> {
    if ours == theirs { Ok(()) } else { Err(Mismatch { what, ours: text(ours), theirs: text(theirs) }) }
}

fn layout_text(layout: &KvLayout) -> String {
    let KvLayout { block_size, layers, kv_heads, k_dim, v_dim, dtype } = layout;
    let dims = if k_dim == v_dim { k_dim.to_string() } else { format!("({k_dim} + {v_dim})") };
    format!("{block_size} tokens × {layers} layers × {kv_heads} heads × {dims} {dtype:?}").to_lowercase()
}

#[cfg(test)]
pub(crate) mod tests {
    use kvasir_types::{KvDtype, SegmentId, TransportAddress, TransportKind};
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn member(role: Role, id: &str, incarnation: u64) -> Member {
        Member {
            id: id.parse().unwrap(),
            incarnation: Incarnation(incarnation),
            role,
            grpc: "127.0.0.1:1".into(),
            admin: "127.0.0.1:2".into(),
            http: String::new(),
            protocol: PROTOCOL_VERSION,
            version: "0.1.0".into(),
            model: Some(ModelInfo {
                name: "demo".into(),
                fingerprint: ModelFingerprint([3; 16]),
                layout: KvLayout { block_size: 16, layers: 2, kv_heads: 2, k_dim: 8, v_dim: 8, dtype: KvDtype::Bf16 },
                max_model_len: 1024,
                tokenizer: String::new(),
            }),
            segment: Some(SegmentDescriptor {
                name: "decode-0".into(),
                regions: vec![],
                segment: SegmentId(u64::MAX),
                incarnation: Incarnation(incarnation),
                len: 4096,
                transports: vec![TransportAddress { kind: TransportKind::Tcp, address: "127.0.0.1:3".into() }],
            }),
            store: (role == Role::KvStore).then(StoreInfo::default),
            engine: None,
            draining: false,
            duty: Duty::default(),
        }
    }

    #[test]
    fn a_record_reads_as_it_was_written_and_newer_fields_are_skipped() {
        let member = member(Role::KvStore, "kv-0", u64::MAX);
        assert_eq!(Member::parse(member.record().as_bytes()), Ok(member.clone()));
        let newer = member.record().replacen('{', r#"{"rack":{"name":"r1"},"#, 1);
        assert_eq!(Member::parse(newer.as_bytes()), Ok(member));
    }

    #[test]
    fn what_an_older_process_did_not_write_is_empty() {
        let record = br#"{"id":"router-0","incarnation":1,"role":"router","protocol":1}"#;
        let member = Member::parse(record).unwrap();
        assert_eq!((member.grpc.as_str(), member.model, member.store, member.draining), ("", None, None, false));
        let record = br#"{"id":"kv-0","incarnation":1,"role":"kv-store","protocol":1,"store":{"zone":"a"}}"#;
        let zone = Some(StoreInfo { zone: "a".into(), ..StoreInfo::default() });
        assert_eq!(Member::parse(record).unwrap().store, zone);
    }

    #[test]
    fn an_engine_is_read_as_it_was_written_with_what_is_not_said_left_empty() {
        let mut ours = member(Role::Decode, "d", 1);
        ours.engine = Some(EngineInfo { kind: "vllm".into(), url: "http://a:1".into(), ..EngineInfo::default() });
        assert_eq!(Member::parse(ours.record().as_bytes()), Ok(ours.clone()));
        let record =
            br#"{"id":"d","incarnation":1,"role":"decode","protocol":1,"engine":{"kind":"of tomorrow","x":1}}"#;
        assert_eq!(Member::parse(record).unwrap().engine.unwrap().kind, "of tomorrow");
        ours.engine.as_mut().unwrap().group = "\u{1b}".into();
        assert!(Member::parse(ours.record().as_bytes()).unwrap_err().starts_with("engine"));
    }

    #[test]
    fn records_that_could_harm_a_reader_are_refused() {
        let mut bad = member(Role::Decode, "d", 1);
        bad.model.as_mut().unwrap().layout.layers = u32::MAX;
        assert!(Member::parse(bad.record().as_bytes()).unwrap_err().contains("layout"));
        bad = member(Role::Decode, "d", 1);
        bad.grpc = "x".repeat(MAX_TEXT + 1);
        assert!(Member::parse(bad.record().as_bytes()).unwrap_err().contains("address"));
        assert!(Member::parse(&vec![b' '; MAX_RECORD_BYTES + 1]).unwrap_err().contains("at most"));
        type Change = fn(&mut StoreInfo);
        let stores: [(&str, Change); 8] = [
            ("store.weight", |store| store.weight = 0.0),
            ("store.weight", |store| store.weight = -1.0),
            ("store.weight", |store| store.weight = 1e300),
            ("store.zone", |store| store.zone = "z".repeat(65)),
            ("store.zone", |store| store.zone = "\u{1b}".into()),
            ("store.group_blocks", |store| store.group_blocks = 0),
            ("store.group_blocks", |store| store.group_blocks = 1025),
            ("store.replicas", |store| store.replicas = 9),
        ];
        for (part, change) in stores {
            let mut bad = member(Role::KvStore, "kv", 1);
            change(bad.store.as_mut().unwrap());
            let error = Member::parse(bad.record().as_bytes()).unwrap_err();
            assert!(error.starts_with(part), "{error}");
        }
        let mut bad = member(Role::Decode, "d", 1);
        bad.duty.moved_to = Some(Role::Router);
        assert!(Member::parse(bad.record().as_bytes()).unwrap_err().starts_with("duty"));
        for text in ["", "{}", "null", "[]", "\u{1}", r#"{"id":"a/b","incarnation":1,"role":"decode","protocol":1}"#] {
            assert!(Member::parse(text.as_bytes()).is_err(), "{text:?}");
        }
    }

    #[test]
    fn a_worker_that_was_moved_works_as_something_else_under_its_old_name() {
        let mut worker = member(Role::Decode, "d", 1);
        assert_eq!(worker.works_as(), Role::Decode);
        worker.duty = Duty { moved_to: Some(Role::Prefill), pinned: true, stage: Stage::Cordoned };
        assert_eq!((worker.role, worker.works_as()), (Role::Decode, Role::Prefill));
        assert_eq!(Member::parse(worker.record().as_bytes()), Ok(worker.clone()));
        let mut store = member(Role::KvStore, "kv", 1);
        store.duty = worker.duty;
        assert_eq!(store.works_as(), Role::KvStore, "nobody computes on a store node");
    }

    #[test]
    fn a_mismatch_names_what_differs() {
        let ours = member(Role::Decode, "d", 1);
        let mut theirs = member(Role::Prefill, "p", 2);
        theirs.model.as_mut().unwrap().name = "other name".into();
        assert_eq!(ours.compatible(&theirs), Ok(()));
        theirs.model.as_mut().unwrap().layout.dtype = KvDtype::F32;
        assert_eq!(
            ours.compatible(&theirs).unwrap_err().to_string(),
            "kv layout differs: 16 tokens × 2 layers × 2 heads × 8 bf16 here, 16 tokens × 2 layers × 2 heads × 8 f32 there"
        );
        theirs.model.as_mut().unwrap().fingerprint = ModelFingerprint([4; 16]);
        assert_eq!(ours.compatible(&theirs).unwrap_err().what, "model fingerprint");
        theirs.protocol += 1;
        assert_eq!(ours.compatible(&theirs).unwrap_err().what, "protocol");
        assert!(theirs.speaks_our_protocol().is_err());
        theirs.protocol -= 1;
        theirs.model = None;
        assert_eq!(ours.compatible(&theirs), Ok(()));
    }

    proptest! {
        #[test]
        fn no_bytes_from_outside_panic(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Member::parse(&bytes);
        }

        #[test]
        fn no_cut_or_altered_record_panics(at in 0usize..600, byte in any::<u8>()) {
            let mut record = member(Role::Decode, "d", 1).record().into_bytes();
            let at = at % record.len();
            record[at] = byte;
            let _ = Member::parse(&record);
            let _ = Member::parse(&record[..at]);
        }
    }
}
