"""SSMForCausalLM's forward: the cache, padding, packing, losses, outputs, refusals."""

import copy
import pickle
import subprocess
import sys
import weakref

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from ssmscan.layers import decay_groups
from ssmscan.models import SSMCache, SSMForCausalLM, SSMModel
from ssmscan.models.mixers import MIXERS
from ssmscan.models.modeling import CACHE

VOCABULARY = 19


@torch.no_grad()
def _logits(model, tokens, **keywords):
    return model(tokens, **keywords).logits


@pytest.mark.parametrize("sizes", [[9], [1] * 9, [4, 5], [1, 7, 1]])
@pytest.mark.parametrize("room", [None, 2])
def test_chunks_equal_the_whole(model, tokens, sizes, room):
    """Also where attention has to grow."""
    cache = model.make_cache(2, room)
    chunks = torch.cat([_logits(model, chunk, cache=cache) for chunk in tokens.split(sizes, 1)], 1)
    torch.testing.assert_close(chunks, _logits(model, tokens), rtol=0, atol=1e-5)
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("name", [name for name in MIXERS if name != "hydra"])
def test_every_causal_mixer(small_model, tokens, name):
    model = small_model((name,))
    cache = model.make_cache(2)
    chunks = torch.cat([_logits(model, chunk, cache=cache) for chunk in tokens.split([4, 1, 4], 1)], 1)
    torch.testing.assert_close(chunks, _logits(model, tokens), rtol=0, atol=1e-5)


def test_a_mixer_that_sees_the_future(small_model, tokens):
    """It has no state, and is not given one unless asked."""
    model = small_model(("hydra",))
    outputs = model(tokens)
    assert getattr(outputs, CACHE) is None
    other = tokens.clone()
    other[:, -1] = 0
    assert not torch.equal(_logits(model, other)[:, 0], outputs.logits[:, 0])
    with pytest.raises(NotImplementedError, match="state must be None in a layer that is not causal"):
        model.generate(tokens, max_new_tokens=2)


def test_the_cache_that_a_forward_makes(model, tokens):
    with torch.no_grad():
        outputs = model(tokens[:, :6])
        cache = getattr(outputs, CACHE)
        assert isinstance(cache, SSMCache)
        # By transformers' older names too.
        last = [model(tokens[:, 6:7], past_key_values=cache), model(tokens[:, 7:], cache_params=cache)]
    chunks = torch.cat([outputs.logits, *(step.logits for step in last)], 1)
    torch.testing.assert_close(chunks, _logits(model, tokens), rtol=0, atol=1e-5)
    assert all(getattr(step, CACHE) is cache for step in last)


@pytest.mark.parametrize("keywords", [{"use_cache": False}, {"cu_seqlens": torch.tensor([0, 9])}])
def test_no_cache(model, tokens, keywords):
    assert getattr(model(tokens[:1], **keywords), CACHE) is None
    assert getattr(model.train()(tokens), CACHE) is None


def test_a_cache_can_be_kept_and_reset(model, tokens):
    cache = model.make_cache(2)
    _logits(model, tokens[:, :4], cache=cache)
    kept = copy.deepcopy(cache)
    first = _logits(model, tokens[:, 4:], cache=cache)
    assert torch.equal(first, _logits(model, tokens[:, 4:], cache=kept))
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(_logits(model, tokens, cache=cache)[:, 4:], first, rtol=0, atol=1e-5)


