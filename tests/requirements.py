"""Print what pyproject.toml says that building and running cbwcore needs, with one extra (the argument; default: test),
one requirement a line.

For linters, and for builds of variants (sanitizers, coverage, mutants) in environments of their own, which install the
package without its dependencies and without build isolation."""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def requirements(extra: str) -> list[str]:
    with open(ROOT / "pyproject.toml", "rb") as f:
        project = tomllib.load(f)
    package = project["project"]
    return project["build-system"]["requires"] + package["dependencies"] + package["optional-dependencies"][extra]


if __name__ == "__main__":
    print("\n".join(requirements(*sys.argv[1:] or ["test"])))
