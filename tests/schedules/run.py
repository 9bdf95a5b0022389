"""Explore schedules of the engine: every one of a few operations, and more operations at random.

    run.py [--seconds N] [--seed S] [--schedules N]    what CI runs: all pairs, chosen triples, some by seed, walks
    run.py --all                                       all triples; hours
    run.py --case CASE                                 one case, whole
    run.py --replay CASE:PATH                          the schedule that a failure has printed, step by step

A case is SETTINGS:OPERATION,OPERATION..., the names being those of `schedules.SETTINGS` and `schedules.OPERATIONS`.
Needs the module that run.sh builds. Exits with 1 where a schedule fails; it prints the schedule, and how to replay it.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import random
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any

import schedules

# What is explored in pairs and triples. Left out are those that differ from these by the cluster alone.
CHOSEN = [
    "w0",
    "w",
    "wa0",
    "p0",
    "z0",
    "d0",
    "v",
    "n",
    "r",
    "ra0",
    "s",
    "x",
    "t",
    "fw",
    "fr",
    "fd",
    "b",
    "c",
    "C",
    "a",
    "g",
    "f",
    "F",
    "j",
]
NEED_SNAPSHOT = {"r0", "r", "ra0", "ra", "s", "x0", "x", "b", "c", "j"}
ARMING = {"a", "g", "f", "F"}
MOST_ARMING = 2  # of a case: maps, and places in the oracle

MOST_STATES = 300_000  # of a triple that is drawn by seed
LEAST_SECONDS = 10  # for such triples

# The rules between three that are met by no two, each explored whole in CI.
TRIPLES = [
    "G1:w0,w0,r0",  # R1, R3: two writers and a reader
    "G1:w,p0,r",  # over both clusters
    "S1:w0,w0,fw",  # R3, R7: the second finds the first one's copy failed, or the snapshot broken
    "G1:w0,w0,fr",
    "S1:w0,fw,r",  # R7: a read that is under way at the break
    "S1:w0,fr,r",
    "St1:w0,t,r",  # R8: a copy that outlives its timeout, and a reader
    "Gt1:w0,w0,t",
    "St1:w0,w0,t",
    "St1:w0,t,c",  # close waits for the late copy
    "Gt1:w0,t,C",
    "G1:w0,x,r",  # a discard under a reader, and a writer
    "G1:w0,x,w0",
    "S1:w0,fw,x",
    "G1:w0,j,w1",  # a job and two guests
    "S1:w0,j,fw",  # a job whose snapshot breaks
    "S1:w0,j,fr",
    "G1:w0,j,c",  # or is closed
    "G1:w0,j,C",
    "Gt1:w0,j,t",  # or whose guest is out of patience
    "St1:w0,j,t",
    "G1:w0,c,r",
    "G1:w0,C,r0",
    "G1:w0,c,w0",
    "S1:w0,fw,c",  # a break under a close
    "S1:w0,fr,c",
    "S1:w0,fw,C",
    "Gt1:w0,x,t",  # a discard under a copy that is late
    "St1:w0,x,t",
    "Gh1:z0,s,w1",  # R20
    "Gh1:w,s,d0",
    "G1:w0,s,x",
    "G0:w0,w0,a",  # R10
    "G1:w0,a,r0",
    "G0:w0,W0,g",
    "S0:w0,g,fw",  # a group of which one breaks as it is taken
    "S0:w0,g,fr",
    "G0:w0,f,w1",  # a frozen bitmap and two guests
    "G0:w0,f,C",  # and the disk closed before the job has ended
    "S0:w0,F,fw",
    "G2:w0,w0,r0",  # R15
    "Gm2:w,w0,r0",  # R17: buffers are short
    "Sq1:w,w,fr",
    "Go1:z0,w0,r0",
    "G1:fw,w0,b",
    "G1:wa0,w0,ra0",  # what waits for nothing
    "S1:w0,wa0,fw",
    "S1:w0,fw,ra0",
    "G1:w0,x,ra0",
    "G1:wa0,c,ra0",
    "G0:wa0,w0,a",
    "G0:wa0,f,w0",
]


def settings(operations: Iterable[str]) -> Iterator[str]:
    """The worlds in which these operations are explored."""
    names = set(operations)
    snapshots = "1" if names & NEED_SNAPSHOT or not names & ARMING else "0"
    policies = "GS" if names & {"fw", "fr", "t"} and "b" not in names else "G"
    timeout = "t" if "t" in names else ""
    for policy in policies:
        yield f"{policy}{timeout}{snapshots}"
        if "s" in names and policy == "G":
            yield f"{policy}{timeout}h{snapshots}"


def too_many(names: Iterable[str]) -> bool:
    """Snapshots, or freezes of the one bitmap."""
    counts = [sum(name in kind for name in names) for kind in (ARMING, {"f", "F"})]
    return counts[0] > MOST_ARMING or counts[1] > 1


def tuples(count: int) -> Iterator[str]:
    """All cases of so many operations."""
    for names in itertools.combinations_with_replacement(CHOSEN, count):
        frozen = sum(name in ("f", "F") for name in names)
        if (
            sum(name in ARMING for name in names) > MOST_ARMING
            or frozen > 1
            or sum(n in ("fw", "fr", "fd") for n in names) > 1
        ):
            continue
        if all(name in ("t", "fw", "fr", "fd", "b") for name in names):
            continue
        for world in settings(names):
            yield f"{world}:{','.join(names)}"


def draw(r: random.Random) -> str:
    """A case of two to six operations."""
    while True:
        names = [r.choice(list(schedules.OPERATIONS)) for _ in range(r.randint(2, 6))]
        if too_many(names):
            continue
        number = r.choice("012")
        if number == "0" and set(names) & (NEED_SNAPSHOT | {"R"}):
            continue
        if "R" in names and number != "2":
            continue
        letters = r.choice("GS") + number + "".join(x for x in "thoqkm" if r.random() < 0.3)
        if "t" in names and "t" not in letters:
            letters += "t"
        return f"{letters}:{','.join(names)}"


def split(case: str) -> tuple[str, list[str]]:
    letters, _, names = case.partition(":")
    return letters, names.split(",")


def explore(case: str, most_states: int = 30_000_000) -> dict[str, Any]:
    began = time.monotonic()
    return {"case": case, **schedules.explore(*split(case), most_states), "seconds": time.monotonic() - began}


def explore_until(case: str, until: float) -> dict[str, Any] | None:
    """One that was drawn; None where it would begin too late."""
    return explore(case, MOST_STATES) if time.monotonic() < until else None


def walk(case: str, seed: int, count: int) -> dict[str, Any]:
    began = time.monotonic()
    return {"case": case, **schedules.walk(*split(case), seed, count), "seconds": time.monotonic() - began}


def readable(where: str, what: str) -> str:
    """A point's name, from those that Cython gives: "snapshot_preserve: s->lock"."""
    mangled = re.fullmatch(r"__pyx_f_(?:\d+cbwcore_)?(\d+)(.*)", where)
    where = mangled[2][int(mangled[1]) :].lstrip("_") if mangled else where
    what = re.sub(r"__pyx_[vt]_(\d+schedules_)?", "", what)
    return f"{where}: {what.strip('(&)')}"


