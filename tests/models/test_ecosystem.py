"""Trainer, PEFT, gradient checkpointing, torch.compile and torch.export on a model."""

import peft
import pytest
import torch
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from ssmscan.models import SSMForCausalLM, load_pretrained
from ssmscan.models.modeling import CACHE

# transformers 5.24 has new names for gradient checkpointing, and PEFT asks by the old ones.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*is deprecated:FutureWarning")


def _gradients(model, tokens):
    model.zero_grad()
    loss = model(tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(model, tokens, reentrant):
    """The same bits, from less memory."""
    model.train()
    loss, expected = _gradients(model, tokens)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # So that the embeddings, which come first, have a gradient to hand on.
        model.enable_input_require_grads()
    calls = []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    again, gradients = _gradients(model, tokens)
    assert len(calls) == 2
    assert torch.equal(again, loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


def test_a_cache_under_gradient_checkpointing(small_model, tokens):
    """Generating is well, for nothing is recomputed; training on a state is not."""
    model = small_model("mamba").train()
    expected = model.generate(tokens, max_new_tokens=3, do_sample=False)
    model.gradient_checkpointing_enable()
    assert torch.equal(model.generate(tokens, max_new_tokens=3, do_sample=False), expected)
    for keywords, got in (({"use_cache": True}, "use_cache=True"), ({"cache": model.make_cache(2)}, "SSMCache")):
        with pytest.raises(RuntimeError, match=f"cache must be None under gradient checkpointing, got {got}"):
            model(tokens, **keywords)


def _train(model, folder, data, settings=(), **arguments):
    """The losses of twelve steps of transformers' Trainer."""
    fixed = {"max_steps": 12, "per_device_train_batch_size": 4, "learning_rate": 3e-2, "logging_steps": 1, "seed": 0}
    quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "use_cpu": True}
    settings = TrainingArguments(output_dir=str(folder), **(fixed | quiet | dict(settings)))
    trainer = Trainer(model=model, args=settings, train_dataset=data, **arguments)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def _rows(tokens):
    return [{"input_ids": row, "labels": row} for row in tokens.repeat(8, 1)]


@pytest.mark.parametrize("settings", [{}, {"bf16": True, "gradient_checkpointing": True}], ids=str)
def test_trainer(small_config, tokens, tmp_path, settings):
    torch.manual_seed(0)
    model = SSMForCausalLM(small_config(("mamba2", "attention")))
    losses = _train(model, tmp_path, _rows(tokens), settings)
    assert losses[-1] < 0.8 * losses[0]
    # Trainer leaves config.use_cache False; generate caches all the same.
    said = model.eval().generate(tokens, max_new_tokens=2, do_sample=False)
    assert torch.equal(said, model.generate(tokens, max_new_tokens=2, do_sample=False, use_cache=False))


def test_trainer_accumulates_exactly(small_config, tmp_path):
    """Over batches with different numbers of labels, the loss is that of all of them together."""
    rows = [{"input_ids": torch.arange(1, 8), "labels": torch.arange(1, 8)} for _ in range(4)]
    for i, row in enumerate(rows):
        row["labels"] = row["labels"].masked_fill(torch.arange(7) <= i, -100)
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        torch.manual_seed(0)
        model = SSMForCausalLM(small_config(("mamba",)))
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        losses.append(_train(model, tmp_path, rows, settings))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_trainer_packs(small_config, tokens, tmp_path):
    """transformers' collator of packed sequences: the same losses as from a batch of rows."""
    losses = []
    for arguments in ({}, {"data_collator": DataCollatorWithFlattening(return_flash_attn_kwargs=True)}):
        torch.manual_seed(0)
        model = SSMForCausalLM(small_config(("mamba2", "attention")))
        losses.append(_train(model, tmp_path, _rows(tokens), {"max_steps": 3}, **arguments))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def _adapt(model, targets):
    config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


@pytest.mark.parametrize(
    ("shape", "projection"),
    [
        ("mamba", "in_proj"),
        ("mamba", "x_proj"),
        ("mamba", "dt_proj"),
        ("mamba", "out_proj"),
        ("mamba2", "in_proj"),
        ("mamba2", "out_proj"),
        (("attention",), "in_proj"),
        (("attention",), "out_proj"),
    ],
)
def test_an_adapter_is_never_passed_by(small_model, tokens, shape, projection):
    """On every projection it changes the logits, of a chunk as of a step."""
    model = small_model(shape)
    plain = model(tokens, use_cache=False).logits.detach()
    adapted = _adapt(model, [projection]).eval()
    logits = adapted(tokens, use_cache=False).logits
    assert (logits - plain).abs().max() > 1e-3
    cache = model.make_cache(2)
    with torch.no_grad():
        steps = torch.cat([adapted(tokens[:, t : t + 1], cache=cache).logits for t in range(9)], 1)
    torch.testing.assert_close(steps, logits.detach(), rtol=0, atol=1e-5)


def test_adapters_train_save_and_merge(small_model, tokens, tmp_path):
    def base():
        return small_model("hybrid", intermediate_size=8)

    adapted = _adapt(base(), "all-linear")
    losses = _train(adapted, tmp_path / "run", _rows(tokens))
    assert losses[-1] < losses[0]
    adapted.eval().save_pretrained(tmp_path / "adapter")
    reloaded = peft.PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    said = adapted.generate(input_ids=tokens, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        logits = adapted(tokens, use_cache=False).logits
        assert torch.equal(reloaded(tokens, use_cache=False).logits, logits)
        merged = reloaded.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, logits, rtol=0, atol=1e-4)
        assert torch.equal(merged.generate(tokens, max_new_tokens=3, do_sample=False), said)
        merged.save_pretrained(tmp_path / "merged")
        assert torch.equal(load_pretrained(tmp_path / "merged")(tokens).logits, merged(tokens).logits)


def test_compile(small_model, tokens):
    """Without a break: the forward of a training step, for any length, and a decode step."""
    torch._dynamo.reset()
    model = small_model("hybrid")
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    for length in (9, 5):
        loss = compiled(tokens[:, :length], labels=tokens[:, :length], use_cache=False).loss
        torch.testing.assert_close(loss, model(tokens[:, :length], labels=tokens[:, :length]).loss)
    with torch.no_grad():
        whole = model(tokens).logits
        outputs = model(tokens[:, :7])
        cache = getattr(outputs, CACHE)
        steps = [compiled(tokens[:, t : t + 1], cache=cache).logits for t in (7, 8)]
    torch.testing.assert_close(torch.cat([outputs.logits, *steps], 1), whole, rtol=0, atol=1e-5)


def test_export(small_model, tokens):
    model = small_model("mamba2")
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        model, (tokens,), {"use_cache": False}, dynamic_shapes={"input_ids": {1: length}, "use_cache": None}
    )
    for part in (tokens, tokens[:, :4]):
        torch.testing.assert_close(program.module()(part, use_cache=False).logits, model(part).logits)
