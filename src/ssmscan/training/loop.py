"""The training loop, read from top to bottom."""

import json
import platform
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec

import torch

from ssmscan.ahead import Late
from ssmscan.models import SSMForCausalLM
from ssmscan.shapes import error
from ssmscan.training import checkpoint
from ssmscan.training.batches import batches
from ssmscan.training.clock import Clock
from ssmscan.training.config import Target, TrainConfig
from ssmscan.training.errors import RunError, Terminated, UsageError
from ssmscan.training.evaluation import evaluate, means, scored
from ssmscan.training.folder import claimed, replace_text
from ssmscan.training.optim import learning_rate, make_optimizer
from ssmscan.training.report import Report, plot
from ssmscan.training.step import Step, autocast
from ssmscan.training.termination import termination


@dataclass(frozen=True)
class Metrics:
    """The end of a run, as metrics.json holds it.

    ``evaluation`` is the last one, loss and accuracy among it, ``examination`` what the task measures only then.
    """

    evaluation: dict[str, float]
    examination: dict[str, float]
    steps: int
    seconds: float
    target: str | None
    parameters: int
    device: str
    versions: dict[str, str]


def train(config: TrainConfig, resume: bool = False) -> Metrics:
    """Run ``config``, or continue the run in its folder.

    Args:
        config: the run.
        resume: continue from the newest complete checkpoint in ``config.out``. On the CPU the result is that of a run
            never interrupted, bit for bit.

    Returns:
        the final metrics. The folder ``config.out`` then holds config.yaml, log.jsonl, metrics.json, curves.png,
        checkpoints, a TensorBoard log, and the model as :func:`ssmscan.models.load_pretrained` reads it.

    Raises:
        UsageError: the folder is taken, the device or the data missing, or there is no such model. Nothing was written.
        RunError: the loss or its gradient is not finite (the update is not made), or the target was not reached.
        Terminated: SIGTERM has come. A checkpoint of the last step was written, and the run can be continued.
        OSError: a file could not be written. It is named, and the run can be continued.

    Example:
        >>> from ssmscan.training import TrainConfig, train
        >>> config = TrainConfig(out="runs/first", steps=200)
        >>> metrics = train(config)  # doctest: +SKIP
    """
    device = _device(config)
    config, model = _prepare(config)
    task, target = config.task, None if config.target is None else Target.parse(config.target)
    model.to(device).train()
    update = Step(model, make_optimizer(model, config.optim), config, device)
    with claimed(config, resume) as folder:
        step, seconds = checkpoint.load(folder / "checkpoints", update) if resume else (0, 0.0)
        with Report(folder, config, step) as report, termination() as terminated:
            clock = Clock(config, model, device, seconds)
            last, late = report.newest("eval"), Late()
            for batch in batches(config, step):
                late.put(step + 1, update(batch, learning_rate(step, config.steps, config.optim)))
                step += 1
                clock.tokens += batch.tokens.numel()
                evaluates = step % config.eval_every == 0 or step == config.steps
                ends = terminated()
                saves = step % config.save_every == 0 or clock.save_is_due() or ends
                for read, numbers in late.take(everything=evaluates or saves):
                    loss, norm, halted = numbers.tolist()
                    if halted:
                        raise RunError(
                            f"train: loss must be finite, got {loss:g} with a gradient of norm {norm:g} at step "
                            f"{read}. The update was not made; try a smaller --optim.lr."
                        )
                    report.advance(read)
                    if read % config.log_every == 0:
                        rate = learning_rate(read - 1, config.steps, config.optim)
                        report.training(read, loss=loss, lr=rate, grad_norm=norm, **clock.read())
                if evaluates:
                    with clock.paused():
                        last = report.evaluation(step, evaluate(model, config), clock.seconds())
                    if target is not None and target.reached(last):
                        break
                # After the evaluation, whose line the checkpoint then stands for.
                if saves:
                    with clock.paused():
                        checkpoint.save(folder / "checkpoints", step, update, task, clock.seconds(), config.keep)
                        clock.saved()
                if ends:
                    raise Terminated

            if last is None or last["step"] != step:
                last = report.evaluation(step, evaluate(model, config), clock.seconds())
            with autocast(config.precision, device):
                examined = task.examine(model, config.seed)
            metrics = Metrics(
                evaluation={name: value for name, value in last.items() if name not in ("split", "step", "seconds")},
                examination=means(examined),
                steps=step,
                seconds=clock.seconds(),
                target=config.target,
                parameters=model.num_parameters(),
                device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
                versions={"python": platform.python_version()}
                | {package: version(package) for package in ("ssmscan", "torch", "numpy", "transformers")},
            )
            checkpoint.save_model(folder, model, task)
            measure = task.measures[-1] if target is None else target.measure
            plot(folder / "curves.png", task.title, report.lines, measure, target)
            # The last file, for it marks the run as finished.
            replace_text(folder / "metrics.json", json.dumps(asdict(metrics), indent=2) + "\n")
            print(f"\n{_example(model, config)}\n", flush=True)
    if target is not None and not target.reached(metrics.evaluation):
        raise RunError(
            f"train: {target.measure} must reach {target.bound:g}, got {metrics.evaluation[target.measure]:.4f} after "
            f"{step} steps. Train longer (--steps), or see log.jsonl for where it stalled."
        )
    return metrics


def _prepare(config: TrainConfig) -> tuple[TrainConfig, SSMForCausalLM]:
    """The config with its data pinned, and the model as the seed draws it. Nothing is written yet."""
    torch.manual_seed(config.seed)
    task = config.task
    if config.target is not None and Target.parse(config.target).measure not in task.measures:
        rule = f"target must be of what the task {task.name} measures: {', '.join(task.measures)}"
        raise UsageError(error("train", rule, repr(config.target)))
    if config.wandb is not None and find_spec("wandb") is None:
        raise UsageError(error("train", "wandb must be installed", "none", "Run pip install wandb."))
    try:
        config = replace(config, task=task.pinned())
        model = SSMForCausalLM(config.model.build(task.vocab_size))
    except (TypeError, ValueError, NotImplementedError) as reason:
        raise UsageError(str(reason)) from None
    if task.foretells and not all(getattr(module, "causal", True) for module in model.modules()):
        raise UsageError(error("train", f"mixers must be causal for the task {task.name}", config.model.mixers))
    return config, model


def _device(config: TrainConfig) -> torch.device:
    available = torch.cuda.is_available()
    if config.device == "cuda" and not available:
        raise UsageError(error("train", "device must be one of this machine", "cuda", "Use --device cpu."))
    device = torch.device("cuda" if config.device != "cpu" and available else "cpu")
    if config.cuda_graph and device.type != "cuda":
        raise UsageError(error("train", "cuda_graph must be false without CUDA", "true"))
    return device


@torch.no_grad()
def _example(model: SSMForCausalLM, config: TrainConfig) -> str:
    """An example of the evaluation with the model's answer, as a person would read it."""
    example = config.task.batch(1, config.seed, 0, "eval")
    logits, _ = scored(model, example)
    return config.task.render(example.tokens[0], example.targets[0], logits[0].argmax(-1).cpu())
