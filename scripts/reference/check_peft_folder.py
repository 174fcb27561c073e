#!/usr/bin/env python3
"""Check that PEFT takes adapter folders as loramux wrote them, and computes with them what loramux does.

    check_peft_folder.py LORAMUX MODEL ADAPTER [ADAPTER ...] [--tolerance X] [--tokens N]

MODEL is the base's folder, each ADAPTER one that `loramux train`, `loramux merge` or the library has written for it.
Per adapter:

    tensors   PEFT has a place for each tensor of the file, misses none, and holds the very same values afterwards
    logits    log-probabilities of the prompt's tokens and of the 20 most likely ones at every position of three random
              prompts: PEFT's own (float32, eager) against those of one `loramux run-batch` with all adapters mixed

Prints a line per adapter; exits 1 if a tensor is left over, missing or changed, or a log-probability is off by more than
the tolerance. Needs torch, transformers 5 and peft 0.21.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT looks for the base model's config on the hub otherwise

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging

ALTERNATIVES = 20  # as many as a request may ask for


def load(model_dir, adapter_dir):
    """The model with the adapter, and what PEFT makes of the folder's tensors."""
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager")
    model = PeftModel.from_pretrained(base, adapter_dir, adapter_name="probe").eval()
    complaints = []
    # from_pretrained only warns; loading once more tells which keys found no counterpart.
    result = model.load_adapter(adapter_dir, adapter_name="probe")
    if result.unexpected_keys:
        complaints.append(f"tensors that PEFT has no place for: {', '.join(result.unexpected_keys[:5])}")
    missing = [key for key in result.missing_keys if "probe" in key]
    if missing:
        complaints.append(f"tensors that PEFT misses: {', '.join(missing[:5])}")
    written = load_file(adapter_dir / "adapter_model.safetensors")
    held = get_peft_model_state_dict(model, adapter_name="probe", save_embedding_layers=False)
    for name in sorted(written.keys() | held.keys()):
        if name not in held:
            complaints.append(f"{name}: not among PEFT's tensors")
        elif name not in written:
            complaints.append(f"{name}: PEFT has it, the file does not")
        elif not torch.equal(written[name].float(), held[name].float()):
            complaints.append(f"{name}: PEFT holds other values than the file")
    return model, len(written), complaints


def run(loramux, model_dir, adapters, prompts, folder):
    """Prompt log-probabilities by adapter and prompt, from one batch in which neighbours use different adapters."""
    batch, output = folder / "in.jsonl", folder / "out.jsonl"
    with batch.open("w") as lines:
        for i, prompt in enumerate(prompts):
            for name in adapters:
                body = {"model": name, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": ALTERNATIVES}
                request = {"custom_id": f"{name} {i}", "method": "POST", "url": "/v1/completions", "body": body}
                lines.write(json.dumps(request) + "\n")
    command = [loramux, "run-batch", "-i", batch, "-o", output, "--model", model_dir, "--device", "cpu"]
    command += ["--lora-modules", *(f"{name}={path}" for name, path in adapters.items())]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"loramux run-batch: exit code {done.returncode}: {done.stderr.strip()}")
    # Not splitlines(), which also splits at characters that JSON strings may hold, as U+0085.
    answers = [json.loads(line) for line in output.read_text().split("\n") if line]
    return {answer["custom_id"]: answer["response"]["body"]["choices"][0]["prompt_logprobs"] for answer in answers}


@torch.no_grad()
def difference(model, prompt, reported):
    """The largest difference of a log-probability, and how many were compared."""
    truth = model(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
    assert len(reported) == len(prompt) and reported[0] is None, "an entry per token, none for the first"
    errors = [
        abs(truth[position - 1, int(token)].item() - entry["logprob"])
        for position, entries in enumerate(reported[1:], start=1)
        for token, entry in entries.items()
    ]
    assert len(errors) >= ALTERNATIVES * (len(prompt) - 1), "all alternatives of all positions"
    # A value that is no number must not compare as small.
    return max(error if error == error else float("inf") for error in errors), len(errors)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loramux", type=Path, help="the loramux program")
    parser.add_argument("model", type=Path)
    parser.add_argument("adapters", type=Path, nargs="+", metavar="adapter")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of a log-probability (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=48, help="length of the longest prompt (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    size = json.loads((args.model / "config.json").read_text())["vocab_size"]
    rng = torch.Generator().manual_seed(0)
    lengths = (2, max(2, args.tokens // 3), args.tokens)
    prompts = [torch.randint(0, size, (length,), generator=rng).tolist() for length in lengths]
    adapters = {f"adapter-{i}": path for i, path in enumerate(args.adapters)}
    with tempfile.TemporaryDirectory() as scratch:
        reported = run(args.loramux.resolve(), args.model, adapters, prompts, Path(scratch))
    failed = False
    for name, path in adapters.items():
        model, tensors, complaints = load(args.model, path)
        found = [difference(model, prompt, reported[f"{name} {i}"]) for i, prompt in enumerate(prompts)]
        worst, compared = max(error for error, _ in found), sum(count for _, count in found)
        if not worst <= args.tolerance:
            complaints.append(f"a log-probability is off by {worst:.2g}, allowed are {args.tolerance:.2g}")
        for complaint in complaints:
            print(f"{path}: {complaint}")
        if not complaints:
            print(f"{path}: ok, {tensors} tensors, {compared} log-probabilities within {worst:.1e}", flush=True)
        failed |= bool(complaints)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
