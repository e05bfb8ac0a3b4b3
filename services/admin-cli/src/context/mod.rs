//! `kvasirctl context`: clusters by name, so that nobody types endpoints twice.

mod file;

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Args, Subcommand};
use kvasir_cluster::EtcdTls;
use kvasir_rpc::TlsConfig;
use serde::Serialize;
use serde_json::json;

pub(crate) use self::file::{Context, File, path};
use crate::{
    output::{Answer, Usage},
    render::Table,
    session::{self, Session},
};

/// What is done with contexts.
#[derive(Clone, Debug, Subcommand)]
pub(crate) enum ContextCommand {
    /// All contexts, and which one is used
    List,
    /// Use this one unless --context names another
    Use {
        /// Its name
        name: String,
    },
    /// What is known of one
    Show {
        /// Its name [default: the one that is used]
        name: Option<String>,
    },
    /// Make one, or change what is said of it here: --etcd (and all that begins so), --prefix, --via and
    /// --token-file are taken up, too
    Set(SetArgs),
    /// Forget one
    Remove {
        /// Its name
        name: String,
    },
}

/// What is said of a context.
#[derive(Clone, Debug, Args)]
pub(crate) struct SetArgs {
    /// Its name
    name: String,
    /// A router's URL, which `bench` asks
    #[arg(long, value_name = "URL")]
    router: Option<String>,
    /// The certificate to show to workers and store nodes, where calls are by TLS
    #[arg(long, value_name = "FILE", requires = "key", requires = "authority")]
    certificate: Option<PathBuf>,
    /// Its private key
    #[arg(long, value_name = "FILE", requires = "certificate")]
    key: Option<PathBuf>,
    /// The cluster's authorities
    #[arg(long, value_name = "FILE", requires = "certificate")]
    authority: Option<PathBuf>,
    /// The name that the cluster's certificates bear [default: kvasir]
    #[arg(long, value_name = "NAME", requires = "certificate")]
    server_name: Option<String>,
}

/// A context as `list` tells it.
#[derive(Debug, Serialize)]
struct Row<'a> {
    name: &'a str,
    current: bool,
    etcd: &'a [String],
    prefix: Option<&'a str>,
    router: Option<&'a str>,
    tls: bool,
}

/// Does what is asked and says what came of it.
pub(crate) fn run(command: ContextCommand, session: &Session) -> anyhow::Result<Answer> {
    let path = path(|name| session.variable(name))?;
    let mut file = session.contexts()?;
    let text = match command {
        ContextCommand::List => return Ok(list(&file, session).into()),
        ContextCommand::Show { name } => {
            let name = name.or_else(|| session.globals.context.clone()).or_else(|| file.current.clone());
            let Some(name) = name else { return Err(Usage("no context is used: name one".to_owned()).into()) };
            let context = file.get(&name)?;
            let table = || serde_yaml_ng::to_string(context).expect("a context is plain YAML");
            return Ok(session.output().show(context, table).into());
        }
        ContextCommand::Use { name } => {
            file.get(&name)?;
            let text = format!("{name} is used from now on\n");
            file.current = Some(name);
            text
        }
        ContextCommand::Remove { name } => {
            file.get(&name)?;
            session.confirm(&format!("forget the context {name}"))?;
            file.contexts.remove(&name);
            file.current = file.current.filter(|current| *current != name);
            format!("{name} is forgotten\n")
        }
        ContextCommand::Set(args) => {
            ensure!(
                is_name(&args.name),
                Usage(format!("{:?} is no name: letters, digits, . _ - (up to 64)", args.name))
            );
            let (name, new) = (args.name.clone(), !file.contexts.contains_key(&args.name));
            set(file.contexts.entry(name.clone()).or_default(), args, session)?;
            // The first one is the one that is meant.
            if file.current.is_none() {
                file.current = Some(name.clone());
            }
            format!("{name} is {}\n", if new { "made" } else { "changed" })
        }
    };
    file.write(&path)?;
    Ok(session.output().show(&json!({ "done": text.trim(), "file": path }), || text.clone()).into())
}

fn set(context: &mut Context, args: SetArgs, session: &Session) -> anyhow::Result<()> {
    let globals = &session.globals;
    if let Some(etcd) = &globals.etcd {
        context.etcd = session::endpoints(etcd).map_err(|why| Usage(format!("--etcd: {why}")))?;
    }
    let absolute = |path: &PathBuf| std::path::absolute(path);
    if let Some(authority) = &globals.etcd_authority {
        context.etcd_tls = Some(EtcdTls {
            authority: absolute(authority)?,
            certificate: globals.etcd_certificate.as_ref().map(absolute).transpose()?,
            key: globals.etcd_key.as_ref().map(absolute).transpose()?,
            server_name: globals.etcd_server_name.clone(),
        });
    }
    if let Some(username) = &globals.etcd_username {
        context.etcd_username = Some(username.clone());
        context.etcd_password_file = globals.etcd_password_file.as_ref().map(absolute).transpose()?;
    }
    if let Some(prefix) = &globals.prefix {
        session::check_prefix(prefix).map_err(|why| Usage(format!("--prefix: {why}")))?;
        context.prefix = Some(prefix.clone());
    }
    if !globals.via.is_empty() {
        context.via = globals.via.iter().map(ToString::to_string).collect();
    }
    if let Some(router) = args.router {
        ensure!(router.starts_with("http://"), Usage(format!("--router: {router:?}, expected http://HOST:PORT")));
        context.router = Some(router);
    }
    if let Some(token) = &globals.token_file {
        context.token_file = Some(std::path::absolute(token)?);
    }
    if let (Some(certificate), Some(key), Some(authority)) = (args.certificate, args.key, args.authority) {
        let mut tls = TlsConfig::new(absolute(&certificate)?, absolute(&key)?, absolute(&authority)?);
        if let Some(name) = args.server_name {
            tls.server_name = name;
        }
        context.tls = Some(tls);
    }
    Ok(())
}

fn is_name(text: &str) -> bool {
    let fine = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=64).contains(&text.len()) && text.bytes().all(fine)
}

fn list(file: &File, session: &Session) -> String {
    let row = |(name, context): (&'_ String, &'_ Context)| -> serde_json::Value {
        let row = Row {
            name,
            current: file.current.as_ref() == Some(name),
            etcd: &context.etcd,
            prefix: context.prefix.as_deref(),
            router: context.router.as_deref(),
            tls: context.tls.is_some(),
        };
        json!(row)
    };
    let rows: Vec<_> = file.contexts.iter().map(row).collect();
    session.output().show(&rows, || {
        if rows.is_empty() {
            return "no contexts: kvasirctl context set NAME --etcd HOST:PORT makes one\n".to_owned();
        }
        let mut table = Table::new(&["", "NAME", "ETCD", "PREFIX", "ROUTER", "TLS"]);
        for (name, context) in &file.contexts {
            let or_dash = |text: Option<&str>| text.filter(|text| !text.is_empty()).unwrap_or("-").to_owned();
            table.row(vec![
                if file.current.as_ref() == Some(name) { "*" } else { "" }.to_owned(),
                name.clone(),
                or_dash(Some(&context.etcd.join(","))),
                or_dash(context.prefix.as_deref()),
                or_dash(context.router.as_deref()),
                or_dash(context.tls.as_ref().map(|_| "yes")),
            ]);
        }
        table.render()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_plain_words() {
        assert!(["a", "prod-1.eu_west", &"x".repeat(64)].iter().all(|name| is_name(name)));
        assert!(["", "a b", "a/b", "ü", &"x".repeat(65)].iter().all(|name| !is_name(name)));
    }
}
