"""Generator against transformers' generate, its sampling, its ends, and speculation."""

import pytest
import torch

from ssmscan.generation import Generator, Sampling
from ssmscan.generation.speculation import verify
from ssmscan.models import SSMConfig, SSMForCausalLM

V = 13
OPTIONS = {"mamba2": {"headdim": 8, "d_state": 8}, "attention": {"num_heads": 2}, "matrix_ssm": {"headdim": 8}}
MODELS = [
    ["gated_ssm"], ["matrix_ssm"], ["s4d"], ["mamba"], ["mamba2"], ["rg_lru"], ["attention"], ["mamba2", "attention"],
]  # fmt: skip


def make(mixers, seed=0):
    torch.manual_seed(seed)
    options = {name: OPTIONS[name] for name in mixers if name in OPTIONS}
    config = SSMConfig(vocab_size=V, hidden_size=16, mixers=mixers, mixer_options=options, initializer_range=1.0)
    return SSMForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model():
    return make(["mamba2", "attention"])


@pytest.fixture
def prompts():
    return torch.randint(V, (2, 5), generator=torch.Generator().manual_seed(3))


def _generated(model, prompts, **options):
    mask = options.pop("attention_mask", torch.ones_like(prompts))
    return model.generate(prompts, attention_mask=mask, do_sample=False, use_cache=True, pad_token_id=0, **options)


@pytest.mark.parametrize("mixers", MODELS, ids="+".join)
def test_the_tokens_of_generate(mixers, prompts):
    """Also when called again, and where attention has to make room."""
    model = make(mixers)
    generator = Generator(model, batch_size=2, max_length=4)
    for new in (3, 9, 4):
        assert torch.equal(generator(prompts, new), _generated(model, prompts, max_new_tokens=new))


def test_padded_prompts(model, prompts):
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    found = Generator(model, 2)(prompts, 6, attention_mask=mask)
    assert torch.equal(found, _generated(model, prompts, attention_mask=mask, max_new_tokens=6))
    alone = Generator(model, 1)(prompts[:1, 2:], 6)
    assert torch.equal(found[:1, 2:], alone)


def test_stops_at_the_end(model, prompts):
    """A row that has ended is filled up; when all have, nothing more comes."""
    free = Generator(model, 2)(prompts, 12)[:, 5:]
    ends = [free[0, 2].item(), free[1, 4].item()]
    found = Generator(model, 2)(prompts, 12, eos_token_id=ends)[:, 5:]
    lengths = [next(i for i, token in enumerate(row) if token in ends) + 1 for row in free.tolist()]
    assert found.shape[1] == max(lengths)
    for row, expected, length in zip(found, free, lengths, strict=True):
        assert torch.equal(row[:length], expected[:length])
        assert (row[length:] == ends[0]).all()


def test_the_penalty_of_generate(model, prompts):
    found = Generator(model, 2)(prompts, 8, repetition_penalty=1.7)
    assert torch.equal(found, _generated(model, prompts, max_new_tokens=8, repetition_penalty=1.7))
    assert not torch.equal(found, Generator(model, 2)(prompts, 8))


