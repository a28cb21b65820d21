//! Reads the tables in `data/`.

use std::collections::BTreeMap;
use std::fs::read_to_string;
use std::path::Path;

#[derive(Default)]
pub struct Merge {
    pub strategy: String,
    pub key: String,
    /// `atomic`, `set`, `map`, `map=atomic` and so on; for a whole type `map-type=atomic`.
    pub list_type: String,
    pub list_keys: String,
}

pub struct ProtoField {
    pub name: String,
    pub number: u16,
    /// As the table spells it, with a package unless scalar.
    pub ty: String,
}

pub struct GoField {
    pub ty: String,
    pub pointer: bool,
    pub omitempty: bool,
}

pub struct Facts {
    merge: BTreeMap<(String, String), Merge>,
    proto: BTreeMap<String, Vec<ProtoField>>,
    go: BTreeMap<String, BTreeMap<String, GoField>>,
}

impl Facts {
    pub fn load(dir: &Path) -> Facts {
        Facts {
            merge: merge(&rows(dir, "merge.tsv")),
            proto: proto(&rows(dir, "proto-fields.tsv")),
            go: go(&rows(dir, "go-fields.tsv")),
        }
    }

    pub fn merge(&self, definition: &str, field: &str) -> Option<&Merge> {
        // A field without a row of its own merges by default; only types newer than the tables look further.
        let known = self.proto.contains_key(definition);
        versions(definition)
            .take(if known { 1 } else { usize::MAX })
            .find_map(|d| self.merge.get(&(d, field.to_owned())))
    }

    pub fn proto(&self, definition: &str) -> Option<&[ProtoField]> {
        versions(definition).find_map(|d| self.proto.get(&d)).map(Vec::as_slice)
    }

    /// The message of exactly this name.
    pub fn proto_exact(&self, message: &str) -> Option<&[ProtoField]> {
        self.proto.get(message).map(Vec::as_slice)
    }

    pub fn go(&self, definition: &str, field: &str) -> Option<&GoField> {
        versions(definition).find_map(|d| self.go.get(&d)).and_then(|fields| fields.get(field))
    }
}

/// The definition itself, then its siblings in other versions of the group: a type keeps its shape and its
/// protobuf numbers when it graduates, and the tables may be a release behind.
fn versions(definition: &str) -> impl Iterator<Item = String> + '_ {
    let (package, name) = definition.rsplit_once('.').expect("definitions are qualified");
    let (group, _) = package.rsplit_once('.').expect("definitions are versioned");
    let others = ["v1", "v1beta2", "v1beta1", "v1alpha3", "v1alpha2", "v1alpha1"];
    std::iter::once(definition.to_owned())
        .chain(others.into_iter().map(move |v| format!("{group}.{v}.{name}")))
}

fn rows(dir: &Path, file: &str) -> Vec<Vec<String>> {
    let text = read_to_string(dir.join(file)).unwrap_or_else(|e| panic!("data/{file}: {e}"));
    text.lines().filter(|l| !l.starts_with('#')).map(|l| l.split('\t').map(str::to_owned).collect()).collect()
}

fn merge(rows: &[Vec<String>]) -> BTreeMap<(String, String), Merge> {
    rows.iter()
        .map(|r| {
            let merge = Merge {
                strategy: r[2].clone(),
                key: r[3].clone(),
                list_type: r[4].clone(),
                list_keys: r[5].clone(),
            };
            ((r[0].clone(), r[1].clone()), merge)
        })
        .collect()
}

fn proto(rows: &[Vec<String>]) -> BTreeMap<String, Vec<ProtoField>> {
    let field = |definition: &str, text: &str| {
        let (name, rest) = text.split_once('=').expect("field=number:type");
        let (number, ty) = rest.split_once(':').expect("field=number:type");
        let bare = ty.trim_start_matches("[]").trim_start_matches("{}");
        let scalar = ["string", "bool", "int32", "int64", "bytes", "double"].contains(&bare);
        let package = definition.rsplit_once('.').expect("definitions are qualified").0;
        let full = if scalar || bare.contains('.') { bare.to_owned() } else { format!("{package}.{bare}") };
        let ty = ty.replace(bare, &full);
        ProtoField { name: name.to_owned(), number: number.parse().expect("a field number"), ty }
    };
    rows.iter().map(|r| (r[0].clone(), r[1].split(' ').map(|f| field(&r[0], f)).collect())).collect()
}

fn go(rows: &[Vec<String>]) -> BTreeMap<String, BTreeMap<String, GoField>> {
    let field = |text: &str| {
        let (name, ty) = text.split_once(':').expect("field:type");
        let omitempty = ty.ends_with('?');
        let ty = ty.trim_end_matches('?');
        let pointer = ty.starts_with('*');
        (name.to_owned(), GoField { ty: ty.trim_start_matches('*').to_owned(), pointer, omitempty })
    };
    rows.iter().map(|r| (r[0].clone(), r[1].split(' ').map(field).collect())).collect()
}
