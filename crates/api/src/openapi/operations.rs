//! The operations of the documents, made from the table of kinds.

use serde_json::{Map, Value, json};

use crate::{KINDS, Kind, schema};

/// Which version of OpenAPI to write.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Form {
    V2,
    V3,
}

impl Form {
    fn reference(self, definition: &str) -> Value {
        let prefix = if self == Form::V2 { "#/definitions/" } else { super::V3_REFERENCE };
        json!({ "$ref": format!("{prefix}{definition}") })
    }
}

const DELETE_OPTIONS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions";
const STATUS: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.Status";

const ANSWERS: &[&str] = &["application/json", "application/yaml", "application/vnd.kubernetes.protobuf"];
const PATCHES: &[&str] = &[
    "application/json-patch+json",
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
];

const WRITE: &[&str] = &["pretty", "dryRun", "fieldManager", "fieldValidation"];
const PATCH: &[&str] = &["pretty", "dryRun", "fieldManager", "fieldValidation", "force"];
const DELETE: &[&str] = &["pretty", "dryRun", "gracePeriodSeconds", "orphanDependents", "propagationPolicy"];
const LIST: &[&str] = &[
    "pretty",
    "allowWatchBookmarks",
    "continue",
    "fieldSelector",
    "labelSelector",
    "limit",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
    "watch",
];
const DELETE_COLLECTION: &[&str] = &[
    "pretty",
    "continue",
    "dryRun",
    "fieldSelector",
    "gracePeriodSeconds",
    "labelSelector",
    "limit",
    "orphanDependents",
    "propagationPolicy",
    "resourceVersion",
    "resourceVersionMatch",
    "sendInitialEvents",
    "timeoutSeconds",
];
const LOG: &[&str] = &[
    "container",
    "follow",
    "insecureSkipTLSVerifyBackend",
    "limitBytes",
    "pretty",
    "previous",
    "sinceSeconds",
    "tailLines",
    "timestamps",
];
const ATTACH: &[&str] = &["container", "stderr", "stdin", "stdout", "tty"];
const EXEC: &[&str] = &["command", "container", "stderr", "stdin", "stdout", "tty"];

/// A verb of the table of kinds and the request that it is.
struct Standard {
    verb: &'static str,
    method: &'static str,
    /// What the operation's id begins with.
    prefix: &'static str,
    action: &'static str,
    of_collection: bool,
    query: &'static [&'static str],
}

#[rustfmt::skip]
const STANDARD: &[Standard] = &[
    Standard { verb: "create", method: "post", prefix: "create", action: "post", of_collection: true, query: WRITE },
    Standard { verb: "list", method: "get", prefix: "list", action: "list", of_collection: true, query: LIST },
    Standard { verb: "deletecollection", method: "delete", prefix: "delete", action: "deletecollection", of_collection: true, query: DELETE_COLLECTION },
    Standard { verb: "get", method: "get", prefix: "read", action: "get", of_collection: false, query: &["pretty"] },
    Standard { verb: "update", method: "put", prefix: "replace", action: "put", of_collection: false, query: WRITE },
    Standard { verb: "patch", method: "patch", prefix: "patch", action: "patch", of_collection: false, query: PATCH },
    Standard { verb: "delete", method: "delete", prefix: "delete", action: "delete", of_collection: false, query: DELETE },
];

/// The object of paths of the kinds that `wanted` picks.
pub fn paths(form: Form, wanted: impl Fn(&Kind) -> bool) -> Value {
    let mut paths = Map::new();
    for kind in KINDS.iter().filter(|k| wanted(k)) {
        let writer = Writer { form, kind };
        for (path, method, operation) in writer.operations() {
            let item = paths.entry(path).or_insert_with(|| json!({}));
            item[method] = operation;
        }
    }
    for (path, item) in &mut paths {
        let parameters = path_parameters(form, path);
        if !parameters.is_empty() {
            item["parameters"] = Value::Array(parameters);
        }
    }
    Value::Object(paths)
}

struct Writer {
    form: Form,
    kind: &'static Kind,
}

