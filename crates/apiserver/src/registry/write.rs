//! Create and update: the fixed order of a write.
//!
//! Decode, default, admit (mutate), prepare, validate, admit (validate), store. What is read to decide is
//! what the store then expects to find, so that two writers never overwrite each other unseen.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::{Namespace, Pod, ServiceAccount};
use minke_api::{Draft, FieldErrors, Key, Kind, Object, Status, schema};
use minke_store::{Change, Error, Op};
use serde_json::Value;

use super::body::{self, Body, Expected};
use super::{Call, Registry, Written, convert, meta, store_status};
use crate::admission::quota::{self, Charges};
use crate::admission::{self, Operation};
use crate::allocate::Allocation;
use crate::kinds::tree::Tree;
use crate::strategy::{Strategy, strategy};
use crate::{token_secrets, validation};

/// How often a generated name is tried.
const TRIES: usize = 8;
/// How often a write that names no revision is tried on an object that changes meanwhile. Each time that one loses, another has
/// won, so this ends; upstream tries until the request times out.
pub(super) const RACES: usize = 1000;
/// The longest that a new pod waits for its service account: in a new namespace it is just being made.
const ACCOUNT_PATIENCE: Duration = Duration::from_secs(1);
const MIRROR: &str = "kubernetes.io/config.mirror";

/// What of an object an update is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// Everything but what belongs to another part.
    Main,
    Status,
    /// A part that was already merged into the stored object by its subresource.
    Merged,
}

/// Why an update did not happen.
pub enum Failure {
    /// Someone else was faster; what they wrote may be read and the update tried again.
    Raced,
    Status(Box<Status>),
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure::Status(Box::new(status))
    }
}

impl Registry {
    /// Creates an object in a collection.
    pub async fn create(&self, call: &Call<'_>, body: Body) -> Result<Written, Status> {
        let mut warnings = Vec::new();
        let body = body::check(Expected::object(call.kind), body, call.validation, &mut warnings)?;
        self.create_checked(call, body, warnings).await
    }

    async fn create_checked(
        &self,
        call: &Call<'_>,
        body: Value,
        mut warnings: Vec<String>,
    ) -> Result<Written, Status> {
        let kind = call.kind.storage();
        let mut body = convert::to_storage(call.kind, body);
        meta::place(call, &mut body)?;
        if body.at("metadata").has("resourceVersion") {
            return Err(Status::failure(
                500,
                "",
                "resourceVersion should not be set on objects to be created",
            ));
        }
        self.await_account(call, &body).await;
        let generated = !body.at("metadata").has("name") && body.at("metadata").has("generateName");
        for attempt in 0.. {
            let mut value = body.clone();
            if generated {
                let name = meta::generate_name(body.at("metadata").text("generateName"));
                value.object("metadata").set("name", name);
            }
            let (draft, allocation, charges) = self.prepare_create(call, kind, value, &mut warnings)?;
            let name = draft.key().name.clone();
            if call.dry_run {
                if self.store.get(kind, draft.key()).is_some() {
                    return Err(Status::already_exists(call.kind, &name));
                }
                let object = convert::view(call.kind, &Arc::new(draft.seal(minke_api::Revision(0))));
                return Ok(Written { object, created: true, warnings });
            }
            let ops = std::iter::once(Op::create(draft)).chain(charges.ops()).collect();
            match self.store.commit(ops).await {
                Ok(written) => {
                    self.recount_missed(&charges, call.namespace).await;
                    if let Some(allocation) = allocation {
                        allocation.commit();
                    }
                    let object = convert::view(call.kind, &written[0]);
                    return Ok(Written { object, created: true, warnings });
                }
                Err(Error::Conflict { op, current }) if op > 0 => {
                    return Err(charges.refusal(op - 1, current.as_ref(), call.kind, &name));
                }
                Err(Error::Conflict { .. }) if generated && attempt < TRIES => {}
                Err(Error::Conflict { .. }) => {
                    let mut status = Status::already_exists(call.kind, &name);
                    if generated {
                        status.message +=
                            ", the server was not able to generate a unique name for the object";
                    }
                    return Err(status);
                }
                Err(error) => return Err(store_status(error, call.kind, &name)),
            }
        }
        unreachable!("the last attempt returns")
    }

