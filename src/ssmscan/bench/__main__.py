"""The command: ``python -m ssmscan.bench linear_scan``, and ``ssmscan bench linear_scan``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from ssmscan.bench.run import backends_of, run_cases
from ssmscan.ops.cases import CASES


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ssmscan.bench") -> int:
    """Run the benchmarks that ``arguments`` name. 0 when all went well, 1 when not, 2 on wrong usage."""
    cases = {case.name: case for case in CASES}
    parser = _Parser(
        prog=prog,
        description="Check operations against their references, time them, and record what was measured.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"operations, of {', '.join(cases)}; none names them all")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of <gpu>/<op>.json (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run (default: a CUDA device if there is one, here %(default)s)",
    )
    parser.add_argument(
        "--backends",
        type=lambda names: tuple(names.split(",")),
        default=(),
        metavar="NAME,...",
        help="the first is timed at every size, further ones at small sizes; without it, each operation's best",
    )
    parser.add_argument("--commit", help="commit to record; without it, git is asked")
    given = parser.parse_args(arguments)
    unknown = sorted(set(given.ops) - set(cases))
    if unknown:
        parser.error(f"OP must be one of {', '.join(cases)}, got {', '.join(unknown)}.")
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, got none.")
    chosen = [cases[name] for name in given.ops or cases]
    try:
        for case in chosen:
            backends_of(case, given.device, given.backends)
    except (ValueError, RuntimeError) as wrong:
        parser.error(str(wrong))
    return 0 if run_cases(chosen, given.out, given.device, given.backends, given.commit) else 1


if __name__ == "__main__":
    sys.exit(main())
