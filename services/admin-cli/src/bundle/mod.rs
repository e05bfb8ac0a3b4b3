//! `kvasirctl support-bundle`: what somebody else needs to see what is wrong, in one file, and nothing that is nobody's
//! business.
//!
//! What goes in is listed here, and nothing else does: the members' records, what `status` and `doctor` say, metrics pages,
//! readiness, what members run with, what routers' planners have done. No prompt, key or token is in any of these; services' own answers are read
//! all the same, and values under names that sound like secrets are taken out.

mod tar;

use std::{fs, path::PathBuf};

use anyhow::Context as _;
use clap::Args;
use flate2::{Compression, write::GzEncoder};
use futures_util::{StreamExt, stream};
use kvasir_cluster::{Member, View};
use kvasir_runtime::config::redacted;
use kvasir_types::Role;
use serde_json::{Value, json};

use self::tar::Tar;
use crate::{
    doctor, gather,
    output::{Answer, json as text},
    probe::{self, Way},
    render,
    session::Session,
};

/// Members asked at a time.
const AT_ONCE: usize = 32;
/// Most bytes of all pages together: a thousand members with large ones.
const MAX_BYTES: usize = 512 << 20;
/// Where it goes.
#[derive(Clone, Debug, Args)]
pub(crate) struct BundleArgs {
    /// The file to write
    #[arg(long, value_name = "FILE", default_value = "kvasir-support.tar.gz")]
    file: PathBuf,
}

/// Gathers and writes it.
pub(crate) async fn run(args: BundleArgs, session: &Session) -> anyhow::Result<Answer> {
    let named = || format!("cannot write {}", args.file.display());
    let way = session.way()?;
    let view = session.view().await?;
    let mut tar = Tar::default();
    let versions = json!({
        "kvasirctl": env!("CARGO_PKG_VERSION"),
        "protocol": kvasir_types::PROTOCOL_VERSION,
        "etcd": session.etcd()?.endpoints,
        "prefix": session.etcd()?.prefix,
    });
    tar.add("versions.json", text(&versions).as_bytes());
    let records = redacted(serde_json::to_value(&view.members)?);
    tar.add("members.json", text(&records).as_bytes());
    let report = gather::ask_all(&view, &way).await;
    tar.add("status.json", text(&report).as_bytes());
    tar.add("status.txt", render::status(&report, true).as_bytes());
    let findings = doctor::all(session).await?;
    tar.add("doctor.json", text(&findings).as_bytes());
    let mut left_out = Vec::new();
    let mut pages = stream::iter(questions(&view)).map(|question| question.ask(&way)).buffered(AT_ONCE);
    while let Some((name, page)) = pages.next().await {
        match page {
            Ok(page) if tar.len() + page.len() <= MAX_BYTES => tar.add(&name, page.as_bytes()),
            Ok(_) => left_out.push(format!("{name}: the bundle would be over {} MiB", MAX_BYTES >> 20)),
            Err(why) => left_out.push(format!("{name}: {why}")),
        }
    }
    tar.add("left-out.json", text(&left_out).as_bytes());
    let (files, bytes) = (tar.files(), tar.finish());
    let mut packed = GzEncoder::new(Vec::new(), Compression::default());
    std::io::Write::write_all(&mut packed, &bytes).with_context(named)?;
    let packed = packed.finish().with_context(named)?;
    fs::write(&args.file, &packed).with_context(named)?;
    let answer = json!({ "file": args.file, "files": files, "bytes": packed.len(), "left_out": left_out });
    let table = || {
        let mut text = format!(
            "{}: {files} files, {}\nno prompts, keys or tokens are in it; look through it before you send it\n",
            args.file.display(),
            render::bytes(packed.len() as u64)
        );
        left_out.iter().for_each(|line| text += &format!("left out: {line}\n"));
        text
    };
    Ok(session.output().show(&answer, table).into())
}

/// A page of a member.
struct Question<'a> {
    member: &'a Member,
    path: &'static str,
    name: String,
}

fn questions(view: &View) -> Vec<Question<'_>> {
    let mut questions = Vec::new();
    for member in view.members.iter().filter(|member| !member.admin.is_empty()) {
        let mut add = |path, name: &str| {
            questions.push(Question { member, path, name: format!("members/{}-{}/{name}", member.role, member.id) });
        };
        add("/metrics", "metrics.txt");
        add("/ready", "ready.json");
        add("/config", "config.json");
        if member.role == Role::Router {
            add("/planner", "planner.json");
            add("/route/policy", "policy.json");
        }
    }
    questions
}

impl Question<'_> {
    async fn ask(self, way: &Way) -> (String, Result<String, String>) {
        let Self { member, path, name } = self;
        let page = probe::text(&member.admin, path, way.limit).await.and_then(|page| {
            let (head, body) = page.split_once("\r\n\r\n").ok_or_else(|| "no page".to_owned())?;
            let status = head.split(' ').nth(1).unwrap_or_default();
            // `/ready` says 503 and why.
            if status != "200" && status != "503" {
                return Err(format!("status {}", probe::printable(status)));
            }
            Ok(match serde_json::from_str::<Value>(body) {
                Ok(json) => text(&redacted(json)),
                Err(_) => body.to_owned(),
            })
        });
        (name, page)
    }
}
