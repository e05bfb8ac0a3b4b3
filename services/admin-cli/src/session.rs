//! What a verb works with: opened when it is asked for, so that a verb that needs no cluster never looks for one.
//!
//! Where a thing comes from, the first that says so: its flag; the context that `--context` names; its variable; the current
//! context; the default.

use std::{
    io::{IsTerminal as _, Write as _},
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use kvasir_cluster::{EtcdConfig, EtcdTls, View};
use kvasir_rpc::Rpc;

use crate::{
    cli::Globals,
    context::{self, Context},
    output::{Output, Usage},
    probe::{Token, Way},
    via::{self, Via},
};

/// Where etcd listens unless somebody says otherwise.
const DEFAULT_ETCD: &str = "127.0.0.1:2379";
/// Most bytes of a token.
const MAX_TOKEN: usize = 4096;

/// One call of the program.
#[derive(Debug)]
pub(crate) struct Session {
    /// What was said for all verbs.
    pub(crate) globals: Globals,
    variable: fn(&str) -> Option<String>,
}

impl Session {
    /// Nothing is read yet.
    pub(crate) fn new(globals: Globals, variable: fn(&str) -> Option<String>) -> Self {
        Self { globals, variable }
    }

    /// Form of the answer.
    pub(crate) fn output(&self) -> Output {
        self.globals.output
    }

    /// How long one step may take.
    pub(crate) fn limit(&self) -> Duration {
        Duration::from_millis(self.globals.timeout)
    }

    /// A variable of the environment, if it says something.
    pub(crate) fn variable(&self, name: &str) -> Option<String> {
        (self.variable)(name).filter(|value| !value.is_empty())
    }

    /// The file of contexts.
    pub(crate) fn contexts(&self) -> anyhow::Result<context::File> {
        context::File::read(&context::path(|name| self.variable(name))?)
    }

    /// The context that was named, or else the current one.
    pub(crate) fn context(&self) -> anyhow::Result<(Option<Context>, bool)> {
        let named = self.globals.context.clone().or_else(|| self.variable("KVASIR_CONTEXT"));
        let file = match context::path(|name| self.variable(name)) {
            Ok(path) => context::File::read(&path)?,
            // No home, no contexts: nothing is wrong with that.
            Err(_) if named.is_none() => return Ok((None, false)),
            Err(error) => return Err(error),
        };
        match named {
            Some(name) => Ok((Some(file.get(&name)?.clone()), true)),
            None => Ok((file.current().cloned(), false)),
        }
    }

    /// Where etcd is.
    pub(crate) fn etcd(&self) -> anyhow::Result<EtcdConfig> {
        let (context, named) = self.context()?;
        let from_context = context.as_ref().filter(|context| !context.etcd.is_empty());
        let of_context = || from_context.map(|context| ("the context's etcd", context.etcd.join(",")));
        let of_variable = || Some(("KVASIR_ETCD", self.variable("KVASIR_ETCD")?));
        let (from, text) = self
            .globals
            .etcd
            .clone()
            .map(|text| ("--etcd", text))
            .or_else(|| if named { of_context() } else { None })
            .or_else(of_variable)
            .or_else(of_context)
            .unwrap_or_else(|| ("--etcd", DEFAULT_ETCD.to_owned()));
        let endpoints = endpoints(&text).map_err(|why| Usage(format!("{from}: {why}")))?;
        let mut etcd = EtcdConfig { endpoints, ..EtcdConfig::default() };
        self.prove_to_etcd(&mut etcd, context.as_ref(), named);
        (etcd.connect_timeout_ms, etcd.request_timeout_ms) = (self.globals.timeout, self.globals.timeout);
        if let Some(prefix) = self.globals.prefix.clone().or_else(|| context?.prefix) {
            check_prefix(&prefix).map_err(|why| Usage(format!("--prefix: {why}")))?;
            etcd.prefix = prefix;
        }
        Ok(etcd)
    }

    /// What is shown to etcd, and believed of it: each by flags, by the context, by variables that services read, too.
    fn prove_to_etcd(&self, etcd: &mut EtcdConfig, context: Option<&Context>, named: bool) {
        let globals = &self.globals;
        etcd.take_variables(|name| self.variable(name));
        if let Some(tls) = context.and_then(|context| context.etcd_tls.clone())
            && (named || etcd.tls.is_none())
        {
            etcd.tls = Some(tls);
        }
        if let Some(user) = context.and_then(|context| context.etcd_username.clone())
            && (named || etcd.username.is_none())
        {
            etcd.username = Some(user);
            etcd.password_file = context.and_then(|context| context.etcd_password_file.clone());
        }
        if let Some(authority) = &globals.etcd_authority {
            etcd.tls = Some(EtcdTls {
                authority: authority.clone(),
                certificate: globals.etcd_certificate.clone(),
                key: globals.etcd_key.clone(),
                server_name: globals.etcd_server_name.clone(),
            });
        }
        if let Some(user) = &globals.etcd_username {
            etcd.username = Some(user.clone());
            etcd.password_file = globals.etcd_password_file.clone();
        }
    }

    /// The members as the cluster's metadata has them now, at the addresses where they are reached from here.
    pub(crate) async fn view(&self) -> anyhow::Result<View> {
        let ways = self.ways()?;
        // Without its future the registry shows the members as they were just read, which is all that is needed.
        let (registry, _) = kvasir_cluster::connect_etcd(self.etcd()?).await?;
        let view = View::clone(&registry.view().borrow());
        Ok(via::redirect(view, &ways))
    }

    /// Other ways to members: those of flags first.
    fn ways(&self) -> anyhow::Result<Vec<Via>> {
        let mut ways = self.globals.via.clone();
        if let Some(context) = self.context()?.0 {
            for way in &context.via {
                ways.push(way.parse().map_err(|why| Usage(format!("the context's via: {why}")))?);
            }
        }
        Ok(ways)
    }

    /// How members are asked.
    pub(crate) fn way(&self) -> anyhow::Result<Way> {
        let from_variables = kvasir_rpc::Config::from_variables(|name| self.variable(name));
        let mut rpc = from_variables.map_err(|error| Usage(error.to_string()))?;
        let (context, named) = self.context()?;
        if let Some(tls) = context.and_then(|context| context.tls)
            && (named || rpc.tls.is_none())
        {
            rpc.tls = Some(tls);
        }
        // It is done before certificates change.
        let (rpc, _) = Rpc::open(&rpc)?;
        Ok(Way { rpc, limit: self.limit(), token: self.token()? })
    }

    /// What this operator proves itself with, if it has something.
    fn token(&self) -> anyhow::Result<Option<Token>> {
        if let Some(path) = &self.globals.token_file {
            return Ok(Some(read_token(path)?));
        }
        let (context, named) = self.context()?;
        let file = context.and_then(|context| context.token_file);
        match (file, self.variable("KVASIR_TOKEN")) {
            (Some(path), variable) if named || variable.is_none() => Ok(Some(read_token(&path)?)),
            (_, Some(text)) => Ok(Some(token(&text).map_err(|why| Usage(format!("KVASIR_TOKEN: {why}")))?)),
            (_, None) => Ok(None),
        }
    }

    /// Asks before something is done that can't be undone. Where nobody can be asked, the flag is needed.
    pub(crate) fn confirm(&self, what: &str) -> anyhow::Result<()> {
        if self.globals.yes {
            return Ok(());
        }
        ensure!(std::io::stdin().is_terminal(), "this would {what}: say --yes if that is meant");
        eprint!("This will {what}. Go on? [y/N] ");
        std::io::stderr().flush()?;
        let mut answer = String::new();
        std::io::stdin().read_line(&mut answer)?;
        ensure!(matches!(answer.trim(), "y" | "Y" | "yes"), "nothing was done");
        Ok(())
    }
}

/// The endpoints in a list.
pub(crate) fn endpoints(text: &str) -> Result<Vec<String>, String> {
    let endpoints: Vec<String> = text.split(',').map(|endpoint| endpoint.trim().to_owned()).collect();
    match endpoints.iter().find(|endpoint| !is_endpoint(endpoint)) {
        Some(bad) => Err(format!("{bad:?} is no endpoint, expected host:port")),
        None => Ok(endpoints),
    }
}

/// Whether keys may begin so.
pub(crate) fn check_prefix(prefix: &str) -> Result<(), String> {
    if prefix.starts_with('/') { Ok(()) } else { Err(format!("{prefix:?} does not begin with /")) }
}

fn is_endpoint(text: &str) -> bool {
    let address = text.strip_prefix("http://").or_else(|| text.strip_prefix("https://")).unwrap_or(text);
    address.rsplit_once(':').is_some_and(|(host, port)| {
        !host.is_empty()
            && host.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'/')
            && port.parse::<u16>().is_ok()
    })
}

