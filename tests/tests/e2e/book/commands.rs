//! Which commands the pages show, and who looks at each: a program's own reading of its arguments, or a reason why nobody does.

use std::{
    collections::BTreeSet,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use cargo_metadata::{Metadata, MetadataCommand};
use kvasir_tests::workspace;

use super::pages::Shown;
use crate::chart::manifests::{helm, said};

/// Programs of others: that they are run, or why not, `coverage` sees to.
const OF_OTHERS: [&str; 11] = [
    "docker",
    "kubectl",
    "vllm",
    "python",
    "etcdctl",
    "openssl",
    "export",
    "alias",
    "echo",
    "jq",
    "tests/rivals/foyer/target/release/foyer-disk-bench",
];

const SERVICES: [&str; 5] = ["router", "prefill-worker", "decode-worker", "kv-store", "standalone"];
const TOOLS: [&str; 4] = ["kvasir-replay", "kvasir-simulate", "kvasir-engine-bench", "kvasir-transfer-bench"];

/// What paths in the pages stand for, so that commands can be run.
pub(crate) const STAND_FOR: &[(&str, &str)] = &[("path/to/Qwen3-0.6B", "models/demo"), ("target/release/", "")];

/// Looks at commands. Those of kvasirctl it keeps, to ask for all of them at once.
pub(crate) struct Inspector {
    metadata: Metadata,
    ctl: Vec<(String, Vec<String>)>,
}

impl Inspector {
    pub(crate) fn new() -> Result<Self> {
        let manifest = workspace::root().join("Cargo.toml");
        let options = vec!["--offline".into()];
        let metadata = MetadataCommand::new().manifest_path(manifest).no_deps().other_options(options).exec()?;
        Ok(Self { metadata, ctl: Vec::new() })
    }

    /// Looks at a line of a page; an error says what is wrong with it.
    pub(crate) fn look(&mut self, place: &str, shown: &Shown) -> Result<()> {
        for command in simple(&shown.command)? {
            self.one(place, &command, shown)?;
        }
        Ok(())
    }

    /// A span of code that is a command, or the beginning of one.
    pub(crate) fn span(&mut self, place: &str, span: &str) -> Result<()> {
        let mut words = words(span)?;
        words.push(FRAGMENT.to_owned());
        self.ctl.push((place.to_owned(), words));
        Ok(())
    }

    fn one(&mut self, place: &str, command: &[String], shown: &Shown) -> Result<()> {
        let assigned = command.iter().take_while(|word| is_assignment(word)).count();
        let (Some(program), arguments) = (command.get(assigned), command.get(assigned + 1..).unwrap_or(&[])) else {
            return Ok(()); // A=b alone
        };
        let program = program.strip_prefix("target/release/").unwrap_or(program);
        if let Some(example) = program.strip_prefix("examples/") {
            return self.target(None, "example", example);
        }
        match program {
            "kvasirctl" => self.ctl.push((place.to_owned(), command[assigned..].to_vec())),
            _ if SERVICES.contains(&program) => prints_configuration(program, arguments)?,
            _ if TOOLS.contains(&program) => takes(program, arguments)?,
            "cargo" => self.cargo(arguments)?,
            "kvasir-quantize" => quantize(arguments)?,
            "curl" => curl(arguments)?,
            "helm" => chart(arguments, shown)?,
            _ if program.starts_with("scripts/") => script(program, arguments)?,
            _ => {
                ensure!(
                    OF_OTHERS.contains(&program),
                    "nobody looks at commands of {program:?}. Teach Inspector::one of tests/tests/e2e/book/commands.rs to, \
                     or add it to OF_OTHERS there and have it run; pictures and outputs are fenced as ```text"
                );
                files_exist(program, arguments)?;
                if let Some(at) = arguments.iter().rposition(|word| word == "kvasirctl") {
                    self.ctl.push((place.to_owned(), arguments[at..].to_vec()));
                }
            }
        }
        Ok(())
    }

    /// Asks kvasirctl whether it understands all that was shown of it: what it does not.
    pub(crate) fn misunderstood(&self) -> Result<Vec<String>> {
        ensure!(self.ctl.len() > 50, "only {} commands of kvasirctl were found", self.ctl.len());
        let mut command = Command::new(workspace::binary("kvasirctl")?);
        command.args(["docs", "--check"]).env_clear().stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let mut lines = String::new();
        for (_, words) in &self.ctl {
            let (words, fragment) = match words.split_last() {
                Some((last, words)) if last == FRAGMENT => (words, true),
                _ => (words.as_slice(), false),
            };
            lines += &serde_json::json!({ "words": words, "fragment": fragment }).to_string();
            lines.push('\n');
        }
        child.stdin.take().context("its standard input")?.write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        let answers: Vec<String> = serde_json::from_slice(&output.stdout).with_context(|| said(&output))?;
        ensure!(answers.len() == self.ctl.len(), "{} answers", answers.len());
        let asked = self.ctl.iter().zip(answers).filter(|(_, answer)| !answer.is_empty());
        Ok(asked.map(|((place, words), answer)| format!("{place}: {}: {answer}", words.join(" "))).collect())
    }

    fn cargo(&self, arguments: &[String]) -> Result<()> {
        let (ours, theirs) = match arguments.iter().position(|word| word == "--") {
            Some(at) => (&arguments[..at], &arguments[at + 1..]),
            None => (arguments, &[][..]),
        };
        let value = |flag: &str| ours.windows(2).find(|pair| pair[0] == flag).map(|pair| pair[1].as_str());
        if let Some(path) = value("--manifest-path") {
            ensure!(workspace::root().join(path).is_file(), "{path} does not exist");
            return Ok(());
        }
        let package = value("-p");
        if let Some(name) = package {
            ensure!(self.metadata.packages.iter().any(|package| package.name.as_str() == name), "no package {name}");
        }
        for kind in ["example", "bin", "test"] {
            if let Some(name) = value(&format!("--{kind}")) {
                self.target(package, kind, name)?;
            }
        }
        if !theirs.is_empty() {
            let program = package.context("-p says whose program it is")?;
            takes(program, theirs)?;
        }
        Ok(())
    }

    fn target(&self, package: Option<&str>, kind: &str, name: &str) -> Result<()> {
        let packages =
            self.metadata.packages.iter().filter(|known| package.is_none_or(|name| known.name.as_str() == name));
        let found = packages
            .flat_map(|package| &package.targets)
            .any(|target| target.name == name && target.kind.iter().any(|known| known.to_string() == kind));
        ensure!(found, "there is no {kind} {name}");
        Ok(())
    }
}

/// The program of a command without what is set before it and where it lies, and all of it from there on.
pub(crate) fn program_of(words: &[String]) -> (&str, String) {
    let rest = &words[words.iter().take_while(|word| is_assignment(word)).count()..];
    let line = rest.join(" ");
    let line = line.strip_prefix("target/release/").unwrap_or(&line).to_owned();
    let program = rest.first().map_or("", String::as_str);
    (program.strip_prefix("target/release/").unwrap_or(program), line)
}

/// Whether looking at it is to run it: a service that prints its configuration, a chart that is rendered.
pub(crate) fn asks(program: &str, words: &[String]) -> bool {
    program.is_empty() || SERVICES.contains(&program) || words.starts_with(&["helm".to_owned(), "template".to_owned()])
}

/// Marks the words of a span, which may be the beginning of a command.
const FRAGMENT: &str = "\u{0}fragment";

fn is_assignment(word: &str) -> bool {
    word.split_once('=').is_some_and(|(name, _)| {
        !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c.is_ascii_digit() || c == '_')
    })
}

