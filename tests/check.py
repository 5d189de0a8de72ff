"""The one command: format, lint, types, tests. The exit code is that of the first that fails.

Usage: python tests/check.py [--fast] [--fix] [format] [lint] [types] [tests]
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ["graphopt", "passes", "targets", "tests", "benchmarks"]


def commands(fast: bool, fix: bool) -> dict[str, list[list[str]]]:
    """What each check runs, one after the other. Tests that compare times have the machine for themselves; the others share two processes."""
    chosen = " and not slow" if fast else ""
    folders = [name for name in FOLDERS if (ROOT / name).is_dir()]
    return {
        "format": [["ruff", "format", *([] if fix else ["--check"]), *folders]],
        "lint": [["ruff", "check", *(["--fix"] if fix else []), *folders]],
        "types": [["mypy", "--strict", "graphopt", "passes", "targets"]],
        "tests": [
            ["pytest", "-q", "-n", "2", "--dist", "loadfile", "-m", f"not timed{chosen}"],
            ["pytest", "-q", "-m", f"timed{chosen}"],
        ],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Run every check, or those that are named; the exit code is that of the first that fails.")
    parser.add_argument("checks", nargs="*", metavar="CHECK", help="format, lint, types or tests; all of them unless named")
    parser.add_argument("--fast", action="store_true", help="leave out the tests that are marked slow")
    parser.add_argument("--fix", action="store_true", help="format, and repair what lint can, instead of only telling")
    options = parser.parse_args()
    known = commands(options.fast, options.fix)
    unknown = sorted(set(options.checks) - set(known))
    if unknown:
        parser.error(f"no check is called {', '.join(unknown)}; there are {', '.join(known)}")
    for name in known if not options.checks else options.checks:
        for command in known[name]:
            print(f"--- {name}: {shlex.join(command)}", flush=True)
            start = time.perf_counter()
            code = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode
            print(f"--- {name} {'passed' if code == 0 else f'FAILED ({code})'} in {time.perf_counter() - start:.1f} s", flush=True)
            if code:
                return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
