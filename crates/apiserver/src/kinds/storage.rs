//! Volumes, claims and what describes storage. Upstream: pkg/apis/core, pkg/apis/storage.

use minke_api::{FieldErrors, names};
use serde_json::{Value, json};

use super::check::{self, at};
use super::pod_spec::{claim_spec_defaults, round_quantities};
use super::pod_validation::validate_node_selector;
use super::tree::Tree;
use super::volume_validation::{access_modes, claim_spec, positive};
use crate::strategy::Strategy;

pub static PERSISTENT_VOLUME: Strategy = Strategy {
    set_defaults: |volume| {
        let spec = volume.object("spec");
        spec.fill("persistentVolumeReclaimPolicy", "Retain");
        spec.fill("volumeMode", "Filesystem");
        round_quantities(spec.sub("capacity"));
        if let Some(host) = spec.sub("hostPath")
            && host.at("type").is_null()
        {
            host.set("type", "");
        }
        if let Some(claim) = spec.sub("claimRef") {
            claim.fill("kind", "PersistentVolumeClaim");
        }
        volume.object("status").fill("phase", "Pending");
    },
    prepare_create: |volume| volume.set("status", json!({"phase": "Pending"})),
    validate: validate_volume,
    validate_update: |new, old, errors| {
        let source = |volume: &Value| {
            let mut spec = volume.at("spec").clone();
            for field in OPEN_VOLUME_FIELDS {
                spec.unset(field);
            }
            spec
        };
        if !super::pod::same(&source(new), &source(old)) {
            errors.forbidden(
                "spec.persistentvolumesource",
                "spec.persistentvolumesource is immutable after creation",
            );
        }
        check::immutable(new.at("spec"), old.at("spec"), "spec", "volumeMode", errors);
        if old.at("spec").has("nodeAffinity") {
            check::immutable(new.at("spec"), old.at("spec"), "spec", "nodeAffinity", errors);
        }
    },
    returns_deleted: true,
    ..Strategy::PLAIN
};

/// What of a volume is not its source.
const OPEN_VOLUME_FIELDS: [&str; 9] = [
    "accessModes",
    "capacity",
    "claimRef",
    "mountOptions",
    "nodeAffinity",
    "persistentVolumeReclaimPolicy",
    "storageClassName",
    "volumeAttributesClassName",
    "volumeMode",
];

pub static PERSISTENT_VOLUME_CLAIM: Strategy = Strategy {
    set_defaults: |claim| {
        claim_spec_defaults(claim.object("spec"));
        claim.object("status").fill("phase", "Pending");
        round_quantities(claim.object("status").sub("capacity"));
    },
    prepare_create: |claim| claim.set("status", json!({"phase": "Pending"})),
    validate: |claim, errors| claim_spec(claim.at("spec"), "spec", errors),
    validate_update: validate_claim_update,
    returns_deleted: true,
    ..Strategy::PLAIN
};

pub static STORAGE_CLASS: Strategy = Strategy {
    set_defaults: |class| {
        class.fill("reclaimPolicy", "Delete");
        class.fill("volumeBindingMode", "Immediate");
    },
    validate: |class, errors| {
        provisioner(class.text("provisioner"), "provisioner", errors);
        top_one_of(class, "reclaimPolicy", &["Delete", "Retain"], errors);
        top_one_of(class, "volumeBindingMode", &["Immediate", "WaitForFirstConsumer"], errors);
    },
    validate_update: |new, old, errors| {
        for field in ["parameters", "provisioner"] {
            if !super::pod::same(new.at(field), old.at(field)) {
                errors.forbidden(field, &format!("updates to {field} are forbidden."));
            }
        }
        if new.text("reclaimPolicy") != old.text("reclaimPolicy") {
            errors.forbidden("reclaimPolicy", "updates to reclaimPolicy are forbidden.");
        }
        if new.text("volumeBindingMode") != old.text("volumeBindingMode") {
            errors.invalid("volumeBindingMode", new.text("volumeBindingMode"), check::IMMUTABLE);
        }
    },
    ..Strategy::PLAIN
};

pub static CSI_DRIVER: Strategy = Strategy {
    set_defaults: |driver| {
        let spec = driver.object("spec");
        spec.fill("attachRequired", true);
        spec.fill("podInfoOnMount", false);
        spec.fill("storageCapacity", false);
        spec.fill("fsGroupPolicy", "ReadWriteOnceWithFSType");
        if !spec.has("volumeLifecycleModes") {
            spec.set("volumeLifecycleModes", json!(["Persistent"]));
        }
        spec.fill("requiresRepublish", false);
        spec.fill("seLinuxMount", false);
    },
    validate_update: |new, old, errors| {
        check::immutable(new.at("spec"), old.at("spec"), "spec", "attachRequired", errors);
        check::immutable(new.at("spec"), old.at("spec"), "spec", "volumeLifecycleModes", errors);
    },
    unconditional_update: false,
    ..Strategy::PLAIN
};

pub static CSI_NODE: Strategy = Strategy {
    validate: |node, errors| {
        for (n, driver) in node.at("spec").items("drivers").iter().enumerate() {
            let path = format!("spec.drivers[{n}]");
            check::required(driver, &path, "name", errors);
            check::required(driver, &path, "nodeID", errors);
        }
    },
    unconditional_update: false,
    ..Strategy::PLAIN
};

pub static CSI_STORAGE_CAPACITY: Strategy = Strategy {
    validate: |capacity, errors| {
        check::name(capacity.text("storageClassName"), "storageClassName", names::dns_subdomain, errors);
        for field in ["capacity", "maximumVolumeSize"] {
            if capacity.has(field) {
                check::quantity(capacity.at(field), field, errors);
            }
        }
        if capacity.at("nodeTopology").is_object() {
            check::selector(capacity.at("nodeTopology"), "nodeTopology", errors);
        }
    },
    unconditional_update: false,
    ..Strategy::PLAIN
};

