#!/usr/bin/env bash
# Tests and times the kernels on a machine with a GPU, CUDA and PyTorch but without Rust, in two steps:
#
#   scripts/gpu.sh pack      here, with Rust and nvcc: leaves stripped test binaries and the bench in `.gpu`
#   scripts/gpu.sh run OUT   there, in a copy of this tree with `.gpu`: leaves results.json, table.txt and log.txt in OUT
#
# `run` needs no network and changes no setting of the GPU. A stage that fails or takes too long is noted and the later
# ones still run; the exit code says whether all went well. `results.json` is what is committed under `benches/results`.
#
# LORAMUX_BENCH_SET      short (default) or full
# LORAMUX_GPU_SECONDS    how long `run` may take in all: 520, or 3600 for the full set
# LORAMUX_SANITIZER_TESTS  tests of `lora_kernels` that run under compute-sanitizer
# LORAMUX_PEERS          a folder with kernels of other projects to time: see scripts/gpu/torch_peers.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packed=.gpu
largest_pack=$((40 << 20))
sanitizer_tests=${LORAMUX_SANITIZER_TESTS:-an_empty_batch_and_a_single_row an_adapter_without_one_of_the_sites \
    residual_and_swiglu_epilogues k_in_slices}

fail() {
    echo "error: $*" >&2
    exit 1
}

# Tests that can run on a GPU: those that ask this file for their device.
gpu_tests() {
    grep -lE '^mod cuda_device;|common/cuda_device\.rs' tests/*.rs tests/*/main.rs |
        sed -E 's|^tests/||; s|(/main)?\.rs$||'
}

# pick_messages KEY: from cargo's messages, `name<tab>value` for each executable, or the folder of the build script.
pick_messages() {
    python3 -c '
import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if sys.argv[1] == "executable" and message.get("executable"):
        print(message["target"]["name"], message["executable"], sep="\t")
    if sys.argv[1] == "out_dir" and message["reason"] == "build-script-executed":
        if "/loramux#" in message["package_id"] or "loramux@" in message["package_id"] or \
                message["package_id"].startswith("loramux "):
            print("loramux", message["out_dir"], sep="\t")
    ' "$1"
}

