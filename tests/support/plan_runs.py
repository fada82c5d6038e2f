"""What Megatron allocates, next to what is planned for it: models on disk, and many builds in one launch of ranks."""

from __future__ import annotations

import argparse
import contextlib
import io
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from megatron_reset import reset

SEQ_LENGTH, MICRO_BATCH, CHUNK, ENTRIES = 256, 2, 128, 64
# Tokens of the samples in a packed row.
SAMPLES = (96, 24, 80, 56)
# The vocabulary's matrices weigh about as much as the layers; no tensor-parallel size divides it.
_SIZES = dict(vocab_size=6001, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=8)
MODELS = {
    "untied": ("Llama", dict(num_key_value_heads=8)),
    "tied": ("Qwen3", dict(num_key_value_heads=2, head_dim=24, tie_word_embeddings=True)),
    "biases": ("Llama", dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True)),
    "experts": (
        "Qwen3Moe",
        dict(num_key_value_heads=2, head_dim=24, moe_intermediate_size=96, num_experts_per_tok=2, norm_topk_prob=True)
        | dict(num_local_experts=8, decoder_sparse_step=2),
    ),
    "weighted": (
        "Qwen2Moe",
        dict(num_key_value_heads=2, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=96)
        | dict(shared_expert_intermediate_size=160, mlp_only_layers=[1]),
    ),
    "sinks": (
        "GptOss",
        dict(num_key_value_heads=2, head_dim=24, num_local_experts=8, num_experts_per_tok=2, sliding_window=40)
        | dict(intermediate_size=96, pad_token_id=None),
    ),
    "latent": (
        "DeepseekV3",
        dict(num_key_value_heads=8, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8)
        | dict(v_head_dim=12, n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=96, n_shared_experts=1)
        | dict(first_k_dense_replace=1, n_group=1, topk_group=1, rope_interleave=True),
    ),
    "windows": (
        "Qwen2",
        dict(num_key_value_heads=2, use_sliding_window=True, sliding_window=40, max_window_layers=1),
    ),
    # With norms behind attention and MLP, and gate and up in one tensor.
    "teacher": (
        "Glm4",
        dict(hidden_size=96, num_hidden_layers=3, num_key_value_heads=4, head_dim=12, pad_token_id=None),
    ),
}


def write_models(folder: Path) -> None:
    for name, (family, extra) in MODELS.items():
        sizes = _SIZES | dict(max_position_embeddings=512) | extra
        config = getattr(transformers, f"{family}Config")(**sizes)
        getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder / name)


def words_of(folder: Path, model: str, *extra, teacher: bool = False) -> list[str]:
    """Words of finetune for one case."""
    words = ["--cpu", "--hf-model", folder / model, "--seq-length", SEQ_LENGTH, "--micro-batch-size", MICRO_BATCH]
    words += ["--global-batch-size", 8, "--qtarget-chunk-size", CHUNK, "--lr", 1e-3, "--train-iters", 1]
    words += [] if "--pack" in extra else ["--no-pack"]
    words += ["--objective", "target-sft", "--teacher-hf", folder / "teacher"] if teacher else []
    return [str(word) for word in (*words, *extra)]


def run_all(cases: dict[str, list[str]], commands: dict[str, list[str]]) -> tuple[dict, dict]:
    """On every rank: each case measured (see measure), and each command of plan run in this process, as
    (exit code, what it printed)."""
    from qtarget_megatron.commands import plan

    measured = {}
    for name, words in cases.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                measured[name] = measure(words)
            except BaseException as error:
                error.add_note(f"in case {name}; printed:\n{printed.getvalue()[-3000:]}")
                raise
        reset()
    results = {}
    for name, words in commands.items():
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                code = plan.main(words)
            except SystemExit as stop:  # argparse
                code = stop.code
        results[name] = code, printed.getvalue()
    return measured, results


