"""A training that resumes goes on from the state that it was saved with, at any layout."""

import functools
import shutil
from types import SimpleNamespace

import numpy
import pytest
import torch
import torch.distributed as dist
from finetune_runs import SEQ_LENGTH, run_all, run_tool, write_data, write_models
from launching import run_ranks
from row_data import padded_rows
from small_tokenizers import CHATML, byte_tokenizer

from qtarget_megatron.data import IGNORE_INDEX, JsonlFile
from qtarget_megatron.megatron.training.resume_flags import ResumedFlags, check_schedule
from qtarget_megatron.megatron.weights import bit_sums

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(600)]

# Gradient buckets of a few parameters whose lengths are no multiple of what Megatron pads them to, lcm(ranks, 128).
BUCKETS = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-bucket-size", 5000]
RESHARDABLE = ["--use-distributed-optimizer", "--dist-ckpt-optim-fully-reshardable"]
STOP = ["--save-interval", 2, "--exit-interval", 2]
TP2 = ["--tensor-model-parallel-size", 2]
PP2 = ["--pipeline-model-parallel-size", 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_models(folder)
    write_data(folder / "train.jsonl", 40, seed=1)
    return folder


def command(workspace, model, *more):
    return ["--hf-model", workspace / model, "--sft-train", workspace / "train.jsonl", "--objective", "sft"] + [
        # A multiple of two and of three ranks.
        *("--global-batch-size", 6, *more)
    ]


def train_and_read(runs, folder, saved):
    """run_all, and the optimizer's tensors in the checkpoints that it has saved: {name: {tensor: array}}."""
    from megatron.core import dist_checkpointing

    results = run_all(runs, folder)
    states = {}
    for name, directory in saved.items():
        found = dist_checkpointing.load_plain_tensors(str(directory))
        # As arrays: a tensor would be sent through memory that ends with this process.
        states[name] = {key: found[key].numpy() for key in found if key.startswith("optimizer.state.")}
    return results, states


def launch(world_size, runs, workspace, saved=None, timeout=240):
    """Results, scalars of the last rank and output of the first, and the optimizer's tensors of saved checkpoints."""
    runs = {name: [str(word) for word in words] for name, words in runs.items()}
    arguments = (runs, str(workspace), saved or {})
    first, *others = run_ranks(world_size, train_and_read, arguments, timeout, megatron=True)
    results, states = others[-1] if others else first
    for name, result in results.items():
        result["printed"] = first[0][name]["printed"]
        result["errors"] = [line for line in result["printed"].splitlines() if line.startswith("finetune: error:")]
        assert result["code"] == 0 or result["errors"], f"{name}: {result['printed'][-3000:]}"
    return results, states


def assert_same_course(result, expected, first_step, *, rel=1e-6):
    """The same losses and gradient norms from a step on. rel: float32 sums in another order, see test_finetune."""
    for tag, bound in (("lm loss", rel), ("grad-norm", 10 * rel)):
        assert result["scalars"][tag] == pytest.approx(expected["scalars"][tag][first_step:], rel=bound), tag


def test_gradient_buckets_with_padding_resume_at_any_layout(workspace):
    """The truth is one process with an optimizer that is not distributed, which has no buckets at all."""
    kinds, plain = ("odd", "tied"), {}
    for kind in kinds:
        plain[kind] = command(workspace, kind)
        plain[f"{kind} stopped"] = command(workspace, kind, "--save", workspace / f"plain-{kind}", *STOP)
    iteration = "iter_0000002"
    single, truth = launch(1, plain, workspace, {kind: workspace / f"plain-{kind}" / iteration for kind in kinds})

    flags = [*RESHARDABLE, *BUCKETS]
    runs, saved = {}, {}
    for kind in kinds:
        save = workspace / f"dp2-{kind}"
        saved[kind] = save / iteration
        runs[f"{kind} stopped"] = command(workspace, kind, *flags, "--save", save, *STOP)
        layouts = {"DP2": BUCKETS, "TP2": [*TP2, *BUCKETS]} if kind == "odd" else {"PP2": PP2}
        for layout, more in layouts.items():
            runs[f"{kind} at {layout}"] = command(workspace, kind, *RESHARDABLE, *more, "--load", save)
    two, states = launch(2, runs, workspace, saved)
    three, more_states = launch(
        3,
        {
            "odd stopped": command(workspace, "odd", *flags, "--save", workspace / "dp3-odd", *STOP),
            "odd at DP3": command(workspace, "odd", *flags, "--load", workspace / "dp3-odd"),
        },
        workspace,
        {"odd of three": workspace / "dp3-odd" / iteration},
    )
    for name, found in (states | more_states).items():
        expected = truth[name.split()[0]]
        moments = {key for key in expected if ".exp_avg" in key}
        assert len(moments) > 15 and moments <= found.keys()
        for key in moments:
            # Sums over ranks in another order; the smallest values are squares of differences of large ones.
            assert numpy.allclose(found[key], expected[key], rtol=1e-4, atol=1e-7), f"{name}: {key}"
    for name, result in (two | {f"{name} of three": result for name, result in three.items()}).items():
        if " at " in name:
            assert_compared({name: result}, [name])
            assert_same_course(result, single[name.split()[0]], first_step=2)


def assert_compared(results, names):
    for name in names:
        printed = results[name]["printed"]
        assert "the state that was loaded is what was saved, bit for bit" in printed, f"{name}: {printed[-2000:]}"


def test_every_kind_of_optimizer_resumes_with_the_state_that_was_saved(workspace, tmp_path):
    """Plain and distributed, one optimizer and one more for experts, master weights, interleaved stages."""
    bf16, interleaved = ["--bf16"], [*PP2, "--num-layers-per-virtual-pipeline-stage", 1]
    ep2 = ["--expert-model-parallel-size", 2]
    bound = ["--use-distributed-optimizer", *BUCKETS]
    kinds = {
        "plain": ("untied", [], [TP2]),
        "plain in bf16": ("tied", bf16, [PP2]),
        "distributed in bf16": ("odd", [*bf16, *RESHARDABLE, *BUCKETS], [TP2]),
        "to be interleaved": ("untied", RESHARDABLE, [interleaved]),
        "bound to its layout": ("untied", bound, [[]]),
        "experts": ("experts", [*ep2, *RESHARDABLE, *BUCKETS], [[]]),
        "plain experts": ("latent", ep2, [[]]),
    }
    runs, resumed = {}, []
    for name, (model, flags, layouts) in kinds.items():
        save = tmp_path / name.replace(" ", "-")
        runs[name] = command(workspace, model, *flags, "--save", save, *STOP)
        for number, layout in enumerate(layouts):
            resumed.append(f"{name}, resumed {number}")
            runs[resumed[-1]] = command(workspace, model, *flags, *layout, "--load", save)
    runs["bound elsewhere"] = command(workspace, "untied", *bound, *TP2, "--load", tmp_path / "bound-to-its-layout")
    other = ["--ckpt-format", "torch"]
    runs["other format"] = command(workspace, "untied", *other, "--save", tmp_path / "other", *STOP)
    runs["other format, resumed"] = command(workspace, "untied", *other, "--load", tmp_path / "other")
    results, _ = launch(2, runs, workspace, timeout=400)
    assert_compared(results, resumed)
    for name in ("other format", "other format, resumed"):
        assert "checkpoints of --ckpt-format torch have no fingerprint" in results[name]["printed"], name
    assert "was saved without --dist-ckpt-optim-fully-reshardable" in (results["bound elsewhere"]["errors"] or [""])[0]


class Faulty:
    """Megatron's fully reshardable state as it is in the wheel, and saving as it was before there were fingerprints."""

    def __init__(self, *, unrepaired: bool, without: bool):
        self._unrepaired, self._without = unrepaired, without

    def __enter__(self):
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        from qtarget_megatron.megatron.runtime import wheel_repairs
        from qtarget_megatron.megatron.weights.fingerprint import Fingerprints

        wheel_repairs.repair_megatron_wheel()
        self._before = DistributedOptimizer.sharded_param_state_fully_reshardable, Fingerprints.record
        if self._unrepaired:
            wheel = self._before[0].__wrapped__

            # A mark that says it is repaired.
            @functools.wraps(wheel)
            def state(*args, **kwargs):
                return wheel(*args, **kwargs)

            DistributedOptimizer.sharded_param_state_fully_reshardable = state
        if self._without:
            Fingerprints.record = lambda *args: None
        return self

    def __exit__(self, *exception):
        from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

        from qtarget_megatron.megatron.weights.fingerprint import Fingerprints

        DistributedOptimizer.sharded_param_state_fully_reshardable, Fingerprints.record = self._before


def flip_a_bit(directory, key):
    """In the last bit of a number of a tensor in a checkpoint, wherever in its files that lies."""
    from megatron.core import dist_checkpointing

    values = dist_checkpointing.load_plain_tensors(str(directory))[key]
    wanted = values.flatten()[:16].view(torch.uint8).numpy().tobytes()
    for file in directory.glob("*.distcp"):
        contents = bytearray(file.read_bytes())
        place = contents.find(wanted)
        if place >= 0:
            contents[place] ^= 1
            file.write_bytes(contents)
            return
    raise AssertionError(f"{key} is not found in {directory}")


def damage_and_resume(groups, flips, resumed, tools, folder):
    """Runs in groups ({name: words}, how they are faulty), damaged checkpoints, runs that resume, and tools that read
    the weights."""
    results = {}
    for runs, fault in groups:
        with Faulty(**fault):
            results |= run_all(runs, folder)
    if dist.get_rank() == 0:
        for source, target, key in flips:
            shutil.copytree(source, target)
            flip_a_bit(target / "iter_0000002", key)
    dist.barrier()
    results |= run_all(resumed, folder)
    for name, (tool, *arguments) in tools.items():
        code, printed = run_tool(tool, arguments)
        results[name] = {"code": code, "printed": printed}
    return results


def test_a_state_that_is_not_what_was_saved_ends_the_run(workspace, tmp_path):
    """One bit in a file, and Megatron's own fault; of checkpoints from before, what can be seen."""
    flags = [*RESHARDABLE, *BUCKETS]
    # In bfloat16 no two kinds of tensors hold the same bytes.
    texts = {"good": (["--bf16"], dict(unrepaired=False, without=False))}
    texts["old"] = ([], dict(unrepaired=False, without=True))
    texts["faulty"] = ([], dict(unrepaired=True, without=False))
    texts["old faulty"] = ([], dict(unrepaired=True, without=True))
    texts["old faulty in bf16"] = (["--bf16"], dict(unrepaired=True, without=True))
    groups, resumed = [], {}
    for name, (more, fault) in texts.items():
        save = tmp_path / name.replace(" ", "-")
        groups.append(
            ({f"{name} saved": words(command(workspace, "odd", *flags, *more, "--save", save, *STOP))}, fault)
        )
        resumed[name] = words(command(workspace, "odd", *flags, *more, "--load", save))
    layer = "decoder.layers.mlp.linear_fc2.weight"
    kinds = {
        "weights": layer,
        "master weights": f"optimizer.state.param.{layer}",
        "exp_avg": f"optimizer.state.exp_avg.{layer}",
    }
    flips = []
    for kind, key in kinds.items():
        copy = tmp_path / f"flipped-{kind.replace(' ', '-')}"
        flips.append((tmp_path / "good", copy, key))
        resumed[kind] = words(command(workspace, "odd", *flags, "--bf16", "--load", copy))
    resumed["no optimizer"] = [*resumed["exp_avg"], "--no-load-optim"]
    flipped = tmp_path / "flipped-weights"
    resumed["weights alone"] = words(command(workspace, "odd", "--bf16", "--finetune", "--load", flipped))
    resumed["teacher"] = [
        *words(command(workspace, "odd", "--teacher-hf", workspace / "odd", "--teacher-load", flipped)),
        *("--bf16", "--objective", "kd"),
    ]
    # What bfloat16 holds is compared in float32 too, but not the other way round.
    resumed["good alone"] = words(command(workspace, "odd", *TP2, "--finetune", "--load", tmp_path / "good"))
    resumed["old alone"] = words(command(workspace, "odd", "--finetune", "--load", tmp_path / "old"))
    tools = {}
    for kind, (load, more) in {"flipped": (flipped, []), "good": (tmp_path / "good", TP2)}.items():
        model = ["--hf-model", workspace / "odd", "--load", load, *more]
        data = ["--data", workspace / "train.jsonl", "--seq-length", SEQ_LENGTH]
        tools |= {
            f"{kind} export": ["convert_hf", "export", *model, "--save-hf", tmp_path / f"{kind}-hf"],
            f"{kind} score": ["score", *model, *data, "--out", tmp_path / f"{kind}.jsonl", "--overwrite"],
            f"{kind} cache": ["cache_teacher", *model, *data, "--out", tmp_path / f"{kind}-cache", "--k", 4],
        }
        tools[f"{kind} cache"][1] = "--teacher-hf"
    # As score's.
    del tools["good cache"]
    tools["good narrowed"] = [*words(tools["good export"]), "--fp16", "--save-hf", tmp_path / "narrowed"]
    tools = {name: words(tool) for name, tool in tools.items()}
    arguments = (groups, flips, resumed, tools, str(workspace))
    results = run_ranks(2, damage_and_resume, arguments, 400, megatron=True)[0]

    def error(name):
        lines = [line for line in results[name]["printed"].splitlines() if ": error: " in line]
        assert (results[name]["code"], len(lines)) == (2, 1), f"{name}: {results[name]['printed'][-3000:]}"
        return lines[0]

    for name in ("good", "old", "no optimizer"):
        assert results[name]["code"] == 0, results[name]["printed"][-3000:]
    assert_compared(results, ["good"])
    assert "has no fingerprint of its state" in results["old"]["printed"]
    for kind in kinds:
        assert f"{kind} of decoder.layers.0.mlp.linear_fc2.weight are not what was saved:" in error(kind)
    for name in ("weights alone", "teacher", "flipped export", "flipped score", "flipped cache"):
        assert "weights of decoder.layers.0.mlp.linear_fc2.weight are not what was saved:" in error(name), name
        assert not (tmp_path / "flipped-hf").exists() and not (tmp_path / "flipped.jsonl").exists()
    for name in ("good alone", "good export", "good score"):
        result = results[name]
        assert result["code"] == 0 and "good/iter_0000002 are what was saved, bit for bit" in result["printed"], result
    for name, reason in {
        "old alone": "has no fingerprint",
        "good narrowed": "was saved in bfloat16 and is loaded in float16",
    }.items():
        result = results[name]
        assert result["code"] == 0 and f"{reason}: its weights were not compared" in result["printed"], result
    assert ": a file is damaged" in error("weights") and "--no-load-optim" not in error("weights")
    assert "--no-load-optim for the weights alone" in error("exp_avg")
    assert "nor are" not in error("master weights")
    assert "are not what was saved, nor are" in error("faulty")
    assert "differ between ranks that hold the same" in error("old faulty")
    assert "master weights of" in error("old faulty in bf16")


def refusal(directory):
    from qtarget_megatron.megatron.weights.fingerprint import _compare_sums

    sums, saved = {"w": {"weights": [0, 0, 10, 5]}}, {"parameters": {"w": {"weights": [10, 4]}}}
    with pytest.raises(ValueError) as refused:
        _compare_sums(sums, saved, ["weights"], directory)
    return str(refused.value)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("release", "import the model anew, or give the layout that it was saved at"),
        ("iter_0000002", "give the layout that it was saved at"),
    ],
)
def test_a_damaged_import_is_to_be_made_anew(tmp_path, name, advice):
    (text,) = run_ranks(1, refusal, (str(tmp_path / name),), megatron=True)
    assert text.endswith(f"not restored as it was saved; {advice}"), text