/// One operation, before it takes the form of a document.
struct Operation<'a> {
    action: &'a str,
    id: String,
    summary: String,
    query: &'a [&'a str],
    body: Option<&'a str>,
    returns: Option<&'a str>,
    patch: bool,
    gvk: (&'a str, &'a str, &'a str),
}

impl Writer {
    fn operations(&self) -> Vec<(String, &'static str, Value)> {
        let kind = self.kind;
        let root = format!("/{}", super::path(kind.group, kind.version));
        let scope = if kind.namespaced { "/namespaces/{namespace}" } else { "" };
        let collection = format!("{root}{scope}/{}", kind.plural);
        let item = format!("{collection}/{{name}}");
        let own = self.definition(kind.group, kind.version, kind.kind);
        let list = self.definition(kind.group, kind.version, &format!("{}List", kind.kind));
        let mut out = Vec::new();
        for verb in STANDARD.iter().filter(|v| kind.has_verb(v.verb)) {
            let path = if verb.of_collection { &collection } else { &item };
            let operation = self.operation(verb, own, list);
            out.push((path.clone(), verb.method, self.render(&operation)));
        }
        if kind.namespaced && kind.has_verb("list") {
            let verb = STANDARD.iter().find(|v| v.verb == "list").expect("lists are standard");
            let id = format!("list{}{}ForAllNamespaces", self.id_prefix(), kind.kind);
            let operation = Operation { id, ..self.operation(verb, own, list) };
            out.push((format!("{root}/{}", kind.plural), "get", self.render(&operation)));
        }
        for sub in kind.subresources {
            self.subresource(sub, &format!("{item}/{}", sub.name), &mut out);
        }
        out
    }

