#!/usr/bin/env python3
"""What transformers and PEFT take for the cases of the bench `model`: `model_peers.py CASES OUT [SECONDS [DEVICE]]`.

CASES is what `model --cases` prints: models by their config.json, and steps. Weights are random, bf16, attention is
sdpa, steps are timed as the bench times its own: by the host's clock around many, one wait at the end, medians.

Peers:

- `transformers`: the base alone. Decode steps read a static cache, prefill steps fill a dynamic one;
- `transformers graph`: the same decode step captured in a CUDA graph;
- `peft mixed`: one batch, with the adapter of each sequence in `adapter_names`;
- `peft loop`: the sequences of each adapter as a batch of their own, after `set_adapter`.

OUT gets one JSON object. A peer that fails or does not fit has the reason in place of a time; so has the whole report
where a library is missing. After SECONDS (default 600) nothing new is begun. DEVICE is `cuda` unless said otherwise.
"""

import gc
import json
import statistics
import sys
import time
from pathlib import Path

RANK = 16
# Steps between two waits, and how often that is repeated; less where a step is slow.
STEPS = 8
ROUNDS = 5
SLOW = 0.25


class Timer:
    def __init__(self, torch, device):
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def seconds(self, step, reset=lambda: None):
        """Seconds of a step, of each round."""
        reset()
        step()
        self.synchronize()
        started = time.perf_counter()
        step()
        self.synchronize()
        slow = time.perf_counter() - started > SLOW
        steps, rounds = (1, 3) if slow else (STEPS, ROUNDS)
        results = []
        for _ in range(rounds):
            reset()
            self.synchronize()
            started = time.perf_counter()
            for _ in range(steps):
                step()
            self.synchronize()
            results.append((time.perf_counter() - started) / steps)
        return results


class Decode:
    """Sequences in a static cache of random keys and values, which decode one token each from a context on."""

    def __init__(self, model, config, ids, context, **arguments):
        # Steps are run from the context on; then the cache is set back.
        self.context = context
        self.cache = transformers.StaticCache(config=config, max_cache_len=context + STEPS)
        self.step = lambda: model(
            input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **arguments
        ).logits
        self.step()
        for layer in self.cache.layers:
            layer.keys.normal_()
            layer.values.normal_()
        self.reset()

    def reset(self):
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context - 1)


class Peers:
    def __init__(self, model, device, timer):
        torch.manual_seed(1)
        self.device, self.timer = device, timer
        values = {key: value for key, value in model["config"].items() if key != "model_type"}
        self.config = transformers.AutoConfig.for_model(model["config"]["model_type"], **values)
        with torch.device(device):
            self.model = transformers.AutoModelForCausalLM.from_config(
                self.config, dtype=torch.bfloat16, attn_implementation="sdpa"
            )
        self.model.eval()
        self.adapters = 0

    def load_adapters(self, count):
        while self.adapters < count:
            name = f"adapter-{self.adapters}"
            # Both factors random; in the dtype of the base.
            config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
            with torch.device(self.device):
                if self.adapters == 0:
                    self.model = peft.get_peft_model(
                        self.model, config, adapter_name=name, autocast_adapter_dtype=False
                    )
                else:
                    self.model.add_adapter(name, config, autocast_adapter_dtype=False)
            self.adapters += 1
        self.model.eval()

    def names(self, case):
        """The adapter of each sequence; those with the same are neighbours."""
        return [f"adapter-{i}" for i in sorted(i % case["distinct_adapters"] for i in range(case["sequences"]))]

    def ids(self, sequences, tokens):
        return torch.randint(3, self.config.vocab_size, (sequences, tokens), device=self.device)

    def prepare(self, case, sequences, **arguments):
        """A step of so many of the case's sequences, and what sets it back."""
        ids = self.ids(sequences, case["tokens"])
        if case["step"] == "decode":
            decode = Decode(self.model, self.config, ids, case["context"], **arguments)
            return decode.step, decode.reset
        step = lambda: self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **arguments).logits
        return step, lambda: None

    def base(self, case):
        return self.timer.seconds(*self.prepare(case, case["sequences"]))

    def base_graph(self, case):
        step, reset = self.prepare(case, case["sequences"])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        return self.timer.seconds(graph.replay, reset)

    def mixed(self, case):
        self.load_adapters(case["distinct_adapters"])
        return self.timer.seconds(*self.prepare(case, case["sequences"], adapter_names=self.names(case)))

    def loop(self, case):
        self.load_adapters(case["distinct_adapters"])
        names = self.names(case)
        parts = []
        for name in dict.fromkeys(names):
            self.model.set_adapter(name)
            parts.append((name, *self.prepare(case, names.count(name))))

        def step():
            for name, step_of_part, _ in parts:
                self.model.set_adapter(name)
                step_of_part()

        return self.timer.seconds(step, lambda: [reset() for _, _, reset in parts])

    def of_case(self, case):
        """Functions of a case that time it, by the peer's name."""
        if case["adapters"] == "none":
            graph = case["step"] == "decode" and self.device == "cuda"
            return {"transformers": self.base} | ({"transformers graph": self.base_graph} if graph else {})
        if case["rank"] == RANK:
            return {"peft mixed": self.mixed, "peft loop": self.loop}
        return {}


