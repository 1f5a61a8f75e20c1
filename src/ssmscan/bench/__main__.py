"""The command: ``python -m ssmscan.bench linear_scan``, and ``ssmscan bench linear_scan``."""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch

from ssmscan.bench.run import backends_of, run_cases
from ssmscan.ops.cases import CASES
from ssmscan.shapes import error

# The word in place of an operation behind which experiments follow.
MODELS = "models"


class _Parser(argparse.ArgumentParser):
    """Wrong usage is one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ssmscan.bench") -> int:
    """Run the benchmarks that ``arguments`` name. 0 when all went well, 1 when not, 2 on wrong usage."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == [MODELS]:
        return _models(arguments[1:], f"{prog} {MODELS}")
    return _operations(arguments, prog)


def _operations(arguments: Sequence[str], prog: str) -> int:
    cases = {case.name: case for case in CASES}
    parser = _Parser(
        prog=prog,
        description="Check operations against their references, time them, and record what was measured.",
        epilog=f"{prog} {MODELS} --help tells of whole models, and of figures.",
    )
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"operations, of {', '.join(cases)}; none names them all")
    _add_common(parser, "<op>.json")
    parser.add_argument(
        "--backends",
        type=lambda names: tuple(names.split(",")),
        default=(),
        metavar="NAME,...",
        help="the first is timed at every size, further ones at small sizes; without it, each operation's best",
    )
    given = _parse(parser, arguments)
    unknown = sorted(set(given.ops) - set(cases))
    if unknown:
        parser.error(f"OP must be one of {', '.join(cases)}, got {', '.join(unknown)}.")
    chosen = [cases[name] for name in given.ops or cases]
    try:
        for case in chosen:
            backends_of(case, given.device, given.backends)
    except (ValueError, RuntimeError) as wrong:
        parser.error(str(wrong))
    return 0 if run_cases(chosen, given.out, given.device, given.backends, given.commit) else 1


def _models(arguments: Sequence[str], prog: str) -> int:
    parser = _Parser(
        prog=prog,
        description="Time whole models, and what the figures of the Mamba papers show, and record what was measured.",
    )
    if find_spec("transformers") is None:
        parser.exit(
            1, error("bench", "transformers must be installed", "none", "Run pip install 'ssmscan[train]'.") + "\n"
        )
    from ssmscan.bench.models import command

    command.add_arguments(parser)
    _add_common(parser, "models.json and figures.json")
    try:
        return 0 if command.run_experiments(_parse(parser, arguments)) else 1
    except ValueError as wrong:
        parser.error(str(wrong))


def _add_common(parser: argparse.ArgumentParser, files: str) -> None:
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results"),
        help=f"folder of <gpu>/{files} (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to run (default: a CUDA device if there is one, here %(default)s)",
    )
    parser.add_argument("--commit", help="commit to record; without it, git is asked")


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, got none.")
    return given


if __name__ == "__main__":
    sys.exit(main())
