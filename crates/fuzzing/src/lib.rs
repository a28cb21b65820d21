//! A function for each decoder of bytes from outside: it panics when the decoder does something wrong.
//!
//! `fuzz/` gives each to libFuzzer; the test of this crate feeds each with `fuzz/corpus/<name>`, and with what
//! becomes of those files by small damage, so that a plain `cargo test` sees what a fuzzer once found.
#![forbid(unsafe_code)]

mod api;
mod images;
mod node;

/// A target: its name, which is that of its corpus, and what to do with an input.
pub type Target = (&'static str, fn(&[u8]));

pub const TARGETS: &[Target] = &[
    ("certificate", minke_apiserver::fuzzing::certificate),
    ("dns", node::dns),
    ("dockerfile", images::dockerfile),
    ("image_archive", images::archive),
    ("json", api::json),
    ("json_patch", api::json_patch),
    ("kubeconfig", node::kubeconfig),
    ("layer", images::layer),
    ("log_file", minke_kubelet::fuzzing::log_file),
    ("netlink", minke_network::fuzzing::datagram),
    ("passwd", minke_runtime::fuzzing::passwd),
    ("protobuf", api::protobuf),
    ("pull_secret", minke_kubelet::fuzzing::pull_secret),
    ("quantity", api::quantity),
    ("reference", minke_runtime::fuzzing::reference),
    ("registry_text", minke_runtime::fuzzing::registry_text),
    ("request_target", minke_apiserver::fuzzing::request_target),
    ("selectors", api::selectors),
    ("shim_socket", minke_runtime::fuzzing::shim_socket),
    ("spdy_frame", minke_kubelet::fuzzing::spdy_frame),
    ("spdy_session", minke_kubelet::fuzzing::spdy_session),
    ("state_file", minke_runtime::fuzzing::state_file),
    ("strategic_patch", api::strategic_patch),
    ("token", minke_apiserver::fuzzing::token),
    ("websocket", minke_kubelet::fuzzing::websocket),
    ("yaml", api::yaml),
];

/// Runs one input through the target called `name`.
pub fn run(name: &str, data: &[u8]) {
    let target = TARGETS.iter().find(|(known, _)| *known == name);
    let (_, target) = target.unwrap_or_else(|| panic!("there is no target {name}"));
    target(data);
}
