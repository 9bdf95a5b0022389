"""Which lines of the compiled core ran: report.py ROOT GENERATED_C GCOV_JSON...

The core is one C file; Cython's #line directives let gcov speak of the lines of the .pyx, .pxd and .pxi. What counts:

* each of those lines that code was generated for, once however much code that was;
* each line of the C that stands in an ``extern`` block, found by its text in the generated file;
* each statement of a function that no code was generated for at all: Cython and the compiler drop what nobody calls,
  and what nobody calls has no test.

Lines that did not run are told, unless unreached.toml has them, by their text, with a reason.
"""

import gzip
import io
import json
import re
import sys
import tokenize
import tomllib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

LEAST = 95.0  # per cent of all lines
LISTED = Path(__file__).with_name("unreached.toml")
FUNCTION = re.compile(r"^\s*(?:cdef|cpdef|def)\b[^=#]*?(\w+)\s*\(")
C_FUNCTION = re.compile(r"^    static\b[^;=]*?(\w+)\(")
C_BLOCK = re.compile(r'cdef extern from \* nogil:\n    """\n(.*?)    """\n', re.S)
NO_CODE = re.compile(
    r'(else|try|finally|with nogil|while True)\s*:$|pass$|global |[rbf]?"|@'  # no more than their parts
    r"|(cdef|cpdef|def|class|include|cimport|from|import|ctypedef)\b(?!.*[^=!<>]=[^=])"  # declarations without a value
)


@dataclass
class Source:
    """One file of the core, and what is known of its lines, by their numbers from 1 on."""

    path: Path
    text: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)  # the one that each line is in, "" for none
    in_c: range = range(0)  # lines of the C block
    in_statements: set[int] = field(default_factory=set)
    counts: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.text = ["", *self.path.read_text().splitlines()]
        if block := C_BLOCK.search(self.path.read_text()):
            first = self.path.read_text()[: block.start(1)].count("\n") + 1
            self.in_c = range(first, first + block.group(1).count("\n"))
        self.functions = self._name_functions()
        self.in_statements = {number for lines in self.statements() for number in lines}

    def _name_functions(self) -> list[str]:
        names, name, indent = [], "", 0
        for number, line in enumerate(self.text):
            pattern = C_FUNCTION if number in self.in_c else FUNCTION
            depth = len(line) - len(line.lstrip())
            if found := pattern.match(line):
                name, indent = found.group(1), depth
            elif line.strip() and depth <= indent and not line.lstrip().startswith((")", "}", "#")):
                name = ""
            names.append(name)
        return names

    def _tokens(self) -> list[tokenize.TokenInfo]:
        return list(tokenize.generate_tokens(io.StringIO("\n".join(self.text[1:]) + "\n").readline))

    def is_code(self, number: int) -> bool:
        """Whether a line can be run. What gcov puts elsewhere is of Cython's own making: how arguments come in, how a
        class comes to be."""
        if number in self.in_c:
            return not re.match(r"\s*(#|/?\*|//|[{}]*$|static\b)", self.text[number])
        return number in self.in_statements

    def statements(self) -> list[range]:
        """The lines of each statement in a function that code must be generated for."""
        found, start = [], None
        for token in self._tokens():
            if token.type == tokenize.NEWLINE and start is not None:
                text = self.text[start].strip()
                if self.functions[start] and not NO_CODE.match(text):
                    found.append(range(start, token.start[0] + 1))
                start = None
            elif start is None and token.type not in (
                tokenize.INDENT, tokenize.DEDENT, tokenize.NL, tokenize.COMMENT, tokenize.NEWLINE,
            ):  # fmt: skip
                start = token.start[0]
        return found

    def missed(self) -> list[int]:
        return sorted(n for n, count in self.counts.items() if count == 0)


def read_gcov(files: list[Path]) -> dict[str, dict[int, int]]:
    """By file name: how often each line ran."""
    counts: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for name in files:
        with gzip.open(name) as f:
            for file in json.load(f)["files"]:
                for line in file["lines"]:
                    counts[Path(file["file"]).name][line["line_number"]] += line["count"]
    return counts


def place_c_block(source: Source, generated: str, counts: dict[int, int]) -> None:
    """Bring the counts of the generated file to the C block of `source`."""
    block = "\n".join(source.text[n] for n in source.in_c)
    at = generated.find(block)
    if at < 0:
        sys.exit(f"report.py: the C of {source.path.name} is not in the generated file as it stands")
    first = generated[:at].count("\n") + 1
    for i, number in enumerate(source.in_c):
        if first + i in counts and source.is_code(number):
            source.counts[number] = counts[first + i]


def measure(root: Path, generated_path: Path, gcov_files: list[Path]) -> list[Source]:
    gcov = read_gcov(gcov_files)
    generated = generated_path.read_text()
    sources = [Source(p) for p in [root / "src/_cbwcore.pyx", *sorted((root / "src/cbwcore").glob("_*.px[di]"))]]
    for source in sources:
        for number, count in gcov[source.path.name].items():
            if source.is_code(number) and number not in source.in_c:
                source.counts[number] = count
        if source.in_c:
            place_c_block(source, generated, gcov[generated_path.name])
        for lines in source.statements():
            if not any(n in source.counts for n in lines):
                source.counts[lines[0]] = 0
    return sources


def read_listed(sources: list[Source]) -> dict[tuple[str, str, str], str]:
    """The reasons, by (file, function, line); exits where one names what is not there."""
    there = {(s.path.name, name, text.strip()) for s in sources for name, text in zip(s.functions, s.text, strict=True)}
    listed = {}
    for group in tomllib.loads(LISTED.read_text())["unreached"]:
        for line in group["lines"]:
            key = group["file"], group["function"], line
            if key not in there:
                sys.exit(f"{LISTED.name}: {key[0]}, {key[1]}() has no line {line!r}")
            listed[key] = group["reason"]
    return listed


def main(root: Path, generated: Path, gcov_files: list[Path]) -> int:
    sources = measure(root, generated, gcov_files)
    listed = read_listed(sources)
    unlisted, excused, total, ran = 0, 0, 0, 0
    for source in sources:
        missed = source.missed()
        total += len(source.counts)
        ran += len(source.counts) - len(missed)
        for number in missed:
            text = source.text[number].strip()
            if (source.path.name, source.functions[number], text) in listed:
                excused += 1
                continue
            unlisted += 1
            print(f"did not run: {source.path.name}:{number}: {source.functions[number]}(): {text}")
    print(f"\n{'file':22}{'lines':>8}{'ran':>8}")
    for source in sources:
        if source.counts:
            part = 100 * (1 - len(source.missed()) / len(source.counts))
            print(f"{source.path.name:22}{len(source.counts):8}{part:7.1f}%")
    share = 100 * ran / total
    print(f"{'the core':22}{total:8}{share:7.1f}%")
    print(f"{total - ran} lines did not run: {excused} of them listed, {unlisted} not")
    # Those that only a race reaches run on some days: told, and no failure.
    return 1 if share < LEAST else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), [Path(a) for a in sys.argv[3:]]))
