//! The file of contexts: `$KVASIR_CONFIG`, else `$XDG_CONFIG_HOME/kvasir/config.yaml`, else `~/.config/kvasir/config.yaml`.
//!
//! ```yaml
//! current: prod
//! contexts:
//!   prod:
//!     etcd: [10.0.0.5:2379, 10.0.0.6:2379]
//!     etcd_tls: { authority: etcd-ca.crt, certificate: etcd.crt, key: etcd.key }
//!     etcd_username: kvasir
//!     etcd_password_file: etcd.password
//!     prefix: /kvasir/v1
//!     router: http://10.0.0.9:8000
//!     via: [router-0/admin=127.0.0.1:9090]
//!     token_file: prod.token
//!     tls: { certificate: tls.crt, key: tls.key, authority: ca.crt }
//! ```
//!
//! It holds no secrets, only where they are. Relative paths are relative to the file.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, ensure};
use kvasir_cluster::EtcdTls;
use kvasir_rpc::TlsConfig;
use serde::{Deserialize, Serialize};

use crate::output::Usage;

/// Files longer than this are something else.
const MAX_BYTES: u64 = 1 << 20;

/// A cluster, and how to reach it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Context {
    /// Endpoints of etcd.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) etcd: Vec<String>,
    /// Certificates, if etcd is called by TLS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) etcd_tls: Option<EtcdTls>,
    /// The user as which etcd is called.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) etcd_username: Option<String>,
    /// A file with that user's password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) etcd_password_file: Option<PathBuf>,
    /// What the cluster's keys begin with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prefix: Option<String>,
    /// A router's (or balancer's) URL, for `bench`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) router: Option<String>,
    /// Other ways to members.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) via: Vec<String>,
    /// The operator's token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
    /// Certificates for calls to workers and store nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) tls: Option<TlsConfig>,
}

/// All contexts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct File {
    /// The one that is used unless another is named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) current: Option<String>,
    /// By name.
    pub(crate) contexts: BTreeMap<String, Context>,
    /// Where relative paths begin.
    #[serde(skip)]
    folder: PathBuf,
}

/// Where the file is.
pub(crate) fn path(variable: impl Fn(&str) -> Option<String>) -> anyhow::Result<PathBuf> {
    if let Some(path) = variable("KVASIR_CONFIG") {
        return Ok(path.into());
    }
    let folder = variable("XDG_CONFIG_HOME").map(PathBuf::from);
    let folder = folder.or_else(|| Some(PathBuf::from(variable("HOME")?).join(".config")));
    let folder = folder.context("neither KVASIR_CONFIG nor HOME is set: where are the contexts?")?;
    Ok(folder.join("kvasir").join("config.yaml"))
}

impl File {
    /// Reads it; one that is not there has no contexts.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let mut text = String::new();
        match fs::File::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
            Ok(file) => {
                let read = file.take(MAX_BYTES + 1).read_to_string(&mut text);
                read.with_context(|| path.display().to_string())?;
            }
        }
        ensure!(text.len() as u64 <= MAX_BYTES, "{}: over {} MiB", path.display(), MAX_BYTES >> 20);
        let wrong = |error: serde_yaml_ng::Error| {
            let line = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
            Usage(format!("{}: {line}", path.display()))
        };
        // An empty file, or only comments, is null.
        let read: Option<Self> = serde_yaml_ng::from_str(&text).map_err(wrong)?;
        let folder = path.parent().map(Path::to_owned).unwrap_or_default();
        let mut file = Self { folder, ..read.unwrap_or_default() };
        let folder = &file.folder;
        for context in file.contexts.values_mut() {
            context.paths(|path| if path.is_relative() { folder.join(path) } else { path.to_owned() });
        }
        Ok(file)
    }

    /// Writes it, so that a reader sees the old one or the new one.
    pub(crate) fn write(&self, path: &Path) -> anyhow::Result<()> {
        let named = || format!("cannot write {}", path.display());
        // Where it is a link, what it leads to is replaced.
        let target = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let folder = target.parent().with_context(named)?;
        fs::create_dir_all(folder).with_context(named)?;
        let name = target.file_name().with_context(named)?.to_string_lossy().into_owned();
        let partial = folder.join(format!(".{name}.{}.partial", std::process::id()));
        let text = serde_yaml_ng::to_string(self).expect("contexts are plain YAML");
        let written = fs::write(&partial, text).and_then(|()| fs::rename(&partial, &target));
        written.inspect_err(|_| _ = fs::remove_file(&partial)).with_context(named)
    }

    /// The context of that name.
    pub(crate) fn get(&self, name: &str) -> Result<&Context, Usage> {
        self.contexts.get(name).ok_or_else(|| {
            let names = self.contexts.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
            let there = if names.is_empty() { "there is none (kvasirctl context set)".to_owned() } else { names };
            Usage(format!("no context is called {name:?}, there are: {there}"))
        })
    }

    /// The current context, if there is one.
    pub(crate) fn current(&self) -> Option<&Context> {
        self.contexts.get(self.current.as_ref()?)
    }
}

impl Context {
    fn paths(&mut self, change: impl Fn(&Path) -> PathBuf) {
        let mut all: Vec<&mut PathBuf> = self.token_file.iter_mut().chain(&mut self.etcd_password_file).collect();
        if let Some(tls) = &mut self.etcd_tls {
            all.push(&mut tls.authority);
            all.extend(tls.certificate.iter_mut().chain(&mut tls.key));
        }
        if let Some(tls) = &mut self.tls {
            all.extend([&mut tls.certificate, &mut tls.key, &mut tls.authority]);
        }
        all.into_iter().for_each(|path| *path = change(path));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_found_read_written_and_read_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("deep/config.yaml");
        assert_eq!(File::read(&path).unwrap().contexts.len(), 0, "none yet");
        let text =
            "current: a\ncontexts:\n  a:\n    etcd: [x:1]\n    token_file: t\n    etcd_tls: {authority: c}\n  b: {}\n";
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        let file = File::read(&path).unwrap();
        assert_eq!(file.current().unwrap().etcd, ["x:1"]);
        assert_eq!(file.current().unwrap().token_file.as_deref(), Some(dir.path().join("deep/t").as_path()));
        let authority = file.current().unwrap().etcd_tls.as_ref().map(|tls| tls.authority.clone());
        assert_eq!(authority, Some(dir.path().join("deep/c")));
        file.write(&path).unwrap();
        assert_eq!(File::read(&path).unwrap(), file);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_key_that_is_none_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.yaml");
        fs::write(&path, "contexts:\n  a:\n    ectd: [x:1]\n").unwrap();
        let line = File::read(&path).unwrap_err().to_string();
        assert!(line.contains("ectd") && line.contains("config.yaml") && line.lines().count() == 1, "{line}");
        fs::write(&path, "# nothing\n").unwrap();
        assert!(File::read(&path).unwrap().contexts.is_empty());
    }

    #[test]
    fn the_file_is_where_variables_say() {
        let of = |set: &'static [(&str, &str)]| {
            let read = |name: &str| set.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
            path(read).map(|path| path.display().to_string())
        };
        assert_eq!(of(&[("KVASIR_CONFIG", "/a"), ("HOME", "/h")]).unwrap(), "/a");
        assert_eq!(of(&[("XDG_CONFIG_HOME", "/x"), ("HOME", "/h")]).unwrap(), "/x/kvasir/config.yaml");
        assert_eq!(of(&[("HOME", "/h")]).unwrap(), "/h/.config/kvasir/config.yaml");
        assert!(of(&[]).is_err());
    }
}
