"""An attached objective: against Megatron's own cross-entropy, against the definition in float64, and refusals."""

import copy
import dataclasses
import functools

import pytest
import torch
from launching import run_ranks
from loss_definitions import target_sft

from qtarget_megatron import Objective, SparseTeacher

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(200)]

VOCAB, LENGTH, WIDTH, IGNORED = 96, 16, 32, -100
FREQUENT = [0, 1, 50, 51]  # on either of two shards
TIED = dict(share_embeddings_and_output_weights=True)
MUP = dict(use_mup=True, mup_output_mult=0.3)
HEADS = dict(mtp_num_layers=2, mtp_loss_scaling_factor=0.7)
# Kinds of models whose loss and gradients have to be Megatron's own: the model's and the config's keywords.
MODELS = {
    "untied": ({}, {}),
    "untied, no sequence parallelism": ({}, dict(sequence_parallel=False)),
    "tied": (TIED, {}),
    "mup": ({}, MUP),
    "mup by its width, tied": (TIED, dict(use_mup=True, mup_base_hidden_size=8)),
    "gathered": (dict(parallel_output=False), dict(use_mup=True, mup_output_mult=3.0)),
    "heads": ({}, HEADS | dict(calculate_per_token_loss=True)),
    "heads, no sequence parallelism": ({}, HEADS | dict(sequence_parallel=False)),
    "heads, tied, mup": (TIED, HEADS | MUP),
    "heads, detached": ({}, HEADS | dict(mtp_detach_heads=True)),
    "hybrid": ({}, {}),
    "hybrid, tied": (TIED, {}),
    "hybrid, heads": ({}, HEADS),
}


def weighted_target_sft():
    """weight times Target-SFT: a residual of both models, a second model, and a side input."""

    def evaluate(stats, inputs):
        return None, inputs["weight"] * stats.p, (inputs["weight"] * (1 - stats.p),)

    return Objective(evaluate, residuals=((0.7, 0.3),), token_inputs=("weight",))


def build(name, post=True, **more):
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    from qtarget_megatron.megatron.model.build import RMSNorm

    keywords, config = MODELS[name]
    ranks = get_tensor_model_parallel_world_size()
    config = dict(
        num_layers=2, hidden_size=WIDTH, num_attention_heads=4, use_cpu_initialization=True, hidden_dropout=0.0,
        attention_dropout=0.0, bias_dropout_fusion=False, masked_softmax_fusion=False,
        gradient_accumulation_fusion=False, tensor_model_parallel_size=ranks, sequence_parallel=ranks > 1,
    ) | config | more  # fmt: skip
    torch.manual_seed(5)
    if name.startswith("hybrid"):
        config = TransformerConfig(**config | dict(num_layers=4))
        keywords = keywords | dict(hybrid_layer_pattern="*-*-/*-/*-" if config.mtp_num_layers else "*-*-")
        model = HybridModel(config, hybrid_spec(), VOCAB, LENGTH, position_embedding_type="rope", **keywords)
    else:
        config = TransformerConfig(**config)
        block = TransformerBlockSubmodules(layer_specs=[layer_spec()] * 2, layer_norm=RMSNorm)
        if config.mtp_num_layers:
            keywords = keywords | dict(mtp_block_spec=heads_spec(layer_spec(), config.mtp_num_layers))
        keywords = keywords | dict(position_embedding_type="rope", post_process=post)
        model = GPTModel(config, block, VOCAB, LENGTH, **keywords)
    with torch.no_grad():
        # Logits of size 1 and more, so that a scale is seen.
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.dim() > 1 else 1)
        tied = model.share_embeddings_and_output_weights
        rows = model.shared_embedding_or_output_weight() if tied or not post else model.output_layer.weight
        first = torch.distributed.get_rank() % ranks * len(rows)
        for token in FREQUENT:
            if first <= token < first + len(rows):
                rows[token - first].mul_(4)
    return model