def words(command):
    return [str(word) for word in command]


def test_flags_that_change_on_the_way_mean_what_they_say(workspace, tmp_path):
    """Lengths, rates and batch sizes, against trainings that had them from the start, and the data's own order."""
    cosine = ["--lr-decay-style", "cosine", "--min-lr", 1e-4, "--lr-warmup-iters", 1]
    base = command(workspace, "odd")
    two = ["--train-iters", 2]
    saved = {"constant": [], "cosine": [*cosine, *two], "distributed": RESHARDABLE}
    runs = {"whole": base, "whole cosine": [*base, *cosine]}
    for name, more in saved.items():
        runs[f"{name} saved"] = [*base, *two, *more, "--save", tmp_path / name]
    longer = {
        "longer": ("constant", []),
        "longer cosine": ("cosine", cosine),
        "larger micro-batches": ("constant", ["--micro-batch-size", 3]),
        "one replica": ("constant", [*TP2, "--micro-batch-size", 2]),
        "other rate": ("constant", ["--lr", 5e-4, "--min-lr", 2e-4]),
        "other rate, distributed": ("distributed", [*RESHARDABLE, "--lr", 5e-4, "--min-lr", 2e-4]),
        "kept": ("cosine", [*cosine, "--lr", 5e-4, "--use-checkpoint-opt-param-scheduler"]),
        "smaller batch": ("cosine", [*cosine, "--global-batch-size", 4]),
        "larger batch": ("cosine", [*cosine, "--global-batch-size", 12]),
        "other decay": ("constant", ["--weight-decay", 0.2, "--adam-beta2", 0.95]),
    }
    for name, (source, more) in longer.items():
        runs[name] = [*base, *more, "--load", tmp_path / source]
    results, _ = launch(2, runs, workspace, timeout=400)

    whole, expected = results["whole"], results["whole cosine"]["scalars"]
    for name in ("longer", "larger micro-batches", "one replica"):
        assert_same_course(results[name], whole, first_step=2)
        assert "--train-iters 4 (2 until now)" in results[name]["printed"]
    rates = {name: result["scalars"].get("learning-rate") for name, result in results.items()}
    assert rates["longer cosine"] == pytest.approx(expected["learning-rate"][2:])
    for name in ("smaller batch", "larger batch"):
        # The schedule counts steps.
        assert rates[name] == pytest.approx(expected["learning-rate"][2:])
    assert rates["whole cosine"][2] > 2 * rates["whole cosine"][3]
    # Two steps of two have been made: the old schedule is at its end.
    assert rates["kept"] == pytest.approx([1e-4, 1e-4])
    for name in ("other rate", "other rate, distributed"):
        assert rates[name] == pytest.approx([5e-4, 5e-4])
        loss, before = results[name]["scalars"]["lm loss"], whole["scalars"]["lm loss"][2:]
        assert loss[0] == pytest.approx(before[0], rel=1e-6) and loss[1] != pytest.approx(before[1], rel=1e-4)
    assert "--lr 0.0005 (0.001 until now), --min-lr 0.0002 (0.001 until now)" in results["other rate"]["printed"]
    decayed = results["other decay"]
    assert "--start-weight-decay 0.2 (0.01 until now)" in decayed["printed"]
    assert "--adam-beta2 0.95 (0.999 until now)" in decayed["printed"]
    assert decayed["scalars"]["lm loss"][1] != pytest.approx(whole["scalars"]["lm loss"][3], rel=1e-5)
    # No sample is left out or comes again: the first two steps have read twelve.
    counts = supervised_tokens(workspace / "train.jsonl", 40)
    for name, size in {"smaller batch": 4, "larger batch": 12}.items():
        found = results[name]["scalars"]["supervised tokens"]
        assert found == [sum(counts[12 + step * size : 12 + (step + 1) * size]) for step in range(2)], name


