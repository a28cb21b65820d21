//! Runs the pods of a Job until enough of them have succeeded, or too many have failed.
//!
//! Pods carry a finalizer until they are counted, so that none is lost: first the uids of finished pods go into
//! `status.uncountedTerminatedPods`, then their finalizers come off, then the uids are taken out and added to the
//! numbers. Each of these is a pass of its own, so a crash in between needs no care. Upstream: pkg/controller/job.

mod indexes;
mod plan;
mod policy;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use futures_util::future::join_all;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use minke_api::{Key, Kind, LabelSelector, Object, Status};
use minke_client::{Change, Patch, Target};
use serde_json::{Value, json};

use crate::context::{Ctx, Item, Requeue, Shared, Typed, nonzero};
use crate::pods;
use crate::replicaset::{create_pod, delete_pod, slow_start};
use crate::run::Controller;
pub(crate) use plan::is_finished;
use plan::{Create, FAILURES, FINALIZER, IGNORED_FAILURES, INDEX, Plan, has_finalizer, plan};
use policy::Backoff;

/// Who Jobs are left to that do not say who works on them.
const MANAGER: &str = "kubernetes.io/job-controller";
/// The labels that pods have of their Job's name, and before they had prefixes.
const JOB_NAME: [&str; 2] = ["batch.kubernetes.io/job-name", "job-name"];
/// Longest prefix of a generated name, in bytes.
const PREFIX_MAX: usize = 58;

#[derive(Default)]
pub(crate) struct Jobs {
    /// Failures in a row, by the uid of the Job; what is lost with this is guessed from the pods.
    backoffs: Mutex<HashMap<String, Backoff>>,
    /// Jobs with a selector of the user's own: any pod without an owner may be theirs.
    manual: Mutex<BTreeSet<Key>>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().expect("nothing panics under the small locks of a controller")
}

#[async_trait]
impl Controller for Jobs {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Job>(), Kind::of::<Pod>()]
    }

    fn adopts(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<Pod>()]
    }

    fn items(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        if change.object().kind() == Kind::of::<Job>() {
            return self.items_of_job(ctx, change);
        }
        let states = change.old.iter().chain(&change.new);
        let kind = Kind::of::<Job>();
        let mut items: Vec<Item> = states.filter_map(|pod| Item::controller_of(pod, kind)).collect();
        let Some(pod) = &change.new else { return items };
        if has_finalizer(pod) && owner(ctx, pod).is_none() {
            items.push(Item::of(pod));
        }
        if pod.controller().is_none() && !pod.labels().is_empty() {
            items.extend(self.may_adopt(ctx, pod));
        }
        items
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        if item.kind == Kind::of::<Pod>() {
            return let_go(ctx, item).await;
        }
        let Some(job) = ctx.get::<Job>(&item.key) else { return Ok(Requeue::Never) };
        let Some(selector) = selector(&job).filter(|_| is_ours(&job)) else { return Ok(Requeue::Never) };
        let pods = ctx.claim_holding(&job.object, &selector, Kind::of::<Pod>(), FINALIZER).await?;
        let pods: Vec<Typed<Pod>> = pods.into_iter().filter_map(Typed::new).collect();
        let uid = job.object.uid();
        let backoff = lock(&self.backoffs).get(uid).cloned().unwrap_or_else(|| plan::remembered(&job, &pods));
        let plan = plan(&job, &pods, &backoff, ctx.now());
        let (due, backoff) = (plan.due, plan.backoff.clone());
        carry_out(ctx, &job, &pods, plan).await?;
        match is_finished(&job) {
            true => drop(lock(&self.backoffs).remove(uid)),
            false => drop(lock(&self.backoffs).insert(uid.to_owned(), backoff)),
        }
        Ok(Requeue::at(due, ctx.now()))
    }
}

