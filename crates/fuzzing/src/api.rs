//! Objects, patches and what else the API reads.

use minke_api::codec::{json as json_codec, protobuf as protobuf_codec, yaml as yaml_codec};
use minke_api::{FieldSelector, Kind, LabelSelector, Quantity, patch, schema, time};

/// JSON bodies, and making them conform to a type: doing it twice changes nothing more.
pub fn json(data: &[u8]) {
    let Ok(decoded) = json_codec::decode(data) else { return };
    let again =
        json_codec::decode(decoded.value.to_string().as_bytes()).expect("what was read can be read again");
    assert_eq!(again.value, decoded.value);
    assert!(again.duplicates.is_empty());
    for (group, kind) in
        [("", "Pod"), ("apps", "Deployment"), ("", "Service"), ("networking.k8s.io", "Ingress")]
    {
        let ty = schema::of(group, "v1", kind).expect("the kind is built in");
        let mut value = decoded.value.clone();
        if schema::conform(ty, &mut value).is_err() {
            continue;
        }
        let once = value.clone();
        assert_eq!(schema::conform(ty, &mut value), Ok(Vec::new()));
        assert_eq!(value, once);
        schema::complete(ty, &mut value);
        assert_eq!(schema::conform(ty, &mut value), Ok(Vec::new()));
    }
}

/// JSON patches: two JSON texts divided by a zero byte, the object and the patch.
pub fn json_patch(data: &[u8]) {
    let mut parts = data.splitn(2, |b| *b == 0);
    let (Some(original), Some(change)) = (parts.next(), parts.next()) else { return };
    let (Ok(original), Ok(change)) = (json_codec::decode(original), json_codec::decode(change)) else {
        return;
    };
    if let Ok(patched) = patch::json::apply(original.value, &change.value) {
        json_codec::decode(patched.to_string().as_bytes()).expect("no deeper than may be read");
    }
}

/// Protobuf bodies: what is read comes back the same when written and read again.
pub fn protobuf(data: &[u8]) {
    let Ok(value) = protobuf_codec::decode(data, None) else { return };
    let envelope = protobuf_codec::envelope(data).expect("it was just read");
    let ty = schema::of_api_version(envelope.api_version, envelope.kind).expect("the kind was known");
    assert_eq!(protobuf_codec::decode(&protobuf_codec::encode(ty, &value), None), Ok(value));
}

/// Quantities and times: the canonical form says the same.
pub fn quantity(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(quantity) = Quantity::parse(text) {
        let canonical = quantity.to_string();
        let again = Quantity::parse(&canonical).expect("the canonical form is one");
        assert_eq!(again, quantity);
        assert_eq!(again.to_string(), canonical);
    }
    if let Ok(at) = time::parse(text) {
        assert_eq!(
            time::parse(&time::format_micros(at)).map(time::format_seconds),
            Ok(time::format_seconds(at))
        );
    }
}

/// Label and field selectors: what is read comes back the same when written and read again.
pub fn selectors(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    if let Ok(selector) = LabelSelector::parse(text) {
        // The text form puts the requirements in order.
        let text = selector.to_string();
        assert_eq!(LabelSelector::parse(&text).map(|s| s.to_string()), Ok(text));
    }
    let pod = Kind::by_kind("", "v1", "Pod").expect("the kind is built in");
    if let Ok(selector) = FieldSelector::parse(pod, text) {
        assert_eq!(FieldSelector::parse(pod, &selector.to_string()).as_ref(), Ok(&selector), "{selector}");
    }
}

/// Strategic merge patches: two JSON texts divided by a zero byte, the object and the patch.
pub fn strategic_patch(data: &[u8]) {
    let mut parts = data.splitn(2, |b| *b == 0);
    let (Some(original), Some(change)) = (parts.next(), parts.next()) else { return };
    let (Ok(original), Ok(change)) = (json_codec::decode(original), json_codec::decode(change)) else {
        return;
    };
    let ty = schema::of("", "v1", "Pod").expect("the kind is built in");
    let patched = patch::strategic::apply(ty, original.value.clone(), &change.value);
    if let Ok(patched) = patched {
        json_codec::decode(patched.to_string().as_bytes()).expect("no deeper than what was read");
    }
    let merged = patch::merge::apply(original.value, &change.value);
    assert_eq!(patch::merge::apply(merged.clone(), &change.value), merged);
}

/// YAML bodies: what is read is JSON, and JSON is YAML.
pub fn yaml(data: &[u8]) {
    let Ok(decoded) = yaml_codec::decode(data) else { return };
    let text = decoded.value.to_string();
    assert_eq!(json_codec::decode(text.as_bytes()).expect("the value is JSON").value, decoded.value);
}