def tell(result: dict[str, Any]) -> None:
    """Of a schedule that failed: what, each step that changes the task, and how to see it again."""
    case, path = result["case"], result["path"]
    print(f"run.py: {case}: {result['text'] or result['status']}")
    replayed, steps = schedules.replay(*split(case), path)
    names = ["", *split(case)[1]]
    for task, where, what in steps:
        print(f"  {task} {names[task] if task < len(names) else 'helper':7} {readable(where, what)}")
    print(f"  replayed: {replayed['text'] or replayed['status']}")
    print(f"run.py: replay with: tests/schedules/run.sh --replay {case}:{path}", flush=True)


class FailedError(Exception):
    """A schedule failed; it has been told."""


class Total:
    """What was run, and the first failure."""

    def __init__(self) -> None:
        self.states = self.steps = self.ends = self.cases = self.seconds = 0
        self.unfinished: list[str] = []

    def add(self, result: dict[str, Any] | None) -> None:
        if result is None:
            return
        if result["status"] in ("violation", "bad schedule"):
            tell(result)
            raise FailedError
        if result["status"] == "limit":
            self.unfinished.append(result["case"])
        self.cases += 1
        self.states += result["states"]
        self.steps += result["steps"]
        self.ends += result["schedules"]
        self.seconds += result["seconds"]


