//! What must be the same for a job to go on, or for its results to be those that are asked for.

use serde_json::{Map, Value, json};

use super::data::Dataset;
use super::job::TaskData;

/// What decides the result of a job: all keys of its configuration, the base, the data, the adapter it begins with.
///
/// How often it is saved changes nothing that it computes. Of files the content counts, wherever they are.
pub fn identity(resolved: &Value, base_hash: &str, data: &[TaskData], lineage: &[Value]) -> Value {
    let mut files = Vec::new();
    for task in data {
        for (split, file) in [("train", &task.train), ("valid", &task.valid), ("test", &task.test)] {
            let entry = |file: &Dataset| {
                file_entry(&json!(task.name), &json!(split), &json!(file.path), &json!(file.hash))
            };
            files.extend(file.as_deref().map(entry));
        }
    }
    json!({"config": keys(resolved), "base": base_hash, "data": files, "lineage": lineage})
}

/// The same of a job that has ended, from its manifest.
pub fn identity_of_manifest(manifest: &Value) -> Value {
    let entry = |file: &Value| file_entry(&file["task"], &file["split"], &file["path"], &file["hash"]);
    let files: Vec<Value> = manifest["data"].as_array().into_iter().flatten().map(entry).collect();
    json!({
        "config": keys(&manifest["config"]),
        "base": manifest["base"]["hash"],
        "data": files,
        "lineage": manifest["lineage"],
    })
}

fn file_entry(task: &Value, split: &Value, path: &Value, hash: &Value) -> Value {
    json!({"task": task, "split": split, "path": path, "hash": hash})
}

/// A configuration without what does not decide the result, or stands for the content of files.
fn keys(resolved: &Value) -> Value {
    let mut keys = resolved.as_object().cloned().unwrap_or_default();
    keys.remove("save_every");
    for task in keys.get_mut("task").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(task) = task.as_object_mut() {
            task.retain(|key, _| !["train", "valid", "test"].contains(&key.as_str()));
        }
    }
    Value::Object(keys)
}

/// The first thing that is different, in words; `None` where all is the same.
pub fn difference(before: &Value, now: &Value) -> Option<String> {
    if before["base"] != now["base"] {
        return Some(format!("the base had the hash {} and has {}", before["base"], now["base"]));
    }
    let config = |identity: &Value| identity["config"].as_object().cloned().unwrap_or_default();
    if let Some(difference) = different_key(&config(before), &config(now)) {
        return Some(difference);
    }
    let list = |identity: &Value, key: &str| identity[key].as_array().cloned().unwrap_or_default();
    let (old, new) = (list(before, "data"), list(now, "data"));
    let is_of =
        |file: &Value, other: &Value| file["task"] == other["task"] && file["split"] == other["split"];
    for file in &new {
        let what = format!("`{}` of task {}", file["split"].as_str().unwrap_or_default(), file["task"]);
        match old.iter().find(|other| is_of(file, other)) {
            None => return Some(format!("{what} was absent and is {}", file["path"])),
            Some(other) if other["hash"] != file["hash"] => {
                return Some(format!("{what}, {}, has another content", file["path"]));
            }
            Some(_) => {}
        }
    }
    if let Some(gone) = old.iter().find(|file| !new.iter().any(|other| is_of(file, other))) {
        let split = gone["split"].as_str().unwrap_or_default();
        return Some(format!("`{split}` of task {} was {} and is absent", gone["task"], gone["path"]));
    }
    let hashes = |identity: &Value| {
        list(identity, "lineage").iter().map(|step| step["sha256"].clone()).collect::<Vec<_>>()
    };
    (hashes(before) != hashes(now)).then(|| {
        let start = now["lineage"].as_array().and_then(|lineage| lineage.last());
        format!(
            "the adapter that it begins with, {}, has other weights",
            start.unwrap_or(&Value::Null)["adapter"]
        )
    })
}

fn different_key(before: &Map<String, Value>, now: &Map<String, Value>) -> Option<String> {
    let shown = |value: Option<&Value>| value.map_or_else(|| "absent".to_owned(), Value::to_string);
    let key = now.keys().chain(before.keys()).find(|key| before.get(*key) != now.get(*key))?;
    Some(format!("`{key}` was {} and is {}", shown(before.get(key)), shown(now.get(key))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job() -> Value {
        json!({
            "config": {"lr": 0.1, "epochs": 2},
            "base": "b",
            "data": [{"task": "t", "split": "train", "path": "old.jsonl", "hash": "1"}],
            "lineage": [{"adapter": "a", "sha256": "x"}],
        })
    }

    #[test]
    fn what_differs_is_named_with_both_values() {
        assert_eq!(difference(&job(), &job()), None);
        for (pointer, value, wanted) in [
            ("/base", json!("c"), "the base had the hash \"b\" and has \"c\""),
            ("/config/lr", json!(0.2), "`lr` was 0.1 and is 0.2"),
            ("/data/0/hash", json!("2"), "`train` of task \"t\", \"old.jsonl\", has another content"),
            ("/data/0/split", json!("test"), "`test` of task \"t\" was absent and is \"old.jsonl\""),
            ("/data", json!([]), "`train` of task \"t\" was \"old.jsonl\" and is absent"),
            ("/lineage/0/sha256", json!("y"), "the adapter that it begins with, \"a\", has other weights"),
        ] {
            let mut now = job();
            *now.pointer_mut(pointer).unwrap() = value;
            assert_eq!(difference(&job(), &now).as_deref(), Some(wanted));
        }
        let mut now = job();
        now["config"] = json!({"lr": 0.1, "steps": 2});
        assert_eq!(difference(&job(), &now).as_deref(), Some("`steps` was absent and is 2"));
    }

    #[test]
    fn where_files_are_and_how_often_a_job_is_saved_make_no_difference() {
        let resolved = |path: &str, save_every: u64| json!({"lr": 0.1, "save_every": save_every, "task": [{"name": "t", "train": path, "ratio": 0.5}]});
        let manifest = |resolved: Value| {
            let data = json!([{"task": "t", "split": "train", "path": "x", "hash": "1", "counts": {}}]);
            json!({"config": resolved, "base": {"model": "m", "hash": "b"}, "data": data, "lineage": []})
        };
        let identity = |resolved| identity_of_manifest(&manifest(resolved));
        assert_eq!(difference(&identity(resolved("a", 1)), &identity(resolved("b", 2))), None);
        let other = json!({"lr": 0.1, "task": [{"name": "t", "ratio": 0.25}]});
        let found = difference(&identity(resolved("a", 1)), &identity(other)).unwrap();
        assert!(found.contains("`task` was") && found.contains("0.5") && found.contains("0.25"), "{found}");
    }
}
