#!/usr/bin/env python3
"""Makes one JSON file and one table of a run of `scripts/gpu.sh`: `merge.py FOLDER MANIFEST OUT`, or of several runs
with some of the stages each: `merge.py join RESULTS... OUT`.

FOLDER holds what the stages left: `stages.tsv` (name, exit code, seconds, command), `device.log`, `tests-*.json`,
`sanitizer-*.log`, and of the benches `lora.json`, `lora-peers.json`, `model.json`, `model-peers.json`. What a stage has
not left is missing in the result as well. OUT gets the JSON; the table goes to standard output.
"""

import json
import re
import sys
from pathlib import Path

LARGE = [2048, 8192]
DECODE = [1, 4, 16]


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_stages(folder):
    stages = []
    for line in (folder / "stages.tsv").read_text().splitlines():
        name, code, seconds, command = line.split("\t", 3)
        stages.append({"stage": name, "exit_code": int(code), "seconds": int(seconds), "command": command})
    return stages


def read_device(folder):
    """The line of nvidia-smi, as gpu.sh asks for it."""
    try:
        lines = (folder / "device.log").read_text().splitlines()
    except OSError:
        return {}
    if len(lines) < 2 or "," not in lines[0]:
        return {}
    keys = [re.sub(r"[^a-z0-9]+", "_", key.strip().lower()).strip("_") for key in lines[0].split(",")]
    return dict(zip(keys, (value.strip() for value in lines[1].split(","))))


def read_sanitizer(path):
    text = path.read_text(errors="replace")
    summary = re.findall(r"^=+ ((?:ERROR|RACECHECK|LEAK) SUMMARY:.*)$", text, re.MULTILINE)
    findings = re.findall(r"^=+ ((?:Invalid|Error|Warning|Uninitialized|Barrier|Program hit|Race).*)$", text, re.MULTILINE)
    tests = re.findall(r"^test result: .*$", text, re.MULTILINE)
    return {
        "tool": path.stem.removeprefix("sanitizer-"),
        "summary": summary[-1] if summary else None,
        "tests": tests[-1] if tests else None,
        "findings": sorted(set(findings))[:10],
    }


def join_peers(bench, peers):
    """Adds to each result of the bench what the peers took for it."""
    by_case = {}
    for result in (peers or {}).get("results", []):
        key = (result["target"], result["rows"], result["adapters"])
        if "median_us" in result:
            by_case.setdefault(key, {})[result["peer"]] = result["median_us"]
    for result in bench["results"]:
        if result["part"] != "whole":
            continue
        of_case = dict(by_case.get((result["target"], result["rows"], result["adapters"]), {}))
        of_case |= by_case.get((result["target"], result["rows"], "none"), {})
        result["peers_us"] = of_case
        if "matmul" in of_case:
            result["share_of_matmul"] = of_case["matmul"] / result["median_us"]


def join_model_peers(bench, peers):
    """Adds to each step of the bench what the peers took for it."""
    by_case = {}
    for result in (peers or {}).get("results", []):
        if "median_ms" in result:
            by_case.setdefault(model_case(result), {})[result["peer"]] = result["median_ms"]
    for result in bench["results"]:
        result["peers_ms"] = by_case.get(model_case(result), {})
        if "median_ms" in result and result["peers_ms"]:
            result["times_best_peer"] = min(result["peers_ms"].values()) / result["median_ms"]
        if "median_ms" in result and "peft mixed" in result["peers_ms"]:
            result["times_peft_mixed"] = result["peers_ms"]["peft mixed"] / result["median_ms"]


def model_case(result):
    return tuple(result[key] for key in ("model", "step", "sequences", "context", "adapters"))


def judge(what, number, side, values):
    """An aim, by the worst of (value, its name)."""
    worst = (min if side == "at least" else max)(values, default=None)
    met = None if worst is None else (worst[0] >= number if side == "at least" else worst[0] <= number)
    result = {"aim": what, "wanted": f"{side} {number}", "met": met}
    if worst is not None:
        result |= {"worst": worst[0], "worst_is": worst[1]}
    return result


