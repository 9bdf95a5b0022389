"""A process dies at any step of what it does with persistent bitmaps: nothing that was written is missing afterwards.

One process at a time works on the disk, by a list of operations, and is killed at the n-th step (`bitmap_file.step`:
every boundary between two system calls, or between a system call and the bits) or after the last one; then another one
begins to recover, and may be killed, too; then the test opens the disk. The child tells what it begins and what it has
done through shared memory, as a caller of the library would know it."""

from __future__ import annotations

import json
import mmap
import os
import random
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from bitmap_support import UNIT, die_at, freeze, granules, killed
from hypothesis import given, settings
from hypothesis import strategies as st

import cbwcore
from cbwcore.bitmaps import DirtyBitmap

UNITS = 24
SIZE = UNITS * UNIT - 1000
NAMES = ["a", "b"]
SHM = "/dev/shm" if os.path.isdir("/dev/shm") else None


class Log:
    """Lines that outlive their writer."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 16)
        self._end = 0

    def add(self, line: Any) -> None:
        data = json.dumps(line).encode() + b"\n"
        self._memory[self._end : self._end + len(data)] = data
        self._end += len(data)

    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self._memory[:].rstrip(b"\0").splitlines()]


class State(NamedTuple):
    """What a bitmap may be after the death: with at least these granules."""

    enabled: bool = True
    since: str | None = None
    has: frozenset[int] = frozenset()


class Model:
    """What is known of the bitmaps; ``states[name]``: one of these it is, None: it is not there."""

    def __init__(self) -> None:
        self.now: dict[str, State] = {}
        self.frozen: dict[str, State] = {}  # as at T0; `now` has what came after
        self.written: set[int] = set()

    def folded(self, name: str) -> State:
        """What a death leaves of it."""
        state = self.now[name]
        before = self.frozen.get(name)
        return state if before is None else state._replace(has=state.has | before.has)

    def apply(self, op: list[Any]) -> None:
        kind, name, *rest = op
        if kind == "write":
            touched = {rest[0]}
            self.written |= touched
            self.now = {n: s._replace(has=s.has | touched) if s.enabled else s for n, s in self.now.items()}
        elif kind == "reopen":
            self.now = {n: self.folded(n) for n in self.now}
            self.frozen = {}
        elif kind == "remove":
            del self.now[name]
        elif kind == "freeze":
            self.frozen[name] = self.now[name]
            self.now[name] = self.now[name]._replace(has=frozenset())
        else:
            self.now[name] = self.after(op)
            if kind in ("commit", "replace", "give back"):
                del self.frozen[name]

    def after(self, op: list[Any]) -> State:
        kind, name, *rest = op
        state = self.now.get(name, State())
        if kind == "merge":
            return state._replace(has=state.has | self.folded(rest[0]).has)
        return {
            "add": State(enabled=bool(rest and rest[0])),
            "enable": state._replace(enabled=True),
            "disable": state._replace(enabled=False, since=None),
            "clear": state._replace(since=None, has=frozenset()),
            "commit": state._replace(since=rest[0] if rest else None),
            "replace": state._replace(since=None, has=state.has | {1}),
            "give back": self.folded(name) if name in self.now else state,
        }[kind]

    def possible(self, begun: list[Any] | None) -> dict[str, list[State | None]]:
        """After a death in the middle of ``begun``, if any."""
        found: dict[str, list[State | None]] = {n: [self.folded(n)] for n in self.now}
        if begun is None or begun[0] in ("write", "reopen", "freeze"):
            return found
        name = begun[1]
        found.setdefault(name, [None])
        found[name].append(None if begun[0] == "remove" else self.after(begun))
        return found

    def fits(self, op: list[Any]) -> bool:
        """Whether it can be done."""
        kind, name, *rest = op
        if kind in ("write", "reopen"):
            return True
        there, frozen = name in self.now, name in self.frozen
        if kind == "add":
            return not there
        if kind in ("commit", "replace", "give back"):
            return frozen
        return there and not frozen and (kind != "merge" or rest[0] in self.now)


class Child:
    """Does the operations on a disk."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.disk = cbwcore.Disk(path)
        self.jobs: dict[str, Any] = {}

    def do(self, op: list[Any]) -> None:
        kind, name, *rest = op
        bitmaps = self.disk.bitmaps
        if kind == "write":
            self.disk.pwrite(b"w" * 100, rest[0] * UNIT + 7)
        elif kind == "reopen":
            self.disk.close()
            self.disk, self.jobs = cbwcore.Disk(self.path), {}
        elif kind == "add":
            bitmaps.add(name, enabled=rest[0], persistent=True)
        elif kind == "remove":
            bitmaps.remove(name)
        elif kind == "merge":
            bitmaps[name].merge(bitmaps[rest[0]])
        elif kind == "freeze":
            self.jobs[name] = freeze(self.disk, name)
        elif kind in ("commit", "replace", "give back"):
            snapshot, job = self.jobs.pop(name)
            snapshot.close()
            part = DirtyBitmap(SIZE)
            part.set_range(UNIT, 1)
            {"commit": job.commit, "replace": job.replace, "give back": job.merge}[kind](
                *{"commit": rest, "replace": [part], "give back": []}[kind]
            )
        else:
            getattr(bitmaps[name], kind)()