def run_all(
    pool: ProcessPoolExecutor, cases: Iterable[tuple[Callable[..., dict[str, Any] | None], Any]], keep: bool
) -> Total:
    """Run them, a few ahead; with ``keep`` failures do not end it."""
    total = Total()
    waiting: list[Future[dict[str, Any]]] = []
    failed = False
    for function, *arguments in itertools.chain(cases, [(None,)]):
        if function is not None:
            waiting.append(pool.submit(function, *arguments))
        while waiting and (function is None or len(waiting) > 3 * (os.cpu_count() or 1)):
            try:
                total.add(waiting.pop(0).result())
            except FailedError:
                failed = True
                if not keep:
                    for future in waiting:
                        future.cancel()
                    raise
    if failed:
        raise FailedError
    return total


def ci(pool: ProcessPoolExecutor, seconds: float, seed: int, least: int) -> None:
    """The time that is left after the fixed cases is halved: triples drawn by seed, and walks."""
    began = time.monotonic()
    print(f"run.py: seed {seed}", flush=True)
    cases = [*tuples(1), *tuples(2), *TRIPLES]
    total = run_all(pool, ((explore, case) for case in cases), keep=False)
    print(
        f"run.py: {total.cases} cases explored whole: {total.states} states, {total.steps} steps, {total.ends} ends; "
        f"{time.monotonic() - began:.0f} s",
        flush=True,
    )
    if total.unfinished:
        raise SystemExit(f"run.py: not finished: {total.unfinished}")
    r = random.Random(seed)
    explore_drawn(pool, r, began + seconds)
    drawn = 0

    def more() -> Iterator[tuple[Any, ...]]:
        nonlocal drawn
        while drawn < least or time.monotonic() < began + seconds:
            yield walk, draw(r), seed * 1_000_003 + drawn, 50
            drawn += 50

    began_walking = time.monotonic()
    total = run_all(pool, more(), keep=False)
    spent = time.monotonic() - began_walking
    print(
        f"run.py: seed {seed}: {total.ends} schedules at random of {total.cases} cases, {total.steps} steps; "
        f"{spent:.0f} s, {total.ends / max(spent, 0.001):.0f} schedules/s"
    )


def explore_drawn(pool: ProcessPoolExecutor, r: random.Random, end: float) -> None:
    """Triples in an order by seed, whole, for half of the time up to ``end``, and for a while where none is left.
    Those with too many states are told of."""
    began = time.monotonic()
    cases = list(tuples(3))
    r.shuffle(cases)
    until = began + max((end - began) / 2, LEAST_SECONDS)

    def some() -> Iterator[tuple[Any, ...]]:
        for case in cases:
            if time.monotonic() > until:
                return
            yield explore_until, case, until

    total = run_all(pool, some(), keep=False)
    print(
        f"run.py: {total.cases - len(total.unfinished)} of {len(cases)} triples, drawn by the seed, explored whole: "
        f"{total.states} states; {time.monotonic() - began:.0f} s; "
        f"of more than {MOST_STATES} states, and not finished: {total.unfinished}",
        flush=True,
    )


def today() -> int:
    """The seed of a day: every CI of it draws the same."""
    return datetime.datetime.now(datetime.UTC).toordinal()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=90, help="draw until then (default 90)")
    parser.add_argument(
        "--seed", type=int, default=today(), help="of what is drawn (default: the day, UTC; is printed)"
    )
    parser.add_argument("--schedules", type=int, default=10_000, help="walks at least (default 10000)")
    parser.add_argument("--all", action="store_true", help="explore all triples")
    parser.add_argument("--case", action="append", help="explore this case alone; may be given again")
    parser.add_argument("--replay", metavar="CASE:PATH")
    options = parser.parse_args()
    if options.replay:
        case, _, path = options.replay.rpartition(":")
        result = schedules.replay(*split(case), path)[0]
        tell({**result, "case": case, "path": path})
        return result["status"] != "ok"
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        try:
            if options.case or options.all:
                total = run_all(pool, ((explore, case) for case in options.case or tuples(3)), keep=True)
                print(f"run.py: {total.cases} cases: {total.states} states, {total.steps} steps, {total.seconds:.0f} s")
                print(f"run.py: not finished: {total.unfinished}")
            else:
                ci(pool, options.seconds, options.seed, options.schedules)
        except FailedError:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
