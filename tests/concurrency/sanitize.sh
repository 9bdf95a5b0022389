#!/bin/bash
# Run tests under a sanitizer: sanitize.sh thread|address|undefined [pytest arguments; default: tests/concurrency]
#
# Builds the core with CBWCORE_SANITIZE into a directory of its own (kept and reused where CBWCORE_SANITIZE_DIR names
# one), runs pytest there, and fails on a failed test or on any report that has a frame in _cbwcore. CPython itself is
# not instrumented; reports without such a frame are counted and shown, and do not fail the run.
#
# CBWCORE_PYTHON: the interpreter (default python3). CBWCORE_ORACLE_SECONDS and CBWCORE_SEED are handed on.
set -euo pipefail

kind=${1:?usage: sanitize.sh thread|address|undefined [pytest arguments]}
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${CBWCORE_PYTHON:-python3}
case $kind in
    thread) library=libtsan.so ;;
    address) library=libasan.so ;;
    undefined) library=libubsan.so ;;
    *) echo "sanitize.sh: $kind is not thread, address or undefined" >&2; exit 2 ;;
esac

if [ -n "${CBWCORE_SANITIZE_DIR:-}" ]; then
    work=$CBWCORE_SANITIZE_DIR
    mkdir -p "$work"
else
    work=$(mktemp -d "${TMPDIR:-/tmp}/cbwcore-$kind.XXXXXX")
    trap 'rm -rf "$work"' EXIT
fi

# a copy of what is there now: the build neither sees the tree's own build directory nor edits made meanwhile
rm -rf "$work/tree" "$work/reports"
mkdir -p "$work/tree" "$work/reports"
tar -C "$root" --exclude=./build --exclude=./.git --exclude=__pycache__ --exclude=.hypothesis -cf - . | tar -C "$work/tree" -xf -
if [ ! -x "$work/venv/bin/python" ]; then
    "$python" -m venv "$work/venv"
    "$work/venv/bin/python" -m pip install --quiet "scikit-build-core>=0.10" "cython>=3.1" cmake ninja \
        "bitarray>=3.0" "msgspec>=0.19" "numpy>=1.26" "rich>=13.0" "hypothesis>=6.100" "pytest>=8.0" "pytest-timeout>=2.3"
fi
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
    -C "cmake.define.CBWCORE_SANITIZE=$kind" -C install.strip=false "$work/tree"

preload=$(gcc -print-file-name="$library")
[ -e "$preload" ] || { echo "sanitize.sh: gcc has no $library" >&2; exit 2; }
run=()
if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then
    run=(setarch -R)        # the shadow maps of gcc 12 do not fit every layout that the kernel may choose
else
    echo "sanitize.sh: setarch -R is not allowed here; if the runtime cannot place its shadow memory, that is why" >&2
fi

# No report file can hide behind pytest's capture: each process writes its own.
log="$work/reports/report"
cat >"$work/suppressions" <<'END'
# glibc frees a thread's TLS when its stack is reused, after an exit that the sanitizer does not see
race:_dl_deallocate_tls
race:__GI__dl_deallocate_tls
END
export TSAN_OPTIONS="suppressions=$work/suppressions:halt_on_error=0:exitcode=0:report_signal_unsafe=0:history_size=7:second_deadlock_stack=1:log_path=$log"
export ASAN_OPTIONS="detect_leaks=0:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=0:allocator_may_return_null=1:log_path=$log"
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=0:log_path=$log"
export PYTHONMALLOC=malloc CBWCORE_SANITIZER=$kind

[ $# -gt 0 ] || set -- tests/concurrency
status=0
(cd "$work/tree" && rm -rf src && LD_PRELOAD="$preload" "${run[@]}" "$work/venv/bin/python" -m pytest \
    -o timeout=1200 -p no:cacheprovider -v "$@") || status=$?

# A report runs from a line of "====" to the next (thread, address), or is one "runtime error" line with its stack.
"$work/venv/bin/python" - "$work/reports" <<'END' || status=1
import pathlib, re, sys
ours = others = 0
for file in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    text = file.read_text(errors="replace")
    parts = re.split(r"(?m)^=+$\n?", text) if "====" in text else re.split(r"(?m)^(?=\S.*runtime error:)", text)
    for part in parts:
        if not re.search(r"WARNING: ThreadSanitizer|ERROR: AddressSanitizer|ERROR: LeakSanitizer|runtime error:|FATAL:", part):
            continue
        # what was done, by whom: not how the threads, mutexes and memory came to be
        did = "\n".join(p for p in part.split("\n\n") if not re.match(r"\s*(Thread T|Mutex M|Location is|As if|Hint)", p))
        if "_cbwcore" in did or "FATAL:" in part:
            ours += 1
            print(f"---- {file.name}\n{part}")
        else:
            others += 1
            print(f"---- {file.name} (no frame of the core)\n" + "\n".join(part.splitlines()[:12]))
print(f"sanitize.sh: {ours} reports with a frame in _cbwcore, {others} without")
sys.exit(1 if ours else 0)
END
exit $status
