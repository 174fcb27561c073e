#!/usr/bin/env python3
"""Run golden cases through a built `loramux` and compare with what transformers + PEFT computed.

    check_batch.py LORAMUX CASE [CASE ...] [--args="--device cpu"] [--keep FOLDER] [--verbose]

Per case (a folder from make_cases.py or tests/golden) one `run-batch` takes every adapter with every prompt, mixed.
Compared per request:

    greedy tokens            equal; a choice between logits closer than NEAR_TIE may go either way
    prompt log-probabilities value and rank of each prompt token, and the most likely token, within --tolerance
    token log-probabilities  of the continuation, where the case has `greedy_logits`

Prints a table; exits 1 if anything differs, is refused or is missing. Needs numpy and safetensors.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

NEAR_TIE = 1e-4
BASE = "model"  # the folder name of --model


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


class Tally:
    """The largest errors, the counts and the complaints of some requests."""

    def __init__(self):
        self.requests = self.near_ties = 0
        self.prompt_error = self.token_error = 0.0
        self.problems = []

    def add(self, other):
        self.requests += other.requests
        self.near_ties += other.near_ties
        self.prompt_error = max(self.prompt_error, other.prompt_error)
        self.token_error = max(self.token_error, other.token_error)
        self.problems += other.problems

    def row(self, name):
        verdict = f"{len(self.problems)} problems" if self.problems else "ok"
        errors = f"{self.prompt_error:>14.1e}{self.token_error:>13.1e}"
        return f"{name:<40}{self.requests:>9}{errors}{self.near_ties:>11}  {verdict}"


HEADER = f"{'case':<40}{'requests':>9}{'prompt error':>14}{'token error':>13}{'near ties':>11}"


class Case:
    def __init__(self, folder):
        self.folder = folder
        forward = json.loads((folder / "forward.json").read_text())
        self.prompts, self.greedy, self.max_tokens = forward["prompts"], forward["greedy"], forward["max_new_tokens"]
        self.tensors = load_file(folder / "forward.safetensors")
        adapters = {name: folder / "adapters" / name for name in self.greedy if name != "base"}
        self.adapters = {name: path for name, path in adapters.items() if path.is_dir()}
        self.left_out = sorted(set(adapters) - set(self.adapters))

    def requests(self, names):
        """Prompt by prompt, so that neighbours in the batch use different adapters."""
        for i, prompt in enumerate(self.prompts):
            for name in names:
                body = {
                    "model": BASE if name == "base" else name,
                    "prompt": prompt,
                    "max_tokens": self.max_tokens,
                    "temperature": 0,
                }
                body |= {"logprobs": 1, "prompt_logprobs": 1, "return_token_ids": True}
                yield {"custom_id": f"{name} {i}", "method": "POST", "url": "/v1/completions", "body": body}

    def run(self, binary, names, arguments, folder):
        """Runs `names` in one batch. Returns the output lines by custom_id, and why there are none."""
        batch, output = folder / f"{self.folder.name}.in.jsonl", folder / f"{self.folder.name}.out.jsonl"
        output.unlink(missing_ok=True)
        batch.write_text("".join(json.dumps(request) + "\n" for request in self.requests(names)))
        command = [binary, "run-batch", "-i", batch, "-o", output, "--model", self.folder / "model", *arguments]
        modules = [f"{name}={self.adapters[name]}" for name in names if name != "base"]
        if modules:
            command += ["--lora-modules", *modules]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode not in (0, 3) or not output.exists():
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return {}, f"exit code {done.returncode}: {reason}"
        # Not splitlines(), which also splits at characters that JSON strings may hold, as U+0085.
        lines = [json.loads(line) for line in output.read_text().split("\n") if line]
        return {line["custom_id"]: line for line in lines}, None

    def check(self, name, i, line, tolerance):
        """One request against the reference."""
        tally = Tally()
        tally.requests = 1

        def complain(text):
            tally.problems.append(f"{self.folder.name}/{name} prompt {i}: {text}")

        response = (line or {}).get("response")
        if not response or response["status_code"] != 200:
            detail = (response or {}).get("body", (line or {}).get("error", "no output line"))
            complain(f"no answer: {json.dumps(detail)[:300]}")
            return tally
        body = response["body"]
        choice = body["choices"][0]

        logits = self.tensors.get(f"logits.{name}.{i}")  # left out of the cases in tests/golden for some prompts
        if logits is not None:
            self.check_prompt(
                log_softmax(logits), self.prompts[i], choice.get("prompt_logprobs"), tolerance, tally, complain
            )

        steps = self.tensors.get(f"greedy_logits.{name}.{i}")
        wanted, found = self.greedy[name][i], choice["token_ids"]
        same = 0
        while same < min(len(wanted), len(found)) and wanted[same] == found[same]:
            same += 1
        if wanted != found:
            first = None if logits is None else logits[-1]
            before = steps[same] if steps is not None and same < len(wanted) else first if same == 0 else None
            pair = (wanted[same : same + 1], found[same : same + 1])
            gap = abs(float(before[pair[0][0]] - before[pair[1][0]])) if before is not None and all(pair) else None
            if gap is not None and gap < NEAR_TIE:
                tally.near_ties += 1
            else:
                complain(
                    f"greedy token {same}: {pair[1]} instead of {pair[0]}"
                    + ("" if gap is None else f", logits {gap:.2g} apart")
                )
        if steps is not None:
            values = (choice.get("logprobs") or {}).get("token_logprobs")
            if not values:
                complain("no token log-probabilities")
            else:
                truth = log_softmax(steps)[np.arange(same), wanted[:same]]
                error = np.abs(truth - np.array(values[:same], dtype=float)).max(initial=0.0)
                tally.token_error = max(tally.token_error, error)
                if not error <= tolerance:
                    complain(f"token log-probability off by {error:.2g}")
        return tally

    @staticmethod
    def check_prompt(truth, prompt, reported, tolerance, tally, complain):
        """vLLM's form: null, then per token {"<id>": {"logprob", "rank", "decoded_token"}}, the best token too."""
        if not reported or len(reported) != len(prompt) or reported[0] is not None:
            return complain("prompt_logprobs missing or of another length than the prompt")
        worst, wrong_values = (0.0, ""), 0
        first = len(prompt) - len(truth)  # the cases in tests/golden keep the last rows of some prompts
        for position, (token, entry) in list(enumerate(zip(prompt, reported)))[first + 1 :]:
            row = truth[position - 1 - first]
            if str(token) not in entry:
                complain(f"prompt_logprobs[{position}] lacks the prompt token {token}")
            for key, value in entry.items():
                true = row[int(key)]
                error = abs(true - value["logprob"])
                wrong_values += not error <= tolerance
                worst = max(
                    worst,
                    (error, f"prompt_logprobs[{position}] token {key}: {value['logprob']:.5f} instead of {true:.5f}"),
                )
                # Tokens closer than the tolerance may change places.
                low, high = int((row > true + 2 * tolerance).sum()) + 1, int((row >= true - 2 * tolerance).sum())
                if not low <= value["rank"] <= high:
                    complain(f"prompt_logprobs[{position}] token {key}: rank {value['rank']} instead of {low}")
            if not any(value["rank"] == 1 for value in entry.values()):
                complain(f"prompt_logprobs[{position}] lacks the most likely token {int(row.argmax())}")
        tally.prompt_error = worst[0]
        if wrong_values:
            complain(f"{wrong_values} prompt log-probabilities off, the worst is {worst[1]}")


