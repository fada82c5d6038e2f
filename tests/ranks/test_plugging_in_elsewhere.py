"""The examples for TRL, ms-swift, verl and NeMo-RL. TRL is installed; of the others, stand-ins for what is touched."""

import enum
import importlib
import sys
import types

import pytest
import torch
import transformers
from finetune_runs import write_models
from launching import run_ranks

from examples.plugging_in.trl_trainer import loss_func

VOCABULARY = 317


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    write_models(folder)
    return folder


def load(folder, name="untied"):
    return transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)


def rows():
    draw = torch.Generator().manual_seed(3)
    found = []
    for length in (9, 12, 7, 12, 5, 10, 8, 11):
        ids = torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        found.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return found


def trained(folder, tmp_path, trainer, model, **options):
    """Losses of each step, and the model's weights, of four steps of two accumulated micro-batches."""
    import datasets
    import trl

    settings = dict(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        seed=1,
        save_strategy="no",
    )
    data = datasets.Dataset.from_list(rows())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "untied")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    if trainer == "sft":
        args = trl.SFTConfig(**settings, max_length=None, shuffle_dataset=False, bf16=False)
        found = trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, **options)
    else:
        pad = transformers.DataCollatorForSeq2Seq(tokenizer)
        args = transformers.TrainingArguments(**settings)
        found = transformers.Trainer(model, args, train_dataset=data, data_collator=pad, **options)
    found.train()
    losses = [entry["loss"] for entry in found.state.log_history if "loss" in entry]
    return losses, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("trainer", ["sft", "transformers"])
def test_sft_in_a_trainer_is_the_trainers_own_loss(workspace, tmp_path, trainer):
    own, weights = trained(workspace, tmp_path, trainer, load(workspace))
    ours, found = trained(workspace, tmp_path, trainer, load(workspace), compute_loss_func=loss_func("sft"))
    assert len(own) == 4 and ours == pytest.approx(own, rel=2e-4)  # logged with four digits
    start = dict(load(workspace).named_parameters())
    for name, weight in weights.items():
        assert (found[name] - weight).norm() <= 1e-3 * (weight - start[name]).norm() + 1e-9, name


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_teacher_in_a_trainer(workspace, tmp_path):
    """Its first loss, of a batch that is known, is the definition's."""
    model, teacher = load(workspace), load(workspace, "teacher")
    loss = loss_func("hybrid-kd", "lam=0.4", teacher=teacher, model=model)
    batch = [row for row in rows() if len(row["input_ids"]) == 12]
    ids = torch.tensor([row["input_ids"] for row in batch])
    labels = torch.tensor([row["labels"] for row in batch])
    got = loss(model(input_ids=ids), labels)
    log_p = torch.log_softmax(model(input_ids=ids).logits[:, :-1].double(), -1)
    log_t = torch.log_softmax(teacher(input_ids=ids).logits[:, :-1].double(), -1)
    kept, following = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
    own = -log_p.gather(-1, following[..., None])[..., 0]
    divergence = (log_t.exp() * (log_t - log_p)).sum(-1)
    expected = (0.6 * own + 0.4 * divergence)[kept].mean()
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    losses, _ = trained(workspace, tmp_path, "transformers", model, compute_loss_func=loss)
    assert losses[-1] < losses[0]
    for wrong, said in ((("kd",), "give teacher and model"), (("cft",), "reads more of a batch")):
        with pytest.raises(ValueError, match=said):
            loss_func(*wrong)


# ---- packages of which a part stands in


def stand_in(monkeypatch, **modules):
    """Modules by their names, with __ for the dots."""
    for name, content in modules.items():
        path = name.replace("__", ".")
        for end in range(1, path.count(".") + 2):
            part = ".".join(path.split(".")[:end])
            if part not in sys.modules:
                monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
                parent, _, leaf = part.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], leaf, sys.modules[part])
        vars(sys.modules[path]).update(content)


def fresh(monkeypatch, name):
    monkeypatch.delitem(sys.modules, f"examples.plugging_in.{name}", raising=False)
    return importlib.import_module(f"examples.plugging_in.{name}")


def batch():
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 6, 50, generator=draw)
    ids = torch.randint(50, (2, 6), generator=draw)
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0, 1], [1, 0, 0, 1, 0, 0]]) == 1, -100)
    return logits, ids, labels


def dft_of(logits, labels):
    """-sg(p) log p of each place, 0 where the next token is none."""
    following = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    log_p = torch.log_softmax(logits.double(), -1).gather(-1, following.clamp(min=0)[..., None])[..., 0]
    return torch.where(following == -100, 0.0, -log_p.detach().exp() * log_p)


