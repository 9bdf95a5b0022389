"""Print the sanitizers' reports in a directory; exit 1 where one of them is about the core.

A report runs from a line of "====" to the next (thread, address), or is one "runtime error" line with its stack, or is
one leak of those that a process lists at its end. A leak is ours where the core itself has allocated it: what CPython
allocated for it is CPython's to free, and some of that it never does.
"""

import re
import sys
from collections import Counter
from pathlib import Path

REPORT = re.compile(r"WARNING: ThreadSanitizer|ERROR: AddressSanitizer|runtime error:|FATAL:|LeakSanitizer has")
LEAK = re.compile(r"(?ms)^(?:Direct|Indirect) leak of .*?(?=^\s*$|\Z)")
OURS = re.compile(r"(?m)^\s*#1 .*_cbwcore")  # frame 0 is malloc() itself
HISTORY = re.compile(r"\s*(Thread T|Mutex M|Location is|As if|Hint)")


def reports(text: str) -> list[str]:
    """The reports in one file."""
    if "====" in text:
        return re.split(r"(?m)^=+$\n?", text)
    return re.split(r"(?m)^(?=\S.*runtime error:)", text)


def verdicts(report: str) -> list[tuple[str, str]]:
    """("ours" | "others" | "leaks of others", what to print) for what one report tells."""
    if "ERROR: LeakSanitizer" in report:
        return [("ours", leak) if OURS.search(leak) else ("leaks of others", "") for leak in LEAK.findall(report)]
    if not REPORT.search(report):
        return []
    if "FATAL:" in report or "LeakSanitizer has" in report:
        return [("ours", report)]
    # what was done, by whom: not how the threads, mutexes and memory came to be
    did = "\n".join(part for part in report.split("\n\n") if not HISTORY.match(part))
    if "_cbwcore" in did:
        return [("ours", report)]
    return [("others", "(no frame of the core)\n" + "\n".join(report.splitlines()[:12]))]


def main(folder: Path) -> int:
    found: Counter[str] = Counter()
    for file in sorted(folder.iterdir()):
        for report in reports(file.read_text(errors="replace")):
            for kind, shown in verdicts(report):
                found[kind] += 1
                if shown:
                    print(f"---- {file.name}\n{shown}")
    print(f"sanitizers: {found['ours']} reports with a frame in _cbwcore, {found['others']} without, "
          f"{found['leaks of others']} leaks of others")  # fmt: skip
    return 1 if found["ours"] else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
