//! Prints a JSON tree as YAML, the way people write it.

use serde_json::Value;

pub fn print(value: &Value) -> String {
    let mut out = String::new();
    match value {
        Value::Object(_) | Value::Array(_) if !is_empty(value) => block(&mut out, value, 0),
        _ => out = scalar(value) + "\n",
    }
    out
}

fn is_empty(value: &Value) -> bool {
    value.as_object().is_some_and(|map| map.is_empty())
        || value.as_array().is_some_and(|list| list.is_empty())
}

fn block(out: &mut String, value: &Value, indent: usize) {
    let pad = " ".repeat(indent);
    match value {
        Value::Object(map) => {
            for (name, value) in map {
                out.push_str(&format!("{pad}{}:", text(name)));
                after_key(out, value, indent);
            }
        }
        Value::Array(list) => {
            for item in list {
                if matches!(item, Value::Object(_) | Value::Array(_)) && !is_empty(item) {
                    let mut inner = String::new();
                    block(&mut inner, item, indent + 2);
                    out.push_str(&format!("{pad}- {}", &inner[indent + 2..]));
                } else {
                    out.push_str(&format!("{pad}- {}\n", scalar(item)));
                }
            }
        }
        _ => {}
    }
}

fn after_key(out: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(_) if !is_empty(value) => {
            out.push('\n');
            block(out, value, indent + 2);
        }
        // Lists stand under their key without a further step, as kubectl prints them.
        Value::Array(_) if !is_empty(value) => {
            out.push('\n');
            block(out, value, indent);
        }
        _ => out.push_str(&format!(" {}\n", scalar(value))),
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(string) => text(string),
        other => other.to_string(),
    }
}

/// Plain when no reader could take it for anything but this text; else quoted as JSON, which is YAML too.
fn text(string: &str) -> String {
    let plain = string.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/')
        && string.chars().all(|c| c.is_ascii_alphanumeric() || "-_./@+=".contains(c) || c == ':')
        && !string.ends_with(':')
        && !string.contains(": ")
        && !is_word(string);
    if plain { string.to_owned() } else { Value::from(string).to_string() }
}

fn is_word(string: &str) -> bool {
    const WORDS: &[&str] = &["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    WORDS.contains(&string.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_printed_reads_back_the_same() {
        let value = json!({
            "a": "https://192.0.2.2:6443", "b": ["x", {"c": 1, "d": {"e": []}}, [1, "2"]], "yes": "no", "n": null,
            "empty": {}, "": "", "odd": "a: b # c", "num": "012", "data": "QUJD+/==", "f": false, "tail": "x:",
        });
        let text = print(&value);
        assert_eq!(minke_api::codec::yaml::decode(text.as_bytes()).unwrap().value, value, "{text}");
        assert!(text.contains("a: https://192.0.2.2:6443\n"), "{text}");
    }
}
