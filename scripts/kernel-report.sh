#!/usr/bin/env bash
# Prints what every kernel of this build needs of an SM (registers of a thread, named barriers, bytes of shared memory,
# of stack and of spills) and writes it to `benches/results/kernels.json`. With `--check` it writes nothing,
# and fails with the difference where that file tells of other kernels.
#
# The numbers are ptxas', of the nvcc that `cargo build` finds.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

published=benches/results/kernels.json
check=0
case ${1-} in
    --check) check=1 ;;
    "") ;;
    *)
        echo "usage: $0 [--check]" >&2
        exit 2
        ;;
esac

# Cargo tells what build.rs set for the crate.
report=$(cargo check --quiet --locked --message-format=json-render-diagnostics |
    sed -n 's/.*\["LORAMUX_KERNEL_REPORT","\([^"]*\)"\].*/\1/p')
if ! grep -q '"kernel":' "$report"; then
    echo "error: this build has no kernels; scripts/get-nvcc.sh installs nvcc" >&2
    exit 1
fi

# One line per kernel and architecture, with keys and values in turn.
sed -n 's/^ *{"kernel": \(.*\)}.*$/kernel \1/p' "$report" | tr -d '",:' | awk '
    NR == 1 { for (i = 1; i < NF; i += 2) printf(i == 1 ? "%-24s" : "%15s", $i); print "" }
    { for (i = 2; i <= NF; i += 2) printf(i == 2 ? "%-24s" : "%15s", $i); print "" }'

if ((check)); then
    if ! diff -u "$published" "$report"; then
        echo "error: $published is not of these kernels; run scripts/kernel-report.sh" >&2
        exit 1
    fi
else
    cp "$report" "$published"
fi
