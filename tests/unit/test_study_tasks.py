"""The study's problems: solutions against arithmetic of their own, wrong steps, splits, and what a seed fixes."""

from __future__ import annotations

import random
import re
from itertools import islice

import pytest

from examples.study.conditions import critical
from examples.study.real import RealProblems
from examples.study.solutions import answer_of, corrupt, same_answer
from examples.study.tasks import ALPHABET, KNOWN, RULES, TASKS, Condition, is_known, is_new, problems, split_of
from examples.study.tasks import answer_of as made_up_answer
from examples.study.tokenizer import VOCABULARY_SIZE, character_tokenizer


def drawn(name, count=200, seed=1):
    return list(islice(problems(TASKS[name], "train", seed), count))


# ---- solutions


def test_sums_are_sums():
    for problem in drawn("sum"):
        left, right = map(int, problem[:-1].split("+"))
        assert TASKS["sum"].solution(problem).answer == str(left + right)


def test_a_sum_by_hand():
    assert TASKS["sum"].solution("47+386?").text == "7+6=13;4+8+1=13;0+3+1=4;433"


def test_tables_follow_their_rule():
    for problem in drawn("table"):
        numbers = [int(number) for number in problem[:-1].split("#")]
        for rule, constant in (("a", 1), ("b", 4)):
            value = numbers[0]
            for number in numbers[1:]:
                value = (value + 3 * number + constant) % 10
            assert TASKS["table"].solution(problem, rule).answer == str(value)


def test_the_two_rules_differ_in_every_case():
    cases = [(left, right) for left in range(10) for right in range(10)]
    assert all(RULES["a"](*case) != RULES["b"](*case) for case in cases) and len(cases) == 100


def test_walks_end_where_the_arrows_lead():
    for problem in drawn("walk"):
        arrows, start = problem[:-1].split("|")
        node = start[0]
        for _ in range(int(start[1:])):
            node = re.search(f"{node}>(.)", arrows).group(1)
        assert TASKS["walk"].solution(problem).answer == node


def test_logic_is_python_s():
    for problem in drawn("logic"):
        value = problem[0] == "T"
        for sign, other in re.findall("([&|^])([TF])", problem):
            value = eval(f"{value} {sign} {other == 'T'}")
        assert TASKS["logic"].solution(problem).answer == "FT"[value]


def test_the_answers_of_a_problem_differ_by_rule():
    for problem in drawn("table"):
        answers = Condition("table").answers(problem)
        assert answers["a"] != answers["b"]


def test_bases_never_see_ten_cases_of_the_table():
    new = [(left, right) for left in range(10) for right in range(10) if is_new(left, right)]
    assert len(new) == 10
    for problem in drawn("table"):
        seen = re.findall(r"(\d)#(\d)=", TASKS["table"].solution(problem).text)
        assert is_known(problem) == (not any((int(left), int(right)) in new for left, right in seen))
    assert all(is_known(problem) for name in ("sum", "walk", "logic") for problem in drawn(name, 20))
    # Demonstrations have them.
    assert not all(is_known(record["prompt"]) for record in Condition("table").demonstrations(50, 0))


def test_sorting_sorts():
    for problem in drawn("sort"):
        assert TASKS["sort"].solution(problem).answer == "".join(sorted(problem[1:-1]))


@pytest.mark.parametrize("name", TASKS)
def test_a_solution_is_written_in_the_tokenizer_s_characters(name):
    tokenizer = character_tokenizer()
    for problem in drawn(name, 20):
        text = problem + TASKS[name].solution(problem).text
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text and len(ids) == len(text) and max(ids) < VOCABULARY_SIZE - 1
        assert set(text) <= set(ALPHABET)
        assert made_up_answer(TASKS[name].solution(problem).text) == TASKS[name].solution(problem).answer


# ---- demonstrations


def right_steps(record):
    """Whether each step of a sum follows from the digits before its sign."""
    steps = record["completion"].split(";")[:-1]
    return [sum(map(int, question.split("+"))) == int(result) for question, result in (s.split("=") for s in steps)]


