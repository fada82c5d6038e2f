"""The comparison with transformers: what it measures, and that it names the place where a mistake sits."""

import pytest
import torch
from conversion_runs import run_all, variant
from finetune_runs import write_models
from launching import run_ranks

from qtarget_megatron.huggingface import Agreement, Place, StateAgreement, report_lines

LAYOUTS = {
    "single": [],
    "pp2": ["--pipeline-model-parallel-size", 2],
    "pp2-vpp2": ["--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2],
    "tp2-sp": ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
}


def exchange(layer):
    def change(weights):
        gate, up = (f"model.layers.{layer}.mlp.{part}_proj.weight" for part in ("gate", "up"))
        weights[gate], weights[up] = weights[up], weights[gate]

    return change


def damage(name):
    def change(weights):
        # One value of many, by about its size.
        weights[name].view(-1)[7] += weights[name].abs().max()

    return change


ROPE = dict(rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
# Mistake -> (tensors or config entries that hold it, where it must be found, what the hint must name).
MISTAKES = {
    "nothing": ({}, "None", None),
    "rope base": (ROPE, "layer 0, attention", "rope base"),
    "every epsilon": (dict(rms_norm_eps=1e-3), "layer 0, attention", "input_layernorm (weight or epsilon)"),
    **{f"gate and up of layer {k}": (dict(tensors=exchange(k)), f"layer {k}, MLP", "exchanged") for k in range(4)},
    "q of layer 2": (
        dict(tensors=damage("model.layers.2.self_attn.q_proj.weight")), "layer 2, attention", "q_proj"
    ),
    "v of layer 3": (
        dict(tensors=damage("model.layers.3.self_attn.v_proj.weight")), "layer 3, attention", "v_proj"
    ),
    "down of layer 1": (dict(tensors=damage("model.layers.1.mlp.down_proj.weight")), "layer 1, MLP", "down_proj"),
    "norm of layer 2": (
        dict(tensors=damage("model.layers.2.post_attention_layernorm.weight")), "layer 2, MLP", "post_attention"
    ),
    "final norm": (dict(tensors=damage("model.norm.weight")), "final norm", "model.norm"),
    "not a number": (
        # Finite weights, whose products are not.
        dict(
            tensors=lambda w: (
                w["model.layers.1.self_attn.v_proj.weight"].mul_(1e6),
                w["model.layers.1.self_attn.o_proj.weight"].fill_(3e38),
            )
        ),
        "layer 1, attention",
        "o_proj",
    ),
    "head": (dict(tensors=damage("lm_head.weight")), "logits", "lm_head.weight"),
}  # fmt: skip
# A norm whose epsilon alone is another -> where.
EPSILONS = {
    "1.input_layernorm": "layer 1, attention",
    "2.pre_mlp_layernorm": "layer 2, MLP",
    "3.pre_mlp_layernorm": "layer 3, MLP",
}
FEW = ["nothing", "rope base", "gate and up of layer 1", "gate and up of layer 2", "v of layer 3", "head"]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """(layout, mistake) -> (place, report) of every rank."""
    folder = tmp_path_factory.mktemp("check")
    write_models(folder)
    good = folder / "untied"
    for name, (changes, _, _) in MISTAKES.items():
        variant(good, folder / name, **changes)
    # A damage of the embedding is one of the tokens' that are read.
    variant(good, folder / "embedding", tensors=lambda w: w["model.embed_tokens.weight"].mul_(1.001))
    results = {}
    for world in (1, 2):
        jobs = {}
        for layout, words in LAYOUTS.items():
            if (layout == "single") != (world == 1):
                continue
            for name in [*MISTAKES, "embedding"] if world == 1 else FEW:
                jobs[layout, name] = ("divergence", folder / name, good, "", *words)
            for norm in EPSILONS:
                jobs[layout, norm] = ("divergence", good, good, norm, *words)
        jobs = {name: tuple(map(str, job)) for name, job in jobs.items()}
        ranks = run_ranks(world, run_all, (jobs,), 300, megatron=True)
        results |= {name: [rank[name] for rank in ranks] for name in jobs}
    return results


marks = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]


def marked(function):
    for mark in marks:
        function = mark(function)
    return function


@marked
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_where_it_sits(found, name):
    _, place, hint = MISTAKES[name]
    [(actual, report)] = found["single", name]
    assert actual == place, report
    if hint is None:
        assert "worst" not in report and "divergence" not in report
    else:
        last = report.splitlines()[-1]
        assert last.startswith(f"first divergence: {place} (") and hint in last


@marked
def test_the_embedding_is_told_from_the_first_layer(found):
    [(place, report)] = found["single", "embedding"]
    assert place == "embedding" and "embed_tokens" in report.splitlines()[-1]


@marked
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("norm", EPSILONS)
def test_a_norm_with_an_epsilon_of_its_own_is_found(found, layout, norm):
    assert {place for place, _ in found[layout, norm]} == {EPSILONS[norm]}


@marked
@pytest.mark.parametrize("layout", ["pp2", "pp2-vpp2", "tp2-sp"])
@pytest.mark.parametrize("name", FEW)
def test_every_stage_and_shard_reports_its_layers(found, layout, name):
    first, second = found[layout, name]
    assert first == second and first[0] == MISTAKES[name][1]
    # The same figures at every layout, but for rounding.
    if name != "nothing":
        rows = [line.split() for line in first[1].splitlines()]
        single = [line.split() for line in found["single", name][0][1].splitlines()]
        for kind in (["embedding"], *(["layer", str(k)] for k in range(4)), ["final"], ["logits"]):
            [ours] = [row for row in rows if row[: len(kind)] == kind]
            [theirs] = [row for row in single if row[: len(kind)] == kind]
            large = [i for i, cell in enumerate(theirs) if cell[0].isdigit() and float(cell) > 1e-3]
            for i in large:
                assert float(ours[i]) == pytest.approx(float(theirs[i]), rel=0.1)


@marked
def test_the_worst_tokens_are_those_that_differ_most(found):
    [(_, report)] = found["single", "gate and up of layer 1"]
    table = report[report.index("worst tokens") : report.index("relative difference")].splitlines()
    assert table[1].split("  ")[0] == "position" and "transformers' first" in table[1]
    rows = [line.split() for line in table[2:] if line]
    assert len(rows) == 5
    differences = [float(row[5]) for row in rows]
    assert differences == sorted(differences, reverse=True)
    largest = next(line for line in report.splitlines() if line.startswith("largest difference of two logits"))
    assert float(largest.split()[5]) == differences[0]


# ---- without Megatron's models


def agreement(differences):
    places = [Place.of_layer(layer, part) for layer in range(99) for part in ("attention", "MLP", "output")]
    states = tuple(StateAgreement(place, d, d) for place, d in zip(places, differences, strict=False))
    return Agreement(8, 1.0, 0.5, 0.1, 0.2, (), states)


def test_rounding_that_grows_is_no_divergence():
    growing = [1e-7 * 1.3**i for i in range(60)]
    assert growing[-1] > 0.1
    assert agreement(growing).first_divergence() is None
    for at in (0, 5, 31, 40):
        stepped = [d * (1000 if i >= at else 1) for i, d in enumerate(growing)]
        if stepped[at] > 1e-5:  # at 0, one ten-thousandth is rounding
            assert agreement(stepped).first_divergence() == agreement(stepped).states[at]
    assert agreement([1e-7, float("nan"), 1]).first_divergence().place == Place.of_layer(0, "MLP")


def test_measures_are_those_of_a_definition_written_out():
    draw = torch.Generator().manual_seed(5)
    expected, actual = torch.randn(6, 11, generator=draw), torch.randn(6, 11, generator=draw)
    a, b = torch.randn(6, 4, generator=draw), torch.randn(6, 4, generator=draw)
    place = Place.of_layer(0, "MLP")
    found = Agreement.of(expected, actual, [3, 1, 4, 1, 5, 9], ({place: a}, {place: b}))
    by_position = [(expected[t] - actual[t]).abs().max().item() for t in range(6)]
    worst = sorted(range(6), key=lambda t: -by_position[t])[:5]
    assert [token.position for token in found.worst] == worst
    for token in found.worst:
        t = token.position
        assert token.token == [3, 1, 4, 1, 5, 9][t] and token.label == [1, 4, 1, 5, 9, None][t]
        assert (token.expected, token.actual) == (expected[t].argmax().item(), actual[t].argmax().item())
        assert token.difference == pytest.approx(by_position[t])
        p, q = expected[t].double().softmax(0), actual[t].double().softmax(0)
        assert token.kl == pytest.approx((p * (p / q).log()).sum().item())
    relative = [((b[t] - a[t]).pow(2).sum() / a[t].pow(2).sum()).sqrt().item() for t in range(6)]
    assert found.states[0].difference == pytest.approx(max(relative))
    assert found.states[0].at_first == pytest.approx(relative[0])
    assert [str(state.place) for state in found.states] == ["layer 0, MLP", "logits"]


def test_many_layers_are_shown_around_the_first_that_differs():
    report = "\n".join(report_lines(agreement([1e-7] * 60 + [0.5] * 40), 1e-4, str))
    shown = [line.split()[1] for line in report.splitlines() if line.startswith("layer ")]
    assert shown == ["18", "19", "20", "21", "22"]
    assert "(29 layers not shown)" in report
    assert report.splitlines()[-1].startswith("first divergence: layer 20, attention (input_layernorm")
