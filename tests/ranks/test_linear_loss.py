"""qtarget_linear_cross_entropy: the same loss as from logits, which never exist as a whole."""

import math
import weakref

import pytest
import torch
import torch.distributed as dist
from launching import run_ranks
from loss_definitions import CASES, sample_ids
from torch.utils._python_dispatch import TorchDispatchMode

from qtarget_megatron import objectives, qtarget_cross_entropy, qtarget_linear_cross_entropy
from qtarget_megatron.loss import linear_cross_entropy

ROWS, VOCAB, WIDTH, TEACHER_WIDTH = 24, 211, 16, 11
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
typical = pytest.mark.parametrize(
    "name", ["sft", "label-smoothing", "eaft", "kd-T2", "psft", "target-sft", "reverse-kl", "jsd"]
)
# A product of float32 matrices rounds each logit, of size 10, by a few units of 2^-24 of its terms; a gradient follows.
FLOAT32 = dict(rtol=2e-5, atol=2e-5)


def draw(shape=(ROWS,), vocab=VOCAB, dtype=torch.float32, seed=0, ignored=0.3):
    """hidden, weight, labels, teacher_hidden, teacher_weight, upstream gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(size, generator=generator).to(dtype)

    labels = torch.randint(vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < ignored] = -100
    return (
        normal(*shape, WIDTH),
        normal(vocab, WIDTH) * 0.7,
        labels,
        normal(*shape, TEACHER_WIDTH),
        normal(vocab, TEACHER_WIDTH) * 0.7,
        torch.randn(shape, generator=generator),
    )


def run(case, hidden, weight, labels, teacher_hidden, teacher_weight, upstream, **keywords):
    """Loss, dHidden, dWeight."""
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    teacher = {}
    if case.objective.needs_teacher:
        teacher = dict(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight)
    logits = hidden.detach().double() @ weight.detach().double().t() * keywords.get("logit_scale", 1)
    loss = qtarget_linear_cross_entropy(
        hidden,
        weight,
        labels,
        objective=case.objective,
        token_inputs=case.inputs(logits, labels, keywords.get("vocab_size")),
        samples=case.samples(labels),
        **teacher,
        **keywords,
    )
    loss.backward(upstream.to(loss.dtype))
    return loss.detach(), hidden.grad, weight.grad


def definition(case, hidden, weight, labels, teacher_hidden, teacher_weight, upstream):
    """The same by autograd in float64 of the objective's definition."""
    hidden, weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    kept = (labels != -100).reshape(-1)
    z = (hidden @ weight.t()).reshape(-1, weight.shape[0])
    t = (teacher_hidden.double() @ teacher_weight.double().t()).reshape(z.shape)
    inputs = {name: value.reshape(-1)[kept] for name, value in case.inputs(z.detach(), labels.reshape(-1)).items()}
    inputs["sample"] = sample_ids(labels).reshape(-1)[kept]
    losses = case.definition(z[kept], labels.reshape(-1)[kept], t[kept], inputs)
    losses.backward(upstream.double().reshape(-1)[kept])
    loss = torch.zeros(labels.numel(), dtype=torch.float64)
    loss[kept] = losses.detach()
    return loss.reshape(labels.shape), hidden.grad, weight.grad


def assert_close(found, expected, **tolerance):
    for name, a, b in zip(("loss", "dHidden", "dWeight"), found, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), **tolerance, msg=lambda m, n=name: f"{n}: {m}")


@every_case
def test_loss_and_gradients_are_the_definition(case):
    drawn = draw()
    assert_close(run(case, *drawn, chunk_size=5), definition(case, *drawn), **FLOAT32)