def supervised_tokens(path, length):
    """Of each item of the training data in the order in which a training with seed 7 reads them."""
    tokenizer, file = byte_tokenizer(CHATML, eos="<|im_end|>"), JsonlFile(path)
    order = padded_rows(file, tokenizer, SEQ_LENGTH, num_rows=length, seed=7)
    return [int((order[item]["labels"] != IGNORE_INDEX).sum()) for item in range(length)]


GIVEN = dict.fromkeys(
    (
        *("train_samples", "lr_decay_iters", "lr_decay_samples", "global_batch_size", "rampup_batch_size"),
        *("step_batch_size_schedule", "start_weight_decay", "end_weight_decay", "lr_warmup_fraction"),
        *("lr_wsd_decay_iters", "lr_wsd_decay_samples"),
    )
) | dict(
    skip_train=False, train_iters=4, lr=1e-3, min_lr=0.0, lr_warmup_iters=0, lr_warmup_samples=0, lr_warmup_init=0.0,
    micro_batch_size=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1, context_parallel_size=1,
    world_size=2, decrease_batch_size_if_needed=False, weight_decay=0.01, weight_decay_incr_style="constant",
    lr_decay_style="linear", override_opt_param_scheduler=False, use_checkpoint_opt_param_scheduler=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(train_iters=0), "--train-iters: expected 1 or more, got 0; to evaluate only, give --skip-train"),
        (dict(train_iters=2, lr_warmup_iters=5), "--lr-warmup-iters 5 does not fit into --train-iters 2: give"),
        (dict(lr_decay_iters=3, lr_warmup_iters=3), "--lr-warmup-iters 3 does not fit into --lr-decay-iters 3"),
        (dict(train_iters=None, train_samples=8, lr_warmup_samples=8), "--lr-warmup-samples 8 does not fit"),
        (dict(lr_warmup_fraction=1.0), "--lr-warmup-fraction: expected at least 0 and below 1, got 1.0"),
        (dict(global_batch_size=3), "--global-batch-size 3 cannot be shared by 2 data-parallel rank"),
        (dict(global_batch_size=1), "give a multiple of 2, as 2"),
        (dict(train_iters=None, train_samples=3, global_batch_size=4), "less than one step of 4 samples"),
        (dict(min_lr=1.0), "--min-lr 1.0 is above --lr 0.001"),
        (dict(lr=float("nan")), "--lr: expected 0 or more, got nan"),
        (dict(lr=-1.0), "--lr: expected 0 or more"),
        (dict(lr_warmup_init=1.0), "--lr-warmup-init 1.0 is above"),
        (dict(weight_decay=-0.1), "--weight-decay: expected 0 or more"),
        (dict(start_weight_decay=0.1), "have no meaning with --weight-decay-incr-style constant"),
        (dict(weight_decay_incr_style="cosine"), "expected --start-weight-decay and an --end-weight-decay"),
        (dict(lr_decay_style="WSD"), "--lr-wsd-decay-iters is missing"),
        (dict(override_opt_param_scheduler=True, use_checkpoint_opt_param_scheduler=True), "contradict each other"),
    ],
)  # fmt: skip
def test_a_schedule_that_does_not_fit_is_refused_in_a_line(flags, message):
    with pytest.raises(ValueError) as refused:
        check_schedule(SimpleNamespace(**GIVEN | flags))
    assert message in str(refused.value) and "\n" not in str(refused.value)
    evaluation = SimpleNamespace(**GIVEN | flags | dict(skip_train=True))
    if flags.get("global_batch_size", 2) % 2:
        # Megatron asserts it there as well.
        with pytest.raises(ValueError, match="cannot be shared"):
            check_schedule(evaluation)
    else:
        check_schedule(evaluation)


