"""Objectives by name: parameters, words of the command line, what a registered one may not be, and a user's own."""

import math

import pytest
import torch
from loss_definitions import Case
from objective_runs import check, draw

from qtarget_megatron import Objective, objectives, qtarget_cross_entropy
from qtarget_megatron.objectives import registry as registry_module

every_backend = pytest.mark.parametrize("backend", ["reference", "cpp"])


@pytest.fixture
def registry(monkeypatch):
    """Registrations of one test only."""
    monkeypatch.setattr(registry_module, "_REGISTRY", dict(registry_module._REGISTRY))


def test_names_treat_dashes_underscores_and_case_alike():
    expected = str(objectives.target_sft(eta=0.25))
    for name in ("target-sft", "target_sft", "Target-SFT"):
        assert str(objectives.get(name, eta=0.25)) == expected == "target-sft(eta=0.25)"
    assert objectives.names() == sorted(objectives.names())


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("nll", {}, r"unknown objective 'nll'.*dft.*kd.*label-smoothing.*sft.*target-sft"),
        ("target-sft", {"etta": 1}, r"'target-sft' has no parameter 'etta'.*eta"),
        ("sft", {"lam": 1}, r"'sft' has no parameter 'lam'.*none"),
        ("label-smoothing", {"lam": 1.5}, r"lam must be a number in \[0, 1\], got 1.5"),
        ("label-smoothing", {"lam": -0.1}, r"lam must be a number in \[0, 1\], got -0.1"),
        ("target-sft", {"eta": "half"}, r"eta must be a number in \[0, 1\], got 'half'"),
        ("target-sft", {"eta": math.nan}, r"eta must be .* got nan"),
        ("target-sft", {"eta": True}, r"eta must be .* got True"),
        ("kd", {"temperature": 0}, r"temperature must be a number in \(0, inf\), got 0"),
        ("kd", {"temperature": math.inf}, r"temperature must be .* got inf"),
        ("beyond-log", {}, r"'beyond-log' needs the parameter 'alpha'"),
        ("beyond-log", {"alpha": math.inf}, r"alpha must be a number in .* got inf"),
        ("profit", {"tau": 1.1}, r"tau must be a number in \[0, 1\], got 1.1"),
        ("eaft", {"k": 1}, r"k must be a whole number of logits, 2 or more, got 1"),
        ("eaft", {"k": 20.0}, r"k must be .* got 20.0"),
        ("eaft", {"normalizer": 0}, r"normalizer must be .* got 0"),
        ("cft", {"denominator": "some"}, r"denominator must be 'all' or 'critical', got 'some'"),
        ("sft-kl", {}, r"'sft-kl' needs the parameter 'lam'"),
        ("sft-kl", {"lam": -0.1}, r"lam must be a number in \[0, inf\), got -0.1"),
        ("asft", {"lam": -1}, r"lam must be"),
        ("hybrid-kd", {"lam": 1.5}, r"lam must be a number in \[0, 1\], got 1.5"),
        ("psft", {"epsilon_high": -0.1}, r"epsilon_high must be"),
        ("psft", {"refresh": 2.0}, r"refresh must be a whole number of steps, or 0, got 2.0"),
        ("psft", {"refresh": -1}, r"refresh must be a whole number"),
        ("psft", {"epsilon_low": 1.5}, r"epsilon_low must be a number in \[0, 1\]"),
        ("gem", {"beta": 0}, r"beta must be a number in \(0, inf\), got 0"),
        ("gem", {"h": "logsigmoid"}, r"gem\(h='logsigmoid'\) is not available: its residual"),
        ("gem", {"h": "tanh"}, r"gem\(h='tanh'\) is not available: expected 'linear'"),
        ("gem-logsigmoid", {}, r"'gem-logsigmoid' is not available: its residual"),
        ("reverse-kl", {"lam": 1.5}, r"lam must be a number in \[0, 1\], got 1.5"),
        ("mixed-kl", {"alpha": -0.1}, r"alpha must be a number in \[0, 1\]"),
        ("jsd", {"beta": 2}, r"beta must be a number in \[0, 1\], got 2"),
        ("cadft", {}, r"'cadft' is not available: .* z-score .* whole global batch"),
        ("paft", {}, r"'paft' is not available: it .*rationales"),
        ("infosft", {"p_bar": 0.5}, r"p_bar must be a number in \(0.5, 1\), got 0.5"),
        ("pear", {"level": "word"}, r"level must be 'token', 'block' or 'sequence', got 'word'"),
        ("pear", {"block": 0}, r"block must be a whole number of tokens, 1 or more, got 0"),
        ("wit", {"prompt": 0, "response": 0}, r"must not both be 0"),
        ("gkd", {}, r"'gkd' is not available: it is jsd on the student's own answers"),
        ("skew-kl", {"alpha": 1}, r"alpha must be below 1, where the loss is 0 whatever the model does"),
        ("skew-reverse-kl", {"alpha": 1.0}, r"alpha must be below 1"),
        ("total-variation", {"lam": "half"}, r"lam must be a number in \[0, 1\], got 'half'"),
        ("gift", {"beta": -1}, r"beta must be"),
        ("focal", {"gamma": -1}, r"gamma must be"),
        ("talr", {"tau": 0}, r"tau must be"),
        ("poly1", {"epsilon": -2}, r"epsilon must be"),
        ("entropy-mask", {"threshold": 1, "keep": "some"}, r"keep must be 'high' or 'low', got 'some'"),
    ],
)
def test_wrong_parameters_are_refused_by_name(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        objectives.get(name, **parameters)


def test_a_missing_parameter_is_named(registry):
    @objectives.register("power")
    def power(alpha: float) -> Objective:
        return objectives.sft()

    with pytest.raises(ValueError, match="'power' needs the parameter 'alpha'.*alpha=VALUE"):
        objectives.get("power")
    assert objectives.get("power", alpha=2.0).parameters == (("alpha", 2.0),)


def test_command_line_words_become_parameters(registry):
    assert objectives.from_arguments("target-sft", ["eta=0.25"]).residuals == ((0.75, 0.25),)
    assert objectives.from_arguments("dft", []).name == "dft"
    received = {}

    @objectives.register("literal")
    def literal(number: int = 0, flag: bool = False, text: str = "") -> Objective:
        received.update(number=number, flag=flag, text=text)
        return objectives.sft()

    objectives.from_arguments("literal", ["number=3", "flag=True", "text=a=b"])
    assert received == {"number": 3, "flag": True, "text": "a=b"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["eta"], "KEY=VALUE, got 'eta'"),
        (["=0.5"], "KEY=VALUE, got '=0.5'"),
        (["eta=0.5", "eta=0.6"], "'eta' is given twice"),
        (["eta=__import__('os')"], "eta must be a number .* got"),
        (["etta=1"], "has no parameter 'etta'"),
    ],
)
def test_wrong_command_line_words_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        objectives.from_arguments("target-sft", words)


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="'target-sft' is registered already"):
        objectives.register("target_sft")(lambda: objectives.sft())


