//! Which form of an answer the client wants.
//!
//! Whoever takes JSON gets JSON, whatever else they would like better: our objects are JSON already.

/// What is shown of objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum View {
    Object,
    /// `Table` of meta.k8s.io in this version.
    Table(String),
    /// `PartialObjectMetadata` of meta.k8s.io in this version; of lists, its list.
    Partial(String),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Encoding {
    Json,
    /// JSON text, which is YAML, too.
    Yaml,
    Protobuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Accepted {
    pub view: View,
    pub encoding: Encoding,
}

impl Accepted {
    pub const JSON: Accepted = Accepted { view: View::Object, encoding: Encoding::Json };

    pub fn content_type(&self) -> &'static str {
        match self.encoding {
            Encoding::Json => "application/json",
            Encoding::Yaml => "application/yaml",
            Encoding::Protobuf => "application/vnd.kubernetes.protobuf",
        }
    }
}

/// One entry of an Accept header.
#[derive(Debug, Clone, Default)]
pub struct Clause<'a> {
    pub media_type: &'a str,
    parameters: Vec<(&'a str, &'a str)>,
}

impl<'a> Clause<'a> {
    pub fn parameter(&self, name: &str) -> Option<&'a str> {
        self.parameters.iter().find(|(n, _)| *n == name).map(|(_, value)| *value)
    }

    fn quality(&self) -> f32 {
        self.parameter("q").and_then(|q| q.parse().ok()).unwrap_or(1.0)
    }
}

/// The entries of an Accept header, the most wanted first. No more of them are looked at than a client
/// could mean.
pub fn clauses(accept: &str) -> Vec<Clause<'_>> {
    let mut clauses: Vec<Clause<'_>> = accept
        .split(',')
        .take(64)
        .filter(|clause| !clause.trim().is_empty())
        .map(|clause| {
            let mut parts = clause.split(';').map(str::trim);
            let media_type = parts.next().unwrap_or_default();
            let parameters =
                parts.filter_map(|p| p.split_once('=')).map(|(n, v)| (n.trim(), v.trim().trim_matches('"')));
            Clause { media_type, parameters: parameters.collect() }
        })
        .collect();
    clauses.sort_by(|a, b| b.quality().total_cmp(&a.quality()));
    clauses
}

/// The first form in `accept` that there is; `None` when there is none.
pub fn negotiate(accept: &str) -> Option<Accepted> {
    if accept.trim().is_empty() || accept == "application/json" {
        return Some(Accepted::JSON);
    }
    let mut second_best = None;
    for clause in clauses(accept) {
        let encoding = match clause.media_type {
            "*/*" | "application/*" | "application/json" => Encoding::Json,
            "application/yaml" => Encoding::Yaml,
            "application/vnd.kubernetes.protobuf" => Encoding::Protobuf,
            _ => continue,
        };
        let of_meta = clause.parameter("g") == Some("meta.k8s.io");
        let version = clause.parameter("v").filter(|v| matches!(*v, "v1" | "v1beta1"));
        let view = match (clause.parameter("as"), version) {
            (None, _) => View::Object,
            (Some("Table"), Some(version)) if of_meta => View::Table(version.to_owned()),
            (Some("PartialObjectMetadata" | "PartialObjectMetadataList"), Some(version)) if of_meta => {
                View::Partial(version.to_owned())
            }
            _ => continue,
        };
        let accepted = Accepted { view, encoding };
        if encoding != Encoding::Protobuf {
            // JSON of another view than the protobuf that was wanted first is no substitute.
            return second_best.filter(|best: &Accepted| best.view != accepted.view).or(Some(accepted));
        }
        second_best.get_or_insert(accepted);
    }
    second_best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(accept: &str, view: View, encoding: Encoding) {
        assert_eq!(negotiate(accept), Some(Accepted { view, encoding }), "{accept}");
    }

    #[test]
    fn the_first_form_that_there_is_wins() {
        let table = || View::Table("v1".to_owned());
        check("", View::Object, Encoding::Json);
        check("*/*", View::Object, Encoding::Json);
        check("application/json", View::Object, Encoding::Json);
        check("text/html,application/yaml", View::Object, Encoding::Yaml);
        check("application/json;q=0.5, application/yaml", View::Object, Encoding::Yaml);
        check(
            "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json",
            table(),
            Encoding::Json,
        );
        check(
            "application/json;as=Unknown;v=v1;g=meta.k8s.io,application/json",
            View::Object,
            Encoding::Json,
        );
        check("application/vnd.kubernetes.protobuf,application/json", View::Object, Encoding::Json);
        check("application/vnd.kubernetes.protobuf", View::Object, Encoding::Protobuf);
        let partial = View::Partial("v1".to_owned());
        check(
            "application/vnd.kubernetes.protobuf;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,\
             application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json",
            partial,
            Encoding::Json,
        );
        assert_eq!(negotiate("text/html"), None);
    }
}
