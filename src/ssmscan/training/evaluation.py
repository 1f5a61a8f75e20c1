"""What a model is measured by: the examples that a task holds out, or a whole text."""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ssmscan.models import SSMForCausalLM
from ssmscan.shapes import check_integer, error
from ssmscan.tasks import IGNORE, Batch, Measure
from ssmscan.tasks.text import Corpus
from ssmscan.tasks.text.task import measure_text, rows
from ssmscan.training.config import TrainConfig
from ssmscan.training.ranks import Ranks
from ssmscan.training.step import autocast


@torch.no_grad()
def evaluate(model: SSMForCausalLM, config: TrainConfig, ranks: Ranks | None = None) -> dict[str, float]:
    """What the task measures, over the first examples of its evaluation; ``ranks`` share them, None is this process."""
    model.eval()
    ranks = ranks or Ranks(model.device)
    task, size, share = config.task, config.at_once, ranks.share(config.batch_size)
    examples = max(config.eval_tokens // task.example_length, 1)
    if task.held_out_examples is not None:
        examples = min(examples, task.held_out_examples)
    sums: dict[str, Measure] = {}
    for first in range(0, examples, config.batch_size):
        batch = task.batch(config.batch_size, config.seed, first // config.batch_size, "eval").rows(0, examples - first)
        own = ranks.rows(batch, share)
        # As many parts in every process, of no examples where it has none.
        for i in range(0, min(share, len(batch.tokens)), size):
            with autocast(config.precision, model.device):
                sums = added(sums, task.measure(*scored(model, own.rows(i, size), ranks)))
    model.train()
    return means(ranks.add_up(sums))


def scored(model: SSMForCausalLM, batch: Batch, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """The logits of a batch and its targets, on the model's device; packed documents are one row.

    Of ``ranks`` that split the sequences each has its own stretch.
    """
    inputs = batch.inputs(model.device)
    inputs = inputs if ranks is None else ranks.stretch(inputs)
    targets = inputs.pop("shift_labels")
    return model(**inputs, use_cache=False).logits, targets


def added(sums: dict[str, Measure], more: dict[str, Measure]) -> dict[str, Measure]:
    """Measures of the examples so far and of some more; of no examples there are none."""
    if not sums:
        return more
    return {
        name: Measure(sums[name].total + total, sums[name].answers + count) for name, (total, count) in more.items()
    }


def means(measures: dict[str, Measure]) -> dict[str, float]:
    """What is told of the sums."""
    return {name: (total / answers).item() for name, (total, answers) in measures.items()}


@torch.no_grad()
def evaluate_text(
    model: SSMForCausalLM,
    corpus: Corpus,
    part: str = "eval",
    length: int = 2048,
    stride: int | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int], object] = lambda done, of: None,
) -> dict[str, float]:
    """How well ``model`` foretells a text, each token once.

    The text is read in windows of ``length`` tokens that begin every ``stride`` of them. Of each window the last stride
    tokens count, of the first all, so that a token is foretold from at least length - stride before it, as far as its
    document has them.

    Args:
        model: on its device; there it computes in bfloat16 where that has it, else in float32.
        corpus: the tokens, of the model's vocabulary.
        part: of the corpus.
        length, stride: as above; a stride of None is ``length`` (tokens).
        batch_size: windows at a time.
        progress: called with the windows that are done, and how many there are.

    Returns:
        ``loss`` (nats per token), ``perplexity`` (its exponential), ``bits_per_byte`` of text, ``accuracy``, ``tokens``
        that were foretold and ``tokens_per_second``.

    Raises:
        TypeError, ValueError: a size or stride out of range, an unknown part, tokens beyond the model's vocabulary.
    """
    stride = length if stride is None else stride
    for name, value in (("length", length), ("stride", stride), ("batch_size", batch_size)):
        check_integer("eval", name, value, 1)
    if stride > length:
        raise ValueError(error("eval", f"stride must be 1 to length = {length}", stride))
    if part not in corpus.parts or len(corpus.parts[part]) < 2:
        known = ", ".join(name for name, tokens in corpus.parts.items() if len(tokens) > 1)
        raise ValueError(error("eval", f"part must be one of {known}", part))
    if corpus.index.vocab_size > model.config.vocab_size:
        rule = f"data must have at most the {model.config.vocab_size} tokens of the model"
        raise ValueError(error("eval", rule, corpus.index.vocab_size, "Tokenize the text by the model's tokenizer."))
    tokens = corpus.parts[part]
    begins = np.arange(0, max(len(tokens) - 1 - (length - stride), 1), stride)
    fresh = torch.arange(length) >= length - stride
    sums: dict[str, Measure] = {}
    model.eval()
    started = time.perf_counter()
    for first in range(0, len(begins), batch_size):
        places = begins[first : first + batch_size]
        batch = rows(corpus, tokens, places, length, documents=True)
        begin = torch.from_numpy(places).unsqueeze(1)
        # What no window has told before, and does not lie behind the end.
        counted = (fresh | (begin == 0)) & (begin + torch.arange(length) < len(tokens) - 1)
        batch.targets[~counted] = IGNORE
        with autocast("auto", model.device):
            logits, targets = scored(model, batch)
        sums = added(sums, measure_text(corpus, logits, targets))
        progress(min(first + batch_size, len(begins)), len(begins))
    measured, total = means(sums), int(sums["loss"].answers)
    seconds = time.perf_counter() - started
    # Of a loss beyond this the exponential is no float.
    perplexity = math.exp(min(measured["loss"], 700.0))
    return {**measured, "perplexity": perplexity, "tokens": total, "tokens_per_second": total / seconds}
