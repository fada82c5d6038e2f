"""The committed report of the study: its code makes it of the committed results, and pages quote it."""

import re
import shutil

import pytest
from launching import REPOSITORY

from examples.study.report import write_report

STUDY = REPOSITORY / "examples/study"
PICTURES = ("rule.png", "noise.png", "forgetting.png", "trust.png")


@pytest.mark.slow
def test_the_report_is_made_of_the_results(tmp_path):
    shutil.copy(STUDY / "results.jsonl", tmp_path)
    write_report(STUDY / "study.toml", tmp_path)
    assert (tmp_path / "REPORT.md").read_text() == (STUDY / "REPORT.md").read_text()
    assert {path.name for path in tmp_path.glob("*.png")} == set(PICTURES)


def test_its_pictures_are_there_and_shown():
    report = (STUDY / "REPORT.md").read_text()
    for name in PICTURES:
        assert (STUDY / name).stat().st_size > 10_000 and f"]({name})" in report
    assert "runs so far" not in report


@pytest.mark.parametrize("page", ["docs/study.md", "README.md", "examples/study/README.md"])
def test_figures_are_quoted_from_it(page):
    report, text = (STUDY / "REPORT.md").read_text(), (REPOSITORY / page).read_text()
    for figure in re.findall(r"\d+\.\d ± \d+\.\d", text):
        assert figure in report, figure
    for came, asked in re.findall(r"(\d+) of (\d+) came", text):
        assert f"{came} of {asked} came so" in report
    for runs in re.findall(r"(\d+) trainings", text):
        assert f"\n{runs} runs of" in report


def test_the_page_has_the_rows_of_its_models_and_data():
    """Each row of the page's table is of one kind of data and one kind of answer: so are the report's."""
    page, report = (REPOSITORY / "docs/study.md").read_text(), (STUDY / "REPORT.md").read_text()
    rows = re.findall(r"^\| .*\| (likeliest|drawn) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 9
    kinds = ["clean", "random-50", "rule-70", "convention", "unknown"]
    whole = report[report.index("## Every setting") :]
    for place, (answer, cells) in enumerate(rows):
        data = kinds[place // 2]
        for arm, cell in zip(("sft", "dft", "target-sft 0.5"), cells.split(" | ")[1:], strict=True):
            (row,) = re.findall(rf"^\| {data} \| 0.11M \| {arm} \| [^|]* \| (.*) \|$", whole, re.MULTILINE)
            assert row.split(" | ")[0 if answer == "likeliest" else 2].strip() == cell.strip(), (data, arm)
