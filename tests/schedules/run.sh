#!/bin/bash
# Explore schedules of the engine: run.sh [run.py's arguments; default: what CI runs]
#
# Builds the core's parts with the deterministic scheduler (CBWCORE_YIELD) into a directory of its own, kept and reused where
# CBWCORE_SCHEDULES_DIR names one, and runs run.py there. CBWCORE_SOURCE: another source tree, whose src is to be explored
# (mutations.py uses that). CBWCORE_PYTHON: the interpreter (default python3); cython, cmake and ninja are looked for beside it.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=${CBWCORE_SOURCE:-$(cd "$here/../.." && pwd)}
python=$(command -v "${CBWCORE_PYTHON:-python3}")
PATH="$(dirname "$python"):$PATH"

if [ -n "${CBWCORE_SCHEDULES_DIR:-}" ]; then
    work=$CBWCORE_SCHEDULES_DIR
    mkdir -p "$work"
else
    work=$(mktemp -d "${TMPDIR:-/tmp}/cbwcore-schedules.XXXXXX")
    trap 'rm -rf "$work"' EXIT
fi

{ cmake -S "$root" -B "$work" -G Ninja -DCBWCORE_YIELD=on -DCBWCORE_IO_URING=off -DPython_EXECUTABLE="$python" &&
    cmake --build "$work" --target schedules; } >"$work/log" 2>&1 || { cat "$work/log"; echo "run.sh: the build failed" >&2; exit 2; }
PYTHONPATH="$work" "$python" "$here/run.py" "$@"