def measure(words: list[str]) -> dict:
    """This rank's stage, planned and measured, in bytes.

    planned, losses, transfers: as planned. weights, gradients, optimizer, teacher weights: allocated after one
    optimizer step. On the last stage fused, whole, and the same with a cached teacher: peak of the loss in torch's
    allocator; sent: the collectives of the fused loss. Without pipeline saved: what is kept for backward by the layers,
    the embedding and the final norm; without a teacher step: peak of forward, loss and backward.
    """
    from qtarget_megatron.megatron.runtime import cpu_platform, launch, wheel_repairs
    from qtarget_megatron.megatron.runtime.architecture_flags import (
        implementation_flags,
        megatron_flags,
        record_architecture,
    )
    from qtarget_megatron.megatron.runtime.lora_flags import read_lora
    from qtarget_megatron.megatron.runtime.model_class import choose_model_class
    from qtarget_megatron.megatron.training.arguments import add_arguments

    cpu_platform.activate()
    from qtarget_megatron import objectives
    from qtarget_megatron.huggingface import Architecture
    from qtarget_megatron.megatron.planning.plan import PlanOptions, make_plan

    plan = make_plan(PlanOptions(dist.get_world_size()), words)
    assert not plan.problems, plan.problems
    student = Architecture.from_hf(words[words.index("--hf-model") + 1])
    flags = [*megatron_flags(student), *implementation_flags(on_cpu=True)]
    args = launch.parse_arguments([*flags, *words], add_arguments)
    choose_model_class(args, student)
    lora = read_lora(args, student)
    args.save_interval = args.eval_interval = 1
    args.calculate_per_token_loss = True
    record_architecture(args, student)
    wheel_repairs.repair_megatron_wheel()
    launch.initialize(args)
    teacher = None if args.teacher_hf is None else Architecture.from_hf(args.teacher_hf)

    from megatron.core import parallel_state
    from megatron.core.enums import ModelType
    from megatron.training.initialize import initialize_megatron
    from megatron.training.training import setup_model_and_optimizer

    from qtarget_megatron.megatron.model.build import ModelProvider

    initialize_megatron(store=None)
    provider = ModelProvider(args, student, teacher, load_weights=False, lora=lora, teaches_itself=args.teacher_self)
    wrapped, optimizer, _ = setup_model_and_optimizer(ModelType.encoder_or_decoder, provider)
    buffers = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    for buffer in buffers:
        buffer.grad_data.normal_()
    optimizer.step()

    parameters = [parameter for chunk in provider.built for parameter in chunk.parameters()]
    states = list(_optimizer_tensors(optimizer))
    teachers = [p for chunk in provider.built if chunk.teacher is not None for p in chunk.teacher.parameters()]
    rank = parallel_state.get_pipeline_model_parallel_rank()
    found = {
        "planned": plan.stages[rank].items,
        "losses": dict(plan.losses[plan.counted]),
        "transfers": {transfer.what: transfer.bytes for transfer in plan.transfers},
        "weights": storage_bytes(parameters),
        "gradients": storage_bytes(buffer.grad_data for buffer in buffers),
        "optimizer": storage_bytes(states, besides=parameters),
        "teacher weights": storage_bytes(teachers),
    }
    if plan.cached is not None:
        found["losses"]["fused, cached"] = plan.losses["cached"]["fused"] + plan.cached.bytes
        found["losses"]["whole, cached"] = plan.losses["cached"]["whole"] + plan.cached.bytes
    del states
    if args.pipeline_model_parallel_size == 1:
        found["saved"] = _saved_bytes(wrapped[0], args, student)
    if provider.built[-1].post_process:
        objective = objectives.from_arguments(args.objective, args.objective_args)
        found |= _loss_bytes(provider.built[-1], args, student, objective)
        if teacher is None and not args.teacher_self and args.pipeline_model_parallel_size == 1:
            found["step"] = _step_bytes(wrapped[0], args, student, objective)
    return found


def storage_bytes(tensors, besides=()) -> int:
    """Of all memory that lies under these tensors, each part counted once, and not under those besides."""
    known = {tensor.untyped_storage().data_ptr() for tensor in besides}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for pointer, size in storages.items() if pointer not in known)


