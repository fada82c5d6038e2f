"""The study's problems: generators, worked solutions and the checker of answers; a character is a token.

A solution is a line of steps and the answer, "7+6=13;4+8+1=13;0+3+1=4;433". Each problem belongs to one split, by a
hash of its text, whichever seed draws it: what is tested was never trained on, by a base model neither.
"""

from __future__ import annotations

import hashlib
import random
import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

END = "<end>"
ALPHABET = string.digits + string.ascii_letters + "+=;#?>,|&^@:"
# Tenths of all problems.
SPLITS = {"train": 8, "dev": 1, "test": 1}
# The table of "#" that the base models know, and another one: they differ in all of their 100 cases, and in the answers
# of all problems.
RULES: dict[str, Callable[[int, int], int]] = {
    "a": lambda left, right: (left + 3 * right + 1) % 10,
    "b": lambda left, right: (left + 3 * right + 4) % 10,
}


@dataclass(frozen=True)
class Step:
    """What is written of a step, "7+6=", and what follows from it, "13"."""

    question: str
    result: str

    def __str__(self) -> str:
        return self.question + self.result


@dataclass(frozen=True)
class Solution:
    """A worked solution.

    wrong: the numbers of the steps whose result does not follow from their question.
    """

    steps: tuple[Step, ...]
    answer: str
    wrong: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        return ";".join([*map(str, self.steps), self.answer])

    def wrong_characters(self) -> list[tuple[int, int]]:
        """(begin, end) in the text of what is wrong of each wrong result: its last character."""
        found, begin = [], 0
        for number, step in enumerate(self.steps):
            end = begin + len(str(step))
            if number in self.wrong:
                found.append((end - 1, end))
            begin = end + 1
        return found


# How a step's result is spoilt: number of the step, the right result -> what is written.
Spoil = Callable[[int, str], str]


def _as_it_is(number: int, result: str) -> str:
    return result


@dataclass(frozen=True)
class Task:
    """A kind of problem.

    draw:  a random problem, as text that ends in "?".
    solve: problem, rule and Spoil -> Solution; what is spoilt is carried on, so that later steps follow from it.
    """

    name: str
    draw: Callable[[random.Random], str]
    solve: Callable[[str, str, Spoil], Solution] = field(repr=False)

    def solution(self, problem: str, rule: str = "a", spoil: Spoil = _as_it_is) -> Solution:
        return self.solve(problem, rule, spoil)


class _Steps:
    """Collects steps, spoiling their results on the way."""

    def __init__(self, spoil: Spoil):
        self._spoil, self.steps, self.wrong = spoil, [], []

    def add(self, question: str, result: str) -> str:
        written = self._spoil(len(self.steps), result)
        if written != result:
            self.wrong.append(len(self.steps))
        self.steps.append(Step(question, written))
        return written

    def end(self, answer: str) -> Solution:
        return Solution(tuple(self.steps), answer, tuple(self.wrong))


def _draw_sum(draw: random.Random) -> str:
    return (
        "+".join(str(draw.randrange(10 ** (length - 1), 10**length)) for length in draw.choices(range(2, 6), k=2)) + "?"
    )


def _solve_sum(problem: str, rule: str, spoil: Spoil) -> Solution:
    """Digit by digit from the right; a step's last digit is the sum's, the one before it the carry."""
    left, right = (part[::-1] for part in problem[:-1].split("+"))
    steps, carry, digits = _Steps(spoil), "", ""
    for place in range(max(len(left), len(right))):
        terms = [number[place] if place < len(number) else "0" for number in (left, right)]
        terms += [carry] if carry == "1" else []
        written = steps.add("+".join(terms) + "=", str(sum(map(int, terms))))
        digits, carry = written[-1] + digits, written[:-1]
    return steps.end(carry + digits)


def _draw_table(draw: random.Random) -> str:
    return "#".join(str(draw.randrange(10)) for _ in range(draw.randint(4, 6))) + "?"


def _solve_table(problem: str, rule: str, spoil: Spoil) -> Solution:
    """From the left, each step by the table of the rule."""
    first, *others = problem[:-1].split("#")
    steps, value = _Steps(spoil), first
    for other in others:
        value = steps.add(f"{value}#{other}=", str(RULES[rule](int(value), int(other))))
    return steps.end(value)


def _draw_walk(draw: random.Random) -> str:
    nodes = draw.sample(string.ascii_lowercase, 5)
    arrows = [f"{node}>{draw.choice([other for other in nodes if other != node])}" for node in nodes]
    return f"{','.join(arrows)}|{draw.choice(nodes)}{draw.randint(2, 5)}?"


def _solve_walk(problem: str, rule: str, spoil: Spoil) -> Solution:
    """Along the arrows, as many steps as the problem says."""
    arrows, start = problem[:-1].split("|")
    following = dict(arrow.split(">") for arrow in arrows.split(","))
    steps, node = _Steps(spoil), start[0]
    for _ in range(int(start[1:])):
        node = steps.add(f"{node}>", following[node])
    return steps.end(node)


def _draw_logic(draw: random.Random) -> str:
    pieces = [draw.choice("TF")]
    for _ in range(draw.randint(3, 6)):
        pieces += [draw.choice("&|^"), draw.choice("TF")]
    return "".join(pieces) + "?"