names = st.sampled_from(NAMES)
operations = st.one_of(
    st.builds(lambda unit: ["write", "", unit], st.integers(0, UNITS - 1)),
    st.builds(lambda unit: ["write", "", unit], st.integers(0, UNITS - 1)),
    st.builds(lambda name, enabled: ["add", name, enabled], names, st.booleans()),
    st.builds(lambda kind, name: [kind, name], st.sampled_from(["remove", "enable", "disable", "clear"]), names),
    st.builds(lambda name, other: ["merge", name, other], names, names),
    st.builds(lambda kind, name: [kind, name], st.sampled_from(["freeze", "freeze", "replace", "give back"]), names),
    st.builds(lambda name, n: ["commit", name, f"backup {n}"], names, st.integers(0, 9)),
    st.just(["reopen", ""]),
)
JOB = [["write", "", 2], ["freeze", "a"], ["write", "", 3]]


def work(path: str, ops: list[list[Any]], log: Log, last_step: int | None) -> None:
    """In a child: what can be done of it."""
    child, model = Child(path), Model()
    die_at(last_step)
    for op in [["add", "a", True], *ops]:
        if model.fits(op):
            log.add(["begin", op])
            child.do(op)
            log.add(["done", op])
            model.apply(op)


def replay(log: Log) -> tuple[Model, list[Any] | None]:
    """What is known, and what was begun."""
    model, begun = Model(), None
    for what, op in log.lines():
        if what == "begin":
            begun = op
        else:
            model.apply(op)
            begun = None
    return model, begun


def judge(path: str, model: Model, begun: list[Any] | None) -> None:
    """Open the disk and compare; write on, close it clean, and compare again."""
    possible = model.possible(begun)
    with cbwcore.Disk(path) as disk:
        assert disk.bitmaps.problem is None
        found = {b.name: State(b.enabled, b.since, frozenset(granules(b))) for b in disk.bitmaps.values()}
        for name, states in possible.items():
            check(name, found.get(name), states)
        for name, state in found.items():
            assert state.has <= model.written | {1} | ({begun[2]} if begun and begun[0] == "write" else set())
            assert name in possible
            assert disk.bitmaps[name].persistent
            assert not disk.bitmaps[name].frozen
        disk.pwrite(b"x", 5 * UNIT)
    with cbwcore.Disk(path) as disk:
        for name, state in found.items():
            assert granules(disk.bitmaps[name]) == state.has | ({5} if state.enabled else set())
            assert disk.bitmaps[name].since == state.since


def check(name: str, found: State | None, states: list[State | None]) -> None:
    for state in states:
        if state is None or found is None:
            if state is found:
                return
        elif (found.enabled, found.since) == (state.enabled, state.since) and found.has >= state.has:
            return
    raise AssertionError(f"bitmap {name}: {found} is none of {states}")


def run(ops: list[list[Any]], last_step: int | None, recovery_step: int | None) -> int:
    """One life and death; the lines of the log that there were."""
    home = tempfile.mkdtemp(prefix="cbwcore-kills-", dir=SHM)
    try:
        path = os.path.join(home, "disk")
        with open(path, "wb") as f:
            f.truncate(SIZE)
        log = Log()
        killed(lambda: work(path, ops, log, last_step))
        if recovery_step is not None:
            killed(lambda: (die_at(recovery_step), cbwcore.Disk(path)))
        judge(path, *replay(log))
        return len(log.lines())
    finally:
        shutil.rmtree(home)


