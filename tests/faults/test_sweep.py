"""The syscall sweep: a fixed workload in which every single call fails in every way that Linux knows, one run for each.

A run fails one call (or all from one on), cuts one short, or kills the process in it; an oracle judges what the guest
got, the disk's bytes, the snapshot, the backups, the bitmap and what is left behind. See tests/faults/sweep.

By default each call of the workload meets one failure, which one is the seed's to say. CBWCORE_SWEEP=whole runs all of
them (about an hour), CBWCORE_SWEEP="psync/buffered/G process write 12 EIO once" that one case, as a failure prints
it."""

import itertools
import json
import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cbwcore.engines import choose_engine

SWEEP = Path(__file__).with_name("sweep")
sys.path.insert(0, str(SWEEP))

from cases import CONFIGS, PROCESS, Case, all_cases, counting  # noqa: E402

WANTED = os.environ.get("CBWCORE_SWEEP", "")
# The calls of the whole process differ by how the disk is opened, hardly by engine or policy: two of the eight.
WHOLE_PROCESS = {"psync/buffered/G", "psync/direct/S"}
RUNNERS = min(2, len(os.sched_getaffinity(0)))


class Runner:
    """A process that tries one case after the other."""

    def __init__(self, shim, folder, cpu):
        self._process = subprocess.Popen(
            [sys.executable, SWEEP / "runner.py", folder, str(cpu)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "LD_PRELOAD": str(shim)},
        )

    def work(self, cases, results):
        """On what others leave."""
        for case in cases:
            try:
                self._process.stdin.write(f"{case}\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except OSError:
                line = ""
            results.append(json.loads(line) if line else {"case": str(case), "wrong": "the runner has ended"})
            if not line:
                return

    def close(self):
        with self._process:
            self._process.kill()


class Shared:
    """An iterator for several threads."""

    def __init__(self, items):
        self._items = iter(items)
        self._lock = threading.Lock()

    def __iter__(self):
        return self

    def __next__(self):
        with self._lock:
            return next(self._items)


@pytest.fixture(scope="module")
def runners(shim, session_resources):
    folder = session_resources.place("tmpfs")
    runners = [Runner(shim, folder, cpu) for cpu in range(RUNNERS)]
    yield runners
    for runner in runners:
        runner.close()


@pytest.fixture
def sweep(runners):
    """``sweep(cases)``: what each of them came to; a test fails by what is wrong in any."""

    def sweep(cases):
        shared, results = Shared(cases), []
        threads = [threading.Thread(target=runner.work, args=(shared, results)) for runner in runners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wrong = [result for result in results if "wrong" in result]
        if wrong:
            told = "\n".join(f"CBWCORE_SWEEP={r['case']!r}\n{r['wrong'][-1500:]}" for r in wrong[:5])
            pytest.fail(f"{len(wrong)} of {len(results)} runs are wrong:\n{told}", pytrace=False)
        assert len(results) == len(cases)
        return results

    return sweep


def some_of(cases, seed):
    """One action for each call; of the many questions to the file system, which change nothing, every third."""
    rng = random.Random(seed)
    calls = itertools.groupby(cases, key=lambda case: (case.place, case.kind, case.nth))
    chosen = [rng.choice(list(group)) for _, group in calls]
    return [case for case in chosen if case.kind not in ("stat", "seek") or (case.nth + seed) % 3 == 0]


def steady(seen):
    """Without what depends on whether a helper thread is idle already, or a copy has become late."""
    return {key: count for key, count in seen.items() if key not in (f"{PROCESS} malloc", f"{PROCESS} thread")}


def available(config):
    if config.engine == "io_uring" and choose_engine("io_uring", direct=config.direct)[0] != "io_uring":
        pytest.skip("no io_uring here")


if WANTED in ("", "whole"):

    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_nothing_fails_where_nothing_is_made_to_fail(sweep, config):
        """And the N-th call is the same one in every run."""
        available(config)
        first, second = sweep([counting(config)] * 2)
        assert first["errors"] == first["notes"] == []
        assert steady(first["seen"]) == steady(second["seen"])
        assert len(first["seen"]) > 20

    @pytest.mark.timeout(24 * 3600 if WANTED == "whole" else 600)
    @pytest.mark.parametrize("config", CONFIGS, ids=str)
    def test_whatever_fails_the_data_are_right(sweep, config, seed):
        available(config)
        seen = sweep([counting(config)])[0]["seen"]
        if WANTED != "whole" and str(config) not in WHOLE_PROCESS:
            seen = {key: count for key, count in seen.items() if not key.startswith(PROCESS)}
        cases = all_cases(config, seen)
        results = sweep(cases if WANTED == "whole" else some_of(cases, seed))
        met = [result for result in results if result["errors"]]
        assert len(met) > len(results) // 4, "hardly any failure was met: the sweep does not reach the workload"

else:

    def test_one_case(sweep):
        print(json.dumps(sweep([Case.parse(WANTED)]), indent=2))