impl Jobs {
    fn items_of_job(&self, ctx: &Shared, change: &Change) -> Vec<Item> {
        let job = change.object();
        let mut items = vec![Item::of(job)];
        let is_manual = |job: &Job| job.spec.as_ref().is_some_and(|spec| spec.manual_selector == Some(true));
        match change.new.clone().and_then(Typed::<Job>::new) {
            Some(now) if is_manual(&now) => drop(lock(&self.manual).insert(job.key().clone())),
            _ => drop(lock(&self.manual).remove(job.key())),
        }
        if change.new.is_none() {
            // Its pods must not wait to be counted.
            lock(&self.backoffs).remove(job.uid());
            let left = ctx.informers.of(Kind::of::<Pod>()).owned_by(job.uid());
            items.extend(left.iter().filter(|pod| has_finalizer(pod)).map(|pod| Item::of(pod)));
        }
        items
    }

    /// The Jobs that a pod without an owner may belong to.
    fn may_adopt(&self, ctx: &Shared, pod: &Object) -> Vec<Item> {
        let named = JOB_NAME.iter().find_map(|label| pod.labels().get(label));
        let mut keys: BTreeSet<Key> = named.into_iter().map(|name| Key::new(pod.namespace(), name)).collect();
        let first = Key::new(pod.namespace(), "");
        let manual = lock(&self.manual);
        keys.extend(
            manual.range(first.clone()..).take_while(|key| key.namespace == first.namespace).cloned(),
        );
        let jobs = ctx.informers.of(Kind::of::<Job>());
        let wants = |key: &Key| {
            let job = Typed::<Job>::new(jobs.get_key(key)?)?;
            selector(&job)?.matches(pod.labels()).then(|| Item::of(&job.object))
        };
        keys.iter().filter_map(wants).collect()
    }
}

/// Whether the Job is for this controller.
fn is_ours(job: &Job) -> bool {
    let manager = job.spec.as_ref().and_then(|spec| spec.managed_by.as_deref());
    manager.is_none_or(|manager| manager == MANAGER)
}

fn selector(job: &Job) -> Option<LabelSelector> {
    LabelSelector::from_spec(job.spec.as_ref()?.selector.as_ref()?).ok()
}

/// The Job that controls the pod, as far as the cache knows.
fn owner(ctx: &Shared, pod: &Object) -> Option<Typed<Job>> {
    let item = Item::controller_of(pod, Kind::of::<Job>())?;
    let job = Typed::<Job>::new(ctx.informers.of(item.kind).get_key(&item.key)?)?;
    pod.controller().is_some_and(|controller| *controller.uid == *job.object.uid()).then_some(job)
}

/// Takes the finalizer off a pod that no Job will count.
async fn let_go(ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
    let pod = ctx.informer::<Pod>().get_key(&item.key).filter(|pod| has_finalizer(pod));
    let Some(pod) = pod.filter(|pod| owner(ctx, pod).is_none()) else { return Ok(Requeue::Never) };
    if let Some(controller) = pod.controller() {
        let Some(job) = Item::controller_of(&pod, Kind::of::<Job>()) else { return Ok(Requeue::Never) };
        // The cache may not know the Job yet.
        match ctx.client.get(Target::object(job.kind, &job.key.namespace, &job.key.name)).await {
            Ok(live) if *live.uid() == *controller.uid => return Ok(Requeue::Never),
            Ok(_) => {}
            Err(error) if error.is_not_found() => {}
            Err(error) => return Err(error),
        }
    }
    // Should a Job adopt it just now, this must not undo that.
    release(ctx, &pod, json!({ "resourceVersion": pod.revision().to_string() })).await?;
    Ok(Requeue::Never)
}

async fn release(ctx: &Ctx, pod: &Object, mut metadata: Value) -> Result<(), Status> {
    metadata["uid"] = pod.uid().into();
    metadata["$deleteFromPrimitiveList/finalizers"] = json!([FINALIZER]);
    match ctx.patch(Target::of(pod), Patch::Strategic(json!({ "metadata": metadata }))).await {
        Err(error) if !error.is_not_found() => Err(error),
        _ => Ok(()),
    }
}

