#!/usr/bin/env bash
# Everything that must hold before a change is taken: style, lints, bindings, kernels, documentation, tests, benches,
# repository size.
#
# Needs git, a Rust toolchain, gcc with g++ and Python 3 with venv, but no GPU. Installs what else it uses: rustfmt and
# clippy through rustup, cargo-nextest from source, nvcc, cuobjdump and libclang from PyPI. Nothing is skipped: what
# cannot run fails.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

largest_file=$((10 * 1000 * 1000))
largest_repository=$((25 * 1000 * 1000))
timings=()

# Kernels are judged as the compiler and for the architectures of this repository, whatever the shell prefers.
unset NVCC LORAMUX_CUDA_ARCHS

stage() {
    local name=$1 start=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    "$@"
    timings+=("$(printf '%5d s  %s' $((SECONDS - start)) "$name")")
    printf -- '--- %s: %d s\n' "$name" $((SECONDS - start))
}

need() {
    if ! command -v "$1" >/dev/null; then
        echo "error: \`$1\` is not installed; $2" >&2
        exit 1
    fi
}

install_tools() {
    need git "install it with the system's package manager"
    need cargo "install a Rust toolchain"
    need cc "install a C compiler: Rust links through it"
    need g++ "install it with the system's package manager: nvcc reads C++ through it"
    if ! cargo fmt --version || ! cargo clippy --version; then
        need rustup "install rustfmt and clippy for this toolchain"
        rustup component add rustfmt clippy
    fi
    if ! cargo nextest --version; then
        # A test runner is built once and runs briefly: compile time counts, its own speed does not.
        CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off CARGO_PROFILE_RELEASE_CODEGEN_UNITS=16 \
            cargo install cargo-nextest --locked
        cargo nextest --version
    fi
}

# Git refuses to look into a folder of another owner, as a container may have it.
tracked() {
    git -c safe.directory="$PWD" "$@"
}

check_repository() {
    local file size total=0 failed=0
    while IFS= read -r -d '' file; do
        [[ -f $file ]] || continue
        size=$(stat -c %s -- "$file")
        total=$((total + size))
        if ((size > largest_file)); then
            echo "error: $file has $size bytes; at most $largest_file are allowed" >&2
            failed=1
        fi
    done < <(tracked ls-files -z)
    echo "$total bytes in tracked files"
    if ((total == 0)); then
        echo "error: git lists no tracked file" >&2
        failed=1
    fi
    if ((total >= largest_repository)); then
        echo "error: the tracked files must stay below $largest_repository bytes" >&2
        failed=1
    fi
    # 0: found, 1: not found, else git itself failed.
    local found=0
    tracked grep -nIE '/(home|root|Users)/[A-Za-z0-9._-]' || found=$?
    if ((found == 0)); then
        echo "error: the lines above name a path of somebody's home" >&2
        failed=1
    elif ((found > 1)); then
        failed=1
    fi
    return "$failed"
}

# The crate without nvcc keeps a target folder of its own: `cargo build` would start over after each change of mind.
lint_without_nvcc() {
    NVCC=none cargo clippy --locked --all-targets --target-dir "${CARGO_TARGET_DIR:-target}/without-nvcc" -- -D warnings
}

# The driver that stands in for a GPU, and the kernels in it, once more under the address and undefined behaviour
# sanitizers, whose runtimes must come before everything else in the process.
test_kernels_sanitized() {
    local asan ubsan host
    asan=$(c++ -print-file-name=libasan.so)
    ubsan=$(c++ -print-file-name=libubsan.so)
    host=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
    # Only the tests run under the sanitizers, not cargo itself.
    env LORAMUX_EMULATOR_SANITIZE=address,undefined \
        "CARGO_TARGET_${host}_RUNNER=env LD_PRELOAD=$asan:$ubsan ASAN_OPTIONS=detect_leaks=0 \
         UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1" \
        cargo nextest run --locked --package loramux --test lora_kernels --test cuda_driver --test cuda_elementwise \
            --test cuda_attention --test cuda_sample --test cuda_experts --test cuda_golden
}

build_documentation() {
    RUSTDOCFLAGS=-Dwarnings cargo doc --locked --no-deps
}

stage "tools" install_tools
stage "nvcc" scripts/get-nvcc.sh
stage "repository" check_repository
stage "format" cargo fmt --all --check
stage "bindings" scripts/generate-bindings.sh --check
stage "kernels" scripts/kernel-report.sh --check
stage "lints" cargo clippy --locked --workspace --all-targets -- -D warnings
stage "lints without the CUDA backend" cargo clippy --locked --all-targets --no-default-features -- -D warnings
stage "lints without nvcc" lint_without_nvcc
stage "documentation" build_documentation
stage "tests" cargo nextest run --locked --workspace --exclude loramux-benches
stage "kernels under sanitizers" test_kernels_sanitized
stage "documentation tests" cargo test --locked --doc
stage "benches compile" cargo check --locked --package loramux-benches --benches

printf '\n=== seconds by stage\n'
printf '%s\n' "${timings[@]}"
printf 'all checks passed in %d s\n' "$SECONDS"