@settings(max_examples=250)
@given(
    st.lists(operations, max_size=14),
    st.none() | st.integers(0, 60),
    st.none() | st.integers(0, 12),
)
def test_nothing_is_missing_whenever_it_dies(ops: list[Any], last_step: int | None, recovery_step: int | None) -> None:
    run(ops, last_step, recovery_step)


@settings(max_examples=1000)
@given(
    st.lists(operations, max_size=30),
    st.none() | st.integers(0, 200),
    st.none() | st.integers(0, 12),
)
@pytest.mark.timeout(1200)
def test_nothing_is_missing_whenever_it_dies_at_length(
    ops: list[Any], last_step: int | None, recovery_step: int | None
) -> None:
    run(ops, last_step, recovery_step)


END = {
    "commit": ["commit", "a", "id"],
    "give back": ["give back", "a"],
    "replace": ["replace", "a"],
    "close": ["reopen", ""],
    "remove": ["remove", "a"],
}


@pytest.mark.parametrize("end", END)
def test_each_step_of_a_job(end: str) -> None:
    """Every step there is between a bitmap's birth and its job's end, and each of the recovery after it."""
    ops = [*([["write", "", 2]] if end == "remove" else JOB), END[end], ["write", "", 4]]
    whole = run(ops, None, None)
    for last_step in range(200):
        lines = run(ops, last_step, None)
        for recovery_step in (0, 2, 3, 5):
            run(ops, last_step, recovery_step)
        if lines == whole:
            break
    else:
        pytest.fail("there is no end")
    assert last_step > 8


def test_guests_write_on_while_jobs_come_and_go(tmp_path: Path) -> None:
    """Killed from outside, at a time that the seed says."""
    rounds(tmp_path, seed=1, count=8)


def test_guests_write_on_while_jobs_come_and_go_at_length(tmp_path: Path) -> None:
    rounds(tmp_path, seed=2, count=150)


def rounds(home: Path, seed: int, count: int) -> None:
    rng = random.Random(seed)
    path = os.fspath(home / "disk")
    with open(path, "wb") as f:
        f.truncate(SIZE)
    with cbwcore.Disk(path) as disk:
        disk.bitmaps.add("a", persistent=True)
    for _ in range(count):
        guests_and_jobs(path, rng)


def guests_and_jobs(path: str, rng: random.Random) -> None:
    """Each guest has its units, and writes there the count of its writes, which is in ``begun`` before. What was begun
    when the snapshot was there is what the commit may take away."""
    begun, at_t0, committed, known = (mmap.mmap(-1, UNITS) for _ in range(4))
    seeds = [rng.randrange(2**32) for _ in range(3)]
    lifetime = rng.uniform(0.01, 0.15)

    def guest(disk: cbwcore.Disk, first: int) -> None:
        mine = random.Random(seeds[first])
        while True:
            unit = mine.randrange(UNITS // 2) * 2 + first
            begun[unit] = min(begun[unit] + 1, 255)
            disk.pwrite(bytes([begun[unit]]), unit * UNIT)
            time.sleep(mine.random() * 0.001)

    def live() -> None:
        disk = cbwcore.Disk(path)
        for first in (0, 1):
            threading.Thread(target=guest, args=(disk, first), daemon=True).start()
        threading.Timer(lifetime, os.kill, (os.getpid(), 9)).start()
        choose = random.Random(seeds[2])
        for number in range(1, 200):
            snapshot, job = freeze(disk, "a")
            begun_then = bytes(begun)  # what begins later is after T0
            snapshot.close()
            if choose.random() < 0.6:
                at_t0[:] = begun_then
                job.commit(f"{number}")
                committed[:] = begun_then
                known[0] = number
            else:
                job.merge()
        time.sleep(60)

    with cbwcore.Disk(path) as disk:
        disk.pwrite(bytes(SIZE), 0)
        disk.bitmaps["a"].clear()
    killed(live)
    with cbwcore.Disk(path) as disk:
        bitmap = disk.bitmaps["a"]
        number = int(bitmap.since or 0)
        assert number >= known[0]  # larger: of a commit that was not known to be done
        base = at_t0 if number > known[0] else committed
        later = [unit for unit in range(UNITS) if disk.pread(1, unit * UNIT)[0] > base[unit]]
        assert [unit for unit in later if not bitmap.is_dirty(unit * UNIT)] == []
