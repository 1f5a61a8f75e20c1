"""Batches: their rows, and the arguments of a model that they become."""

import torch

from ssmscan.tasks import Batch

CPU = torch.device("cpu")


def test_rows():
    tokens = torch.arange(12).reshape(4, 3)
    starts = tokens % 2 == 0
    batch = Batch(tokens, -tokens, starts)
    rows = batch.rows(1, 2)
    assert torch.equal(rows.tokens, tokens[1:3])
    assert torch.equal(rows.targets, -tokens[1:3])
    assert torch.equal(rows.starts, starts[1:3])
    assert batch.rows(3, 5).tokens.shape == (1, 3)
    assert Batch(tokens, tokens).rows(0, 2).starts is None


def test_rows_of_one_document():
    tokens = torch.arange(6).reshape(2, 3)
    inputs = Batch(tokens, -tokens).inputs(CPU)
    assert inputs.keys() == {"input_ids", "shift_labels"}
    assert torch.equal(inputs["input_ids"], tokens)
    assert torch.equal(inputs["shift_labels"], -tokens)


def test_rows_of_several_documents():
    """A row begins a sequence, whether a document begins there or not; the number of sequences is a power of 2."""
    tokens = torch.arange(12).reshape(2, 6)
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[0, [0, 2, 3]] = True
    starts[1, 5] = True
    inputs = Batch(tokens, -tokens, starts).inputs(CPU)
    assert inputs["input_ids"].tolist() == [list(range(12))]
    assert inputs["shift_labels"].tolist() == [[-i for i in range(12)]]
    assert inputs["cu_seqlens"].tolist() == [0, 2, 3, 6, 11, 12, 12, 12, 12]
    assert inputs["cu_seqlens"].dtype == torch.int32
    assert not starts[1, 0]
    whole = Batch(tokens[:1], tokens[:1], torch.zeros(1, 6, dtype=torch.bool)).inputs(CPU)
    assert whole["cu_seqlens"].tolist() == [0, 6]
