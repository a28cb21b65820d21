//! Reviews: questions about identity and access, answered and never stored.
//!
//! SelfSubjectReview, TokenReview, SubjectAccessReview and its Self and Local forms, SelfSubjectRulesReview.
//! Upstream: pkg/registry/{authentication,authorization}.

use jiff::Timestamp;
use minke_api::{FieldErrors, Kind, Status};
use serde_json::{Map, Value, json};

use crate::authn::Authenticator;
use crate::authz::Authorizer;
use crate::kinds::tree::Tree;
use crate::{Attributes, UserInfo};

/// Answers a review: the body with its status. `namespace` is that of the URL.
pub fn review(
    kind: &'static Kind,
    namespace: &str,
    mut body: Value,
    user: &UserInfo,
    authenticator: &Authenticator,
    authorizer: &Authorizer,
    now: Timestamp,
) -> Result<Value, Status> {
    let spec = body.at("spec").clone();
    let status = match kind.kind {
        "SelfSubjectReview" => json!({"userInfo": user_info(user)}),
        "TokenReview" => token_review(kind, &spec, authenticator, now)?,
        "SelfSubjectAccessReview" => access_review(kind, &spec, user, authorizer)?,
        "SubjectAccessReview" => access_review(kind, &spec, &user_in(&spec), authorizer)?,
        "LocalSubjectAccessReview" => {
            check_local(kind, &spec, namespace)?;
            access_review(kind, &spec, &user_in(&spec), authorizer)?
        }
        "SelfSubjectRulesReview" => rules_review(&spec, user, authorizer)?,
        other => return Err(Status::internal(format!("{other} is not a review"))),
    };
    body.set("apiVersion", kind.api_version());
    body.set("kind", kind.kind);
    let metadata = body.object("metadata");
    if kind.kind == "SelfSubjectReview" {
        metadata.set("creationTimestamp", minke_api::time::format_seconds(now));
    }
    body.set("status", status);
    Ok(body)
}

/// A user as reviews and audit show it.
pub fn user_info(user: &UserInfo) -> Value {
    let mut info = json!({"username": user.name});
    if !user.uid.is_empty() {
        info.set("uid", user.uid.as_str());
    }
    if !user.groups.is_empty() {
        info.set("groups", user.groups.clone());
    }
    if !user.extra.is_empty() {
        let extra: Map<String, Value> =
            user.extra.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
        info.set("extra", extra);
    }
    info
}

fn user_in(spec: &Value) -> UserInfo {
    let texts = |list: &Value| -> Vec<String> {
        list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
    };
    UserInfo {
        name: spec.text("user").to_owned(),
        uid: spec.text("uid").to_owned(),
        groups: texts(spec.at("groups")),
        extra: spec.members("extra").map(|(key, values)| (key.to_owned(), texts(values))).collect(),
    }
}

fn token_review(
    kind: &'static Kind,
    spec: &Value,
    authenticator: &Authenticator,
    now: Timestamp,
) -> Result<Value, Status> {
    let token = spec.text("token");
    if token.is_empty() {
        return Err(Status::bad_request(format!("token is required for {} in authentication", kind.kind)));
    }
    let audiences: Vec<String> =
        spec.items("audiences").iter().filter_map(Value::as_str).map(str::to_owned).collect();
    Ok(match authenticator.verify_token(token, &audiences, now) {
        Ok((user, audiences)) => {
            json!({"authenticated": true, "user": user_info(&user), "audiences": audiences})
        }
        Err(error) => json!({"user": {}, "error": error.to_string()}),
    })
}

/// The namespace asked about must be the one of the URL.
fn check_local(kind: &'static Kind, spec: &Value, namespace: &str) -> Result<(), Status> {
    let mut errors = FieldErrors::default();
    if spec.has("nonResourceAttributes") {
        errors.forbidden("spec.nonResourceAttributes", "disallowed on this kind of request");
    }
    let asked = spec.at("resourceAttributes").text("namespace");
    if asked != namespace {
        errors.invalid(
            "spec.resourceAttributes.namespace",
            asked,
            &format!("must match metadata.namespace: {namespace}"),
        );
    }
    errors.into_result(kind, "")
}

fn access_review(
    kind: &'static Kind,
    spec: &Value,
    user: &UserInfo,
    authorizer: &Authorizer,
) -> Result<Value, Status> {
    let mut errors = FieldErrors::default();
    let (resource, path) = (spec.at("resourceAttributes"), spec.at("nonResourceAttributes"));
    if resource.is_object() && path.is_object() {
        errors.invalid(
            "spec.nonResourceAttributes",
            path,
            "cannot be specified in combination with resourceAttributes",
        );
    }
    if !resource.is_object() && !path.is_object() {
        errors.invalid(
            "spec.resourceAttributes",
            resource,
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        );
    }
    if kind.kind != "SelfSubjectAccessReview" && user.name.is_empty() && user.groups.is_empty() {
        errors.invalid("spec.user", "", "at least one of user or group must be specified");
    }
    errors.into_result(kind, "")?;
    let attributes = if resource.is_object() {
        Attributes::Resource {
            verb: resource.text("verb"),
            group: resource.text("group"),
            version: resource.text("version"),
            resource: resource.text("resource"),
            subresource: resource.text("subresource"),
            namespace: resource.text("namespace"),
            name: resource.text("name"),
        }
    } else {
        Attributes::Path { verb: path.text("verb"), path: path.text("path") }
    };
    let decision = authorizer.authorize(user, &attributes);
    let mut status = json!({"allowed": decision.allowed});
    if !decision.reason.is_empty() {
        status.set("reason", &*decision.reason);
    }
    Ok(status)
}

fn rules_review(spec: &Value, user: &UserInfo, authorizer: &Authorizer) -> Result<Value, Status> {
    let namespace = spec.text("namespace");
    if namespace.is_empty() {
        return Err(Status::bad_request("no namespace on request"));
    }
    let mut resource_rules = Vec::new();
    let mut path_rules = Vec::new();
    for rule in authorizer.rules_of(user, namespace) {
        if !rule.resources.is_empty() {
            let mut shown =
                json!({"verbs": rule.verbs, "apiGroups": rule.groups, "resources": rule.resources});
            if !rule.names.is_empty() {
                shown.set("resourceNames", rule.names.clone());
            }
            resource_rules.push(shown);
        }
        if !rule.paths.is_empty() {
            path_rules.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.paths}));
        }
    }
    Ok(json!({"resourceRules": resource_rules, "nonResourceRules": path_rules, "incomplete": false}))
}
