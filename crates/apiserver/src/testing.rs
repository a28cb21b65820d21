//! A whole API server for tests: a store in memory, keys of its own, and requests without a socket.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, Full};
use minke_api::Status;
use minke_client::Clock;
use minke_store::Store;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::Value;

use crate::http::{Peer, Server};
use crate::{ApiServer, Config, UserInfo};

/// A CA, and what it has signed.
pub struct Keys {
    pub ca: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Keys {
    pub fn new() -> Keys {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, "test-ca");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let ca = params.self_signed(&key).unwrap().pem();
        Keys { ca, issuer: Issuer::new(params, key) }
    }

    /// Certificate and key, as PEM.
    pub fn sign(&self, name: &str, groups: &[&str], hosts: &[&str]) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let hosts: Vec<String> = hosts.iter().map(|host| (*host).to_owned()).collect();
        let mut params = CertificateParams::new(hosts).unwrap();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, name);
        for group in groups {
            params.distinguished_name.push(DnType::OrganizationName, *group);
        }
        (params.signed_by(&key, &self.issuer).unwrap().pem(), key.serialize_pem())
    }

    /// A configuration with these keys; listens nowhere.
    pub fn config(&self, store: Store, clock: Clock) -> Config {
        let (serving_cert, serving_key) = self.sign("apiserver", &[], &["localhost", "127.0.0.1"]);
        let (kubelet_client_cert, kubelet_client_key) = self.sign("kubelet-client", &["system:masters"], &[]);
        Config {
            store,
            clock,
            listen: Vec::new(),
            advertise: "192.0.2.1:6443".parse().unwrap(),
            service_cidr: "10.96.0.0/12".parse().unwrap(),
            node_ports: 30000..=32767,
            serving_cert,
            serving_key,
            serving_ca: self.ca.clone(),
            client_ca: self.ca.clone(),
            service_account_key: KeyPair::generate().unwrap().serialize_pem(),
            issuer: "https://kubernetes.default.svc.cluster.local".to_owned(),
            kubelet_client_cert,
            kubelet_client_key,
            kubelet_ca: self.ca.clone(),
        }
    }
}

/// An API server that is asked without a connection.
pub struct Api {
    pub server: Arc<Server>,
    pub store: Store,
    user: UserInfo,
}

/// An answer, read to its end.
#[derive(Debug)]
pub struct Answer {
    pub code: u16,
    pub headers: HeaderMap,
    pub bytes: Bytes,
}

impl Answer {
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.bytes)
            .unwrap_or_else(|error| panic!("{error} in {:?}", String::from_utf8_lossy(&self.bytes)))
    }

    /// The object or list, if all went well.
    #[track_caller]
    pub fn ok(self) -> Value {
        assert!(self.code < 300, "{} {}", self.code, String::from_utf8_lossy(&self.bytes));
        self.json()
    }

    /// Code, reason and message of a Status.
    #[track_caller]
    pub fn error(self) -> (u16, String, String) {
        let status: Status = serde_json::from_slice(&self.bytes).unwrap_or_else(|_| {
            panic!("no status: {} {:?}", self.code, String::from_utf8_lossy(&self.bytes))
        });
        assert_eq!((status.code, status.status.as_str()), (self.code, "Failure"), "{status:?}");
        (self.code, status.reason, status.message)
    }

    /// Each line of a watch.
    pub fn events(&self) -> Vec<Value> {
        self.bytes
            .split(|b| *b == b'\n')
            .filter(|l| !l.is_empty())
            .map(|l| serde_json::from_slice(l).unwrap())
            .collect()
    }
}

impl Api {
    pub async fn new() -> Api {
        Api::at(Clock::System).await
    }

    pub async fn at(clock: Clock) -> Api {
        let store = Store::in_memory();
        let built = ApiServer::build(Keys::new().config(store.clone(), clock)).await.unwrap();
        let user = UserInfo::new("admin", &["system:masters"]);
        Api { server: built.server.clone(), store, user }
    }

    /// The same server, asked by someone else.
    pub fn as_user(&self, user: UserInfo) -> Api {
        Api { server: self.server.clone(), store: self.store.clone(), user }
    }

    /// Sends `METHOD /path` with headers, written `name: value`, and a body; reads the whole answer.
    pub async fn send(&self, line: &str, headers: &[&str], body: impl Into<Bytes>) -> Answer {
        let (method, path) = line.split_once(' ').unwrap();
        let mut request = Request::builder().method(method).uri(path);
        for header in headers {
            let (name, value) = header.split_once(": ").unwrap();
            request = request.header(name, value);
        }
        let body = Full::new(body.into()).map_err(|never| match never {}).boxed_unsync();
        let peer = Peer {
            identity: Some(Arc::new(Ok(self.user.clone()))),
            address: SocketAddr::from(([192, 0, 2, 77], 1)),
        };
        let answer = self.server.clone().handle(peer, request.body(body).unwrap()).await.unwrap();
        let (parts, body) = answer.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        Answer { code: parts.status.as_u16(), headers: parts.headers, bytes }
    }

    pub async fn get(&self, path: &str) -> Answer {
        self.send(&format!("GET {path}"), &[], "").await
    }

    /// Sends a JSON body.
    pub async fn json(&self, line: &str, body: Value) -> Answer {
        let media_type = match line.split_once(' ') {
            Some(("PATCH", _)) if body.is_array() => "content-type: application/json-patch+json",
            Some(("PATCH", _)) => "content-type: application/merge-patch+json",
            _ => "content-type: application/json",
        };
        self.send(line, &[media_type], body.to_string()).await
    }
}
