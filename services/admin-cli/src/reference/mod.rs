//! What is made of the arguments themselves: completion for shells, man pages, and docs/kvasirctl.md, which a test compares
//! with what is made here. None of it needs a cluster.

use std::{fmt::Write as _, fs, io::BufRead, path::PathBuf};

use anyhow::Context as _;
use clap::{Arg, Args, Command, CommandFactory as _, Parser as _, ValueEnum, error::ErrorKind};
use clap_complete::Shell;
use serde::Deserialize;
use serde_json::json;

use crate::{cli::Cli, output::Answer, session::Session};

/// What people should know besides the arguments.
const GUIDE: &str = include_str!("guide.md");

/// For which shell.
#[derive(Clone, Debug, Args)]
pub(crate) struct CompletionArgs {
    /// Which shell: `source <(kvasirctl completion bash)`, or where that shell looks for such files
    #[arg(value_enum)]
    shell: Wanted,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Wanted {
    Bash,
    Zsh,
    Fish,
}

/// Where man pages go.
#[derive(Clone, Debug, Args)]
pub(crate) struct ManArgs {
    /// A folder: `kvasirctl.1` and a page for each command are written there
    #[arg(value_name = "FOLDER")]
    folder: PathBuf,
}

/// What is made of it.
#[derive(Clone, Debug, Args)]
pub(crate) struct DocsArgs {
    /// Instead of the page: for each command on standard input (`{"words": ["kvasirctl", …], "fragment": false}`, one a line)
    /// what is wrong with its arguments, as a list of texts; nothing is done
    #[arg(long)]
    check: bool,
}

/// A command that a page shows.
#[derive(Deserialize)]
struct Shown {
    words: Vec<String>,
    /// It may be the beginning of one.
    fragment: bool,
}

/// The script that completes words.
pub(crate) fn completion(args: &CompletionArgs) -> Answer {
    let shell = match args.shell {
        Wanted::Bash => Shell::Bash,
        Wanted::Zsh => Shell::Zsh,
        Wanted::Fish => Shell::Fish,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "kvasirctl", &mut script);
    String::from_utf8_lossy(&script).into_owned().into()
}

/// Writes a page for each command.
pub(crate) fn man(args: &ManArgs, session: &Session) -> anyhow::Result<Answer> {
    let folder = &args.folder;
    fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    clap_mangen::generate_to(Cli::command(), folder).with_context(|| folder.display().to_string())?;
    let text = format!("man pages are in {0}: man -l {0}/kvasirctl.1\n", folder.display());
    Ok(session.output().show(&json!({ "folder": folder }), || text).into())
}

/// docs/kvasirctl.md; or what is wrong with the commands that pages show.
pub(crate) fn docs(args: &DocsArgs) -> anyhow::Result<Answer> {
    if !args.check {
        return Ok(page().into());
    }
    let mut answers = Vec::new();
    for line in std::io::stdin().lock().lines() {
        answers.push(wrong(&serde_json::from_str(&line?)?));
    }
    Ok(serde_json::to_string(&answers)?.into())
}

/// What is wrong with a command's arguments; empty if nothing is.
fn wrong(shown: &Shown) -> String {
    let Err(error) = Cli::try_parse_from(&shown.words) else { return String::new() };
    let text = error.to_string();
    let unfinished = match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => return String::new(),
        ErrorKind::MissingRequiredArgument
        | ErrorKind::MissingSubcommand
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => true,
        _ => text.contains("a value is required"),
    };
    if unfinished && shown.fragment { String::new() } else { text.lines().next().unwrap_or_default().to_owned() }
}

fn page() -> String {
    let mut root = Cli::command();
    root.build();
    let mut text = GUIDE.to_owned();
    text += "\n## For all commands\n\n";
    options(&root, &mut text);
    text += "\n## Commands\n";
    for command in root.get_subcommands() {
        describe(command, &mut text);
    }
    text
}

fn is_shown(command: &Command) -> bool {
    !command.is_hide_set() && command.get_name() != "help"
}

fn describe(command: &Command, text: &mut String) {
    if !is_shown(command) {
        return;
    }
    let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
    let about = command.get_long_about().or_else(|| command.get_about()).map(ToString::to_string).unwrap_or_default();
    _ = write!(text, "\n### {name}\n\n{about}.\n");
    let has_own = command.get_arguments().any(is_own);
    let leaf = command.get_subcommands().all(|sub| !is_shown(sub)) || !command.is_subcommand_required_set();
    if leaf {
        let usage = command.clone().render_usage().to_string();
        _ = write!(text, "\n    {}\n", usage.trim_start_matches("Usage: ").trim());
    }
    if has_own {
        text.push('\n');
        options(command, text);
    }
    command.get_subcommands().for_each(|sub| describe(sub, text));
}

