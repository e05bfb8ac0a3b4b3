//! What a page is made of: blocks of commands, of settings and of text, spans of code, links, headings.
//!
//! | in a page | is |
//! | --- | --- |
//! | a block indented by four, or fenced as `sh` | commands, or settings if it begins with `key:` |
//! | a block fenced as `yaml` | settings |
//! | a block fenced as `python` | a program |
//! | a block fenced as `text` | a picture, or what a program says: nobody runs it |

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use kvasir_tests::workspace;

/// A block of a page.
pub(crate) struct Block {
    /// Where its first line is.
    pub(crate) line: usize,
    lines: usize,
    pub(crate) what: What,
}

pub(crate) enum What {
    /// Each as the shell gets it: on one line, without comments.
    Commands(Vec<Shown>),
    Settings(String),
    Python(String),
    Text(String),
}

/// A command, and what the page says that it prints (lines behind one that begins with `$ `).
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) command: String,
    pub(crate) output: Option<Vec<String>>,
}

pub(crate) struct Page {
    /// Its name in the repository.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    pub(crate) text: String,
    pub(crate) blocks: Vec<Block>,
}

impl Page {
    pub(crate) fn read(name: &str) -> Result<Self> {
        let path = workspace::root().join(name);
        let text = std::fs::read_to_string(&path).with_context(|| name.to_owned())?;
        let blocks = blocks(&text).with_context(|| name.to_owned())?;
        Ok(Self { name: name.to_owned(), path, text, blocks })
    }

    /// Its blocks, but for those that the program makes of its own arguments: a test compares these with them.
    pub(crate) fn written(&self) -> impl Iterator<Item = &Block> {
        let made = match self.name.as_str() {
            "docs/kvasirctl.md" => self.text.lines().position(|line| line.starts_with("## For all commands")),
            _ => None,
        };
        self.blocks.iter().filter(move |block| made.is_none_or(|made| block.line <= made))
    }

    /// The page's lines that are no block, each with its number.
    pub(crate) fn prose(&self) -> impl Iterator<Item = (usize, &str)> {
        let inside = |at| self.blocks.iter().any(|block| (block.line..block.line + block.lines).contains(&at));
        self.text.lines().enumerate().map(|(at, line)| (at + 1, line)).filter(move |(at, _)| !inside(*at))
    }

    /// Spans of code in its prose, and where they are.
    pub(crate) fn spans(&self) -> Vec<(usize, String)> {
        // A span may go on on the next line, so a paragraph is one text.
        let mut spans = Vec::new();
        let mut rest = String::new();
        let mut begun = 1;
        for (at, line) in self.prose().chain([(usize::MAX, "")]) {
            if line.trim().is_empty() {
                spans.extend(rest.split('`').skip(1).step_by(2).map(|span| (begun, span.replace('\n', " "))));
                rest.clear();
                begun = at.saturating_add(1);
            } else if !line.starts_with("```") {
                rest.push_str(line.trim());
                rest.push('\n');
            }
        }
        spans
    }

    /// What its links lead to, and where they are.
    pub(crate) fn links(&self) -> Vec<(usize, String)> {
        let all = self.prose().flat_map(|(at, line)| {
            let links = line.split("](").skip(1).filter_map(|rest| rest.split(')').next());
            links.map(move |link| (at, link.to_owned()))
        });
        all.filter(|(_, link)| !link.contains("://")).collect()
    }

    /// The names that its headings can be linked by.
    pub(crate) fn anchors(&self) -> Vec<String> {
        let mut found: Vec<String> = Vec::new();
        for (_, line) in self.prose() {
            let Some(title) = line.strip_prefix('#').map(|rest| rest.trim_start_matches('#')) else { continue };
            let Some(title) = title.strip_prefix(' ') else { continue };
            let slug = slug(title.trim());
            let before = found.iter().filter(|other| **other == slug).count();
            found.push(if before == 0 { slug } else { format!("{slug}-{before}") });
        }
        found
    }
}

/// README.md and everything in docs.
pub(crate) fn all() -> Result<Vec<Page>> {
    let mut names = vec!["README.md".to_owned()];
    for entry in std::fs::read_dir(workspace::root().join("docs"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "md") {
            names.push(format!("docs/{}", Path::new(&path).file_name().unwrap_or_default().to_string_lossy()));
        }
    }
    names.sort();
    names.iter().map(|name| Page::read(name)).collect()
}

/// A heading as those who show pages make it a link: `1. The split` is `1-the-split`.
fn slug(title: &str) -> String {
    // Of a link in a heading, its text.
    let mut text = String::new();
    let mut rest = title;
    while let Some((before, after)) = rest.split_once("](") {
        text.push_str(before);
        rest = after.split_once(')').map_or("", |(_, rest)| rest);
    }
    text.push_str(rest);
    let kept = text.to_lowercase().chars().filter(|c| c.is_alphanumeric() || "_- ".contains(*c)).collect::<String>();
    kept.replace(' ', "-")
}