/// What a service understands, it prints.
fn prints_configuration(program: &str, arguments: &[String]) -> Result<()> {
    let mut command = Command::new(workspace::binary(program)?);
    command.args(arguments).env_clear().current_dir(workspace::root());
    if !arguments.iter().any(|word| word == "--print-config" || word == "--help") {
        command.arg("--print-config");
    }
    let output = command.output()?;
    ensure!(output.status.success(), "{}", said(&output).trim());
    Ok(())
}

/// Whether a tool knows the flags, and their values: behind them it is asked for help, which it gives only then.
fn takes(program: &str, arguments: &[String]) -> Result<()> {
    let mut command = Command::new(workspace::binary(program)?);
    let output = command.args(arguments).arg("--help").env_clear().current_dir(workspace::root()).output()?;
    ensure!(output.status.success(), "{}", said(&output).lines().next().unwrap_or_default());
    Ok(())
}

/// It has no other way to be asked; the guide that shows it is followed.
fn quantize(arguments: &[String]) -> Result<()> {
    let [_, _, to, kind] = arguments else { bail!("IN OUT --to int8|fp8") };
    ensure!(to == "--to" && ["int8", "fp8"].contains(&kind.as_str()), "{to} {kind}?");
    Ok(())
}

fn script(program: &str, arguments: &[String]) -> Result<()> {
    let path = workspace::root().join(program);
    let text = std::fs::read_to_string(&path).with_context(|| format!("{program} does not exist"))?;
    // Their first comment is their help.
    let help: String =
        text.lines().skip(1).take_while(|line| line.starts_with('#')).flat_map(|line| [line, "\n"]).collect();
    let known: BTreeSet<_> = help.split(|c: char| c.is_whitespace() || "[],:;()".contains(c)).collect();
    let mut takes_value = false;
    for (at, word) in arguments.iter().enumerate() {
        let is_flag = word.starts_with("--");
        let is_name = at == 0 && !is_flag;
        if is_flag || is_name {
            ensure!(known.contains(word.as_str()), "{program} --help does not know {word:?}");
        } else {
            ensure!(takes_value || at < 2, "{program}: {word:?} belongs to nothing");
        }
        takes_value = is_flag;
    }
    Ok(())
}

