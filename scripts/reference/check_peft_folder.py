#!/usr/bin/env python3
"""Check that PEFT understands an adapter folder as another one: same logits on the same model.

    check_peft_folder.py MODEL ADAPTER EXPECTED_ADAPTER [--tolerance X]

Load-and-save must not change what an adapter means; MODEL is a model folder, ADAPTER the folder that was written and
EXPECTED_ADAPTER the one it came from. Exits 1 where the logits differ, where PEFT reports tensors it has no place for,
or where a tensor that PEFT needs is missing. Needs torch, transformers 5 and peft 0.21.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, logging


def load(model_dir, adapter_dir):
    """The model with the adapter, and what PEFT says against it."""
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
    return model, complaints


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path, help="the folder to check")
    parser.add_argument("expected", type=Path, help="the folder it must agree with")
    parser.add_argument(
        "--tolerance", type=float, default=1e-5, help="largest difference of logits (default %(default)s)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="length of the random input (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    ours, complaints = load(args.model, args.adapter)
    theirs, _ = load(args.model, args.expected)
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(0, ours.config.vocab_size, (1, args.tokens), generator=rng)
    difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
    if not difference <= args.tolerance:
        complaints.append(f"logits differ by {difference:.3g}, allowed are {args.tolerance:.3g}")
    weights = {
        side: load_file(path / "adapter_model.safetensors")
        for side, path in (("ours", args.adapter), ("theirs", args.expected))
    }
    for name in sorted(weights["theirs"].keys() - weights["ours"].keys()):
        print(f"note: only in {args.expected}: {name}")
    for name in sorted(weights["ours"].keys() - weights["theirs"].keys()):
        print(f"note: only in {args.adapter}: {name}")
    for complaint in complaints:
        print(f"{args.adapter}: {complaint}")
    if complaints:
        sys.exit(1)
    print(f"{args.adapter}: ok, {len(weights['ours'])} tensors, logits within {difference:.1e}")


if __name__ == "__main__":
    main()