@every_case
def test_the_logits_are_scaled_and_the_teachers_are_not(case):
    hidden, weight, *rest = draw(dtype=torch.float64)
    found = run(case, hidden, weight, *rest, chunk_size=5, logit_scale=0.3)
    loss, d_hidden, d_scaled = definition(case, hidden, 0.3 * weight, *rest)
    assert_close(found, (loss, d_hidden, 0.3 * d_scaled), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("scale", [0, -1.0, math.inf, math.nan, "2"])
def test_a_scale_that_is_none_is_refused(scale):
    hidden, weight, labels, *_ = draw()
    with pytest.raises(ValueError, match="logit_scale must be a number in"):
        qtarget_linear_cross_entropy(hidden, weight, labels, objective=objectives.sft(), logit_scale=scale)


@every_case
def test_float64_is_the_definition_to_1e10(case):
    drawn = draw((3, 8), dtype=torch.float64)
    assert_close(run(case, *drawn, chunk_size=7), definition(case, *drawn), rtol=1e-10, atol=1e-10)


@typical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_is_that_of_whole_logits(name, dtype):
    case, drawn = CASES[name], draw((4, 6), dtype=dtype)
    hidden, weight, labels, teacher_hidden, teacher_weight, upstream = drawn
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = hidden.double() @ weight.double().t()
    loss = qtarget_cross_entropy(
        leaves[0] @ leaves[1].t(),
        labels,
        objective=case.objective,
        teacher_logits=case.teacher(teacher_hidden @ teacher_weight.t()),
        token_inputs=case.inputs(logits, labels),
    )
    loss.backward(upstream)
    # The same rounded logits and logit gradients; bfloat16 rounds the sums once more, in another order.
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2**-6, atol=2**-6)
    assert_close(run(case, *drawn, chunk_size=8), (loss.detach(), leaves[0].grad, leaves[1].grad), **tolerance)


@typical
@pytest.mark.parametrize("chunk_size", [1, 7, 23, 24, 10_000])
def test_any_chunk_size_gives_the_same(name, chunk_size):
    drawn = draw()
    assert_close(run(CASES[name], *drawn, chunk_size=chunk_size), run(CASES[name], *drawn), rtol=1e-5, atol=1e-5)


def test_padding_columns_have_no_mass_and_no_gradient():
    case = CASES["label-smoothing"]
    hidden, weight, labels, *rest = draw(vocab=200)
    padded = torch.cat([weight, torch.full((11, WIDTH), 50.0)])
    rest[1] = torch.cat([rest[1], rest[1][:11]])
    found = run(case, hidden, padded, labels, *rest, vocab_size=200)
    rest[1] = rest[1][:200]
    expected = run(case, hidden, weight, labels, *rest)
    assert_close((*found[:2], found[2][:200]), expected, rtol=1e-6, atol=1e-6)
    assert (found[2][200:] == 0).all()


@pytest.mark.parametrize("shape", [(0,), (0, 3), (2, 0)])
def test_no_tokens_at_all(shape):
    loss, hidden, weight = run(CASES["target-sft"], *draw(shape))
    assert loss.shape == shape and hidden.shape == (*shape, WIDTH) and (weight == 0).all()
    labels = torch.zeros(shape, dtype=torch.int64)
    for objective in (objectives.sft(), objectives.eaft()):
        for function, tensors in (
            (qtarget_cross_entropy, [torch.randn(*shape, 8)]),
            (qtarget_linear_cross_entropy, [torch.randn(*shape, 4), torch.randn(8, 4)]),
        ):
            loss, stats = function(*tensors, labels, objective=objective, return_statistics=True)
            assert loss.shape == stats.p.shape == stats.trust.shape == shape


def test_ignored_tokens_are_never_read():
    hidden, weight, labels, teacher_hidden, *rest = draw()
    hidden[labels == -100], teacher_hidden[labels == -100] = math.nan, math.inf
    found = run(CASES["target-sft"], hidden, weight, labels, teacher_hidden, *rest)
    assert all(tensor.isfinite().all() for tensor in found)
    assert (found[1][labels == -100] == 0).all()
    labels[:] = -100
    loss, hidden_gradient, weight_gradient = run(CASES["sft"], hidden, weight, labels, teacher_hidden, *rest)
    assert (loss == 0).all() and (hidden_gradient == 0).all() and (weight_gradient == 0).all()


