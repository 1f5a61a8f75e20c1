"""A step on a GPU: recorded as a graph, compiled, in every precision, without waiting for the device."""

from dataclasses import replace

import pytest
import torch

from ssmscan.tasks import IGNORE, SelectiveCopying
from ssmscan.training import ModelConfig, OptimConfig, TrainConfig, UsageError, loop
from ssmscan.training.optim import make_optimizer
from ssmscan.training.step import Step

SMALL = TrainConfig(
    batch_size=4,
    task=SelectiveCopying(symbols=3, data_tokens=2, length=30),
    model=ModelConfig(
        mixers=["mamba2", "mamba", "attention"],
        hidden_size=32,
        mixer_options={"mamba2": {"headdim": 16, "d_state": 16}, "attention": {"num_heads": 2}},
    ),
    optim=OptimConfig(warmup=1),
)


def _losses(config, sizes=(4,) * 8):
    """The numbers of steps of so many examples, and the weights after them."""
    device = torch.device("cuda")
    config, model = loop._prepare(config)
    model.to(device).train()
    update = Step(model, make_optimizer(model, config.optim), config, device)
    numbers = [update(config.task.batch(size, 0, i, "train"), 1e-2) for i, size in enumerate(sizes)]
    return torch.stack(numbers).cpu(), [weight.detach().clone() for weight in model.parameters()]


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"precision": "float16"}, {"precision": "float32"}])
def test_a_graph_is_the_step_it_records(options):
    """The same bits, weights included, before it is recorded and after."""
    eager, weights = _losses(replace(SMALL, **options))
    recorded, replayed = _losses(replace(SMALL, cuda_graph=True, **options))
    assert torch.equal(eager, recorded)
    assert all(map(torch.equal, weights, replayed))


@pytest.mark.gpu
def test_graphs_of_two_shapes():
    """They share their memory."""
    sizes = [4, 2, 2, 4, 4, 2, 4, 2, 4, 2, 2, 4]
    eager, weights = _losses(SMALL, sizes)
    recorded, replayed = _losses(replace(SMALL, cuda_graph=True), sizes)
    assert torch.equal(eager, recorded)
    assert all(map(torch.equal, weights, replayed))


@pytest.mark.gpu
# PyTorch's compiler looks at the gradients of tensors that have none.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"micro_batch_size": 1}, {"compile": True}])
def test_a_step_with(options):
    expected, _ = _losses(SMALL)
    found, _ = _losses(replace(SMALL, **options))
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=2e-2, atol=0)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_does_not_wait():
    config, model = loop._prepare(SMALL)
    model.to("cuda").train()
    update = Step(model, make_optimizer(model, config.optim), config, torch.device("cuda"))
    batches = [config.task.batch(4, 0, i, "train") for i in range(6)]
    for batch in batches[:3]:
        update(batch, 1e-3)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[3:]:
            update(batch, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_trains_on_a_gpu(tmp_path, cuda_graph):
    """The loop itself, resumed too."""
    config = replace(
        SMALL, out=str(tmp_path), steps=12, eval_every=6, save_every=6, log_every=1, eval_tokens=64,
        cuda_graph=cuda_graph,
    )  # fmt: skip
    metrics = loop.train(config)
    (tmp_path / "metrics.json").unlink()
    for path in (tmp_path / "checkpoints" / "step_00000012").iterdir():
        path.unlink()
    with pytest.warns(UserWarning, match="step_00000012 is broken"):
        again = loop.train(config, resume=True)
    assert again.evaluation == pytest.approx(metrics.evaluation, rel=1e-3)


def test_a_batch_that_asks_for_nothing():
    """Costs nothing, and does not end the run."""
    config = replace(SMALL, device="cpu")
    config, model = loop._prepare(config)
    update = Step(model.train(), make_optimizer(model, config.optim), config, torch.device("cpu"))
    batch = config.task.batch(4, 0, 0, "train")
    assert update(batch._replace(targets=torch.full_like(batch.targets, IGNORE)), 1e-3).tolist() == [0, 0, 0]


@pytest.mark.parametrize("options", [{"chunk": 7}, {"chunk": 7, "micro_batch_size": 2}])
def test_a_step_in_chunks(options):
    """Makes the update of the step that it divides."""
    numbers, weights = [], []
    for config in (SMALL, replace(SMALL, **options)):
        config, model = loop._prepare(replace(config, device="cpu"))
        update = Step(model.train(), make_optimizer(model, config.optim), config, torch.device("cpu"))
        numbers.append([update(config.task.batch(4, 0, i, "train"), 1e-3) for i in range(3)])
        weights.append(list(model.parameters()))
    torch.testing.assert_close(*numbers, rtol=1e-4, atol=1e-5)
    # Adam divides tiny gradients by their size.
    for one, other in zip(*weights, strict=True):
        assert (one - other).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1"),
        ({"chunk": 8, "cuda_graph": True}, "cuda_graph must be false with chunk"),
        ({"chunk": 8, "compile": True}, "compile must be false with chunk"),
        ({"chunk": 8, "gradient_checkpointing": True}, "gradient_checkpointing must be false with chunk"),
        ({"truncate": True}, "truncate must be false without chunk"),
    ],
)
def test_refused_chunks(options, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **options)


def test_a_model_that_cannot_carry_a_state_is_refused():
    model = ModelConfig(mixers="hydra", layers=2, hidden_size=32, mixer_options={"hydra": {"headdim": 16}})
    with pytest.raises(UsageError, match="not causal"):
        loop._prepare(replace(SMALL, model=model, chunk=8))


def test_recomputing_reads_no_random_state(monkeypatch):
    """Which a graph of some versions of PyTorch cannot record."""
    config = replace(SMALL, device="cpu", gradient_checkpointing=True)
    config, model = loop._prepare(config)
    update = Step(model.train(), make_optimizer(model, config.optim), config, torch.device("cpu"))
    batch = config.task.batch(4, 0, 0, "train")
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("was read"))
    assert update(batch, 1e-3).isfinite().all()
