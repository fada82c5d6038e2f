"""What qtarget_cross_entropy says about arguments that do not fit."""

import pytest
import torch

from qtarget_megatron import Objective, objectives, qtarget_cross_entropy

LOGITS, LABELS = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
WEIGHTED = Objective(lambda stats, inputs: None, token_inputs=("weight",), name="weighted")


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
        (dict(teacher_logits=LOGITS), r"sft\(\) reads no second model: drop teacher_logits"),
        (
            dict(objective=objectives.target_sft(eta=0), teacher_logits=LOGITS),
            "reads no second model: drop teacher_logits",
        ),
        (
            dict(objective=objectives.kd(), teacher_logits=LOGITS[..., :4]),
            r"sharded like logits \[2, 3, 5\], got \[2, 3, 4\]",
        ),
        (dict(backend="gpu"), "unknown backend 'gpu': expected one of auto, reference, cpp, cuda"),
        (dict(backend="cuda"), "needs cuda tensors, got cpu logits"),
        (dict(logits=LOGITS.double(), backend="cpp"), "got torch.float64: use 'reference'"),
        (dict(objective=WEIGHTED), r"takes the token_inputs \['weight'\], got \[\]"),
        (dict(token_inputs={"weight": LABELS}), r"takes the token_inputs \[\], got \['weight'\]"),
        (
            dict(objective=WEIGHTED, token_inputs={"weight": torch.zeros(3)}),
            r"token_inputs\['weight'\] must be \[2, 3\] like labels, got \[3\]",
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
