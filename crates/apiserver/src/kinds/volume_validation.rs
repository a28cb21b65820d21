//! Checks of the volumes of a pod. Upstream: ValidateVolumes.

use std::collections::HashSet;

use minke_api::{FieldErrors, names};
use serde_json::Value;

use super::certificates::signer as signer_name;
use super::check::{self, at};
use super::container_validation::{field_ref, relative_path, resource_field_ref};
use super::pod_certificate;
use super::tree::Tree;
use super::trust_bundle;

const HOST_PATH_TYPES: [&str; 8] =
    ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];
/// What a volume may show of its pod.
const FIELD_PATHS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
const ACCESS_MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];

/// Checks `spec.volumes`, and returns the names.
pub fn validate_volumes<'a>(spec: &'a Value, path: &str, errors: &mut FieldErrors) -> HashSet<&'a str> {
    let mut seen = HashSet::new();
    for (n, volume) in spec.items("volumes").iter().enumerate() {
        let path = format!("{path}[{n}]");
        match volume.text("name") {
            "" => errors.required(&at(&path, "name"), ""),
            name => {
                check::name(name, &at(&path, "name"), names::dns_label, errors);
                if !seen.insert(name) {
                    errors.duplicate(&at(&path, "name"), name);
                }
            }
        }
        validate_volume(volume, &path, errors);
    }
    seen
}

fn validate_volume(volume: &Value, path: &str, errors: &mut FieldErrors) {
    let sources = volume.as_object().into_iter().flatten();
    let mut sources = sources.filter(|(name, source)| *name != "name" && source.is_object());
    let Some((kind, source)) = sources.next() else {
        errors.required(path, "must specify a volume type");
        return;
    };
    for (extra, _) in sources {
        errors.forbidden(&at(path, extra), "may not specify more than 1 volume type");
    }
    validate_source(kind, source, &at(path, kind), errors);
}

fn validate_source(kind: &str, source: &Value, path: &str, errors: &mut FieldErrors) {
    let needs = |fields: &[&str], errors: &mut FieldErrors| {
        for field in fields {
            check::required(source, path, field, errors);
        }
    };
    match kind {
        "emptyDir" if source.has("sizeLimit") => {
            check::quantity(source.at("sizeLimit"), &at(path, "sizeLimit"), errors);
        }
        "hostPath" => {
            needs(&["path"], errors);
            no_way_up(source.text("path"), &at(path, "path"), errors);
            if !HOST_PATH_TYPES.contains(&source.text("type")) {
                errors.not_supported(&at(path, "type"), source.text("type"), &HOST_PATH_TYPES);
            }
        }
        "secret" => {
            needs(&["secretName"], errors);
            files(source, path, errors);
        }
        "configMap" => {
            needs(&["name"], errors);
            files(source, path, errors);
        }
        "downwardAPI" => {
            mode(source, path, "defaultMode", errors);
            downward_files(source, path, errors);
        }
        "projected" => projected(source, path, errors),
        "persistentVolumeClaim" => needs(&["claimName"], errors),
        "ephemeral" => {
            if !source.at("volumeClaimTemplate").is_object() {
                errors.required(&at(path, "volumeClaimTemplate"), "");
            } else {
                let path = at(path, "volumeClaimTemplate.spec");
                claim_spec(source.at("volumeClaimTemplate").at("spec"), &path, errors);
            }
        }
        "nfs" => {
            needs(&["server", "path"], errors);
            if source.has("path") && !source.text("path").starts_with('/') {
                errors.invalid(&at(path, "path"), source.text("path"), "must be an absolute path");
            }
        }
        "csi" => needs(&["driver"], errors),
        "image" => {
            needs(&["reference"], errors);
            check::one_of_if_set(source, path, "pullPolicy", &["Always", "IfNotPresent", "Never"], errors);
        }
        "gitRepo" => needs(&["repository"], errors),
        "iscsi" => needs(&["targetPortal", "iqn"], errors),
        "glusterfs" => needs(&["endpoints", "path"], errors),
        "rbd" => needs(&["monitors", "image"], errors),
        "cephfs" => needs(&["monitors"], errors),
        "flexVolume" => needs(&["driver"], errors),
        "azureFile" => needs(&["secretName", "shareName"], errors),
        "azureDisk" => needs(&["diskName", "diskURI"], errors),
        "awsElasticBlockStore" | "cinder" | "portworxVolume" => needs(&["volumeID"], errors),
        "gcePersistentDisk" => needs(&["pdName"], errors),
        "photonPersistentDisk" => needs(&["pdID"], errors),
        "vsphereVolume" => needs(&["volumePath"], errors),
        "scaleIO" => needs(&["gateway", "system", "volumeName"], errors),
        "quobyte" => needs(&["registry", "volume"], errors),
        // Kinds that have no field of which something could be wrong, and those of a later version.
        _ => {}
    }
}

