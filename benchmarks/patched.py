"""Time transformers' own models before and after ``ssmscan.patch_transformers()``.

    python benchmarks/patched.py mamba mamba2 --out benchmarks/results
    python benchmarks/patched.py mamba mamba2 --device cuda --layers 24 --batch 4 --length 1024 --out benchmarks/results

A training step is a forward and a backward, in float32 on the CPU and under bfloat16 autocast on a GPU; generating is
33 tokens after a prompt of 16, greedily. Times are the least of several, taken by turns, in seconds. Before, logits and
tokens of 2 layers in float32 are compared; ``error`` is the largest difference of logits over the largest logit.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import torch

import ssmscan
from ssmscan.bench.models.timing import seconds
from ssmscan.bench.plot import speedups
from ssmscan.bench.result import commit, machine, now, replace_rows, versions

WIDTH, VOCABULARY, PROMPT, NEW = 768, 1024, 16, 33
# Tokens of a sequence whose logits are compared, and how far these may differ.
CHECKED, TOLERANCE = 64, 1e-5
MODELS = {
    "mamba": ("Mamba", {}),
    "mamba2": ("Mamba2", {"num_heads": 2 * WIDTH // 64, "head_dim": 64, "n_groups": 1, "state_size": 128}),
}
DIRECTIONS = ("train", "generate")


def build(name: str, layers: int, device: str) -> torch.nn.Module:
    """A model of random weights."""
    import transformers

    torch.manual_seed(0)
    prefix, fields = MODELS[name]
    config = getattr(transformers, f"{prefix}Config")(
        hidden_size=WIDTH, num_hidden_layers=layers, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=None, **fields
    )
    return getattr(transformers, f"{prefix}ForCausalLM")(config).to(device)


def compare(model: torch.nn.Module, name: str, device: str) -> float:
    """How far the patch changes the logits. AssertionError where that is much, or the tokens are others."""
    ids = torch.randint(1, VOCABULARY, (2, CHECKED), device=device)

    @torch.no_grad()
    def results() -> tuple[torch.Tensor, torch.Tensor]:
        tokens = model.eval().generate(ids[:, :PROMPT], max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]
        return model(ids).logits, tokens

    # Otherwise a convolution rounds its inputs to ten bits.
    with torch.backends.cudnn.flags(allow_tf32=False):
        logits, tokens = results()
        ssmscan.patch_transformers(name)
        patched_logits, patched_tokens = results()
        ssmscan.unpatch_transformers()
    error = ((patched_logits - logits).abs().max() / logits.abs().max()).item()
    assert error < TOLERANCE, f"the logits of {name} differ by {error:.1e}"
    assert torch.equal(tokens, patched_tokens), f"the tokens of {name} differ"
    return error


def step_of(model: torch.nn.Module, direction: str, batch: int, length: int, device: str) -> Callable[[], object]:
    """What is timed."""
    ids = torch.randint(1, VOCABULARY, (batch, length), device=device)

    def train() -> None:
        model.train().zero_grad()
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    def generate() -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            return model.eval().generate(ids[:, :PROMPT], max_new_tokens=NEW, do_sample=False)  # type: ignore[operator]

    return train if direction == "train" else generate


def measure(name: str, direction: str, given: argparse.Namespace) -> dict[str, object]:
    """One row: the least time of a step without the patch and with it."""
    # Random weights multiply what float32 rounds: in 24 layers both are 1e-4 from float64.
    error = compare(build(name, 2, given.device), name, given.device)
    model = build(name, given.layers, given.device)
    step = step_of(model, direction, given.batch, given.length, given.device)
    before: list[float] = []
    after: list[float] = []
    for turn in range(given.repeats):
        # transformers' own training step of Mamba takes minutes on a CPU, and half a one on a GPU.
        if turn == 0 or sum(before) < given.patience:
            before.append(seconds(step, given.device))
        ssmscan.patch_transformers(name)
        after.append(seconds(step, given.device))
        ssmscan.unpatch_transformers()
    return {
        "model": name,
        "direction": direction,
        "layers": given.layers,
        "batch": given.batch,
        "length": given.length if direction == "train" else PROMPT + NEW,
        "threads": torch.get_num_threads() if given.device == "cpu" else None,
        "before_s": round(min(before), 4),
        "after_s": round(min(after), 4),
        "ratio": round(min(before) / min(after), 2),
        "error": float(f"{error:.1e}"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS, metavar="MODEL")
    parser.add_argument("--direction", nargs="+", default=list(DIRECTIONS), choices=DIRECTIONS)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of one in training (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--patience", type=float, default=20, help="seconds for the unpatched (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch, on the CPU (default: its own choice)")
    parser.add_argument("--out", type=Path, help="folder of <machine>/transformers.json, whose rows are replaced")
    parser.add_argument("--image", type=Path, help="a picture of all rows there, to draw")
    parser.add_argument("--commit", help="commit to record; without it, git is asked")
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    import transformers

    for name in given.models:
        for direction in given.direction:
            row = measure(name, direction, given)
            print(json.dumps(row), flush=True)
            if given.out is not None:
                about = {"torch": versions()[0], "transformers": transformers.__version__, "date": now()}
                row |= {"commit": given.commit or commit(), **about}
                path = given.out / machine(given.device) / "transformers.json"
                rows = replace_rows(path, [row], ("model", "direction"))
                if given.image is not None:
                    speedups(rows, machine(given.device), given.image)


if __name__ == "__main__":
    main()
