"""What the losses would do on a GPU, seen without one: tensors that only know their device, and operations counted.

Nothing is computed on a GPU here. A FakeTensor has a shape, a dtype and the device cuda; whatever would wait for a
number of it, or needs a shape that depends on one, raises. The native kernels are replaced by what notes their calls.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from launching import run_ranks
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from qtarget_megatron import collectives, objectives
from qtarget_megatron import qtarget_cross_entropy as cross_entropy
from qtarget_megatron import qtarget_linear_cross_entropy as linear_cross_entropy
from qtarget_megatron.kernels import native
from qtarget_megatron.loss import cross_entropy as of_logits
from qtarget_megatron.loss import linear_cross_entropy as of_hidden_states
from qtarget_megatron.loss.samples import Samples
from qtarget_megatron.loss.sparse_teacher import TAIL_RULES, SparseTeacher
from qtarget_megatron.objectives import example

GPU = torch.device("cuda", 0)
OBJECTIVES = {name: example(name) for name in objectives.names()} | {
    "kd temperature=2": objectives.from_arguments("kd", ["temperature=2.0"])
}
WITH_TEACHER = [name for name, objective in OBJECTIVES.items() if objective.needs_teacher]
TOKENS, VOCABULARY, HIDDEN = 6, 100, 16


class Kernels:
    """Stands for the compiled module with its CUDA half: notes what is called, for which device and stream."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if not name.startswith("cuda_"):
            raise AttributeError(name)

        def called(*arguments):
            assert arguments[-2:] == (0, 7), "device and stream"
            self.calls.append(name.removeprefix("cuda_"))

        return called

    def build_info(self):
        return {"cuda": True, "cuda_archs": "80;90;100"}


class Strict(TorchDispatchMode):
    """Refuses a CPU tensor that torch would copy to the GPU, and wait for; a number goes with the launch elsewhere."""

    COPYING = {"where", "_to_copy", "copy_", "cat", "stack", "index", "index_put_", "gather", "scatter_", "index_copy_"}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor) and value.device.type == "cpu":
                assert value.dim() == 0 and func.overloadpacket.__name__ not in self.COPYING, f"{func} copies {value}"
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def gpu(ranks, capturing):
    """As if on a GPU, with so many tensor-parallel ranks; yields the kernels and what runs a function's backward."""
    kernels, contexts = Kernels(), []

    class Context:
        def save_for_backward(self, *tensors):
            self.saved_tensors = tensors

    def without_autograd(function):
        # Autograd's engine would start a thread for the device.
        def apply(*arguments):
            context = Context()
            context.needs_input_grad = [isinstance(a, torch.Tensor) and a.requires_grad for a in arguments]
            contexts.append((function, context))
            with torch.no_grad():
                return function.forward(context, *arguments)

        return apply

    def backward(gradient):
        function, context = contexts.pop()
        with torch.no_grad():
            return function.backward(context, gradient)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "extension", lambda: kernels)
        # Where it is true (on a GPU, and of the CPU platform) torch would start CUDA for a tensor that is none.
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=7))
        patch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        patch.setattr(FakeTensor, "data_ptr", lambda tensor: 16, raising=False)
        patch.setattr(of_hidden_states, "_adds_up_wide", lambda device, dtype: True)
        for function in (of_logits._QTargetCrossEntropy, of_hidden_states._QTargetLinearCrossEntropy):
            patch.setattr(function, "apply", without_autograd(function))
        if ranks > 1:
            patch.setattr(collectives, "size", lambda group: ranks)
            patch.setattr(collectives, "rank", lambda group: 1)
            patch.setattr(collectives, "_all_gather", lambda t, group: t.new_empty(ranks * len(t), *t.shape[1:]))
            patch.setattr(collectives, "sum_in_place", lambda partial, group: partial)
        native.has_cuda.cache_clear()
        native._problem_of.cache_clear()
        try:
            # Without the CPU platform, which is on where Megatron is imported: it makes the CPU of every cuda.
            with torch._C.DisableTorchFunction(), FakeTensorMode(allow_non_fake_inputs=False), Strict():
                yield kernels, backward
        finally:
            native.has_cuda.cache_clear()
            native._problem_of.cache_clear()


def inputs(objective):
    labels = torch.zeros(TOKENS, dtype=torch.int64, device=GPU)
    return labels, {name: torch.zeros(TOKENS, device=GPU) for name in objective.token_inputs}


