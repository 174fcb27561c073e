#!/usr/bin/env bash
# Tests and times the kernels and whole models on a machine with a GPU, CUDA and PyTorch but without Rust, in two steps:
#
#   scripts/gpu.sh pack      here, with Rust and nvcc: leaves stripped test binaries and benches in `.gpu`
#   scripts/gpu.sh run OUT   there, in a copy of this tree with `.gpu`: leaves results.json, table.txt and log.txt in OUT
#
# `run` needs no network and changes no setting of the GPU. A stage that fails or takes too long is noted and the later
# ones still run; the exit code says whether all went well. `results.json` is what is committed under `benches/results`;
# of several runs with some stages each, `scripts/gpu/merge.py join RESULTS... OUT` makes one.
#
# LORAMUX_GPU_STAGES     which of: tests sanitizers lora lora-peers model model-peers; all, in this order, if unset
# LORAMUX_BENCH_SET      short (default) or full
# LORAMUX_BENCH_MODELS   parts of models' names, with commas between: the others are not timed
# LORAMUX_GPU_SECONDS    how long `run` may take in all: 520, or 3600 for the full set
# LORAMUX_SANITIZER_TESTS  tests that run under compute-sanitizer, as `binary:test`
# LORAMUX_PEERS          a folder with kernels of other projects to time: see scripts/gpu/lora_peers.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packed=.gpu
benches=(lora model)
largest_pack=$((40 << 20))
stages=${LORAMUX_GPU_STAGES:-tests sanitizers lora lora-peers model model-peers}
sanitizer_tests=${LORAMUX_SANITIZER_TESTS:-lora_kernels:an_empty_batch_and_a_single_row \
    lora_kernels:an_adapter_without_one_of_the_sites lora_kernels:residual_and_swiglu_epilogues \
    lora_kernels:k_in_slices cuda_golden:logits_of_llama_match cuda_golden:logits_of_phi3_match}

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
    local arguments=() tests name path messages out_dir folder bytes
    command -v cargo >/dev/null || fail "\`cargo\` is not installed: \`pack\` runs where Rust is"
    mapfile -t tests < <(gpu_tests)
    ((${#tests[@]})) || fail "no test under tests/ uses tests/common/cuda_device.rs"
    for name in "${tests[@]}"; do
        arguments+=(--test "$name")
    done
    messages=$(mktemp)
    folder=$(mktemp -d)
    # shellcheck disable=SC2064 # The names are wanted as they are now.
    trap "rm -rf '$messages' '$folder'" EXIT
    cargo test --release --locked --no-run --message-format=json-render-diagnostics "${arguments[@]}" >"$messages"
    cargo bench --locked --no-run --message-format=json-render-diagnostics \
        --package loramux-benches "${benches[@]/#/--bench=}" >>"$messages"

    while IFS=$'\t' read -r name path; do
        case " ${tests[*]} ${benches[*]} " in
            *" $name "*) strip -o "$folder/$name" "$path" ;;
        esac
    done < <(pick_messages executable <"$messages")
    for name in "${tests[@]}" "${benches[@]}"; do
        [[ -x $folder/$name ]] || fail "cargo has not built $name"
    done
    for name in $sanitizer_tests; do
        "$folder/${name%%:*}" --list --format terse | grep -qx "${name#*:}: test" ||
            fail "there is no test ${name#*:} in ${name%%:*}"
    done
    out_dir=$(pick_messages out_dir <"$messages" | tail -n 1 | cut -f 2)
    rm -rf "$packed"
    mkdir "$packed"
    python3 - "$out_dir/kernels.json" "$(git describe --always --dirty)" "$folder" >"$packed/manifest.json" <<'PYTHON' ||
import hashlib, json, pathlib, sys
kernels = json.loads(pathlib.Path(sys.argv[1]).read_text())
if not kernels["kernels"]:
    sys.exit("error: this build has no CUDA kernels: see scripts/get-nvcc.sh")
manifest = {
    "commit": sys.argv[2],
    "nvcc": kernels["nvcc"],
    "archs": kernels["archs"],
    "binaries": {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(pathlib.Path(sys.argv[3]).iterdir())
    },
}
print(json.dumps(manifest, indent=1))
PYTHON
        fail "no manifest"
    # Every binary has all kernels: a dictionary as large as two of them finds the second's in the first.
    tar --create --directory "$folder" --sort=name . | xz --lzma2=preset=6,dict=64MiB >"$packed/binaries.tar.xz"
    ls -l "$folder" "$packed"
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

# Whether a stage is to be run.
wanted() {
    [[ " $stages " == *" $1 "* ]]
}

# share NAME: seconds for one of the timing stages, of what is left for it and those after it.
share() {
    local name weight of_this=0 of_all=0
    for name in lora:4 lora-peers:2 model:4 model-peers:3; do
        weight=${name#*:}
        name=${name%:*}
        if [[ $name == "$1" ]]; then
            of_this=$weight
        fi
        if ((of_this)) && wanted "$name"; then
            of_all=$((of_all + weight))
        fi
    done
    echo $(((budget - SECONDS) * of_this / of_all))
}

# Runs tests under each tool. It slows kernels down a lot: few tests, and little time.
run_sanitizers() {
    local binary tests name tool_name
    for binary in $(printf '%s\n' $sanitizer_tests | cut -d : -f 1 | sort -u); do
        tests=()
        for name in $sanitizer_tests; do
            if [[ $name == "$binary":* ]]; then
                tests+=("${name#*:}")
            fi
        done
        for tool_name in memcheck synccheck racecheck initcheck; do
            stage "sanitizer-$tool_name-$binary" $((budget / 10)) "$(tool compute-sanitizer)" --tool "$tool_name" \
                --error-exitcode 86 --print-limit 10 "$binaries/$binary" --test-threads 1 --exact "${tests[@]}"
        done
    done
}

run() {
    local out=$1 name set=${LORAMUX_BENCH_SET:-short} seconds
    budget=${LORAMUX_GPU_SECONDS:-$([[ $set == full ]] && echo 3600 || echo 520)}
    failed=()
    [[ -f $packed/manifest.json ]] || fail "$packed is not packed: run \`scripts/gpu.sh pack\` where Rust is"
    mkdir -p "$out"
    out=$(cd "$out" && pwd)
    logs=$(mktemp -d)
    binaries=$(mktemp -d)
    # shellcheck disable=SC2064 # The names are wanted as they are now.
    trap "rm -rf '$logs' '$binaries'" EXIT
    python3 -m tarfile --extract "$packed/binaries.tar.xz" "$binaries"
    # Tests read the repository's files from here, not from where they were built.
    export LORAMUX_TEST_DEVICE=cuda CARGO_MANIFEST_DIR=$PWD PYTHONUNBUFFERED=1 LC_ALL=C.UTF-8
    export LORAMUX_BENCH_SET=$set CRITERION_HOME=$logs/criterion

    stage device 20 "$(tool nvidia-smi)" --format=csv \
        --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.max.sm,power.draw,power.limit,temperature.gpu

    if wanted tests; then
        for name in $(packed_tests); do
            stage "tests-$name" $((budget / 6)) \
                python3 scripts/gpu/run_tests.py "$binaries/$name" "$logs/tests-$name.json" $((budget / 6 - 5))
        done
    fi
    if wanted sanitizers; then
        run_sanitizers
    fi
    for name in "${benches[@]}"; do
        if wanted "$name"; then
            LORAMUX_BENCH_RECORDS=$logs/$name.json stage "$name" "$(share "$name")" "$binaries/$name" --bench
        fi
        if wanted "$name-peers"; then
            stage "$name-cases" 20 "$binaries/$name" --cases
            seconds=$(share "$name-peers")
            stage "$name-peers" "$seconds" python3 "scripts/gpu/${name}_peers.py" \
                "$logs/$name-cases.log" "$logs/$name-peers.json" $((seconds - 20))
        fi
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
    python3 -c '
import json, sys
print(*(name for name in json.load(open(sys.argv[1]))["binaries"] if name not in sys.argv[2:]))
    ' "$packed/manifest.json" "${benches[@]}"
}

case ${1:-} in
    pack) pack ;;
    run)
        [[ -n ${2:-} ]] || fail "usage: scripts/gpu.sh run OUT"
        run "$2"
        ;;
    *) fail "usage: scripts/gpu.sh pack | run OUT" ;;
esac