def test_strides_do_not_matter():
    hidden, weight, labels, *rest = draw((4, 6))
    expected = run(CASES["sft"], hidden, weight, labels, *rest)
    turned = hidden.transpose(0, 1).contiguous().transpose(0, 1)
    found = run(CASES["sft"], turned, weight.t().contiguous().t(), labels.t().contiguous().t(), *rest)
    assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_statistics_are_those_of_whole_logits():
    hidden, weight, labels, *_ = draw((4, 6))
    objective = objectives.eaft()
    _, found = qtarget_linear_cross_entropy(hidden, weight, labels, objective=objective, return_statistics=True)
    _, expected = qtarget_cross_entropy(hidden @ weight.t(), labels, objective=objective, return_statistics=True)
    for name in ("supervised", "log_p", "p", "entropy", "label_mass", "trust", "sum_exp", "top_logits"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)


# ---- gradients that Megatron accumulates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_weights_gradient_is_added_to_main_grad(dtype):
    hidden, weight, labels, _, _, upstream = draw(dtype=dtype)
    expected = definition(CASES["sft"], hidden, weight, labels, *draw(dtype=dtype)[3:])[2]
    weight = torch.nn.Parameter(weight)
    weight.main_grad, weight.grad_added_to_main_grad = torch.ones(weight.shape), False
    for _ in range(2):
        loss = qtarget_linear_cross_entropy(hidden, weight, labels, objective=objectives.sft(), chunk_size=5)
        loss.backward(upstream)
        assert weight.grad_added_to_main_grad and weight.grad.shape == weight.shape
    # bfloat16 rounds every element of dLogits and of a chunk's product; float32 sums keep it at that.
    tolerance = FLOAT32 if dtype == torch.float32 else dict(rtol=2**-6, atol=2**-5)
    torch.testing.assert_close(weight.main_grad.double(), 1 + 2 * expected, **tolerance)


def test_a_shared_embedding_gets_zeros_beside_main_grad():
    hidden, weight, labels, *_ = draw()
    weight = torch.nn.Parameter(weight)
    weight.main_grad, weight.zero_out_wgrad = torch.zeros(weight.shape), True
    qtarget_linear_cross_entropy(hidden, weight, labels, objective=objectives.sft()).sum().backward()
    assert (weight.grad == 0).all() and weight.main_grad.abs().sum() > 0


def test_the_logits_of_a_chunk_are_gone_before_autograd_gets_a_tensor_of_the_weight_s_size(monkeypatch):
    """So that it takes their memory: it is as large as they are, and nobody reads it where main_grad has the sum."""
    hidden, weight, labels, *_ = draw()
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros(weight.shape)
    storages, alive = [], []
    chunk, finish = linear_cross_entropy._Logits.chunk, linear_cross_entropy._WeightGradient.finish

    def noted(self, *arguments):
        logits, teacher = chunk(self, *arguments)
        storages.append(weakref.ref(logits.untyped_storage()))
        return logits, teacher

    def looked(self):
        alive.append([storage for storage in storages if storage() is not None])
        return finish(self)

    monkeypatch.setattr(linear_cross_entropy._Logits, "chunk", noted)
    monkeypatch.setattr(linear_cross_entropy._WeightGradient, "finish", looked)
    qtarget_linear_cross_entropy(hidden, weight, labels, objective=objectives.sft(), chunk_size=5).sum().backward()
    assert len(storages) > 4 and alive == [[]]


