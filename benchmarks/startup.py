"""How quickly the command line starts: seconds, and modules of regrow that are imported.

    python benchmarks/startup.py [TREE ...] [--repeats 5]

prints a table with two columns for each source tree (a checkout with `src/regrow`; by default this
one). The seconds are the least of the repeats, of a whole process. "refused" is the command with a
model that does not exist: it must end before anything slow is imported.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parents[1]
COMMANDS = (
    *("run", "inspect", "profile", "rotate", "compare", "prune", "generate", "cache"),
    *("distill", "quantize", "evaluate", "export", "report", "watch"),
)
MISSING = "no-such-model"
REFUSED = {
    "prune": ["prune", MISSING, "--keep-params", "0.8", "--out", "out"],
    "distill": ["distill", MISSING, "--teacher", MISSING, "--data", "x.txt", "--out", "out"],
    "quantize": ["quantize", MISSING, "--out", "out"],
    "export": ["export", MISSING, "--out", "out"],
}


def rows() -> dict[str, list[str]]:
    """What is measured: a name, and the arguments of `regrow`."""
    helps = {f"regrow {name} --help": [name, "--help"] for name in COMMANDS}
    refused = {f"regrow {name}, refused": arguments for name, arguments in REFUSED.items()}
    return {"regrow --help": ["--help"], **helps, **refused}


def seconds(tree: Path, arguments: list[str], repeats: int) -> float:
    """Least wall-clock time of a process, in seconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        _process(tree, arguments)
        times.append(time.perf_counter() - start)
    return min(times)


def modules(tree: Path, arguments: list[str]) -> int:
    """How many modules of regrow a process imports."""
    lines = _process(tree, arguments, "-X", "importtime").splitlines()
    names = [line.split("|")[-1].strip() for line in lines if line.startswith("import time:")]
    return sum(name.split(".")[0] == "regrow" for name in names)


def _process(tree: Path, arguments: list[str], *options: str) -> str:
    """Run `regrow` from `tree`; returns what it writes to stderr."""
    done = subprocess.run(
        [sys.executable, *options, "-m", "regrow", *arguments],
        env={**os.environ, "PYTHONPATH": str(tree / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 2), done.stderr
    return done.stderr


def main() -> None:
    """Measure each tree, and print the table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trees", nargs="*", type=Path, default=[HERE], metavar="TREE")
    parser.add_argument("--repeats", type=int, default=5)
    parsed = parser.parse_args()
    trees: list[Path] = parsed.trees
    head = [
        f"{tree.resolve().name}: {quantity}"
        for tree in trees
        for quantity in ("seconds", "modules")
    ]
    print(f"Python {platform.python_version()}, {os.cpu_count()} cores, {platform.machine()}\n")
    print("| command | " + " | ".join(head) + " |")
    print("|---|" + "---:|" * len(head))
    for name, arguments in rows().items():
        cells = []
        for tree in trees:
            cells.append(f"{seconds(tree, arguments, parsed.repeats):.2f}")
            cells.append(str(modules(tree, arguments)))
        print(f"| `{name}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