def samples_of(objective):
    ids = torch.zeros(TOKENS, dtype=torch.int64, device=GPU)
    order = torch.zeros(TOKENS, dtype=torch.int64, device=GPU)
    return Samples(ids, 3, order=order) if objective.needs_samples else None


def divergence_passes(objective, count):
    return ["divergence_sums"] * count if objective.request.second_pass else []


def matrix(*shape, **options):
    return torch.empty(*shape, device=GPU, dtype=torch.bfloat16, **options)


def on_gpu(stats):
    fields = (stats.max, stats.p, stats.entropy, stats.label_mass, stats.residual_mass, stats.trust)
    return all(field.device == GPU for field in fields)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_loss_of_logits_never_waits(name, ranks):
    objective = OBJECTIVES[name]
    with gpu(ranks, capturing=False) as (kernels, backward):
        logits, (labels, token_inputs) = matrix(TOKENS, VOCABULARY, requires_grad=True), inputs(objective)
        teacher = {"teacher_logits": matrix(TOKENS, VOCABULARY)} if objective.needs_teacher else {}
        losses, stats = cross_entropy(
            logits,
            labels,
            objective=objective,
            token_inputs=token_inputs,
            samples=samples_of(objective),
            return_statistics=True,
            **teacher,
        )
        gradient = backward(torch.ones_like(losses))[0]
        assert losses.device == gradient.device == GPU and losses.dtype == torch.float32 and on_gpu(stats)
    passes = divergence_passes(objective, 1)
    assert kernels.calls == ["partial_statistics", "merge", *passes, "weigh", "chain", "logit_gradient"]


def head(objective, backward, **options):
    hidden, weight = matrix(TOKENS, HIDDEN, requires_grad=True), matrix(VOCABULARY, HIDDEN, requires_grad=True)
    weight.main_grad = torch.empty(VOCABULARY, HIDDEN, device=GPU)
    labels, token_inputs = inputs(objective)
    teacher = {}
    if objective.needs_teacher:
        teacher = {"teacher_hidden": matrix(TOKENS, 8), "teacher_weight": matrix(VOCABULARY, 8)}
    losses, stats = linear_cross_entropy(
        hidden,
        weight,
        labels,
        objective=objective,
        token_inputs=token_inputs,
        samples=samples_of(objective),
        return_statistics=True,
        chunk_size=4,
        **teacher,
        **options,
    )
    gradients = backward(torch.ones_like(losses))[:2]
    assert {tensor.device for tensor in (losses, *gradients)} == {GPU} and on_gpu(stats)


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_fused_head_can_be_captured(name, ranks):
    with gpu(ranks, capturing=True) as (kernels, backward):
        head(OBJECTIVES[name], backward)
    passes = divergence_passes(OBJECTIVES[name], 2)
    assert kernels.calls == [*["partial_statistics"] * 2, "merge", *passes, "weigh", *["chain", "logit_gradient"] * 2]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_fused_head_waits_for_the_number_of_supervised_tokens_alone(name):
    with gpu(1, capturing=False) as (_, backward):
        with pytest.raises(DynamicOutputShapeException, match="nonzero"):
            head(OBJECTIVES[name], backward)
        head(OBJECTIVES[name], backward, num_supervised=5)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        (name, rule)
        for name in WITH_TEACHER
        for rule in TAIL_RULES
        if not (rule == "drop" and OBJECTIVES[name].request.reverse_cross)
    ],
)
def test_a_cached_teacher_never_waits(name, rule):
    objective = OBJECTIVES[name]
    with gpu(2, capturing=False) as (_, backward):
        logits, (labels, token_inputs) = matrix(TOKENS, VOCABULARY, requires_grad=True), inputs(objective)
        ids = torch.empty(TOKENS, 4, dtype=torch.int64, device=GPU)
        kept = SparseTeacher(ids, torch.empty(TOKENS, 4, device=GPU), torch.empty(TOKENS, device=GPU), rule)
        losses = cross_entropy(
            logits,
            labels,
            objective=objective,
            token_inputs=token_inputs,
            samples=samples_of(objective),
            sparse_teacher=kept,
        )
        assert backward(torch.ones_like(losses))[0].device == GPU


def reports():
    """Of a micro-batch, by objective: for each number of the report, where it lies and its shape."""
    from qtarget_megatron.megatron.training import step

    found = {}
    for name in ("sft", "target-sft"):
        objective = OBJECTIVES[name]
        with gpu(1, capturing=False) as (_, _):
            labels, _ = inputs(objective)
            teacher = {"teacher_logits": matrix(TOKENS, VOCABULARY)} if objective.needs_teacher else {}
            losses, stats = cross_entropy(
                matrix(TOKENS, VOCABULARY), labels, objective=objective, return_statistics=True, **teacher
            )
            number = objective.num_tokens(labels != -100, {}, stats.label_mass)
            numbers = step.report(stats, losses.sum(), number).values()
            found[name] = [(str(pair.device), tuple(pair.shape)) for pair in numbers]
    return found