    /// All that happens to a new object before it is stored.
    fn prepare_create(
        &self,
        call: &Call<'_>,
        kind: &'static Kind,
        mut value: Value,
        warnings: &mut Vec<String>,
    ) -> Result<(Draft, Option<Allocation>, Charges), Status> {
        let strategy = strategy(kind);
        let given_uid = call.dry_run.then(|| value.at("metadata").text("uid").to_owned());
        let uid = given_uid.filter(|uid| !uid.is_empty()).unwrap_or_else(|| uuid::Uuid::new_v4().to_string());
        meta::for_create(&mut value, uid, self.now());
        // Nodes come with the status that their kubelet gave them.
        if kind.subresource("status").is_some() && kind.kind != "Node" {
            value.unset("status");
        }
        (strategy.set_defaults)(&mut value);
        if kind.kind == "Secret" {
            token_secrets::fill(&self.tokens, &*self.snapshots, &self.ca, &mut value);
        }
        let name = value.at("metadata").text("name").to_owned();
        let admission = self.admission();
        let request = call.admission(Operation::Create, &name, None);
        warnings.extend(admission::mutate(&admission, &request, &mut value)?);
        (strategy.prepare_create)(&mut value);
        if strategy.generation {
            value.object("metadata").set("generation", 1);
        }
        let allocation = self.allocate(kind, &mut value, None)?;
        let mut errors = FieldErrors::default();
        validation::validate_metadata(value.at("metadata"), kind.namespaced, strategy.name, &mut errors);
        (strategy.validate)(&value, &mut errors);
        errors.into_result(kind, &name)?;
        warnings.extend((strategy.warnings)(&value));
        warnings.extend(admission::validate(&admission, &request, &value)?);
        let charges = quota::charges(&*self.snapshots, &request, None, Some(&value), self.now())?;
        Ok((encode(kind, &mut value)?, allocation, charges))
    }

    /// Waits a little for the service account of a new pod, if its namespace is there and it is not.
    async fn await_account(&self, call: &Call<'_>, pod: &Value) {
        if call.kind != Kind::of::<Pod>() || pod.at("metadata").at("annotations").has(MIRROR) {
            return;
        }
        let spec = pod.at("spec");
        let given = [spec.text("serviceAccountName"), spec.text("serviceAccount"), "default"];
        let name = given.into_iter().find(|name| !name.is_empty()).unwrap_or_default();
        let (accounts, key) = (Kind::of::<ServiceAccount>(), Key::new(call.namespace, name));
        if self.store.get(accounts, &key).is_some() {
            return;
        }
        let namespace = self.store.get(Kind::of::<Namespace>(), &Key::new("", call.namespace));
        if namespace.is_none_or(|namespace| namespace.deleted().is_some()) {
            return;
        }
        let (found, mut changes) = self.store.snapshot_and_watch(accounts);
        let made = async {
            let mut there = found.objects.contains_key(&key);
            while !there && let Ok(events) = changes.next().await {
                there =
                    events.iter().any(|event| event.change == Change::Added && *event.object.key() == key);
            }
        };
        // Admission says what is missing.
        let _ = tokio::time::timeout(ACCOUNT_PATIENCE, made).await;
    }

    /// Has the quotas counted anew that a write went past.
    pub(super) async fn recount_missed(&self, charges: &Charges, namespace: &str) {
        let missed = charges.missed(&*self.snapshots, namespace);
        // Should this fail, the next count puts it right.
        if !missed.is_empty()
            && let Err(error) = self.store.commit(missed).await
        {
            tracing::warn!(namespace, %error, "A quota is not counted anew");
        }
    }

    /// Gives a Service the addresses and ports that it needs; they go back unless the allocation is committed.
    fn allocate(
        &self,
        kind: &'static Kind,
        value: &mut Value,
        old: Option<&Value>,
    ) -> Result<Option<Allocation>, Status> {
        if (kind.group, kind.kind) != ("", "Service") {
            return Ok(None);
        }
        self.allocator.allocate(value, old).map(Some)
    }

