#!/usr/bin/env python3
"""Check what `loramux merge` wrote against PEFT and transformers: same logits from the same adapters.

    check_merge.py MODEL OUTPUT NAME=ADAPTER ... [--weights NAME=X ...] [--method METHOD --rank N --density D]

OUTPUT is an adapter folder (METHOD names how it was merged; PEFT's `add_weighted_adapter` is the reference) or, with
--into-base, a model folder (the base with all adapters but the last merged into it by PEFT's `merge_and_unload` and the
last beside it, all at weight 1, is: merging into one end of tied embeddings, PEFT changes the other). Exits 1 where the
logits differ. PEFT draws other elements for `dare_*` than loramux does; only --density 1 compares.
Needs torch, transformers 5 and peft 0.21.
"""

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, logging


def load_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


def pairs(arguments):
    return dict(argument.split("=", 1) for argument in arguments)


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path, help="what loramux wrote")
    parser.add_argument("adapters", nargs="+", metavar="NAME=ADAPTER", type=str)
    parser.add_argument("--weights", nargs="+", default=[], metavar="NAME=X")
    parser.add_argument("--method", default="svd", help="PEFT's combination_type (default %(default)s)")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--density", type=float)
    parser.add_argument("--into-base", action="store_true")
    parser.add_argument("--tolerance", type=float, default=2e-5, help="largest difference of logits (default %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")

    adapters, weights = pairs(args.adapters), pairs(args.weights)
    weights = {name: float(weights.get(name, 1.0)) for name in adapters}
    theirs = load_model(args.model)
    if args.into_base:
        assert set(weights.values()) == {1.0}, "PEFT merges into a base at weight 1 only"
        *first, last = adapters.values()
        for folder in first:
            theirs = PeftModel.from_pretrained(theirs, folder).merge_and_unload()
        theirs = PeftModel.from_pretrained(theirs, last)
        ours = load_model(args.output)
    else:
        names = list(adapters)
        theirs = PeftModel.from_pretrained(theirs, adapters[names[0]], adapter_name=names[0])
        for name in names[1:]:
            theirs.load_adapter(adapters[name], adapter_name=name)
        theirs.base_model.add_weighted_adapter(
            names, list(weights.values()), "merged", combination_type=args.method,
            svd_rank=args.rank, density=args.density,
        )  # fmt: skip
        theirs.set_adapter("merged")
        ours = PeftModel.from_pretrained(load_model(args.model), args.output)
    ids = torch.randint(0, theirs.config.vocab_size, (1, 48), generator=torch.Generator().manual_seed(0))
    difference = (ours.eval()(ids).logits - theirs.eval()(ids).logits).abs().max().item()
    moved = (ours(ids).logits - load_model(args.model)(ids).logits).abs().max().item()
    print(f"{args.output}: logits within {difference:.1e} of PEFT's, {moved:.1e} from the base's")
    if not difference <= args.tolerance:
        sys.exit(1)


if __name__ == "__main__":
    main()
