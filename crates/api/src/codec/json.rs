//! JSON bodies, with the duplicate keys that strict validation reports.

use std::borrow::Cow;
use std::fmt;

use serde::Deserializer;
use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use super::{DecodeError, Decoded, MAX_DEPTH, TOO_DEEP, scan};
use crate::schema::MAX_PROBLEMS;

/// Decodes one JSON value. Invalid UTF-8 is replaced, as upstream does.
pub fn decode(bytes: &[u8]) -> Result<Decoded, DecodeError> {
    let text = String::from_utf8_lossy(bytes);
    let mut duplicates = Vec::new();
    let mut reader = serde_json::Deserializer::from_str(&text);
    let node = Node { depth: 0, duplicates: &mut duplicates };
    match node.deserialize(&mut reader).and_then(|value| reader.end().map(|()| value)) {
        Ok(value) => Ok(Decoded { value, duplicates }),
        Err(error) => Err(DecodeError(scan::explain(text.as_bytes()).unwrap_or_else(|| error.to_string()))),
    }
}

struct Node<'a> {
    depth: usize,
    duplicates: &'a mut Vec<String>,
}

impl Node<'_> {
    fn child<E: Error>(&mut self) -> Result<Node<'_>, E> {
        if self.depth >= MAX_DEPTH {
            return Err(E::custom(TOO_DEEP));
        }
        Ok(Node { depth: self.depth + 1, duplicates: self.duplicates })
    }

    /// Puts `prefix` before the paths found since there were `known`: paths are only built when needed.
    fn prefix(&mut self, known: usize, prefix: &str) {
        for path in &mut self.duplicates[known..] {
            let dot = if path.starts_with('[') { "" } else { "." };
            *path = format!("{prefix}{dot}{path}");
        }
    }
}

impl<'de> DeserializeSeed<'de> for Node<'_> {
    type Value = Value;
    fn deserialize<D: Deserializer<'de>>(self, reader: D) -> Result<Value, D::Error> {
        reader.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Node<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, v: bool) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_i64<E>(self, v: i64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_u64<E>(self, v: u64) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_f64<E>(self, v: f64) -> Result<Value, E> {
        Ok(Number::from_f64(v).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, v: &str) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_string<E>(self, v: String) -> Result<Value, E> {
        Ok(v.into())
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let known = self.duplicates.len();
            let Some(value) = items.next_element_seed(self.child()?)? else { return Ok(Value::Array(list)) };
            if self.duplicates.len() > known {
                self.prefix(known, &format!("[{}]", list.len()));
            }
            list.push(value);
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<Cow<'_, str>>()? {
            let known = self.duplicates.len();
            let value = entries.next_value_seed(self.child()?)?;
            if self.duplicates.len() > known {
                self.prefix(known, &key);
            }
            if self.duplicates.len() < MAX_PROBLEMS && map.contains_key(key.as_ref()) {
                self.duplicates.push(key.clone().into_owned());
            }
            map.insert(key.into_owned(), value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check_error(text: &str, want: &str) {
        assert_eq!(decode(text.as_bytes()), Err(DecodeError(want.to_owned())), "{text}");
    }

    #[test]
    fn duplicates_are_named_by_path_and_the_last_counts() {
        let got =
            decode(br#"{"a": 1, "a": 2, "spec": {"list": [{}, {"x": 1, "x": [1], "y": {"z": 0, "z": 0}}]}}"#)
                .expect("JSON");
        assert_eq!(got.value, json!({"a": 2, "spec": {"list": [{}, {"x": [1], "y": {"z": 0}}]}}));
        assert_eq!(got.duplicates, ["a", "spec.list[1].x", "spec.list[1].y.z"]);
    }

    #[test]
    fn mistakes_are_told_in_upstreams_words() {
        for (text, want) in [
            ("", "unexpected end of JSON input"),
            ("{", "unexpected end of JSON input"),
            (r#"{"a": 1"#, "unexpected end of JSON input"),
            (r#"{"a" 1}"#, "invalid character '1' after object key"),
            (r#"{"a": 1 "b"}"#, r#"invalid character '"' after object key:value pair"#),
            (r#"{a: 1}"#, "invalid character 'a' looking for beginning of object key string"),
            (r#"{"a": 1,}"#, "invalid character '}' looking for beginning of object key string"),
            ("[1 2]", "invalid character '2' after array element"),
            ("[1,]", "invalid character ']' looking for beginning of value"),
            ("{} {}", "invalid character '{' after top-level value"),
            ("nul", "unexpected end of JSON input"),
            ("nulx", "invalid character 'x' in literal null (expecting 'l')"),
            ("tRue", "invalid character 'R' in literal true (expecting 'r')"),
            ("-x", "invalid character 'x' in numeric literal"),
            ("1.x", "invalid character 'x' after decimal point in numeric literal"),
            ("1e+x", "invalid character 'x' in exponent of numeric literal"),
            ("01", "invalid character '1' after top-level value"),
            ("\"a\nb\"", "invalid character '\\n' in string literal"),
            (r#""\q""#, "invalid character 'q' in string escape code"),
            (r#""\u12x4""#, "invalid character 'x' in \\u hexadecimal character escape"),
            ("'a'", "invalid character '\\'' looking for beginning of value"),
        ] {
            check_error(text, want);
        }
    }

    #[test]
    fn deep_nesting_is_refused_and_does_not_overflow() {
        check_error(&"[".repeat(100_000), TOO_DEEP);
        check_error(&r#"{"a":"#.repeat(100_000), TOO_DEEP);
        let deepest = format!("{}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
        let value = decode(deepest.as_bytes()).expect("JSON").value;
        serde_json::from_str::<Value>(&value.to_string()).expect("what is read can be read back");
        check_error(&format!("[{deepest}]"), TOO_DEEP);
    }

    #[test]
    fn numbers_are_read_as_they_were_written() {
        let long = decode("4".repeat(40).as_bytes()).expect("JSON").value;
        assert_eq!(decode(long.to_string().as_bytes()).expect("JSON").value, long);
    }

    #[test]
    fn bytes_that_are_not_text_are_replaced() {
        assert_eq!(decode(b"\"a\xffb\"").expect("JSON").value, json!("a\u{fffd}b"));
    }
}
