"""The benchmark's conversions: what is measured is a conversion, and the report shows it."""

import shutil
from dataclasses import asdict

import pytest
import torch
import transformers
from launching import run_ranks

from tools.benchmarking import convert, figures, report
from tools.benchmarking.workers import MeasurementFailed

TINY = convert.Shape(512, 64, 128, 2, 4, 2, 64)


def test_the_default_shape_is_that_of_a_model_of_3_gb():
    config = transformers.Qwen2Config(**asdict(convert.Shape()), tie_word_embeddings=True)
    with torch.device("meta"):
        values = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    assert 3.0e9 < 2 * values < 3.2e9
    # Without norms and biases.
    assert convert.Shape().nbytes == pytest.approx(2 * values, rel=1e-3)


def test_too_small_a_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real._replace(free=5e9))
    convert.check_disk(tmp_path, TINY)
    with pytest.raises(MeasurementFailed, match=r"has 5.0 GB left and 9.9 GB are needed"):
        convert.check_disk(tmp_path, convert.Shape())


def measured(folder: str) -> list[dict]:
    return convert.measure(say=lambda line: None, folder=folder, tensor_parallel=2, pipeline_parallel=1, rounds=2)


@pytest.mark.slow
@pytest.mark.distributed
def test_conversions_are_measured_on_every_rank_and_leave_nothing(tmp_path):
    convert.write(say=lambda line: None, folder=str(tmp_path), shape=asdict(TINY))
    by_rank = run_ranks(2, measured, (str(tmp_path),), 200, megatron=True)
    for rows in by_rank:
        assert [row["way"] for row in rows] == ["read", "import", "export"]
        for row in rows:
            assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
            assert row["model_bytes"] == 2 * row["shard_bytes"] >= TINY.nbytes
            assert row["resident_bytes"] is None or row["resident_bytes"] >= 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "small"]


def test_the_report_shows_speed_and_memory_by_layout():
    seconds = [2.0, 4.0, 3.0]
    row = dict(tensor_parallel=2, pipeline_parallel=1, threads=1, seconds=seconds, model_bytes=6 * 10**9)
    row |= dict(shard_bytes=[100 * 2**20, 200 * 2**20], resident_bytes=[150 * 2**20, 260 * 2**20])
    rows = [row | figures.summary(seconds) | dict(way=way) for way in convert.WAYS]
    rows.append(rows[0] | dict(pipeline_parallel=2, resident_bytes=[None, None]))
    lines = [line for line in report.convert(rows) if line.startswith("| TP")]
    assert lines == [
        *(
            f"| TP 2 x PP 1 | 1 | {way} | 3.00 [2.50 to 3.50] | 2.00 | 100, 200 | 150, 260 | 1.50, 1.30 |"
            for way in convert.WAYS
        ),
        "| TP 2 x PP 2 | 1 | read | 3.00 [2.50 to 3.50] | 2.00 | 100, 200 | - | - |",
    ]
