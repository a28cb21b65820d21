//! An API server by itself, to try clients against: `cargo run -p minke-apiserver --example serve -- DIR`.
//!
//! Keeps its state in DIR/store.redb, makes keys anew each time, and writes DIR/kubeconfig.

use std::net::SocketAddr;
use std::path::PathBuf;

use minke_apiserver::{ApiServer, Config};
use minke_store::{EVENT_BYTES, Embedded, Store};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio_util::sync::CancellationToken;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    tracing_subscriber::fmt().with_env_filter(tracing_subscriber::EnvFilter::from_default_env()).init();
    let directory = PathBuf::from(std::env::args().nth(1).ok_or("usage: serve DIR")?);
    std::fs::create_dir_all(&directory)?;
    let ca_key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "example-ca");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key)?.pem();
    let issuer = Issuer::new(params, &ca_key);
    let sign = |name: &str, group: &str, hosts: Vec<String>| -> Result<(String, String), rcgen::Error> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::new(hosts)?;
        params.distinguished_name.push(DnType::CommonName, name);
        if !group.is_empty() {
            params.distinguished_name.push(DnType::OrganizationName, group);
        }
        Ok((params.signed_by(&key, &issuer)?.pem(), key.serialize_pem()))
    };
    let (serving_cert, serving_key) =
        sign("apiserver", "", vec!["localhost".to_owned(), "127.0.0.1".to_owned()])?;
    let (admin_cert, admin_key) = sign("admin", "system:masters", Vec::new())?;
    let address: SocketAddr = "127.0.0.1:0".parse()?;
    let config = Config {
        store: Store::open(Embedded::open(&directory.join("store.redb"))?, EVENT_BYTES)?,
        clock: Default::default(),
        listen: vec![address],
        advertise: "192.0.2.1:6443".parse()?,
        service_cidr: "10.96.0.0/12".parse()?,
        node_ports: 30000..=32767,
        serving_cert,
        serving_key,
        serving_ca: ca.clone(),
        client_ca: ca.clone(),
        service_account_key: KeyPair::generate()?.serialize_pem(),
        issuer: "https://kubernetes.default.svc.cluster.local".to_owned(),
        kubelet_client_cert: admin_cert.clone(),
        kubelet_client_key: admin_key.clone(),
        kubelet_ca: ca.clone(),
    };
    let started = tokio::time::Instant::now();
    let server = ApiServer::build(config).await?;
    let address = server.addresses()[0];
    for (name, text) in [("ca.crt", &ca), ("admin.crt", &admin_cert), ("admin.key", &admin_key)] {
        std::fs::write(directory.join(name), text)?;
    }
    let kubeconfig = format!(
        "apiVersion: v1\nkind: Config\ncurrent-context: c\n\
         clusters: [{{name: c, cluster: {{server: \"https://{address}\", certificate-authority: ca.crt}}}}]\n\
         users: [{{name: u, user: {{client-certificate: admin.crt, client-key: admin.key}}}}]\n\
         contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\n"
    );
    std::fs::write(directory.join("kubeconfig"), kubeconfig)?;
    println!("https://{address} after {:?}", started.elapsed());
    let stop = CancellationToken::new();
    let signalled = stop.clone();
    tokio::spawn(async move {
        let _ = tokio::signal::ctrl_c().await;
        signalled.cancel();
    });
    server.run(stop).await;
    Ok(())
}
