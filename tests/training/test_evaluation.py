"""A text's perplexity: every token once, whatever the windows."""

import math

import pytest
import torch
import torch.nn.functional as F

from ssmscan.models import SSMConfig, SSMForCausalLM
from ssmscan.tasks import Text
from ssmscan.tasks.text import Corpus, find, tokenize
from ssmscan.training import TrainConfig
from ssmscan.training.evaluation import evaluate, evaluate_text

DOCUMENTS = ["to be or not to be", "that is the question", "whether tis nobler"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i}.txt").write_text(text)
    tokenize(folder / "tokens", {"eval": find("data", str(folder / "*.txt"))}, "bytes")
    return Corpus(folder / "tokens")


@pytest.fixture(scope="module")
def model(corpus):
    torch.manual_seed(0)
    return SSMForCausalLM(SSMConfig(vocab_size=corpus.index.vocab_size, hidden_size=8, mixers=["gated_ssm"]))


@torch.no_grad()
def _losses(model, corpus, context):
    """The loss of every token but the first of each document, from the ``context`` tokens of it before."""
    stream = corpus.parts["eval"].read(torch.zeros(1, dtype=torch.int64).numpy(), len(corpus.parts["eval"]))[0]
    ends = [i + 1 for i, token in enumerate(stream) if token == corpus.index.end_of_text]
    losses = []
    for first, end in zip([0, *ends], ends, strict=False):
        document = torch.from_numpy(stream[first:end])
        for i in range(1, len(document)):
            # A window begins at a multiple of its stride in the stream, not in the document.
            seen = document[max(context(first + i) - first, 0) : i]
            losses.append(F.cross_entropy(model(seen[None]).logits[0, -1:], document[i : i + 1]).item())
    return losses


@pytest.mark.parametrize(("length", "stride"), [(100, None), (8, None), (8, 3), (8, 1), (7, 7)])
@pytest.mark.parametrize("batch_size", [1, 5])
def test_every_token_once(model, corpus, length, stride, batch_size):
    step = stride or length

    def begin(at):
        """Where the window begins that tells the token ``at``."""
        return 0 if at <= length else -(-(at - length) // step) * step

    losses = _losses(model.eval(), corpus, begin)
    found = evaluate_text(model, corpus, length=length, stride=stride, batch_size=batch_size)
    assert found["tokens"] == len(losses) == sum(map(len, DOCUMENTS))
    assert found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    # The end of a document is foretold too, and is no text; its first byte is not foretold.
    written = sum(map(len, DOCUMENTS)) - len(DOCUMENTS)
    assert found["bits_per_byte"] == pytest.approx(sum(losses) / math.log(2) / written, rel=1e-5)


def test_what_the_log_of_a_run_says(tmp_path):
    """The task's evaluation of the same text in the same windows."""
    text = tmp_path / "verse.txt"
    text.write_text("to be or not to be\n" * 30)
    task = Text(str(text), length=9, vocabulary="bytes", held_out=0.3)
    torch.manual_seed(0)
    model = SSMForCausalLM(SSMConfig(vocab_size=task.vocab_size, hidden_size=8, mixers=["gated_ssm"]))
    logged = evaluate(model, TrainConfig(task=task, batch_size=4))
    whole = evaluate_text(model, task.corpus, length=9)
    # The last window is not whole.
    assert whole["tokens"] - 9 < task.held_out_examples * 9 <= whole["tokens"]
    assert whole["bits_per_byte"] == pytest.approx(logged["bits_per_byte"], rel=0.02)


@pytest.mark.parametrize(
    ("keywords", "part"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"length": 8, "stride": 9}, "stride must be 1 to length = 8, got 9"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"part": "test"}, "part must be one of eval, got test"),
    ],
)
def test_refusals(model, corpus, keywords, part):
    with pytest.raises(ValueError, match=f"eval: {part}"):
        evaluate_text(model, corpus, **keywords)


def test_tokens_of_another_model(corpus):
    small = SSMForCausalLM(SSMConfig(vocab_size=7, hidden_size=8, mixers=["gated_ssm"]))
    with pytest.raises(ValueError, match="eval: data must have at most the 7 tokens of the model, got 257"):
        evaluate_text(small, corpus)
