//! `loramux devices` and `--device`: what can run a model, and what is said of a device that cannot.

mod common;

use std::path::Path;

use common::program::{Ran, command, finish};
#[cfg(feature = "cuda")]
use common::program::{line, read_lines, write_lines};

/// Runs the program where it sees no GPU.
fn without_gpu(arguments: &[&str]) -> Ran {
    let mut command = command(arguments);
    command.env("CUDA_VISIBLE_DEVICES", "");
    finish(command)
}

/// Why there is no GPU then.
fn reason() -> &'static str {
    if cfg!(not(feature = "cuda")) {
        "this build is without CUDA: build again with the feature `cuda`"
    } else if Path::new("/proc/driver/nvidia/version").exists() {
        "the CUDA driver finds no device"
    } else {
        "no CUDA driver: libcuda is not installed or cannot be loaded"
    }
}

#[test]
fn devices_are_listed_and_a_missing_gpu_has_a_reason() {
    let ran = without_gpu(&["devices"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines.len(), 2, "{}", ran.stdout);
    assert!(lines[0].starts_with("cpu      ") && lines[0].contains(" threads, "), "{}", ran.stdout);
    assert_eq!(lines[1], format!("cuda     {}", reason()));
}

/// Runs the program where the emulator is its driver: loaded first, it is that of any program.
#[cfg(feature = "cuda")]
fn run(arguments: &[&str]) -> Ran {
    loramux_emulator::install();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let path = |line: &str| line.find('/').map(|start| line[start..].to_owned());
    let emulator = maps.lines().filter_map(path).find(|path| path.ends_with("/libcuda.so")).unwrap();
    let mut command = command(arguments);
    command.env("LD_PRELOAD", &emulator);
    finish(command)
}

#[cfg(feature = "cuda")]
#[test]
fn a_gpu_is_listed_with_what_it_is_and_refused_for_what_is_missing() {
    let built = loramux::backend::cuda::KERNELS_BUILT;

    let ran = run(&["devices"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (Some(0), ""));
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert!(
        lines[1].starts_with("cuda:0   loramux emulator, compute capability 9.0, 4 SMs, "),
        "{}",
        lines[1]
    );
    assert!(lines[1].ends_with(" free of 2.0 GiB"), "{}", lines[1]);
    let missing =
        ["cuda     this build has no CUDA kernels: install nvcc 13 (`scripts/get-nvcc.sh`) and build again"];
    assert_eq!(&lines[2..], if built { &[][..] } else { &missing });

    if !built {
        let ran = run(&["demo", "--device", "cuda:0"]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""));
        let wanted = "error: --device cuda:0: this build has no CUDA kernels";
        assert!(ran.stderr.starts_with(wanted), "{}", ran.stderr);
    }
    if built {
        let ran = run(&["demo", "--device", "cuda:1"]);
        assert!(
            ran.stderr.contains("--device cuda:1: no CUDA device 1: the driver finds 1;"),
            "{}",
            ran.stderr
        );
    }
}

/// A trained model answers greedy questions alike on both backends, and `auto` is the GPU where there is one.
#[cfg(feature = "cuda")]
#[test]
fn a_gpu_answers_a_batch_file_as_the_cpu_does() {
    if !loramux::backend::cuda::KERNELS_BUILT {
        // Refused, as the test above holds.
        return;
    }
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).display().to_string();
    let tasks = ["ticket-routing", "headline-sentiment", "entity-extraction", "general"];
    let mut lines = Vec::new();
    for task in tasks {
        let text = std::fs::read_to_string(examples.join("tasks").join(task).join("test.jsonl")).unwrap();
        for (index, question) in text.lines().take(3).enumerate() {
            let question: serde_json::Value = serde_json::from_str(question).unwrap();
            let message = &question["messages"][0];
            let body =
                serde_json::json!({"model": task, "messages": [message], "temperature": 0, "max_tokens": 16});
            lines.push(line(&format!("{task}-{index}"), body));
        }
    }
    write_lines(&folder.path().join("in"), &lines);
    let modules: Vec<String> = tasks
        .iter()
        .map(|task| format!("{task}={}", examples.join("adapters").join(task).display()))
        .collect();
    let model = examples.join("base").display().to_string();
    let answers = |device: &str, more: &[&str]| {
        let (input, output) = (path("in"), path(device));
        let mut arguments = vec!["run-batch", "-i", &input, "-o", &output, "--model", &model];
        arguments.extend(["--device", device, "--lora-modules"]);
        arguments.extend(modules.iter().map(String::as_str));
        arguments.extend(more);
        let ran = run(&arguments);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let answers = read_lines(&folder.path().join(device));
        answers.iter().map(|answer| answer["response"]["body"]["choices"][0].clone()).collect::<Vec<_>>()
    };
    let on_cpu = answers("cpu", &[]);
    assert_eq!(on_cpu.len(), lines.len());
    assert_eq!(answers("cuda:0", &[]), on_cpu);
    // Fewer adapters at a time than the file asks for: they take turns.
    assert_eq!(answers("auto", &["--max-loras", "2", "--max-lora-rank", "16"]), on_cpu);

    // The note is about the GPU alone.
    let note = |device: &str| {
        let llama = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/llama/model");
        let (llama, input, output) = (llama.display().to_string(), path("none"), path("nothing"));
        std::fs::write(&input, "").unwrap();
        let arguments = ["run-batch", "-i", &input, "-o", &output, "--force", "--model", &llama];
        run(&[&arguments[..], &["--device", device]].concat()).stderr
    };
    assert!(note("auto").contains("weights in F32 are rounded to BF16"), "{}", note("auto"));
    assert!(!note("cpu").contains("rounded"));
}

#[test]
fn a_device_that_cannot_run_the_model_is_a_usage_error_before_anything_is_read() {
    for (device, name) in [("cuda", "cuda:0"), ("cuda:3", "cuda:3")] {
        let ran = without_gpu(&["demo", "--examples", "absent", "--device", device]);
        assert_eq!((ran.code, ran.stdout.as_str()), (Some(2), ""), "{}", ran.stderr);
        let said = ran.stderr.strip_prefix(&format!("error: --device {name}: ")).expect(&ran.stderr);
        let said = said.strip_suffix("; use `cpu` or `auto`\n").expect(said);
        let with_driver =
            said.starts_with("this build has no CUDA kernels: ") || said.starts_with("no CUDA device ");
        assert!(said == reason() || with_driver && reason().contains("finds no device"), "{said}");
    }
    for device in ["auto", "cpu"] {
        let ran = without_gpu(&["demo", "--examples", "absent", "--device", device]);
        assert_eq!(ran.code, Some(2), "{}", ran.stderr);
        assert!(ran.stderr.contains("absent"), "{}", ran.stderr);
    }
    let ran = without_gpu(&["demo", "--device", "cuda:x"]);
    assert_eq!(ran.code, Some(2));
    assert!(ran.stderr.contains("wanted auto, cpu, cuda or cuda:N"), "{}", ran.stderr);
}