pub static VOLUME_ATTACHMENT: Strategy = Strategy {
    prepare_create: |attachment| attachment.set("status", json!({"attached": false})),
    validate: |attachment, errors| {
        let spec = attachment.at("spec");
        check::required(spec, "spec", "attacher", errors);
        check::required(spec, "spec", "nodeName", errors);
        let source = spec.at("source");
        if !source.has("persistentVolumeName") && !source.has("inlineVolumeSpec") {
            errors.required(
                "spec.source",
                "must specify exactly one of inlineVolumeSpec and persistentVolumeName",
            );
        }
    },
    validate_update: |new, old, errors| {
        if !super::pod::same(new.at("spec"), old.at("spec")) {
            errors.invalid("spec", new.at("spec"), check::IMMUTABLE);
        }
    },
    unconditional_update: false,
    ..Strategy::PLAIN
};

pub static VOLUME_ATTRIBUTES_CLASS: Strategy = Strategy {
    validate: |class, errors| {
        provisioner(class.text("driverName"), "driverName", errors);
        if !class.has("parameters") {
            errors.required("parameters", "must contain at least one key/value pair");
        }
    },
    validate_update: |new, old, errors| {
        for field in ["driverName", "parameters"] {
            if !super::pod::same(new.at(field), old.at(field)) {
                errors.forbidden(field, &format!("updates to {field} are forbidden."));
            }
        }
    },
    ..Strategy::PLAIN
};

fn top_one_of(object: &Value, field: &str, allowed: &[&str], errors: &mut FieldErrors) {
    match object.text(field) {
        "" => errors.required(field, ""),
        value if !allowed.contains(&value) => errors.not_supported(field, value, allowed),
        _ => {}
    }
}

fn provisioner(name: &str, path: &str, errors: &mut FieldErrors) {
    if name.is_empty() {
        errors.required(path, "");
    } else {
        check::name(&name.to_lowercase(), path, names::qualified_name, errors);
    }
}

fn validate_volume(volume: &Value, errors: &mut FieldErrors) {
    let spec = volume.at("spec");
    if !spec.has("accessModes") {
        errors.required("spec.accessModes", "");
    }
    access_modes(spec, "spec", errors);
    match spec.at("capacity").get("storage") {
        None if !spec.has("capacity") => errors.required("spec.capacity", ""),
        None => errors.not_supported("spec.capacity", spec.at("capacity"), &["storage"]),
        Some(size) => positive(size, "spec.capacity[storage]", errors),
    }
    check::one_of_if_set(
        spec,
        "spec",
        "persistentVolumeReclaimPolicy",
        &["Delete", "Recycle", "Retain"],
        errors,
    );
    check::one_of_if_set(spec, "spec", "volumeMode", &["Block", "Filesystem"], errors);
    let members = spec.as_object().into_iter().flatten();
    let mut sources =
        members.filter(|(name, v)| v.is_object() && !OPEN_VOLUME_FIELDS.contains(&name.as_str()));
    match sources.next() {
        None => errors.required("spec", "must specify a volume type"),
        Some((name, source)) => {
            let path = at("spec", name);
            if name == "hostPath" {
                check::required(source, &path, "path", errors);
                if source.text("path") == "/" && spec.text("persistentVolumeReclaimPolicy") == "Recycle" {
                    errors.forbidden(
                        "spec.persistentVolumeReclaimPolicy",
                        "may not be 'recycle' for a hostPath mount of '/'",
                    );
                }
            }
            if name == "local" {
                check::required(source, &path, "path", errors);
                if !spec.has("nodeAffinity") {
                    errors.required("spec.nodeAffinity", "Local volume requires node affinity");
                }
            }
            if name == "csi" {
                check::required(source, &path, "driver", errors);
                check::required(source, &path, "volumeHandle", errors);
            }
        }
    }
    for (extra, _) in sources {
        errors.forbidden(&at("spec", extra), "may not specify more than 1 volume type");
    }
    if spec.at("nodeAffinity").is_object() {
        match spec.at("nodeAffinity").get("required") {
            Some(required) => validate_node_selector(required, "spec.nodeAffinity.required", errors),
            None => errors.required("spec.nodeAffinity.required", "must specify required node constraints"),
        }
    }
    if spec.has("storageClassName") {
        check::name(spec.text("storageClassName"), "spec.storageClassName", names::dns_subdomain, errors);
    }
}

fn validate_claim_update(new: &Value, old: &Value, errors: &mut FieldErrors) {
    let closed = |claim: &Value| {
        let mut spec = claim.at("spec").clone();
        spec.unset("volumeAttributesClassName");
        // Binding fills the name of the volume, once.
        if !old.at("spec").has("volumeName") {
            spec.unset("volumeName");
        }
        // A class may be assigned later to a claim that had none.
        if old.at("spec").get("storageClassName").is_none() {
            spec.unset("storageClassName");
        }
        if let Some(requests) = spec.sub("resources").and_then(|resources| resources.sub("requests")) {
            requests.unset("storage");
        }
        spec
    };
    if !super::pod::same(&closed(new), &closed(old)) {
        errors.forbidden(
            "spec",
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
        );
    }
    let size = |claim: &Value| {
        super::resources::amounts(claim.at("spec").at("resources").at("requests")).get("storage").copied()
    };
    if let (Some(now), Some(before)) = (size(new), size(old)) {
        if now < before {
            errors.forbidden("spec.resources.requests.storage", "field can not be less than status.capacity");
        } else if now > before && old.at("status").text("phase") != "Bound" {
            errors.forbidden(
                "spec",
                "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims",
            );
        }
    }
}
