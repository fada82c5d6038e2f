"""The command plan: what it plans is what Megatron allocates and the loss sends, and it names all that does not fit."""

import json
import re
import subprocess
import sys

import pytest
from launching import REPOSITORY, run_ranks
from plan_runs import run_all, words_of, write_models

from qtarget_megatron.megatron.planning.report import GIB, Plan, Stage

# The first test of a launch waits for all of it.
pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(700)]

DO = "--use-distributed-optimizer"
TP2, PP2 = ["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2]
SP, EP2 = "--sequence-parallel", ["--expert-model-parallel-size", 2]
CP2 = ["--context-parallel-size", 2]
GPT = ["--model-class", "gpt"]
LORA = ["--lora-rank", 8]
FULL = ["--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", 1]
# World size -> case -> (model, words), with a live teacher where the name says so.
CASES = {
    1: {
        "fp32": ("untied", GPT),
        "tied-do": ("tied", [DO]),
        "bf16": ("tied", ["--bf16"]),
        "bf16-do-teacher": ("untied", ["--bf16", DO]),
        "bf16-grads": ("untied", ["--bf16", "--grad-reduce-in-bf16"]),
        "sgd-selective": ("untied", ["--optimizer", "sgd", "--recompute-activations"]),
        "full": ("untied", [*FULL, *GPT]),
        "tied-selective": ("tied", ["--recompute-activations"]),
        "softmax-bf16": ("biases", ["--bf16", "--attention-softmax-in-fp32"]),
        "experts": ("experts", []),
        "experts-bf16": ("experts", ["--bf16"]),
        "experts-full": ("experts", FULL),
        "weighted": ("weighted", []),
        "sinks": ("sinks", []),
        "packed-sinks-bf16": ("sinks", ["--pack", "--bf16"]),
        "windows": ("windows", GPT),
        "windows-bf16-selective": ("windows", ["--bf16", "--recompute-activations"]),
        "norms": ("teacher", []),
        "one-sample": ("untied", ["--micro-batch-size", 1]),
        "latent": ("latent", []),
        "latent-bf16-selective": ("latent", ["--bf16", "--recompute-activations"]),
        "packed": ("untied", ["--pack", *GPT]),
        "packed-tied-bf16": ("tied", ["--pack", "--bf16"]),
        "packed-selective": ("untied", ["--pack", "--recompute-activations"]),
        "packed-windows": ("windows", ["--pack"]),
        "packed-latent": ("latent", ["--pack"]),
        "lora": ("untied", [*LORA, *GPT]),
        "lora-bf16-do-tied": ("tied", [*LORA, "--bf16", DO]),
        "lora-some-dropout": ("untied", [*LORA, "--lora-targets", "q", "v", "gate", "--lora-dropout", 0.1]),
        "lora-experts": ("experts", [*LORA, "--lora-targets", "q", "o", "experts"]),
        "lora-weighted": ("weighted", [*LORA, "--lora-targets", "q", "k", "v", "gate", "up", "down"]),
        "lora-latent-bf16": ("latent", [*LORA, "--bf16", "--lora-targets", "q", "k", "v", "o", "experts"]),
        "lora-full": ("untied", [*LORA, *FULL]),
        "lora-self": ("untied", [*LORA, "--objective", "target-sft", "--teacher-self"]),
    },
    2: {
        "dp2-bf16-do-teacher": ("tied", ["--bf16", DO]),
        "tp2-biases-teacher": ("biases", TP2),
        "tp2-sp": ("untied", [*TP2, SP, *GPT]),
        "tp2-sp-bf16-teacher": ("untied", [*TP2, SP, "--bf16"]),
        "ep2-experts": ("experts", EP2),
        "ep2-do-bf16-experts-all-to-all": (
            "experts",
            [*EP2, DO, "--bf16", "--moe-token-dispatcher-type", "alltoall"],
        ),
        "tp2-sp-ep2-experts": ("experts", [*TP2, SP, *EP2, "--expert-tensor-parallel-size", 1]),
        "tp2-sp-do-experts": ("experts", [*TP2, SP, DO]),
        "tp2-sp-ep2-sinks": ("sinks", [*TP2, SP, *EP2, "--expert-tensor-parallel-size", 1]),
        "ep2-latent": ("latent", [*EP2, DO]),
        "cp2": ("biases", CP2),
        "cp2-tied-selective": ("tied", [*CP2, "--recompute-activations"]),
        "cp2-windows": ("windows", CP2),
        "cp2-packed": ("biases", [*CP2, "--pack"]),
        "pp2-latent": ("latent", PP2),
        "pp2-tied-bf16": ("tied", [*PP2, "--bf16"]),
        "pp2-uneven-teacher": ("untied", [*PP2, "--decoder-first-pipeline-num-layers", 1]),
        "pp2-vpp2-teacher": ("untied", [*PP2, "--num-virtual-stages-per-pipeline-rank", 2]),
        "tp2-sp-lora-bf16": ("untied", [*TP2, SP, *LORA, "--bf16"]),
        "tp2-sp-ep2-lora-experts": (
            "experts",
            [*TP2, SP, *EP2, "--expert-tensor-parallel-size", 1, *LORA, "--lora-targets", "k", "o", "experts"],
        ),
        "pp2-lora-self": ("tied", [*PP2, *LORA, "--objective", "target-sft", "--teacher-self", DO]),
    },
}
LARGE = {
    # Llama 3 8B and 70B.
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32),
    "70b": dict(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64),
}
LAYOUT_70B = ["--tensor-model-parallel-size", 8, "--pipeline-model-parallel-size", 4, SP, "--bf16", DO]
LORA_70B = ["--tensor-model-parallel-size", 8, SP, "--bf16", DO, *FULL, "--seq-length", 4096]
LORA_70B += ["--micro-batch-size", 1, "--global-batch-size", 64]
LORA_16 = ["--lora-rank", 16]
LAYOUT_EXPERTS = ["--tensor-model-parallel-size", 4, SP, "--pipeline-model-parallel-size", 2, "--bf16", DO]
LAYOUT_EXPERTS += ["--expert-model-parallel-size", 8, "--expert-tensor-parallel-size", 1]
BATCH = ["--seq-length", 4096, "--micro-batch-size", 1, "--global-batch-size", 128]
# What docs/study.md speaks of, and what its rows have in common.
QWEN3 = {
    "Qwen3-1.7B": dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16)
    | dict(tie_word_embeddings=True),
    "Qwen3-8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
    "Qwen3-32B": dict(hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64),
}
STUDIED = [DO, SP, "--bf16", "--seq-length", 4096, "--micro-batch-size", 1, "--global-batch-size", 64]
STUDIED += ["--objective", "target-sft"]