def test_main_grad_of_16_bits_gets_a_sum_made_in_float32():
    hidden, weight, labels, *rest = draw()
    expected = definition(CASES["sft"], hidden, weight, labels, *rest)[2]
    weight = torch.nn.Parameter(weight)
    weight.main_grad = torch.zeros(weight.shape, dtype=torch.bfloat16)
    loss = qtarget_linear_cross_entropy(hidden, weight, labels, objective=objectives.sft(), chunk_size=3)
    loss.backward(rest[-1])
    assert torch.equal(weight.main_grad, weight.main_grad.to(torch.bfloat16))
    torch.testing.assert_close(weight.main_grad.double(), expected, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_needs_no_gradient_gets_none(frozen):
    hidden, weight, labels, *_ = draw()
    hidden.requires_grad_(frozen != "hidden")
    weight.requires_grad_(frozen != "weight")
    qtarget_linear_cross_entropy(hidden, weight, labels, objective=objectives.sft()).sum().backward()
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


# ---- inside autograd


def test_under_autocast_it_computes_in_the_lower_precision():
    hidden, weight, labels, *_ = draw()
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = qtarget_linear_cross_entropy(*leaves, labels, objective=objectives.dft())
    loss.sum().backward()
    expected = run(CASES["dft"], hidden.bfloat16(), weight.bfloat16(), *draw()[2:5], torch.ones(ROWS))
    assert torch.equal(loss.detach(), expected[0])
    assert leaves[0].grad.dtype == torch.float32 and torch.equal(leaves[0].grad, expected[1].float())
    assert torch.equal(leaves[1].grad, expected[2].float())


def test_under_activation_recomputation():
    hidden, weight, labels, *_ = draw()
    leaf, kernel = hidden.clone().requires_grad_(), weight.clone().requires_grad_()

    def head(h, w):
        return qtarget_linear_cross_entropy(h, w, labels, objective=objectives.dft()).sum()

    torch.utils.checkpoint.checkpoint(head, leaf, kernel, use_reentrant=False).backward()
    expected = run(CASES["dft"], hidden, weight, *draw()[2:5], torch.ones(ROWS))
    assert torch.equal(leaf.grad, expected[1]) and torch.equal(kernel.grad, expected[2])


def test_a_second_derivative_is_refused_and_a_second_backward_is_not():
    hidden, weight, labels, *_ = draw()
    hidden.requires_grad_()
    loss = qtarget_linear_cross_entropy(hidden, weight, labels, objective=objectives.sft()).sum()
    (first,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(loss, hidden, retain_graph=True)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="qtarget_linear_cross_entropy has no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_logits_of_student_and_teacher_exist_a_chunk_at_a_time():
    drawn = draw((300,), ignored=0.0)
    with _Largest() as largest:
        run_without_oracle(CASES["target-sft"], *drawn, chunk_size=8)
    # A chunk of logits, the hidden states and the weights are smaller than this.
    assert 8 * VOCAB <= largest.elements <= 300 * WIDTH < 300 * VOCAB // 10


def run_without_oracle(case, hidden, weight, labels, teacher_hidden, teacher_weight, upstream, chunk_size):
    hidden.requires_grad_()
    weight.requires_grad_()
    loss = qtarget_linear_cross_entropy(
        hidden,
        weight,
        labels,
        objective=case.objective,
        teacher_hidden=teacher_hidden,
        teacher_weight=teacher_weight,
        chunk_size=chunk_size,
    )
    loss.backward(upstream)


# ---- bad input

HIDDEN, WEIGHT, LABELS = torch.zeros(2, 3, 4), torch.zeros(5, 4), torch.zeros(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hidden=HIDDEN[..., :3]), r"hidden must be \[\.\.\., H\] and weight \[V_local, H\], got \[2, 3, 3\]"),
        (dict(hidden=HIDDEN[0]), r"hidden must be \[2, 3\] and H, as labels \[2, 3\] ask, got \[3, 4\]"),
        (dict(weight=WEIGHT.bfloat16()), "hidden and weight must have one dtype, got torch.float32 and torch.bfloat16"),
        (dict(labels=LABELS.int()), "labels must be int64 token ids"),
        (dict(labels=LABELS + 5), r"labels must be in 0\.\.4"),
        (dict(num_supervised=1), "num_supervised: expected the number of labels that are not ignore_index, 6, got 1"),
        (dict(chunk_size=0), "chunk_size must be .auto. or a number of tokens, 1 or more, got 0"),
        (dict(objective="sft"), "objective must come from"),
        (dict(objective=objectives.kd()), "needs a second model: pass teacher_hidden and teacher_weight"),
        (
            dict(objective=objectives.kd(), teacher_hidden=HIDDEN, teacher_weight=WEIGHT[:4]),
            "teacher_weight must have the 5 rows of weight on cpu, got 4",
        ),
        (dict(objective=objectives.weighted_sft()), r"needs token_inputs\['weight'\]"),
        (dict(vocab_size=6), r"vocab_size must be in 1\.\.5"),
        (dict(backend="cuda"), "needs cuda tensors"),
    ],
)
def test_mistakes_are_refused_in_one_clear_line(changes, message):
    arguments = dict(hidden=HIDDEN, weight=WEIGHT, labels=LABELS, objective=objectives.sft()) | changes
    with pytest.raises(ValueError, match=message) as caught:
        qtarget_linear_cross_entropy(**arguments)
    assert "\n" not in str(caught.value)


