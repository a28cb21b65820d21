//! Who asks, and what for: the input of authorization, admission and audit.

use std::collections::BTreeMap;

use minke_api::Kind;

/// An authenticated identity.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UserInfo {
    pub name: String,
    pub uid: String,
    pub groups: Vec<String>,
    pub extra: BTreeMap<String, Vec<String>>,
}

impl UserInfo {
    pub fn new(name: &str, groups: &[&str]) -> UserInfo {
        let mut groups: Vec<String> = groups.iter().map(|g| (*g).to_owned()).collect();
        groups.push("system:authenticated".to_owned());
        UserInfo { name: name.to_owned(), groups, ..UserInfo::default() }
    }

    pub fn anonymous() -> UserInfo {
        UserInfo {
            name: "system:anonymous".to_owned(),
            groups: vec!["system:unauthenticated".to_owned()],
            ..UserInfo::default()
        }
    }

    /// The identity of a service account, as its tokens carry it.
    pub fn service_account(namespace: &str, name: &str) -> UserInfo {
        UserInfo::new(
            &format!("system:serviceaccount:{namespace}:{name}"),
            &["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")],
        )
    }
}

/// What a request wants, as authorization sees it.
#[derive(Debug, Clone)]
pub enum Attributes<'a> {
    Resource {
        verb: &'a str,
        group: &'a str,
        version: &'a str,
        resource: &'a str,
        subresource: &'a str,
        namespace: &'a str,
        name: &'a str,
    },
    /// A path outside the resources, such as `/metrics`.
    Path { verb: &'a str, path: &'a str },
}

impl<'a> Attributes<'a> {
    pub fn of(
        verb: &'a str,
        kind: &'static Kind,
        subresource: &'a str,
        namespace: &'a str,
        name: &'a str,
    ) -> Self {
        Attributes::Resource {
            verb,
            group: kind.group,
            version: kind.version,
            resource: kind.plural,
            subresource,
            namespace,
            name,
        }
    }
}
