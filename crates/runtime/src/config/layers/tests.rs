use std::net::SocketAddr;

use serde::Serialize;

use super::*;
use crate::{AdminConfig, LogConfig, LogFormat};

#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Example {
    id: Option<String>,
    threads: Option<usize>,
    admin: AdminConfig,
    log: LogConfig,
    endpoints: Vec<String>,
    deep: Deep,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Deep {
    inner: Inner,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Inner {
    on: bool,
    size: u16,
}

impl Config for Example {}

impl Default for Inner {
    fn default() -> Self {
        Self { on: true, size: 7 }
    }
}

impl Default for Example {
    fn default() -> Self {
        Self {
            id: None,
            threads: None,
            admin: AdminConfig::default(),
            log: LogConfig::default(),
            endpoints: vec!["a:1".into()],
            deep: Deep::default(),
        }
    }
}

struct Given {
    dir: tempfile::TempDir,
    file: Option<String>,
    env: Vec<(String, String)>,
    set: Vec<String>,
}

fn given() -> Given {
    Given { dir: tempfile::tempdir().unwrap(), file: None, env: Vec::new(), set: Vec::new() }
}

impl Given {
    fn file(mut self, text: &str) -> Self {
        self.file = Some(text.to_owned());
        self
    }

    fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    fn set(mut self, set: &str) -> Self {
        self.set.push(set.to_owned());
        self
    }

    fn load(&self) -> Result<Loaded<Example>, Error> {
        let path = self.dir.path().join("service.yaml");
        if let Some(text) = &self.file {
            fs::write(&path, text).unwrap();
        }
        Layers { file: self.file.as_ref().map(|_| path.as_path()), env: self.env.clone(), set: self.set.clone() }.load()
    }

    fn config(&self) -> Example {
        self.load().unwrap().config
    }

    /// The one line, with the directory of this test taken out.
    fn error(&self) -> String {
        let line = self.load().map(|_| ()).unwrap_err().to_string();
        assert!(!line.contains('\n'), "{line}");
        line.replace(&format!("{}/", self.dir.path().display()), "")
    }
}

#[test]
fn later_layers_win_and_sections_are_merged() {
    let config = given()
        .file("deep: {inner: {size: 1}}\nadmin:\n  listen: 127.0.0.1:1\nid: file\nlog:\n  # format: json\n")
        .env("KVASIR_ADMIN__LISTEN", "127.0.0.1:2")
        .env("KVASIR_ID", "env")
        .set("id=flag")
        .set("endpoints=[b:2, 'c:3']")
        .config();
    assert_eq!(config.id.as_deref(), Some("flag"));
    assert_eq!(config.admin.listen, "127.0.0.1:2".parse::<SocketAddr>().unwrap());
    assert_eq!((config.deep.inner.on, config.deep.inner.size), (true, 1));
    assert_eq!(config.endpoints, ["b:2", "c:3"]);
    assert_eq!(config.log, LogConfig::default(), "a section with only comments says nothing");
}

#[test]
fn values_of_flags_are_yaml_and_text_where_yaml_does_not_fit() {
    let config = given()
        .set("id=007")
        .set("threads=3")
        .set("deep={inner: {on: false}}")
        .set("deep.inner.size=9")
        .set("log.format=json")
        .set("log.filter=info,a::b=debug")
        .config();
    assert_eq!((config.id.as_deref(), config.threads), (Some("007"), Some(3)));
    assert_eq!((config.deep.inner.on, config.deep.inner.size), (false, 9));
    assert_eq!((config.log.format, config.log.filter.as_str()), (LogFormat::Json, "info,a::b=debug"));
    assert_eq!(given().set("id=null").config().id, None);
    assert_eq!(given().set("id=*x").config().id.as_deref(), Some("*x"));
}

#[test]
fn every_mistake_is_one_line_with_layer_key_and_what_is_allowed() {
    for (given, line) in [
        (
            given().file("deep:\n  innr: 1\n"),
            "service.yaml: deep.innr: unknown field `innr` (did you mean `deep.inner`?), expected `inner`",
        ),
        (
            given().file("deep: {inner: {size: x}}"),
            r#"service.yaml: deep.inner.size: invalid type: string "x", expected u16"#,
        ),
        (
            given().file("deep: {inner: {size: 65536}}"),
            "service.yaml: deep.inner.size: invalid value: integer `65536`, expected u16",
        ),
        (given().file("admin: 3"), "service.yaml: admin: invalid type: integer `3`, expected struct AdminConfig"),
        (given().file("- a\n- b"), "service.yaml: expected keys and values (`key: value`)"),
        (
            given().env("KVASIR_DEEP__INNER__SIZE", "-1"),
            "KVASIR_DEEP__INNER__SIZE: deep.inner.size: invalid value: integer `-1`, expected u16",
        ),
        (
            given().env("KVASIR_DEPE", "1"),
            "KVASIR_DEPE: depe: unknown field `depe` (did you mean `deep`?), expected one of `id`, `threads`, `admin`, `log`, `endpoints`, `deep`",
        ),
        (
            given().set("size=3"),
            "--set size=3: size: unknown field `size` (did you mean `deep.inner.size`?), expected one of `id`, `threads`, `admin`, `log`, `endpoints`, `deep`",
        ),
        (
            given().set("log.format=xml"),
            "--set log.format=xml: log.format: unknown variant `xml`, expected `human` or `json`",
        ),
        (
            given().set("admin.listen=localhost"),
            "--set admin.listen=localhost: admin.listen: invalid socket address syntax",
        ),
        (
            given().set("endpoints=b:2"),
            r#"--set endpoints=b:2: endpoints: invalid type: string "b:2", expected a sequence"#,
        ),
        (given().set("id"), "--set id: expected KEY=VALUE"),
        (given().set("deep..inner=1"), "--set deep..inner=1: expected KEY=VALUE"),
    ] {
        assert_eq!(given.error(), line);
    }
    let line = given().set("log.filter=a=b=c").error();
    assert!(
        line.starts_with("--set log.filter=a=b=c: log.filter: \"a=b=c\": ")
            && line.ends_with("`info,kvasir_worker=debug`"),
        "{line}"
    );
    let line = given().file("id: [").error();
    assert!(line.starts_with("service.yaml: not YAML: ") && line.contains("line 2"), "{line}");
    let line = given().file("id: a\nid: b").error();
    assert!(line.contains("duplicate"), "{line}");
    let missing = Layers { file: Some(Path::new("/no/such.yaml")), ..Layers::default() }.load::<Example>();
    assert_eq!(
        missing.unwrap_err().to_string(),
        "--config /no/such.yaml: cannot be read: No such file or directory (os error 2)"
    );
}

#[test]
fn a_mistake_in_a_file_is_told_even_if_a_flag_would_hide_it() {
    assert!(given().file("deep: {inner: {size: x}}").set("deep.inner.size=1").error().starts_with("service.yaml: "));
}

#[test]
fn variables_that_others_put_there_are_skipped_unless_they_name_a_key() {
    let config = given()
        .env("KVASIR_ETCD", "a:1")
        .env("KVASIR_CONFIG", "contexts.yaml")
        .env("KVASIR_CONTEXT", "prod")
        .env("KVASIR_TOKEN", "secret")
        .env("KVASIR_ROUTER_SERVICE_HOST", "10.0.0.1")
        .env("KVASIR_ROUTER_SERVICE_PORT_HTTP", "8000")
        .env("KVASIR_ROUTER_PORT", "tcp://10.0.0.1:8000")
        .env("KVASIR_ROUTER_PORT_8000_TCP_ADDR", "10.0.0.1")
        .env("PATH", "/bin")
        .env("KVASIR_ID", "x")
        .config();
    assert_eq!(config.id.as_deref(), Some("x"));
}

#[test]
fn the_tree_holds_every_key_with_its_value() {
    let loaded = given().set("deep.inner.size=9").load().unwrap();
    let shown = inlined(&loaded.tree);
    for (key, value) in
        [("id", "not set"), ("admin.listen", "127.0.0.1:0"), ("endpoints", r#"["a:1"]"#), ("deep.inner.size", "9")]
    {
        assert!(shown.contains(&(key.to_owned(), value.to_owned())), "{key}: {value} in {shown:?}");
    }
    let again: Example = serde_yaml_ng::from_str(&serde_yaml_ng::to_string(&loaded.tree).unwrap()).unwrap();
    assert_eq!(again.deep.inner.size, 9);
}