def check_case(case, binary, arguments, folder, tolerance):
    """All adapters in one run; if it does not start, each alone, to find the ones at fault."""
    names = ["base", *case.adapters]
    lines, failure = case.run(binary, names, arguments, folder)
    reasons = {}
    if failure and case.adapters:
        print(f"{case.folder.name}: the mixed run fails ({failure}); running each adapter alone")
        for name in names:
            alone, reasons[name] = case.run(binary, [name], arguments, folder)
            lines |= alone
    tallies = {}
    for name in names:
        tallies[name] = Tally()
        reason = reasons.get(name, failure if not case.adapters else None)
        if reason:
            tallies[name].problems.append(f"{case.folder.name}/{name}: {reason}")
            continue
        for i in range(len(case.prompts)):
            tallies[name].add(case.check(name, i, lines.get(f"{name} {i}"), tolerance))
    if failure and not any(tally.problems for tally in tallies.values()):
        tallies["base"].problems.append(f"{case.folder.name}: each adapter runs alone, all together do not: {failure}")
    return tallies


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", type=Path, help="the loramux program")
    parser.add_argument("cases", nargs="+", type=Path)
    parser.add_argument("--args", default="", help="further arguments for run-batch, in one string")
    parser.add_argument("--tolerance", type=float, default=4e-4, help="for log-probabilities (default %(default)s)")
    parser.add_argument("--keep", type=Path, help="keep the batch files in this folder")
    parser.add_argument("--verbose", action="store_true", help="a row per adapter, and every problem")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)

    total = Tally()
    print(HEADER)
    with tempfile.TemporaryDirectory() as scratch:
        for folder in args.cases:
            case = Case(folder)
            tallies = check_case(
                case, args.binary.resolve(), shlex.split(args.args), args.keep or Path(scratch), args.tolerance
            )
            whole = Tally()
            for name, tally in tallies.items():
                whole.add(tally)
                if args.verbose:
                    print(tally.row(f"  {name}"))
            print(whole.row(folder.name), flush=True)
            if case.left_out:
                print(f"  not run, no folder under adapters/: {', '.join(case.left_out)}")
            shown = whole.problems if args.verbose else whole.problems[:8]
            for problem in shown:
                print(f"  {problem}")
            if len(shown) < len(whole.problems):
                print(f"  … and {len(whole.problems) - len(shown)} more (--verbose)")
            total.add(whole)
    print(total.row("all"))
    sys.exit(1 if total.problems else 0)


if __name__ == "__main__":
    main()