# ---- several ranks


def check_on_ranks(names):
    """Worst differences of each case at this world size from one process, plain and sequence parallel."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    group, columns, outcomes = dist.group.WORLD, 31, {}
    for name in names:
        case, shape = CASES[name], (2 * ranks, 3)
        drawn = draw(shape, vocab=ranks * columns, seed=len(name))
        vocab_size = ranks * columns - 40
        drawn[2][drawn[2] >= vocab_size] = 0
        hidden, weight, labels, teacher_hidden, teacher_weight, upstream = drawn
        expected = run(case, *drawn, vocab_size=vocab_size)
        inputs = case.inputs(hidden.double() @ weight.double().t(), labels, vocab_size)
        for sequence_parallel in (False, True):
            rows = slice(2 * rank, 2 * rank + 2) if sequence_parallel else slice(None)
            shard = slice(columns * rank, columns * (rank + 1))
            leaf, kernel = hidden[rows].clone().requires_grad_(), weight[shard].clone().requires_grad_()
            teacher = {}
            if case.objective.needs_teacher:
                teacher = dict(teacher_hidden=teacher_hidden[rows], teacher_weight=teacher_weight[shard])
            loss = qtarget_linear_cross_entropy(
                leaf,
                kernel,
                labels,
                objective=case.objective,
                token_inputs=inputs,
                samples=case.samples(labels),
                group=group,
                vocab_size=vocab_size,
                sequence_parallel=sequence_parallel,
                chunk_size=4,
                **teacher,
            )
            loss.backward(upstream)
            whole = (expected[0], expected[1][rows], expected[2][shard])
            differences = [
                ((a - b).abs() / (1 + b.abs())).max().item()
                for a, b in zip((loss.detach(), leaf.grad, kernel.grad), whole, strict=True)
            ]
            outcomes[f"{name}{' with sequence parallelism' if sequence_parallel else ''}"] = differences
    return outcomes


@pytest.mark.distributed
@pytest.mark.parametrize("world_size", [2, 4])
def test_sharded_is_unsharded(world_size):
    for rank, outcomes in enumerate(run_ranks(world_size, check_on_ranks, [list(CASES)], timeout=180)):
        for name, differences in outcomes.items():
            assert max(differences) < 2e-5, f"{name} on rank {rank}: loss, dHidden, dWeight {differences}"


def test_a_reverse_kl_from_a_model_that_lacks_tokens_is_refused():
    hidden, weight, labels, teacher_hidden, teacher_weight, _ = draw()
    given = dict(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_vocab_size=VOCAB - 1)
    for objective in (objectives.reverse_kl(), objectives.mixed_kl()):
        with pytest.raises(ValueError, match="infinite for the tokens from 210 to 210 that the second model does not"):
            qtarget_linear_cross_entropy(hidden, weight, labels, objective=objective, **given)
    for objective in (objectives.skew_reverse_kl(), objectives.jsd(), objectives.total_variation()):
        assert qtarget_linear_cross_entropy(hidden, weight, labels, objective=objective, **given).isfinite().all()


@pytest.mark.parametrize("known", [0, 1, 100, VOCAB])
def test_tokens_that_the_teacher_lacks_get_no_mass_from_it(known):
    hidden, weight, labels, teacher_hidden, teacher_weight, upstream = draw()
    case, found = CASES["target-sft"], []
    for teacher in (
        dict(teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, teacher_vocab_size=known),
        dict(
            teacher_logits=(teacher_hidden @ teacher_weight.t()).index_fill_(1, torch.arange(known, VOCAB), -math.inf)
        ),
    ):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        if "teacher_logits" in teacher:
            loss = qtarget_cross_entropy(leaves[0] @ leaves[1].t(), labels, objective=case.objective, **teacher)
        else:
            loss = qtarget_linear_cross_entropy(*leaves, labels, objective=case.objective, chunk_size=5, **teacher)
        loss.backward(upstream)
        found.append((loss.detach(), leaves[0].grad, leaves[1].grad))
    assert_close(*found, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert found[0][0].isnan().any() == (known == 0)
