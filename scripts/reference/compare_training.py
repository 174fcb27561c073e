#!/usr/bin/env python3
"""Time `loramux train` against PEFT on the example tasks, and score what both trained.

    compare_training.py LORAMUX EXAMPLES --out JSON [--seeds 0 1 2] [--steps 200] [--threads 2]

For each seed, one after the other: PEFT trains the tasks one by one as train_peft.py does (seconds of its training loops,
without reading and saving); `LORAMUX train` trains them all at once by `EXAMPLES/train.toml` with that seed and without
evaluations (seconds of the whole program); `LORAMUX eval` asks both sets of adapters the questions of the test files,
greedy, at most 24 tokens, and counts exact matches. Writes the seconds, their medians and ratio, and all accuracies.
Needs torch, transformers 5 and peft 0.21.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import torch
import train_peft
from transformers import AutoTokenizer


def train_with_peft(examples, names, seed, steps, out):
    tokenizer = AutoTokenizer.from_pretrained(examples / "base")
    seconds = {}
    for name in names:
        rows = train_peft.read_task(tokenizer, examples / "tasks" / name / "train.jsonl")
        result = train_peft.train(examples / "base", rows, tokenizer.pad_token_id, steps, out / name, seed)
        seconds[name] = result["seconds"]
    return seconds


def write_config(examples, seed, steps, out):
    """examples/train.toml with this seed, that many steps, absolute paths and no evaluations."""
    lines = []
    for line in (examples / "train.toml").read_text().splitlines():
        key = line.split("=")[0].strip()
        if key in ("seed", "valid", "test", "eval_max_tokens"):
            continue
        if key in ("train", "model"):
            line = f'{key} = "{examples.resolve() / line.split(chr(34))[1]}"'
        values = {"out": f'"{out}"', "steps": steps}
        lines.append(f"{key} = {values[key]}" if key in values else line)
        if line == "[defaults]":
            lines.append(f"seed = {seed}")
    config = out.with_suffix(".toml")
    config.write_text("\n".join(lines))
    return config


def exact_matches(loramux, examples, names, adapters, threads, folder):
    modules = [f"{name}={adapters / name}" for name in names]
    report = folder / "scores.json"
    command = [loramux, "eval", "-q", "--own", "--tasks", examples / "tasks", "--model", examples / "base"]
    command += ["--output", report, "--threads", str(threads), "--lora-modules", *modules]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    results = json.loads(report.read_text())["results"]
    shares = {result["task"]: result["exact_match"] for result in results if result["adapter"] == result["task"]}
    return {name: shares[name] for name in names}


def processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loramux", type=Path)
    parser.add_argument("examples", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    loramux, examples, threads = arguments.loramux.resolve(), arguments.examples, arguments.threads
    torch.set_num_threads(threads)
    names = sorted(path.name for path in (examples / "tasks").iterdir())
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for seed in arguments.seeds:
            peft, ours = folder / f"peft-{seed}", folder / f"loramux-{seed}"
            peft_seconds = train_with_peft(examples, names, seed, arguments.steps, peft)
            config = write_config(examples, seed, arguments.steps, ours)
            started = time.perf_counter()
            command = [loramux, "train", "-q", "--threads", str(threads), config]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds = time.perf_counter() - started
            run = {
                "seed": seed,
                "peft_seconds": round(sum(peft_seconds.values()), 1),
                "peft_seconds_by_task": peft_seconds,
                "loramux_seconds": round(seconds, 1),
                "exact_match": {
                    "peft": exact_matches(loramux, examples, names, peft, threads, folder),
                    "loramux": exact_matches(loramux, examples, names, ours, threads, folder),
                },
            }
            print(json.dumps(run), flush=True)
            runs.append(run)
    medians = {key: statistics.median(run[key] for run in runs) for key in ("peft_seconds", "loramux_seconds")}
    mean = lambda who, name: round(statistics.mean(run["exact_match"][who][name] for run in runs), 4)
    result = {
        "what": "the seven example tasks of examples/train.toml: one after another with PEFT, all at once with loramux",
        "command": f"scripts/reference/compare_training.py target/release/loramux examples --seeds {' '.join(map(str, arguments.seeds))}",
        "device": f"{processor()}, {os.cpu_count()} logical cores",
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "threads": threads,
        "versions": {"torch": torch.__version__, "peft": __import__("peft").__version__},
        "steps": arguments.steps,
        "median": medians | {"peft_over_loramux": round(medians["peft_seconds"] / medians["loramux_seconds"], 2)},
        "mean_exact_match": {name: {who: mean(who, name) for who in ("peft", "loramux")} for name in names},
        "runs": runs,
    }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
