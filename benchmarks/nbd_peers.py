"""One case of the NBD benchmarks, round by round: ``python benchmarks/nbd_peers.py CASE ROUNDS [SERVER ...]``.

    python benchmarks/nbd_peers.py copied-32 5 nbdkit cbwcore

Cases: copied, first and read, each with -1, -32 and -4x16 (depth; 4 jobs of depth 16); nbdcopy, nbdcopy-copied, idle.
Servers: null, nbdkit, qemu, cbwcore. CBWCORE_BENCH_* as for pytest.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import sys
import tempfile
from pathlib import Path

from cbwcore.bench.nbd import LOADS, cases_of
from cbwcore.bench.results import show_rate, show_size, show_time
from cbwcore.bench.rounds import timed
from cbwcore.bench.servers import Measured
from cbwcore.bench.setting import Setting

QUICK = os.environ.get("CBWCORE_BENCH_QUICK", "") not in ("", "0")


def main() -> None:
    """Print every round of a case, and its medians."""
    parser = argparse.ArgumentParser(description="One case of the NBD benchmarks; CBWCORE_BENCH_* as for pytest.")
    parser.add_argument("case", choices=LOADS)
    parser.add_argument("rounds", type=int)
    parser.add_argument("server", nargs="*", help="default: all of the case's")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers end and files go
    load = LOADS[args.case]
    show = show_time if args.case.startswith("nbdcopy") else show_rate
    with contextlib.ExitStack() as held:
        parent = os.environ.get("CBWCORE_BENCH_DIR", "/dev/shm")
        place = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="cbwcore-nbd-", dir=parent)))
        setting = Setting(place, size=int(os.environ.get("CBWCORE_BENCH_SIZE", 0)), quick=QUICK)
        runs = cases_of(load, setting, place, [s for s in load.servers if s in (args.server or load.servers)], held)
        results: dict[str, list[Measured]] = {kind: [] for kind in runs}
        for _ in range(args.rounds):
            for kind, case in runs.items():
                with case() as run:
                    results[kind].append(timed(run))  # type: ignore[arg-type]
            print("  ".join(f"{kind} {show(values[-1])}" for kind, values in results.items()), flush=True)
        for kind, values in results.items():
            cpu = show_time(statistics.median(value.cpu for value in values))
            memory = show_size(max(value.memory for value in values))
            print(f"median {kind}: {show(statistics.median(values))}, server CPU {cpu} each, memory {memory}")


if __name__ == "__main__":
    main()