def test_a_schedule_that_fits_is_accepted():
    for flags in ({}, dict(global_batch_size=4), dict(train_iters=None, train_samples=8), dict(lr_warmup_iters=3)):
        check_schedule(SimpleNamespace(**GIVEN | flags))


def test_a_change_that_cannot_be_made_is_refused_in_a_line():
    given = GIVEN | dict(
        load="x", adam_beta1=0.9, adam_beta2=0.999, adam_eps=1e-8, optimizer="adam", seed=1, sft_train="d"
    )
    given |= dict(decoupled_lr=None, decoupled_min_lr=None, lr_wsd_decay_style="cosine", global_batch_size=8)
    given |= dict(use_distributed_optimizer=True, dist_ckpt_optim_fully_reshardable=False, no_save_optim=False)
    samples = dict(train_iters=None, train_samples=80)
    for before, now, message in (
        (samples, samples | dict(global_batch_size=4), "can be changed only where --train-iters counts the steps"),
        ({}, dict(global_batch_size=4, rampup_batch_size=[2, 2, 8]), "can be changed only where"),
        ({}, dict(optimizer="sgd"), "was saved with --optimizer adam, got sgd"),
        ({}, dict(decoupled_lr=1e-4), "was saved with --decoupled-lr None, got 0.0001"),
        (
            dict(tensor_model_parallel_size=2),
            {},
            "give --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1",
        ),
    ):
        with pytest.raises(ValueError) as refused:
            ResumedFlags(SimpleNamespace(**given | now), SimpleNamespace(**given | before))
        assert message in str(refused.value) and "\n" not in str(refused.value)
    same = ResumedFlags(SimpleNamespace(**given), SimpleNamespace(**given | dict(lr_decay_iters=4)))
    assert same.lines == []
    (line,) = ResumedFlags(SimpleNamespace(**given | dict(seed=8)), SimpleNamespace(**given)).lines
    assert "--seed 8 (1 until now): the data come in another order" in line
    (line,) = ResumedFlags(SimpleNamespace(**given | dict(adam_beta2=0.9)), SimpleNamespace(**given)).lines
    assert line == "going on with --adam-beta2 0.9 (0.999 until now)"
    for kept, said in ((False, "going on with --lr 0.01 (0.001 until now)"), (True, "stays as it was saved, without")):
        now = SimpleNamespace(**given | dict(lr=0.01, use_checkpoint_opt_param_scheduler=kept))
        (line,) = ResumedFlags(now, SimpleNamespace(**given)).lines
        # Without it, Megatron's loading asserts that nothing has changed.
        assert said in line and now.override_opt_param_scheduler == (not kept)