    /// Replaces an object, or a part of it.
    pub async fn update(&self, call: &Call<'_>, part: Part, body: Body) -> Result<Written, Status> {
        let mut warnings = Vec::new();
        let body = body::check(Expected::object(call.kind), body, call.validation, &mut warnings)?;
        let mut body = convert::to_storage(call.kind, body);
        meta::place(call, &mut body)?;
        check_name(call, &mut body)?;
        for attempt in 0.. {
            let old = match self.stored(call) {
                Ok(old) => old,
                Err(missing) => {
                    let creates = part == Part::Main && strategy(call.kind.storage()).create_on_update;
                    // A body with a uid means one object in particular, which is gone.
                    if !creates || body.at("metadata").has("uid") {
                        return Err(missing);
                    }
                    body.object("metadata").unset("resourceVersion");
                    let body = convert::from_storage(call.kind, body);
                    return self.create_checked(call, body, warnings).await;
                }
            };
            check_revision(call, &body, &old)?;
            let unconditional = !body.at("metadata").has("resourceVersion");
            match self.replace(call, part, &old, body.clone(), &mut warnings).await {
                Ok(object) => {
                    let object = convert::view(call.kind, &object);
                    return Ok(Written { object, created: false, warnings });
                }
                Err(Failure::Raced) if unconditional && attempt < RACES => warnings.clear(),
                Err(Failure::Raced) => return Err(Status::modified(call.kind, call.name)),
                Err(Failure::Status(status)) => return Err(*status),
            }
        }
        unreachable!("the last attempt returns")
    }

    /// Makes `new`, in storage form, of `old`; or removes the object, when nothing keeps it any more.
    /// Returns the object as it is then.
    pub(super) async fn replace(
        &self,
        call: &Call<'_>,
        part: Part,
        old: &Arc<Object>,
        mut new: Value,
        warnings: &mut Vec<String>,
    ) -> Result<Arc<Object>, Failure> {
        let kind = old.kind();
        let strategy = strategy(kind);
        let old_value = old.value();
        meta::for_update(kind, &mut new, &old_value)?;
        match part {
            Part::Main if kind.subresource("status").is_some() => meta::copy("status", &old_value, &mut new),
            Part::Main | Part::Merged => {}
            Part::Status => new = only_status(new, &old_value),
        }
        let admission = self.admission();
        let request = call.admission(Operation::Update, old.name(), Some(&old_value));
        // Nothing in the status of a Pod has a default, and no part of any object is written as often.
        if part != Part::Status || kind.kind != "Pod" {
            (strategy.set_defaults)(&mut new);
        }
        if kind.kind == "Secret" {
            token_secrets::fill(&self.tokens, &*self.snapshots, &self.ca, &mut new);
        }
        warnings.extend(admission::mutate(&admission, &request, &mut new)?);
        if part != Part::Status {
            if part == Part::Main {
                (strategy.prepare_update)(&mut new, &old_value);
            }
            if strategy.generation {
                meta::bump_generation(&mut new, &old_value);
            }
        }
        let allocation = match part {
            Part::Main => self.allocate(kind, &mut new, Some(&old_value))?,
            _ => None,
        };
        let mut errors = FieldErrors::default();
        validation::validate_metadata(new.at("metadata"), kind.namespaced, strategy.name, &mut errors);
        validation::validate_metadata_update(new.at("metadata"), old_value.at("metadata"), &mut errors);
        if part != Part::Status {
            (strategy.validate)(&new, &mut errors);
        }
        if part == Part::Main {
            (strategy.validate_update)(&new, &old_value, &mut errors);
        }
        errors.into_result(kind, old.name())?;
        if part == Part::Main {
            warnings.extend((strategy.warnings)(&new));
        }
        warnings.extend(admission::validate(&admission, &request, &new)?);
        let gone = meta::is_finished(kind, &new);
        let left = (!gone).then_some(&new);
        let charges = quota::charges(&*self.snapshots, &request, Some(&old_value), left, self.now())?;
        let draft = encode(kind, &mut new)?;
        if !gone && draft.same_as(old) {
            return Ok(old.clone());
        }
        if call.dry_run {
            return Ok(Arc::new(draft.seal(old.revision())));
        }
        let op = if gone { Op::delete(old) } else { Op::replace(draft, old) };
        let object = self.commit_charged(kind, old, op, &charges).await?;
        if let Some(allocation) = allocation {
            allocation.commit();
        }
        if gone {
            self.release(old);
        }
        Ok(object)
    }