def layer_spec():
    """Megatron's local layer with a norm that knows sequence parallelism."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from qtarget_megatron.megatron.model.build import RMSNorm

    spec = get_gpt_layer_local_spec()
    parts = dataclasses.replace(spec.submodules, input_layernorm=RMSNorm, pre_mlp_layernorm=RMSNorm)
    return dataclasses.replace(spec, submodules=parts)


def heads_spec(inner, count):
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer import multi_token_prediction as mtp
    from megatron.core.transformer.spec_utils import ModuleSpec

    from qtarget_megatron.megatron.model.build import RMSNorm

    parts = mtp.MultiTokenPredictionLayerSubmodules(
        enorm=RMSNorm, hnorm=RMSNorm, layer_norm=RMSNorm, eh_proj=ColumnParallelLinear, mtp_model_layer=inner
    )
    layers = [ModuleSpec(module=mtp.MultiTokenPredictionLayer, submodules=parts)] * count
    return ModuleSpec(
        module=mtp.MultiTokenPredictionBlock,
        submodules=mtp.MultiTokenPredictionBlockSubmodules(layer_specs=layers),
    )


def hybrid_spec():
    """A HybridModel's stack of local layers: attention without MLP, and MLP without attention."""
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

    from qtarget_megatron.megatron.model.build import RMSNorm

    class Stack(HybridStack):
        """Its last norm is Transformer Engine's otherwise."""

        def __init__(self, config, submodules, *, post_process, **keywords):
            super().__init__(config, submodules, post_process=post_process, post_layer_norm=False, **keywords)
            self.post_layer_norm = True
            self.final_norm = RMSNorm(config, config.hidden_size)

    whole = layer_spec().submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=RMSNorm, self_attention=whole.self_attention, self_attn_bda=whole.self_attn_bda
    )
    mlp = TransformerLayerSubmodules(pre_mlp_layernorm=RMSNorm, mlp=whole.mlp, mlp_bda=whole.mlp_bda)
    parts = HybridStackSubmodules(
        attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
        mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        mtp_block_spec=heads_spec(None, 2),
    )
    return ModuleSpec(module=Stack, submodules=parts)


def micro_batch():
    """Tokens, labels, mask, weights [b, s], and logits of a second model [b, s, V].

    A few labels are frequent, and likely as well, so that the most likely token is the label now and then.
    """
    draw = torch.Generator().manual_seed(1)
    frequent = torch.tensor(FREQUENT)[torch.randint(4, (2, LENGTH + 1), generator=draw)]
    tokens = torch.where(torch.rand(2, LENGTH + 1, generator=draw) < 0.6, frequent, torch.arange(34).view(2, 17))
    mask = (torch.rand(2, LENGTH, generator=draw) < 0.7).float()
    weights = torch.rand(2, LENGTH, generator=draw) + 0.5
    return tokens[:, :-1], tokens[:, 1:], mask, weights, torch.randn(2, LENGTH, VOCAB, generator=draw)


