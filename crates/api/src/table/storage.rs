//! Volumes and what provides them, and other things that hold data.

use serde_json::Value;

use super::object::{NONE, Printed, UNSET, join, or, quantity, str_at};
use super::{AGE, Column, NAME, View, boolean, cells, integer, text, wide};

pub static VIEWS: &[View] = &[
    View {
        group: "",
        kind: "ConfigMap",
        columns: &[NAME, text("Data"), AGE],
        cells: |o| cells![o.name(), o.count("data") + o.count("binaryData"), o.age()],
    },
    View {
        group: "",
        kind: "Secret",
        columns: &[NAME, text("Type"), text("Data"), AGE],
        cells: |o| cells![o.name(), o.str("type"), o.count("data"), o.age()],
    },
    View {
        group: "",
        kind: "PersistentVolume",
        columns: &[
            NAME,
            text("Capacity"),
            text("Access Modes"),
            text("Reclaim Policy"),
            text("Status"),
            text("Claim"),
            text("StorageClass"),
            text("VolumeAttributesClass"),
            text("Reason"),
            AGE,
            wide("VolumeMode"),
        ],
        cells: volume,
    },
    View {
        group: "",
        kind: "PersistentVolumeClaim",
        columns: &[
            NAME,
            text("Status"),
            text("Volume"),
            text("Capacity"),
            text("Access Modes"),
            text("StorageClass"),
            text("VolumeAttributesClass"),
            AGE,
            wide("VolumeMode"),
        ],
        cells: claim,
    },
    View {
        group: "storage.k8s.io",
        kind: "StorageClass",
        columns: &[
            NAME,
            text("Provisioner"),
            text("ReclaimPolicy"),
            text("VolumeBindingMode"),
            text("AllowVolumeExpansion"),
            AGE,
        ],
        cells: storage_class,
    },
    View {
        group: "storage.k8s.io",
        kind: "VolumeAttributesClass",
        columns: &[NAME, text("DriverName"), AGE],
        cells: |o| cells![o.name(), o.str("driverName"), o.age()],
    },
    View {
        group: "storage.k8s.io",
        kind: "VolumeAttachment",
        columns: &[
            NAME,
            Column { format: "name", ..text("Attacher") },
            text("PV"),
            text("Node"),
            boolean("Attached"),
            AGE,
        ],
        cells: |o| {
            cells![
                o.name(),
                o.str("spec.attacher"),
                o.str("spec.source.persistentVolumeName"),
                o.str("spec.nodeName"),
                o.at("status.attached") == true,
                o.age(),
            ]
        },
    },
    View {
        group: "storage.k8s.io",
        kind: "CSINode",
        columns: &[NAME, integer("Drivers"), AGE],
        cells: |o| cells![o.name(), o.count("spec.drivers"), o.age()],
    },
    View {
        group: "storage.k8s.io",
        kind: "CSIDriver",
        columns: &[NAME, boolean("AttachRequired"), boolean("PodInfoOnMount"), boolean("StorageCapacity")],
        cells: |o| {
            let flag = |path: &str, default: bool| o.at(path).as_bool().unwrap_or(default);
            cells![
                o.name(),
                flag("spec.attachRequired", true),
                flag("spec.podInfoOnMount", false),
                flag("spec.storageCapacity", false),
            ]
        },
    },
    View {
        group: "storage.k8s.io",
        kind: "CSIStorageCapacity",
        columns: &[NAME, text("StorageClassName"), text("Capacity")],
        cells: |o| {
            let capacity = o.at("capacity");
            let capacity = if capacity.is_null() { UNSET.to_owned() } else { quantity(capacity) };
            cells![o.name(), o.str("storageClassName"), capacity]
        },
    },
];

/// `RWO,ROX`
fn access_modes(o: &Printed, path: &str) -> String {
    let modes = o.list(path).iter().filter_map(Value::as_str);
    let has: Vec<&str> = modes.collect();
    let short = [
        ("ReadWriteOnce", "RWO"),
        ("ReadOnlyMany", "ROX"),
        ("ReadWriteMany", "RWX"),
        ("ReadWriteOncePod", "RWOP"),
    ];
    join(short.into_iter().filter(|(mode, _)| has.contains(mode)).map(|(_, short)| short), ",")
}

fn phase<'a>(o: &Printed<'a>) -> &'a str {
    if o.is_deleted() { "Terminating" } else { o.str("status.phase") }
}

/// The class by field, or by the annotation that was there before it.
fn class<'a>(o: &Printed<'a>) -> &'a str {
    let annotation = o.at("metadata.annotations")["volume.beta.kubernetes.io/storage-class"].as_str();
    annotation.unwrap_or(o.str("spec.storageClassName"))
}

fn volume(o: &Printed) -> Vec<Value> {
    let claim = o.at("spec.claimRef");
    let claim = match claim {
        Value::Null => String::new(),
        claim => format!("{}/{}", str_at(claim, "namespace"), str_at(claim, "name")),
    };
    cells![
        o.name(),
        quantity(o.at("spec.capacity.storage")),
        access_modes(o, "spec.accessModes"),
        o.str("spec.persistentVolumeReclaimPolicy"),
        phase(o),
        claim,
        class(o),
        or(o.str("spec.volumeAttributesClassName"), UNSET),
        o.str("status.reason"),
        o.age(),
        or(o.str("spec.volumeMode"), UNSET),
    ]
}

fn claim(o: &Printed) -> Vec<Value> {
    let bound = !o.str("spec.volumeName").is_empty();
    let (capacity, modes) = match bound {
        true => (quantity(o.at("status.capacity.storage")), access_modes(o, "status.accessModes")),
        false => Default::default(),
    };
    cells![
        o.name(),
        phase(o),
        o.str("spec.volumeName"),
        capacity,
        modes,
        class(o),
        or(o.str("spec.volumeAttributesClassName"), UNSET),
        o.age(),
        or(o.str("spec.volumeMode"), UNSET),
    ]
}

fn storage_class(o: &Printed) -> Vec<Value> {
    let annotations = o.at("metadata.annotations");
    let default =
        ["storageclass.kubernetes.io/is-default-class", "storageclass.beta.kubernetes.io/is-default-class"]
            .iter()
            .any(|key| annotations[*key] == "true");
    cells![
        format!("{}{}", o.str("metadata.name"), if default { " (default)" } else { "" }),
        or(o.str("provisioner"), NONE),
        or(o.str("reclaimPolicy"), "Delete"),
        or(o.str("volumeBindingMode"), "Immediate"),
        o.at("allowVolumeExpansion") == true,
        o.age(),
    ]
}
