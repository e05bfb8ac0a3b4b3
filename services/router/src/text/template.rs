//! Chat templates: messages to prompt text, as Hugging Face's `apply_chat_template` does it.
//!
//! A template is a Jinja program that came with the model. It runs sandboxed (it sees only what is passed in), with a
//! budget of steps, so that no request makes it run for long. Its dialect is Jinja2 as `transformers` sets it up:
//! `trim_blocks` and `lstrip_blocks`, loop controls, Python's string and dict methods, `raise_exception`,
//! `strftime_now`, Python's `tojson`, and `{% generation %}` (marks for training, without meaning here). The folder
//! `templates` has templates of the main model families with what Python makes of them.

use std::{collections::HashSet, fmt, sync::Arc};

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig, value::Kwargs};

use super::{Conversation, Error, clock::strftime, json};

/// Steps one rendering may take. The templates in use take some tens of steps a message; a step is 0.14 µs (dev profile),
/// so the worst case is 0.14 s.
const FUEL: u64 = 1_000_000;
/// Most spaces a level of JSON, or a line, may be indented by.
const MAX_INDENT: usize = 64;

/// A compiled template.
pub(crate) struct Template {
    env: Environment<'static>,
    /// `bos_token` and the like.
    special: Vec<(String, String)>,
    /// The variables that it looks at.
    variables: HashSet<String>,
}

/// What a template said with `raise_exception`: how it gets through minijinja's error.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

impl Template {
    /// Compiles a template; `special` are the named special tokens it may use (`bos_token`, `eos_token`, …).
    pub(crate) fn compile(source: &str, special: Vec<(String, String)>) -> Result<Self, Error> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(Error::Compile)?;
        env.set_syntax(syntax);
        env.set_undefined_behavior(UndefinedBehavior::Lenient);
        env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.set_fuel(Some(FUEL));
        env.add_function("raise_exception", raise_exception);
        env.add_filter("tojson", tojson);
        env.add_filter("indent", indent);
        env.add_test("iterable", iterable);
        env.add_template_owned("chat", without_generation_marks(source)).map_err(Error::Compile)?;
        let variables = env.get_template("chat").map_err(Error::Compile)?.undeclared_variables(false);
        Ok(Self { env, special, variables })
    }

    /// Whether it looks at this variable.
    pub(crate) fn reads(&self, variable: &str) -> bool {
        self.variables.contains(variable)
    }

    /// The prompt of a conversation. `now`: seconds since 1970, for templates that tell the model the date.
    pub(crate) fn render(&self, conversation: &Conversation, now: u64) -> Result<String, Error> {
        let strftime_now = Value::from_function(move |format: Arc<str>| strftime(&format, now));
        let mut context = vec![("strftime_now", strftime_now)];
        context.extend(self.special.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
        context.extend(conversation.context());
        let template = self.env.get_template("chat").map_err(Error::Compile)?;
        template.render(Value::from_pairs(context)).map_err(classify)
    }
}

fn classify(error: minijinja::Error) -> Error {
    if error.kind() == ErrorKind::OutOfFuel {
        return Error::TooManySteps;
    }
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(at) = cause {
        if let Some(raised) = at.downcast_ref::<Raised>() {
            return Error::Refused(raised.0.clone());
        }
        cause = at.source();
    }
    Error::Render(error)
}

fn raise_exception(message: String) -> Result<String, minijinja::Error> {
    Err(minijinja::Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(Raised(message)))
}

/// Python's `None` is not iterable; minijinja's own test says that it is.
fn iterable(value: &Value) -> bool {
    !value.is_none() && (value.is_undefined() || value.as_str().is_some() || value.try_iter().is_ok())
}