def test_an_empty_chunk_changes_nothing(model, tokens):
    cache = model.make_cache(2)
    _logits(model, tokens[:, :4], cache=cache)
    assert _logits(model, tokens[:, :0], cache=cache).shape == (2, 0, VOCABULARY)
    torch.testing.assert_close(
        _logits(model, tokens[:, 4:], cache=cache), _logits(model, tokens)[:, 4:], rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("cached", [False, True])
def test_left_padding(model, tokens, cached):
    """In one go, and in chunks that cut the padding."""
    padding = 5
    padded = F.pad(tokens[1:], (padding, 0))
    mask = (torch.arange(14) >= padding).long()[None]
    rows, masks = torch.cat([F.pad(tokens[:1], (0, padding)), padded]), torch.cat([torch.ones_like(mask), mask])
    if cached:
        cache = model.make_cache(2)
        # The mask of a chunk is that of all tokens so far.
        parts = [
            _logits(model, rows[:, a:b], attention_mask=masks[:, :b], cache=cache)
            for a, b in ((0, 1), (1, 4), (4, 7), (7, 14))
        ]
        logits = torch.cat(parts, 1)
    else:
        logits = _logits(model, rows, attention_mask=masks)
    torch.testing.assert_close(logits[1:, padding:], _logits(model, tokens[1:]), rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[:1, :9], _logits(model, tokens[:1]), rtol=0, atol=1e-5)


def test_packed_equals_separate(model, tokens):
    packed, cu_seqlens = tokens.view(1, -1), torch.tensor([0, 9, 9, 18])
    logits = _logits(model, packed, cu_seqlens=cu_seqlens)
    torch.testing.assert_close(logits.view(2, 9, -1), _logits(model, tokens), rtol=0, atol=1e-5)


def test_loss(model, tokens):
    logits = _logits(model, tokens)
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens, labels=tokens).loss, expected)
    some = tokens.clone()
    some[:, :5] = -100
    expected = F.cross_entropy(logits[:, 4:-1].flatten(0, 1), tokens[:, 5:].flatten())
    torch.testing.assert_close(model(tokens, labels=some).loss, expected)


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seq_lens_q"])
def test_loss_of_packed_sequences(model, tokens, name):
    """The first token of a sequence is not learned from the sequence before it."""
    packed, bounds = tokens.view(1, -1), torch.tensor([0, 9, 18, 18])
    loss = model(packed, labels=packed, **{name: bounds}).loss
    torch.testing.assert_close(loss, model(tokens, labels=tokens).loss)


def test_embeddings_in_place_of_tokens(model, tokens):
    embedded = model.get_input_embeddings()(tokens)
    assert torch.equal(_logits(model, None, inputs_embeds=embedded), _logits(model, tokens))


def test_hidden_states(model, tokens):
    streams = model(tokens, output_hidden_states=True).hidden_states
    assert len(streams) == len(model.backbone.layers) + 1
    assert torch.equal(streams[0], model.backbone.embeddings(tokens))
    assert torch.equal(streams[-1], model.backbone(tokens).last_hidden_state)
    assert model(tokens).hidden_states is None


@torch.no_grad()
def test_streams_are_kept_on_demand_only(small_model, tokens):
    """Or a forward without gradients would hold every layer's activations."""
    model = small_model()
    before, alive = [], []
    model.backbone.layers[0].register_forward_pre_hook(lambda _, given: before.append(weakref.ref(given[0])))
    model.backbone.norm_f.register_forward_pre_hook(lambda *_: alive.append(before[-1]() is not None))
    model(tokens)
    model(tokens, output_hidden_states=True)
    assert alive == [False, True]


def test_logits_to_keep(model, tokens):
    whole = _logits(model, tokens)
    torch.testing.assert_close(_logits(model, tokens, logits_to_keep=2), whole[:, -2:])
    torch.testing.assert_close(_logits(model, tokens, logits_to_keep=torch.tensor([3, 0])), whole[:, [3, 0]])


def test_tuples(model, tokens):
    loss, logits, *_ = model(tokens, labels=tokens, return_dict=False)
    assert loss.dim() == 0
    assert torch.equal(logits, model(tokens).logits)


def test_every_parameter_gets_a_gradient(model, tokens):
    model(tokens, labels=tokens).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("intermediate_size", [0, 16])
def test_mlp(small_model, tokens, intermediate_size):
    model = small_model("mamba", intermediate_size=intermediate_size)
    block = model.backbone.layers[0]
    x = model.backbone.embeddings(tokens)
    after = x + block.mixer(block.norm(x))
    if intermediate_size:
        after = after + block.mlp(block.norm2(after))
    torch.testing.assert_close(model(tokens, output_hidden_states=True).hidden_states[1], after)