def gradients(model):
    """Loss of each token, gradients of the masked mean, and how often heads are right by Megatron's count."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    tokens, labels, mask, _, _ = micro_batch()
    MTPLossLoggingHelper.tracker.clear()
    model.zero_grad()
    positions = torch.arange(LENGTH).expand(2, LENGTH)
    losses = model(tokens, positions, causal_mask(), labels=labels, loss_mask=mask) * mask
    (losses.sum() / mask.sum()).backward()
    right = MTPLossLoggingHelper.tracker.get("correct_values", torch.zeros(0)).tolist()
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}
    return losses.detach(), found, right


def causal_mask():
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)[None, None]


def defined(model, found):
    """Gradients of Megatron's model whose loss is the definition, of whole logits in float64; p(y) of each head.

    found: gets p(y) [b, s] of the head of each number of tokens further on.
    """
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    _, given, mask, weights, teacher = micro_batch()

    def loss(labels, logits):
        ahead = 0 if labels is given_to_model else len(found) + 1
        if logits.shape[-1] < VOCAB:
            logits = gather_from_tensor_model_parallel_region(logits)
        last = LENGTH - ahead
        z, t = logits.transpose(0, 1).double()[:, :last], teacher.double()[:, ahead:]
        y, w = given[:, ahead:], weights.double()[:, ahead:]
        assert torch.equal(labels[:, :last], y)
        row = target_sft(0.3)(*(x.flatten(0, 1) for x in (z, y, t)), None).view_as(y) * w
        found[ahead] = z.detach().softmax(-1).gather(-1, y[..., None])[..., 0]
        return torch.nn.functional.pad(row, (0, ahead)).float()

    given_to_model = None

    def remember(module, args, keywords):
        nonlocal given_to_model
        given_to_model = keywords["labels"]

    model.register_forward_pre_hook(remember, with_kwargs=True)
    model.compute_language_model_loss = loss
    return gradients(model)


def worst(one, other):
    """The largest error of a gradient, next to the largest gradient."""
    largest = max(gradient.abs().max().item() for gradient in other.values())
    return max((one[name] - other[name]).abs().max().item() for name in other) / largest


def differences(tensor_parallel):
    """Each model's largest errors of losses and gradients, and what its heads know of themselves."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from qtarget_megatron.megatron.attach import attach

    parallel_state.initialize_model_parallel(tensor_parallel)
    model_parallel_cuda_manual_seed(1)
    _, _, mask, weights, teacher = micro_batch()
    kept = SparseTeacher(
        torch.arange(VOCAB).expand_as(teacher).clone(), teacher.log_softmax(-1), torch.zeros_like(mask), "uniform"
    )
    found = {}
    for name in MODELS:
        if tensor_parallel == 1 and name.endswith("no sequence parallelism"):
            continue
        # Megatron's own loss takes shards.
        reference = "untied" if name == "gathered" and tensor_parallel > 1 else name
        scale = dict(use_mup=True, mup_output_mult=3.0) if name == "gathered" else {}
        own_loss, own_gradients, own_right = gradients(build(reference, **scale))
        model, by_definition, p = build(name), build(name), {}
        expected = defined(by_definition, p)
        for chunk_size in (5, None):
            attach(model, "sft", vocab_size=VOCAB, chunk_size=chunk_size)
            loss, grads, right = gradients(model)
            qtarget = attach(model, weighted_target_sft(), vocab_size=VOCAB, chunk_size=chunk_size, second_model=True)
            with qtarget.inputs({"weight": weights}, sparse_teacher=kept):
                other_loss, other_grads, _ = gradients(model)
            errors = [(loss - own_loss).abs().max().item(), worst(grads, own_gradients)]
            errors += [(other_loss - expected[0]).abs().max().item(), worst(other_grads, expected[1])]
            heads = [head_error(ahead, head, p[ahead]) for ahead, head in enumerate(qtarget.heads)]
            found[name, chunk_size] = errors, heads, (right, own_right), own_loss.mean().item()
    return found


def head_error(ahead, head, p):
    """Error of p(y) at the tokens that are supervised; those have to be the labels that are left so far on."""
    _, labels, mask, weights, _ = micro_batch()
    supervised = torch.nn.functional.pad(mask[:, ahead:] == 1, (0, ahead))
    assert torch.equal(head.statistics.supervised.t(), supervised)
    assert torch.equal(head.labels[supervised], labels[:, ahead:][mask[:, ahead:] == 1])
    last = LENGTH - ahead
    assert torch.equal(head.token_inputs["weight"][:, :last], weights[:, ahead:])
    return (head.statistics.p.t()[:, :last] - p)[supervised[:, :last]].abs().max().item()


@pytest.mark.parametrize("ranks", [1, 2])
def test_losses_and_gradients_are_megatrons_own_and_the_definitions(ranks):
    for found in run_ranks(ranks, differences, (ranks,), megatron=True):
        means = {name: mean for (name, _), (*_, mean) in found.items()}
        assert abs(means["mup"] - means["untied"]) > 0.1  # the scale of the logits matters here
        for (name, chunk_size), (errors, heads, (right, expected), _) in found.items():
            # Logits are sums of 32 float32 products of size 1 and more; gradients are sums over tokens of as many.
            assert max(errors[::2]) < 2e-5 and max(errors[1::2]) < 5e-6, (name, chunk_size, errors)
            assert len(heads) == (3 if "heads" in name else 1) and max(heads) < 1e-5, (name, chunk_size, heads)
            assert right == expected and (not right or sum(right) > 0), (name, chunk_size, right, expected)


