#!/usr/bin/env python3
"""Train the adapters of golden cases with PEFT and torch.optim.AdamW, and keep traces small enough for a repository.

    make_training.py CASE [CASE ...] [--seed N] [--steps N]

A case is a folder of make_cases.py or tests/golden. Every adapter of it that consists of pairs alone becomes a job that
starts from the adapter as it is. Written into the case:

    train.json         per job its hyperparameters and steps: rows (`input_ids`, `labels` with -100 for no loss), and the
                       loss and gradient norm before each update. Jobs that have a folder `train/<job>` (initial and final
                       adapter, gradients, all whole) stay as they are.
    train.safetensors  `<job>.gradients` (of the first step) and `<job>.final` (weights after the last), each
                       [tensors, 8]: tensors by name, each as its products with eight vectors of signs. Eight products of
                       the difference of two tensors with random signs estimate the difference's norm.

AdamW's first update of an element is its gradient's sign times the learning rate, whatever the size: an element whose
first gradient is nearly 0 moves by chance, and all others after it. So the rows of the first step are drawn until no
element's gradient is below 5e-5 of its tensor's root mean square (or it is 0).

The loss is the mean over the labelled tokens of a step's rows; every row is run by itself, so nothing is padded. float32
on the CPU with eager attention. Needs torch, transformers 5 and peft 0.21.
"""

import argparse
import json
import warnings
import zlib
from pathlib import Path

import torch
from make_cases import load
from peft import PeftModel
from safetensors.torch import save_file
from transformers import logging

ROWS = 2
SIGNS = 8
SMALLEST_GRADIENT = 5e-5
MASK = (1 << 64) - 1
IGNORED = -100


def signs(count):
    """[8, count] of 1 and -1: the low bits of splitmix64's first `count` numbers from 0 (Steele et al. 2014)."""

    def number(index):
        z = (index + 1) * 0x9E3779B97F4A7C15 & MASK
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
        z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
        return z ^ z >> 31

    bits = torch.tensor([number(index) & (1 << SIGNS) - 1 for index in range(count)])
    return torch.stack([1.0 - 2.0 * (bits >> k & 1) for k in range(SIGNS)]).double()


def projections(tensors, table):
    rows = [table[:, : t.numel()] @ t.detach().double().flatten() for _, t in sorted(tensors.items())]
    return torch.stack(rows).float()


def make_row(rng, vocabulary):
    length = int(torch.randint(3, 31, (), generator=rng))
    ids = torch.randint(5, vocabulary, (length,), generator=rng)
    labels = ids.clone()
    labels[: int(torch.randint(0, length - 1, (), generator=rng))] = IGNORED
    labels[1:-1][torch.rand(length - 2, generator=rng) < 0.2] = IGNORED  # as in conversations
    return {"input_ids": ids.tolist(), "labels": labels.tolist()}


def trained(model):
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.replace(".default", ""): p for name, p in named.items()}


def mean_loss(model, rows):
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        logits = model(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        count += int((labels != IGNORED).sum())
    return total / count


def draw_first_rows(model, rng, vocabulary):
    """Rows of whose gradients none is so small that rounding decides its sign."""
    while True:
        rows = [make_row(rng, vocabulary) for _ in range(ROWS)]
        model.zero_grad()
        mean_loss(model, rows).backward()
        gradients = [p.grad.abs() for p in trained(model).values()]
        if all((g[g > 0] >= SMALLEST_GRADIENT * g.square().mean().sqrt()).all() for g in gradients):
            return rows


def train(model, job, steps, tensors, table):
    named = trained(model)
    optimizer = torch.optim.AdamW(
        named.values(), lr=job["lr"], weight_decay=job["wd"], betas=job["betas"], eps=job["eps"]
    )
    for index, step in enumerate(steps):
        loss = mean_loss(model, step["rows"])
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in named.items()}
        norm = torch.cat([g.double().flatten() for g in gradients.values()]).norm()
        step |= {"loss": loss.item(), "grad_norm": norm.item()}
        if index == 0:
            tensors[f"{job['name']}.gradients"] = projections(gradients, table)
        optimizer.step()
    tensors[f"{job['name']}.final"] = projections(named, table)
    return sum(p.numel() for p in named.values())


def is_trainable(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return not config.get("modules_to_save") and config.get("bias") == "none" and not config.get("lora_bias")


def make_traces(case, seed, steps):
    path = case / "train.json"
    jobs = json.loads(path.read_text()) if path.exists() else []
    jobs = [job for job in jobs if (case / "train" / job["name"]).exists()]
    vocabulary = json.loads((case / "model" / "config.json").read_text())["vocab_size"]
    adapters = [folder for folder in sorted((case / "adapters").iterdir()) if is_trainable(folder)]
    table, tensors = None, {}
    for index, folder in enumerate(adapters):
        rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {case.name} {folder.name}".encode()))
        job = {"name": folder.name, "lr": [1e-3, 3e-3, 5e-4][index % 3], "wd": [0.0, 0.1, 0.01][index % 3]}
        job |= {"betas": [0.9, 0.999], "eps": 1e-8, "steps": []}
        model = PeftModel.from_pretrained(load(case / "model"), folder, is_trainable=True).train()
        job["steps"] = [{"rows": draw_first_rows(model, rng, vocabulary)}]
        job["steps"] += [{"rows": [make_row(rng, vocabulary) for _ in range(ROWS)]} for _ in range(steps - 1)]
        largest = max(p.numel() for p in model.parameters() if p.requires_grad)
        table = signs(largest) if table is None or table.shape[1] < largest else table
        count = train(model, job, job["steps"], tensors, table)
        jobs.append(job)
        print(f"{case.name} {folder.name}: {count} numbers, loss {[round(s['loss'], 4) for s in job['steps']]}")
    path.write_text(json.dumps(jobs, separators=(",", ":")) + "\n")
    save_file(tensors, case / "train.safetensors")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, nargs="+", metavar="CASE")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    for case in args.cases:
        make_traces(case, args.seed, args.steps)


if __name__ == "__main__":
    main()