def test_seeds(model, prompts):
    generator = Generator(model, 2)
    first, again, other = (generator(prompts, 10, temperature=9.0, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.get_rng_state()
    generator(prompts, 3, temperature=1.0)
    assert torch.equal(state, torch.get_rng_state())


def test_streams_what_it_returns(model, prompts):
    generator = Generator(model, 2)
    tokens = list(generator.stream(prompts, 6, temperature=9.0, top_k=5, seed=4))
    assert torch.equal(torch.stack(tokens, 1), generator(prompts, 6, temperature=9.0, top_k=5, seed=4)[:, 5:])


@pytest.mark.parametrize(
    "options", [{"temperature": 0.5}, {"temperature": 2.0, "top_k": 3}, {"temperature": 1.0, "top_p": 0.6}]
)
def test_what_is_drawn(options):
    """The frequencies of many draws are the probabilities, those of transformers' processors among them."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = torch.tensor([[0.3, -1.0, 2.0, 1.0, 0.0, 1.5]])
    sampling = Sampling(**options)
    p = sampling.probabilities(scores)
    expected = TemperatureLogitsWarper(options["temperature"])(None, scores)
    if "top_k" in options:
        expected = TopKLogitsWarper(options["top_k"])(None, expected)
    if "top_p" in options:
        expected = TopPLogitsWarper(options["top_p"])(None, expected)
    torch.testing.assert_close(p, expected.softmax(-1))
    drawn = sampling.choose(scores.expand(100_000, -1), None, torch.Generator().manual_seed(0))
    frequency = drawn.bincount(minlength=6) / 100_000
    # Five standard deviations of a frequency of a half.
    torch.testing.assert_close(frequency, p[0], rtol=0, atol=5 * 0.5 / 100_000**0.5)
    assert (frequency[p[0] == 0] == 0).all()


def test_a_block_is_distributed_as_the_model_says():
    """The token at the first place, whether it was proposed or not."""
    random = torch.Generator().manual_seed(0)
    p, q = torch.rand(2, 5, generator=random).softmax(-1), torch.tensor([[0.5, 0.1, 0.3, 0.1, 0.0]])
    counts = torch.zeros(5)
    draws = 20_000
    proposals = q[0].multinomial(draws, replacement=True, generator=random)
    for proposal in proposals.split(1):
        accepted, following = verify(p, q, proposal, random)
        counts[proposal if accepted else following] += 1
    torch.testing.assert_close(counts / draws, p[0], rtol=0, atol=5 * 0.5 / draws**0.5)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"eos_token_id": 3}])
def test_speculation_takes_the_same_greatest_tokens(model, seed, options):
    """From the model itself, of which all is taken, and from another, of which little is."""
    prompt = torch.tensor([[1, 5, 2, 7]])
    expected = Generator(model)(prompt, 17, **options)
    for draft in (model, make(["mamba"], seed)):
        assert torch.equal(Generator(model, draft=draft, proposals=3)(prompt, 17, **options), expected)


@pytest.mark.slow
def test_speculation_draws_from_the_same_distribution():
    """The frequencies of the third token after a prompt, against the exact ones."""
    model, draft = make(["gated_ssm"], 0), make(["gated_ssm"], 1)
    prompt, options = torch.tensor([[1, 5]]), {"temperature": 6.0, "top_k": 3}
    sampling, exact = Sampling(**options), torch.zeros(V)
    with torch.no_grad():
        # All continuations of two tokens, and how likely they are.
        pairs = torch.cartesian_prod(torch.arange(V), torch.arange(V))
        p = [
            sampling.probabilities(row)
            for row in model(torch.cat([prompt.expand(V * V, 2), pairs], 1)).logits.unbind(1)
        ]
    chance = p[1].gather(1, pairs[:, :1]) * p[2].gather(1, pairs[:, 1:])
    exact = (chance * p[3]).sum(0)
    generator = Generator(model, draft=draft, proposals=2)
    draws = 500
    counts = sum(generator(prompt, 3, **options, seed=i)[0, -1:].bincount(minlength=V) for i in range(draws))
    torch.testing.assert_close(counts / draws, exact, rtol=0, atol=5 * 0.5 / draws**0.5)


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda model: Generator(model, 0), "batch_size must be at least 1, got 0"),
        (lambda model: Generator(model, 2, draft=model), "batch_size must be 1 with a draft, got 2"),
        (
            lambda model: Generator(model)(torch.zeros(2, 3, dtype=torch.int64), 1),
            r"input_ids must have shape \(b, l\)",
        ),
        (lambda model: Generator(model)(torch.zeros(1, 0, dtype=torch.int64), 1), "l of at least 1"),
        (lambda model: Generator(model)(torch.zeros(1, 3), 1), "input_ids must be int32 or int64, got torch.float32"),
        (lambda model: Generator(model)(torch.ones(1, 3, dtype=torch.int64), 0), "max_new_tokens must be at least 1"),
        (lambda model: Sampling(temperature=-1.0), "temperature must be at least 0 and finite, got -1.0"),
        (lambda model: Sampling(top_k=0), "top_k must be at least 1, got 0"),
        (lambda model: Sampling(top_p=0.0), r"top_p must be in \(0, 1\], got 0.0"),
        (lambda model: Sampling(repetition_penalty=0.0), "repetition_penalty must be positive and finite, got 0.0"),
    ],
)
def test_refusals(model, call, part):
    with pytest.raises((TypeError, ValueError), match=f"Generator: .*{part}"):
        call(model)


def test_a_draft_of_another_vocabulary(model):
    other = SSMForCausalLM(SSMConfig(vocab_size=7, hidden_size=8, mixers=["gated_ssm"]))
    with pytest.raises(ValueError, match="draft must have the vocabulary of model, 13, got 7"):
        Generator(model, draft=other)


def test_a_model_that_sees_the_future():
    hydra = SSMConfig(vocab_size=V, hidden_size=8, mixers=["hydra"], mixer_options={"hydra": {"headdim": 8}})
    with pytest.raises(NotImplementedError):
        Generator(SSMForCausalLM(hydra))


@pytest.mark.gpu
@pytest.mark.parametrize("mixers", MODELS, ids="+".join)
def test_a_recorded_step_makes_the_same_tokens(mixers, prompts):
    model = make(mixers).cuda()
    generator = Generator(model, 2, 64)
    for _ in range(2):
        found = generator(prompts.cuda(), 20)
        assert torch.equal(found, _generated(model, prompts.cuda(), max_new_tokens=20))
    assert generator._step.graphs
