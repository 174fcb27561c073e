//! `loramux merge` and the merged models and adapters it writes.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::forward::{LONGEST, entries, load, logits};
use common::program::{Ran, command, copy_folder, finish, loramux};
use common::{Case, FAMILIES, VARIANTS, repository};
use loramux::adapter::merge::weights::{Change, merge, unmerge};
use loramux::adapter::merge::{MergeOptions, Method, Part, merge_adapters};
use loramux::adapter::peft::{Limits, read_adapter};
use loramux::adapter::{Adapter, Site, SiteAdapter};
use loramux::backend::cpu::Cpu;
use loramux::format::read_json;
use loramux::format::safetensors::SafetensorsFile;
use loramux::model::{Base, MergedBase, Transformer};
use loramux::tensor::{DType, Tensor};
use serde_json::Value;
use tempfile::TempDir;

/// Largest difference of logits between a merged model in float32 and the base with the adapter, over the largest logit.
const TOLERANCE: f32 = 1e-5;

fn read(base: &Base, folder: &Path) -> Adapter {
    let limits = Limits { max_rank: 512 };
    read_adapter(folder, &base.checkpoint.sites().table, &base.checkpoint, limits).unwrap()
}

/// Logits of each prompt by the model in a folder, without an adapter.
fn logits_of(folder: &Path, prompts: &[Vec<u32>]) -> Vec<Vec<f32>> {
    let base = Base::open(folder).unwrap();
    let mut backend = Cpu::new(Some(2)).unwrap();
    let transformer = Transformer::new(&mut backend, &base.config, &base.checkpoint, LONGEST).unwrap();
    prompts.iter().map(|prompt| logits(&mut backend, &transformer, &[(&[], prompt)]).remove(0)).collect()
}

/// Largest difference, relative to the largest value where that is over 1.
fn difference(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    let largest = |values: &mut dyn Iterator<Item = f32>| {
        values.fold(0.0, |worst: f32, next| if next > worst || next.is_nan() { next } else { worst })
    };
    let off = largest(&mut one.iter().zip(other).map(|(one, other)| (one - other).abs()));
    off / largest(&mut other.iter().map(|value| value.abs())).max(1.0)
}