fn no_way_up(target: &str, path: &str, errors: &mut FieldErrors) {
    if target.split('/').any(|part| part == "..") {
        errors.invalid(path, target, "must not contain '..'");
    }
}

fn mode(holder: &Value, path: &str, field: &str, errors: &mut FieldErrors) {
    if let Some(bits) = holder.int(field).filter(|bits| !(0..=0o777).contains(bits)) {
        errors.invalid(&at(path, field), bits, "must be a number between 0 and 0777 (octal), both inclusive");
    }
}

/// The mode and items of a Secret or ConfigMap.
fn files(source: &Value, path: &str, errors: &mut FieldErrors) {
    mode(source, path, "defaultMode", errors);
    for (n, item) in source.items("items").iter().enumerate() {
        let path = format!("{path}.items[{n}]");
        check::required(item, &path, "key", errors);
        check::required(item, &path, "path", errors);
        file_path(item.text("path"), &at(&path, "path"), errors);
        mode(item, &path, "mode", errors);
    }
}

/// A relative path that keeps off the names which volumes use themselves.
pub fn file_path(target: &str, path: &str, errors: &mut FieldErrors) {
    relative_path(target, path, errors);
    if target.starts_with("..") && !target.split('/').any(|part| part == "..") {
        errors.invalid(path, target, "must not start with '..'");
    }
}

fn downward_files(source: &Value, path: &str, errors: &mut FieldErrors) {
    for (n, item) in source.items("items").iter().enumerate() {
        let path = format!("{path}.items[{n}]");
        check::required(item, &path, "path", errors);
        file_path(item.text("path"), &at(&path, "path"), errors);
        mode(item, &path, "mode", errors);
        let (field, resource) = (item.at("fieldRef"), item.at("resourceFieldRef"));
        match (field.is_object(), resource.is_object()) {
            (true, true) => {
                errors.invalid(
                    &path,
                    "resource",
                    "fieldRef and resourceFieldRef can not be specified simultaneously",
                );
            }
            (true, false) => field_ref(field, &FIELD_PATHS, &at(&path, "fieldRef"), errors),
            (false, true) => resource_field_ref(resource, true, &at(&path, "resourceFieldRef"), errors),
            (false, false) => errors.required(&path, "one of fieldRef and resourceFieldRef is required"),
        }
    }
}

fn projected(source: &Value, path: &str, errors: &mut FieldErrors) {
    const KINDS: [&str; 6] =
        ["secret", "configMap", "downwardAPI", "serviceAccountToken", "clusterTrustBundle", "podCertificate"];
    mode(source, path, "defaultMode", errors);
    let mut paths = HashSet::new();
    for (n, part) in source.items("sources").iter().enumerate() {
        let path = format!("{path}.sources[{n}]");
        let mut given = KINDS.into_iter().filter(|kind| part.at(kind).is_object());
        let Some(kind) = given.next() else {
            errors.required(&path, "must specify at least one source");
            continue;
        };
        for extra in given {
            errors.forbidden(&at(&path, extra), "may not specify more than 1 volume type");
        }
        let (part, path) = (part.at(kind), at(&path, kind));
        match kind {
            "secret" | "configMap" => {
                check::required(part, &path, "name", errors);
                files(part, &path, errors);
            }
            "downwardAPI" => downward_files(part, &path, errors),
            "serviceAccountToken" => {
                if let Some(seconds) = part.int("expirationSeconds") {
                    let path = at(&path, "expirationSeconds");
                    if seconds < 600 {
                        errors.invalid(&path, seconds, "may not specify a duration less than 10 minutes");
                    } else if seconds > 1 << 32 {
                        errors.invalid(&path, seconds, "may not specify a duration larger than 2^32 seconds");
                    }
                }
                check::required(part, &path, "path", errors);
                file_path(part.text("path"), &at(&path, "path"), errors);
            }
            "clusterTrustBundle" => trust_bundles(part, &path, errors),
            "podCertificate" => pod_certificate(part, &path, errors),
            _ => {}
        }
        let items = part.items("items").iter().map(|item| item.text("path"));
        let alone = ["path", "credentialBundlePath", "keyPath", "certificateChainPath"];
        for target in items.chain(alone.map(|field| part.text(field))).filter(|target| !target.is_empty()) {
            if !paths.insert(target.to_owned()) {
                errors.invalid(&path, target, "conflicting duplicate paths");
            }
        }
    }
}

