//! Which notations a model uses: said by the configuration, or seen in its chat template.

use crate::config::{ReasoningParser, ToolParser};

/// Markup by which answers are taken apart. Where a tokenizer has one of these as a special token, which is not shown
/// otherwise, it is shown to a parser.
pub(crate) const MARKERS: [&str; 8] =
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"];

/// How a model writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Dialect {
    /// Its tool calls; `None` if it has no notation that is known here.
    pub(crate) calls: Option<CallNotation>,
    /// Whether it thinks between `<think>` and `</think>`.
    pub(crate) thinks: bool,
}

/// A model's own way to write tool calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallNotation {
    /// Hermes' and Qwen's.
    Hermes,
    /// Llama 3's.
    Llama3,
    /// Mistral's.
    Mistral,
}

impl Dialect {
    /// What the configuration says, and where that says `auto`, the template.
    pub(crate) fn of(template: Option<&str>, tools: ToolParser, reasoning: ReasoningParser) -> Self {
        let template = template.unwrap_or_default();
        Self {
            calls: match tools {
                ToolParser::Auto => seen(template),
                ToolParser::None => None,
                ToolParser::Hermes => Some(CallNotation::Hermes),
                ToolParser::Llama3Json => Some(CallNotation::Llama3),
                ToolParser::Mistral => Some(CallNotation::Mistral),
            },
            thinks: match reasoning {
                ReasoningParser::Auto => template.contains("</think>"),
                ReasoningParser::None => false,
                ReasoningParser::Think => true,
            },
        }
    }
}

fn seen(template: &str) -> Option<CallNotation> {
    let has = |text: &str| template.contains(text);
    if has("[TOOL_CALLS]") {
        Some(CallNotation::Mistral)
    } else if has("<tool_call>") && !has("<function=") && !has("<arg_key>") {
        // Qwen3-Coder and GLM write XML between the same tags.
        Some(CallNotation::Hermes)
    } else if has("<|start_header_id|>") && (has("\"parameters\": ") || has("<|python_tag|>")) {
        Some(CallNotation::Llama3)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn real_templates_tell_how_their_models_write() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("templates");
        for (name, calls, thinks) in [
            ("Qwen-Qwen2.5-7B-Instruct", Some(CallNotation::Hermes), false),
            ("Qwen-Qwen3-0.6B", Some(CallNotation::Hermes), true),
            ("Qwen-QwQ-32B", Some(CallNotation::Hermes), true),
            ("Qwen3-Coder", None, false),
            ("GLM-4.6", None, true),
            ("mistralai-Mistral-Nemo-Instruct-2407", Some(CallNotation::Mistral), false),
            ("Mistral-Small-3.2-24B-Instruct-2506", Some(CallNotation::Mistral), false),
            ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", None, true),
            ("microsoft-Phi-3.5-mini-instruct", None, false),
        ] {
            let template = std::fs::read_to_string(folder.join(format!("{name}.jinja"))).unwrap();
            let dialect = Dialect::of(Some(&template), ToolParser::Auto, ReasoningParser::Auto);
            assert_eq!(dialect, Dialect { calls, thinks }, "{name}");
        }
        let llama = r#"<|start_header_id|>{{ 'Respond in the format {"name": function name, "parameters": {}}' }}"#;
        let auto = |template| Dialect::of(template, ToolParser::Auto, ReasoningParser::Auto);
        assert_eq!(auto(Some(llama)).calls, Some(CallNotation::Llama3));
        assert_eq!(auto(None), Dialect::default());
        let said = Dialect::of(Some(llama), ToolParser::None, ReasoningParser::Think);
        assert_eq!(said, Dialect { calls: None, thinks: true });
    }
}