@pytest.mark.parametrize(
    ("residuals", "message"),
    [
        (((1.0, 0.0),) * 3, "at most 2 residuals, got 3"),
        (((1.0,),), "pair of finite numbers"),
        (((math.inf, 0.0),), "pair of finite numbers"),
    ],
)
def test_wrong_residuals_are_refused(residuals, message):
    with pytest.raises(ValueError, match=message):
        Objective(lambda stats, inputs: None, residuals=residuals)


@every_backend
def test_a_users_objective_works_through_the_loss(registry, backend):
    @objectives.register("unlikelihood-of-doubt")
    def unlikelihood(threshold: float = 0.01) -> Objective:
        """Pushes away the labels that the model holds for nearly impossible."""

        def evaluate(stats, inputs):
            weight = torch.where(stats.p >= threshold, 1.0, -0.5).double()
            return stats.weighted_nll(weight), weight, ()

        return Objective(evaluate)

    def definition(z, y, t, x):
        log_p = torch.log_softmax(z, -1).gather(-1, y[:, None])[:, 0]
        return torch.where(log_p.exp() >= 0.01, -log_p, 0.5 * log_p)

    case = Case("", objectives.get("unlikelihood-of-doubt"), definition)
    _, gradient = check(case, *draw(), backend)
    assert (gradient != 0).any(-1).all()


def test_a_denominator_is_one_of_the_token_inputs():
    with pytest.raises(ValueError, match="denominator 'weight' must be 'label_mass' or one of the token_inputs"):
        Objective(lambda stats, inputs: None, denominator="weight")


@pytest.mark.parametrize("top_k", [-1, 2.5, True])
def test_a_wrong_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match="top_k must be a whole number"):
        Objective(lambda stats, inputs: None, top_k=top_k)


def test_an_objective_with_the_wrong_number_of_masses_is_named():
    def evaluate(stats, inputs):
        return stats.log_p, stats.p, ()

    objective = Objective(evaluate, residuals=((0.0, 0.0),))
    with pytest.raises(ValueError, match="has 1 residual.* returned 0 residual mass"):
        qtarget_cross_entropy(torch.zeros(1, 3), torch.tensor([0]), objective=objective)
