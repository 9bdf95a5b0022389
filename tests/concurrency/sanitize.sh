#!/bin/bash
# Run tests under sanitizers: sanitize.sh thread|address,undefined [pytest arguments; default: the sets below]
#
# Builds the core with CBWCORE_SANITIZE into a directory of its own (kept and reused where CBWCORE_SANITIZE_DIR names
# one), runs pytest there, and fails on a failed test or on any report that has a frame in _cbwcore. CPython itself is
# not instrumented; reports without such a frame are counted and shown, and do not fail the run. Under "address", memory
# that the core has allocated and that nobody holds when a process ends is a report, too.
#
# CBWCORE_PYTHON: the interpreter (default python3). CBWCORE_ORACLE_SECONDS and CBWCORE_SEED are handed on.
set -euo pipefail

kind=${1:?usage: sanitize.sh thread|address,undefined [pytest arguments]}
shift
root=$(cd "$(dirname "$0")/../.." && pwd)
python=${CBWCORE_PYTHON:-python3}
tests=(tests/unit tests/model tests/concurrency tests/rules)
# These have none of the core in them, or only that of other processes, which they start or kill.
for other in serve test_{bench,cli,cli_backup,cli_bitmap}.py; do tests+=(--ignore "tests/unit/$other"); done
for other in handshake relay tls; do tests+=(--ignore "tests/unit/nbd/test_$other.py"); done
for other in spin bitmap_kills; do tests+=(--ignore "tests/model/test_$other.py"); done
case $kind in
    thread) library=libtsan.so symbols=(__tsan_)
        tests+=(--ignore tests/unit/test_bad_input.py)      # a thousand refusals, one after the other
        # the sanitizer has pages of its own for those that one test sees untouched, no room for maps of 2^48 bits, and no
        # threads in forked children
        for test in rules/test_r10_arming.py::test_r17_arming_16_tib_costs_no_page_that_no_write_has_touched \
            unit/test_bitmaps.py::test_a_bitmap_of_a_huge_disk_costs_only_what_is_set \
            unit/test_disk.py::test_new_disks_work_in_a_child \
            unit/nbd/test_ends.py::test_a_child_may_have_its_own_server; do
            tests+=(--deselect "tests/$test")
        done ;;
    address,undefined) library=libasan.so symbols=(__asan_ __ubsan_)
        # wrong and lost memory is where things fail
        tests+=(tests/faults)
        for other in refusals sweep found_by_sweep outside; do  # these put a library of their own before libc, or a tracer
            tests+=(--ignore "tests/faults/test_$other.py")
        done ;;
    *) echo "sanitize.sh: $kind is not thread or address,undefined" >&2; exit 2 ;;
esac
# Leaks are looked for by ptrace, which strace has already, and which does not get along with threads that are just ending:
# not in these.
no_leaks=(tests/unit/test_snapshot.py::test_what_is_left_open_at_exit_is_silent
    tests/rules/test_r11_io.py::test_r14_the_system_calls_are_durable_ones)
# Where a ring and what waits for it are in several threads' hands.
over_uring=(tests/concurrency/test_oracle.py tests/concurrency/test_close.py tests/storage/test_late_copies.py
    tests/unit/test_engines.py)

if [ -n "${CBWCORE_SANITIZE_DIR:-}" ]; then
    work=$CBWCORE_SANITIZE_DIR
    mkdir -p "$work"
else
    work=$(mktemp -d "${TMPDIR:-/tmp}/cbwcore-${kind%%,*}.XXXXXX")     # a comma would end it in the options below
    trap 'rm -rf "$work"' EXIT
fi

# a copy of what is there now: the build neither sees the tree's own build directory nor edits made meanwhile
rm -rf "$work/tree" "$work/reports"
mkdir -p "$work/tree" "$work/reports"
tar -C "$root" --exclude=./build --exclude=./.git --exclude=__pycache__ --exclude=.hypothesis -cf - . | tar -C "$work/tree" -xf -
if [ ! -x "$work/venv/bin/python" ]; then
    "$python" -m venv "$work/venv"
    # what pyproject.toml says that the build, the package and its tests need
    "$work/venv/bin/python" "$root/tests/requirements.py" >"$work/requirements.txt"
    "$work/venv/bin/python" -m pip install --quiet -r "$work/requirements.txt"
