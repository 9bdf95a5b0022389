#!/bin/bash
# How many lines of the compiled core its tests run: run.sh [pytest arguments; default: the set below]
#
# Builds the core with CBWCORE_COVERAGE into a directory of its own (kept and reused where CBWCORE_COVERAGE_DIR names
# one), runs tests there, and prints for each file of the core, and in all, how many of its lines ran; report.py says what
# counts as a line. Fails under 95 %, and on what is listed in unreached.toml, with the reason why it never runs, and is no
# longer there. Lines that did not run and are not listed are told.
#
# CBWCORE_PYTHON: the interpreter (default python3).
set -euo pipefail

root=$(cd "$(dirname "$0")/../.." && pwd)
python=${CBWCORE_PYTHON:-python3}
if [ -n "${CBWCORE_COVERAGE_DIR:-}" ]; then
    work=$CBWCORE_COVERAGE_DIR
    mkdir -p "$work"
else
    work=$(mktemp -d "${TMPDIR:-/tmp}/cbwcore-coverage.XXXXXX")
    trap 'rm -rf "$work"' EXIT
fi

rm -rf "$work/tree" "$work/build" "$work/gcov"
mkdir -p "$work/tree" "$work/gcov"
tar -C "$root" --exclude=./build --exclude=./.git --exclude=__pycache__ --exclude=.hypothesis -cf - . | tar -C "$work/tree" -xf -
if [ ! -x "$work/venv/bin/python" ]; then
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" "$root/tests/requirements.py" >"$work/requirements.txt"
    "$work/venv/bin/python" -m pip install --quiet -r "$work/requirements.txt"
fi
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
    -C cmake.define.CBWCORE_COVERAGE=ON -C install.strip=false -C "build-dir=$work/build" "$work/tree"

# Forked children end without a word to gcov, unless they are told to.
cp "$root/tests/coverage/at_exit.py" "$(echo "$work"/venv/lib/python*/site-packages)/cbwcore_coverage.py"
echo "import cbwcore_coverage" >"$(echo "$work"/venv/lib/python*/site-packages)/cbwcore_coverage.pth"

# What runs the core, and what fails it; the rest of the suite is about the Python around it. Two at a time: all write to
# the same counts.
first=(tests/rules tests/faults tests/storage/test_late_copies.py tests/nbd/test_errors.py tests/nbd/test_transmission.py)
second=(tests/unit/test_bad_input.py tests/unit/test_bench.py tests/unit/bitmap_store tests/unit/test_bitmaps.py
    tests/unit/test_core.py tests/unit/test_disk.py tests/unit/test_engines.py tests/unit/test_limits.py
    tests/unit/nbd/test_{ends,listening,server,server_tls}.py tests/unit/test_snapshot.py tests/unit/test_switches.py
    tests/model/test_bitmap.py tests/concurrency/test_close.py tests/concurrency/test_nbd_loop.py tests/nbd/test_block_status.py
    tests/nbd/test_limits.py tests/nbd/test_waiting.py tests/storage/test_matrix.py::test_zeroes_and_discards_are_guest_writes)
run() { "$work/venv/bin/python" -m pytest -q -p no:cacheprovider "$@"; }
status=0
cd "$work/tree"
rm -rf src
if [ $# -gt 0 ]; then
    run "$@" || status=$?
else
    run "${second[@]}" >"$work/second" 2>&1 &
    run "${first[@]}" || status=$?
    wait $! || status=$?
    cat "$work/second"
fi
cd "$root"

object=$(find "$work/build" -name '_cbwcore.c.gcno')
(cd "$work/gcov" && gcov --json-format --object-directory "$(dirname "$object")" "$object" >/dev/null)
"$work/venv/bin/python" "$root/tests/coverage/report.py" "$root" "$work/build/_cbwcore.c" "$work"/gcov/*.gcov.json.gz || status=1
exit $status
