//! Checks of what Jobs say about the failures and successes of their pods.

use minke_api::{FieldErrors, names};
use serde_json::Value;

use crate::kinds::check::{self, at};
use crate::kinds::tree::Tree;

const RULES_MAX: usize = 20;
const CONDITIONS_MAX: usize = 20;
const CODES_MAX: usize = 255;
/// Longest list of indexes, in bytes.
const INDEXES_MAX: usize = 64 * 1024;
const ACTIONS: [&str; 4] = ["Count", "FailIndex", "FailJob", "Ignore"];

pub fn failure_policy(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let path = at(path, "podFailurePolicy.rules");
    let rules = spec.at("podFailurePolicy").items("rules");
    if rules.len() > RULES_MAX {
        errors.too_many(&path, rules.len(), RULES_MAX);
    }
    let pod = spec.at("template").at("spec");
    let containers = pod.items("containers").iter().chain(pod.items("initContainers"));
    let containers: Vec<&str> = containers.map(|container| container.text("name")).collect();
    for (n, rule) in rules.iter().enumerate() {
        let path = format!("{path}[{n}]");
        let action = at(&path, "action");
        match rule.text("action") {
            "" => errors.required(&action, &format!("valid values: {ACTIONS:?}").replace(',', "")),
            "FailIndex" if !spec.has("backoffLimitPerIndex") => {
                errors.invalid(&action, "FailIndex", "requires the backoffLimitPerIndex to be set");
            }
            known if ACTIONS.contains(&known) => {}
            unknown => errors.not_supported(&action, unknown, &ACTIONS),
        }
        let (codes, conditions) = (rule.at("onExitCodes"), rule.items("onPodConditions"));
        if codes.is_object() {
            exit_codes(codes, &containers, &at(&path, "onExitCodes"), errors);
        }
        pod_conditions(conditions, &at(&path, "onPodConditions"), errors);
        let why = match (codes.is_object(), conditions.is_empty()) {
            (true, false) => "specifying both OnExitCodes and OnPodConditions is not supported",
            (false, true) => "specifying one of OnExitCodes and OnPodConditions is required",
            _ => continue,
        };
        errors.invalid_without_value(&path, why);
    }
}

fn exit_codes(codes: &Value, containers: &[&str], path: &str, errors: &mut FieldErrors) {
    check::one_of(codes, path, "operator", &["In", "NotIn"], errors);
    if let Some(name) = codes.get("containerName").and_then(Value::as_str)
        && !containers.contains(&name)
    {
        let why = "must be one of the container or initContainer names in the pod template";
        errors.invalid(&at(path, "containerName"), name, why);
    }
    let path = at(path, "values");
    let values: Vec<i64> = codes.items("values").iter().filter_map(Value::as_i64).collect();
    if values.is_empty() {
        errors.invalid(&path, codes.at("values"), "at least one value is required");
    } else if values.len() > CODES_MAX {
        errors.too_many(&path, values.len(), CODES_MAX);
    }
    for (n, value) in values.iter().enumerate() {
        let path = format!("{path}[{n}]");
        if *value == 0 && codes.text("operator") == "In" {
            errors.invalid(&path, *value, "must not be 0 for the In operator");
        }
        if values[..n].contains(value) {
            errors.duplicate(&path, *value);
        }
        // Of too many values the first are enough to go by.
        if n > CODES_MAX {
            break;
        }
    }
    if !values.is_sorted() {
        errors.invalid(&path, codes.at("values"), "must be ordered");
    }
}

fn pod_conditions(conditions: &[Value], path: &str, errors: &mut FieldErrors) {
    if conditions.len() > CONDITIONS_MAX {
        errors.too_many(path, conditions.len(), CONDITIONS_MAX);
    }
    for (n, pattern) in conditions.iter().enumerate() {
        let path = format!("{path}[{n}]");
        check::name(pattern.text("type"), &at(&path, "type"), names::qualified_name, errors);
        check::one_of(pattern, &path, "status", &["False", "True", "Unknown"], errors);
    }
}

pub fn success_policy(spec: &Value, path: &str, errors: &mut FieldErrors) {
    let path = at(path, "successPolicy.rules");
    let rules = spec.at("successPolicy").items("rules");
    if rules.is_empty() {
        errors.required(&path, "at least one rules must be specified when the successPolicy is specified");
    } else if rules.len() > RULES_MAX {
        errors.too_many(&path, rules.len(), RULES_MAX);
    }
    let completions = spec.int("completions").unwrap_or_default();
    for (n, rule) in rules.iter().enumerate() {
        let path = format!("{path}[{n}]");
        let (count, indexes) =
            (rule.int("succeededCount"), rule.get("succeededIndexes").and_then(Value::as_str));
        if count.is_none() && indexes.is_none() {
            errors.required(&path, "at least one of succeededCount or succeededIndexes must be specified");
        }
        let mut of_rule = None;
        if let Some(indexes) = indexes {
            let path = at(&path, "succeededIndexes");
            if indexes.len() > INDEXES_MAX {
                errors.too_long(&path, INDEXES_MAX);
            }
            match count_indexes(indexes, completions) {
                Ok(count) => of_rule = Some(count),
                Err(why) => {
                    of_rule = Some(0);
                    errors.invalid(&path, indexes, &format!("error parsing succeededIndexes: {why}"));
                }
            }
        }
        let Some(count) = count else { continue };
        check::not_negative(rule, &path, &["succeededCount"], errors);
        let path = at(&path, "succeededCount");
        if count > completions {
            let why =
                format!("must be less than or equal to {completions} (the number of specified completions)");
            errors.invalid(&path, count, &why);
        }
        if let Some(of_rule) = of_rule.filter(|of_rule| count > *of_rule) {
            let why = format!(
                "must be less than or equal to {of_rule} (the number of indexes in the specified succeededIndexes field)"
            );
            errors.invalid(&path, count, &why);
        }
    }
}

/// How many indexes a text such as `1,3-5` names, or why it is none.
fn count_indexes(text: &str, completions: i64) -> Result<i64, String> {
    if text.is_empty() {
        return Ok(0);
    }
    let number = |text: &str| {
        let number: i64 =
            text.parse().map_err(|_| format!("cannot convert string to integer for index: {text:?}"))?;
        if number >= completions { Err(format!("too large index: {text:?}")) } else { Ok(number) }
    };
    let (mut count, mut last) = (0, None);
    for range in text.split(',') {
        let ends: Vec<&str> = range.split('-').collect();
        if ends.len() > 2 {
            return Err(format!(
                "the fragment {range:?} violates the requirement that an index interval can have at most two parts separated by '-'"
            ));
        }
        let first = number(ends[0])?;
        if let Some(last) = last.filter(|last| *last >= first) {
            return Err(format!("non-increasing order, previous: {last}, current: {first}"));
        }
        let end = match ends.get(1) {
            None => first,
            Some(end) => {
                let end = number(end)?;
                if first >= end {
                    return Err(format!("non-increasing order, previous: {first}, current: {end}"));
                }
                end
            }
        };
        count += end - first + 1;
        last = Some(end);
    }
    Ok(count)
}
