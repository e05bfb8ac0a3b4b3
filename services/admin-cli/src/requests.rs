//! `kvasirctl requests`: the requests under way on all routers, one of them in detail, and an end to one.

use anyhow::{bail, ensure};
use clap::{Args, Subcommand};
use futures_util::{StreamExt, stream};
use kvasir_cluster::{Member, View};
use kvasir_types::{RequestId, Role};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    output::Answer,
    probe::{self, Way, printable},
    render::{Table, duration},
    session::Session,
};

/// Routers asked at the same time.
const AT_ONCE: usize = 64;

/// What is asked about requests under way.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum RequestsCommand {
    /// All of them, the oldest first: whose they are, how far, on which workers
    List(ListArgs),
    /// One of them
    Show {
        /// The request's name: `x-request-id` of its answer
        #[arg(value_name = "ID")]
        id: RequestId,
    },
    /// End it: its client gets one clear error, its blocks are freed on all workers
    Cancel {
        /// The request's name
        #[arg(value_name = "ID")]
        id: RequestId,
    },
}

/// Which of them.
#[derive(Clone, Debug, Args)]
pub(crate) struct ListArgs {
    /// Only this tenant's
    #[arg(long, value_name = "NAME")]
    tenant: Option<String>,
    /// Only those for this model
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Only those that this worker has, or reads the prompt of
    #[arg(long, value_name = "NAME")]
    worker: Option<String>,
    /// Only those that are so far
    #[arg(long, value_name = "STATE", value_parser = ["received", "queued", "prefill", "decoding"])]
    state: Option<String>,
}

/// A request, as its router has it. Whatever a later version adds is skipped.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Underway {
    router: String,
    id: String,
    tenant: String,
    model: String,
    state: String,
    worker: String,
    prefill: String,
    prompt_tokens: u64,
    tokens: u64,
    age_ms: u64,
}

impl Underway {
    /// From outside.
    fn read(router: &Member, value: &Value) -> Option<Self> {
        let mut read: Self = serde_json::from_value(value.clone()).ok()?;
        read.router = router.id.to_string();
        let Self { id, tenant, model, state, worker, prefill, .. } = &mut read;
        for text in [id, tenant, model, state, worker, prefill] {
            *text = printable(text);
        }
        Some(read)
    }
}

/// Does what is asked and says what came of it.
pub(crate) async fn run(command: RequestsCommand, session: &Session) -> anyhow::Result<Answer> {
    let (view, way, output) = (session.view().await?, session.way()?, session.output());
    ensure!(view.role(Role::Router).next().is_some(), "no router is running (or --prefix names another cluster)");
    match command {
        RequestsCommand::List(args) => {
            let (mut all, mut more, mut silent) = (Vec::new(), 0, Vec::new());
            for (router, told) in ask(&view, &way, "/requests", None).await {
                match told {
                    Ok(page) => {
                        let listed = page["requests"].as_array().map_or(&[][..], Vec::as_slice);
                        all.extend(listed.iter().filter_map(|value| Underway::read(router, value)));
                        more += page["count"].as_u64().unwrap_or(0).saturating_sub(listed.len() as u64);
                    }
                    Err(why) => silent.push(format!("{}: not reached, {why}", router.id)),
                }
            }
            all.retain(|request| args.wants(request));
            all.sort_by_key(|request| std::cmp::Reverse(request.age_ms));
            let text = output.show(&json!({ "requests": all, "not_listed": more, "not_reached": silent }), || {
                list(&all, more, &silent)
            });
            Ok(text.into())
        }
        RequestsCommand::Show { id } => {
            let found = find(&view, &way, &id).await;
            let found: Vec<Underway> = found.into_iter().flat_map(|(_, requests)| requests).collect();
            ensure!(
                !found.is_empty(),
                "no request {id} is under way; `kvasirctl trace {id}` knows those that have ended"
            );
            Ok(output.show(&found, || list(&found, 0, &[])).into())
        }
        RequestsCommand::Cancel { id } => {
            let holders = find(&view, &way, &id).await;
            ensure!(!holders.is_empty(), "no request {id} is under way: nothing was done");
            let mut cancelled = 0;
            for (router, _) in holders {
                let body = json!({ "id": id.as_str() });
                match probe::admin(&router.admin, "/requests/cancel", Some(&body), &way).await {
                    Ok(done) => cancelled += done["cancelled"].as_u64().unwrap_or(0),
                    Err(why) => bail!("{}: {why}", router.id),
                }
            }
            let told = || if cancelled == 0 { format!("{id} had just ended\n") } else { format!("{id} cancelled\n") };
            Ok(output.show(&json!({ "id": id.as_str(), "cancelled": cancelled }), told).into())
        }
    }
}