pack() {
    local arguments=() tests name path messages out_dir listed bytes
    command -v cargo >/dev/null || fail "\`cargo\` is not installed: \`pack\` runs where Rust is"
    mapfile -t tests < <(gpu_tests)
    ((${#tests[@]})) || fail "no test under tests/ uses tests/common/cuda_device.rs"
    for name in "${tests[@]}"; do
        arguments+=(--test "$name")
    done
    messages=$(mktemp)
    # shellcheck disable=SC2064 # The name is wanted as it is now.
    trap "rm -f '$messages'" EXIT
    cargo test --release --locked --no-run --message-format=json-render-diagnostics "${arguments[@]}" >"$messages"
    cargo bench --locked --no-run --message-format=json-render-diagnostics \
        --package loramux-benches --bench lora >>"$messages"

    rm -rf "$packed"
    mkdir "$packed"
    while IFS=$'\t' read -r name path; do
        case " ${tests[*]} lora " in
            *" $name "*) strip -o "$packed/$name" "$path" ;;
        esac
    done < <(pick_messages executable <"$messages")
    for name in "${tests[@]}" lora; do
        [[ -x $packed/$name ]] || fail "cargo has not built $name"
    done
    listed=$("$packed/lora_kernels" --list --format terse)
    for name in $sanitizer_tests; do
        grep -qx "$name: test" <<<"$listed" || fail "lora_kernels has no test $name"
    done
    out_dir=$(pick_messages out_dir <"$messages" | tail -n 1 | cut -f 2)
    python3 - "$out_dir/kernels.json" "$(git describe --always --dirty)" "$packed" <<'PYTHON' || fail "no manifest"
import hashlib, json, pathlib, sys
kernels = json.loads(pathlib.Path(sys.argv[1]).read_text())
folder = pathlib.Path(sys.argv[3])
if not kernels["kernels"]:
    sys.exit("error: this build has no CUDA kernels: see scripts/get-nvcc.sh")
manifest = {
    "commit": sys.argv[2],
    "nvcc": kernels["nvcc"],
    "archs": kernels["archs"],
    "binaries": {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.iterdir())
    },
}
(folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
PYTHON
    ls -l "$packed"
    bytes=$(du -sb "$packed" | cut -f 1)
    echo "$bytes bytes in $packed"
    ((bytes <= largest_pack)) || fail "at most $largest_pack bytes are meant to travel"
}

# stage NAME SECONDS COMMAND...: runs it for at most that long, and at most until the whole run's time is over.
stage() {
    local name=$1 limit=$2 code=0 started=$SECONDS left=$((budget - SECONDS))
    shift 2
    limit=$((limit < left ? limit : left))
    if ((limit > 0)); then
        timeout --kill-after=5 "$limit" "$@" >"$logs/$name.log" 2>&1 || code=$?
    else
        echo "no time is left" >"$logs/$name.log"
        code=124
    fi
    printf '%s\t%d\t%d\t%s\n' "$name" "$code" $((SECONDS - started)) "$*" >>"$logs/stages.tsv"
    if ((code)); then
        failed+=("$name")
        echo "--- $name: exit code $code after $((SECONDS - started)) s; its last lines:"
        tail -n 15 "$logs/$name.log"
    else
        echo "--- $name: $((SECONDS - started)) s"
    fi
}

# An NVIDIA tool, on PATH or where the toolkit is installed by default.
tool() {
    command -v "$1" || echo "/usr/local/cuda/bin/$1"
}

run() {
    local out=$1 name tool_name set=${LORAMUX_BENCH_SET:-short} peers_limit
    budget=${LORAMUX_GPU_SECONDS:-$([[ $set == full ]] && echo 3600 || echo 520)}
    failed=()
    [[ -f $packed/manifest.json ]] || fail "$packed is not packed: run \`scripts/gpu.sh pack\` where Rust is"
    chmod u+x "$packed"/*
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    logs=$(mktemp -d)
    # shellcheck disable=SC2064 # The name is wanted as it is now.
    trap "rm -rf '$logs'" EXIT
    export LORAMUX_TEST_DEVICE=cuda CARGO_MANIFEST_DIR=$PWD PYTHONUNBUFFERED=1 LC_ALL=C.UTF-8
    export LORAMUX_BENCH_SET=$set LORAMUX_BENCH_RECORDS=$logs/bench.json CRITERION_HOME=$logs/criterion

    stage device 20 "$(tool nvidia-smi)" --format=csv \
        --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu

    for name in $(packed_tests); do
        stage "tests-$name" $((budget / 8)) \
            python3 scripts/gpu/run_tests.py "$packed/$name" "$logs/tests-$name.json" $((budget / 8 - 5))
    done

    stage cases 20 "$packed/lora" --cases
    stage bench $((budget * 9 / 20)) "$packed/lora" --bench
    # What is left, but for the sanitizers' share.
    peers_limit=$((budget * 17 / 20 - SECONDS))
    stage peers "$peers_limit" python3 scripts/gpu/torch_peers.py "$logs/cases.log" "$logs/peers.json"

    # The sanitizers slow kernels down a lot: few tests, and the time that is left.
    for tool_name in memcheck synccheck racecheck initcheck; do
        # shellcheck disable=SC2086 # A list of names.
        stage "sanitizer-$tool_name" $((budget / 10)) "$(tool compute-sanitizer)" --tool "$tool_name" \
            --error-exitcode 86 --print-limit 10 \
            "$packed/lora_kernels" --test-threads 1 --exact $sanitizer_tests
    done

    python3 scripts/gpu/merge.py "$logs" "$packed/manifest.json" "$out/results.json" >"$out/table.txt"
    for name in "$logs"/*.log; do
        printf '\n=== %s\n' "${name##*/}"
        cat "$name"
    done >"$out/log.txt"
    cat "$out/table.txt"
    if ((${#failed[@]})); then
        echo "failed: ${failed[*]}"
        return 1
    fi
}

# Names of the packed test binaries.
packed_tests() {
    python3 -c 'import json, sys; print(*(n for n in json.load(open(sys.argv[1]))["binaries"] if n != "lora"))' \
        "$packed/manifest.json"
}

case ${1:-} in
    pack) pack ;;
    run)
        [[ -n ${2:-} ]] || fail "usage: scripts/gpu.sh run OUT"
        run "$2"
        ;;
    *) fail "usage: scripts/gpu.sh pack | run OUT" ;;
esac