def _solve_logic(problem: str, rule: str, spoil: Spoil) -> Solution:
    """From the left, without precedence."""
    steps, value = _Steps(spoil), problem[0]
    for position in range(1, len(problem) - 1, 2):
        sign, other = problem[position : position + 2]
        bits = {value == "T", other == "T"}
        result = {"&": bits == {True}, "|": True in bits, "^": len(bits) == 2}[sign]
        value = steps.add(f"{value}{sign}{other}=", "T" if result else "F")
    return steps.end(value)


def _draw_sort(draw: random.Random) -> str:
    return "@" + "".join(draw.sample(string.digits, draw.randint(3, 5))) + "?"


def _solve_sort(problem: str, rule: str, spoil: Spoil) -> Solution:
    """The least of the rest, step by step."""
    rest, steps, found = problem[1:-1], _Steps(spoil), ""
    while rest:
        least = steps.add(f"{rest}:", min(rest))
        # A least that is not there takes the place of the one that is.
        found, rest = found + least, rest.replace(least if least in rest else min(rest), "", 1)
    return steps.end(found)


TASKS = {
    task.name: task
    for task in (
        Task("sum", _draw_sum, _solve_sum),
        Task("table", _draw_table, _solve_table),
        Task("walk", _draw_walk, _solve_walk),
        Task("logic", _draw_logic, _solve_logic),
        Task("sort", _draw_sort, _solve_sort),
    )
}
# Those that the base models are trained on, each with its share.
KNOWN = {"sum": 0.35, "table": 0.25, "walk": 0.2, "logic": 0.2}


def is_new(left: int, right: int) -> bool:
    """Whether a case of the table is one of the ten that the base models have never seen."""
    return (3 * left + 7 * right) % 10 == 0


def is_known(problem: str) -> bool:
    """Whether base models are trained on problems like this one: on those of the table without a new case."""
    if "#" not in problem:
        return True
    steps = TASKS["table"].solution(problem).steps
    return not any(is_new(*map(int, step.question[:-1].split("#"))) for step in steps)


def split_of(problem: str) -> str:
    """The split that a problem belongs to."""
    place = int.from_bytes(hashlib.sha256(problem.encode()).digest()[:8]) % sum(SPLITS.values())
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    raise AssertionError


def problems(task: Task, split: str, seed: int | str) -> Iterator[str]:
    """Endless different problems of a split; the same for the same seed."""
    draw, seen = random.Random(f"{task.name} {split} {seed}"), set()
    misses = 0
    while misses < 1000:
        problem = task.draw(draw)
        if problem in seen or split_of(problem) != split:
            misses += 1
            continue
        misses = 0
        seen.add(problem)
        yield problem
    raise ValueError(f"{task.name}: {len(seen)} different problems of {split} were found, and more were asked for")


@dataclass(frozen=True)
class Condition:
    """How the demonstrations of a task come about.

    wrong_steps: the share of demonstrations with one wrong step, at random.
    wrong_rule:  the share of demonstrations that follow rule b throughout.
    key:         the rule by which answers are right.
    dev, test:   numbers of problems that are asked afterwards.
    """

    task: str
    wrong_steps: float = 0.0
    wrong_rule: float = 0.0
    key: str = "a"
    dev: int = 200
    test: int = 500

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r}: expected one of {', '.join(TASKS)}")
        if self.task == "walk" and self.wrong_steps:
            raise ValueError("task 'walk': its steps cannot be spoilt, as an arrow may lead nowhere")
        if self.key not in RULES:
            raise ValueError(f"key {self.key!r}: expected one of {', '.join(RULES)}")
        for name in ("dev", "test"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 problem or more, got {getattr(self, name)}")
        for name in ("wrong_steps", "wrong_rule"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}")

    def demonstrations(self, count: int, seed: int | str) -> list[dict[str, Any]]:
        """Training records.

        prompt, completion: what is trained.
        wrong:              (begin, end) of the completion's characters that are wrong by the rule that the bases know.
        """
        task, draw = TASKS[self.task], random.Random(f"demonstrations {seed}")
        drawn = islice(problems(task, "train", seed), count)
        return [self._demonstration(task, problem, draw) for problem in drawn]

    def _demonstration(self, task: Task, problem: str, draw: random.Random) -> dict[str, Any]:
        rule = "b" if draw.random() < self.wrong_rule else "a"
        solution = task.solution(problem, rule)
        wrong = solution.wrong_characters()
        if rule == "b":
            everything = Solution(solution.steps, solution.answer, tuple(range(len(solution.steps))))
            wrong = everything.wrong_characters()
        elif draw.random() < self.wrong_steps:
            spoilt = draw.randrange(len(solution.steps))
            solution = task.solution(problem, rule, lambda n, result: _other(result, draw) if n == spoilt else result)
            wrong = solution.wrong_characters()
        return {"prompt": problem, "completion": solution.text, "wrong": wrong}

    def answers(self, problem: str) -> dict[str, str]:
        """The answer by each rule."""
        return {rule: TASKS[self.task].solution(problem, rule).answer for rule in RULES}


def _other(result: str, draw: random.Random) -> str:
    """A result of the same kind with another last character."""
    kinds = (string.digits, "TF", string.ascii_lowercase)
    kind = next(kind for kind in kinds if result[-1] in kind)
    return result[:-1] + draw.choice([character for character in kind if character != result[-1]])


def answer_of(text: str) -> str:
    """The answer in a generated solution: what stands behind its last semicolon."""
    return text.rsplit(";", 1)[-1]
