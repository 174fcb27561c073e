#!/usr/bin/env python3
"""Make golden cases: small random models and adapters, with what transformers + PEFT compute for them.

    make_cases.py OUT [--regression] [--seed N] [--only NAME ...] [--tokenizer MODEL_FOLDER]

Each case becomes a folder in the format of `tests/golden/<family>`:

    model/               config.json, safetensors (one file or shards), tokenizer
    adapters/<name>/     a PEFT folder, as `save_pretrained` writes it
    forward.json         prompts (token ids), a text prompt, a chat, and per adapter the greedy continuation
    forward.safetensors  logits.<adapter>.<prompt> [tokens, vocab] f32; adapter `base` = no adapter
                         greedy_logits.<adapter>.<prompt> [new tokens, vocab] f32, before each greedy choice

The reference is float32 on the CPU with eager attention. It is computed from the written folders, so weights that are
stored in 16 bits count as what the file says. The cases are listed in cases.py; `make_cases.py tests/golden
--regression` makes those of the test suite. Needs torch, transformers 5 and peft 0.21.
"""

import argparse
import json
import math
import os
import re
import shutil
import warnings
import zlib
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # PEFT looks for the base model's config on the hub otherwise

import torch
from cases import CASES, EOS, REGRESSION
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, logging

MAX_NEW_TOKENS = 12
CLEAR = 1e-3  # the least distance of the best two logits at a greedy choice that other arithmetic should agree on
TEXT = "Größe: the company reported a 12% increase 🙂"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " What rose? "}]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def randomise(parameters, rng):
    """Give every parameter random values of a size that keeps activations and adapters visible in the logits."""
    with torch.no_grad():
        for name, p in parameters:
            noise = torch.randn(p.shape, generator=rng, dtype=torch.float32)
            if "magnitude" in name:
                p.mul_(1 + 0.3 * noise.clamp(-2, 2))
            elif "lora_" in name and name.endswith(".bias"):
                p.copy_(0.2 * noise)
            elif "lora_embedding_A" in name:  # [rank, vocabulary]
                p.copy_(0.5 * noise)
            elif "lora_A" in name:  # [rank, in]
                p.copy_(noise / math.sqrt(p.shape[1]))
            elif "lora_" in name:  # B, [out, rank]
                p.copy_(0.3 * noise / math.sqrt(p.shape[1]))
            elif "modules_to_save" in name:
                p.add_(0.3 * p.std() * noise)
            elif p.dim() == 1:  # norms and biases
                p.add_(0.3 * noise)
            else:
                p.copy_(1.2 * noise / math.sqrt(p.shape[1]))


def edit_json(path, change):
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields, indent=2) + "\n")


