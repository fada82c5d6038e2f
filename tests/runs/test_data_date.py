"""One date for a training whose chat template asks for today's: on every rank, when it resumes, and with a cache."""

import datetime

import pytest
from finetune_runs import COMMON, run_all, run_tool, write_data, write_models
from launching import run_ranks
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import JsonlFile, encode
from qtarget_megatron.teacher_cache import TeacherCache

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

DAY = "2020-02-29"
TEMPLATE = "{{ strftime_now('%d %b %Y') }}\n" + CHATML


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("date")
    write_models(folder)
    write_data(folder / "train.jsonl", 12, seed=1)
    for model in ("tied", "teacher"):
        byte_tokenizer(TEMPLATE, eos="<|im_end|>").save_pretrained(folder / model)
    return folder


def started(results):
    """What the ranks printed of each run, all of which succeeded."""
    for of_rank in results:
        for name, run in of_rank.items():
            assert run["code"] == 0, (name, run["printed"][-3000:])
    return {name: run["printed"] for name, run in results[0].items()}


def test_one_date_for_a_training_its_resumption_and_its_cache(workspace):
    data, cache, saved = workspace / "train.jsonl", workspace / "cache", workspace / "saved"
    words = ["--teacher-hf", workspace / "teacher", "--data", data, "--out", cache, "--k", 4, "--seq-length", 64]
    ((code, printed),) = run_ranks(
        1, run_tool, ("cache_teacher", [*words, "--data-date", DAY]), timeout=120, megatron=True
    )
    assert code == 0 and f"the chat template writes the date of the day: {DAY}" in printed, printed[-3000:]
    # what the teacher read, by rendering the day by hand
    held, tokenizer = TeacherCache(cache), byte_tokenizer("29 Feb 2020\n" + CHATML, eos="<|im_end|>")
    assert held.header.date == DAY
    file = JsonlFile(data)
    for index in range(len(file)):
        sample = encode(tokenizer, file.record(index), 64)
        held.check_sample(index, sample.input_ids, sample.supervised)

    model = ["--hf-model", workspace / "tied", "--sft-train", data]
    kd = [*model, "--objective", "kd", "--teacher-cache", cache]
    runs = {
        "given": [*model, "--data-date", DAY, "--save", saved, "--exit-interval", 2],
        "resumed": [*model, "--save", saved, "--load", saved],
        "whole": [*model, "--data-date", DAY],
        "cached": kd,
        "today": model,
    }
    printed = run_ranks(2, run_all, (runs, str(workspace), [*COMMON, "--tensor-model-parallel-size", 2]), timeout=300,
                        megatron=True)  # fmt: skip
    said, curves = started(printed), printed[1]
    for name in ("given", "resumed", "whole", "cached"):
        assert said[name].count(f"the chat template writes the date of the day: {DAY} ") == 1, said[name][-3000:]
    today = datetime.date.today()
    assert any(f"date of the day: {day} " in said["today"] for day in (today, today - datetime.timedelta(days=1)))
    # the resumed steps are those of the training that was never ended, and another date is another training
    loss = {name: curves[name]["scalars"]["lm loss"] for name in runs}
    assert loss["resumed"][-2:] == pytest.approx(loss["whole"][2:], abs=1e-6)
    assert loss["today"][0] != pytest.approx(loss["whole"][0], abs=1e-6)
    assert "training reads 32 samples of the 12 usable: 2.67 epochs" in said["whole"]