@pytest.mark.parametrize("cut", [None, 0, 1])
def test_the_sum_of_bits_is_the_same_in_any_pieces_and_shards_and_sees_every_bit(cut, monkeypatch):
    monkeypatch.setattr(bit_sums, "_CHUNK", 7)
    draw = torch.Generator().manual_seed(3)
    whole = torch.randn(6, 10, generator=draw)

    def of(tensor, start, stop):
        return int(bit_sums.bit_sum(tensor.reshape(-1)[start:stop], start, tensor.shape, cut))

    def wrapped(total):
        return bit_sums.wrapped(total)

    expected = of(whole, 0, 60)
    for places in ([17], [10, 20], [3, 9, 41], [59]):
        bounds = [0, *places, 60]
        assert wrapped(sum(of(whole, *pair) for pair in zip(bounds, bounds[1:], strict=False))) == expected
    if cut is not None:
        for size in (2, 3) if cut == 0 else (2, 5):
            shards = [shard.contiguous() for shard in whole.chunk(size, dim=cut)]
            assert wrapped(sum(of(shard, 0, shard.numel()) for shard in shards)) == expected
    for place, bit in ((0, 0), (31, 22), (59, 31)):
        changed = whole.clone()
        changed.view(torch.int32).view(-1)[place] ^= -(1 << 31) if bit == 31 else 1 << bit
        assert of(changed, 0, 60) != expected
    # Written out, for what tensor parallelism does not cut.
    if cut is None:
        weights = [((column + 1) * -0x61C8864680B583EB | 1) for column in range(10)]
        bits = whole.view(torch.int32).tolist()
        assert wrapped(sum(b * w for row in bits for b, w in zip(row, weights, strict=True))) == expected
    for dtype in (torch.bfloat16, torch.float64):
        assert of(whole.to(dtype), 0, 60) != of((whole * 1.01).to(dtype), 0, 60)