def model_aims(bench):
    """The numbers that whole models are to reach."""

    def pick(key, chosen):
        found = [r for r in bench["results"] if chosen(r) and r.get(key) is not None]
        return [(r[key], f"{r['model']}, {r['sequences']} at {r['context']}, {r['adapters']}") for r in found]

    decode = lambda result: result["step"] == "decode"
    adapted = lambda result: result["distinct_adapters"] > 0
    large = lambda result: result["model"] == "Llama 3 8B" and decode(result)
    return [
        judge("8B, decode of 16 sequences over its floor", 0.75, "at least",
              pick("share_of_floor", lambda result: large(result) and result["sequences"] == 16)),
        judge("8B, decode with 64 distinct r16 adapters over none", 1.075, "at most",
              pick("over_none", lambda result: large(result) and result["distinct_adapters"] == 64)),
        judge("8B, decode with adapters over PEFT's mixed batch", 5.0, "at least",
              pick("times_peft_mixed", lambda result: large(result) and adapted(result))),
        judge("launches of a block in decode", 9, "at most", pick("counted_launches_per_block", decode)),
        judge("steps with memory for adapters, none used, over none", 1.02, "at most",
              pick("over_none", lambda result: result["adapters"] == "unused")),
    ]


def lora_aims(bench):
    """The numbers that the kernels are to reach, each by its worst result."""
    whole = [result for result in bench["results"] if result["part"] == "whole"]

    def pick(rows, adapters, key):
        found = [r for r in whole if r["rows"] in rows and r["adapters"] == adapters and r.get(key) is not None]
        return [(r[key], f"{r['target']}, {r['rows']} rows") for r in found]

    listed = [
        ("large products over cuBLAS, no adapters", 0.60, "at least", pick(LARGE, "none", "share_of_matmul")),
        ("decode over the copy rate, no adapters", 0.80, "at least", pick(DECODE, "none", "share_of_floor")),
        ("64 distinct r16 adapters over none, 8192 rows", 1.05, "at most", pick([8192], "r16 distinct", "over_none")),
    ]
    results = []
    for what, number, side, values in listed:
        result = judge(what, number, side, values)
        layer = [value for value, name in values if name.startswith("layer")]
        if layer:
            result["layer"] = layer
        results.append(result)
    return results


def cell(value, form):
    return "" if value is None else format(value, form)


def print_lora(bench):
    peers = sorted({name for result in bench["results"] for name in result.get("peers_us", {})})
    header = f"{'target':8} {'rows':>5} {'adapters':16} {'part':8} {'µs':>9} {'floor':>9} {'share':>6} {'/none':>6} "
    print(header + f"{'predicted':>9} " + " ".join(f"{name:>9}" for name in peers))
    for result in bench["results"]:
        of_peers = " ".join(f"{cell(result.get('peers_us', {}).get(name), '9.1f'):>9}" for name in peers)
        print(
            f"{result['target']:8} {result['rows']:5} {result['adapters']:16} {result['part']:8} "
            f"{result['median_us']:9.1f} {result['floor_us']:9.1f} {result['share_of_floor']:6.1%} "
            f"{cell(result.get('over_none'), '6.3f'):>6} {result['predicted_us']:9.1f} {of_peers}"
        )
    print()