    /// Takes back what a deleted Service had.
    pub(super) fn release(&self, gone: &Object) {
        if (gone.kind().group, gone.kind().kind) == ("", "Service") {
            self.allocator.release(&gone.value());
        }
    }

    /// Commits one operation on what was read as `old`, and what it changes in quotas.
    pub(super) async fn commit_charged(
        &self,
        kind: &'static Kind,
        old: &Object,
        op: Op,
        charges: &Charges,
    ) -> Result<Arc<Object>, Failure> {
        let ops = std::iter::once(op).chain(charges.ops()).collect();
        match self.store.commit(ops).await {
            Ok(mut written) => {
                self.recount_missed(charges, old.namespace()).await;
                Ok(written.remove(0))
            }
            Err(Error::Conflict { op: 0, .. }) => Err(Failure::Raced),
            Err(Error::Conflict { op, current }) => {
                Err(charges.refusal(op - 1, current.as_ref(), kind, old.name()).into())
            }
            Err(error) => Err(store_status(error, kind, old.name()).into()),
        }
    }

    /// Commits one operation that depends on what was read.
    pub(super) async fn commit_one(
        &self,
        kind: &'static Kind,
        name: &str,
        op: Op,
    ) -> Result<Arc<Object>, Failure> {
        match self.store.commit(vec![op]).await {
            Ok(mut written) => Ok(written.remove(0)),
            Err(Error::Conflict { .. }) => Err(Failure::Raced),
            Err(error) => Err(store_status(error, kind, name).into()),
        }
    }
}

/// The stored form of a finished tree.
pub(super) fn encode(kind: &'static Kind, value: &mut Value) -> Result<Draft, Status> {
    if let Some(ty) = schema::of(kind.group, kind.version, kind.kind) {
        schema::complete(ty, value);
    }
    Draft::new(kind, value).map_err(Status::internal)
}

/// The name in the body is that of the URL, or missing.
fn check_name(call: &Call<'_>, body: &mut Value) -> Result<(), Status> {
    let metadata = body.object("metadata");
    match metadata.text("name") {
        "" => metadata.set("name", call.name),
        same if same == call.name => {}
        other => {
            return Err(Status::bad_request(format!(
                "the name of the object ({other}) does not match the name on the URL ({})",
                call.name
            )));
        }
    }
    Ok(())
}

/// The revision in the body, if there must be one or is one, is that of the object.
fn check_revision(call: &Call<'_>, body: &Value, old: &Object) -> Result<(), Status> {
    let given = body.at("metadata").text("resourceVersion");
    if given.is_empty() {
        let Strategy { unconditional_update, .. } = strategy(old.kind());
        if *unconditional_update {
            return Ok(());
        }
        let mut errors = FieldErrors::default();
        errors.invalid("metadata.resourceVersion", 0, "must be specified for an update");
        return errors.into_result(old.kind(), call.name);
    }
    match given.parse::<minke_api::Revision>() {
        Ok(revision) if revision == old.revision() => Ok(()),
        Ok(_) => Err(Status::modified(call.kind, call.name)),
        Err(_) => {
            let mut errors = FieldErrors::default();
            errors.invalid("metadata.resourceVersion", given, "must be a number");
            errors.into_result(old.kind(), call.name)
        }
    }
}

/// The old object with the new one's status, and the metadata that may come with it.
fn only_status(mut new: Value, old: &Value) -> Value {
    let mut merged = old.clone();
    meta::copy("status", &new, &mut merged);
    if let Some(mut metadata) = new.unset("metadata") {
        meta::copy("ownerReferences", old.at("metadata"), &mut metadata);
        merged.set("metadata", metadata);
    }
    merged
}
