//! JSON as Python's `json.dumps` writes it, which is what Hugging Face's `tojson` filter is.
//!
//! Templates put JSON into prompts; models have seen Python's spacing (`{"a": 1, "b": 2}`), so another spacing is another
//! prompt. Jinja's own filter would also escape `<` and `'` for HTML; this one does not.

use serde_json::Value;

/// What `json.dumps` was asked for.
#[derive(Default)]
pub(crate) struct Style {
    /// Spaces per level; `None` is all on one line.
    pub(crate) indent: Option<usize>,
    /// Write everything outside ASCII as `\uXXXX`.
    pub(crate) ensure_ascii: bool,
    /// Keys in order.
    pub(crate) sort_keys: bool,
    /// Between items, and between key and value; else `", "` (a comma alone where lines are broken) and `": "`.
    pub(crate) separators: Option<[String; 2]>,
}

impl Style {
    fn between_items(&self) -> &str {
        match (&self.separators, self.indent) {
            (Some([items, _]), _) => items,
            (None, Some(_)) => ",",
            (None, None) => ", ",
        }
    }

    fn after_key(&self) -> &str {
        self.separators.as_ref().map_or(": ", |[_, key]| key)
    }
}

/// The value as JSON text.
pub(crate) fn dumps(value: &Value, style: &Style) -> String {
    let mut out = String::new();
    write(value, style, 0, &mut out);
    out
}

fn write(value: &Value, style: &Style, depth: usize, out: &mut String) {
    match value {
        Value::Array(items) if items.is_empty() => out.push_str("[]"),
        Value::Object(fields) if fields.is_empty() => out.push_str("{}"),
        Value::Array(items) => {
            out.push('[');
            for (at, item) in items.iter().enumerate() {
                separate(at, style, depth + 1, out);
                write(item, style, depth + 1, out);
            }
            close(']', style, depth, out);
        }
        Value::Object(fields) => {
            let mut fields: Vec<_> = fields.iter().collect();
            if style.sort_keys {
                fields.sort_unstable_by_key(|(key, _)| key.as_str());
            }
            out.push('{');
            for (at, (key, field)) in fields.into_iter().enumerate() {
                separate(at, style, depth + 1, out);
                write_string(key, style, out);
                out.push_str(style.after_key());
                write(field, style, depth + 1, out);
            }
            close('}', style, depth, out);
        }
        Value::String(text) => write_string(text, style, out),
        Value::Number(number) if number.is_f64() => out.push_str(&float(number.as_f64().unwrap_or(0.0))),
        scalar => out.push_str(&scalar.to_string()),
    }
}

/// A float as Python writes it: the fewest digits that tell it from all others, with an exponent below 1e-4 and from
/// 1e16 on.
fn float(number: f64) -> String {
    let scientific = format!("{number:e}");
    let (digits, exponent) = scientific.split_once('e').expect("`e` is how this form is written");
    match exponent.parse::<i32>().expect("the exponent is a small number") {
        exponent @ -4..16 if exponent < 0 => format!("{number}"),
        -4..16 => format!("{number:?}"),
        exponent if exponent < 0 => format!("{digits}e-{:02}", -exponent),
        exponent => format!("{digits}e+{exponent:02}"),
    }
}

fn separate(at: usize, style: &Style, depth: usize, out: &mut String) {
    if at > 0 {
        out.push_str(style.between_items());
    }
    if let Some(spaces) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', spaces * depth));
    }
}

fn close(bracket: char, style: &Style, depth: usize, out: &mut String) {
    if let Some(spaces) = style.indent {
        out.push('\n');
        out.extend(std::iter::repeat_n(' ', spaces * depth));
    }
    out.push(bracket);
}

fn write_string(text: &str, style: &Style, out: &mut String) {
    let quoted = Value::from(text).to_string();
    if !style.ensure_ascii {
        return out.push_str(&quoted);
    }
    for c in quoted.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_spacing_is_pythons() {
        let value = json!({"b": [1, 2.5, null, true], "a": {"x": "<é'>"}, "empty": [{}, []]});
        let plain = dumps(&value, &Style::default());
        assert_eq!(plain, r#"{"b": [1, 2.5, null, true], "a": {"x": "<é'>"}, "empty": [{}, []]}"#);
        let tight = Style { separators: Some([",".to_owned(), ":".to_owned()]), ..Style::default() };
        assert_eq!(dumps(&json!({"a": [1, 2], "b": 3}), &tight), r#"{"a":[1,2],"b":3}"#);
        let sorted = Style { indent: Some(2), ensure_ascii: true, sort_keys: true, separators: None };
        let sorted = dumps(&value, &sorted);
        insta::assert_snapshot!(sorted, @r#"
        {
          "a": {
            "x": "<\u00e9'>"
          },
          "b": [
            1,
            2.5,
            null,
            true
          ],
          "empty": [
            {},
            []
          ]
        }
        "#);
    }

    #[test]
    fn floats_are_pythons() {
        for (number, text) in [
            (1.0, "1.0"),
            (-0.0, "-0.0"),
            (0.1, "0.1"),
            (0.0001, "0.0001"),
            (0.00001, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (123456789012345.6, "123456789012345.6"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e300, "1.25e+300"),
        ] {
            assert_eq!(dumps(&json!(number), &Style::default()), text);
        }
    }
}
