# Sourced by scripts that need programs from PyPI: they go into `.toolchain`, a Python environment in the repository
# root that git ignores. Versions are exact, so that everybody compiles the same kernels.

toolchain=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.toolchain

# A Python that can make environments; Debian keeps that part in a package of its own.
require_python() {
    if python3 -c 'import ensurepip, venv' 2>/dev/null; then
        return
    fi
    if ((EUID == 0)) && command -v apt-get >/dev/null; then
        apt-get update
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends python3 python3-venv ca-certificates
    else
        echo "error: python3 with its venv module is needed; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    fi
}

# toolchain_install NAME PACKAGE==VERSION...: makes these packages present, and nothing else if they already are.
# Succeeds at once when the record of the last complete installation under NAME lists the same.
toolchain_install() {
    local record=$toolchain/$1.installed
    shift
    if [[ -f $record && $(<"$record") == "$*" ]]; then
        return
    fi
    require_python
    if [[ ! -x $toolchain/bin/pip ]]; then
        python3 -m venv "$toolchain"
    fi
    rm -f "$record"
    "$toolchain/bin/python" -m pip install --quiet --disable-pip-version-check --only-binary :all: "$@"
    echo "$*" >"$record"
}