def test_untied(small_model):
    model = small_model("mamba", tie_word_embeddings=False)
    assert model.lm_head.weight is not model.backbone.embeddings.weight
    tied = small_model("mamba")
    assert tied.lm_head.weight is tied.backbone.embeddings.weight


def test_copies(model, tokens):
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(_logits(other, tokens), _logits(model, tokens))
        assert other.lm_head.weight is other.backbone.embeddings.weight


def test_weight_decay(small_model):
    model = small_model(("mamba", "mamba2"))
    _, kept = decay_groups(model)
    names = {name for name, p in model.named_parameters() if any(p is q for q in kept)}
    last = {name.rsplit(".", 1)[-1] for name in names}
    assert {"A_log", "D", "dt_bias", "bias"} <= last
    assert all(name in names for name, _ in model.named_parameters() if "norm" in name)


def test_the_vocabulary_can_grow(small_model, tokens):
    model = small_model("mamba")
    before = _logits(model, tokens)
    model.resize_token_embeddings(24, mean_resizing=False)
    assert torch.equal(_logits(model, tokens)[..., :VOCABULARY], before)
    assert model(tokens, labels=tokens).loss.isfinite()


def test_refusals(model, tokens):
    mask = torch.ones(2, 8)
    for keywords, kind, part in (
        ({}, ValueError, "input_ids or inputs_embeds must .* got neither"),
        (
            {"input_ids": tokens, "inputs_embeds": mask},
            ValueError,
            "input_ids or inputs_embeds must .* got both",
        ),
        ({"input_ids": tokens.float()}, TypeError, r"input_ids must be an int32 or int64 tensor, got torch\.float32"),
        ({"input_ids": [1, 2]}, TypeError, "input_ids must be an int32 or int64 tensor, got list"),
        ({"input_ids": tokens[0]}, ValueError, r"input_ids must have shape \(b, l\), got \(9,\)"),
        ({"inputs_embeds": mask}, ValueError, r"inputs_embeds must have shape \(b, l, m\), got \(2, 8\)"),
        (
            {"input_ids": tokens, "attention_mask": mask},
            ValueError,
            r"attention_mask must have shape \(b, total\)",
        ),
        (
            {"input_ids": tokens, "cache": DynamicCache()},
            TypeError,
            "cache must be an SSMCache, got DynamicCache",
        ),
        (
            {"input_ids": tokens[:1], "cu_seqlens": torch.tensor([0, 9]), "attention_mask": torch.ones(1, 9)},
            NotImplementedError,
            "attention_mask must be None with cu_seqlens",
        ),
        (
            {"input_ids": tokens, "position_ids": torch.arange(9)},
            NotImplementedError,
            "position_ids must come with cu_seqlens",
        ),
    ):
        with pytest.raises(kind, match=part):
            model(**keywords)
    cache = model.make_cache(2)
    with pytest.raises(NotImplementedError, match="crop must remove 0 tokens"):
        cache.crop(-1)
    with pytest.raises(ValueError, match="state"):
        model(tokens[:1], cache=cache)


def test_the_backbone_alone(small_model, tokens, tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    backbone = SSMModel.from_pretrained(tmp_path)
    assert torch.equal(backbone(tokens).last_hidden_state, model.backbone(tokens).last_hidden_state)


def test_transformers_is_not_imported_before_it_is_needed():
    code = "import sys, ssmscan, ssmscan.models; print('transformers' in sys.modules); ssmscan.models.SSMConfig"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]


def test_unknown_names():
    import ssmscan.models

    assert set(ssmscan.models.__all__) <= set(dir(ssmscan.models))
    with pytest.raises(AttributeError, match="no attribute 'SSMForVision'"):
        ssmscan.models.SSMForVision  # noqa: B018
    assert SSMForCausalLM is ssmscan.models.SSMForCausalLM
