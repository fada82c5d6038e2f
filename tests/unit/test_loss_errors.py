"""What qtarget_cross_entropy says about arguments that do not fit."""

import pytest
import torch

from qtarget_megatron import SparseTeacher, objectives, qtarget_cross_entropy, qtarget_linear_cross_entropy

LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
WEIGHT = torch.zeros(7, 5)
INPUT = torch.zeros(2, 3)


def at(position, value):
    labels = LABELS.clone()
    labels.view(-1)[position] = value
    return labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(labels=at(4, 5)), r"0\.\.4 or ignore_index=-100, got 5 at flat position 4"),
        (dict(labels=at(2, -1)), r"got -1 at flat position 2"),
        (dict(labels=at(1, 3), vocab_size=3), r"0\.\.2 .* got 3 at flat position 1"),
        (dict(labels=at(1, -100), ignore_index=-1), r"ignore_index=-1, got -100"),
        (dict(labels=LABELS.int()), "labels must be int64 token ids, got torch.int32"),
        (dict(labels=LABELS.float()), "labels must be int64 token ids, got torch.float32"),
        (dict(labels=LABELS[0]), r"logits \[2, 3, 5\] and labels \[3\]"),
        (dict(logits=LOGITS[..., :0]), r"\[\.\.\., V_local\].*logits \[2, 3, 0\]"),
        (dict(objective="dft"), "must come from qtarget_megatron.objectives, got str"),
        (dict(objective=objectives.kd), "must come from qtarget_megatron.objectives, got function"),
        (
            dict(objective=objectives.kd()),
            r"kd\(temperature=1.0\) needs a second model: pass",
        ),
        (
            dict(objective=objectives.kd(), teacher_logits=LOGITS[..., :4]),
            r"sharded like logits \[2, 3, 5\], got \[2, 3, 4\]",
        ),
        (dict(backend="gpu"), "unknown backend 'gpu': expected one of auto, reference, cpp, cuda"),
        (dict(backend="cuda"), "needs cuda tensors, got cpu logits"),
        (dict(logits=LOGITS.double(), backend="cpp"), "got torch.float64: use 'reference'"),
        (dict(objective=objectives.weighted_sft()), r"weighted-sft\(\) needs token_inputs\['weight'\], got none"),
        (
            dict(objective=objectives.psft(refresh=0), token_inputs={"old_log_probs": INPUT}),
            r"needs token_inputs\['old_log_prob'\], got \['old_log_probs'\]",
        ),
        (
            dict(objective=objectives.weighted_sft(), token_inputs={"weight": torch.zeros(3)}),
            r"token_inputs\['weight'\] must be \[2, 3\] on cpu like labels, got \[3\] on cpu",
        ),
        (
            dict(objective=objectives.weighted_sft(), token_inputs={"weight": INPUT.clone().fill_diagonal_(torch.nan)}),
            r"token_inputs\['weight'\] must hold finite numbers, got nan",
        ),
        (
            dict(objective=objectives.cft(), token_inputs={"critical": INPUT + 2}),
            r"token_inputs\['critical'\] must hold 0 or 1, got 2",
        ),
        (
            dict(objective=objectives.psft(refresh=0), token_inputs={"old_log_prob": INPUT + 0.7}),
            r"token_inputs\['old_log_prob'\] must hold log-probabilities in nats, got 0.7",
        ),
        (dict(vocab_size=6), r"vocab_size must be in 1\.\.5 .* got 6"),
        (dict(vocab_size=0), r"vocab_size must be in 1\.\.5 .* got 0"),
    ],
)
def test_mistakes_are_refused_in_one_clear_line(changes, message):
    arguments = dict(logits=LOGITS, labels=LABELS, objective=objectives.sft()) | changes
    with pytest.raises(ValueError, match=message) as caught:
        qtarget_cross_entropy(arguments.pop("logits"), arguments.pop("labels"), **arguments)
    assert "\n" not in str(caught.value)


# Everything that torch has and no backend computes in, as far as this version of torch has it.
NOT_SERVED = [
    getattr(torch, name)
    for name in (
        *("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"),
        *("complex32", "complex64", "complex128", "bool", "uint8", "int8", "int16", "int32", "int64", "uint16"),
    )
    if hasattr(torch, name)
]


@pytest.mark.parametrize("dtype", NOT_SERVED, ids=str)
@pytest.mark.parametrize("backend", ["auto", "reference", "cpp"])
def test_a_dtype_that_is_not_documented_is_refused_for_whatever_holds_it(dtype, backend):
    kd = dict(objective=objectives.kd(), backend=backend)
    served = "must be float32, bfloat16 or float16 .*got " + str(dtype)
    with pytest.raises(ValueError, match=f"logits .*{served}"):
        qtarget_cross_entropy(LOGITS.to(dtype), LABELS, objective=objectives.sft(), backend=backend)
    with pytest.raises(ValueError, match=f"teacher_logits {served}"):
        qtarget_cross_entropy(LOGITS, LABELS, teacher_logits=LOGITS.to(dtype), **kd)
    with pytest.raises(ValueError, match=f"hidden states {served}"):
        qtarget_linear_cross_entropy(
            *(LOGITS.to(dtype), WEIGHT.to(dtype), LABELS), objective=objectives.sft(), backend=backend
        )
    with pytest.raises(ValueError, match=f"teacher_hidden {served}"):
        taught = dict(teacher_hidden=LOGITS.to(dtype), teacher_weight=WEIGHT.to(dtype))
        qtarget_linear_cross_entropy(LOGITS, WEIGHT, LABELS, **taught, **kd)
    ids = LABELS[..., None].expand(2, 3, 4)
    with pytest.raises(ValueError, match=str(dtype)):
        SparseTeacher(ids, torch.zeros(2, 3, 4).to(dtype), INPUT)
    with pytest.raises(ValueError, match=str(dtype)):
        SparseTeacher(ids, torch.zeros(2, 3, 4), INPUT.to(dtype))
    if dtype != torch.int64:
        with pytest.raises(ValueError, match=f"labels must be int64 token ids, got {dtype}"):
            qtarget_cross_entropy(LOGITS, LABELS.to(dtype), objective=objectives.sft(), backend=backend)
    if dtype.is_complex or dtype.is_floating_point:
        with pytest.raises(ValueError, match=rf"token_inputs\['weight'\] must hold real numbers, got {dtype}"):
            qtarget_cross_entropy(
                LOGITS,
                LABELS,
                objective=objectives.weighted_sft(),
                token_inputs={"weight": INPUT.to(dtype)},
                backend=backend,
            )


def test_inputs_of_ignored_tokens_may_hold_anything():
    labels, weight = at(0, -100), INPUT + 1
    weight[0, 0] = torch.nan
    objective = objectives.weighted_sft()
    loss = qtarget_cross_entropy(LOGITS, labels, objective=objective, token_inputs={"weight": weight})
    assert loss[0, 0] == 0 and (loss.flatten()[1:] > 0).all()


def test_a_second_model_and_inputs_that_nobody_reads_change_nothing():
    drawn = torch.randn(2, 3, 5)
    plain = qtarget_cross_entropy(drawn, LABELS, objective=objectives.dft())
    extra = dict(teacher_logits=torch.randn(2, 3, 5), token_inputs={"weight": INPUT + torch.nan})
    assert torch.equal(qtarget_cross_entropy(drawn, LABELS, objective=objectives.dft(), **extra), plain)
