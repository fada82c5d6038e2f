"""OutputProcessor against Megatron's own cross-entropy of the same GPTModel, and what it refuses of a foreign model."""

import copy
import functools

import pytest
import torch
from launching import run_ranks

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

VOCAB, LENGTH, WIDTH = 96, 16, 32
# Kinds of models whose loss and gradients have to be Megatron's own: GPTModel's and the config's keywords.
MODELS = {
    "untied": ({}, {}),
    "mup": ({}, dict(use_mup=True, mup_output_mult=0.3)),
    "mup by its width": ({}, dict(use_mup=True, mup_base_hidden_size=8)),
    "mup, tied": (dict(share_embeddings_and_output_weights=True), dict(use_mup=True, mup_output_mult=0.3)),
    "gathered": (dict(parallel_output=False), dict(use_mup=True, mup_output_mult=3.0)),
}


def build(keywords, config):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2, hidden_size=WIDTH, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, tensor_model_parallel_size=get_tensor_model_parallel_world_size(), **config,
    )  # fmt: skip
    torch.manual_seed(5)
    spec = get_gpt_layer_local_spec()
    if config.mtp_num_layers:
        keywords = {"mtp_block_spec": get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False)}
    model = GPTModel(config, spec, VOCAB, LENGTH, position_embedding_type="rope", **keywords)
    with torch.no_grad():
        # Logits of size 1 and more, so that a scale is seen.
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
    return model


def gradients(model, **keywords):
    """Loss of each token and gradients of the masked mean."""
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB, (2, LENGTH + 1), generator=draw)
    mask = (torch.rand(2, LENGTH, generator=draw) < 0.7).float()
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    model.zero_grad()
    losses = model(tokens[:, :-1], positions, None, labels=tokens[:, 1:], loss_mask=mask, **keywords) * mask
    (losses.sum() / mask.sum()).backward()
    return losses.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def differences(tensor_parallel):
    """Model, chunk size -> largest error of the loss and of a gradient next to Megatron's own, and its mean loss."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from qtarget_megatron.megatron.output_processor import OutputProcessor

    parallel_state.initialize_model_parallel(tensor_parallel)
    model_parallel_cuda_manual_seed(1)
    found = {}
    for name, (keywords, config) in MODELS.items():
        model = build(keywords, config)
        own = None if name == "gathered" and tensor_parallel > 1 else gradients(model)
        if own is None:  # Megatron's own loss takes shards
            own = gradients(build({}, config))
        for chunk_size in (5, None):
            loss, grads = gradients(
                model, output_processor=OutputProcessor("sft", vocab_size=VOCAB, chunk_size=chunk_size)
            )
            worst = max((grads[key] - own[1][key]).abs().max().item() for key in own[1])
            found[name, chunk_size] = (loss - own[0]).abs().max().item(), worst, own[0].mean().item()
    plain = gradients(build({}, {}))[0]
    scaled = gradients(build({}, dict(use_mup=True, mup_output_mult=0.3)))[0]
    return found, (plain - scaled).abs().max().item()


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients_are_megatrons_own(ranks):
    for found, apart in run_ranks(ranks, differences, (ranks,), megatron=True):
        assert apart > 0.1  # the scale of the logits matters here
        for (name, chunk_size), (loss, gradient, _) in found.items():
            # Logits are sums of 32 float32 products of size 1; gradients are means of them.
            assert loss < 2e-5 and gradient < 2e-5, (name, chunk_size, loss, gradient)


def refusals():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from qtarget_megatron.megatron.output_processor import OutputProcessor

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)

    class Adapted(ColumnParallelLinear):
        def forward(self, *args, **keywords):
            output, bias = super().forward(*args, **keywords)
            return 2 * output, bias

    def adapt(model):
        model.output_layer.__class__ = Adapted

    def wrap(model):
        model.output_layer = torch.nn.Sequential(model.output_layer)

    def cap(model):
        model._scale_logits = lambda logits: 3 * torch.tanh(logits / 3)

    def invert(model):
        model._scale_logits = lambda logits: -logits

    def bias(model):
        model.output_layer.bias = torch.nn.Parameter(torch.ones(VOCAB))

    def heads(model):
        pass

    def defer(model):
        # Megatron's local layers would fail under it.
        model.output_layer.config = copy.copy(model.config)
        model.output_layer.config.defer_embedding_wgrad_compute = True

    def shard(model):
        model.output_layer.weight.__fsdp_param__ = True

    found = {}
    for change in (adapt, wrap, cap, invert, bias, heads, defer, shard):
        found[change.__name__] = []
        for chunk_size in (512, None):
            model = build({}, {"mtp_num_layers": 1} if change is heads else {})
            change(model)
            process = OutputProcessor("sft", vocab_size=VOCAB, chunk_size=chunk_size)
            run = functools.partial(gradients, model, output_processor=process)
            own = functools.partial(gradients, model)
            found[change.__name__].append(outcome(run, own, change in (adapt, cap)))
    return found


def outcome(run, own, is_compared):
    """The message of a refusal, or how far loss and gradients are from Megatron's own."""
    try:
        loss, grads = run()
    except (ValueError, AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    if not is_compared:
        return None
    expected, expected_grads = own()
    errors = [(grads[key] - expected_grads[key]).abs().max().item() for key in grads]
    return max((loss - expected).abs().max().item(), *errors)


def test_a_head_that_cannot_be_served_is_refused():
    (found,) = run_ranks(1, refusals, megatron=True)
    expected = {
        "adapt": "expected an output layer that is Megatron's ColumnParallelLinear without bias, got Adapted",
        "wrap": "expected an output layer that is Megatron's ColumnParallelLinear without bias, got Sequential",
        "cap": "expected a model whose logits are multiplied by one number above 0",
        "invert": "expected a model whose logits are multiplied by one number above 0",
        "bias": "without bias, got ColumnParallelLinear",
        "heads": "mtp_num_layers 1: Megatron trains these heads with its own cross-entropy",
        "defer": "defer_embedding_wgrad_compute is set",
        "shard": "the output layer's weight is sharded by FSDP",
    }
    for name, message in expected.items():
        chunked = found[name][0]
        assert chunked.startswith("ValueError: ") and message in chunked and "\n" not in chunked, (name, chunked)
    assert expected["heads"] in found["heads"][1]
    # Megatron's own layer makes these logits, whatever it does to them.
    assert found["adapt"][1] < 2e-5 and found["cap"][1] < 2e-5, found