def test_a_wrong_step_is_one_and_is_carried_on():
    records = Condition("sum", wrong_steps=0.5).demonstrations(600, 3)
    wrong = [record for record in records if record["wrong"]]
    # Five standard deviations of a share of 600.
    assert abs(len(wrong) / 600 - 0.5) < 0.1
    for record in records:
        right = right_steps(record)
        assert right.count(False) == len(record["wrong"]) <= 1
        steps, answer = record["completion"].split(";")[:-1], record["completion"].split(";")[-1]
        results = [step.split("=")[1] for step in steps]
        # The answer is what the written results make, and each step takes the carry of the one before.
        assert answer == results[-1][:-1] + "".join(result[-1] for result in reversed(results))
        for step, before in zip(steps[1:], results, strict=False):
            assert (step.split("=")[0].count("+") == 2) == (len(before) == 2)
        for begin, end in record["wrong"]:
            number = right.index(False)
            assert record["completion"][begin:end] == results[number][-1]
            assert record["completion"][:begin].count(";") == number and record["completion"][end] == ";"
            # The rest of the result is as it was.
            question = steps[number].split("=")[0]
            assert str(sum(map(int, question.split("+"))))[:-1] == results[number][:-1]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_wrong_rule_is_followed_throughout(share):
    records = Condition("table", wrong_rule=share).demonstrations(400, 5)
    by_b = [record for record in records if record["wrong"]]
    assert abs(len(by_b) / 400 - share) < 5 * (share * (1 - share) / 400) ** 0.5 + 1e-9
    for record in records:
        rule = "b" if record["wrong"] else "a"
        assert record["completion"] == TASKS["table"].solution(record["prompt"], rule).text
        results = [step.split("=")[1] for step in record["completion"].split(";")[:-1]]
        assert [record["completion"][b:e] for b, e in record["wrong"]] == (results if record["wrong"] else [])


def test_the_same_seed_gives_the_same_demonstrations():
    one, same, other = (Condition("sum", wrong_steps=0.3).demonstrations(50, seed) for seed in (1, 1, 2))
    assert one == same != other
    assert len({record["prompt"] for record in one}) == 50


def test_what_is_tested_is_never_trained_on():
    for name in KNOWN:
        by_split = {split: set(islice(problems(TASKS[name], split, 0), 150)) for split in ("train", "dev", "test")}
        by_split["other seed"] = set(drawn(name, 150, seed=9))
        assert not (by_split["test"] | by_split["dev"]) & (by_split["train"] | by_split["other seed"])
        assert not by_split["test"] & by_split["dev"]
        assert all(split_of(problem) == "train" for problem in by_split["other seed"])


def test_running_out_of_problems_is_said():
    with pytest.raises(ValueError, match="logic: .* different problems of test were found, and more were asked for"):
        list(islice(problems(TASKS["logic"], "test", 0), 10**6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": "adding"}, "task 'adding': expected one of sum"),
        ({"task": "sum", "key": "c"}, "key 'c': expected one of a, b"),
        ({"task": "sum", "wrong_steps": 1.5}, "wrong_steps: expected a share from 0 to 1, got 1.5"),
        ({"task": "walk", "wrong_steps": 0.5}, "task 'walk': its steps cannot be spoilt"),
    ],
)
def test_conditions_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Condition(**values)


def test_critical_tokens_are_results_and_the_answer():
    text = TASKS["sum"].solution("47+386?").text
    marked = "".join(c for c, is_critical in zip(text, critical(text), strict=False) if is_critical)
    assert marked == "13;" + "13;" + "4;" + "433" and len(critical(text)) == len(text) + 1 and critical(text)[-1]


# ---- real problems