fn read_token(path: &Path) -> anyhow::Result<Token> {
    use std::io::Read as _;
    let named = || format!("the token file {}", path.display());
    let mut text = String::new();
    let file = std::fs::File::open(path).with_context(named)?;
    file.take(MAX_TOKEN as u64 + 2).read_to_string(&mut text).with_context(named)?;
    token(&text).map_err(anyhow::Error::msg).with_context(named)
}

fn token(text: &str) -> Result<Token, String> {
    let text = text.trim();
    if text.is_empty() || text.len() > MAX_TOKEN || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(format!("expected one word of up to {MAX_TOKEN} letters, digits and signs"));
    }
    Ok(Token(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::cli::Cli;

    fn session(line: &str, variable: fn(&str) -> Option<String>) -> Session {
        Session::new(Cli::try_parse_from(line.split(' ')).unwrap().globals, variable)
    }

    #[test]
    fn a_flag_beats_the_variable_and_the_variable_the_default() {
        let none = |_: &str| None;
        let set = |name: &str| (name == "KVASIR_ETCD").then(|| "b:2, http://c:3".to_owned());
        let endpoints =
            |line: &str, variable: fn(&str) -> Option<String>| session(line, variable).etcd().unwrap().endpoints;
        assert_eq!(endpoints("kvasirctl status", none), ["127.0.0.1:2379"]);
        assert_eq!(endpoints("kvasirctl status", set), ["b:2", "http://c:3"]);
        assert_eq!(endpoints("kvasirctl status --etcd [::1]:1", set), ["[::1]:1"]);
    }

    #[test]
    fn what_is_no_endpoint_is_blamed_on_its_origin() {
        let set = |name: &str| (name == "KVASIR_ETCD").then(|| "a:1,b".to_owned());
        let line = session("kvasirctl status", set).etcd().unwrap_err();
        assert_eq!(line.to_string(), "KVASIR_ETCD: \"b\" is no endpoint, expected host:port");
        assert!(line.is::<Usage>());
        for bad in ["", ":1", "a", "a:b", "a:70000", "ftp://a:1", "a/b:1"] {
            assert!(endpoints(bad).is_err(), "{bad:?}");
        }
        assert!(session("kvasirctl status --prefix x", |_| None).etcd().is_err());
    }

    #[test]
    fn what_is_shown_to_etcd_is_said_by_flags_or_by_variables_of_services() {
        let none = session("kvasirctl status", |_| None).etcd().unwrap();
        assert_eq!((none.tls, none.username), (None, None));
        let set = |name: &str| match name.strip_prefix("KVASIR_REGISTRY__ETCD__")? {
            "TLS__AUTHORITY" => Some("ca".to_owned()),
            "TLS__SERVER_NAME" => Some("etcd".to_owned()),
            "USERNAME" => Some("kvasir".to_owned()),
            "PASSWORD_FILE" => Some("secret".to_owned()),
            _ => None,
        };
        let of_variables = session("kvasirctl status", set).etcd().unwrap();
        let tls = of_variables.tls.unwrap();
        assert_eq!((tls.authority, tls.certificate, tls.server_name), ("ca".into(), None, Some("etcd".to_owned())));
        assert_eq!(of_variables.username.as_deref(), Some("kvasir"));
        let line = "kvasirctl status --etcd-authority a --etcd-certificate c --etcd-key k --etcd-username me --etcd-password-file p";
        let of_flags = session(line, set).etcd().unwrap();
        let tls = of_flags.tls.unwrap();
        assert_eq!((tls.authority, tls.certificate, tls.server_name), ("a".into(), Some("c".into()), None));
        assert_eq!((of_flags.username, of_flags.password_file), (Some("me".to_owned()), Some("p".into())));
        for half in ["--etcd-certificate c", "--etcd-key k", "--etcd-username me", "--etcd-password-file p"] {
            assert!(Cli::try_parse_from(format!("kvasirctl status {half}").split(' ')).is_err(), "{half}");
        }
    }

    #[test]
    fn a_token_is_one_word_and_is_not_shown() {
        let word = token(" abc-123\n").unwrap();
        assert_eq!(word.0, "abc-123");
        assert!(!format!("{word:?}").contains("abc"));
        for bad in ["", " ", "a b", "a\nb", "ü"] {
            assert!(token(bad).is_err(), "{bad:?}");
        }
        assert!(token(&"x".repeat(MAX_TOKEN + 1)).is_err());
    }
}