    fn subresource(
        &self,
        sub: &'static crate::Subresource,
        path: &str,
        out: &mut Vec<(String, &'static str, Value)>,
    ) {
        let kind = self.kind;
        let sent = if sub.kind.is_empty() { kind.kind } else { sub.kind };
        let (group, version) = sub.group_version.unwrap_or((kind.group, kind.version));
        let definition = self.definition(group, version, sent);
        for verb in sub.verbs {
            // What is connected to has options in place of an object.
            let connect = match sub.name {
                "attach" => Some(ATTACH),
                "exec" => Some(EXEC),
                "portforward" => Some(&["ports"][..]),
                "proxy" => Some(&["path"][..]),
                _ => None,
            };
            let (method, prefix, action) = match *verb {
                "create" => ("post", "create", "post"),
                "get" => ("get", "read", "get"),
                "update" => ("put", "replace", "put"),
                "patch" => ("patch", "patch", "patch"),
                "delete" => ("delete", "delete", "delete"),
                _ => continue,
            };
            let name = format!(
                "{}{}{}{}",
                self.id_prefix(),
                if kind.namespaced { "Namespaced" } else { "" },
                kind.kind,
                capital(sub.name)
            );
            let operation = match connect {
                Some(query) => Operation {
                    action: "connect",
                    id: format!(
                        "connect{}{}{}",
                        self.id_prefix(),
                        capital(method),
                        &name[self.id_prefix().len()..]
                    ),
                    summary: format!(
                        "connect {} requests to {} of {}",
                        method.to_uppercase(),
                        sub.name,
                        kind.kind
                    ),
                    query,
                    body: None,
                    returns: None,
                    patch: false,
                    gvk: (group, version, sent),
                },
                None => Operation {
                    action,
                    id: format!("{prefix}{name}"),
                    summary: format!("{prefix} {} of the specified {}", sub.name, kind.kind),
                    query: match (sub.name, *verb) {
                        ("log", _) => LOG,
                        (_, "get") => &["pretty"],
                        (_, "patch") => PATCH,
                        _ => WRITE,
                    },
                    body: if matches!(*verb, "create" | "update") { definition } else { None },
                    returns: if sub.name == "log" { None } else { definition },
                    patch: *verb == "patch",
                    gvk: (group, version, sent),
                },
            };
            out.push((path.to_owned(), method, self.render(&operation)));
        }
    }

    fn operation<'a>(
        &'a self,
        verb: &'a Standard,
        own: Option<&'a str>,
        list: Option<&'a str>,
    ) -> Operation<'a> {
        let kind = self.kind;
        let namespaced = if kind.namespaced { "Namespaced" } else { "" };
        let many = if verb.verb == "deletecollection" { "Collection" } else { "" };
        let deletes = verb.method == "delete";
        Operation {
            action: verb.action,
            id: format!("{}{}{many}{namespaced}{}", verb.prefix, self.id_prefix(), kind.kind),
            summary: match verb.verb {
                "list" => format!("list or watch objects of kind {}", kind.kind),
                "deletecollection" => format!("delete collection of {}", kind.kind),
                "create" => format!("create a {}", kind.kind),
                _ => format!("{} the specified {}", verb.prefix, kind.kind),
            },
            query: verb.query,
            body: match verb.verb {
                "create" | "update" => own,
                _ if deletes => Some(DELETE_OPTIONS),
                _ => None,
            },
            returns: match verb.verb {
                "list" => list,
                _ if deletes => Some(STATUS),
                _ => own,
            },
            patch: verb.verb == "patch",
            gvk: (kind.group, kind.version, kind.kind),
        }
    }

    fn render(&self, operation: &Operation) -> Value {
        let (group, version, kind) = operation.gvk;
        let mut parameters: Vec<Value> =
            operation.query.iter().map(|name| query_parameter(self.form, name)).collect();
        let mut out = json!({
            "description": operation.summary,
            "tags": [self.tag()],
            "operationId": operation.id,
            "responses": self.responses(operation),
            "x-kubernetes-action": operation.action,
            "x-kubernetes-group-version-kind": { "group": group, "kind": kind, "version": version },
        });
        let body = match (operation.patch, operation.body) {
            (true, _) => Some((json!({ "type": "object" }), PATCHES)),
            (false, Some(definition)) => Some((self.form.reference(definition), &["*/*"][..])),
            (false, None) => None,
        };
        match (self.form, body) {
            (Form::V2, Some((schema, types))) => {
                // A body of options may be left out.
                let required = operation.body != Some(DELETE_OPTIONS);
                let mut parameter = json!({ "name": "body", "in": "body", "schema": schema });
                if required {
                    parameter["required"] = true.into();
                }
                parameters.insert(0, parameter);
                out["consumes"] = json!(types);
            }
            (Form::V3, Some((schema, types))) => {
                let content: Map<String, Value> =
                    types.iter().map(|t| ((*t).to_owned(), json!({ "schema": schema }))).collect();
                out["requestBody"] = json!({ "content": content });
            }
            (_, None) => {}
        }
        if self.form == Form::V2 {
            out["produces"] = json!(ANSWERS);
        }
        out["parameters"] = Value::Array(parameters);
        out
    }

    fn responses(&self, operation: &Operation) -> Value {
        let schema =
            operation.returns.map_or_else(|| json!({ "type": "string" }), |name| self.form.reference(name));
        let ok = match self.form {
            Form::V2 => json!({ "description": "OK", "schema": schema }),
            Form::V3 => {
                let content: Map<String, Value> =
                    ANSWERS.iter().map(|t| ((*t).to_owned(), json!({ "schema": schema }))).collect();
                json!({ "description": "OK", "content": content })
            }
        };
        let mut responses = json!({ "200": ok, "401": { "description": "Unauthorized" } });
        match operation.action {
            "post" => {
                responses["201"] = described(&responses["200"], "Created");
                responses["202"] = described(&responses["200"], "Accepted");
            }
            "put" | "patch" => responses["201"] = described(&responses["200"], "Created"),
            "delete" => responses["202"] = described(&responses["200"], "Accepted"),
            _ => {}
        }
        responses
    }

    fn definition(&self, group: &str, version: &str, kind: &str) -> Option<&'static str> {
        schema::of(group, version, kind).map(schema::Type::name)
    }

    /// `CoreV1`, `RbacAuthorizationV1`.
    fn id_prefix(&self) -> String {
        let group = self.kind.group.strip_suffix(".k8s.io").unwrap_or(self.kind.group);
        let group: String =
            if group.is_empty() { "Core".into() } else { group.split('.').map(capital).collect() };
        format!("{group}{}", capital(self.kind.version))
    }

    /// `core_v1`, `rbacAuthorization_v1`.
    fn tag(&self) -> String {
        let prefix = self.id_prefix();
        let group = &prefix[..prefix.len() - self.kind.version.len()];
        format!("{}{}_{}", group[..1].to_lowercase(), &group[1..], self.kind.version)
    }
}

