//! The files that make a name of a pod and find names for it: hostname, `/etc/hosts`, `/etc/resolv.conf`.
//! Pure. Upstream: pkg/kubelet/kubelet_pods.go and pkg/kubelet/network/dns.

use std::fmt::Write;
use std::net::IpAddr;

use crate::pod::Pod;

/// glibc's limits, which upstream cuts to.
const NAMESERVERS_MAX: usize = 3;
const SEARCHES_MAX: usize = 32;
const SEARCH_BYTES_MAX: usize = 2048;
/// Longest name a kernel takes as a hostname.
const HOSTNAME_MAX: usize = 63;

/// What a node offers for looking names up.
#[derive(Debug, Clone, Default)]
pub struct Dns {
    pub servers: Vec<IpAddr>,
    /// `cluster.local`
    pub domain: String,
    /// The node's own `/etc/resolv.conf`.
    pub host: String,
}

/// The pod's hostname; empty for host network, where it is the node's.
pub fn hostname(pod: &Pod, domain: &str) -> String {
    if pod.host_network() {
        return String::new();
    }
    if let Some(name) = pod.spec().hostname_override.as_deref().filter(|name| !name.is_empty()) {
        return name.to_owned();
    }
    let short = short_hostname(pod);
    match host_domain(pod, domain) {
        Some(rest) if pod.spec().set_hostname_as_fqdn == Some(true) => format!("{short}.{rest}"),
        _ => short,
    }
}

fn short_hostname(pod: &Pod) -> String {
    let name = pod.spec().hostname.as_deref().filter(|name| !name.is_empty()).unwrap_or(pod.name());
    let cut = name.get(..HOSTNAME_MAX).unwrap_or(name);
    cut.trim_end_matches(['-', '.']).to_owned()
}

fn host_domain(pod: &Pod, domain: &str) -> Option<String> {
    let sub = pod.spec().subdomain.as_deref().filter(|sub| !sub.is_empty())?;
    Some(format!("{sub}.{}.svc.{domain}", pod.namespace()))
}

/// `/etc/hosts`; `host` is the node's own, which a pod of the host's network gets.
pub fn hosts(pod: &Pod, ip: Option<IpAddr>, domain: &str, host: &str) -> String {
    let mut out = String::new();
    if pod.host_network() {
        out.push_str("# Kubernetes-managed hosts file (host network).\n");
        out.push_str(host);
    } else {
        out.push_str(
            "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n\
             ::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n\
             fe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
        );
        let name = short_hostname(pod);
        let ip = ip.map(|ip| ip.to_string()).unwrap_or_default();
        let _ = match host_domain(pod, domain) {
            Some(rest) => writeln!(out, "{ip}\t{name}.{rest}\t{name}"),
            None => writeln!(out, "{ip}\t{name}"),
        };
    }
    let aliases = pod.spec().host_aliases.as_deref().unwrap_or_default();
    if !aliases.is_empty() {
        out.push_str("\n# Entries added by HostAliases.\n");
        for alias in aliases {
            let _ =
                writeln!(out, "{}\t{}", alias.ip, alias.hostnames.as_deref().unwrap_or_default().join("\t"));
        }
    }
    out
}

#[derive(Debug, Default, PartialEq)]
struct Resolv {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

fn parse(text: &str) -> Resolv {
    let mut resolv = Resolv::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => resolv.servers.extend(words.next()),
            Some("search") => resolv.searches = words.filter(|word| word != ".").collect(),
            Some("options") => resolv.options = words.collect(),
            _ => {}
        }
    }
    resolv
}

/// `/etc/resolv.conf`, by the pod's `dnsPolicy` and `dnsConfig`; and what had to be left out of it, as events tell.
pub fn resolv_conf(pod: &Pod, dns: &Dns) -> (String, Vec<String>) {
    let host = parse(&dns.host);
    let policy = match pod.spec().dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "ClusterFirst" if pod.host_network() => "Default",
        "ClusterFirst" | "ClusterFirstWithHostNet" if dns.servers.is_empty() => "Default",
        policy => policy,
    };
    let mut resolv = match policy {
        "None" => Resolv::default(),
        "Default" => host,
        _ => {
            let (namespace, domain) = (pod.namespace(), &dns.domain);
            let own = [format!("{namespace}.svc.{domain}"), format!("svc.{domain}"), domain.clone()];
            Resolv {
                servers: dns.servers.iter().map(ToString::to_string).collect(),
                searches: unique(own.into_iter().chain(host.searches)),
                options: vec!["ndots:5".to_owned()],
            }
        }
    };
    if let Some(config) = &pod.spec().dns_config {
        let more = config.nameservers.iter().flatten().cloned();
        resolv.servers = unique(resolv.servers.into_iter().chain(more));
        let more = config.searches.iter().flatten().cloned();
        resolv.searches = unique(resolv.searches.into_iter().chain(more));
        for option in config.options.iter().flatten() {
            let Some(name) = &option.name else { continue };
            resolv.options.retain(|known| known.split(':').next() != Some(name));
            resolv.options.push(match &option.value {
                Some(value) if !value.is_empty() => format!("{name}:{value}"),
                _ => name.clone(),
            });
        }
    }
    let mut omitted = vec![];
    if resolv.servers.len() > NAMESERVERS_MAX {
        resolv.servers.truncate(NAMESERVERS_MAX);
        omitted.push(format!(
            "Nameserver limits were exceeded, some nameservers have been omitted, the applied nameserver line is: {}",
            resolv.servers.join(" ")
        ));
    }
    let searches = resolv.searches.len();
    resolv.searches.truncate(SEARCHES_MAX);
    while resolv.searches.join(" ").len() > SEARCH_BYTES_MAX {
        resolv.searches.pop();
    }
    if resolv.searches.len() < searches {
        omitted.push(format!(
            "Search Line limits were exceeded, some search paths have been omitted, the applied search line is: {}",
            resolv.searches.join(" ")
        ));
    }
    let mut out = String::new();
    if !resolv.searches.is_empty() {
        let _ = writeln!(out, "search {}", resolv.searches.join(" "));
    }
    for server in &resolv.servers {
        let _ = writeln!(out, "nameserver {server}");
    }
    if !resolv.options.is_empty() {
        let _ = writeln!(out, "options {}", resolv.options.join(" "));
    }
    (out, omitted)
}