def import_libraries():
    global peft, torch, transformers
    import peft
    import torch
    import transformers


def reason(error):
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Report:
    def __init__(self, path):
        self.path, self.content = path, {"results": []}

    def note(self, **entries):
        self.content |= entries
        self.write()

    def write(self):
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def add(self, model, case, peer, outcome):
        """What came of a case: it is kept even if the next one ends the process."""
        keys = ("step", "sequences", "tokens", "context", "adapters", "distinct_adapters", "rank")
        self.content["results"].append({"model": model, "peer": peer} | {key: case[key] for key in keys} | outcome)
        self.write()
        shown = f"{outcome['median_ms']:.2f} ms" if "median_ms" in outcome else outcome
        print(model, case["step"], case["sequences"], case["context"], case["adapters"], peer, shown, flush=True)


def time_case(measure, case, deadline):
    if time.monotonic() >= deadline:
        return {"left_out": "no time is left"}
    try:
        seconds = measure(case)
    except Exception as error:  # One peer that fails must not end the others.
        return {"error": reason(error)}
    finally:
        gc.collect()
    median = statistics.median(seconds)
    rate = case["sequences"] * case["tokens"] / median
    return {"median_ms": median * 1e3, "least_ms": min(seconds) * 1e3, "tokens_per_second": rate}


def time_model(model, cases, device, deadline, report):
    peers = Peers(model, device, Timer(torch, device))
    # The base is timed before adapters are put into it.
    for case in sorted(cases, key=lambda case: case["distinct_adapters"]):
        for name, measure in peers.of_case(case).items():
            report.add(model["name"], case, name, time_case(measure, case, deadline))


def main():
    plan, report = json.loads(Path(sys.argv[1]).read_text()), Report(Path(sys.argv[2]))
    deadline = time.monotonic() + (float(sys.argv[3]) if len(sys.argv) > 3 else 600.0)
    device = sys.argv[4] if len(sys.argv) > 4 else "cuda"
    try:
        import_libraries()
        name = torch.cuda.get_device_name() if device == "cuda" else device
    except Exception as error:  # Whatever keeps a library or the device from being used.
        print(f"no peers: {reason(error)}")
        return report.note(left_out=reason(error))
    versions = {library.__name__: library.__version__ for library in (torch, transformers, peft)}
    report.note(device=name, **versions)
    for model in plan["models"]:
        try:
            with torch.no_grad():
                time_model(model, plan["cases"], device, deadline, report)
        except Exception as error:  # A model that does not fit must not end the others.
            report.note(**{f"{model['name']} left out": reason(error)})
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
