#!/bin/bash
# Fuzz the NBD server:   run.sh SECONDS                                  all of it, for that long
#                        run.sh replay transmission|handshake FILE...    what a run has found
#
# First the corpus, then half of the time the compiled transmission loop (transmission.pyx: libFuzzer, AddressSanitizer
# and UndefinedBehaviorSanitizer), and half of it the handshake (atheris_handshake.py). Exits with 1 after a crash, a
# failed oracle, a hang or a leak, says where the input is, and how to replay it.
#
# Debian packages: clang, libclang-rt-14-dev (of clang's version), binutils, openssl; llvm for readable stacks.
# CBWCORE_PYTHON (default python3): has cbwcore and Cython; atheris comes from PyPI into the temporary directory.
# CBWCORE_FUZZ_FOUND: where inputs that fail are kept (default: a new directory under the temporary one).
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python=${CBWCORE_PYTHON:-python3}
usage="usage: run.sh SECONDS | run.sh replay transmission|handshake FILE..."
seconds=${1:?$usage}
only=
if [ "$seconds" = replay ]; then
    only=${2:?$usage}
    shift 2
    [ $# -gt 0 ] || { echo "$usage" >&2; exit 2; }
    files=("$@")
elif ! [[ $seconds =~ ^[1-9][0-9]*$ ]]; then
    echo "$usage" >&2
    exit 2
fi

work=$(mktemp -d "${TMPDIR:-/tmp}/cbwcore-fuzz.XXXXXX")
trap 'rm -rf "$work"' EXIT
found=${CBWCORE_FUZZ_FOUND:-$(mktemp -d "${TMPDIR:-/tmp}/cbwcore-found.XXXXXX")}
mkdir -p "$found/transmission" "$found/handshake"

export ASAN_OPTIONS="quarantine_size_mb=16:detect_stack_use_after_return=1"
export UBSAN_OPTIONS="print_stacktrace=1"
export PYTHONPATH="$root/tests${PYTHONPATH:+:$PYTHONPATH}"
fixed=()
if setarch -R true 2>/dev/null; then
    fixed=(setarch -R)      # the shadow memory does not fit every layout that the kernel may choose
fi

build_transmission() {
    command -v clang >/dev/null || { echo "run.sh: there is no clang" >&2; exit 2; }
    local sanitizers=address,undefined
    # what guides the fuzzer is the product's code, not the oracle's
    printf 'fun:%s\n' '__pyx_f_5judge_*' '__pyx_f_7session_*' '__pyx_f_12transmission_check_*' \
        '__pyx_f_12transmission_restore' LLVMFuzzerCustomMutator LLVMFuzzerInitialize >"$work/ignore"
    "$python" -m cython -3 -I "$root/src" -I "$here" --module-name transmission \
        --output-file "$work/transmission.c" "$here/transmission.pyx"
    clang -c -O2 -g -w -fno-omit-frame-pointer -fno-strict-aliasing \
        -fsanitize=fuzzer-no-link,$sanitizers -fno-sanitize-recover=undefined -fsanitize-coverage-ignorelist="$work/ignore" \
        -I "$("$python" -c 'import sysconfig; print(sysconfig.get_path("include"))')" \
        -o "$work/transmission.o" "$work/transmission.c"
    # Cython's module needs Python, and is never imported: whatever of it were called would trap
    nm -u "$work/transmission.o" |
        sed -n 's/^ *U \(_\?Py[A-Za-z0-9_]*\)$/void \1(void) { __builtin_trap(); }/p' >"$work/python.c"
    clang -g -fsanitize=fuzzer,$sanitizers -o "$work/transmission" "$work/transmission.o" -x c "$work/python.c" -lpthread ||
        { echo "run.sh: clang cannot link a fuzzer; is libclang-rt-*-dev of its version installed?" >&2; exit 2; }
}

get_atheris() {
    "$python" -m pip install --quiet --disable-pip-version-check --only-binary :all: --target "$work/atheris" atheris ||
        { echo "run.sh: PyPI has no atheris for $("$python" --version)" >&2; exit 2; }
    export PYTHONPATH="$PYTHONPATH:$work/atheris"
}

declare -A most=([transmission]=1024 [handshake]=4096)      # bytes of an input

run() {    # run NAME libFuzzer's arguments...
    local name=$1 command
    shift
    command=("${fixed[@]}" "$work/transmission")
    if [ "$name" = handshake ]; then
        command=("$python" "$here/atheris_handshake.py")
    fi
    timeout -k 10 $((${seconds/replay/0} + 300)) "${command[@]}" -artifact_prefix="$found/$name/" -timeout=30 -rss_limit_mb=2048 "$@"
}

failed() {    # failed NAME: what its log says, and what to do
    grep -vE '	(NEW|REDUCE|pulse|RELOAD)|NEW_FUNC' "$work/log" | tail -n 80
    echo "run.sh: $1 FAILED"
    grep -E '^ORACLE|ERROR: |^[A-Za-z]*Error: ' "$work/log" || true
    for file in "$found/$1"/*; do
        [ -e "$file" ] && echo "  replay with: tests/fuzz/run.sh replay $1 $file"
    done
    exit 1
}

fuzz() {    # fuzz NAME SECONDS
    local name=$1 count
    count=$(find "$here/corpus/$name" -type f | wc -l)
    run "$name" -runs=0 "$here/corpus/$name" >"$work/log" 2>&1 || failed "$name"
    mkdir "$work/$name.new"     # what it finds beyond the corpus goes there
    run "$name" -max_total_time="$2" -max_len="${most[$name]}" -dict="$here/nbd.dict" -print_final_stats=1 \
        "$work/$name.new" "$here/corpus/$name" >"$work/log" 2>&1 || failed "$name"
    sed -n "s/^stat::number_of_executed_units: */run.sh: $name: $count of the corpus and /p" "$work/log" | tr -d '\n'
    sed -n 's/^stat::average_exec_per_sec: */ inputs in all, /p' "$work/log" | tr -d '\n'
    echo " a second; $(find "$work/$name.new" -type f | wc -l) with something new"
}

if [ -n "$only" ]; then
    if [ "$only" = handshake ]; then get_atheris; else build_transmission; fi
    run "$only" "${files[@]}"
    exit
fi
build_transmission
get_atheris
fuzz transmission $(((seconds + 1) / 2))
fuzz handshake $(((seconds + 1) / 2))
rmdir "$found/transmission" "$found/handshake"
[ -n "${CBWCORE_FUZZ_FOUND:-}" ] || rmdir "$found"
