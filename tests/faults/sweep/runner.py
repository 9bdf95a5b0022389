"""Runs cases of the sweep, each in a forked child, and prints a line of JSON for each: run under LD_PRELOAD of shim.c.

python runner.py FOLDER CPU reads cases from stdin, one a line; to replay some by hand: see tests/faults/README.md."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from cases import CONFIGS, Case, counting
from judge import Left, descriptors, judge, judge_process
from workload import Run, check, make_disk, unseen

HANG = 20.0  # seconds


def run_case(home: Path, case: Case) -> dict[str, object]:
    """In the child."""
    make_disk(home)
    before = descriptors()
    run = Run(home, case)
    run.begin_faults()
    try:
        run.run()
    finally:
        run.end_faults()
    check(run.was_hit() or not case.must_hit, "the call that was to fail was not made")
    check(case.action != "kill" or not case.must_hit, "it was to be killed, and was not")
    seen = run.seen()
    errors = list(run.errors)
    gc.collect()
    judge_process(run, before)
    left = Left(run)
    del run
    judge(left)
    return {"seen": seen, "errors": errors, "notes": left.notes[len(errors) :]}


def judge_killed(home: Path, case: Case) -> dict[str, object]:
    """In another child, when the first was killed."""
    left = Left.of_killed(home, case)
    judge(left)
    return {"errors": [], "notes": left.notes}


def in_child(home: Path, case: Case, call: Callable[[Path, Case], dict[str, object]]) -> dict[str, object]:
    """What it returns; else {"wrong": why}, or {"killed": the signal}."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        stderr = os.open(home / "stderr", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(stderr, 2)
        os.close(stderr)
        faulthandler.enable()
        faulthandler.dump_traceback_later(HANG - 2)
        os.unlink(home / "stderr")
        try:
            result = call(home, case)
        except BaseException:
            with unseen():
                result = {"wrong": traceback.format_exc()}
        with unseen():
            os.write(writer, json.dumps(result).encode() + b"\n")
            os._exit(0)
    os.close(writer)
    return outcome(child, reader)


def outcome(child: int, reader: int) -> dict[str, object]:
    text = b""
    end = time.monotonic() + HANG
    hangs = False
    while not text.endswith(b"\n"):
        if not select.select([reader], [], [], max(0, end - time.monotonic()))[0]:
            hangs = True
            os.kill(child, signal.SIGKILL)
            break
        piece = os.read(reader, 65536)
        if not piece:
            break
        text += piece
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if hangs:
        return {"wrong": f"hangs for {HANG} s"}
    if os.WIFSIGNALED(status):
        return {"killed": os.WTERMSIG(status)}
    return json.loads(text) if text else {"wrong": f"exit {status}"}


def try_case(folder: str, case: Case) -> dict[str, object]:
    home = Path(tempfile.mkdtemp(dir=folder))
    try:
        result = in_child(home, case, run_case)
        if result.get("killed") == signal.SIGKILL and case.action == "kill":
            result = in_child(home, case, judge_killed)
        elif "killed" in result:
            result = {"wrong": f"died of signal {result['killed']}"}
        return result
    finally:
        shutil.rmtree(home, ignore_errors=True)


def warm_up(folder: str) -> None:
    """Import all that the workload imports, and all that is cached, before the first child is counted."""
    for config in (CONFIGS[0], CONFIGS[-1]):
        home = Path(tempfile.mkdtemp(dir=folder))
        attach = Run.begin_faults
        try:
            Run.begin_faults = lambda self: None
            run_case(home, counting(config))
        finally:
            Run.begin_faults = attach
            shutil.rmtree(home, ignore_errors=True)


def main() -> None:
    folder = sys.argv[1]
    # One CPU: then cbwcore has one thread for what it would do in several, and the N-th call is the same in each run.
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[int(sys.argv[2])]})
    warm_up(folder)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        case = Case.parse(line)
        print(json.dumps({"case": str(case), **try_case(folder, case)}), flush=True)


if __name__ == "__main__":
    main()
