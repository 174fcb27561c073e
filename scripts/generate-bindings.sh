#!/usr/bin/env bash
# Generates `src/backend/cuda/params.rs` and `kernels/params_layout.h` from `kernels/params.h`. With `--check` it
# writes nothing, and fails with the difference where they are not what it would write.
#
# Reads C with the libclang that LIBCLANG_PATH names, else with one from PyPI, put into `.toolchain`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/toolchain.bash"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

check=0
case ${1-} in
    --check) check=1 ;;
    "") ;;
    *)
        echo "usage: $0 [--check]" >&2
        exit 2
        ;;
esac

if [[ -z ${LIBCLANG_PATH-} ]]; then
    toolchain_install libclang libclang==18.1.1
    LIBCLANG_PATH=$(echo "$toolchain"/lib/python3*/site-packages/clang/native)
    export LIBCLANG_PATH
fi

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo run --quiet --locked --package loramux-bindings -- . "$out"
rustfmt --edition 2024 --config-path rustfmt.toml "$out/params.rs"

failed=0
for file in src/backend/cuda/params.rs kernels/params_layout.h; do
    new=$out/$(basename "$file")
    if ((check)); then
        diff -u "$file" "$new" || failed=1
    elif ! cmp --silent "$new" "$file"; then
        cp "$new" "$file"
        echo "$file"
    fi
done
if ((failed)); then
    echo "error: the bindings are not those of kernels/params.h; run scripts/generate-bindings.sh" >&2
fi
exit "$failed"
