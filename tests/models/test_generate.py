"""generate: the same tokens with and without the cache, whatever decodes and however the prompt arrives."""

import pytest
import torch
import torch.nn.functional as F

from ssmscan.models import SSMCache
from ssmscan.models.modeling import CACHE

NEW = 5


@pytest.fixture(params=["mamba2", "hybrid"])
def model(request, small_model):
    """With a head of its own: a tied one says what it has just read."""
    return small_model(request.param, tie_word_embeddings=False)


def _generate(model, tokens, **keywords):
    return model.generate(tokens, **({"max_new_tokens": NEW, "do_sample": False} | keywords))


@torch.no_grad()
def _greedy(model, tokens):
    """Without generate, and without a cache."""
    for _ in range(NEW):
        best = model(tokens, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
        tokens = torch.cat([tokens, best], 1)
    return tokens


def test_greedy(model, tokens):
    expected = _greedy(model, tokens)
    assert torch.equal(_generate(model, tokens), expected)
    assert torch.equal(_generate(model, tokens, use_cache=False), expected)
    # It says something other than one token again and again.
    assert expected[:, 9:].unique().numel() > 2


@pytest.mark.parametrize("keywords", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
def test_beams(model, tokens, keywords, monkeypatch):
    orders = []
    reorder = SSMCache.reorder_cache
    monkeypatch.setattr(SSMCache, "reorder_cache", lambda self, index: (orders.append(index), reorder(self, index)))
    cached = _generate(model, tokens, **keywords)
    assert torch.equal(cached, _generate(model, tokens, use_cache=False, **keywords))
    # Some beams went on from others.
    assert any(not torch.equal(order, torch.arange(len(order))) for order in orders)


def test_sampling(model, tokens):
    def sample(**keywords):
        torch.manual_seed(3)
        return _generate(model, tokens, do_sample=True, top_k=5, num_return_sequences=2, **keywords)

    assert sample().shape == (4, 9 + NEW)
    assert torch.equal(sample(), sample(use_cache=False))
    assert not torch.equal(sample()[::2], _greedy(model, tokens))


@pytest.mark.parametrize("keywords", [{}, {"num_beams": 3}])
def test_left_padding(model, tokens, keywords):
    """A padded row says what it says alone, beside a row without padding."""
    padding = 4
    rows = torch.cat([F.pad(tokens[:1], (padding, 0)), torch.cat([tokens[1:], tokens[1:, :padding]], 1)])
    mask = torch.ones_like(rows)
    mask[0, :padding] = 0
    both = _generate(model, rows, attention_mask=mask, **keywords)
    assert torch.equal(both[:1, padding:], _generate(model, tokens[:1], **keywords))
    assert torch.equal(both[1:], _generate(model, rows[1:], **keywords))


def test_embeddings_as_the_prompt(model, tokens):
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(_generate(model, None, inputs_embeds=embedded), _greedy(model, tokens)[:, 9:])


@pytest.mark.parametrize("keywords", [{}, {"num_beams": 3}])
def test_a_prompt_in_chunks(model, tokens, keywords):
    chunked = _generate(model, tokens, prefill_chunk_size=4, **keywords)
    assert torch.equal(chunked, _generate(model, tokens, **keywords))


def test_a_padded_prompt_in_chunks_of_one(model, tokens):
    rows = torch.cat([tokens[1:], tokens[:1]], 1)
    mask = (torch.arange(18) >= 9).long()[None]
    chunked = _generate(model, rows, attention_mask=mask, prefill_chunk_size=1)
    assert torch.equal(chunked[:, 9:], _greedy(model, tokens[:1]))


def test_a_cache_of_ones_own(model, tokens):
    cache = model.make_cache(2, 9 + NEW)
    assert torch.equal(_generate(model, tokens, **{CACHE: cache}), _greedy(model, tokens))
    # All but the last token were seen.
    assert cache.get_seq_length() == 9 + NEW - 1


@pytest.mark.parametrize("whole", [True, False])
def test_going_on(model, tokens, whole):
    """From a returned cache, with all tokens or with those that it has not seen."""
    first = _generate(model, tokens, return_dict_in_generate=True)
    cache = getattr(first, CACHE)
    assert isinstance(cache, SSMCache)
    more = torch.cat([first.sequences, tokens[:, :4]], 1)
    given = more if whole else more[:, cache.get_seq_length() :]
    went_on = _generate(model, given, attention_mask=torch.ones_like(more), **{CACHE: cache})
    assert torch.equal(went_on[:, -NEW:], _greedy(model, more)[:, -NEW:])


def test_an_end_token(model, tokens):
    whole = _greedy(model, tokens)
    end = whole[0, 11].item()
    stopped = _generate(model, tokens[:1], eos_token_id=end, pad_token_id=0)
    assert torch.equal(stopped, whole[:1, : 9 + whole[0, 9:].tolist().index(end) + 1])


def test_another_model_cannot_draft(model, tokens):
    with pytest.raises(ValueError, match="not supported with stateful models"):
        _generate(model, tokens[:1], assistant_model=model)
