"""Teachers in fine-tuning: on every schedule, of any depth and vocabulary, from a checkpoint, the student itself."""

import shutil

import pytest
import transformers
from finetune_runs import run_tool, write_data, write_models
from launching import run_ranks
from layout_runs import DISTRIBUTED_OPTIMIZER, SEQUENCE_PARALLEL, assert_layouts, assert_same_training, launch, pp, tp
from safetensors import safe_open

from qtarget_megatron.data import load_tokenizer

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

VIRTUAL = [*pp(2), "--num-layers-per-virtual-pipeline-stage", 1]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("teachers")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    student = transformers.AutoConfig.from_pretrained(folder / "untied").vocab_size
    resize(folder, "deep", "larger", student + 60)
    resize(folder, "larger", "cut", student)
    resize(folder, "deep", "smaller", len(load_tokenizer(folder / "untied")))
    for of_rank in run_ranks(2, import_all, (str(folder), ("odd", "larger")), timeout=120, megatron=True):
        for code, printed in of_rank:
            assert code == 0, printed[-3000:]
    shutil.copytree(folder / "odd", folder / "odd-without-weights")
    (folder / "odd-without-weights" / "model.safetensors").unlink()
    return folder


def import_all(folder, names):
    """What convert_hf says of each model, to be NAME-megatron."""
    return [
        run_tool(
            "convert_hf", ["import", "--hf-model", f"{folder}/{name}", "--save", f"{folder}/{name}-megatron", *tp(2)]
        )
        for name in names
    ]


def resize(folder, source, name, vocab_size):
    """A copy of a model whose embedding has another number of rows; new ones are noise, as padding rows are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / source)
    model.resize_token_embeddings(vocab_size, mean_resizing=False)
    model.save_pretrained(folder / name)
    load_tokenizer(folder / source).save_pretrained(folder / name)


@pytest.fixture(scope="module")
def models(workspace):
    student = ["--hf-model", workspace / "untied", "--sft-train", workspace / "train.jsonl", "--micro-batch-size", 2]
    kd, target = ["--objective", "kd"], ["--objective", "target-sft", "--objective-args", "eta=0.4"]
    return {
        **{
            f"kd {name}": [*student, *kd, "--teacher-hf", workspace / name] for name in ("deep", "larger", "cut", "odd")
        },
        "target-sft smaller": [*student, *target, "--teacher-hf", workspace / "smaller"],
        "asft itself": [*student, "--objective", "asft", "--teacher-hf", workspace / "untied"],
        "sft": [*student, "--objective", "sft"],
        "saved": [*student, *kd, "--teacher-hf", workspace / "odd-without-weights"]
        + ["--teacher-load", workspace / "odd-megatron"],
        "saved larger": [*student, *kd, "--teacher-hf", workspace / "larger"]
        + ["--teacher-load", workspace / "larger-megatron"],
    }


@pytest.fixture(scope="module")
def single(workspace, models):
    whole = [*models["target-sft smaller"], "--qtarget-materialize-logits"]
    return launch(1, {**models, "target-sft smaller whole": whole}, workspace, timeout=200)


def test_a_teachers_rows_beyond_the_students_vocabulary_are_left_out(single):
    assert_same_training(single["kd larger"], single["kd cut"])


def test_a_smaller_teacher_is_the_same_with_whole_logits(single):
    assert_same_training(single["target-sft smaller whole"], single["target-sft smaller"])


def test_the_reference_is_the_student_before_training(single):
    """With the base model's own weights the KL term starts at 0, so that step 1 is dft's; later it pulls back."""
    scalars = single["asft itself"]["scalars"]
    assert scalars["residual mass"] == pytest.approx([0.05] * 4)
    assert scalars["label mass"][0] == pytest.approx(scalars["p(y)"][0])


def test_a_teacher_from_a_megatron_checkpoint_is_that_of_the_directory(single):
    for saved, name in (("saved", "kd odd"), ("saved larger", "kd larger")):
        assert_same_training(single[saved], single[name])
        assert "-megatron/release are what was saved, bit for bit" in single[saved]["printed"]


def test_a_step_reports_time_and_memory_of_the_teacher(workspace, single):
    scalars = single["kd deep"]["scalars"]
    with safe_open(workspace / "deep" / "model.safetensors", "pt") as file:
        weights = sum(file.get_tensor(name).nbytes for name in file.keys())
    # Besides the weights: their padding, and hidden states of one micro-batch.
    assert all(weights <= value * 2**20 <= 1.2 * weights for value in scalars["teacher MiB"])
    assert all(0.1 < value < 60_000 for value in scalars["teacher ms"])
    assert "teacher ms" in single["kd deep"]["printed"]
    assert not any(tag.startswith("teacher") for tag in single["sft"]["scalars"])


def test_interleaved_and_sharded_teachers_train_like_one_process(workspace, models, single):
    two = {
        "kd deep at PP2 in 4 virtual stages": [*models["kd deep"], *VIRTUAL],
        "sft at PP2 in 4 virtual stages": [*models["sft"], *VIRTUAL],
        "asft itself at PP2 in 4 virtual stages": [*models["asft itself"], *VIRTUAL],
        "kd larger at TP2": [*models["kd larger"], *tp(2), *SEQUENCE_PARALLEL],
        "kd odd at PP2": [*models["kd odd"], *pp(2)],
        "saved at PP2 in 4 virtual stages": [*models["saved"], *VIRTUAL],
        "saved at PP2 of 3 layers and 1": [*models["saved"], *pp(2), "--decoder-first-pipeline-num-layers", 3],
    }
    assert_layouts(launch(2, two, workspace, timeout=240), single)
    four = {
        "target-sft smaller at TP2PP2": [*models["target-sft smaller"], *tp(2), *pp(2)],
        "kd larger at TP4": [*models["kd larger"], *tp(4)],
        "saved at TP2DP2": [*models["saved"], *tp(2), *DISTRIBUTED_OPTIMIZER],
        "kd odd at PP4": [*models["kd odd"], *pp(4)],
        "kd deep at TP2PP2 in 4 virtual stages": [*models["kd deep"], *tp(2), *VIRTUAL, *SEQUENCE_PARALLEL],
        "kd deep at TP2PP2 recomputed": [
            *models["kd deep"],
            *tp(2),
            *pp(2),
            *("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1),
        ],
    }
    assert_layouts(launch(4, four, workspace, timeout=300), single)
