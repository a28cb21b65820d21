//! The real API server, controllers and scheduler in this process, each under its own identity. Time is real; nodes
//! are for whoever starts it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::Result;
use minke_apiserver::{ApiServer, UserInfo, kubernetes_service_address};
use minke_client::{Client, Clock, Informers};
use minke_cluster::keys::{Keys, Names};
use minke_store::Store;
use tokio_util::sync::CancellationToken;

/// Ends when it is dropped.
pub struct ControlPlane {
    clients: Arc<dyn Fn(UserInfo) -> Arc<dyn Client> + Send + Sync>,
    pub stop: CancellationToken,
}

impl ControlPlane {
    /// On `store`, and on a port that is free. The keys are made for it alone.
    pub async fn start(store: Store) -> Result<ControlPlane> {
        let local = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let service_cidr = "10.96.0.0/12".parse()?;
        let names = Names {
            node_name: "server".to_owned(),
            node_ip: local,
            service_ip: kubernetes_service_address(&service_cidr),
            cluster_domain: "cluster.local".to_owned(),
        };
        let dir = tempfile::tempdir()?;
        let keys = Keys::ensure(dir.path(), &names, SystemTime::now())?;
        let server = ApiServer::build(minke_apiserver::Config {
            store,
            clock: Clock::System,
            listen: vec![SocketAddr::new(local, 0)],
            advertise: SocketAddr::from(([192, 0, 2, 1], 6443)),
            service_cidr,
            node_ports: 30000..=32767,
            serving_cert: keys.apiserver.certificate,
            serving_key: keys.apiserver.key,
            serving_ca: keys.ca.certificate.clone(),
            client_ca: keys.ca.certificate.clone(),
            service_account_key: keys.service_account,
            issuer: "https://kubernetes.default.svc.cluster.local".to_owned(),
            kubelet_client_cert: keys.apiserver_kubelet_client.certificate,
            kubelet_client_key: keys.apiserver_kubelet_client.key,
            kubelet_ca: keys.ca.certificate.clone(),
        })
        .await?;
        let plane = ControlPlane { clients: Arc::new(server.clients()), stop: CancellationToken::new() };
        tokio::spawn(server.run(plane.stop.clone()));

        let clients = plane.clients.clone();
        let account = move |name: &str| clients(UserInfo::service_account("kube-system", name));
        let config = minke_controllers::Config { root_ca: keys.ca.certificate, ..Default::default() };
        let informers = plane.informers("system:kube-controller-manager", &[]);
        tokio::spawn(minke_controllers::run(config, account, informers, plane.stop.clone()));

        let config = minke_scheduler::Config { seed: 1, ..Default::default() };
        let informers = plane.informers("system:kube-scheduler", &[]);
        tokio::spawn(minke_scheduler::run(informers, config, plane.stop.clone()));
        Ok(plane)
    }

    pub fn client(&self, name: &str, groups: &[&str]) -> Arc<dyn Client> {
        (self.clients)(UserInfo::new(name, groups))
    }

    /// A client that may do all.
    pub fn admin(&self) -> Arc<dyn Client> {
        self.client("admin", &["system:masters"])
    }

    fn informers(&self, name: &str, groups: &[&str]) -> Arc<Informers> {
        Informers::new(self.client(name, groups), self.stop.clone())
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}