fn merged<'a>(base: &'a Base, parts: &[(&'a Adapter, f64)]) -> MergedBase<'a> {
    let mut merged = MergedBase::new(base);
    parts.iter().for_each(|(adapter, weight)| merged.add("it", adapter, *weight).unwrap());
    merged
}

fn write_merged(base: &Base, parts: &[(&Adapter, f64)], dtype: Option<DType>) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    merged(base, parts).write(folder.path(), dtype).unwrap();
    folder
}

/// All tensors of a model folder by name.
fn tensors(folder: &Path) -> BTreeMap<String, Tensor> {
    let files = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = files.filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"));
    files
        .map(|path| SafetensorsFile::read(&path).unwrap())
        .flat_map(|file| {
            file.names().map(|name| (name.to_owned(), file.tensor(name).unwrap())).collect::<Vec<_>>()
        })
        .collect()
}

fn file_names(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut names: Vec<String> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn has_bias_where_the_base_has_none(adapter: &Adapter, base: &Base) -> bool {
    let sites = &base.checkpoint.sites().table;
    adapter.sites.iter().any(|adapted| adapted.bias.is_some() && !sites.get(adapted.site).bias)
}

#[test]
fn a_merged_model_computes_what_the_base_computes_with_the_adapter() {
    let mut skipped = Vec::new();
    for name in FAMILIES.into_iter().chain(VARIANTS) {
        let case = Case::open(name);
        let base = Base::open(&case.model()).unwrap();
        let mut backend = Cpu::new(Some(2)).unwrap();
        let transformer = load(&case, &mut backend);
        let prompts: Vec<Vec<u32>> = case.prompts().into_iter().take(2).collect();
        let plain = logits_of(&case.model(), &prompts);
        for (slot, adapter) in case.adapters().iter().enumerate().skip(1) {
            let read = read(&base, &case.adapter_folder(adapter));
            if has_bias_where_the_base_has_none(&read, &base) {
                skipped.push(adapter.clone());
                continue;
            }
            let folder = write_merged(&base, &[(&read, 1.0)], Some(DType::F32));
            let got = logits_of(folder.path(), &prompts);
            for ((prompt, got), plain) in prompts.iter().zip(got).zip(&plain) {
                let wanted = logits(&mut backend, &transformer, &[(&entries(slot), prompt)]).remove(0);
                let off = difference(&got, &wanted);
                assert!(off <= TOLERANCE, "{name} {adapter}: logits are off by {off}");
                assert!(difference(&got, plain) > 100.0 * TOLERANCE, "{name} {adapter}: nothing was merged");
            }
        }
    }
    assert_eq!(skipped, ["bias-all-lora-bias", "lora-bias-rslora"], "there is no bias to merge theirs into");
}

#[test]
fn adapters_merged_by_weight_compute_what_they_compute_mixed() {
    let case = Case::open("qwen2");
    let base = Base::open(&case.model()).unwrap();
    let mut backend = Cpu::new(Some(2)).unwrap();
    let transformer = load(&case, &mut backend);
    let slot = |name: &str| case.adapters().iter().position(|other| other == name).unwrap() as u32;
    let names = ["all-r8", "rslora-r16", "last-layer"];
    let weights = [0.75f32, -0.5, 1.5];
    let adapters = names.map(|name| read(&base, &case.adapter_folder(name)));
    let parts: Vec<(&Adapter, f64)> = adapters.iter().zip(weights.map(f64::from)).collect();
    let folder = write_merged(&base, &parts, Some(DType::F32));
    let gates: Vec<(u32, f32)> = names.iter().map(|name| slot(name)).zip(weights).collect();
    for prompt in case.prompts() {
        let wanted = logits(&mut backend, &transformer, &[(&gates, &prompt)]).remove(0);
        let off = difference(&logits_of(folder.path(), std::slice::from_ref(&prompt))[0], &wanted);
        assert!(off <= TOLERANCE, "logits are off by {off}");
    }
}

#[test]
fn a_merged_model_lies_on_disk_as_the_base_does() {
    for (name, adapter, dtype) in [
        ("phi3-su", "regex-targets", DType::BF16),
        ("qwen2-windows", "bias-lora-only", DType::F16),
        ("mistral", "saved-head", DType::F32),
    ] {
        let case = Case::open(name);
        let base = Base::open(&case.model()).unwrap();
        let adapter = read(&base, &case.adapter_folder(adapter));
        let folder = write_merged(&base, &[(&adapter, 1.0)], None);
        assert_eq!(file_names(folder.path()), file_names(&case.model()), "{name}");
        let index = |folder: &Path| match folder.join("model.safetensors.index.json") {
            path if path.exists() => read_json(&path).unwrap(),
            _ => Value::Null,
        };
        assert_eq!(index(folder.path())["weight_map"], index(&case.model())["weight_map"], "{name}");
        let config = |folder: &Path| read_json(&folder.join("config.json")).unwrap();
        assert_eq!(config(folder.path()), config(&case.model()), "{name}");

        let exact = write_merged(&base, &[(&adapter, 1.0)], Some(DType::F32));
        let written = config(exact.path());
        assert_eq!(written.get("dtype").or(written.get("torch_dtype")).unwrap(), "float32");
        let (before, after, exact) = (tensors(&case.model()), tensors(folder.path()), tensors(exact.path()));
        assert!(before.keys().eq(after.keys()) && before.keys().eq(exact.keys()), "{name}");
        let mut unchanged = 0;
        for (tensor, after) in &after {
            assert_eq!((after.dtype(), after.shape()), (dtype, before[tensor].shape()), "{name} {tensor}");
            unchanged += usize::from(after.bytes()[..] == before[tensor].bytes()[..]);
            let places = if dtype == DType::BF16 { 8 } else { 11 };
            for (after, exact) in after.to_f32().into_iter().zip(exact[tensor].to_f32()) {
                assert!((after - exact).abs() <= exact.abs() * 0.5f32.powi(places) + 1e-7, "{name} {tensor}");
            }
        }
        assert!(unchanged > 0 && unchanged < after.len(), "{name}: {unchanged} tensors are the base's");
        assert!(Base::open(folder.path()).unwrap().checkpoint.unused().is_empty());
    }
}

#[test]
fn tied_embeddings_come_apart_where_an_adapter_changes_one_end() {
    let case = Case::open("llama-linear");
    let base = Base::open(&case.model()).unwrap();
    let named = |name: &str| read(&base, &case.adapter_folder(name));
    let mut head = named("saved-both");
    head.saved_modules.retain(|saved| saved.site == base.checkpoint.sites().lm_head);
    let mut backend = Cpu::new(Some(2)).unwrap();
    let mut transformer = load(&case, &mut backend);
    let (prompts, free) = (case.prompts(), case.adapters().len());
    for (adapter, unties) in [
        (&named("head-full-names"), true),
        (&named("saved-both"), true),
        (&head, true),
        (&named("pattern-regex"), false),
    ] {
        let folder = write_merged(&base, &[(adapter, 1.0)], Some(DType::F32));
        assert_eq!(merged(&base, &[(adapter, 1.0)]).unties(), unties);
        let config = read_json(&folder.path().join("config.json")).unwrap();
        assert_eq!(config["tie_word_embeddings"], !unties);
        assert_eq!(tensors(folder.path()).contains_key("lm_head.weight"), unties);
        transformer.load_adapter(&mut backend, free, adapter, &base.checkpoint).unwrap();
        let gates = [(free as u32, 1.0)];
        let wanted = logits(&mut backend, &transformer, &[(&gates, &prompts[0])]).remove(0);
        transformer.unload_adapter(&mut backend, free).unwrap();
        let off = difference(&logits_of(folder.path(), &prompts[..1])[0], &wanted);
        assert!(off <= TOLERANCE, "logits are off by {off}");
    }
}

#[test]
fn unmerging_gives_the_base_back() {
    for (name, names) in
        [("llama", ["dora-r8", "all-r8", "head"]), ("phi3", ["rslora-r16", "dora-r8", "pattern"])]
    {
        let case = Case::open(name);
        let base = Base::open(&case.model()).unwrap();
        let adapters = names.map(|name| read(&base, &case.adapter_folder(name)));
        for (site, Site { kind, module, .. }) in base.checkpoint.sites().table.iter() {
            let at_site =
                |adapter: &'_ Adapter| adapter.sites.iter().position(|adapted| adapted.site == site);
            let here = adapters.iter().zip([1.0, 0.5, -0.25]);
            let here: Vec<(&SiteAdapter, f64)> = here
                .filter_map(|(adapter, weight)| Some((&adapter.sites[at_site(adapter)?], weight)))
                .collect();
            let changes: Vec<_> =
                here.iter().map(|&(adapter, weight)| (Change::Add(adapter), weight)).collect();
            let weight = base.checkpoint.site_weight(site).unwrap();
            let (merged, norms) = merge(&weight, *kind, &changes, DType::F32);
            let back = unmerge(&merged, *kind, &here, &norms, DType::F32);
            let off = difference(&back.to_f32(), &weight.to_f32());
            assert!(off <= 1e-6, "{name} {module}: off by {off}");
            let moved = difference(&merged.to_f32(), &weight.to_f32());
            assert!(here.is_empty() || moved > 1e-3, "{name} {module}: moved by {moved}");
        }
    }
}

#[test]
fn a_merge_that_cannot_be_stored_is_refused() {
    let case = Case::open("mistral");
    let base = Base::open(&case.model()).unwrap();
    let plain = read(&base, &case.adapter_folder("small-qv"));

    let used = tempfile::tempdir().unwrap();
    std::fs::write(used.path().join("notes.txt"), "mine").unwrap();
    let error = merged(&base, &[(&plain, 1.0)]).write(used.path(), None).unwrap_err().to_string();
    assert!(error.contains("not empty"), "{error}");
    assert_eq!(file_names(used.path()), ["notes.txt"]);

    let folder = tempfile::tempdir().unwrap();
    let large = merged(&base, &[(&plain, 1e9)]);
    let error = large.write(folder.path(), Some(DType::F16)).unwrap_err().to_string();
    assert!(error.contains("self_attn.") && error.contains("inf in F16"), "{error}");
    assert!(!folder.path().join("config.json").exists(), "half a model is none");

    let mut biased = plain.clone();
    biased.sites[0].bias = Some(vec![1.0; biased.sites[0].b.shape()[0]]);
    let error = MergedBase::new(&base).add("a", &biased, 1.0).unwrap_err().to_string();
    assert!(error.contains("adapter `a`") && error.contains("but the base no bias"), "{error}");
}

// The program.

fn path(path: PathBuf) -> String {
    path.to_str().unwrap().to_owned()
}

fn golden(name: &str) -> String {
    path(repository().join("tests/golden").join(name))
}

/// `loramux merge` on a golden model with adapters by name.
fn merge_golden(model: &str, adapters: &[&str], more: &[&str], output: &Path) -> Ran {
    let mut arguments = vec!["merge".to_owned(), "--model".to_owned(), golden(&format!("{model}/model"))];
    arguments.push("--lora-modules".to_owned());
    let module = |(index, name): (usize, &&str)| {
        format!("{}={}", ["a", "b", "c"][index], golden(&format!("{model}/adapters/{name}")))
    };
    arguments.extend(adapters.iter().enumerate().map(module));
    arguments.extend(more.iter().map(|argument| (*argument).to_owned()));
    arguments.extend(["-o".to_owned(), path(output.to_owned())]);
    loramux(&arguments)
}

#[test]
fn merged_adapters_are_written_as_a_folder_that_means_their_sum() {
    let case = Case::open("llama");
    let base = Base::open(&case.model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut backend = Cpu::new(Some(2)).unwrap();
    let mut transformer = load(&case, &mut backend);
    let slot = |name: &str| case.adapters().iter().position(|other| other == name).unwrap() as u32;
    let free = case.adapters().len();
    let prompt = case.prompts().remove(1);
    let gates = [(slot("all-r8"), 0.7), (slot("odd-r3-mlp"), -0.3)];
    let wanted = logits(&mut backend, &transformer, &[(&gates, &prompt)]).remove(0);
    for (method, ranks) in [(&["cat"][..], "ranks 8 to 11"), (&["svd", "--rank", "11"], "ranks 8 to 11")] {
        let output = folder.path().join(method[0]);
        let mut more = vec!["--weights", "a=0.7", "b=-0.3", "--method"];
        more.extend(method);
        let ran = merge_golden("llama", &["all-r8", "odd-r3-mlp"], &more, &output);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{}", ran.stderr);
        assert!(ran.stderr.contains(ranks), "{}", ran.stderr);
        let merged = read(&base, &output);
        transformer.load_adapter(&mut backend, free, &merged, &base.checkpoint).unwrap();
        let got = logits(&mut backend, &transformer, &[(&[(free as u32, 1.0)], &prompt)]).remove(0);
        transformer.unload_adapter(&mut backend, free).unwrap();
        let off = difference(&got, &wanted);
        assert!(off <= TOLERANCE, "{method:?}: logits are off by {off}");
    }
}

#[test]
fn every_method_of_the_program_is_the_librarys() {
    let case = Case::open("llama-tied");
    let base = Base::open(&case.model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let adapters = ["all-r8", "last-layer"].map(|name| read(&base, &case.adapter_folder(name)));
    let narrow = read(&base, &case.adapter_folder("small-qv"));
    for (name, method, more) in [
        ("svd", Method::Svd, &["--rank", "3"][..]),
        ("ties_svd", Method::TiesSvd, &["--density", "0.3"]),
        ("dare_ties_svd", Method::DareTiesSvd, &["--seed", "9"]),
        ("linear", Method::Linear, &[]),
        ("ties", Method::Ties, &["--density", "0.2"]),
        ("dare", Method::DareLinear, &["--density", "0.9", "--seed", "4"]),
    ] {
        let output = folder.path().join(name);
        // The last three want one rank.
        let (names, second) = match method.decomposes() {
            true => (["all-r8", "last-layer"], &adapters[1]),
            false => (["small-qv", "small-qv"], &narrow),
        };
        let first = if method.decomposes() { &adapters[0] } else { &narrow };
        let arguments = [&["--method", name, "--weights", "b=2"], more].concat();
        let ran = merge_golden("llama-tied", &names, &arguments, &output);
        assert_eq!(ran.code, Some(0), "{name}: {}", ran.stderr);
        let number = |flag: &str| {
            let at = more.iter().position(|argument| *argument == flag)?;
            Some(more[at + 1])
        };
        let options = MergeOptions {
            method,
            rank: number("--rank").map(|rank| rank.parse().unwrap()),
            density: number("--density").map(|density| density.parse().unwrap()),
            seed: number("--seed").map_or(0, |seed| seed.parse().unwrap()),
        };
        let parts = [("a", first, 1.0), ("b", second, 2.0)].map(|(name, adapter, weight)| Part {
            name,
            adapter,
            weight,
        });
        let wanted = merge_adapters(&parts, &base.checkpoint.sites().table, &options).unwrap();
        assert_eq!(read(&base, &output).hash, wanted.hash, "{name}");
    }
}

#[test]
fn what_cannot_be_merged_is_said_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let output = folder.path().join("out");
    for (adapters, more, wanted) in [
        (
            &["all-r8", "small-qv"][..],
            &["--method", "linear"][..],
            "rank 8 in `a`, 4 in `b`, but linear wants one rank",
        ),
        (
            &["all-r8", "dora-r8"],
            &["--method", "cat"],
            "adapter `b`: module `model.layers.0.self_attn.q_proj`: has a DoRA",
        ),
        (&["saved-head"], &["--method", "svd"], "`lm_head`: is replaced whole"),
        (&["all-r8"], &["--method", "cat", "--rank", "3"], "`rank` is 3; wanted none with the method cat"),
        (&["all-r8"], &["--method", "dare", "--density", "2"], "`density` is 2; wanted more than 0"),
        (&["all-r8"], &["--method", "tie"], "wanted linear, cat, svd, ties"),
        (&["all-r8"], &[], "--method"),
        (&["all-r8"], &["--into-base", "--rank", "3"], "--method"),
        (&["all-r8"], &["--method", "cat", "--dtype", "float32"], "--into-base"),
        (&["all-r8"], &["--method", "cat", "--weights", "x=1"], "names \"x\", which --lora-modules does not"),
        (&["all-r8"], &["--method", "cat", "--weights", "a=1", "a=2"], "names \"a\" twice"),
        (&["all-r8"], &["--method", "cat", "--weights", "a=nan"], "wanted NAME=NUMBER, got \"nan\""),
        (&["../../phi3/adapters/all-r8"], &["--method", "cat"], "which has embed_tokens, q_proj"),
    ] {
        let ran = merge_golden("llama", adapters, more, &output);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{more:?}: {}", ran.stderr);
        assert!(ran.stderr.contains(wanted), "{wanted:?} is not in: {}", ran.stderr);
        assert!(!output.exists(), "{more:?}: something was written");
    }
    std::fs::create_dir(&output).unwrap();
    std::fs::write(output.join("notes.txt"), "mine").unwrap();
    let ran = merge_golden("llama", &["all-r8"], &["--method", "cat"], &output);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("out: not an empty folder"), "{}", ran.stderr);
}

#[test]
fn the_program_merges_into_the_base_plainly_or_by_a_method() {
    let case = Case::open("qwen3");
    let base = Base::open(&case.model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let adapters = ["dora-r8", "saved-head"].map(|name| read(&base, &case.adapter_folder(name)));
    let ran = merge_golden(
        "qwen3",
        &["dora-r8", "saved-head"],
        &["--into-base", "--weights", "a=0.5"],
        &folder.path().join("plain"),
    );
    assert_eq!((ran.code, ran.stdout.as_str()), (Some(0), ""), "{}", ran.stderr);
    assert!(ran.stderr.contains("a model with 2 adapters merged into it"), "{}", ran.stderr);
    let wanted = write_merged(&base, &[(&adapters[0], 0.5), (&adapters[1], 1.0)], None);
    let same = |one: &Path, other: &Path| {
        let (one, other) = (tensors(one), tensors(other));
        one.keys().eq(other.keys())
            && one.iter().all(|(name, tensor)| tensor.bytes()[..] == other[name].bytes()[..])
    };
    assert!(same(&folder.path().join("plain"), wanted.path()));

    let output = folder.path().join("summed");
    let more = ["--into-base", "--method", "cat", "--dtype", "bfloat16"];
    let ran = merge_golden("qwen3", &["all-r8", "odd-r3-mlp"], &more, &output);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let adapters = ["all-r8", "odd-r3-mlp"].map(|name| read(&base, &case.adapter_folder(name)));
    let parts = [0, 1].map(|index| Part { name: "it", adapter: &adapters[index], weight: 1.0 });
    let one =
        merge_adapters(&parts, &base.checkpoint.sites().table, &MergeOptions::new(Method::Cat)).unwrap();
    assert!(same(&output, write_merged(&base, &[(&one, 1.0)], Some(DType::BF16)).path()));
}

/// The table of exact matches: its titles, and by task the percentages.
fn table(stdout: &str) -> (Vec<String>, BTreeMap<String, Vec<f64>>) {
    let words = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    let mut lines = stdout.lines().take_while(|line| !line.is_empty()).map(words);
    let titles = lines.next().unwrap().split_off(4);
    let rows = lines.map(|mut row| {
        let numbers = row.split_off(2).iter().map(|cell| cell.parse().unwrap()).collect();
        (row.swap_remove(0), numbers)
    });
    (titles, rows.collect())
}

#[test]
fn tasks_are_scored_as_more_adapters_go_in() {
    let examples = repository().join("examples");
    let folder = tempfile::tempdir().unwrap();
    let (tasks, names) = (folder.path().join("tasks"), ["entity-extraction", "ticket-routing"]);
    for name in names {
        copy_folder(&examples.join("tasks").join(name), &tasks.join(name));
    }
    let run = |more: &[&str], output: &str| {
        let mut command = command(&["merge", "--limit", "20"]);
        command.arg("--model").arg(examples.join("base")).arg("--tasks").arg(&tasks).arg("--lora-modules");
        command.args(names.map(|name| format!("{name}={}", path(examples.join("adapters").join(name)))));
        command.args(more).arg("-o").arg(folder.path().join(output));
        let ran = finish(command);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        ran.stdout
    };
    let (titles, into_base) = table(&run(&["--into-base", "-v"], "model"));
    assert_eq!(titles, ["base", "+entity-extraction", "+ticket-routing"]);
    assert_eq!(into_base[names[0]][..2], [0.0, 100.0], "as the adapter alone");
    assert!(into_base[names[0]][2] < 100.0, "two adapters in so small a base disturb each other");
    let litter = file_names(folder.path());
    assert_eq!(litter, ["model", "tasks"]);

    // The sum of adapters as an adapter answers as the model with both merged into it, but for rounding.
    let (_, summed) = table(&run(&["--method", "cat"], "adapter"));
    for name in names {
        for (one, other) in into_base[name].iter().zip(&summed[name]) {
            assert!((one - other).abs() <= 10.0, "{name}: {into_base:?} and {summed:?}");
        }
    }
}