/// Jinja2's `indent(s, width=4, first=False, blank=False)`, which keeps a last line's end; minijinja's own drops it.
fn indent(text: &str, width: Option<usize>, first: Option<bool>, options: Kwargs) -> Result<String, minijinja::Error> {
    let width = if width.is_some() { width } else { options.get("width")? }.unwrap_or(4);
    let first = if first.is_some() { first } else { options.get("first")? }.unwrap_or(false);
    let blank = options.get::<Option<bool>>("blank")?.unwrap_or(false);
    options.assert_all_used()?;
    if width > MAX_INDENT {
        return Err(minijinja::Error::new(ErrorKind::InvalidOperation, "indent: the indent is too deep"));
    }
    let mut out = String::with_capacity(text.len() + width);
    for (at, line) in text.split('\n').enumerate() {
        if at > 0 {
            out.push('\n');
        }
        if if at == 0 { first } else { blank || !line.is_empty() } {
            out.extend(std::iter::repeat_n(' ', width));
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`, as `transformers` has it; the last
/// two by name only.
fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<usize>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    let bad = |why| minijinja::Error::new(ErrorKind::InvalidOperation, why);
    let separators = options.get::<Option<Vec<String>>>("separators")?.map(<[String; 2]>::try_from).transpose();
    let style = json::Style {
        indent: if indent.is_some() { indent } else { options.get("indent")? },
        ensure_ascii: if ensure_ascii.is_some() { ensure_ascii } else { options.get("ensure_ascii")? }.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators: separators.map_err(|_| bad("tojson: the separators must be two"))?,
    };
    if style.indent.is_some_and(|indent| indent > MAX_INDENT) {
        return Err(bad("tojson: the indent is too deep"));
    }
    options.assert_all_used()?;
    let plain = serde_json::to_value(value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(error))?;
    Ok(Value::from(json::dumps(&plain, &style)))
}

/// `{% generation %} … {% endgeneration %}` is an extension of `transformers` that records which text the assistant
/// wrote, for training. An `if true` block renders the same.
fn without_generation_marks(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(len) = rest[start..].find("%}") else { break };
        let (open, close) = (start + 2, start + len);
        let tag = &rest[open..close];
        let replaced = match tag.trim_matches(['-', '+']).trim() {
            "generation" => Some(tag.replacen("generation", "if true", 1)),
            "endgeneration" => Some(tag.replacen("endgeneration", "endif", 1)),
            _ => None,
        };
        out.push_str(&rest[..open]);
        out.push_str(replaced.as_deref().unwrap_or(tag));
        out.push_str("%}");
        rest = &rest[close + 2..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::text::Message;

    fn message(role: &str, content: &str) -> Message {
        Message::said(role, content)
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
        Template::compile(source, vec![("bos_token".to_owned(), "<s>".to_owned())])?
            .render(&Conversation::of(messages.to_vec()), 1_721_894_709)
    }

    #[test]
    fn blocks_leave_no_blank_lines() {
        let source = "{{ bos_token }}\n{% for m in messages %}\n    {% if m.role == 'user' %}\n[{{ m['content'] }}]\n    {% endif %}\n{% endfor %}\n";
        let prompt = render(source, &[message("user", "a"), message("assistant", "b"), message("user", "c")]).unwrap();
        assert_eq!(prompt, "<s>\n[a]\n[c]\n");
    }

    #[test]
    fn what_llama_and_mistral_templates_use_works() {
        let source = "{%- set ns = namespace(seen=0) %}{%- for message in messages %}{%- if loop.index0 is divisibleby(2) %}{%- set ns.seen = ns.seen + 1 %}{%- endif %}\
            {%- if message.content is string and message.content.startswith('skip') %}{%- continue %}{%- endif %}\
            {{- message['content'].strip().split('|')[-1] | upper }}{%- endfor %} {{ ns.seen }} {{ strftime_now('%d %b %Y') }} \
            {{- messages[0] | tojson }}{{ messages[1:] | length }}{{ tools is none }}{% generation %}!{% endgeneration %}";
        let prompt = render(source, &[message("user", " a|b "), message("user", "skip me")]).unwrap();
        assert_eq!(prompt, r#"B 1 25 Jul 2024 {"role": "user", "content": " a|b "}1True!"#.replace("2024 {", "2024{"));
    }

    #[test]
    fn what_a_template_raises_reaches_the_client() {
        let source = "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}";
        assert!(
            matches!(render(source, &[message("system", "")]), Err(Error::Refused(why)) if why == "roles must alternate")
        );
        assert_eq!(render(source, &[message("user", "")]).unwrap(), "");
    }

    #[test]
    fn a_template_that_runs_for_long_is_stopped() {
        let source = "{% for a in range(10000) %}{% for b in range(10000) %}{{ b }}{% endfor %}{% endfor %}";
        assert!(matches!(render(source, &[]), Err(Error::TooManySteps)));
    }

    #[test]
    fn a_broken_template_does_not_compile() {
        assert!(matches!(render("{% for %}", &[]), Err(Error::Compile(_))));
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod real_templates;
