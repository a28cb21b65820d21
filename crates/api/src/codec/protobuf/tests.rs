use proptest::prelude::*;
use serde_json::json;

use super::wire::{put_bytes, put_message, put_number};
use super::*;
use crate::codec::MAX_DEPTH;
use crate::schema::{Field, Shape};

fn ty(group: &str, version: &str, kind: &str) -> &'static Type {
    schema::of(group, version, kind).expect("a schema")
}

#[track_caller]
fn check_round_trip(object: Value) {
    let ty = schema::of_api_version(object["apiVersion"].as_str().unwrap(), object["kind"].as_str().unwrap())
        .unwrap();
    assert_eq!(decode(&encode(ty, &object), None), Ok(object));
}

fn wrap(api_version: &str, kind: &str, body: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    let mut out = MAGIC.to_vec();
    put_message(&mut out, 1, |out| {
        put_bytes(out, 1, api_version.as_bytes());
        put_bytes(out, 2, kind.as_bytes());
    });
    put_message(&mut out, 2, body);
    out
}

#[test]
fn objects_come_back_as_they_went() {
    check_round_trip(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": "a", "labels": {"x": "", "y": "z"}, "creationTimestamp": "2026-01-02T03:04:05Z", "deletionGracePeriodSeconds": 0,
            "managedFields": [{"manager": "m", "fieldsV1": {"f:spec": {}}}]},
        "spec": {
            "containers": [{"name": "c", "command": ["a", ""], "ports": [{"containerPort": 80}],
                "resources": {"limits": {"cpu": "500m"}},
                "livenessProbe": {"httpGet": {"port": "web", "path": "/"}, "periodSeconds": 3},
                "env": [{"name": "E", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": false}}}]}],
            "ephemeralContainers": [{"name": "e", "image": "i", "targetContainerName": "c", "resources": {}}],
            "volumes": [{"name": "v", "emptyDir": {}}, {"name": "w", "hostPath": {"path": "/", "type": ""}}],
            "automountServiceAccountToken": false, "terminationGracePeriodSeconds": 0,
        },
        "status": {},
    }));
    check_round_trip(
        json!({"apiVersion": "v1", "kind": "Secret", "metadata": {}, "data": {"a": "aGk=", "b": ""}, "type": "Opaque"}),
    );
    check_round_trip(json!({"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {},
        "spec": {"capacity": {"storage": "1Gi"}, "nfs": {"server": "s", "path": "/"}, "accessModes": ["ReadWriteOnce"]}, "status": {}}));
    check_round_trip(
        json!({"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {}, "data": {"a": [1, null]}, "revision": 0}),
    );
    check_round_trip(json!({"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {},
        "spec": {"renewTime": "2026-01-02T03:04:05.000006Z"}}));
    check_round_trip(
        json!({"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "metadata": {},
        "spec": {"user": "u", "extra": {"k": ["a", "b"]}}, "status": {"allowed": false}}),
    );
    check_round_trip(
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "Ingress", "metadata": {}, "status": {"loadBalancer": {}},
        "spec": {"rules": [{"http": {"paths": [{"path": "/", "pathType": "Prefix", "backend": {"service": {"name": "s", "port": {"number": 80}}}}]}}]}}),
    );
    check_round_trip(
        json!({"apiVersion": "admissionregistration.k8s.io/v1", "kind": "ValidatingWebhookConfiguration", "metadata": {},
        "webhooks": [{"name": "w", "clientConfig": {"caBundle": "aGk="}, "admissionReviewVersions": ["v1"], "sideEffects": "None",
            "rules": [{"operations": ["*"], "apiGroups": [""], "apiVersions": ["v1"], "resources": ["pods"]}]}]}),
    );
    check_round_trip(
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {},
        "status": {"acceptedNames": {"kind": "", "plural": ""}},
        "spec": {"group": "g", "names": {"kind": "K", "plural": "ks"}, "scope": "Namespaced", "versions": [{"name": "v1", "served": true, "storage": true,
            "schema": {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": true, "additionalProperties": {"type": "string", "default": "x"},
                "properties": {"a": {"$ref": "r", "items": {"type": "integer", "maximum": 1.5}, "additionalProperties": false}}}}}]}}),
    );
}

#[test]
fn zeros_that_the_reference_client_writes_count_only_where_there_is_a_pointer() {
    let bytes = wrap("apps/v1", "Deployment", |out| {
        put_message(out, 2, |spec| {
            put_number(spec, 1, 0); // replicas, a pointer
            put_number(spec, 5, 0); // minReadySeconds
            put_number(spec, 7, 0); // paused
        });
        put_message(out, 3, |_| {});
    });
    let want = json!({"apiVersion": "apps/v1", "kind": "Deployment", "spec": {"replicas": 0}, "status": {}});
    assert_eq!(decode(&bytes, None), Ok(want));
}