/// Does all of it that can be done; the first error is told when the rest is done.
async fn carry_out(ctx: &Ctx, job: &Typed<Job>, pods: &[Typed<Pod>], plan: Plan) -> Result<(), Status> {
    let by_uid: BTreeMap<&str, &Object> = pods.iter().map(|pod| (pod.object.uid(), &*pod.object)).collect();
    let find = |uids: &[String]| -> Vec<&Object> {
        uids.iter().filter_map(|uid| by_uid.get(uid.as_str()).copied()).collect()
    };
    let delete = async |pod: &Object| match ctx.is_going(pod) {
        true => Ok(()),
        false => delete_pod(ctx, &job.object, pod).await,
    };
    let discard = async |pod: &Object| {
        if has_finalizer(pod) {
            release(ctx, pod, json!({})).await?;
        }
        delete(pod).await
    };
    let mut done = join_all(find(&plan.discard).into_iter().map(discard)).await;
    done.extend(join_all(find(&plan.stop).into_iter().map(delete)).await);
    done.extend(join_all(find(&plan.release).into_iter().map(|pod| release(ctx, pod, json!({})))).await);
    let made = AtomicUsize::new(0);
    let wanted = plan.create.len();
    let create = async |create: Create| {
        create_pod(ctx, &job.object, pod_of(job, &create)).await?;
        made.fetch_add(1, Ordering::Relaxed);
        Ok(())
    };
    done.push(slow_start(plan.create, create).await);
    let mut status = plan.status;
    let missed = wanted - made.into_inner();
    status.active = nonzero(status.active.unwrap_or(0) - missed as i32);
    if job.status.as_ref() != Some(&status) {
        ctx.update_status(&job.object, &status).await?;
    }
    for told in plan.tell {
        match told.warning {
            true => ctx.events.warning(&job.object, &told.reason, told.message),
            false => ctx.events.normal(&job.object, &told.reason, told.message),
        }
    }
    done.into_iter().collect()
}

/// A pod of the Job.
fn pod_of(job: &Typed<Job>, create: &Create) -> Value {
    let template = job.spec.as_ref().map(|spec| spec.template.clone()).unwrap_or_default();
    let mut pod = pods::from_template(&template, &job.object);
    let finalizers = &mut pod["metadata"]["finalizers"];
    let mut all = finalizers.as_array().cloned().unwrap_or_default();
    if !all.iter().any(|finalizer| finalizer == FINALIZER) {
        all.push(FINALIZER.into());
    }
    *finalizers = all.into();
    let Some(index) = create.index else { return pod };
    let (name, suffix) = (job.object.name(), format!("-{index}-"));
    let prefix: String = name.chars().take(PREFIX_MAX.saturating_sub(suffix.len())).collect();
    pod["metadata"]["generateName"] = format!("{prefix}{suffix}").into();
    pod["metadata"]["annotations"][INDEX] = index.to_string().into();
    pod["metadata"]["labels"][INDEX] = index.to_string().into();
    if let Some((counted, ignored)) = create.failures {
        pod["metadata"]["annotations"][FAILURES] = counted.to_string().into();
        if ignored > 0 {
            pod["metadata"]["annotations"][IGNORED_FAILURES] = ignored.to_string().into();
        }
    }
    pod["spec"]["hostname"] = format!("{name}-{index}").into();
    let field = format!("metadata.labels['{INDEX}']");
    for list in ["containers", "initContainers"] {
        for container in pod["spec"][list].as_array_mut().into_iter().flatten() {
            let env = &mut container["env"];
            let mut all = env.as_array().cloned().unwrap_or_default();
            if !all.iter().any(|var| var["name"] == "JOB_COMPLETION_INDEX") {
                all.push(json!({ "name": "JOB_COMPLETION_INDEX", "valueFrom": { "fieldRef": { "fieldPath": field } } }));
                *env = all.into();
            }
        }
    }
    pod
}