def study_layouts():
    """(model, GPUs, flags, GiB) of the table in docs/study.md."""
    page = (REPOSITORY / "docs" / "study.md").read_text()
    rows = [
        [cell.strip(" `") for cell in row.split("|")] for row in re.findall(r"^\| (Qwen3.+) \|$", page, re.MULTILINE)
    ]
    assert rows and all(len(row) == 4 for row in rows)
    return rows


def write_config(folder, **changes):
    """config.json alone, of a Llama."""
    config = dict(architectures=["LlamaForCausalLM"], num_key_value_heads=8, vocab_size=128256, rms_norm_eps=1e-5)
    config |= dict(max_position_embeddings=8192, tie_word_embeddings=False) | changes
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    write_models(folder)
    for name, sizes in LARGE.items():
        write_config(folder / name, **sizes)
    odd = dict(num_attention_heads=30, head_dim=128, num_key_value_heads=10, num_hidden_layers=30)
    odd |= dict(intermediate_size=14340)
    experts = dict(architectures=["MixtralForCausalLM"], num_local_experts=8, num_experts_per_tok=2, vocab_size=32000)
    write_config(folder / "mixtral", **LARGE["8b"] | experts)
    experts = dict(architectures=["Qwen3MoeForCausalLM"], num_experts=128, num_experts_per_tok=8, hidden_size=2048)
    experts |= dict(num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    experts |= dict(moe_intermediate_size=768, intermediate_size=6144, vocab_size=151936, norm_topk_prob=True)
    write_config(folder / "30b-a3b", **experts)
    write_config(folder / "odd", **LARGE["8b"] | odd)
    for name, sizes in QWEN3.items():
        family = dict(
            architectures=["Qwen3ForCausalLM"], vocab_size=151936, head_dim=128, max_position_embeddings=40960
        )
        write_config(folder / name, **family | sizes)
    return folder


def commands(folder):
    """Words of the command plan by name."""

    def words(model, *extra, world_size=64):
        return [str(word) for word in ("--world-size", world_size, "--hf-model", folder / model, *extra)]

    large = words("70b", *LAYOUT_70B, *BATCH, "--memory-gib", 80, "--teacher-hf", folder / "8b", "--json")
    return {
        "70b": large,
        "70b-text": large[:-1],
        **{
            name: words(name, *STUDIED, *layout.split(), "--teacher-hf", folder / name, "--json", world_size=int(gpus))
            for name, gpus, layout, _ in study_layouts()
        },
        "lora full": words("70b", *LORA_70B, "--teacher-hf", folder / "70b", "--json", world_size=8),
        "lora live": words("70b", *LORA_70B, "--teacher-hf", folder / "70b", *LORA_16, "--json", world_size=8),
        "lora self": words("70b", *LORA_70B, "--teacher-self", *LORA_16, "--json", world_size=8),
        "70b-vpp": [*large, "--num-virtual-stages-per-pipeline-rank", "2"],
        "70b-cached": words("70b", *LAYOUT_70B, *BATCH, "--json", "--teacher-cache-k", 64),
        "too-large": words("8b", *BATCH, "--bf16", "--memory-gib", 24, world_size=8),
        "indivisible": words("odd", *LAYOUT_70B, "--seq-length", 8190, world_size=60),
        "batch": words("8b", *LAYOUT_70B, "--global-batch-size", 127),
        "context": words("8b", "--bf16", "--context-parallel-size", 4, "--seq-length", 4092),
        "refused": words("8b", *LAYOUT_70B, *BATCH, "--num-virtual-stages-per-pipeline-rank", 3),
        "no-directory": words("nowhere", *BATCH),
        "no-teacher": words("8b", *BATCH, "--objective", "target-sft"),
        "needless-teacher": words("8b", *BATCH, "--objective", "sft", "--teacher-cache-k", 8),
        "not-planned": words("8b", *BATCH, "--use-precision-aware-optimizer"),
        "mixtral": words("mixtral", *BATCH, "--bf16", *EP2, "--json"),
        "30b-a3b": words("30b-a3b", *BATCH, *LAYOUT_EXPERTS, "--json"),
        "experts-indivisible": words("mixtral", *BATCH, "--expert-model-parallel-size", 16),
        "experts-untrained": words("mixtral", *BATCH, *TP2),
        "no-entries": words("8b", *BATCH, "--teacher-cache-k", 0),
    }


@pytest.fixture(scope="module")
def launches(workspace):
    def launch(world_size):
        cases = {
            name: words_of(workspace, model, *words, teacher="teacher" in name)
            for name, (model, words) in CASES[world_size].items()
        }
        words = commands(workspace) if world_size == 1 else {}
        return run_ranks(world_size, run_all, (cases, words), timeout=300, megatron=True)

    return {world_size: launch(world_size) for world_size in CASES}


@pytest.fixture(scope="module")
def plans(launches):
    return launches[1][0][1]


ALL = [(world_size, name) for world_size, cases in CASES.items() for name in cases]


def ranks_of(launches, world_size, name):
    return [measured[name] for measured, _ in launches[world_size]]


@pytest.mark.parametrize(("world_size", "name"), ALL)
def test_weights_gradients_and_optimizer_are_what_megatron_allocates(launches, world_size, name):
    for rank, found in enumerate(ranks_of(launches, world_size, name)):
        planned = found["planned"]
        for item in ("weights", "gradients", "optimizer"):
            # The distributed optimizer starts each parameter at a multiple of 64 elements.
            assert planned[item] == pytest.approx(found[item], rel=0.005), (rank, item)
        assert planned.get("teacher weights", 0) == found["teacher weights"]


@pytest.mark.parametrize(("world_size", "name"), ALL)
def test_the_loss_takes_what_was_planned(launches, world_size, name):
    found = ranks_of(launches, world_size, name)[-1]
    # Of a cached teacher's entries what is computed from them is not planned: it rarely meets the peak.
    tolerances = {"fused": 0.08, "whole": 0.08}
    tolerances |= {"fused, cached": 0.15, "whole, cached": 0.15} if "teacher" in name else {}
    for kind, tolerance in tolerances.items():
        assert found["losses"][kind] == pytest.approx(found[kind], rel=tolerance), kind


@pytest.mark.parametrize(("world_size", "name"), [case for case in ALL if case[1].startswith("tp2")])
def test_the_loss_sends_what_was_planned(launches, world_size, name):
    for found in ranks_of(launches, world_size, name):
        assert sorted(size for _, size in found["sent"]) == sorted(found["transfers"].values())


@pytest.mark.parametrize(("world_size", "name"), [case for case in ALL if "pp2" not in case[1]])
def test_activations_of_local_layers_are_what_is_kept_for_backward(launches, world_size, name):
    """The rest: experts that are not chosen equally often, keys and values of one group."""
    for found in ranks_of(launches, world_size, name):
        assert found["planned"]["activations"] == pytest.approx(found["saved"], rel=0.05)


@pytest.mark.parametrize(
    ("world_size", "name"), [case for case in ALL if not {"pp2", "teacher", "self"} & set(case[1].split("-"))]
)
def test_a_step_takes_what_was_planned(launches, world_size, name):
    """All of a rank's memory at the peak of a step: what lies there, and what forward, loss and backward add."""
    for found in ranks_of(launches, world_size, name):
        lying = sum(found[item] for item in ("weights", "gradients", "optimizer"))
        assert sum(found["planned"].values()) == pytest.approx(lying + found["step"], rel=0.15)
        assert sum(found["planned"].values()) - lying == pytest.approx(found["step"], rel=0.15)


# ---- large models, from config.json alone


def test_a_70b_model_is_planned_as_counted_by_hand(plans):
    code, text = plans["70b"]
    plan = json.loads(text)
    assert (code, plan["problems"], plan["counted"]) == (0, [], "live")
    assert [stage["layers"] for stage in plan["stages"]] == [20] * 4
    # Llama 3 70B has 70,553,706,496 parameters; 768 rows of padding in both matrices; each rank has all norms.
    parameters = 8 * sum(stage["parameters"] for stage in plan["stages"])
    assert parameters == 70_553_706_496 + 2 * 768 * 8192 + 7 * 161 * 8192
    first, last = plan["stages"][0], plan["stages"][-1]
    count = first["parameters"]
    # 64 ranks / (8 x 4): two data-parallel ones share the optimizer's 12 bytes.
    assert [first["items"][key] for key in ("weights", "gradients", "optimizer")] == [2 * count, 4 * count, 6 * count]
    # arXiv 2205.05198, table 2: 4 micro-batches in flight, in 20 layers each.
    tokens, hidden = 4096, 8192
    layers = tokens * hidden * (18 + 4 * 28672 / hidden) * 20 / 8
    embedding = (8 * tokens + tokens * hidden) / 8
    assert first["items"]["activations"] == pytest.approx(4 * (layers + embedding))
    assert last["items"]["activations"] == pytest.approx(layers)
    assert first["items"]["loss"] == 0 < last["items"]["loss"]
    # The 8B teacher: 8 layers and one matrix on the first stage.
    block = 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3) // 8 + 2 * 4096
    assert first["items"]["teacher weights"] == 2 * (8 * block + 129024 * 4096 // 8)
    assert first["total"] == sum(first["items"].values())
    transfers = {transfer["what"]: transfer["bytes"] for transfer in plan["transfers"]}
    assert transfers == {
        "statistics": 7 * 4 * tokens * 8,
        "hidden states": tokens * hidden * 2,
        "teacher's hidden states": tokens * 4096 * 2,
        "gradient of hidden states": tokens * hidden * 2,
        "hidden states of both models": tokens * (hidden + 4096) * 2 // 8,
        "gradient of hidden states of both models": tokens * (hidden + 4096) * 2 // 8,
    }
    assert "--make-vocab-size-divisible-by 32 pads none" in plan["notes"][0]


def test_mixtures_of_experts_are_planned_as_counted_by_hand(plans):
    code, text = plans["mixtral"]
    [stage], summary = json.loads(text)["stages"], json.loads(text)["summary"]
    # Mixtral 8x7B: 46.7 B parameters, of which each of two expert-parallel ranks holds half of the experts.
    experts, others = 32 * 8 * 3 * 4096 * 14336, 1_605_636_096
    assert code == 0 and "46.7 B parameters" in summary and "experts: EP 2 x TP 1" in summary
    assert experts + others == 46_702_792_704 and stage["parameters"] == experts // 2 + others

    code, text = plans["30b-a3b"]
    plan = json.loads(text)
    # Qwen3-30B-A3B: 30,532,122,624 parameters; TP 4, PP 2, the experts on 8 ranks, whole.
    assert code == 0 and "30.5 B parameters" in plan["summary"]
    norms, router = 2 * 2048 + 2 * 128, 128 * 2048
    layer = norms + router + 2048 * (2 * 4096 + 2 * 512) // 4
    of_experts, others = 24 * 128 * 3 * 2048 * 768 // 8, 24 * layer + 152064 * 2048 // 4  # 128 rows of padding
    first = plan["stages"][0]
    assert first["parameters"] == of_experts + others
    # 64 ranks: 8 share the other parameters' optimizer state, 64 / (2 x 8) the experts'.
    assert first["items"]["optimizer"] == 12 * others // 8 + 12 * of_experts // 4


def test_interleaved_stages_hold_as_many_micro_batches_as_megatron_says(plans):
    plain, interleaved = (json.loads(plans[name][1])["stages"][0]["items"] for name in ("70b", "70b-vpp"))
    # 1 + (PP - 1) / (PP VPP), of which the text of Megatron's formula speaks.
    assert interleaved["activations"] == pytest.approx(plain["activations"] * (1 + 3 / 8))


def test_the_page_on_studies_shows_what_is_planned(plans):
    layouts = study_layouts()
    assert [name for name, *_ in layouts] == list(QWEN3)
    for name, _, _, shown in layouts:
        code, printed = plans[name]
        plan = json.loads(printed)
        assert code == 0 and shown == f"{max(stage['total'] for stage in plan['stages']) / GIB:.2f}"
        assert float(shown) < 60


def test_the_page_on_adapters_shows_what_is_planned(plans):
    page = (REPOSITORY / "docs" / "lora.md").read_text()
    shown = {}
    for row in re.findall(r"^\| (.+) \|$", page.partition("its own teacher |\n")[2], re.MULTILINE):
        name, *cells = (cell.strip(" *") for cell in row.split("|"))
        if len(cells) == 3 and cells[0].replace(".", "").isdigit():
            shown[name] = cells
    columns = []
    for name in ("lora full", "lora live", "lora self"):
        code, printed = plans[name]
        plan = json.loads(printed)
        assert code == 0 and len(plan["stages"]) == 1
        items = plan["stages"][0]["items"] | {"total": plan["stages"][0]["total"]}
        items["activations and loss"] = items["activations"] + items["loss"]
        names = {"teacher's weights": "teacher weights", "teacher's forward": "teacher forward"}
        columns.append([f"{items[names.get(row, row)] / GIB:.2f}" for row in shown])
    assert list(map(list, zip(*columns, strict=True))) == list(shown.values())
    assert len(shown) == 7


def test_a_cached_teacher_is_counted_where_there_is_no_live_one(plans):
    code, text = plans["70b-cached"]
    plan = json.loads(text)
    assert (code, plan["counted"], list(plan["losses"])) == (0, "cached", ["cached"])
    assert not any(key.startswith("teacher") for key in plan["stages"][0]["items"])
    assert plan["stages"][-1]["items"]["cached teacher"] == plan["cached"]["bytes"] > 4096 * 64 * 12
    # uint16 and uint8 id, float16 log p; tail, digest, top log p.
    assert plan["cached"]["disk_bytes_per_token"] == 64 * 5 + 12
    assert plan["transfers"][0]["bytes"] == 2 * 7 * 4 * 4096 * 8


def test_the_text_says_what_the_json_says(plans):
    code, text = plans["70b-text"]
    plan = json.loads(plans["70b"][1])
    assert code == 0 and "PROBLEM" not in text and "Warning" not in text
    rows = {line[:58].strip(): line[58:].split() for line in text.splitlines()}
    totals = [f"{plan['stages'][rank]['total'] / GIB:.2f}" for rank in (0, 1, 3)]
    assert rows["total"] == totals
    assert rows["live teacher (counted above)"][0] == f"{plan['losses']['live']['fused'] / GIB:.2f}"
    assert rows["statistics: all-gather"] == ["TP", "8", "0.92", "MB"]


# ---- what does not fit or divide


def test_too_little_memory_names_the_largest_items_and_what_to_change(plans):
    code, text = plans["too-large"]
    problems = [line for line in text.splitlines() if line.startswith("PROBLEM")]
    assert code == 1 and len(problems) == 1
    assert re.search(r"1 of 1 stages need more than 24.0 GiB per rank; stage 0 1\d\d\.\d, most of it", problems[0])
    for part in ("optimizer 89.", "gradients 29.", "--use-distributed-optimizer", "more tensor or pipeline"):
        assert part in problems[0]


def test_everything_that_does_not_divide_is_named_at_once(plans):
    code, text = plans["indivisible"]
    problems = [line.removeprefix("PROBLEM: ") for line in text.splitlines() if line.startswith("PROBLEM")]
    assert code == 1
    for part in (
        "--tensor-model-parallel-size 8 does not divide the 30 attention heads of the student",
        "--tensor-model-parallel-size 8 neither divides nor is a multiple of the 10 key/value heads",
        "--pipeline-model-parallel-size 4 does not divide the 30 layers",
        "MLP width 14340",
        "--seq-length 8190: --sequence-parallel",
        "--world-size 60 is no multiple of TP 8 x PP 4 x CP 1 = 32",
    ):
        assert sum(part in problem for problem in problems) == 1, (part, text)
    assert len(problems) == 6


@pytest.mark.parametrize(
    ("name", "expected", "part"),
    [
        ("batch", 1, "PROBLEM: --global-batch-size 127 is no multiple of --micro-batch-size 1 x DP 2 = 2"),
        ("context", 1, "PROBLEM: --seq-length 4092: CP 4 cuts it into 8 equal parts"),
        ("refused", 1, "PROBLEM: Megatron refuses these flags: "),
        ("no-directory", 2, "plan: error: "),
        ("no-teacher", 2, "reads a second model: give --teacher-hf DIR or --teacher-cache-k K"),
        ("needless-teacher", 2, "reads no second model: drop --teacher-hf and --teacher-cache-k"),
        ("not-planned", 2, "--use-precision-aware-optimizer changes sizes"),
        ("experts-indivisible", 1, "PROBLEM: --expert-model-parallel-size 16 does not divide the 8 experts"),
        ("experts-untrained", 2, "Megatron trains experts under tensor parallelism with sequence parallelism only"),
        ("no-entries", 2, "--teacher-cache-k must be above 0, got 0"),
    ],
)
def test_bad_layouts_and_bad_input_are_one_line_and_an_exit_code(plans, name, expected, part):
    code, text = plans[name]
    assert code == expected and part in text, text
    assert "Traceback" not in text and len(text.splitlines()) <= (2 if expected == 1 else 1)


def test_the_largest_stage_is_the_one_shown_between_first_and_last():
    def stage(rank, size):
        return Stage(rank, layers=1, parameters=1, items={"weights": size})

    shown = Plan("", [stage(0, 9), stage(1, 3), stage(2, 5), stage(3, 4)]).shown_stages()
    assert {name: stage.rank for name, stage in shown.items()} == {"first": 0, "middle": 2, "last": 3}
    assert list(Plan("", [stage(0, 1)]).shown_stages()) == ["only"]
    assert list(Plan("", [stage(0, 1), stage(1, 1)]).shown_stages()) == ["first", "last"]


def test_the_tool_is_started_by_its_path(workspace):
    words = ["--world-size", 8, "--hf-model", workspace / "8b", *BATCH, "--bf16", DO, "--memory-gib", 141]
    command = [sys.executable, str(REPOSITORY / "tools" / "plan.py"), *map(str, words)]
    done = subprocess.run(command, cwd=workspace, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("plan: llama, 8.03 B parameters in 32 layers; objective sft()")