def _optimizer_tensors(optimizer):
    """The optimizers' states, and the parameters that they step."""
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            yield from group["params"]
        for state in part.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _saved_bytes(model, args: argparse.Namespace, student) -> int:
    from megatron.core.utils import get_attr_wrapped_model

    from qtarget_megatron.megatron.model.output_head import heads_without_logits

    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            # Kept alive with it: memory is not used twice meanwhile.
            saved[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        tokens, positions, mask, packed = _inputs(args, student)
        with heads_without_logits(get_attr_wrapped_model(model, "post_process", return_model_obj=True)) as heads:
            model(tokens, positions, mask, packed_seq_params=packed)
    return storage_bytes([*saved.values(), heads[0].hidden])


def _step_bytes(model, args: argparse.Namespace, student, objective) -> int:
    from qtarget_megatron.megatron.attach import attach
    from tools.benchmarking.measure import Subject, memory

    tokens, positions, mask, packed = _inputs(args, student)
    attach(model, objective, vocab_size=student.vocab_size, chunk_size=CHUNK)
    labels = tokens.roll(-1)

    def run():
        model(tokens, positions, mask, labels=labels, packed_seq_params=packed).sum().backward()

    return min(memory(Subject(run), torch.device("cpu"))[0].peak for _ in range(2))


def _inputs(args: argparse.Namespace, student):
    """Tokens, all over the vocabulary so that experts are chosen about equally often; positions; no mask; where the
    samples of packed rows lie."""
    rows = args.micro_batch_size
    if not args.pack:
        tokens = torch.randint(student.vocab_size, (rows, _length(args)))
        return tokens, torch.arange(_length(args)).expand_as(tokens), None, None
    from qtarget_megatron.data import Batch
    from qtarget_megatron.megatron.training.batches import on_this_rank

    positions = torch.cat([torch.arange(length) for length in SAMPLES]).expand(rows, -1)
    tokens = torch.randint(student.vocab_size, positions.shape)
    padding = torch.zeros(positions.shape, dtype=torch.bool)
    own = on_this_rank(Batch(tokens, tokens, positions, padding, packed=True))
    return own.batch.tokens, own.batch.position_ids, None, own.packed


def _length(args: argparse.Namespace) -> int:
    """Tokens of a sequence on this rank."""
    return args.seq_length // args.context_parallel_size


def _loss_bytes(model, args: argparse.Namespace, student, objective) -> dict:
    from qtarget_megatron.loss.sparse_teacher import SparseTeacher
    from qtarget_megatron.megatron.head_loss import HeadLoss, LossInputs
    from qtarget_megatron.megatron.model.output_head import OutputHead
    from tools.benchmarking.measure import Subject, memory

    ranks = args.tensor_model_parallel_size if args.sequence_parallel else 1
    shape = _length(args) // ranks, args.micro_batch_size
    dtype = args.params_dtype
    weight = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    labels = torch.randint(student.vocab_size, (args.micro_batch_size, _length(args)))
    factors = torch.ones(8, 128, dtype=dtype), torch.ones(128, 4096, dtype=dtype)
    extra = memory(Subject(lambda: factors[0] @ factors[1]), torch.device("cpu"))[0].extra
    # As large as the product at least, or nothing.
    scratch = extra >= 8 * 4096 * dtype.itemsize
    taught = None
    if model.teacher is not None:
        hidden = torch.randn(*shape, model.teacher.config.hidden_size, dtype=dtype)
        taught = OutputHead(hidden, model.teacher.output_layer, None)
    elif args.teacher_self:
        taught = OutputHead(torch.randn(*shape, student.hidden_size, dtype=dtype), model.output_layer, weight)
    found = {}
    for name, chunk_size, is_cached in (
        ("fused", CHUNK, False),
        ("whole", None, False),
        ("fused, cached", CHUNK, True),
        ("whole, cached", None, True),
    ):
        if is_cached and model.teacher is None:
            continue

        def run(chunk_size=chunk_size, is_cached=is_cached):
            hidden = torch.randn(*shape, student.hidden_size, dtype=dtype, requires_grad=True)
            loss = HeadLoss(objective, student.vocab_size, "auto", chunk_size)
            inputs = LossInputs(teacher=lambda: taught)
            if is_cached:
                # All over the vocabulary: each rank has its share.
                ids = torch.arange(0, student.vocab_size, student.vocab_size // ENTRIES)[:ENTRIES]
                ids = ids.expand(*labels.shape, -1).clone()
                kept = SparseTeacher(ids, torch.full(ids.shape, -5.0), torch.full(labels.shape, 0.5), "uniform")
                inputs = LossInputs(sparse_teacher=kept)
            head = OutputHead(hidden, model.output_layer, weight)
            if chunk_size is None:
                losses, _ = loss.of_logits(head.logits(), labels, inputs, model.output_layer.tp_group, inplace=True)
            else:
                losses, _ = loss.of_hidden(head, labels, inputs)
            losses.sum().backward()

        # oneDNN multiplies 16 bits in scratch memory, more of it on processors that have no instructions for them.
        # Chunks that make the weight's gradient as well have more than that.
        is_plain = args.lora_rank is not None or (scratch and chunk_size is None)
        plain = torch.backends.mkldnn.flags(enabled=False) if is_plain else nullcontext()
        with plain, _sent() as sent:
            run()  # makes Megatron's communication buffers, which the layers use as well
        # The least of several: gloo's thread lets go of what it sent some time after it was sent, which adds a message
        # to every third run on a busy machine.
        several = 8 if args.tensor_model_parallel_size > 1 else 2
        plain = torch.backends.mkldnn.flags(enabled=False) if is_plain else nullcontext()
        with plain:
            peak = min(memory(Subject(run), torch.device("cpu"))[0].peak for _ in range(several))
        # The hidden states are made inside of the run, but belong to the layers.
        found[name] = peak - shape[0] * shape[1] * student.hidden_size * dtype.itemsize
        if name == "fused":
            found["sent"] = sent
    return found


@contextlib.contextmanager
def _sent():
    """Bytes of the whole tensors of the collectives that torch.distributed is asked for: [(operation, bytes)]."""
    calls, originals = [], {}

    def recorded(name, whole):
        def call(*args, **keywords):
            calls.append((name, args[whole].numel() * args[whole].element_size()))
            return originals[name](*args, **keywords)

        return call

    gather = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    scatter = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
    for name, whole in ((gather, 0), ("all_reduce", 0), (scatter, 1)):
        originals[name] = getattr(dist, name)
        setattr(dist, name, recorded(name, whole))
    try:
        yield calls
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
