//! Chat templates: messages to prompt text, as Hugging Face's `apply_chat_template` does it.
//!
//! A template is a Jinja program that came with the model. It runs sandboxed (it sees only what is passed in), with a
//! budget of steps, so that no request makes it run for long. Its dialect is Jinja2 as `transformers` sets it up:
//! `trim_blocks` and `lstrip_blocks`, loop controls, Python's string and dict methods, `raise_exception`,
//! `strftime_now`, Python's `tojson`, and `{% generation %}` (marks for training, without meaning here).

use std::{fmt, sync::Arc};

use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, syntax::SyntaxConfig, value::Kwargs};

use super::{Error, clock::strftime, json};

/// Steps one rendering may take. The templates in use take some tens of steps a message; a step is 0.14 µs (dev profile),
/// so the worst case is 0.14 s.
const FUEL: u64 = 1_000_000;

/// One message of a conversation, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    /// Who speaks, e.g. `user`.
    pub(crate) role: String,
    /// What is said: text parts are joined.
    pub(crate) content: String,
    /// The participant's name; templates rarely look at it.
    pub(crate) name: Option<String>,
}

impl Message {
    fn value(&self) -> Value {
        let mut fields = vec![("role", self.role.as_str()), ("content", self.content.as_str())];
        fields.extend(self.name.as_deref().map(|name| ("name", name)));
        Value::from_pairs(fields)
    }
}

/// A compiled template.
pub(crate) struct Template {
    env: Environment<'static>,
    /// `bos_token` and the like.
    special: Vec<(String, String)>,
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
        env.add_template_owned("chat", without_generation_marks(source)).map_err(Error::Compile)?;
        Ok(Self { env, special })
    }

    /// The prompt for these messages, up to where the assistant speaks next. `now`: seconds since 1970, for templates
    /// that tell the model the date.
    pub(crate) fn render(&self, messages: &[Message], now: u64) -> Result<String, Error> {
        let strftime_now = Value::from_function(move |format: Arc<str>| strftime(&format, now));
        let mut context = vec![
            ("messages", messages.iter().map(Message::value).collect()),
            ("add_generation_prompt", Value::from(true)),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
            ("strftime_now", strftime_now),
        ];
        context.extend(self.special.iter().map(|(name, token)| (name.as_str(), Value::from(token.as_str()))));
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

fn tojson(value: &Value, options: Kwargs) -> Result<Value, minijinja::Error> {
    let style = json::Style {
        indent: options.get("indent")?,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let plain = serde_json::to_value(value)
        .map_err(|error| minijinja::Error::new(ErrorKind::BadSerialization, "tojson").with_source(error))?;
    Ok(Value::from_safe_string(json::dumps(&plain, &style)))
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

    fn message(role: &str, content: &str) -> Message {
        Message { role: role.to_owned(), content: content.to_owned(), name: None }
    }

    fn render(source: &str, messages: &[Message]) -> Result<String, Error> {
        Template::compile(source, vec![("bos_token".to_owned(), "<s>".to_owned())])?.render(messages, 1_721_894_709)
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