fi
PATH="$work/venv/bin:$PATH" "$work/venv/bin/python" -m pip install --quiet --no-build-isolation --no-deps --force-reinstall \
    -C "cmake.define.CBWCORE_SANITIZE=$kind" -C install.strip=false "$work/tree"
nm -D "$work"/venv/lib/python*/site-packages/cbwcore/_cbwcore.*.so >"$work/symbols"
for symbol in "${symbols[@]}"; do
    grep -q "$symbol" "$work/symbols" || { echo "sanitize.sh: the core was built without $symbol*" >&2; exit 2; }
done

preload=$(gcc -print-file-name="$library")
[ -e "$preload" ] || { echo "sanitize.sh: gcc has no $library" >&2; exit 2; }
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Python has the sanitizer before all other libraries; the programs that it starts, which know nothing of it, have not.
echo 'import os; os.environ.pop("LD_PRELOAD", None)' >"$site/sitecustomize.py"
cat >"$work/venv/bin/sanitized" <<END
#!/bin/bash
LD_PRELOAD=$preload exec -a "\$0" $(readlink -f "$work/venv/bin/python") "\$@"
END
chmod +x "$work/venv/bin/sanitized"
run=()
if command -v setarch >/dev/null && setarch -R true 2>/dev/null; then
    run=(setarch -R)        # the shadow maps of gcc 12 do not fit every layout that the kernel may choose
else
    echo "sanitize.sh: setarch -R is not allowed here; if the runtime cannot place its shadow memory, that is why" >&2
fi

# Leaks are looked for with ptrace, which not every container allows: a leak that is made on purpose tells.
leaks=0
if [ "$kind" = address,undefined ]; then
    echo '#include <stdlib.h>
int main(void) { return malloc(99) == 0; }' >"$work/leak.c"
    gcc -fsanitize=address -o "$work/leak" "$work/leak.c"
    if { "${run[@]}" "$work/leak" 2>&1 || true; } | grep -q "99 byte"; then
        leaks=1
    else
        echo "sanitize.sh: leaks cannot be looked for here (is ptrace allowed?)" >&2
    fi
fi

# No report file can hide behind pytest's capture: each process writes its own.
log="$work/reports/report"
cat >"$work/suppressions" <<'END'
# glibc frees a thread's TLS when its stack is reused, after an exit that the sanitizer does not see
race:_dl_deallocate_tls
race:__GI__dl_deallocate_tls
END
export TSAN_OPTIONS="suppressions=$work/suppressions:halt_on_error=0:exitcode=0:report_signal_unsafe=0:history_size=7:second_deadlock_stack=1:log_path=$log"
export ASAN_OPTIONS="detect_leaks=$leaks:halt_on_error=1:abort_on_error=1:detect_stack_use_after_return=0:allocator_may_return_null=1:log_path=$log.address"
export LSAN_OPTIONS="exitcode=0:max_leaks=0"    # CPython's own leaks must not fail the processes that tests start
export UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=0:log_path=$log.undefined"
export PYTHONMALLOC=malloc CBWCORE_SANITIZER=$kind

test_these() {
    (cd "$work/tree" && rm -rf src && "${run[@]}" "$work/venv/bin/sanitized" -m pytest -o timeout=1200 -p no:cacheprovider -q "$@")
}

status=0
if [ $# -eq 0 ]; then
    if [ "$kind" = thread ]; then
        CBWCORE_TEST_IO=io_uring test_these "${over_uring[@]}" || status=1
    else
        ASAN_OPTIONS=${ASAN_OPTIONS/detect_leaks=1/detect_leaks=0} test_these "${no_leaks[@]}" || status=1
        for test in "${no_leaks[@]}"; do tests+=(--deselect "$test"); done
    fi
    set -- "${tests[@]}"
fi
test_these "$@" || status=1
"$work/venv/bin/python" "$root/tests/concurrency/sanitizer_reports.py" "$work/reports" || status=1
exit $status
