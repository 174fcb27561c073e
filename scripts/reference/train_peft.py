#!/usr/bin/env python3
"""Train one adapter per example task with PEFT, one after another, and print what each took.

    train_peft.py EXAMPLES [--tasks a,b] [--steps 200] [--threads 2] [--out FOLDER]

The hyperparameters of `examples/train.toml`: rank 8, alpha 16, all linear layers, AdamW at 5e-3 with decay 0.01, 10
warmup steps and then linearly to 0, batches of 16, no clipping, f32. Rows are padded to the longest of their batch and
the loss is on the assistant's turn and its end marker. Prints JSON with seconds and tokens (padding not counted) per task
and in all: the peer that the time of `loramux train` is divided into. Needs torch, transformers 5 and peft 0.21.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100


def read_task(tokenizer, path):
    """Token ids and labels of every conversation."""
    rows = []
    for line in path.read_text().splitlines():
        messages = json.loads(line)["messages"]
        question = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        prompt = tokenizer(question, add_special_tokens=False)["input_ids"]
        answer = tokenizer(messages[-1]["content"] + "<|end|>", add_special_tokens=False)["input_ids"]
        rows.append((prompt + answer, [IGNORED] * len(prompt) + answer))
    return rows


def collate(rows, pad):
    longest = max(len(ids) for ids, _ in rows)
    fill = lambda values, value: values + [value] * (longest - len(values))
    return {
        "input_ids": torch.tensor([fill(ids, pad) for ids, _ in rows]),
        "labels": torch.tensor([fill(labels, IGNORED) for _, labels in rows]),
        "attention_mask": torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows]),
    }


def train(model_folder, rows, pad, steps, out, seed=0):
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    rate = lambda step: (step + 1) / 10 if step < 10 else max(0.0, (steps - step) / (steps - 10))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    order, tokens = [], 0
    started = time.perf_counter()
    for _ in range(steps):
        if len(order) < 16:
            order += torch.randperm(len(rows)).tolist()
        picked, order = order[:16], order[16:]
        batch = collate([rows[index] for index in picked], pad)
        tokens += int(batch["attention_mask"].sum())
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    seconds = time.perf_counter() - started
    if out:
        model.save_pretrained(out)
    return {"seconds": round(seconds, 2), "tokens": tokens}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("examples", type=Path)
    parser.add_argument("--tasks")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = AutoTokenizer.from_pretrained(arguments.examples / "base")
    names = arguments.tasks.split(",") if arguments.tasks else sorted(p.name for p in (arguments.examples / "tasks").iterdir())
    results = {}
    for name in names:
        rows = read_task(tokenizer, arguments.examples / "tasks" / name / "train.jsonl")
        out = arguments.out / name if arguments.out else None
        results[name] = train(arguments.examples / "base", rows, tokenizer.pad_token_id, arguments.steps, out)
    results["all"] = {key: round(sum(task[key] for task in results.values()), 2) for key in ("seconds", "tokens")}
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
