"""Worked solutions of real problems: their results, one of them corrupted, their answer."""

from __future__ import annotations

import random
import re

_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
_RESULT = re.compile(r"(?:=\s*\$?|\\boxed\{)(\d+(?:,\d{3})*(?:\.\d+)?)")


def results(solution: str) -> list[tuple[int, int]]:
    """(begin, end) of the results in a solution: numbers behind "=" or in \\boxed."""
    return [found.span(1) for found in _RESULT.finditer(solution)]


def corrupt(solution: str, draw: random.Random) -> str | None:
    """A solution in which one result is another number from there on; None where it has no result."""
    found = results(solution)
    if not found:
        return None
    begin, end = draw.choice(found)
    number = solution[begin:end]
    digits = [place for place, character in enumerate(number) if character.isdigit()]
    place = draw.choice(digits)
    first = place == digits[0] and len(digits) > 1
    other = draw.choice([digit for digit in ("123456789" if first else "0123456789") if digit != number[place]])
    changed = number[:place] + other + number[place + 1 :]
    # As a whole number only: 12 is no part of 312 or 12.5.
    rest = re.sub(rf"(?<![\d.,]){re.escape(number)}(?![\d]|[.,]\d)", changed, solution[begin:])
    return solution[:begin] + rest


def answer_of(text: str) -> str:
    """The answer in a solution: of its last \\boxed{...}, or behind its last "####", or its last number."""
    if "\\boxed{" in text:
        rest = text[text.rindex("\\boxed{") + len("\\boxed{") :]
        depth = 1
        for place, character in enumerate(rest):
            depth += {"{": 1, "}": -1}.get(character, 0)
            if depth == 0:
                return rest[:place].strip()
        return rest.strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0]
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def same_answer(given: str, key: str) -> bool:
    """Whether two answers are the same number, or the same text but for blanks, dollars and commas."""
    one, other = (re.sub(r"\\text\{([^{}]*)\}", r"\1", answer) for answer in (given, key))
    one, other = (re.sub(r"[\s$,]|\\[ !,;]", "", answer).rstrip(".") for answer in (one, other))
    try:
        return float(one) == float(other)
    except ValueError:
        return one == other != ""
