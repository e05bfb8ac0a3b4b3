//! Templates as they come with models, against what Python makes of them.

use std::{collections::BTreeMap, path::Path};

use serde_json::{Value, json};

use super::*;
use crate::text::{Function, Message, ToolCall};

/// The moment of the golden file: 2024-07-25 08:05:09 UTC.
const NOW: u64 = 1_721_894_709;

fn conversation(case: &Value) -> Conversation {
    let text = |value: &Value, key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let list = |value: &Value, key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
    let call = |call: &Value| ToolCall {
        id: text(call, "id").unwrap(),
        r#type: "function",
        function: Function {
            name: text(&call["function"], "name").unwrap(),
            arguments: call["function"]["arguments"].clone(),
        },
    };
    let message = |message: &Value| Message {
        role: text(message, "role").unwrap(),
        content: text(message, "content"),
        name: text(message, "name"),
        reasoning_content: text(message, "reasoning_content"),
        tool_calls: list(message, "tool_calls").iter().map(call).collect(),
        tool_call_id: text(message, "tool_call_id"),
    };
    Conversation {
        tools: list(case, "tools"),
        documents: list(case, "documents"),
        variables: case.get("variables").and_then(Value::as_object).cloned().unwrap_or_default(),
        open: case.get("add_generation_prompt") != Some(&json!(false)),
        ..Conversation::of(list(case, "messages").iter().map(message).collect())
    }
}

#[test]
fn real_templates_render_as_python_renders_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("templates");
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).unwrap();
    let cases: Value = serde_json::from_str(&read("cases.json")).unwrap();
    let special = || ["bos_token", "eos_token"].map(str::to_owned).into_iter().zip(["<s>", "</s>"].map(str::to_owned));
    let mut templates: BTreeMap<String, Template> = BTreeMap::new();
    let (mut seen, mut wrong) = (0, Vec::new());
    for line in read("golden.jsonl").lines() {
        let golden: Value = serde_json::from_str(line).unwrap();
        let (name, case) = (golden["template"].as_str().unwrap(), golden["case"].as_str().unwrap());
        let template = templates.entry(name.to_owned()).or_insert_with(|| {
            Template::compile(&read(&format!("{name}.jinja")), special().collect())
                .unwrap_or_else(|e| panic!("{name}: {e:?}"))
        });
        let ours = match template.render(&conversation(&cases[case]), NOW) {
            Ok(text) => json!({"text": text}),
            Err(Error::Refused(why)) => json!({"raises": why}),
            Err(Error::Render(error)) => json!({"fails": true, "why": format!("{error:#}")}),
            Err(other) => panic!("{name}, {case}: {other:?}"),
        };
        // Where Python fails (`none[:1]`, say) a leniency of ours does no harm.
        let same = ["text", "raises"].iter().all(|key| ours.get(key) == golden.get(key));
        if !same && golden.get("fails").is_none() {
            wrong.push(format!("{name}, {case}:\n  ours   {ours}\n  theirs {golden}"));
        }
        seen += 1;
    }
    assert!(wrong.is_empty(), "{} of {seen} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(templates.len() >= 14 && seen == templates.len() * cases.as_object().unwrap().len());
}