def test_ms_swift(monkeypatch):
    """swift.loss as of 4.6.0: a map of classes, each made with arguments and trainer."""

    class BaseLoss:
        def __init__(self, args, trainer):
            self.trainer, self.is_megatron = trainer, False

    losses = {}
    stand_in(monkeypatch, swift__loss=dict(BaseLoss=BaseLoss, loss_map=losses))
    fresh(monkeypatch, "ms_swift_plugin")
    monkeypatch.setenv("QTARGET_OBJECTIVE", "dft")
    trainer = types.SimpleNamespace(template=types.SimpleNamespace(sequence_parallel_size=1))
    logits, _, labels = batch()
    output = types.SimpleNamespace(logits=logits.requires_grad_())
    loss = losses["qtarget"](None, trainer)
    expected = dft_of(logits, labels)
    assert loss(output, labels).item() == pytest.approx(
        (expected.sum() / (labels[:, 1:] != -100).sum()).item(), rel=1e-5
    )
    assert loss(output, labels, num_items_in_batch=7).item() == pytest.approx((expected.sum() / 7).item(), rel=1e-5)
    scale = torch.rand(2, 6)
    weighted = (expected[:, :-1] * scale[:, 1:]).sum() / 7
    got = loss(output, labels, num_items_in_batch=7, loss_scale=scale)
    assert got.item() == pytest.approx(weighted.item(), rel=1e-5)
    monkeypatch.setenv("QTARGET_OBJECTIVE", "kd")
    with pytest.raises(ValueError, match="reads more than logits and labels"):
        losses["qtarget"](None, trainer)


def test_nemo_rl(monkeypatch):
    """nemo_rl.algorithms.loss.interfaces: two enumerations; data as its SFT gives it."""
    kinds = dict(
        LossType=enum.Enum("LossType", "TOKEN_LEVEL"), LossInputType=enum.Enum("LossInputType", "LOGIT LOGPROB")
    )
    stand_in(monkeypatch, nemo_rl__algorithms__loss__interfaces=kinds)
    made = fresh(monkeypatch, "nemo_rl_loss").TargetLossFn("dft")
    assert made.input_type.name == "LOGIT" and made.loss_type.name == "TOKEN_LEVEL"
    logits, ids, labels = batch()
    data = {"input_ids": ids, "token_mask": (labels != -100).long(), "sample_mask": torch.tensor([1, 0])}
    loss, metrics = made(data, torch.tensor(1), torch.tensor(9), logits=logits.requires_grad_())
    expected = dft_of(logits, labels)[0].sum() / 9
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5) and metrics["loss"] == loss.item()
    assert metrics["num_unmasked_tokens"] == int((labels[0, 1:] != -100).sum())
    (got,) = torch.autograd.grad(loss, logits)
    (want,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-7)


def test_verl(monkeypatch):
    """Engines of 0.9.1, whose modules hold what they compute log-probabilities with; and its SFT loss over them."""
    stand_in(
        monkeypatch,
        verl__workers__engine__fsdp__transformer_impl=dict(logprobs_from_logits=None),
        verl__workers__engine__megatron__transformer_impl=dict(vocab_parallel_log_probs_from_logits=None),
    )
    example = fresh(monkeypatch, "verl_sft")
    example.install("dft")
    engine = sys.modules["verl.workers.engine.fsdp.transformer_impl"]
    logits, ids, _ = batch()
    log_probs = engine.logprobs_from_logits(logits=logits[0], labels=ids[0].roll(-1), inplace_backward=True)
    expected = dft_of(logits, torch.cat([ids, ids[:, :1]], dim=1)[:, : ids.shape[1]])
    assert torch.allclose(log_probs[:-1].double(), -expected[0, :-1], rtol=1e-5)
    assert sys.modules["verl.workers.engine.megatron.transformer_impl"].vocab_parallel_log_probs_from_logits is not None
    with pytest.raises(ValueError, match="reads more than logits and labels"):
        example.install("iw-sft")


def sharded_log_probs(logits, labels):
    """On two ranks of Megatron's tensor-parallel group."""
    from megatron.core import parallel_state

    from examples.plugging_in.verl_sft import minus_loss
    from qtarget_megatron import objectives

    parallel_state.initialize_model_parallel(2)
    rank = parallel_state.get_tensor_model_parallel_rank()
    shard = logits[..., rank * 25 : (rank + 1) * 25].clone().requires_grad_()
    found = minus_loss(objectives.dft(), sharded=True)(shard, labels)
    return found.tolist(), torch.autograd.grad(found.sum(), shard)[0].tolist()


@pytest.mark.distributed
@pytest.mark.timeout(120)
def test_verls_megatron_engine_keeps_its_shards():
    logits, ids, _ = batch()
    leaf = logits.clone().requires_grad_()
    log_p = torch.log_softmax(leaf, -1).gather(-1, ids[..., None])[..., 0]
    expected = log_p.detach().exp() * log_p
    (gradient,) = torch.autograd.grad(expected.sum(), leaf)
    results = run_ranks(2, sharded_log_probs, (logits, ids), timeout=100, megatron=True)
    for rank, (found, own) in enumerate(results):
        found, own = torch.tensor(found), torch.tensor(own)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(own, gradient[..., rank * 25 : (rank + 1) * 25], rtol=1e-4, atol=1e-7)