def old_spelling(config):
    """transformers 4: rope_theta and rope_scaling instead of rope_parameters, torch_dtype instead of dtype."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    partial = rope.pop("partial_rotary_factor", None)
    if partial is not None:
        config["partial_rotary_factor"] = partial
    if config["model_type"] == "phi3":  # has original_max_position_embeddings beside rope_scaling, and says "type"
        rope.pop("original_max_position_embeddings", None)
        rope = {"type": rope.pop("rope_type"), **rope}
    config["rope_scaling"] = None if rope in ({"rope_type": "default"}, {"type": "default"}) else rope
    config["torch_dtype"] = config.pop("dtype")


def load(model_dir):
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="eager").eval()


@torch.no_grad()
def make_model(case, model_dir, tokenizer_dir, rng):
    config = AutoConfig.for_model(
        case["family"],
        **{"vocab_size": 512, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, **case["config"]},
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model.named_parameters(), rng)
    model.to(case["stored"])
    model.save_pretrained(model_dir, **({"max_shard_size": case["shard"]} if case["shard"] else {}))
    before = load(model_dir)(torch.arange(40)[None]).logits

    def respell(fields):
        if case["spelling"] == "v4":
            old_spelling(fields)
        fields.update(case["edit"])
        for key in case["drop"]:
            fields.pop(key, None)

    edit_json(model_dir / "config.json", respell)
    if case["end_tokens"]:
        edit_json(model_dir / "generation_config.json", lambda fields: fields.update(eos_token_id=case["end_tokens"]))
    for name in TOKENIZER_FILES:
        if (tokenizer_dir / name).exists():
            shutil.copy(tokenizer_dir / name, model_dir / name)
    assert torch.equal(before, load(model_dir)(torch.arange(40)[None]).logits), "the edited config means another model"
    return config


def for_family(value, family):
    """The adapter's arguments with the family's module names: Phi-3 has q, k, v in one layer, and gate and up."""
    if family != "phi3":
        return value
    if isinstance(value, dict):
        return {for_family(k, family): for_family(v, family) for k, v in value.items()}
    if isinstance(value, list):
        return sorted({for_family(v, family) for v in value})
    if isinstance(value, str):
        value = re.sub(r"\b[qkv]_proj", "qkv_proj", value)
        return re.sub(r"\b(gate|up)_proj", "gate_up_proj", value)
    return value


@torch.no_grad()
def make_adapter(case, model_dir, folder, options, rng):
    """Writes the adapter; says so and returns false where PEFT refuses the combination."""
    options = for_family(dict(options), case["family"])
    edit, stored = options.pop("edit", {}), options.pop("stored", None)
    try:
        model = get_peft_model(load(model_dir), LoraConfig(task_type="CAUSAL_LM", **options))
        randomise([(n, p) for n, p in model.named_parameters() if p.requires_grad], rng)
        model.save_pretrained(folder)
    except (ValueError, RuntimeError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        print(f"  {folder.name}: PEFT refuses: {error}")
        return False
    (folder / "README.md").unlink()
    edit_json(
        folder / "adapter_config.json",
        lambda fields: fields.update(base_model_name_or_path=f"reference/{case['name']}", **edit),
    )
    if stored is not None:
        weights = folder / "adapter_model.safetensors"
        save_file({name: t.to(stored) for name, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    if stored is None and not edit:  # what was written must be what was made
        ids = torch.arange(40)[None]
        again = PeftModel.from_pretrained(load(model_dir), folder).eval()
        difference = (model.eval()(ids).logits - again(ids).logits).abs().max().item()
        if difference > 1e-5:
            print(f"  {folder.name}: PEFT reads back another adapter than it wrote (logits differ by {difference:.3g})")
    return True


@torch.no_grad()
def reference(model, prompts):
    """Logits of each prompt, greedy continuations, and the logits before each greedy choice."""
    logits, greedy, greedy_logits = [], [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        logits.append(model(ids).logits[0])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=EOS,
            output_logits=True,
            return_dict_in_generate=True,
        )
        greedy.append(out.sequences[0, len(prompt) :].tolist())
        greedy_logits.append(torch.cat(out.logits))
    return logits, greedy, greedy_logits


def make_case(case, out, seed, tokenizer_dir):
    rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {case['name']}".encode()))
    folder = out / case["name"]
    shutil.rmtree(folder, ignore_errors=True)
    model_dir = folder / "model"
    config = make_model(case, model_dir, tokenizer_dir, rng)

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    text_ids = [config.bos_token_id, *tokenizer.encode(TEXT, add_special_tokens=False)]
    random_ids = (torch.randint(5, 512, (n - 1,), generator=rng).tolist() for n in case["prompts"])
    prompts = [[config.bos_token_id, *ids] for ids in random_ids]
    prompts.insert(1, text_ids)
    forward = {"prompts": prompts, "text_prompt": {"index": 1, "text": TEXT}}
    if tokenizer.chat_template:
        forward["chat"] = {
            "messages": CHAT,
            "text": tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True),
            "input_ids": tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=False),
        }

    tensors, greedy = {}, {}

    def record(name, model):
        logits, greedy[name], greedy_logits = reference(model, prompts)
        best = torch.cat(greedy_logits).topk(2).values
        if (closest := (best[:, 0] - best[:, 1]).min().item()) < CLEAR:
            print(f"  {name}: a greedy choice between logits {closest:.2g} apart")
        for i in range(len(prompts)):
            if case["keep"] is None or i in case["keep"]:
                tensors[f"logits.{name}.{i}"] = logits[i].contiguous()
            if case["keep"] is None:
                tensors[f"greedy_logits.{name}.{i}"] = greedy_logits[i].contiguous()
        return logits[1]

    plain = record("base", load(model_dir))
    for group in case["adapters"]:
        for name, options in group(config.num_hidden_layers).items():
            adapter_dir = folder / "adapters" / name
            if make_adapter(case, model_dir, adapter_dir, options, rng):
                changed = record(name, PeftModel.from_pretrained(load(model_dir), adapter_dir).eval())
                if options.get("lora_alpha") and torch.equal(changed, plain):
                    print(f"  {name}: changes nothing")
    forward |= {"greedy": greedy, "max_new_tokens": MAX_NEW_TOKENS}
    (folder / "forward.json").write_text(json.dumps(forward, ensure_ascii=False))
    save_file(tensors, folder / "forward.safetensors")
    print(f"{case['name']}: {len(greedy) - 1} adapters, {len(prompts)} prompts", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder that receives one folder per case")
    parser.add_argument("--regression", action="store_true", help="make the small cases of the test suite")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="make these cases only")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        default=Path(__file__).parents[2] / "tests/golden/llama/model",
        help="model folder whose tokenizer (512 ids) is copied",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore")
    cases = REGRESSION if args.regression else CASES
    names = [case["name"] for case in cases]
    if unknown := set(args.only or []) - set(names):
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    for case in cases:
        if not args.only or case["name"] in args.only:
            make_case(case, args.out, args.seed, args.tokenizer)


if __name__ == "__main__":
    main()
