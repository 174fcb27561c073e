#!/usr/bin/env python3
"""Runs each test of a Rust test binary in a process of its own: `run_tests.py BINARY OUT [SECONDS]`.

A kernel that reads where it must not loses the context for the whole process; here it fails one test. OUT gets one JSON
object with what passed, what failed and how. Exits with 1 unless all tests passed and there was one.
"""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

JOBS = 4
SECONDS_PER_TEST = 60


def run(binary, name, deadline):
    started = time.monotonic()
    limit = min(SECONDS_PER_TEST, deadline - started)
    if limit <= 0:
        return {"test": name, "result": "not run", "seconds": 0.0}
    command = [binary, "--exact", name, "--test-threads", "1", "--include-ignored"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=limit)
    except subprocess.TimeoutExpired:
        return {"test": name, "result": "timed out", "seconds": limit}
    result = {"test": name, "result": "ok" if done.returncode == 0 else "failed"}
    result["seconds"] = round(time.monotonic() - started, 2)
    if done.returncode != 0:
        output = done.stdout + done.stderr
        print(f"--- {name}: exit code {done.returncode}\n{output}", flush=True)
        at = output.find("panicked at")
        result["exit_code"] = done.returncode
        result["message"] = output[max(at, 0) :][:600]
    return result


def main():
    binary, out = sys.argv[1:3]
    deadline = time.monotonic() + (float(sys.argv[3]) if len(sys.argv) > 3 else 600.0)
    listed = subprocess.run([binary, "--list", "--format", "terse"], capture_output=True, text=True, check=True)
    names = [line.removesuffix(": test") for line in listed.stdout.splitlines() if line.endswith(": test")]
    with ThreadPoolExecutor(JOBS) as pool:
        results = list(pool.map(lambda name: run(binary, name, deadline), names))
    failed = [result for result in results if result["result"] != "ok"]
    report = {"binary": Path(binary).name, "passed": len(results) - len(failed), "failed": failed}
    Path(out).write_text(json.dumps(report, indent=1) + "\n")
    for result in results:
        print(f"{result['result']:9} {result['seconds']:6.1f} s  {result['test']}")
    print(f"{report['binary']}: {report['passed']} passed, {len(failed)} did not")
    return 1 if failed or not results else 0


if __name__ == "__main__":
    sys.exit(main())