/// Not one of those that every command has, and that are told once.
fn is_own(arg: &Arg) -> bool {
    !arg.is_global_set() && !arg.is_hide_set() && !["help", "version"].contains(&arg.get_id().as_str())
}

fn options(command: &Command, text: &mut String) {
    let root = command.get_name() == "kvasirctl";
    for arg in command.get_arguments().filter(|arg| is_own(arg) || (root && arg.is_global_set())) {
        let mut names = Vec::new();
        names.extend(arg.get_short().map(|short| format!("-{short}")));
        names.extend(arg.get_long().map(|long| format!("--{long}")));
        let value =
            arg.get_value_names().map(|names| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" "));
        let mut name = names.join(", ");
        if let Some(value) = value.filter(|_| arg.get_action().takes_values()) {
            name += &if name.is_empty() { value } else { format!(" {value}") };
        }
        let help = arg.get_long_help().or_else(|| arg.get_help()).map(ToString::to_string).unwrap_or_default();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        _ = write!(text, "- `{name}`: {help}");
        let possible: Vec<String> = if arg.get_action().takes_values() {
            let shown = arg.get_possible_values().into_iter().filter(|value| !value.is_hide_set());
            shown.map(|value| format!("`{}`", value.get_name())).collect()
        } else {
            Vec::new()
        };
        if !possible.is_empty() {
            _ = write!(text, "; one of {}", possible.join(", "));
        }
        let defaults: Vec<_> = arg.get_default_values().iter().map(|value| value.to_string_lossy()).collect();
        if arg.get_action().takes_values() && !arg.is_hide_default_value_set() && !defaults.is_empty() {
            _ = write!(text, " (default: {})", defaults.join(" "));
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_in_docs_is_what_the_arguments_say() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/kvasirctl.md");
        let written = fs::read_to_string(path).unwrap_or_default();
        assert!(
            written == page(),
            "docs/kvasirctl.md is of another day: cargo run -p kvasir-admin-cli -- docs > docs/kvasirctl.md"
        );
    }

    #[test]
    fn examples_and_other_commands_are_read_as_they_would_be() {
        let words = |line: &str| {
            let command = line.trim().split("  ").next().unwrap_or_default().split(" | ").next().unwrap_or_default();
            command.split(' ').skip_while(|word| word.contains('=')).map(str::to_owned).collect::<Vec<_>>()
        };
        let examples: Vec<_> = crate::cli::EXAMPLES.lines().filter(|line| line.contains(" kvasirctl ")).collect();
        assert!(examples.len() > 10, "{examples:?}");
        for line in examples {
            assert_eq!(wrong(&Shown { words: words(line), fragment: false }), "", "{line}");
        }
        let beginning = |fragment| wrong(&Shown { words: words("kvasirctl workers drain"), fragment });
        assert_eq!(beginning(true), "");
        assert!(beginning(false).contains("required arguments"), "{}", beginning(false));
        let misspelt = Shown { words: words("kvasirctl status --chek"), fragment: true };
        assert!(wrong(&misspelt).contains("unexpected argument '--chek'"), "{}", wrong(&misspelt));
    }

    #[test]
    fn every_command_is_completed_and_has_a_man_page() {
        let dir = tempfile::tempdir().unwrap();
        let session = Session::new(<Cli as clap::Parser>::parse_from(["kvasirctl", "models"]).globals, |_| None);
        man(&ManArgs { folder: dir.path().join("man") }, &session).unwrap();
        for name in ["kvasirctl.1", "kvasirctl-status.1", "kvasirctl-kv-evict.1", "kvasirctl-bench.1"] {
            let page = fs::read_to_string(dir.path().join("man").join(name)).unwrap_or_default();
            assert!(page.contains(".SH SYNOPSIS"), "{name}");
        }
        for (shell, mark) in
            [(Wanted::Bash, "complete -F"), (Wanted::Zsh, "#compdef kvasirctl"), (Wanted::Fish, "complete -c")]
        {
            let script = completion(&CompletionArgs { shell }).text;
            assert!(
                script.contains(mark) && script.contains("support-bundle") && script.contains("evict"),
                "{shell:?}"
            );
        }
    }
}