def refusals():
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from qtarget_megatron.megatron.attach import attach

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

    def defer(model):
        # Megatron's local layers would fail under it.
        model.output_layer.config = copy.copy(model.config)
        model.output_layer.config.defer_embedding_wgrad_compute = True

    def shard(model):
        model.output_layer.weight.__fsdp_param__ = True

    def shard_again(model):
        model.output_layer.gtp_remat_size = 2

    found = {}
    for change in (adapt, wrap, cap, invert, bias, defer, shard, shard_again):
        found[change.__name__] = []
        for chunk_size in (512, None):
            model = build("untied")
            change(model)
            own = gradients(model) if change in (adapt, cap) else None
            try:
                attach(model, "sft", vocab_size=VOCAB, chunk_size=chunk_size)
            except ValueError as error:
                found[change.__name__].append(str(error))
                continue
            found[change.__name__].append(own and largest_difference(gradients(model), own))
    # What is changed afterwards is seen by the next forward.
    model = build("untied")
    attach(model, "sft", vocab_size=VOCAB)
    shard(model)
    found["late"] = [message(gradients, model)]
    return found


def largest_difference(one, other):
    return max((one[0] - other[0]).abs().max().item(), worst(one[1], other[1]))


def message(function, *args, **keywords):
    try:
        function(*args, **keywords)
    except ValueError as error:
        return str(error)


def test_a_head_that_cannot_be_served_is_refused():
    (found,) = run_ranks(1, refusals, megatron=True)
    expected = {
        "adapt": "expected an output layer that is Megatron's ColumnParallelLinear without bias, got Adapted",
        "wrap": "expected an output layer that is Megatron's ColumnParallelLinear without bias, got Sequential",
        "cap": "expected a model whose logits are multiplied by one number above 0",
        "invert": "expected a model whose logits are multiplied by one number above 0",
        "bias": "without bias, got ColumnParallelLinear",
        "defer": "defer_embedding_wgrad_compute is set",
        "shard": "the output layer's weight is sharded by FSDP",
        "shard_again": "sharded once more (gtp_remat)",
        "late": "the output layer's weight is sharded by FSDP",
    }
    assert found.keys() == expected.keys()
    for name, text in expected.items():
        chunked = found[name][0]
        assert text in chunked and "\n" not in chunked, (name, chunked)
    # Megatron's own layer makes these logits, whatever it does to them.
    assert found["adapt"][1] < 2e-5 and found["cap"][1] < 2e-5, found


