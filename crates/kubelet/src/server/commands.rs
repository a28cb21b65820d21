//! What may be done to a container besides exec and attach: a command whose output is the answer, and a checkpoint.

use std::sync::Arc;
use std::time::Duration;

use http::{Response, StatusCode};
use minke_runtime::ContainerState;

use super::Api;
use super::routes::{Body, Found, Query, text};

/// Runs `cmd`, whose words are parted by blanks, to its end.
pub async fn run(api: &Arc<Api>, found: &Found, name: &str, query: &Query) -> Response<Body> {
    let failed = |why: String| text(StatusCode::INTERNAL_SERVER_ERROR, why);
    let containers = found.containers(api, name).await;
    let Some(container) = containers.into_iter().find(|c| c.state == ContainerState::Running) else {
        return failed(format!("container not found (\"{name}\")"));
    };
    let command = query.get("cmd").unwrap_or_default();
    let argv: Vec<String> = command.split(' ').map(str::to_owned).collect();
    match api.context.runtime.exec_sync(&container.id, argv, Duration::ZERO).await {
        Ok(done) if done.exit_code == 0 => {
            let output = [done.stdout, done.stderr].concat();
            text(StatusCode::OK, String::from_utf8_lossy(&output).into_owned())
        }
        Ok(done) => {
            let stderr = String::from_utf8_lossy(&done.stderr);
            failed(format!("command '{command}' exited with {}: {stderr}", done.exit_code))
        }
        Err(error) => failed(error.to_string()),
    }
}

/// There are no checkpoints here: says so, once it is clear that there would be something to keep.
pub fn checkpoint(
    found: Option<&Found>,
    namespace: &str,
    pod: &str,
    name: &str,
    query: &Query,
) -> Response<Body> {
    let missing = |why: String| text(StatusCode::NOT_FOUND, why);
    let Some(found) = found else { return missing("pod does not exist".to_owned()) };
    if found.pod.container(name).is_none() {
        return missing(format!("container {name} does not exist"));
    }
    if query.all("timeout").last().is_some_and(|timeout| timeout.parse::<i64>().is_err()) {
        return missing("cannot parse value of timeout parameter".to_owned());
    }
    let why = "the container runtime does not support checkpoints";
    text(
        StatusCode::INTERNAL_SERVER_ERROR,
        format!("checkpointing of {namespace}/{pod}/{name} failed ({why})"),
    )
}
