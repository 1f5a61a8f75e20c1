"""Whole models that read prompts and generate, by :class:`ssmscan.generation.Generator`.

The weights are random, and bfloat16 on a GPU. Before a model is timed, the Generator's tokens are compared with those
of transformers' ``generate``, in float32.
"""

import time
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from itertools import product

import torch
from torch import Tensor

from ssmscan.bench.models.experiment import LeftOutError, Planned, Row, Settings
from ssmscan.bench.models.timing import forget_peak, host_ms, peak_gib, settle
from ssmscan.bench.models.training import build, forward_steps, measure
from ssmscan.generation import Generator
from ssmscan.models import SSMForCausalLM

# Places for tokens that a Generator wants beyond those of a call.
SPARE = 8
# More tokens than a Generator needs to have replayed the graph of its step, and than are made while the host is timed.
WARM_UP, STEPS = 8, 32
# Calls of a Generator, of which the median counts, and the seconds after which no other begins.
CALLS = 5
BUDGET = 2.0


class Reader:
    """A model that has been checked, made at its first use."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        # The smallest batch that did not fit.
        self.too_many: int | None = None

    @cached_property
    def model(self) -> SSMForCausalLM:
        model = build(self.name, self.device).eval()
        check(model)
        return model.to(torch.bfloat16) if self.device == "cuda" else model

    def tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(self.model.config.vocab_size, (batch, length), device=self.device)

    def generate(self, batch: int, length: int, new_tokens: int) -> Row:
        """The rates of a call, with its prompt and without, and the memory."""
        if self.too_many is not None and batch >= self.too_many:
            raise LeftOutError(f"out of memory, as was a batch of {self.too_many}")
        try:
            return self._generate(batch, length, new_tokens)
        except torch.OutOfMemoryError:
            self.too_many = batch
            raise

    def _generate(self, batch: int, length: int, new_tokens: int) -> Row:
        forget_peak(self.device)
        generator = Generator(self.model, batch, length + max(new_tokens, STEPS) + SPARE)
        tokens = self.tokens(batch, length)
        generator(tokens, max_new_tokens=WARM_UP)
        host = host_ms(_step(generator, tokens[:, -1:]), self.device)
        calls = [self._call(generator, tokens, new_tokens)]
        while len(calls) < CALLS and sum(map(sum, calls)) < BUDGET:
            calls.append(self._call(generator, tokens, new_tokens))
        prefill, decode = sorted(calls, key=sum)[len(calls) // 2]
        return {
            # The first token comes with the prompt.
            "tokens_per_s": round(batch * (new_tokens - 1) / decode),
            "call_tokens_per_s": round(batch * new_tokens / (prefill + decode)),
            "prefill_ms": round(1e3 * prefill, 2),
            "step_ms": round(1e3 * decode / (new_tokens - 1), 3),
            "host_ms": round(host, 3),
            "peak_gib": peak_gib(self.device),
        }

    def _call(self, generator: Generator, tokens: Tensor, new_tokens: int) -> tuple[float, float]:
        """The seconds until the first token of a call, and those from there to the last."""
        settle(self.device)
        start = time.perf_counter()
        stream = generator.stream(tokens, new_tokens)
        next(stream)
        first = time.perf_counter()
        for _ in stream:
            pass
        return first - start, time.perf_counter() - first

    def prefill(self, batch: int, length: int) -> Row:
        """The rate at which prompts are read, up to the scores of their next token, and the memory."""

        def step_of(batch: int, length: int) -> Callable[[], object]:
            generator = Generator(self.model, batch, length + SPARE)
            tokens = self.tokens(batch, length)

            @torch.no_grad()
            def read() -> Tensor:
                return generator.read(tokens, None, length + SPARE)

            return read

        return measure(lambda: step_of, batch, length, self.device)


def _step(generator: Generator, token: Tensor) -> Callable[[], object]:
    """A step, with the choice of the next token."""

    @torch.no_grad()
    def step() -> Tensor:
        return generator.advance(token).argmax(-1)

    return step


@torch.no_grad()
def check(model: SSMForCausalLM) -> None:
    """The Generator's tokens are those of ``generate``. AssertionError where they are not."""
    prompts = torch.randint(model.config.vocab_size, (2, 16), device=model.device)
    ours = Generator(model, 2)(prompts, max_new_tokens=12)
    theirs = model.generate(prompts, max_new_tokens=12, do_sample=False)
    wrong = int((ours != theirs).sum())
    assert wrong == 0, f"Generator and generate differ in {wrong} of {theirs.numel()} tokens"


def generate(settings: Settings) -> Iterator[Planned]:
    """Continuations of every model, batch and length of the prompt."""
    return _continuations(settings, lambda name: {"model": name})


def inference_batch(settings: Settings) -> Iterator[Planned]:
    """The same, as a figure over the batch."""
    return _continuations(settings, lambda name: {"figure": "inference_batch", "line": name})


def _continuations(settings: Settings, label: Callable[[str], Row]) -> Iterator[Planned]:
    new_tokens, mode = settings.new_tokens, "graph" if settings.device == "cuda" else "eager"
    for name in settings.models:
        reader = Reader(name, settings.device)
        for length, batch in product(sorted(settings.lengths), sorted(settings.batches)):
            about = {"direction": "generate", "batch": batch, "length": length, "new_tokens": new_tokens, "mode": mode}
            yield label(name) | about, partial(reader.generate, batch, length, new_tokens)


def prefill(settings: Settings) -> Iterator[Planned]:
    """The reading of prompts and, beside it, the forward of a training step, at every batch and length."""
    for name, batch, length in product(settings.models, settings.batches, settings.lengths):
        about = {"batch": batch, "length": length, "mode": "eager"}
        reader = Reader(name, settings.device)
        yield {"model": name, "direction": "prefill", **about}, partial(reader.prefill, batch, length)
        steps = partial(forward_steps, name, torch.device(settings.device))
        yield {"model": name, "direction": "forward", **about}, partial(measure, steps, batch, length, settings.device)
