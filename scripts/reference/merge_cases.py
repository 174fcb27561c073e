#!/usr/bin/env python3
"""Make the golden file of adapter merging: what PEFT's `add_weighted_adapter` gives for small random adapters.

    merge_cases.py OUT_FOLDER [--seed N]

writes `cases.json` (adapters with their scales, cases with their options) and `cases.safetensors`:

    <adapter>.<module>.A, .B     the adapters' factors, as PEFT stores them
    <case>.<module>              scale · B A of what PEFT merged, [out, in]; for the embedding [hidden, vocabulary]

The dropping of `dare_*` is random, so that its cases keep everything; the formula around it is what they check.
Needs torch and peft 0.21.
"""

import argparse
import json
import os
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

HIDDEN, INNER, VOCABULARY = 6, 9, 8
Q, DOWN, EMBED = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.embed_tokens"

# `b` has no pair at down_proj; `wide` is of another rank. rsLoRA second, not first: PEFT gives the result the first
# adapter's `use_rslora` and so a scale of √r.
ADAPTERS = {
    "a": dict(r=3, lora_alpha=6, target_modules=["q_proj", "down_proj", "embed_tokens"]),
    "b": dict(r=3, lora_alpha=4, target_modules=["q_proj", "embed_tokens"], use_rslora=True),
    "c": dict(r=3, lora_alpha=-3, target_modules=["q_proj", "down_proj"]),
    "wide": dict(r=5, lora_alpha=5, target_modules=["q_proj", "down_proj", "embed_tokens"]),
}


def case(method, weights, density=None, rank=None):
    return dict(method=method, weights=weights, density=density, rank=rank)


THREE = {"a": 0.7, "b": 0.3, "c": 1.5}
CASES = {
    "linear": case("linear", {"a": 0.7, "b": -0.4, "c": 1.5}),
    "cat": case("cat", {"a": 0.7, "b": -0.4, "wide": 1.0}),
    "svd": case("svd", {"a": 1.0, "b": 0.5, "wide": -0.5}, rank=2),
    "svd-default-rank": case("svd", {"a": 1.0, "wide": 0.5}),
    "ties": case("ties", THREE, density=0.6),
    "ties-negative": case("ties", {"a": 1.0, "b": -1.0, "c": 0.5}, density=0.35),
    "ties-svd": case("ties_svd", {"a": 1.0, "b": 1.0, "wide": 0.5}, density=0.5, rank=4),
    "dare-linear": case("dare_linear", THREE, density=1.0),
    "dare-ties": case("dare_ties", THREE, density=1.0),
    "dare-linear-svd": case("dare_linear_svd", {"a": 1.0, "wide": 0.5}, density=1.0, rank=3),
    "dare-ties-svd": case("dare_ties_svd", {"a": 1.0, "wide": 0.5}, density=1.0, rank=3),
    "magnitude-prune": case("magnitude_prune", THREE, density=0.45),
    "magnitude-prune-svd": case("magnitude_prune_svd", {"a": -1.0, "wide": 0.5}, density=0.3, rank=2),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Linear(INNER, HIDDEN, bias=False)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), Mlp()


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList([Block()])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Decoder()


def factors(module, adapter):
    """A [rank, in] and B [out, rank], or None."""
    if adapter in module.lora_A:
        return module.lora_A[adapter].weight.data, module.lora_B[adapter].weight.data
    if adapter in module.lora_embedding_A:
        return module.lora_embedding_A[adapter].data, module.lora_embedding_B[adapter].data
    return None


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    rng = torch.Generator().manual_seed(args.seed)

    names = list(ADAPTERS)
    model = get_peft_model(Model(), LoraConfig(**ADAPTERS[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**ADAPTERS[name]))
    modules = {path: model.base_model.model.get_submodule(path) for path in (EMBED, Q, DOWN)}
    tensors, scales = {}, {name: {} for name in names}
    for path, module in modules.items():
        for name in names:
            pair = factors(module, name)
            if pair is None:
                continue
            for which, parameter in zip("AB", pair):
                parameter.copy_(torch.randn(parameter.shape, generator=rng))
                tensors[f"{name}.{path}.{which}"] = parameter.clone()
            scales[name][path] = module.scaling[name]
    for name, options in CASES.items():
        model.base_model.add_weighted_adapter(
            list(options["weights"]), list(options["weights"].values()), name,
            combination_type=options["method"], density=options["density"], svd_rank=options["rank"],
        )  # fmt: skip
        for path, module in modules.items():
            a, b = factors(module, name)
            tensors[f"{name}.{path}"] = (module.scaling[name] * b @ a).contiguous()

    args.out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.out / "cases.safetensors")
    text = json.dumps({"scales": scales, "cases": CASES}, indent=1)
    (args.out / "cases.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
