//! The schema of Kubernetes DNS 1.1.0 on the wire, section by section; then the DNS itself.
//! The tests know only bytes, and the index that the answers come from.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use minke_api::Key;
use minke_dns::{Index, Zone, answer, entry_of};
use serde_json::{Value, json};

fn set(index: &mut Index, name: &str, spec: Value, slices: &[Value]) {
    let service: Service = serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).unwrap();
    let slices: Vec<EndpointSlice> =
        slices.iter().map(|slice| serde_json::from_value(slice.clone()).unwrap()).collect();
    index.set_service(&Key::new("default", name), entry_of(&service, slices.iter()));
}

fn slice(endpoints: Value) -> Value {
    json!({
        "metadata": {}, "addressType": "IPv4", "endpoints": endpoints,
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "dns", "port": 53, "protocol": "UDP"}],
    })
}

fn cluster() -> Index {
    let mut index = Index::new(Zone {
        domain: Name::from_ascii("Cluster.Local.").unwrap(),
        server: "10.96.0.10".parse().unwrap(),
        reverse: vec!["10.96.0.0/12".parse().unwrap(), "10.244.0.0/16".parse().unwrap()],
        ttl: 5,
    });
    index.set_namespace("default", true);
    let ports = json!([{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]);
    set(
        &mut index,
        "web",
        json!({"clusterIP": "10.96.0.7", "clusterIPs": ["10.96.0.7"], "ports": ports}),
        &[],
    );
    set(&mut index, "unnamed", json!({"clusterIP": "10.96.0.8", "ports": [{"port": 80}]}), &[]);
    set(&mut index, "dual", json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00::9"]}), &[]);
    let endpoints = json!([
        {"addresses": ["10.244.0.2"], "hostname": "db-0", "conditions": {"ready": true}},
        {"addresses": ["10.244.0.3"]},
        {"addresses": ["10.244.0.4"], "conditions": {"ready": false}},
    ]);
    let headless = json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": ports});
    set(&mut index, "db", headless.clone(), &[slice(endpoints.clone())]);
    let mut all = headless.clone();
    all["publishNotReadyAddresses"] = json!(true);
    set(&mut index, "all", all, &[slice(endpoints)]);
    set(
        &mut index,
        "none",
        headless,
        &[slice(json!([{"addresses": ["10.244.0.4"], "conditions": {"ready": false}}]))],
    );
    set(&mut index, "ext", json!({"type": "ExternalName", "externalName": "www.example.com"}), &[]);
    set(
        &mut index,
        "inside",
        json!({"type": "ExternalName", "externalName": "web.default.svc.cluster.local"}),
        &[],
    );
    set(
        &mut index,
        "loop",
        json!({"type": "ExternalName", "externalName": "loop.default.svc.cluster.local."}),
        &[],
    );
    index.set_complete();
    index
}

fn query(name: &str, record_type: RecordType) -> Message {
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.metadata.recursion_desired = true;
    message.queries.push(Query::query(Name::from_ascii(name).unwrap(), record_type));
    message
}

fn ask(index: &Index, query: &Message) -> Message {
    let bytes = answer(index, &query.to_vec().unwrap());
    let reply = Message::from_vec(&bytes).unwrap();
    assert_eq!(reply.metadata.id, query.metadata.id);
    assert_eq!(reply.metadata.message_type, MessageType::Response);
    reply
}

/// A record as `name type value`.
fn show(record: &Record) -> String {
    let value = match &record.data {
        RData::SRV(srv) => format!("{} {} {} {}", srv.priority, srv.weight, srv.port, srv.target),
        RData::TXT(txt) => txt.txt_data.iter().map(|part| String::from_utf8_lossy(part)).collect(),
        data => data.to_string(),
    };
    format!("{} {} {value}", record.name, record.record_type())
}

/// `answers` are records as [`show`] makes them, with `+` before additional ones; or a response code,
/// or "empty".
#[track_caller]
fn check(name: &str, record_type: RecordType, answers: &[&str]) {
    let reply = ask(&cluster(), &query(name, record_type));
    let mut shown: Vec<String> = reply.answers.iter().map(show).collect();
    shown.extend(reply.additionals.iter().map(|record| format!("+ {}", show(record))));
    match reply.metadata.response_code {
        ResponseCode::NoError if shown.is_empty() => shown.push("empty".into()),
        ResponseCode::NoError => {}
        code => shown.push(format!("{code:?}")),
    }
    assert_eq!(shown, answers, "{name} {record_type}");
    let refused = reply.metadata.response_code == ResponseCode::Refused;
    if shown == ["empty"] || shown == ["NXDomain"] {
        assert_eq!(reply.authorities.len(), 1, "how long nothing may be remembered");
        assert_eq!(reply.authorities[0].record_type(), RecordType::SOA);
    }
    assert!(reply.metadata.authoritative || refused);
    assert!(reply.answers.iter().all(|record| (1..=30).contains(&record.ttl)));
}

use RecordType as T;

#[test]
fn s2_2_the_schema_version() {
    check("dns-version.cluster.local.", T::TXT, &["dns-version.cluster.local. TXT 1.1.0"]);
    check("dns-version.cluster.local.", T::A, &["empty"]);
}

#[test]
fn s2_3_1_a_cluster_ip() {
    check("web.default.svc.cluster.local.", T::A, &["web.default.svc.cluster.local. A 10.96.0.7"]);
    check("web.default.svc.cluster.local.", T::AAAA, &["empty"]);
    check("dual.default.svc.cluster.local.", T::AAAA, &["dual.default.svc.cluster.local. AAAA fd00::9"]);
    check("missing.default.svc.cluster.local.", T::A, &["NXDomain"]);
    check("web.other.svc.cluster.local.", T::A, &["NXDomain"]);
    check("x.web.default.svc.cluster.local.", T::A, &["NXDomain"]);
}

#[test]
fn s2_3_2_srv_of_a_cluster_ip() {
    let target = "0 100 80 web.default.svc.cluster.local.";
    check(
        "_http._tcp.web.default.svc.cluster.local.",
        T::SRV,
        &[
            &format!("_http._tcp.web.default.svc.cluster.local. SRV {target}"),
            "+ web.default.svc.cluster.local. A 10.96.0.7",
        ],
    );
    check(
        "_dns._udp.web.default.svc.cluster.local.",
        T::SRV,
        &[
            "_dns._udp.web.default.svc.cluster.local. SRV 0 100 53 web.default.svc.cluster.local.",
            "+ web.default.svc.cluster.local. A 10.96.0.7",
        ],
    );
    check("_http._udp.web.default.svc.cluster.local.", T::SRV, &["NXDomain"]);
    check("_._tcp.unnamed.default.svc.cluster.local.", T::SRV, &["NXDomain"]);
    check("_http._tcp.web.default.svc.cluster.local.", T::A, &["empty"]);
    check("_tcp.web.default.svc.cluster.local.", T::SRV, &["empty"]);
    check("_sctp.web.default.svc.cluster.local.", T::SRV, &["NXDomain"]);
}

#[test]
fn s2_3_3_ptr_of_a_cluster_ip() {
    check("7.0.96.10.in-addr.arpa.", T::PTR, &["7.0.96.10.in-addr.arpa. PTR web.default.svc.cluster.local."]);
    check("77.0.96.10.in-addr.arpa.", T::PTR, &["NXDomain"]);
    check("7.0.96.10.in-addr.arpa.", T::A, &["empty"]);
}

#[test]
fn s2_4_1_a_headless() {
    check(
        "db.default.svc.cluster.local.",
        T::A,
        &["db.default.svc.cluster.local. A 10.244.0.3", "db.default.svc.cluster.local. A 10.244.0.2"],
    );
    check("none.default.svc.cluster.local.", T::A, &["NXDomain"]);
    let all = ask(&cluster(), &query("all.default.svc.cluster.local.", T::A));
    assert_eq!(all.answers.len(), 3, "publishNotReadyAddresses");
    check("db-0.db.default.svc.cluster.local.", T::A, &["db-0.db.default.svc.cluster.local. A 10.244.0.2"]);
    check(
        "10-244-0-3.db.default.svc.cluster.local.",
        T::A,
        &["10-244-0-3.db.default.svc.cluster.local. A 10.244.0.3"],
    );
    check("10-244-0-3.db.default.svc.cluster.local.", T::AAAA, &["empty"]);
    check("10-244-0-4.db.default.svc.cluster.local.", T::A, &["NXDomain"]);
}

#[test]
fn s2_4_2_srv_headless() {
    check(
        "_http._tcp.db.default.svc.cluster.local.",
        T::SRV,
        &[
            "_http._tcp.db.default.svc.cluster.local. SRV 0 50 8080 10-244-0-3.db.default.svc.cluster.local.",
            "_http._tcp.db.default.svc.cluster.local. SRV 0 50 8080 db-0.db.default.svc.cluster.local.",
            "+ 10-244-0-3.db.default.svc.cluster.local. A 10.244.0.3",
            "+ db-0.db.default.svc.cluster.local. A 10.244.0.2",
        ],
    );
    check("_http._tcp.none.default.svc.cluster.local.", T::SRV, &["NXDomain"]);
}

#[test]
fn s2_4_3_ptr_headless() {
    check(
        "2.0.244.10.in-addr.arpa.",
        T::PTR,
        &[
            "2.0.244.10.in-addr.arpa. PTR db-0.all.default.svc.cluster.local.",
            "2.0.244.10.in-addr.arpa. PTR db-0.db.default.svc.cluster.local.",
        ],
    );
}

#[test]
fn s2_5_external_names() {
    check(
        "ext.default.svc.cluster.local.",
        T::CNAME,
        &["ext.default.svc.cluster.local. CNAME www.example.com."],
    );
    // `answer` alone asks nobody: what it has of the chain, and that the rest is not ours.
    check(
        "ext.default.svc.cluster.local.",
        T::A,
        &["ext.default.svc.cluster.local. CNAME www.example.com.", "Refused"],
    );
    check(
        "inside.default.svc.cluster.local.",
        T::A,
        &[
            "inside.default.svc.cluster.local. CNAME web.default.svc.cluster.local.",
            "web.default.svc.cluster.local. A 10.96.0.7",
        ],
    );
    let looped = ask(&cluster(), &query("loop.default.svc.cluster.local.", T::A));
    assert_eq!(looped.answers.len(), 8, "no longer than that");
}

#[test]
fn s3_pod_names_as_coredns_has_them() {
    check(
        "10-244-0-9.default.pod.cluster.local.",
        T::A,
        &["10-244-0-9.default.pod.cluster.local. A 10.244.0.9"],
    );
    check("10-244-0-9.default.pod.cluster.local.", T::AAAA, &["empty"]);
    check(
        "fd00--9.default.pod.cluster.local.",
        T::AAAA,
        &["fd00--9.default.pod.cluster.local. AAAA fd00::9"],
    );
    check("10-244-0-9.other.pod.cluster.local.", T::A, &["NXDomain"]);
    check("10-244-0.default.pod.cluster.local.", T::A, &["NXDomain"]);
    check("web.default.pod.cluster.local.", T::A, &["NXDomain"]);
}

#[test]
fn rfc8020_empty_names_above_others_exist() {
    for name in ["cluster.local.", "svc.cluster.local.", "pod.cluster.local.", "default.svc.cluster.local."] {
        check(name, T::A, &["empty"]);
    }
    for name in ["x.cluster.local.", "other.svc.cluster.local.", "other.pod.cluster.local."] {
        check(name, T::A, &["NXDomain"]);
    }
}

#[test]
fn rfc1035_the_zone_itself() {
    let soa = ask(&cluster(), &query("cluster.local.", T::SOA));
    assert_eq!(soa.answers[0].record_type(), T::SOA);
    check(
        "cluster.local.",
        T::NS,
        &["cluster.local. NS ns.dns.cluster.local.", "+ ns.dns.cluster.local. A 10.96.0.10"],
    );
    check("ns.dns.cluster.local.", T::A, &["ns.dns.cluster.local. A 10.96.0.10"]);
}

#[test]
fn rfc4343_names_are_the_same_in_any_case_and_come_back_as_asked() {
    check("wEB.Default.SVC.cluster.LOCAL.", T::A, &["wEB.Default.SVC.cluster.LOCAL. A 10.96.0.7"]);
    let reply = ask(&cluster(), &query("wEB.Default.SVC.cluster.LOCAL.", T::A));
    assert!(reply.queries[0].name.eq_case(&Name::from_ascii("wEB.Default.SVC.cluster.LOCAL.").unwrap()));
}

#[test]
fn names_elsewhere_are_not_ours() {
    for name in ["example.com.", "local.", "xcluster.local.", "1.1.1.1.in-addr.arpa.", "96.10.in-addr.arpa."]
    {
        let reply = ask(&cluster(), &query(name, T::A));
        assert_eq!(reply.metadata.response_code, ResponseCode::Refused, "{name}");
    }
}

#[test]
fn clients_take_turns_with_the_addresses() {
    let first = |id| {
        let mut query = query("db.default.svc.cluster.local.", T::A);
        query.metadata.id = id;
        show(&ask(&cluster(), &query).answers[0])
    };
    assert_ne!(first(0), first(1));
    assert_eq!(first(0), first(2));
}

fn big(count: u32) -> Index {
    let mut index = cluster();
    let endpoints: Vec<Value> = (0..count)
        .map(|i| json!({"addresses": [IpAddr::from(std::net::Ipv4Addr::from(0x0af4_0000 + i))]}))
        .collect();
    set(&mut index, "big", json!({"clusterIP": "None"}), &[slice(json!(endpoints))]);
    index
}

#[test]
fn rfc2181_what_does_not_fit_is_cut_and_says_so() {
    let index = big(5000);
    let mut question = query("big.default.svc.cluster.local.", T::A);
    let bytes = answer(&index, &question.to_vec().unwrap());
    let reply = Message::from_vec(&bytes).unwrap();
    assert!(bytes.len() <= 512 && reply.metadata.truncation);
    assert!(reply.answers.len() > 25, "as many as fit: {}", reply.answers.len());

    let mut edns = Edns::new();
    edns.set_max_payload(4096).set_dnssec_ok(true);
    question.edns = Some(edns);
    let bytes = answer(&index, &question.to_vec().unwrap());
    let reply = Message::from_vec(&bytes).unwrap();
    assert!(bytes.len() <= 1232 && bytes.len() > 1200 && reply.metadata.truncation);
    assert!(reply.edns.unwrap().flags().dnssec_ok);
    assert!(!ask(&big(20), &query("big.default.svc.cluster.local.", T::A)).metadata.truncation);
}

#[test]
fn rfc6891_edns() {
    let mut question = query("web.default.svc.cluster.local.", T::A);
    assert!(ask(&cluster(), &question).edns.is_none());
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    question.edns = Some(edns.clone());
    assert_eq!(ask(&cluster(), &question).edns.unwrap().max_payload(), 1232);
    edns.set_version(1);
    question.edns = Some(edns);
    let reply = ask(&cluster(), &question);
    assert_eq!((reply.edns.unwrap().rcode_high(), reply.answers.len()), (1, 0), "BADVERS");
}

#[test]
fn rfc1035_what_is_no_question_gets_an_error_or_nothing() {
    let code = |change: fn(&mut Message)| {
        let mut message = query("web.default.svc.cluster.local.", T::A);
        change(&mut message);
        ask(&cluster(), &message).metadata.response_code
    };
    assert_eq!(code(|message| message.metadata.op_code = OpCode::Notify), ResponseCode::NotImp);
    assert_eq!(code(|message| message.queries.clear()), ResponseCode::FormErr);
    assert_eq!(code(|message| message.queries.push(message.queries[0].clone())), ResponseCode::FormErr);
    assert_eq!(code(|message| message.queries[0].query_class = DNSClass::CH), ResponseCode::Refused);
    assert_eq!(code(|message| message.queries[0].query_type = T::AXFR), ResponseCode::Refused);

    let index = cluster();
    let mut reply = query("web.default.svc.cluster.local.", T::A);
    reply.metadata.message_type = MessageType::Response;
    assert!(answer(&index, &reply.to_vec().unwrap()).is_empty(), "an answer is not answered");
    assert!(answer(&index, b"").is_empty());
    assert!(answer(&index, &[0; 11]).is_empty());
    let broken = answer(&index, &[0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 63]);
    let broken = Message::from_vec(&broken).unwrap();
    assert_eq!((broken.metadata.id, broken.metadata.response_code), (0x1234, ResponseCode::FormErr));
}

#[test]
fn before_all_is_known_clients_are_asked_to_try_again() {
    let index = Index::new(cluster().zone().clone());
    let reply = ask(&index, &query("web.default.svc.cluster.local.", T::A));
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
}

#[test]
fn services_come_change_and_go() {
    let mut index = cluster();
    let mut addresses = |spec: Option<Value>| {
        match spec {
            Some(spec) => set(&mut index, "web", spec, &[]),
            None => index.set_service(&Key::new("default", "web"), None),
        }
        let reply = ask(&index, &query("web.default.svc.cluster.local.", T::A));
        let back = ask(&index, &query("7.0.96.10.in-addr.arpa.", T::PTR));
        (reply.answers.iter().map(show).collect::<Vec<_>>().join(", "), back.answers.len())
    };
    let name = "web.default.svc.cluster.local.";
    assert_eq!(addresses(Some(json!({"clusterIP": "10.96.0.7"}))), (format!("{name} A 10.96.0.7"), 1));
    assert_eq!(addresses(Some(json!({"clusterIP": "10.96.0.8"}))), (format!("{name} A 10.96.0.8"), 0));
    let external = json!({"type": "ExternalName", "externalName": "x.test"});
    assert_eq!(addresses(Some(external)), (format!("{name} CNAME x.test."), 0));
    assert_eq!(addresses(None), (String::new(), 0));
}

proptest::proptest! {
    #![proptest_config(proptest::test_runner::Config { failure_persistence: None, ..Default::default() })]

    /// Nothing that anyone sends does harm, and what comes back is a message that fits.
    #[test]
    fn any_bytes_get_a_whole_answer_or_none(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600)) {
        whole(&bytes);
    }

    /// Also when it is nearly a query.
    #[test]
    fn damaged_queries_too(at in 0usize..60, byte in proptest::num::u8::ANY, cut in 0usize..80) {
        let mut query = query("_http._tcp.db.default.svc.cluster.local.", T::SRV);
        query.edns = Some(Edns::new());
        let mut bytes = query.to_vec().unwrap();
        if let Some(place) = bytes.get_mut(at) {
            *place = byte;
        }
        bytes.truncate(cut.max(12));
        whole(&bytes);
    }
}

fn whole(bytes: &[u8]) {
    let index = cluster();
    let reply = answer(&index, bytes);
    assert!(reply.is_empty() || reply[..2] == bytes[..2]);
    assert!(reply.len() <= 1232);
    assert!(reply.is_empty() || Message::from_vec(&reply).is_ok());
}

/// Not a limit: prints what an answer costs on this machine (`--nocapture`).
#[test]
fn answers_take_microseconds() {
    let index = cluster();
    let bytes = query("web.default.svc.cluster.local.", T::A).to_vec().unwrap();
    let start = tokio::time::Instant::now();
    for _ in 0..10_000 {
        assert!(!answer(&index, &bytes).is_empty());
    }
    println!("answer: {:?}", start.elapsed() / 10_000);
}