/// Bodies that kubectl 1.33 sent, and what it prints for the same commands with `-o json`.
#[test]
fn what_a_client_sends_is_read_as_its_json() {
    #[track_caller]
    fn check(base64: &str, want: Value) {
        use base64::Engine;
        let bytes = base64::engine::general_purpose::STANDARD.decode(base64).unwrap();
        assert_eq!(decode(&bytes, None), Ok(want));
    }
    // create deployment x --image=y --replicas=0 --port=80
    check(
        "azhzAAoVCgdhcHBzL3YxEgpEZXBsb3ltZW50EqcBChsKAXgSABoAIgAqADIAOABCAFoICgNhcHASAXgSeggAEgoKCAoDYXBw\
         EgF4GmIKGgoAEgAaACIAKgAyADgAQgBaCAoDYXBwEgF4EkQSJgoBeRIBeSoAMgoKABAAGFAiACoAQgBqAHIAgAEAiAEAkAEA\
         ogEAGgAyAEIASgBSAFgAYABoAIIBAIoBAJoBAMIBACICCgAoADgAGgwIABAAGAAgACgAOAAaACIA",
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"labels": {"app": "x"}, "name": "x"}, "status": {},
               "spec": {"replicas": 0, "selector": {"matchLabels": {"app": "x"}}, "strategy": {},
                        "template": {"metadata": {"labels": {"app": "x"}},
                                     "spec": {"containers": [{"image": "y", "name": "y", "ports": [{"containerPort": 80}], "resources": {}}]}}}}),
    );
    // create service nodeport s --tcp=80:http --node-port=30080
    check(
        "azhzAAoNCgJ2MRIHU2VydmljZRJnChsKAXMSABoAIgAqADIAOABCAFoICgNhcHASAXMSRAogCgc4MC1odHRwEgNUQ1AYUCIK\
         CAEQABoEaHR0cCiA6wESCAoDYXBwEgFzGgAiCE5vZGVQb3J0OgBCAFIAWgBgAGgAGgIKABoAIgA=",
        json!({"apiVersion": "v1", "kind": "Service", "metadata": {"labels": {"app": "s"}, "name": "s"}, "status": {"loadBalancer": {}},
               "spec": {"ports": [{"name": "80-http", "nodePort": 30080, "port": 80, "protocol": "TCP", "targetPort": "http"}],
                        "selector": {"app": "s"}, "type": "NodePort"}}),
    );
}

#[test]
fn options_say_their_kind_or_have_it_assumed() {
    let options = ty("", "v1", "DeleteOptions");
    let grace = |out: &mut Vec<u8>| put_number(out, 1, 0);
    assert_eq!(
        decode(&wrap("policy/v1", "DeleteOptions", grace), None).map(|v| v["gracePeriodSeconds"].clone()),
        Ok(json!(0))
    );
    assert_eq!(decode(&wrap("", "", grace), Some(options)), Ok(json!({"gracePeriodSeconds": 0})));
    assert!(decode(&wrap("", "", grace), None).is_err());
    assert!(decode(&wrap("v1", "Nonsense", grace), None).is_err());
}

#[test]
fn the_zero_time_is_no_time() {
    let bytes = wrap("v1", "ConfigMap", |out| put_message(out, 1, |meta| put_message(meta, 8, |_| {})));
    assert_eq!(decode(&bytes, None), Ok(json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {}})));
}

#[test]
fn hostile_bytes_are_refused() {
    #[track_caller]
    fn check(bytes: &[u8], want: &str) {
        assert_eq!(decode(bytes, None), Err(DecodeError(want.into())));
    }
    check(b"{}", "provided data does not appear to be a protobuf message, expected prefix [107 56 115 0]");
    check(b"k8s\0\x12\xff", "unexpected EOF");
    check(b"k8s\0\x12\xff\xff\xff\xff\x0f", "unexpected EOF");
    check(b"k8s\0\x03", "proto: illegal tag 0 (wire type 3)");
    check(b"k8s\0\x0b", "proto: illegal wireType 3");
    check(&wrap("v1", "Pod", |out| put_number(out, 1, 1)), "proto: wrong wireType = 0 for field metadata");
    let labels = |out: &mut Vec<u8>| put_message(out, 1, |meta| put_number(meta, 11, 1));
    check(&wrap("v1", "Pod", labels), "proto: wrong wireType = 0 for field labels");
    // A schema within a schema, again and again.
    let nested = (0..MAX_DEPTH * 2).fold(Vec::new(), |inner, _| {
        let mut out = Vec::new();
        put_bytes(&mut out, 28, &inner);
        out
    });
    let crd = wrap("apiextensions.k8s.io/v1", "CustomResourceDefinition", |out| {
        put_message(out, 2, |spec| put_message(spec, 7, |v| put_message(v, 4, |s| put_bytes(s, 1, &nested))));
    });
    check(&crd, crate::codec::TOO_DEEP);
    // A body within a body.
    let bodies = (0..MAX_DEPTH).fold(Vec::new(), |inner, _| {
        wrap("apps/v1", "ControllerRevision", |out| put_message(out, 2, |raw| put_bytes(raw, 1, &inner)))
    });
    check(&bodies, crate::codec::TOO_DEEP);
}

