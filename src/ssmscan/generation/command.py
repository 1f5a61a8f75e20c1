"""The command ``ssmscan generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ssmscan.shapes import check_integer, error

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from transformers import PreTrainedTokenizerBase

    from ssmscan.generation.generator import Generator
    from ssmscan.models import SSMForCausalLM


def generate_parser() -> ArgumentParser:
    """The parser of ``ssmscan generate``."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(
        exit_on_error=False,
        allow_abbrev=False,
        description="Continue a text by a model, as the tokens come; or every line of a file, as a line of JSON each.",
    )
    parser.add_argument(
        "--model", type=str, required=True, help="folder of a run or of a model, or its name on the hub"
    )
    parser.add_argument("--prompt", type=str, default="\n", help="text to go on from (default: a line break)")
    parser.add_argument(
        "--prompts", type=str | None, default=None, help="instead, a file with a prompt in each line; - is the input"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="prompts of the file at a time")
    parser.add_argument("--max-new-tokens", type=int, default=500, help="length of the continuation (tokens)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, help="scores are divided by it; 0 takes the likeliest token each time"
    )
    parser.add_argument("--top-k", type=int | None, default=None, help="draw among so many likeliest (tokens)")
    parser.add_argument(
        "--top-p", type=float | None, default=None, help="draw among the likeliest that have this probability together"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        help="above 1, tokens that were there already are the less likely for it",
    )
    parser.add_argument("--stop", type=str, nargs="+", default=[], help="texts before which the continuation ends")
    parser.add_argument(
        "--draft", type=str | None, default=None, help="a smaller model of the same vocabulary that proposes tokens"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the drawing")
    return parser


def run(values: Namespace) -> None:
    """Print what the parsed ``values`` ask for."""
    from ssmscan.generation.generator import Generator
    from ssmscan.generation.sampling import Sampling

    for name, least in (("max_new_tokens", 1), ("batch_size", 1), ("seed", 0)):
        check_integer("generate", f"--{name.replace('_', '-')}", getattr(values, name), least)
    if "" in values.stop:
        raise ValueError(error("generate", "--stop must be texts", "''"))
    sampling = {name: getattr(values, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    Sampling(**sampling)
    model, tokenizer = load(values.model, "generate")
    draft = None if values.draft is None else load(values.draft, "generate")[0]
    options = {
        "max_new_tokens": values.max_new_tokens,
        "eos_token_id": tokenizer.eos_token_id,
        "seed": values.seed,
        **sampling,
    }
    if values.prompts is None:
        tokens = torch.tensor([encode(tokenizer, values.prompt)])
        _print(Generator(model, draft=draft), tokenizer, tokens, values.stop, options)
        return
    generators: dict[int, Generator] = {}
    for prompts in _batches(values.prompts, values.batch_size):
        if len(prompts) not in generators:
            generators[len(prompts)] = Generator(model, len(prompts), draft=draft)
        for prompt, text in zip(
            prompts, _continued(generators[len(prompts)], tokenizer, prompts, options), strict=True
        ):
            print(
                json.dumps({"prompt": prompt, "continuation": _until(text, values.stop)}, ensure_ascii=False),
                flush=True,
            )


def load(source: str, command: str) -> tuple[SSMForCausalLM, PreTrainedTokenizerBase]:
    """A model of a folder or of the hub, with its tokenizer."""
    from transformers import AutoTokenizer

    from ssmscan.models import load_pretrained
    from ssmscan.training.checkpoint import why_no_model

    if Path(source).is_dir() and not (Path(source) / "tokenizer_config.json").is_file():
        found = why_no_model(Path(source))
        if found is not None:
            what, advice = found
            raise ValueError(error(command, "model must be the folder of a whole model", f"{source}, {what}", advice))
        if (Path(source) / "config.json").is_file():
            raise ValueError(error(command, "model must have a tokenizer", f"{source}, whose tokens are no text"))
    model = load_pretrained(source, device="cuda" if torch.cuda.is_available() else "cpu")
    return model, AutoTokenizer.from_pretrained(source)


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The tokens of a prompt."""
    try:
        tokens = tokenizer.encode(prompt)
    except Exception as reason:  # The class that tokenizers raises where a vocabulary has no word for the unknown.
        rule = "prompt must consist of what the model was trained on"
        raise ValueError(error("generate", rule, repr(prompt), f"{reason}.")) from None
    if not tokens:
        raise ValueError(error("generate", "prompt must have at least one token", repr(prompt)))
    return tokens


def _print(
    generator: Generator,
    tokenizer: PreTrainedTokenizerBase,
    tokens: torch.Tensor,
    stop: list[str],
    options: dict[str, Any],
) -> None:
    """The prompt, and its continuation as it comes."""
    from transformers import TextStreamer

    class Shown(TextStreamer):
        """Text on the way to the terminal, of which what may become a stop is held back."""

        waiting, ended = "", False

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            self.waiting += text
            end = len(_until(self.waiting, stop))
            self.ended = self.ended or end < len(self.waiting)
            if not (self.ended or stream_end):
                end = max(end - max(map(len, stop), default=1) + 1, 0)
            print(self.waiting[:end], end="", flush=True)
            self.waiting = "" if self.ended else self.waiting[end:]

    print(tokenizer.decode(tokens[0], skip_special_tokens=True), end="", flush=True)
    shown = Shown(tokenizer, skip_special_tokens=True)
    for token in generator.stream(tokens, **options):
        shown.put(token)
        if shown.ended:
            break
    if not shown.ended:
        shown.end()
    print()


def _until(text: str, stop: list[str]) -> str:
    """``text`` before the first of what stops it."""
    return text[: min((found for each in stop if (found := text.find(each)) >= 0), default=len(text))]


def _batches(path: str, size: int) -> Iterator[list[str]]:
    """The lines of a file, so many at a time."""
    try:
        text = (sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()).decode()
    except OSError as reason:
        raise ValueError(error("generate", "--prompts must be a file", f"{path}: {reason.strerror}")) from None
    except UnicodeDecodeError:
        raise ValueError(error("generate", "--prompts must be UTF-8", path)) from None
    prompts = text.splitlines()
    for number, prompt in enumerate(prompts, 1):
        if not prompt:
            raise ValueError(error("generate", "--prompts must have a prompt in each line", f"none in line {number}"))
    if not prompts:
        raise ValueError(error("generate", "--prompts must have a prompt in each line", f"no line in {path}"))
    for first in range(0, len(prompts), size):
        yield prompts[first : first + size]


def _continued(
    generator: Generator, tokenizer: PreTrainedTokenizerBase, prompts: list[str], options: dict[str, Any]
) -> list[str]:
    """The continuations of several prompts, the shorter ones padded on the left."""
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    whole = generator(tokens, attention_mask=None if mask.all() else mask, **options)
    return tokenizer.batch_decode(whole[:, longest:], skip_special_tokens=True)
