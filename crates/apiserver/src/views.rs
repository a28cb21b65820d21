//! Views of objects that clients ask for instead of the objects: tables, and metadata alone.

use std::sync::Arc;

use jiff::Timestamp;
use minke_api::{Kind, Object, Revision, table};
use serde_json::{Value, json};

/// What goes with each row of a table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Include {
    None,
    #[default]
    Metadata,
    Object,
}

/// Where a list stands.
#[derive(Debug, Clone, Default)]
pub struct ListMeta {
    pub revision: Revision,
    pub continue_: Option<String>,
    pub remaining: Option<usize>,
}

impl ListMeta {
    /// The `metadata` of a list.
    pub fn json(&self) -> Value {
        let mut metadata = json!({});
        // What is worked out when it is read has no revision.
        if self.revision != Revision(0) {
            metadata["resourceVersion"] = self.revision.to_string().into();
        }
        if let Some(token) = &self.continue_ {
            metadata["continue"] = token.as_str().into();
        }
        if let Some(remaining) = self.remaining {
            metadata["remainingItemCount"] = remaining.into();
        }
        metadata
    }
}

/// `{"kind":K,"apiVersion":V,"metadata":M,"items":[`: what a list of `kind` begins with.
pub fn list_head(kind: &Kind, meta: &ListMeta) -> Vec<u8> {
    format!(
        r#"{{"kind":"{}List","apiVersion":"{}","metadata":{},"items":["#,
        kind.kind,
        kind.api_version(),
        meta.json()
    )
    .into_bytes()
}

/// Bytes of kind and apiVersion at the start of each object of `kind`, brace and commas included.
pub fn type_prefix(kind: &Kind) -> usize {
    r#"{"kind":"","apiVersion":"","#.len() + kind.kind.len() + kind.api_version().len()
}

/// The bytes of an object's metadata.
fn metadata(object: &Object) -> &[u8] {
    let from = type_prefix(object.kind()) + r#""metadata":"#.len();
    let bytes = &object.json()[from..];
    let (mut depth, mut in_text, mut escaped) = (0usize, false, false);
    for (at, byte) in bytes.iter().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_text => escaped = true,
            b'"' => in_text = !in_text,
            b'{' if !in_text => depth += 1,
            b'}' if !in_text => {
                depth -= 1;
                if depth == 0 {
                    return &bytes[..=at];
                }
            }
            _ => {}
        }
    }
    bytes
}

/// `PartialObjectMetadata` of an object, in `version` of meta.k8s.io.
pub fn partial(object: &Object, version: &str) -> Vec<u8> {
    let metadata = metadata(object);
    let mut out = Vec::with_capacity(metadata.len() + 80);
    out.extend_from_slice(br#"{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/"#);
    out.extend_from_slice(version.as_bytes());
    out.extend_from_slice(br#"","metadata":"#);
    out.extend_from_slice(metadata);
    out.push(b'}');
    out
}

/// `PartialObjectMetadataList` of some objects.
pub fn partial_list(objects: &[Arc<Object>], version: &str, meta: &ListMeta) -> Vec<u8> {
    let mut out = format!(
        r#"{{"kind":"PartialObjectMetadataList","apiVersion":"meta.k8s.io/{version}","metadata":{},"items":["#,
        meta.json()
    )
    .into_bytes();
    for (n, object) in objects.iter().enumerate() {
        if n > 0 {
            out.push(b',');
        }
        out.extend(partial(object, version));
    }
    out.extend_from_slice(b"]}");
    out
}

/// How tables of `kind` are made.
#[derive(Debug, Clone)]
pub struct Tables {
    pub kind: &'static Kind,
    pub version: String,
    pub include: Include,
}

impl Tables {
    /// A table of some objects. Watches leave the columns out after the first one.
    pub fn table(&self, objects: &[Arc<Object>], meta: &ListMeta, columns: bool, now: Timestamp) -> Vec<u8> {
        let view = table::view(self.kind);
        let definitions = if columns { view.definitions() } else { Value::Null };
        let mut out = format!(
            r#"{{"kind":"Table","apiVersion":"meta.k8s.io/{}","metadata":{},"columnDefinitions":{definitions},"rows":["#,
            self.version,
            meta.json()
        )
        .into_bytes();
        for (n, object) in objects.iter().enumerate() {
            if n > 0 {
                out.push(b',');
            }
            let row = view.row(&object.value(), now);
            out.extend_from_slice(b"{\"cells\":");
            write(&mut out, &row.cells);
            if !row.conditions.is_empty() {
                out.extend_from_slice(b",\"conditions\":");
                write(&mut out, &row.conditions);
            }
            out.extend_from_slice(b",\"object\":");
            match self.include {
                Include::None => out.extend_from_slice(b"null"),
                Include::Metadata => out.extend(partial(object, &self.version)),
                Include::Object => out.extend_from_slice(object.json()),
            }
            out.push(b'}');
        }
        out.extend_from_slice(b"]}");
        out
    }
}

fn write(out: &mut Vec<u8>, values: &[Value]) {
    serde_json::to_writer(out, values).expect("values serialise");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_is_cut_out_of_an_object() {
        let kind = Kind::by_plural("apps", "v1", "deployments").unwrap();
        let value = json!({
            "metadata": {"name": "w", "annotations": {"a": "}{\"\\"}, "labels": {"x": "y"}},
            "spec": {"replicas": 1},
        });
        let object = Arc::new(Object::from_value(kind, &value).unwrap());
        let partial: Value = serde_json::from_slice(&partial(&object, "v1")).unwrap();
        assert_eq!(partial["kind"], "PartialObjectMetadata");
        assert_eq!(partial["apiVersion"], "meta.k8s.io/v1");
        assert_eq!(partial["metadata"]["annotations"]["a"], "}{\"\\");
        assert!(partial.get("spec").is_none());
        let list: Value = serde_json::from_slice(&partial_list(
            &[object.clone(), object.clone()],
            "v1",
            &ListMeta::default(),
        ))
        .unwrap();
        assert_eq!(list["items"].as_array().unwrap().len(), 2);
        assert!(object.json()[type_prefix(kind)..].starts_with(b"\"metadata\":"));
    }

    #[test]
    fn tables_have_a_row_for_each_object() {
        let kind = Kind::by_plural("", "v1", "configmaps").unwrap();
        let value = json!({"metadata": {"name": "c", "creationTimestamp": "2026-01-01T00:00:00Z"}, "data": {"a": "b"}});
        let object = Arc::new(Object::from_value(kind, &value).unwrap());
        let tables = Tables { kind, version: "v1".to_owned(), include: Include::Metadata };
        let now = "2026-01-01T00:00:05Z".parse().unwrap();
        let table: Value =
            serde_json::from_slice(&tables.table(&[object], &ListMeta::default(), true, now)).unwrap();
        assert_eq!(table["rows"][0]["cells"], json!(["c", 1, "5s"]));
        assert_eq!(table["rows"][0]["object"]["metadata"]["name"], "c");
        assert_eq!(table["columnDefinitions"][0]["name"], "Name");
    }
}
