//! Fills the rules of aggregated ClusterRoles from the roles that their labels select.
//!
//! Upstream: pkg/controller/clusterroleaggregation.

use async_trait::async_trait;
use k8s_openapi::api::rbac::v1::{ClusterRole, PolicyRule};
use minke_api::{ApiType, Kind, LabelSelector, Status};
use minke_client::{Change, Target};

use crate::context::{Ctx, Item, Requeue, Shared, Typed};
use crate::run::Controller;

/// The rules of `role`: those of the roles it selects, in order of name, each once.
fn rules(role: &Typed<ClusterRole>, roles: &[Typed<ClusterRole>]) -> Option<Vec<PolicyRule>> {
    let selectors = role.aggregation_rule.as_ref()?.cluster_role_selectors.as_ref()?;
    let mut rules: Vec<PolicyRule> = Vec::new();
    for selector in selectors.iter().filter_map(|selector| LabelSelector::from_spec(selector).ok()) {
        let others = roles.iter().filter(|other| other.object.name() != role.object.name());
        for rule in others
            .filter(|other| selector.matches(other.object.labels()))
            .flat_map(|o| o.rules.iter().flatten())
        {
            if !rules.contains(rule) {
                rules.push(rule.clone());
            }
        }
    }
    Some(rules)
}

pub(crate) struct Aggregation;

#[async_trait]
impl Controller for Aggregation {
    fn watches(&self) -> Vec<&'static Kind> {
        vec![Kind::of::<ClusterRole>()]
    }

    fn items(&self, ctx: &Shared, _: &Change) -> Vec<Item> {
        let roles = ctx.informers.of_type::<ClusterRole>().snapshot();
        let typed = roles.values().cloned().filter_map(Typed::<ClusterRole>::new);
        typed.filter(|role| role.aggregation_rule.is_some()).map(|role| Item::of(&role.object)).collect()
    }

    async fn reconcile(&self, ctx: &Ctx, item: &Item) -> Result<Requeue, Status> {
        let Some(role) = ctx.get::<ClusterRole>(&item.key) else { return Ok(Requeue::Never) };
        let all = ctx.informer::<ClusterRole>().snapshot();
        let all: Vec<Typed<ClusterRole>> = all.values().cloned().filter_map(Typed::new).collect();
        let Some(rules) = rules(&role, &all) else { return Ok(Requeue::Never) };
        if role.rules.clone().unwrap_or_default() != rules {
            let mut new = role.object.value();
            new["rules"] = rules.to_value();
            ctx.update(Target::of(&role.object), new).await?;
        }
        Ok(Requeue::Never)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn role(name: &str, value: Value) -> Typed<ClusterRole> {
        let mut value = value;
        value["metadata"]["name"] = name.into();
        Typed::new(minke_api::Object::from_value(Kind::of::<ClusterRole>(), &value).unwrap().into()).unwrap()
    }

    #[test]
    fn rules_of_selected_roles_come_together_once() {
        let rule = |verb: &str| json!({"apiGroups": [""], "resources": ["pods"], "verbs": [verb]});
        let labels = json!({"labels": {"to": "view"}});
        let roles = [
            role("a", json!({"metadata": labels, "rules": [rule("get")]})),
            role("b", json!({"metadata": labels, "rules": [rule("get"), rule("list")]})),
            role("c", json!({"rules": [rule("delete")]})),
            role(
                "view",
                json!({"metadata": labels, "rules": [rule("old")], "aggregationRule":
                {"clusterRoleSelectors": [{"matchLabels": {"to": "view"}}]}}),
            ),
        ];
        let verbs =
            |rules: Vec<PolicyRule>| rules.into_iter().flat_map(|rule| rule.verbs).collect::<Vec<_>>();
        assert_eq!(verbs(rules(&roles[3], &roles).unwrap()), ["get", "list"]);
        assert_eq!(rules(&roles[0], &roles), None);
    }
}