fn unique(words: impl IntoIterator<Item = String>) -> Vec<String> {
    let mut seen = std::collections::HashSet::new();
    words.into_iter().filter(|word| seen.insert(word.clone())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pod::tests::pod;
    use serde_json::{Value, json};

    #[track_caller]
    fn check_resolv(spec: Value, want: &str) {
        let dns = Dns {
            servers: vec!["10.96.0.10".parse().expect("an address")],
            domain: "cluster.local".to_owned(),
            host: "# local\nnameserver 192.0.2.53\nsearch example.org\noptions edns0\n".to_owned(),
        };
        assert_eq!(resolv_conf(&pod(json!({"spec": spec})), &dns).0, want);
    }

    #[test]
    fn what_is_left_out_is_told_of() {
        let servers = ["1.1.1.1", "1.1.1.2", "1.1.1.3", "1.1.1.4"];
        let searches: Vec<String> = (0..40).map(|n| format!("s{n}.example.org")).collect();
        let config = json!({"nameservers": servers, "searches": searches});
        let pod = pod(json!({"spec": {"dnsPolicy": "None", "dnsConfig": config}}));
        let (text, omitted) = resolv_conf(&pod, &Dns::default());
        assert_eq!((text.matches("nameserver").count(), text.matches("example").count()), (3, 32));
        let ends = ["nameserver line is: 1.1.1.1 1.1.1.2 1.1.1.3", "s30.example.org s31.example.org"];
        assert_eq!(omitted.len(), 2);
        assert!(omitted.iter().zip(ends).all(|(text, end)| text.ends_with(end)), "{omitted:?}");
    }

    #[test]
    fn names_are_looked_up_as_the_policy_says() {
        let cluster = "search ns.svc.cluster.local svc.cluster.local cluster.local example.org\n\
                       nameserver 10.96.0.10\noptions ndots:5\n";
        let host = "search example.org\nnameserver 192.0.2.53\noptions edns0\n";
        check_resolv(json!({}), cluster);
        check_resolv(json!({"dnsPolicy": "Default"}), host);
        check_resolv(json!({"hostNetwork": true}), host);
        check_resolv(json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}), cluster);
        check_resolv(
            json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1", "1.1.1.1"], "searches": ["a.b"],
                   "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}}),
            "search a.b\nnameserver 1.1.1.1\noptions ndots:2 edns0\n",
        );
        check_resolv(
            json!({"dnsConfig": {"options": [{"name": "ndots", "value": "1"}]}}),
            &cluster.replace("ndots:5", "ndots:1"),
        );
    }

    #[test]
    fn a_pod_is_named_in_its_hosts() {
        let ip = "10.1.0.9".parse().ok();
        let plain = pod(json!({"spec": {"hostAliases": [{"ip": "1.2.3.4", "hostnames": ["a", "b"]}]}}));
        let text = hosts(&plain, ip, "cluster.local", "");
        assert!(text.starts_with("# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n"), "{text}");
        assert!(text.ends_with("10.1.0.9\tp\n\n# Entries added by HostAliases.\n1.2.3.4\ta\tb\n"), "{text}");
        let named = pod(json!({"spec": {"hostname": "h", "subdomain": "s", "setHostnameAsFQDN": true}}));
        assert!(hosts(&named, ip, "c.l", "").ends_with("10.1.0.9\th.s.ns.svc.c.l\th\n"));
        assert_eq!(hostname(&named, "c.l"), "h.s.ns.svc.c.l");
        let long = pod(json!({"metadata": {"name": format!("{}-x", "a".repeat(62))}}));
        assert_eq!(hostname(&long, "c.l"), "a".repeat(62));
        let host = pod(json!({"spec": {"hostNetwork": true}}));
        assert_eq!(
            hosts(&host, ip, "c.l", "127.0.0.1 me\n"),
            "# Kubernetes-managed hosts file (host network).\n127.0.0.1 me\n"
        );
    }
}