/// Where it asks, a service of ours answers: its paths are documented, or those of an admin port.
fn curl(arguments: &[String]) -> Result<()> {
    let url = arguments.iter().find(|word| word.starts_with("http")).context("no URL")?;
    let (host, path) = url.split_once("://").and_then(|(_, rest)| rest.split_once('/')).unwrap_or((url, ""));
    ensure!(
        host == "127.0.0.1:8000" || host == "127.0.0.1:9090",
        "{url}: examples are on 127.0.0.1, 8000 or 9090 (admin)"
    );
    let known = std::fs::read_to_string(workspace::root().join("docs/api.md"))?;
    let known = host.ends_with("9090") || known.contains(&format!("/{path}`")) || known.contains(&format!("/{path} "));
    ensure!(known, "docs/api.md does not know /{path}");
    Ok(())
}

/// What would be installed can be rendered.
fn chart(arguments: &[String], shown: &Shown) -> Result<()> {
    let (verb, rest) = arguments.split_first().context("helm does what?")?;
    match verb.as_str() {
        "install" | "upgrade" | "template" => {}
        "test" | "uninstall" | "rollback" | "history" => return Ok(()), // of a release's name
        other => bail!("helm {other}?"),
    }
    let of_a_cluster = ["--create-namespace", "--reuse-values", "--wait"];
    let rest = rest.iter().filter(|word| !of_a_cluster.contains(&word.as_str()));
    let output = Command::new(helm()?).arg("template").args(rest).current_dir(workspace::root()).output()?;
    let text = said(&output);
    match &shown.output {
        Some(lines) => {
            let missing = lines.iter().find(|line| !text.contains(line.trim()));
            ensure!(missing.is_none(), "it says nothing of {missing:?}, but {text}");
        }
        None => ensure!(output.status.success(), "{text}"),
    }
    Ok(())
}

/// The files that a program which nobody runs is given.
fn files_exist(program: &str, arguments: &[String]) -> Result<()> {
    if program == "docker" {
        for pair in arguments.windows(2).filter(|pair| pair[0] == "-f") {
            ensure!(workspace::root().join(&pair[1]).is_file(), "{} does not exist", pair[1]);
        }
    }
    Ok(())
}

/// A line as the commands that it is made of: words between `&&`, `|`, `&` and `;`.
pub(crate) fn simple(line: &str) -> Result<Vec<Vec<String>>> {
    let mut commands = vec![Vec::new()];
    let mut skip = false;
    for word in words(line)? {
        match word.as_str() {
            "&&" | "|" | "&" | ";" => commands.push(Vec::new()),
            ">" => skip = true,
            _ if std::mem::take(&mut skip) => {}
            _ => commands.last_mut().context("one")?.push(word),
        }
    }
    Ok(commands.into_iter().filter(|command| !command.is_empty()).collect())
}

/// Words as a shell parts them: quotes and backslashes, nothing else.
fn words(line: &str) -> Result<Vec<String>> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (Some('"') | None, '\\') => word.get_or_insert_default().extend(chars.next()),
            (Some(_), _) => word.get_or_insert_default().push(c),
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, ' ') => words.extend(word.take()),
            (None, _) => word.get_or_insert_default().push(c),
        }
    }
    ensure!(quote.is_none(), "a quote is not closed: {line}");
    words.extend(word);
    Ok(words)
}

/// Whether some service, or the chart, understands these settings.
pub(crate) fn settings_are_known(text: &str, dir: &Path) -> Result<()> {
    let mut wrong = Vec::new();
    // A file of keys is a section of the router's configuration.
    let nested: String = text.lines().flat_map(|line| ["  ", line, "\n"]).collect();
    for (text, path) in
        [(text.to_owned(), dir.join("settings.yaml")), (format!("access:\n{nested}"), dir.join("keys.yaml"))]
    {
        std::fs::write(&path, text)?;
        for service in SERVICES {
            let file = path.to_string_lossy().into_owned();
            match prints_configuration(service, &["--config".to_owned(), file]) {
                Ok(()) => return Ok(()),
                Err(error) => wrong.push(format!("{service}: {error:#}")),
            }
        }
    }
    let output = Command::new(helm()?)
        .args(["template", "release", "helm/kvasir", "--values"])
        .arg(dir.join("settings.yaml"))
        .current_dir(workspace::root())
        .output()?;
    if output.status.success() {
        return Ok(());
    }
    wrong.push(format!("the chart: {}", said(&output)));
    bail!("nobody understands these settings:\n    {}", wrong.join("\n    "))
}

#[test]
fn a_line_is_parted_as_a_shell_does() -> Result<()> {
    let parts = simple(r#"A=1 a "b c" 'd "e"' f\ g > h && i | j & "#)?;
    assert_eq!(parts, [vec!["A=1", "a", "b c", "d \"e\"", "f g"], vec!["i"], vec!["j"]]);
    assert!(simple("a 'b").is_err());
    Ok(())
}