/// Which bundles of trust anchors are to be in a file: one by name, or some of a signer's.
fn trust_bundles(source: &Value, path: &str, errors: &mut FieldErrors) {
    let (name, signer) = (source.at("name"), source.at("signerName"));
    match (name.as_str(), signer.as_str()) {
        (Some(_), Some(_)) => {
            errors.invalid(path, source, "only one of name and signerName may be used");
        }
        (Some(name), None) => {
            let at = at(path, "name");
            if name.is_empty() {
                errors.required(&at, "must be a valid object name");
            }
            if let Err(why) = trust_bundle::any_name(name) {
                errors.invalid(&at, name, &format!("not a valid clustertrustbundlename: {why}"));
            }
            let selector = source.at("labelSelector");
            if selector.is_object() {
                let at = check::at(path, "labelSelector");
                errors.invalid(&at, selector, "labelSelector must be unset if name is specified");
            }
        }
        (None, Some(name)) => {
            if name.is_empty() {
                errors.required(&at(path, "signerName"), "must be a valid signer name");
            }
            signer_name(name, &at(path, "signerName"), errors);
            if source.at("labelSelector").is_object() {
                check::selector(source.at("labelSelector"), &at(path, "labelSelector"), errors);
            }
        }
        (None, None) => errors.required(path, "either name or signerName must be specified"),
    }
    check::required(source, path, "path", errors);
    file_path(source.text("path"), &at(path, "path"), errors);
}

/// A certificate of the pod's own.
fn pod_certificate(source: &Value, path: &str, errors: &mut FieldErrors) {
    signer_name(source.text("signerName"), &at(path, "signerName"), errors);
    check::one_of(source, path, "keyType", &pod_certificate::KEY_TYPES, errors);
    if let Some(seconds) = source.int("maxExpirationSeconds") {
        let path = at(path, "maxExpirationSeconds");
        pod_certificate::lifetime(seconds, source.text("signerName"), &path, errors);
    }
    let paths = ["credentialBundlePath", "keyPath", "certificateChainPath"];
    if !paths.iter().any(|field| source.has(field)) {
        let why = "specify at least one of credentialBundlePath, keyPath, and certificateChainPath";
        errors.required(path, why);
    }
    for field in paths {
        file_path(source.text(field), &at(path, field), errors);
    }
}

/// A PersistentVolumeClaimSpec.
pub fn claim_spec(spec: &Value, path: &str, errors: &mut FieldErrors) {
    if !spec.has("accessModes") {
        errors.required(&at(path, "accessModes"), "at least 1 access mode is required");
    }
    access_modes(spec, path, errors);
    if spec.at("selector").is_object() {
        check::selector(spec.at("selector"), &at(path, "selector"), errors);
    }
    let path_of_size = at(path, "resources[storage]");
    match spec.at("resources").at("requests").get("storage") {
        None => errors.required(&path_of_size, ""),
        Some(size) => positive(size, &path_of_size, errors),
    }
    check::one_of_if_set(spec, path, "volumeMode", &["Block", "Filesystem"], errors);
    if spec.has("storageClassName") {
        check::name(
            spec.text("storageClassName"),
            &at(path, "storageClassName"),
            names::dns_subdomain,
            errors,
        );
    }
}

/// Storage of a size.
pub fn positive(size: &Value, path: &str, errors: &mut FieldErrors) {
    if check::quantity(size, path, errors).is_some_and(|quantity| quantity.is_zero()) {
        errors.invalid(path, size, "must be greater than zero");
    }
}

pub fn access_modes(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let modes: Vec<&str> = spec.items("accessModes").iter().filter_map(Value::as_str).collect();
    for mode in &modes {
        if !ACCESS_MODES.contains(mode) {
            errors.not_supported(&at(path, "accessModes"), *mode, &ACCESS_MODES);
        }
    }
    if modes.len() > 1 && modes.contains(&"ReadWriteOncePod") {
        errors.forbidden(&at(path, "accessModes"), "may not use ReadWriteOncePod with other access modes");
    }
}

#[cfg(test)]
mod tests {
    use minke_api::Kind;
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(volume: Value, want: &str) {
        let mut errors = FieldErrors::default();
        validate_volumes(&json!({"volumes": [volume]}), "v", &mut errors);
        let kind = Kind::by_plural("", "v1", "pods").unwrap();
        let message = errors.into_result(kind, "p").err().map(|s| s.message).unwrap_or_default();
        let got = message.strip_prefix("Pod \"p\" is invalid: ").unwrap_or(&message);
        assert!(if want.is_empty() { got.is_empty() } else { got.starts_with(want) }, "{got}");
    }

