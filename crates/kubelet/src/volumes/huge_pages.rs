//! Volumes of huge pages: `emptyDir` with a medium of `HugePages` or `HugePages-<size>`.
//! Upstream: pkg/volume/emptydir. Pure.

use minke_api::Quantity;

use crate::pod::{Class, Pod};

const MEDIUM: &str = "HugePages";

/// Whether the medium is huge pages, of whatever size.
pub fn is_medium(medium: &str) -> bool {
    medium.strip_prefix(MEDIUM).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'))
}

/// Bytes of a page of the volume: as the medium says, or as the containers' requests do; some container must
/// request them. The error is why the volume can't be set up.
pub fn page_size(medium: &str, pod: &Pod) -> Result<i64, String> {
    let asked = match medium.strip_prefix(MEDIUM).and_then(|rest| rest.strip_prefix('-')) {
        Some(size) => Some(Quantity::parse(size).map_err(|error| error.to_string())?.value()),
        None => None,
    };
    let mut found = None;
    let containers = pod.containers().filter(|(class, _)| *class != Class::Ephemeral);
    for resources in containers.filter_map(|(_, container)| container.resources.as_ref()) {
        let named = resources.requests.iter().chain(&resources.limits).flat_map(|list| list.keys());
        let sizes = named.filter_map(|name| Quantity::parse(name.strip_prefix("hugepages-")?).ok());
        for size in sizes.map(Quantity::value) {
            match asked {
                Some(asked) if asked != size => {}
                None if found.is_some_and(|found| found != size) => {
                    let why = "can't be used if container requests multiple huge page sizes";
                    return Err(format!("medium: {medium} {why}"));
                }
                _ => found = Some(size),
            }
        }
    }
    found.ok_or_else(|| {
        format!(
            "medium {medium}: hugePages volume requested, but there is no resource request for huge pages"
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    #[track_caller]
    fn check(medium: &str, sizes: &[&str], want: Result<i64, &str>) {
        let container = |(n, size): (usize, &&str)| -> Value {
            json!({"name": format!("c{n}"), "resources": {"limits": {format!("hugepages-{size}"): "1Gi"}}})
        };
        let containers: Vec<Value> = sizes.iter().enumerate().map(container).collect();
        let pod = pod(json!({"spec": {"containers": containers}}));
        assert_eq!(page_size(medium, &pod), want.map_err(str::to_owned), "{medium} {sizes:?}");
    }

    #[test]
    fn pages_are_of_the_size_that_is_requested() {
        check("HugePages", &["2Mi"], Ok(2 << 20));
        check("HugePages", &["1Gi", "1Gi"], Ok(1 << 30));
        check("HugePages-2Mi", &["1Gi", "2Mi"], Ok(2 << 20));
        check("HugePages-2048Ki", &["2Mi"], Ok(2 << 20));
        let many = "medium: HugePages can't be used if container requests multiple huge page sizes";
        check("HugePages", &["1Gi", "2Mi"], Err(many));
        let none = "hugePages volume requested, but there is no resource request for huge pages";
        check("HugePages", &[], Err(&format!("medium HugePages: {none}")));
        check("HugePages-2Mi", &["1Gi"], Err(&format!("medium HugePages-2Mi: {none}")));
        assert!(page_size("HugePages-x", &pod(json!({}))).is_err());
        assert!(is_medium("HugePages") && is_medium("HugePages-1Gi"));
        assert!(!is_medium("HugePages1Gi") && !is_medium("Memory"));
    }
}
