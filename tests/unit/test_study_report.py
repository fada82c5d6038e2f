"""The committed reports of the studies: their code makes them of the committed results, and pages quote them."""

import json
import re
import shutil

import pytest
from launching import REPOSITORY

from examples.study.report import write_report

STUDY = REPOSITORY / "examples/study"
# A study's file, and where its results lie -> the pictures of its report.
REPORTS = {
    ("study.toml", "."): ("rule.png", "noise.png", "forgetting.png", "trust.png"),
    ("real.toml", "real-results"): ("results.png",),
}


@pytest.mark.slow
@pytest.mark.parametrize(("file", "folder"), REPORTS)
def test_a_report_is_made_of_the_results(file, folder, tmp_path):
    shutil.copy(STUDY / folder / "results.jsonl", tmp_path)
    write_report(STUDY / file, tmp_path)
    assert (tmp_path / "REPORT.md").read_text() == (STUDY / folder / "REPORT.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == set(REPORTS[file, folder])


@pytest.mark.parametrize(("file", "folder"), REPORTS)
def test_its_pictures_are_there_and_shown(file, folder):
    report = (STUDY / folder / "REPORT.md").read_text()
    for name in REPORTS[file, folder]:
        assert (STUDY / folder / name).stat().st_size > 10_000 and f"]({name})" in report
    assert "runs so far" not in report


@pytest.mark.parametrize("page", ["docs/study.md", "README.md", "examples/study/README.md"])
def test_figures_are_quoted_from_it(page):
    report, text = (STUDY / "REPORT.md").read_text(), (REPOSITORY / page).read_text()
    text, _, of_the_real_model = text.partition("## On a real model")
    real = (STUDY / "real-results" / "REPORT.md").read_text()
    for part, source in ((text, report), (of_the_real_model, real)):
        for figure in re.findall(r"\d+\.\d ± \d+\.\d", part):
            assert figure in source, figure
    for came, asked in re.findall(r"(\d+) of (\d+) came", text):
        assert f"{came} of {asked} came so" in report
    for runs in re.findall(r"(\d+) trainings", text):
        assert f"\n{runs} runs of" in report


def test_the_page_has_the_rows_of_its_models_and_data():
    """Each row of the page's table is of one kind of data and one kind of answer: so are the report's."""
    page, report = (REPOSITORY / "docs/study.md").read_text(), (STUDY / "REPORT.md").read_text()
    page = page[: page.index("## On a real model")]
    rows = re.findall(r"^\| .*\| (likeliest|drawn) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    kinds = ["clean", "random-50", "rule-70", "convention", "unknown"]
    whole = report[report.index("## Every setting") :]
    for place, (answer, cells) in enumerate(rows):
        data = kinds[place // 2]
        for arm, cell in zip(("sft", "dft", "target-sft 0.5"), cells.split(" | ")[1:], strict=True):
            (row,) = re.findall(rf"^\| {data} \| 0.11M \| {arm} \| [^|]* \| (.*) \|$", whole, re.MULTILINE)
            assert row.split(" | ")[0 if answer == "likeliest" else 2].strip() == cell.strip(), (data, arm)


def test_the_page_has_the_rows_of_the_real_model():
    page, report = (REPOSITORY / "docs/study.md").read_text(), (STUDY / "real-results" / "REPORT.md").read_text()
    page = page[page.index("## On a real model") :]
    rows = re.findall(r"^\| .*\| (likeliest|drawn) \| (.*) \|$", page, re.MULTILINE)
    short = report[: report.index("## Wins")]
    whole = report[report.index("## Every setting") :]
    assert len(rows) == 4
    for place, (answer, cells) in enumerate(rows):
        data, likeliest = ["gsm8k-50", "math-50"][place // 2], answer == "likeliest"
        before, *arms = cells.split(" | ")
        said = "likeliest result of right steps" if likeliest else "such a result sampled, T = 1"
        assert f"| {data} | smollm2 | {said} | {before} |" in short
        for arm, cell in zip(("sft", "sft, at T = 0.5", "dft", "target-sft 0.5"), arms, strict=True):
            (row,) = re.findall(rf"^\| {data} \| smollm2 \| {arm} \| [^|]* \| (.*) \|$", whole, re.MULTILINE)
            assert row.split(" | ")[0 if likeliest else 2].strip() == cell.strip(), (data, arm)
    lines = (STUDY / "real-results" / "results.jsonl").read_text().splitlines()
    metrics = [json.loads(line)["metrics"] for line in lines]
    most = max(40 * of[name] for of in metrics for name in ("greedy", "sampled", "sampled 0.5") if name in of)
    assert f"answers {most:.0f} at most" in page
    for arm, said in (("dft", "2.25"), ("sft", "1.02"), ("target-sft 0.5", "1.22")):
        (row,) = re.findall(rf"^\| gsm8k-50 \| smollm2 \| {arm} \| [^|]* \| (.*) \|$", whole, re.MULTILINE)
        assert f"{float(row.split(' | ')[8]):.2f}" == said and said in page