fn described(response: &Value, description: &str) -> Value {
    let mut response = response.clone();
    response["description"] = description.into();
    response
}

fn capital(word: &str) -> String {
    let mut chars = word.chars();
    chars.next().map(|first| first.to_uppercase().chain(chars).collect()).unwrap_or_default()
}

fn path_parameters(form: Form, path: &str) -> Vec<Value> {
    let mut out = Vec::new();
    for (name, description) in [("name", "name of the object"), ("namespace", "namespace of the object")] {
        if path.contains(&format!("{{{name}}}")) {
            let mut parameter = parameter(form, name, "path", "string", description);
            parameter["required"] = true.into();
            out.push(parameter);
        }
    }
    out
}

fn query_parameter(form: Form, name: &str) -> Value {
    let (ty, description) = match name {
        "allowWatchBookmarks" => ("boolean", "Ask for bookmark events in a watch; servers may send none."),
        "command" => ("string", "The command to run; not run in a shell. May be given several times."),
        "container" => ("string", "The container; may be left out where the pod has only one."),
        "continue" => ("string", "Where to go on with a list, as told by the page before."),
        "dryRun" => ("string", "With the value All, do everything but store the outcome."),
        "fieldManager" => (
            "string",
            "The name under which the fields that change are owned; at most 128 printable characters.",
        ),
        "fieldSelector" => ("string", "Restricts the answer to objects whose fields have these values."),
        "fieldValidation" => {
            ("string", "What to do about unknown and duplicate fields: Ignore, Warn (the default) or Strict.")
        }
        "follow" => ("boolean", "Go on with what is logged from now on."),
        "force" => ("boolean", "In an apply request, take over fields that others own."),
        "gracePeriodSeconds" => {
            ("integer", "Seconds until the object goes; zero is at once, unset is the kind's default.")
        }
        "insecureSkipTLSVerifyBackend" => ("boolean", "Do not check the certificate of the backend."),
        "labelSelector" => ("string", "Restricts the answer to objects whose labels fit."),
        "limit" => ("integer", "The most objects in one page of a list."),
        "limitBytes" => ("integer", "The most bytes to answer with."),
        "orphanDependents" => {
            ("boolean", "Deprecated, use propagationPolicy. Whether dependents are left alone.")
        }
        "path" => ("string", "The path of the URL to ask for."),
        "ports" => ("integer", "The ports to forward."),
        "pretty" => ("string", "With the value true, the answer is indented."),
        "previous" => ("boolean", "The log of the container's instance before this one."),
        "propagationPolicy" => ("string", "What happens to dependents: Orphan, Background or Foreground."),
        "resourceVersion" => ("string", "How recent the data must be, or where a watch starts."),
        "resourceVersionMatch" => ("string", "How resourceVersion is meant: NotOlderThan or Exact."),
        "sendInitialEvents" => {
            ("boolean", "Begin a watch with the objects that exist and a bookmark after them.")
        }
        "sinceSeconds" => ("integer", "Only what was logged in so many last seconds."),
        "stderr" => ("boolean", "Whether standard error is sent back."),
        "stdin" => ("boolean", "Whether standard input is passed on."),
        "stdout" => ("boolean", "Whether standard output is sent back."),
        "tailLines" => ("integer", "Only so many last lines."),
        "timeoutSeconds" => ("integer", "How long the request may take."),
        "timestamps" => ("boolean", "Whether each line begins with the time it was logged."),
        "tty" => ("boolean", "Whether to use a terminal."),
        "watch" => ("boolean", "Stream what changes in place of a list."),
        other => unreachable!("the query parameter {other} has no description"),
    };
    parameter(form, name, "query", ty, description)
}

fn parameter(form: Form, name: &str, place: &str, ty: &str, description: &str) -> Value {
    match form {
        Form::V2 => {
            json!({ "name": name, "in": place, "type": ty, "uniqueItems": true, "description": description })
        }
        Form::V3 => {
            json!({ "name": name, "in": place, "schema": { "type": ty, "uniqueItems": true }, "description": description })
        }
    }
}