fn blocks(text: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut lines = text.lines().enumerate().peekable();
    while let Some((at, line)) = lines.next() {
        let indent = line.len() - line.trim_start().len();
        if let Some(kind) = line.trim_start().strip_prefix("```") {
            let mut inside = Vec::new();
            loop {
                match lines.next() {
                    Some((_, line)) if line.trim_start().starts_with("```") => break,
                    Some((_, line)) => inside.push(line.get(indent..).unwrap_or("")),
                    None => bail!("line {}: the fence has no end", at + 1),
                }
            }
            let text = inside.join("\n");
            let what = match kind.trim() {
                "text" => What::Text(text),
                "python" => What::Python(text),
                "yaml" => What::Settings(text),
                "sh" => commands_or_settings(&inside).with_context(|| format!("line {}", at + 2))?,
                other => bail!("line {}: a fence of kind {other:?}; there are sh, yaml, python and text", at + 1),
            };
            blocks.push(Block { line: at + 2, lines: inside.len(), what });
        } else if indent >= 4 {
            let mut inside = vec![&line[indent..]];
            while let Some((_, line)) = lines.next_if(|(_, line)| line.starts_with("    ")) {
                inside.push(line.get(indent..).unwrap_or_else(|| line.trim_start()));
            }
            let what = commands_or_settings(&inside).with_context(|| format!("line {}", at + 1))?;
            blocks.push(Block { line: at + 1, lines: inside.len(), what });
        }
    }
    Ok(blocks)
}

fn commands_or_settings(lines: &[&str]) -> Result<What> {
    let first = lines.iter().find(|line| !line.starts_with('#')).unwrap_or(&"");
    let key = first.split_once(':').map_or("", |(key, _)| key);
    let is_key = !key.is_empty() && key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let after = first.get(key.len() + 1..).unwrap_or("");
    if is_key && (after.is_empty() || after.starts_with(' ')) {
        return Ok(What::Settings(lines.join("\n")));
    }
    let shows_output = first.starts_with("$ ");
    let mut commands: Vec<Shown> = Vec::new();
    let mut going_on = false;
    for line in lines.iter().filter(|line| !line.starts_with('#')) {
        let prompt = line.strip_prefix("$ ");
        if shows_output && prompt.is_none() && !going_on {
            commands
                .last_mut()
                .and_then(|shown| shown.output.as_mut())
                .context("output of nothing")?
                .push((*line).to_owned());
            continue;
        }
        let part = without_remark(prompt.unwrap_or(line)).trim();
        let (part, more) = part.strip_suffix('\\').map_or((part, false), |part| (part.trim_end(), true));
        if going_on {
            let shown = commands.last_mut().context("a command that goes on has begun")?;
            shown.command = format!("{} {part}", shown.command);
        } else if !part.is_empty() {
            commands.push(Shown { command: part.to_owned(), output: shows_output.then(Vec::new) });
        }
        going_on = more;
    }
    Ok(What::Commands(commands))
}

/// A line up to its comment, or up to the words beside it: two spaces or more, outside of quotes.
fn without_remark(line: &str) -> &str {
    let mut quote = None;
    let mut before = 'x';
    for (at, c) in line.char_indices() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (None, '\'' | '"') => quote = Some(c),
            (None, ' ') if before == ' ' && at > 1 => return &line[..at - 1],
            (None, '#') if before == ' ' => return &line[..at],
            _ => {}
        }
        before = c;
    }
    line
}

#[test]
fn pages_are_taken_apart() -> Result<()> {
    let text = "# A `b` [c](d.md): e\n\n    run -x 'a  b' \\\n      --more      what it does\n    $no # a\n\n```text\nnot -this\n```\n\n    key:\n      a: 1\n\n    $ ask\n    told\n\nSee `code\nspan` and [x](y.md#z).\n";
    let blocks = blocks(text)?;
    let [first, second, third, fourth] = blocks.as_slice() else { bail!("{} blocks", blocks.len()) };
    let What::Commands(commands) = &first.what else { bail!("commands") };
    let lines: Vec<_> = commands.iter().map(|shown| shown.command.as_str()).collect();
    assert_eq!(lines, ["run -x 'a  b' --more", "$no"]);
    assert!(matches!(&second.what, What::Text(text) if text == "not -this"));
    assert!(matches!(&third.what, What::Settings(text) if text == "key:\n  a: 1"));
    let What::Commands(commands) = &fourth.what else { bail!("commands") };
    assert_eq!((commands[0].command.as_str(), commands[0].output.as_deref()), ("ask", Some(&["told".to_owned()][..])));
    let page = Page { name: String::new(), path: PathBuf::new(), text: text.to_owned(), blocks };
    assert_eq!(page.anchors(), ["a-b-c-e"]);
    assert_eq!(page.links().into_iter().map(|(_, link)| link).collect::<Vec<_>>(), ["d.md", "y.md#z"]);
    assert!(page.spans().iter().any(|(_, span)| span == "code span"), "{:?}", page.spans());
    Ok(())
}