/// A value that says something in every field down to a depth: whatever lacks a number gets lost.
fn sample(shape: Shape, depth: usize) -> Option<Value> {
    Some(match shape {
        Shape::String => "x".into(),
        Shape::Bool => true.into(),
        Shape::Int32 | Shape::Int64 => 7.into(),
        Shape::Float => 1.5.into(),
        Shape::Bytes => "aGk=".into(),
        Shape::Time => "2026-01-02T03:04:05Z".into(),
        Shape::MicroTime => "2026-01-02T03:04:05.000006Z".into(),
        Shape::IntOrString => "50%".into(),
        Shape::Quantity => "3Gi".into(),
        Shape::Raw => json!({"any": ["thing"]}),
        Shape::SchemaOrBool => false.into(),
        Shape::SchemaOrArray => json!([{"type": "string"}]),
        Shape::SchemaOrStrings => json!(["a"]),
        Shape::Object(_) if depth == 0 => return None,
        Shape::Object(ty) => {
            let numbered = numbered(ty.get().proto());
            let entries = ty.get().fields().iter().filter(|f| numbered.contains(&f.name()));
            Value::Object(
                entries.filter_map(|f| Some((f.name().to_owned(), sample(f.shape(), depth - 1)?))).collect(),
            )
        }
        Shape::Array(items) => Value::Array(vec![sample(items.get(), depth)?]),
        Shape::Map(items) => json!({ "key": sample(items.get(), depth)? }),
    })
}

fn numbered(rows: &'static [crate::schema::ProtoField]) -> Vec<&'static str> {
    let mut names = Vec::new();
    for row in rows {
        match row.content() {
            crate::schema::ProtoContent::Field(field) => names.push(field.name()),
            crate::schema::ProtoContent::Inline(inner) => names.extend(numbered(inner)),
        }
    }
    names
}

#[test]
fn every_field_of_every_kind_survives() {
    for (group, version, kind, ty) in schema::kinds() {
        let fields = ty.fields().iter().filter(|f| numbered(ty.proto()).contains(&f.name()));
        let mut object: Value = Value::Object(
            fields.filter_map(|f: &Field| Some((f.name().to_owned(), sample(f.shape(), 5)?))).collect(),
        );
        object["apiVersion"] =
            if group.is_empty() { version.into() } else { format!("{group}/{version}").into() };
        object["kind"] = kind.into();
        assert_eq!(decode(&encode(ty, &object), None).as_ref(), Ok(&object), "{group}/{version} {kind}");
    }
}

/// The kinds that clients write most have a number for all but the newest fields.
#[test]
fn numbers_are_known() {
    let newer = ["evictionResponders", "bindMountOptions", "volumeHealth", "scheduling"];
    for (group, kind) in [
        ("", "Pod"),
        ("", "Service"),
        ("", "Node"),
        ("apps", "Deployment"),
        ("batch", "Job"),
        ("", "ConfigMap"),
        ("", "Event"),
    ] {
        let root = ty(group, "v1", kind);
        for part in std::iter::once(root).chain(root.fields().iter().filter_map(|f| f.shape().element_type()))
        {
            let numbered = numbered(part.proto());
            for field in part.fields() {
                let outside = ["apiVersion", "kind"].contains(&field.name()) || newer.contains(&field.name());
                let known = outside || numbered.contains(&field.name()) || part.short_name() == "NodeSpec";
                assert!(known, "{}.{}", part.name(), field.name());
            }
        }
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = decode(&[MAGIC.as_slice(), &bytes].concat(), None);
        let _ = decode(&wrap("v1", "Pod", |out| out.extend(&bytes)), None);
    }

    #[test]
    fn damaged_bodies_do_not_panic(at in 0usize..400, to in any::<u8>()) {
        let object = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a", "labels": {"x": "y"}},
            "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": "1"}}}]}});
        let mut bytes = encode(ty("", "v1", "Pod"), &object);
        let at = at % bytes.len();
        bytes[at] = to;
        let _ = decode(&bytes, None);
    }
}