    #[track_caller]
    fn check_bundles(source: Value, want: &str) {
        let want = if want.is_empty() {
            String::new()
        } else {
            format!("v[0].projected.sources[0].clusterTrustBundle{want}")
        };
        check(json!({"name": "a", "projected": {"sources": [{"clusterTrustBundle": source}]}}), &want);
    }

    #[test]
    fn bundles_of_trust_anchors_are_chosen_in_one_way() {
        check_bundles(json!({"name": "mine", "path": "ca"}), "");
        check_bundles(json!({"name": "example.com:ca:v1", "path": "ca"}), "");
        check_bundles(json!({"signerName": "example.com/ca", "labelSelector": {}, "path": "ca"}), "");
        check_bundles(json!({"path": "ca"}), ": Required value: either name or signerName must be specified");
        check_bundles(json!({"name": "a", "signerName": "b.c/d", "path": "ca"}), ": Invalid value:");
        check_bundles(
            json!({"name": "a:b", "path": "ca"}),
            ".name: Invalid value: \"a:b\": not a valid clustertrustbundlename: ClusterTrustBundle without signer name",
        );
        check_bundles(
            json!({"name": "a", "labelSelector": {}, "path": "ca"}),
            ".labelSelector: Invalid value:",
        );
        check_bundles(
            json!({"signerName": "ca", "path": "ca"}),
            ".signerName: Invalid value: \"ca\": must be",
        );
        check_bundles(json!({"name": "a"}), ".path: Required value");
        check_bundles(
            json!({"name": "a", "path": "../a"}),
            ".path: Invalid value: \"../a\": must not contain",
        );
    }

    #[track_caller]
    fn check_certificate(change: (&str, Value), want: &str) {
        let mut source = json!({"signerName": "example.com/ca", "keyType": "ED25519", "keyPath": "k"});
        source.set(change.0, change.1);
        let want = if want.is_empty() {
            String::new()
        } else {
            format!("v[0].projected.sources[0].podCertificate{want}")
        };
        check(json!({"name": "a", "projected": {"sources": [{"podCertificate": source}]}}), &want);
    }

    #[test]
    fn certificates_of_pods_say_whose_and_where() {
        check_certificate(("credentialBundlePath", json!("b")), "");
        check_certificate(("signerName", json!("ca")), ".signerName: Invalid value: \"ca\": must be");
        check_certificate(
            ("keyType", json!("DSA")),
            ".keyType: Unsupported value: \"DSA\": supported values:",
        );
        check_certificate(("keyPath", json!("")), ": Required value: specify at least one of");
        check_certificate(("keyPath", json!("../k")), ".keyPath: Invalid value: \"../k\": must not contain");
        check_certificate(
            ("maxExpirationSeconds", json!(60)),
            ".maxExpirationSeconds: Invalid value: 60: must be in the range [3600, 7862400]",
        );
        check_certificate(("certificateChainPath", json!("k")), ": Invalid value: \"k\": conflicting");
    }

    #[test]
    fn volumes_are_checked() {
        check(json!({"name": "a", "emptyDir": {}}), "");
        check(json!({"name": "a"}), "v[0]: Required value: must specify a volume type");
        check(json!({"name": "A", "emptyDir": {}}), "v[0].name: Invalid value: \"A\"");
        check(
            json!({"name": "a", "emptyDir": {}, "hostPath": {"path": "/"}}),
            "v[0].hostPath: Forbidden: may not specify more than 1 volume type",
        );
        check(
            json!({"name": "a", "hostPath": {"path": "/a/../b"}}),
            "v[0].hostPath.path: Invalid value: \"/a/../b\": must not contain '..'",
        );
        check(json!({"name": "a", "secret": {}}), "v[0].secret.secretName: Required value");
        check(
            json!({"name": "a", "configMap": {"name": "c", "defaultMode": 0o1000}}),
            "v[0].configMap.defaultMode: Invalid value: 512: must be a number between 0 and 0777 (octal), both inclusive",
        );
        check(
            json!({"name": "a", "projected": {"sources": [{"serviceAccountToken": {"path": "t", "expirationSeconds": 5}}]}}),
            "v[0].projected.sources[0].serviceAccountToken.expirationSeconds: Invalid value: 5: may not specify a duration less than 10 minutes",
        );
        check(
            json!({"name": "a", "ephemeral": {"volumeClaimTemplate": {"spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "0"}}}}}}),
            "v[0].ephemeral.volumeClaimTemplate.spec.resources[storage]: Invalid value: \"0\": must be greater than zero",
        );
    }
}
