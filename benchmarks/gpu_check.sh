#!/usr/bin/env bash
# Runs what needs a CUDA device, and appends all that it printed to a file named after date, card
# and torch.
#
#     [PYTHON=python] benchmarks/gpu_check.sh [FOLDER [PART ...]]
#
# FOLDER is docs/measurements by default. Parts, in this order by default: tests, gpt, memcheck,
# choice, kernels, overhead, about 25 minutes with 16 cores; and, where they are named, depth (gpt.py
# for 3 and 6 blocks), graphs (with CUDA graphs) and lives (memcheck of models that grow). A part that
# fails stops no other one; the exit status is 1 if any has failed.
set -euo pipefail

python=${PYTHON:-python}
[[ $python != */* || $python == /* ]] || python=$PWD/$python
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
mkdir -p "${1:-$root/docs/measurements}"
folder=$(cd "${1:-$root/docs/measurements}" && pwd)
shift $(($# > 0 ? 1 : 0))
parts=("$@")
[[ $# -gt 0 ]] || parts=(tests gpt memcheck choice kernels overhead)
for part in "${parts[@]}"; do
    case $part in
    tests | gpt | memcheck | choice | kernels | overhead | depth | graphs | lives) ;;
    *)
        known="tests, gpt, memcheck, choice, kernels, overhead, depth, graphs, lives"
        echo "unknown part $part: there are $known" >&2 && exit 2
        ;;
    esac
done
cd "$root"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1  # whatever else is installed: a warning of its is an error

{ read -r card && read -r versions && read -r torch; } < <("$python" - <<'PY'
import platform

import torch

if torch.cuda.is_available():
    import triton

    print(torch.cuda.get_device_name())
    names = {"Python": platform.python_version(), "torch": torch.__version__}
    names |= {"triton": triton.__version__, "CUDA": torch.version.cuda}
    print(", ".join(f"{name} {version}" for name, version in names.items()))
    print(torch.__version__.partition("+")[0])
PY
) || true
if [[ -z ${torch:-} ]]; then
    echo "$python finds no CUDA device, or no torch and triton" >&2
    exit 1
fi
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || true
revision=$(git describe --always --dirty 2>/dev/null) || revision="not available"
slug=$(tr -cs '[:alnum:]' - <<<"$card" | tr '[:upper:]' '[:lower:]' | sed 's/^-*//; s/-*$//')
file="$folder/$(date -u +%F)-$slug-torch$torch.md"
failed=() workers=() cases=("dormant+telemetry" "active 5%")
if "$python" -c "import xdist" 2>/dev/null; then
    workers=(-p xdist -n "$(($(nproc) < 14 ? $(nproc) : 14))" --dist worksteal)
fi

# Takes out what names the machine: a path in the checkout becomes relative, one of a package starts
# at site-packages, of any other absolute one the last part stays.
clean() {
    local host
    host=$(hostname 2>/dev/null || uname -n)
    sed -uE -e "s#$root/##g; s#$root\b#.#g; s#\b${host:-no host}\b#(host)#g" \
        -e 's#(/[[:alnum:]_.+@~-]+)+/site-packages/#site-packages/#g' \
        -e 's#(^|[^[:alnum:]_.:/])(/[[:alnum:]_.+@~-]+)+/([[:alnum:]_.+@~-]+)#\1.../\3#g'
}

# run COMMAND...: "python" stands for the interpreter, in the heading and in COMMAND.
run() {
    local status=0 command=() word
    for word in "$@"; do
        [[ $word != python ]] || word=$python
        command+=("$word")
    done
    printf '\n### `%s`\n\n```text\n' "$*" >>"$file"
    echo "== $*"
    "${command[@]}" 2>&1 | clean | tee -a "$file" || status=$?
    printf '```\n\nExit status %s.\n' "$status" >>"$file"
    [[ $status -eq 0 ]] || failed+=("$*")
}

skip() {
    echo "== $1"
    printf '\n%s\n' "$1" >>"$file"
}

# memcheck TESTS: those tests with each access looked at.
memcheck() {
    local few=("${workers[@]}")
    if ! command -v compute-sanitizer >/dev/null; then
        skip "No memcheck: compute-sanitizer is not installed."
    else
        # Each tensor is an allocation of its own, so that a write past its end is seen; CUDA graphs
        # ("reduce-overhead") can't be recorded so. Workers take long to start: more than 8 are slower.
        [[ ${#few[@]} -eq 0 ]] || few[3]=$(($(nproc) < 8 ? $(nproc) : 8))
        run env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
            --target-processes all --error-exitcode 86 python -m pytest -q -m gpu -k "$1" \
            "${few[@]}"
    fi
}

[[ -e $file ]] || printf '# %s, torch %s\n' "$card" "$torch" >"$file"
printf '\n## %s\n\n' "$(date -u '+%F %H:%M UTC')" >>"$file"
printf '%s\n' "- card: $card, driver ${driver:-unknown}" "- $versions" "- revision: $revision" >>"$file"
for part in "${parts[@]}"; do
    case $part in
    tests) run python -m pytest -q -m gpu "${workers[@]}" ;;
    overhead) run python benchmarks/overhead.py --device cuda --seeds 1024 ;;
    gpt) run python benchmarks/gpt.py --blocks 12 --cases plain "${cases[@]}" "active 50%" ;;
    depth) run python benchmarks/gpt.py --blocks 3 6 --cases plain "${cases[@]}" ;;
    graphs) run python benchmarks/gpt.py --blocks 12 --mode reduce-overhead --cases plain "active 5%" ;;
    kernels) run python benchmarks/kernels.py ;;
    choice) run python benchmarks/choice.py --device cuda ;;
    memcheck) memcheck "(fused or dense) and not life and not reduce" ;;
    lives) memcheck "(fused or dense) and life" ;;
    esac
done
if [[ ${#failed[@]} -gt 0 ]]; then
    printf 'failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