impl ListArgs {
    fn wants(&self, request: &Underway) -> bool {
        let is = |wanted: &Option<String>, text: &str| wanted.as_ref().is_none_or(|wanted| wanted == text);
        is(&self.tenant, &request.tenant)
            && is(&self.model, &request.model)
            && is(&self.state, &request.state)
            && (is(&self.worker, &request.worker) || is(&self.worker, &request.prefill))
    }
}

/// Asks every router.
pub(crate) async fn ask<'a>(
    view: &'a View,
    way: &Way,
    path: &str,
    body: Option<&Value>,
) -> Vec<(&'a Member, Result<Value, String>)> {
    let routers = stream::iter(view.role(Role::Router));
    let one = async |router: &'a Member| (router, probe::admin(&router.admin, path, body, way).await);
    routers.map(one).buffered(AT_ONCE).collect().await
}

/// The routers that have requests of that name, and those.
async fn find<'a>(view: &'a View, way: &Way, id: &RequestId) -> Vec<(&'a Member, Vec<Underway>)> {
    let body = json!({ "id": id.as_str() });
    let told = ask(view, way, "/requests/show", Some(&body)).await;
    let of = |(router, told): (&'a Member, Result<Value, String>)| {
        let page = told.ok()?;
        let found = page["requests"].as_array()?;
        let found: Vec<_> = found.iter().filter_map(|value| Underway::read(router, value)).collect();
        (!found.is_empty()).then_some((router, found))
    };
    told.into_iter().filter_map(of).collect()
}

fn list(requests: &[Underway], more: u64, silent: &[String]) -> String {
    let mut text = if requests.is_empty() {
        "no such requests under way\n".to_owned()
    } else {
        let mut table =
            Table::new(&["ID", "TENANT", "MODEL", "STATE", "PREFILL", "WORKER", "PROMPT", "TOKENS", "AGE", "ROUTER"]);
        for request in requests {
            let or_dash = |text: &String| if text.is_empty() { "-".to_owned() } else { text.clone() };
            table.row(vec![
                request.id.clone(),
                or_dash(&request.tenant),
                or_dash(&request.model),
                request.state.clone(),
                or_dash(&request.prefill),
                or_dash(&request.worker),
                request.prompt_tokens.to_string(),
                request.tokens.to_string(),
                duration(request.age_ms),
                request.router.clone(),
            ]);
        }
        table.render()
    };
    if more > 0 {
        text.push_str(&format!("and {more} more, younger ones\n"));
    }
    silent.iter().for_each(|line| text.push_str(&format!("{line}\n")));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_one_line_a_request_and_says_what_is_missing() {
        let request = Underway {
            router: "router-0".into(),
            id: "r-1".into(),
            model: "demo".into(),
            state: "decoding".into(),
            worker: "decode-0".into(),
            prompt_tokens: 35,
            tokens: 7,
            age_ms: 1_500,
            ..Underway::default()
        };
        let text = list(std::slice::from_ref(&request), 3, &["router-1: not reached, silence".to_owned()]);
        let lines: Vec<&str> = text.lines().collect();
        let words: Vec<&str> = lines[1].split_whitespace().collect();
        assert_eq!(words[..8], ["r-1", "-", "demo", "decoding", "-", "decode-0", "35", "7"]);
        assert_eq!(lines[2..], ["and 3 more, younger ones", "router-1: not reached, silence"]);
        assert_eq!(list(&[], 0, &[]), "no such requests under way\n");
        let all = ListArgs { tenant: None, model: None, worker: None, state: None };
        assert!(all.wants(&request));
        assert!(!ListArgs { tenant: Some("acme".into()), ..all.clone() }.wants(&request));
        assert!(ListArgs { worker: Some("decode-0".into()), ..all }.wants(&request));
    }

    #[test]
    fn what_routers_say_is_cut_and_cleaned() {
        let value = json!({ "id": "a\u{1b}[31mb", "state": "x".repeat(500), "later": {} });
        let router = crate::gather::tests::decode("router-0", "", "");
        let read = Underway::read(&router, &value).unwrap();
        assert_eq!((read.id.as_str(), read.state.len(), read.router.as_str()), ("a[31mb", 120, "router-0"));
        assert_eq!(Underway::read(&router, &json!({ "tokens": "many" })), None);
    }
}