def further_heads():
    """Where everything lies that a head of multi-token prediction reads, in packed rows; it waits for nothing."""
    from megatron.core.packed_seq_params import PackedSeqParams

    from qtarget_megatron.megatron.attach import DeferredLogits
    from qtarget_megatron.megatron.head_loss import LossInputs
    from qtarget_megatron.megatron.label_roll import LabelRoll
    from qtarget_megatron.megatron.model.output_head import OutputHead

    layer = SimpleNamespace(tp_group=None, sequence_parallel=False)
    with gpu(1, capturing=False) as (_, _):
        labels = torch.ones(1, TOKENS, dtype=torch.int64, device=GPU)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=torch.empty(4, dtype=torch.int32, device=GPU))
        roll, weight, head = (
            LabelRoll(packed, None, layer),
            matrix(1, TOKENS),
            OutputHead(matrix(TOKENS, 8), layer, None),
        )
        given = roll.inputs(LossInputs({"weight": weight}, None, lambda: head, (5, 4)))
        _, stats = cross_entropy(
            matrix(TOKENS, VOCABULARY), labels[0], objective=objectives.sft(), return_statistics=True
        )
        deferred = DeferredLogits(head)
        deferred.set_computed(labels, stats.reshaped(torch.Size((TOKENS, 1))))
        found = [roll.mask(labels), given.token_inputs["weight"], given.teacher().hidden, deferred.argmax(-1)]
        return [(str(values.device), tuple(values.shape)) for values in found]


@pytest.mark.distributed
def test_a_head_of_multi_token_prediction_never_waits():
    (found,) = run_ranks(1, further_heads, megatron=True)
    assert found == [("cuda:0", shape) for shape in ((1, TOKENS), (1, TOKENS), (TOKENS, 8), (TOKENS, 1))]


@pytest.mark.distributed
def test_the_report_of_a_micro_batch_never_waits():
    (found,) = run_ranks(1, reports, megatron=True)
    assert found == dict.fromkeys(("sft", "target-sft"), [("cuda:0", (2,))] * 7)


class Count(TorchDispatchMode):
    """Torch operations that would each be a kernel: all but views and memory that is taken."""

    FREE = {
        *("view", "detach", "select", "slice", "unbind", "t", "transpose", "expand", "_unsafe_view", "unsqueeze"),
        *("squeeze", "as_strided", "alias", "split", "permute", "unflatten", "empty", "empty_like", "new_empty"),
    }

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def several(monkeypatch):
    """As one of eight tensor-parallel ranks, whose partials are all the same."""
    monkeypatch.setattr(collectives, "size", lambda group: 8)
    monkeypatch.setattr(collectives, "gather_partials", lambda partials, group: partials.expand(8, *partials.shape))
    monkeypatch.setattr(collectives, "rank", lambda group: 0)


def noted(function, calls):
    def called(*arguments, **keywords):
        calls.append(function.__name__)
        return function(*arguments, **keywords)

    return called


def count_forward(function):
    """Torch's operations and calls of native kernels of a forward pass."""
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("supervised", "partial_statistics", "merge", "weigh"):
            patch.setattr(native, name, noted(getattr(native, name), calls))
        with Count() as counted:
            function()
    return len(counted.names) + len(calls), counted.names


LABELS = torch.arange(64)


def logits_forward():
    logits = torch.randn(64, 512, dtype=torch.bfloat16, requires_grad=True)
    return lambda: cross_entropy(logits, LABELS, objective=objectives.sft(), return_statistics=True)


def test_sft_on_logits_is_twelve_kernels():
    count, names = count_forward(logits_forward())
    assert count <= 12, names


def test_sft_on_the_logits_of_eight_ranks_is_twenty_kernels(several):
    count, names = count_forward(logits_forward())
    assert count <= 20, names


def test_sft_in_the_fused_head_is_twenty_kernels():
    hidden = torch.randn(64, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(512, 32, dtype=torch.bfloat16, requires_grad=True)
    count, names = count_forward(
        lambda: linear_cross_entropy(hidden, weight, LABELS, objective=objectives.sft(), return_statistics=True)
    )
    assert count <= 20, names
