"""Runs the experiments that YAML files list, several at a time, and keeps what they tell.

    python -m experiments.run experiments/synthetic.yaml --gpus 4 --minutes 9

A run that has ended is passed over and one that was stopped is continued, so the same command, given again, goes on
where the last one ended. A run keeps the options that it began with: to change them, remove its folder and what stands
beside it. Of each run that ends, config, metrics, evaluations and a thinned log are copied to --records.

A file has groups of runs:

    group:                          # runs/group and experiments/group are its folders
      recipe: selective_copying     # in recipes/
      seeds: [0, 1, 2]              # each run once for each of them
      slots: 3                      # so many of its runs share a GPU
      options: {steps: 1000}        # of `ssmscan train`, over the recipe's
      evaluate: [eval, test]        # parts of the text by which each model is measured at the end
      runs:                         # recipe and options of each run, over the group's
        mamba: {model.mixers: mamba}

An option that is {best_of: group/pattern} takes the value it has in that one of the matching runs whose last evaluation
had the smallest loss, and {best_of: group/pattern, times: 0.5} half of it; the run waits for all of them. Runs start in
the order of the files, those that waited for others first, and none overtakes another that only waits for a GPU.

Runs that share a GPU take turns on it, about 200 small steps a second between them all, unless NVIDIA's multi-process
service is started before, by `nvidia-cuda-mps-control -d`: eight small runs then took ten times as many.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatch
from fractions import Fraction
from pathlib import Path

from experiments.plan import Run, read
from experiments.record import keep
from ssmscan.bench.result import commit


class Machine:
    """GPUs, or the processor where there are none, and the runs that are at work on them."""

    def __init__(self, gpus: int, records: Path, source: str) -> None:
        given = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = given.split(",") if given else [str(gpu) for gpu in range(gpus)]
        # By what makes it the one visible GPU of a process.
        self.free = dict.fromkeys(names[:gpus] or [""], Fraction(1))
        self.has_gpus, self.records, self.commit = gpus > 0, records, source
        self.active: list[tuple[Run, str, subprocess.Popen[bytes]]] = []

    def has_room(self, run: Run) -> bool:
        return max(self.free.values()) >= self._share(run)

    def _share(self, run: Run) -> Fraction:
        return Fraction(1, run.slots if self.has_gpus else 1)

    def start(self, run: Run) -> None:
        """Begin or continue ``run`` where most is free."""
        if not self.has_gpus:
            run.options["cuda_graph"] = False
        try:
            run.settle()
        except ValueError as reason:
            self._end(run, "failed", str(reason))
            return
        gpu = max(self.free, key=lambda gpu: self.free[gpu])
        self.free[gpu] -= self._share(run)
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        self._proceed(run, gpu)

    def _proceed(self, run: Run, gpu: str) -> None:
        command = run.next_command()
        if command is None:
            self.free[gpu] += self._share(run)
            self._end(run, "finished")
            return
        arguments, output = command
        threads = max(1, (os.cpu_count() or 1) // (len(self.free) * run.slots))
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        environment["CUDA_VISIBLE_DEVICES"] = gpu
        _say(f"{run.name}: ssmscan {shlex.join(arguments)}")
        with output.open("wb") as out, run.beside(".err").open("wb") as err:
            # In a session of its own, for Ctrl-C is for this process alone, which then stops the others in order.
            process = subprocess.Popen(
                [sys.executable, "-m", "ssmscan.cli", *arguments],
                stdout=out, stderr=err, env=environment, start_new_session=True,
            )  # fmt: skip
        self.active.append((run, gpu, process))

    def advance(self) -> None:
        """Go on with each run whose process has ended."""
        for entry in list(self.active):
            run, gpu, process = entry
            if process.poll() is None:
                continue
            self.active.remove(entry)
            # A target that was not reached is a result as well.
            trained = "train" in process.args and (run.folder / "metrics.json").is_file()  # type: ignore[operator]
            if process.returncode == 0 or trained:
                self._proceed(run, gpu)
            else:
                self.free[gpu] += self._share(run)
                told = run.beside(".err").read_text(encoding="utf-8", errors="replace").strip().splitlines()
                self._end(run, "failed", told[-1] if told else f"exit status {process.returncode}")

    def _end(self, run: Run, status: str, error: str | None = None) -> None:
        run.status = status
        about = {"status": status, "error": error, "commit": self.commit, "date": time.strftime("%Y-%m-%d")}
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        run.beside(".json").write_text(json.dumps(about) + "\n", encoding="utf-8")
        self.record(run)
        _say(f"{run.name}: {status}" + (f": {error}" if error else ""))

    def record(self, run: Run) -> None:
        """Keep what is to be kept of a run that has ended."""
        about = json.loads(run.beside(".json").read_text(encoding="utf-8"))
        keep(run.folder, self.records / run.name, {"recipe": run.recipe, "seed": run.seed, **about})

    def stop(self) -> None:
        """End all processes; trainings save a checkpoint first."""
        for _, _, process in self.active:
            process.terminate()
        for _, _, process in self.active:
            process.wait()


def _say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


def work(runs: Sequence[Run], machine: Machine, minutes: float) -> None:
    """Do the ``runs`` until all have ended or the time has."""
    deadline = time.monotonic() + 60 * minutes
    waiting = [run for run in runs if run.status is None]
    try:
        while time.monotonic() < deadline:
            machine.advance()
            ready = [run for run in waiting if all(other.status for other in run.waits_for)]
            for run in sorted(ready, key=lambda run: not run.waits_for):
                if not machine.has_room(run):
                    break
                waiting.remove(run)
                machine.start(run)
            # What one that failed at once was waited for by is ready only now.
            if not machine.active and not ready:
                for run in waiting:
                    _say(f"{run.name} waits for {', '.join(o.name for o in run.waits_for if o.status is None)}")
                break
            time.sleep(0.1)
    finally:
        machine.stop()
        unfinished = sum(run.status is None for run in runs)
        failed = sum(run.status == "failed" for run in runs)
        told = f", {failed} of them failed, which --again continues" if failed else ""
        _say(f"{len(runs) - unfinished} of {len(runs)} runs have ended{told}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run experiments. A run that has ended is passed over.")
    parser.add_argument("files", type=Path, nargs="+", help="YAML files that list the runs")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs to fill; 0 is the processor, one run at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop, to be continued")
    parser.add_argument("--only", default="*", help="pattern of the names, group/run-seed, of the runs to do")
    parser.add_argument("--again", action="store_true", help="also continue the runs that failed")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs")
    parser.add_argument("--records", type=Path, default=Path("experiments"), help="folder of what is kept")
    parser.add_argument("--commit", help="commit to record; without it, git is asked")
    arguments = parser.parse_args()
    # As Ctrl-C does, end the processes first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if arguments.gpus < 0:
        parser.error(f"--gpus must be at least 0, got {arguments.gpus}.")
    for path in arguments.files:
        if not path.is_file():
            parser.error(f"FILES must be files, got {path}.")
    machine = Machine(arguments.gpus, arguments.records, arguments.commit or commit())
    try:
        listed = read(arguments.files, arguments.runs)
    except (TypeError, ValueError) as reason:
        parser.error(str(reason))
    runs = [run for run in listed if fnmatch(run.name, arguments.only)]
    if not runs:
        parser.error(f"--only must match a name, group/run-seed, of the files, got {arguments.only}.")
    for run in runs:
        if arguments.again and run.status == "failed":
            run.status = None
            # Stopped again, it is one that is to be continued.
            run.beside(".json").unlink()
        elif run.status is not None:
            # It may have been recorded elsewhere.
            machine.record(run)
    try:
        work(runs, machine, arguments.minutes)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    if any(run.status == "failed" for run in runs):
        sys.exit(1)


if __name__ == "__main__":
    main()
