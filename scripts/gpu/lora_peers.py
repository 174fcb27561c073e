#!/usr/bin/env python3
"""What PyTorch takes for the cases of the bench `lora`: `lora_peers.py CASES OUT`.

CASES is what `lora --cases` prints. Timed as the bench times the project's own kernels: CUDA graphs of several layers in
turn, so that nothing is in L2 when a layer begins, events around each replay, the median of many, random numbers.

Peers, all in bf16, with the weights of a group stacked into one matrix:

- `matmul`: the product alone (cuBLAS), without adapters and without what follows it (SwiGLU, residual);
- `bmm`: `matmul`, and for each site two batched products with the A and B of every row gathered;
- `loop`: `matmul`, and for each site and adapter two products over the adapter's rows, as PEFT does it.

Adapters are timed over whole layers; over single groups only for `r16 distinct`, to see where a layer's time goes.

Kernels of other projects can be timed beside them: the folder that LORAMUX_PEERS names (default `.gpu/peers`) may hold
a `peers.py` with a dictionary `PEERS` of name to `make(x, pairs, segments, y)`. `x` is [rows, in]; `pairs` has
(A [rank, in], B [out, rank]) for each adapter, which adapter i applies to the next `segments[i]` rows; `y` is
[rows, out], maybe not contiguous. `make` allocates what it needs and returns a function without arguments that adds
x · Aᵀ · Bᵀ to y and can be captured in a graph.
"""

import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch

# Gathered copies of A and B that would be larger are left out.
MOST_GATHERED_BYTES = 8 << 30
SECONDS_PER_CASE = 0.2


def random_pairs(k, n, ranks):
    return [(torch.randn(rank, k, **on_gpu) * 0.02, torch.randn(n, rank, **on_gpu) * 0.02) for rank in ranks]


def padded(pairs):
    """All A as [adapters, most ranks, in] and all B as [adapters, out, most ranks]."""
    most = max(a.shape[0] for a, _ in pairs)
    a = torch.stack([torch.nn.functional.pad(a, (0, 0, 0, most - a.shape[0])) for a, _ in pairs])
    b = torch.stack([torch.nn.functional.pad(b, (0, most - b.shape[1])) for _, b in pairs])
    return a, b


def make_bmm(x, pairs, segments, y):
    a, b = padded(pairs)
    if x.shape[0] * a.shape[1] * max(a.shape[2], b.shape[1]) * 2 > MOST_GATHERED_BYTES:
        return None
    counts = torch.tensor(segments, device=x.device)
    of_row = torch.repeat_interleave(torch.arange(len(segments), device=x.device), counts)

    def run():
        v = torch.bmm(a[of_row], x.unsqueeze(2))
        y.unsqueeze(2).baddbmm_(b[of_row], v)

    return run


def make_loop(x, pairs, segments, y):
    def run():
        first = 0
        for (a, b), rows in zip(pairs, segments):
            v = x[first : first + rows] @ a.t()
            y[first : first + rows].addmm_(v, b.t())
            first += rows

    return run


class Layer:
    def __init__(self, groups, most_rows):
        self.groups = groups
        self.x, self.weight, self.y = {}, {}, {}
        for group in groups:
            k, n = group["in_features"], sum(group["widths"])
            self.x[group["name"]] = torch.randn(most_rows, k, **on_gpu)
            self.weight[group["name"]] = torch.randn(n, k, **on_gpu) * k**-0.5
            self.y[group["name"]] = torch.empty(most_rows, n, **on_gpu)

    def product(self, group, rows):
        name = group["name"]
        x, weight, y = self.x[name][:rows], self.weight[name].t(), self.y[name][:rows]
        return lambda: torch.mm(x, weight, out=y)

    def deltas(self, group, case, make):
        """A function for each site, or None where the peer declines."""
        name, rows, column, functions = group["name"], case["rows"], 0, []
        for width in group["widths"]:
            y = self.y[name][:rows, column : column + width]
            pairs = random_pairs(group["in_features"], width, case["ranks"])
            function = make(self.x[name][:rows], pairs, case["segments"], y)
            if function is None:
                return None
            functions.append(function)
            column += width
        return functions


def time_graph(functions, times):
    """Seconds of each replay of a graph of `functions`, over `times`."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in functions:
            function()
    graph.replay()
    torch.cuda.synchronize()
    started = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    replays = max(10, min(64, int(SECONDS_PER_CASE / (time.perf_counter() - started))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1e3 / times for a, b in zip(events, events[1:])]


def other_peers():
    folder = Path(os.environ.get("LORAMUX_PEERS", ".gpu/peers"))
    if not (folder / "peers.py").is_file():
        return {}
    sys.path.insert(0, str(folder))
    spec = importlib.util.spec_from_file_location("peers", folder / "peers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.PEERS)


def main():
    cases_path, out_path = sys.argv[1:3]
    plan = json.loads(Path(cases_path).read_text())
    groups = {group["name"]: group for group in plan["groups"]}
    properties = torch.cuda.get_device_properties(0)
    smallest = min(group["in_features"] * sum(group["widths"]) * 2 for group in groups.values())
    count = max(2, -(-4 * properties.L2_cache_size // smallest))
    most_rows = max(case["rows"] for case in plan["cases"])
    layers = [Layer(list(groups.values()), most_rows) for _ in range(count)]
    peers = {"bmm": make_bmm, "loop": make_loop, **other_peers()}
    report = {
        "device": properties.name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "layers": count,
        "results": [],
    }

    def note(case, peer, measure):
        result = {key: case[key] for key in ("target", "rows", "adapters")} | {"peer": peer}
        try:
            seconds = measure()
            if seconds is None:
                result["left_out"] = "needs too much memory"
            else:
                result["median_us"] = statistics.median(seconds) * 1e6
                result["least_us"] = min(seconds) * 1e6
                result["samples"] = len(seconds)
        except Exception as error:  # One peer that fails must not end the others.
            result["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.synchronize()
        report["results"].append(result)
        Path(out_path).write_text(json.dumps(report, indent=1) + "\n")
        shown = f"{result['median_us']:.1f} µs" if "median_us" in result else result
        print(case["target"], case["rows"], case["adapters"], peer, shown, flush=True)
        torch.cuda.empty_cache()

    for case in plan["cases"]:
        of_target = list(groups.values()) if case["target"] == "layer" else [groups[case["target"]]]

        def measure(make, case=case, of_target=of_target):
            functions = []
            for layer in layers:
                for group in of_target:
                    functions.append(layer.product(group, case["rows"]))
                    if make is not None:
                        deltas = layer.deltas(group, case, make)
                        if deltas is None:
                            return None
                        functions.extend(deltas)
            # Short graphs would time the gaps between them.
            rounds = 4 if case["rows"] <= 256 and len(functions) < 500 else 1
            return time_graph(functions * rounds, rounds * len(layers))

        if not case["segments"]:
            note(case, "matmul", lambda: measure(None))
        elif case["target"] == "layer" or case["adapters"] == "r16 distinct":
            for name, make in peers.items():
                note(case, name, lambda make=make: measure(make))


if __name__ == "__main__":
    torch.manual_seed(1)
    on_gpu = {"device": "cuda", "dtype": torch.bfloat16}
    with torch.no_grad():
        main()