@pytest.mark.parametrize(
    ("solution", "answers"),
    [
        ("He has 3 + 4 = 7 apples.\nSo 7 * 2 = 14 in all.\n#### 14", r"#### \d+"),
        ("That is $1,200 - $200 = $1,000.\nHalf is 1,000 / 2 = $500.\n#### 500", r"#### \d+"),
        ("$x = 12.5$, so $2x = 25$ and the answer is $\\boxed{25}$.", r"\\boxed\{\d+\}"),
        ("It spans $360/12=30$ degrees, so $30\\cdot 4 = \\boxed{120}$ degrees.", r"\\boxed\{\d+\}"),
    ],
)
def test_one_result_is_corrupted_and_used_from_there_on(solution, answers):
    for seed in range(50):
        spoilt = corrupt(solution, random.Random(seed))
        before, after = (re.findall(r"\d[\d,.]*\d|\d", text) for text in (solution, spoilt))
        changed = {(one, other) for one, other in zip(before, after, strict=True) if one != other}
        assert len(changed) == 1, (solution, spoilt)
        ((one, other),) = changed
        first = next(place for place, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1])
        # Nothing of that number is left behind the place, and the rest is as it was.
        assert one not in after[first:] and before[:first] == after[:first]
        assert re.sub(r"\d", "0", spoilt) == re.sub(r"\d", "0", solution)
        assert not (len(other) > 1 and other[0] == "0" and one[0] != "0")
        assert re.search(answers, spoilt)


def test_a_solution_without_a_result_is_left():
    assert corrupt("It is obvious.\n#### 3", random.Random(0)) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So 3 + 4 = 7\n#### 7", "7"),
        ("#### 1\nno, rather\n#### 1,234", "1,234"),
        ("Therefore $\\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"),
        ("first \\boxed{1}, then \\boxed{2^{3}}", "2^{3}"),
        ("It makes 5 and then 12.50 dollars", "12.50"),
        ("no number", ""),
        ("\\boxed{unclosed", "unclosed"),
    ],
)
def test_the_answer_of_a_text(text, answer):
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("given", "key", "same"),
    [
        ("1,234", "1234", True),
        ("$7", "7.0", True),
        ("7.", "7", True),
        ("\\frac{1}{2}", "\\frac{1} {2}", True),
        ("\\frac{1}{2}", "\\frac{1}{3}", False),
        ("", "7", False),
        ("", "", False),
        ("17", "7", False),
        ("east", "\\text{east}", True),
        ("\\text{west}", "\\text{east}", False),
    ],
)
def test_answers_are_compared_as_numbers_or_text(given, key, same):
    assert same_answer(given, key) == same


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "aime"}, "source: expected gsm8k or math, got 'aime'"),
        ({"source": "math", "wrong": 2}, "wrong: expected a share"),
    ],
)  # fmt: skip
def test_real_problems_that_cannot_be_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        RealProblems(**values)


def test_splits_of_real_problems_are_disjoint_and_corruption_keeps_them(monkeypatch, tmp_path):
    import json

    from examples.study import real

    made = [
        {
            "id": f"made-{number}",
            "messages": [
                {"role": "user", "content": f"What is {number} + 1?"},
                {"role": "assistant", "content": f"{number} + 1 = {number + 1}\n#### {number + 1}"},
            ],
        }
        for number in range(100)
    ]
    monkeypatch.setattr(real, "_records", lambda source: made)
    clean, half = (RealProblems("gsm8k", wrong=share, train=60, dev=10, test=20) for share in (0.0, 0.5))
    splits = {name: {record["id"] for record in half.split(name)} for name in real.SPLITS}
    assert sum(map(len, splits.values())) == len(set.union(*splits.values())) == 90
    assert [record["id"] for record in clean.split("test")] == [record["id"] for record in half.split("test")]

    lines = {}
    for name, problem in (("clean", clean), ("half", half), ("again", half)):
        path = problem.write_training(tmp_path / f"{name}.jsonl", None, 0, seed=len(name))
        lines[name] = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines["half"] == lines["again"]
    assert (
        not any(line["wrong"] for line in lines["clean"]) and 15 <= sum(line["wrong"] for line in lines["half"]) <= 45
    )
    for right, spoilt in zip(lines["clean"], lines["half"], strict=True):
        assert right["id"] == spoilt["id"] and (right["messages"] != spoilt["messages"]) == spoilt["wrong"]
    with pytest.raises(ValueError, match="gsm8k has 100 problems, and 600 are asked for"):
        RealProblems("gsm8k", train=500, dev=50, test=50).split("dev")