def behaviour():
    """What each check found, by its name."""
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.module import Float16Module

    from qtarget_megatron import objectives
    from qtarget_megatron.megatron.attach import DeferredLogits, attach

    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    tokens, labels, mask, weights, _ = micro_batch()
    inputs = tokens, torch.arange(LENGTH).expand(2, LENGTH), causal_mask()
    found = {}

    for name in ("untied", "heads", "hybrid, heads"):
        model = build(name)
        before, attributes, expected = model(*inputs), set(vars(model)), gradients(model)
        qtarget = attach(model, "dft", vocab_size=VOCAB)
        dft = gradients(model)
        assert len(qtarget.heads) == (1 if name == "untied" else 3) and "dft" in str(qtarget.loss.objective)
        found[name, "logits without labels"] = torch.equal(model(*inputs), before) and qtarget.heads == ()
        again = attach(model, "weighted-sft", vocab_size=VOCAB)
        found[name, "what was attached is replaced"] = "weight" in message(gradients, model)
        # Nothing of a forward that failed is left.
        found[name, "logits after a failure"] = torch.equal(model(*inputs), before)
        with again.inputs({"weight": torch.ones_like(weights)}):
            found[name, "side inputs"] = largest_difference(gradients(model), expected) < 5e-6
        assert "weight" in message(gradients, model)  # they are those of one micro-batch
        again.detach()
        found[name, "detached"] = largest_difference(gradients(model), expected) == 0
        found[name, "nothing is left"] = set(vars(model)) == attributes and not model._forward_pre_hooks
        found[name, "another objective"] = largest_difference(dft, expected) > 1e-3

    # Labels by place, no mask, and -100 in its place.
    model = build("untied")
    attach(model, "sft", vocab_size=VOCAB)
    masked = labels.masked_fill(mask == 0, IGNORED)
    given = model(*inputs, None, masked)
    found["ignored labels"] = torch.equal(given, model(*inputs, labels=labels, loss_mask=mask))
    found["labels by place"] = bool((given != 0).equal(mask == 1))

    # Wrapped, and as a list of chunks, of which the first one makes no logits.
    first = build("untied", post=False)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    attributes = set(vars(first))
    found["first stage"] = attach(first, "sft", vocab_size=VOCAB).heads == () and set(vars(first)) == attributes
    qtarget = attach([first, wrapped], "sft", vocab_size=VOCAB)
    wrapped(*inputs, labels=labels, loss_mask=mask)
    found["wrapped"] = torch.equal(qtarget.heads[0].losses, given)
    half = build("untied", bf16=True)
    half = Float16Module(half.config, half)
    qtarget = attach(half, "sft", vocab_size=VOCAB)
    found["in 16 bits"] = (half(*inputs, labels=labels, loss_mask=mask) - given).abs().max().item() < 0.2
    assert qtarget.statistics is not None

    # Outside of a forward, as where Megatron takes it apart.
    logits = functools.partial(model, *inputs)
    found["outside"] = message(lambda: model.compute_language_model_loss(labels, logits().transpose(0, 1)))
    attach(model, "sft", vocab_size=VOCAB, chunk_size=None)
    outside = model.compute_language_model_loss(masked, logits().transpose(0, 1))
    found["outside, whole logits"] = (outside - given).abs().max().item() < 2e-5

    deferred = DeferredLogits(None)
    found["asked"] = message(lambda: torch.tanh(deferred))
    found["asked for a method"] = message(lambda: deferred.transpose(0, 1))
    found["foreign"] = message(attach, torch.nn.Linear(2, 2), "sft", vocab_size=VOCAB)
    found["two"] = message(attach, [model, half], "sft", vocab_size=VOCAB)
    found["teacher"] = message(attach, model, "target-sft", "eta=0.5", vocab_size=VOCAB)
    found["name"] = message(attach, model, "no-such", vocab_size=VOCAB)
    found["arguments"] = message(attach, model, objectives.sft(), "gamma=2", vocab_size=VOCAB)

    class Other(type(model)):
        def forward(self, input_ids, lm_labels):
            """As BertModel's."""

    other = build("untied")
    other.__class__ = Other
    found["other labels"] = message(attach, other, "sft", vocab_size=VOCAB)
    del model.output_layer
    found["headless"] = message(attach, model, "sft", vocab_size=VOCAB)
    return found


def test_an_attached_objective_comes_and_goes():
    (found,) = run_ranks(1, behaviour, megatron=True)
    messages = {name: value for name, value in found.items() if not isinstance(value, bool)}
    assert all(value for name, value in found.items() if name not in messages), found
    expected = {
        "outside": "overlap_moe_expert_parallel_comm does: give chunk_size=None",
        "asked": "asks for tanh of its logits, which are not made: give chunk_size=None",
        "asked for a method": "asks for transpose of its logits",
        "foreign": "expected a megatron-core language model (GPTModel, HybridModel, ...), wrapped or not, got Linear",
        "two": "expected the chunks of one model, of which one makes logits, got 2",
        "teacher": "reads a second model, and none is attached: use",
        "name": "no-such",
        "arguments": "an Objective has its arguments already, got gamma=2",
        "other labels": "with an output_layer whose forward takes labels, got Other",
        "headless": "with an output_layer whose forward takes labels, got GPTModel",
    }
    assert messages.keys() == expected.keys()
    for name, text in expected.items():
        assert text in messages[name] and "\n" not in messages[name], (name, messages[name])