def print_model(bench):
    peers = sorted({name for result in bench["results"] for name in result["peers_ms"]})
    header = f"{'model':13} {'step':7} {'seqs':>4} {'ctx':>5} {'adapters':9} {'ms':>9} {'latency':>9} {'floor':>9} "
    header += f"{'share':>6} {'/none':>6} {'predicted':>9} {'tokens/s':>9} "
    print(header + " ".join(f"{name:>18}" for name in peers))
    for result in bench["results"]:
        name = f"{result['model']:13} {result['step']:7} {result['sequences']:4} {result['context']:5} "
        name += f"{result['adapters']:9} "
        if "median_ms" not in result:
            print(name + (result.get("left_out") or result.get("error")))
            continue
        of_peers = " ".join(f"{cell(result['peers_ms'].get(peer), '.2f'):>18}" for peer in peers)
        print(
            f"{name}{result['median_ms']:9.3f} {result['latency_ms']:9.3f} {result['floor_ms']:9.3f} "
            f"{result['share_of_floor']:6.1%} {cell(result.get('over_none'), '6.3f'):>6} "
            f"{result['predicted_ms']:9.3f} {result['tokens_per_second']:9.0f} {of_peers}"
        )
    print()


def print_table(report):
    if report["lora"]:
        print_lora(report["lora"])
    if report["model"]:
        print_model(report["model"])
    for name in ("lora_peers", "model_peers"):
        if (report[name] or {}).get("left_out"):
            print(f"{name} left out: {report[name]['left_out']}")
    for test in report["tests"]:
        print(f"tests {test['binary']}: {test['passed']} passed, {len(test['failed'])} did not")
        for failed in test["failed"]:
            print(f"    {failed['result']}: {failed['test']}")
    for tool in report["sanitizers"]:
        print(f"{tool['tool']}: {tool['summary'] or 'no summary'}; {tool['tests'] or 'tests did not end'}")
    for stage in report["stages"]:
        print(f"stage {stage['stage']:32} exit code {stage['exit_code']:3} {stage['seconds']:4} s")
    for aim in report["aims"]:
        state = {True: "met", False: "MISSED", None: "not measured"}[aim["met"]]
        worst = f"worst {aim['worst']:.3f} ({aim['worst_is']})" if "worst" in aim else ""
        print(f"{state:12} {aim['aim']}, {aim['wanted']}: {worst}")
    print(f"{report['device'].get('name', 'unknown device')}, commit {report['commit']}")


def report_of(folder, manifest):
    """What one run has left."""
    return {
        "command": "scripts/gpu.sh run",
        "commit": manifest.get("commit"),
        "nvcc": manifest.get("nvcc"),
        "device": read_device(folder),
        "stages": read_stages(folder),
        "tests": [tests for path in sorted(folder.glob("tests-*.json")) if (tests := read_json(path))],
        "sanitizers": [read_sanitizer(path) for path in sorted(folder.glob("sanitizer-*.log"))],
        "lora": read_json(folder / "lora.json"),
        "lora_peers": read_json(folder / "lora-peers.json"),
        "model": read_json(folder / "model.json"),
        "model_peers": read_json(folder / "model-peers.json"),
    }


def join(reports):
    """One report of several: what the first has, and what only later ones have."""
    joined = dict(reports[0])
    for report in reports[1:]:
        if (report["commit"], report["device"].get("name")) != (joined["commit"], joined["device"].get("name")):
            sys.exit("error: these results are of other commits or devices")
        for key, value in report.items():
            if key in ("stages", "tests", "sanitizers"):
                joined[key] = joined[key] + value
            else:
                joined[key] = joined[key] or value
    return joined


def main():
    *sources, out = sys.argv[1:]
    if sources[0] == "join":
        report = join([json.loads(Path(path).read_text()) for path in sources[1:]])
    else:
        report = report_of(Path(sources[0]), read_json(Path(sources[1])) or {})
    report["aims"] = []
    if report["lora"]:
        join_peers(report["lora"], report["lora_peers"])
        report["lora"]["commit"] = report["commit"]
        report["aims"] += lora_aims(report["lora"])
    if report["model"]:
        join_model_peers(report["model"], report["model_peers"])
        report["model"]["commit"] = report["commit"]
        report["aims"] += model_aims(report["model"])
    Path(out).write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)


if __name__ == "__main__":
    main()
