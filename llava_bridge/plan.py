"""What stage 1 and stage 2 will cost, by arithmetic alone: FLOPs, hours, memory, disk. Imports no torch.

Counted as `clips_core.plan` counts pretraining: two FLOPs a multiply-add, matrix products and convolutions only, attention dense.
Model FLOPs are those of real tokens, and what MFU is about; padding and what is computed twice take time too.
tests/test_plan_llava.py holds FLOPs and memory against real models, and hours against LLaVA-1.5's published ones.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from rich import box
from rich.console import Console
from rich.table import Table

from clips_core.config import FORBID, load_config, load_settings, to_dict
from clips_core.errors import InputError
from clips_core.folders import write_json
from clips_core.plan import FP32, GIB, GPUS, Flops, flops_table, memory_table, product, si, split_settings, to_the_right
from llava_bridge.architectures import Llm, VisionTower, read_llm, read_tower
from llava_bridge.config import AlignConfig, Group, Method, Parallel, Projector, Save, StageConfig, TuneConfig
from llava_bridge.mixture import MIXTURES, Stage, draw

# Bytes of a 4-bit weight: NF4 in blocks of 64, whose scales are 8-bit themselves, in blocks of 256 (QLoRA's double quantisation).
NF4 = 0.5 + 1 / 64 + FP32 / (64 * 256)
BATCHES = 48  # batches that are drawn to see how much padding there is
UNNAMED = Path("unnamed")  # where a plan does not care what lies where
LOSS_CHUNK = 1024  # labelled positions whose logits exist at once where there is no fused kernel, as in `loss.CHUNK`


@config_dataclass(config=FORBID, kw_only=True)
class LlavaPlanConfig:
    """The machine and the assumptions. Everything about the run itself stands in its recipe."""

    gpus: int = Field(default=8, ge=1)  # with gpu=cpu: processes
    gpu: Literal["a100", "h100", "h200", "l40s", "rtx4090", "cpu"] = "h100"
    # Share of a GPU's peak that the run would reach if it computed nothing twice and padded nothing. LLaVA-1.5's published hours on
    # 8 A100 are 41 % (stage 1) and 35 % (stage 2) by this count. **Put in what your own run reaches.**
    mfu: float = Field(default=0.35, gt=0, le=1)
    usable_memory: float = Field(default=0.90, gt=0, le=1)  # the rest: CUDA context, NCCL's buffers, fragmentation
    cores: int = Field(default=2, ge=1)  # of a CPU process
    core_flops: float = Field(
        default=100e9, gt=0
    )  # that a CPU core reaches: bf16 with AVX-512; about half of it in fp32
    cpu_memory: float = Field(default=16, gt=0)  # GiB
    text_tokens: float | None = Field(default=None, gt=0)  # mean of a sample, its picture left out; null: LLaVA-1.5's
    records: int | None = Field(default=None, ge=1)  # in the data set; null: LLaVA-1.5's (558,128 and 665,298)
    tiles: float = Field(default=1, ge=1)  # pictures that the tower sees of one: LLaVA-NeXT's anyres has up to 5
    write_bandwidth: float = Field(default=2e9, gt=0)  # bytes a second of the file system that takes the checkpoints
    out: Path | None = None  # a JSON file with all of it


@config_dataclass(config=FORBID, kw_only=True)
class TunePlanConfig(LlavaPlanConfig):
    """Stage 2 takes its model from stage 1's folder; where there is none yet, these say what it will be."""

    llm: str | None = None  # a name such as vicuna-7b, or a folder with a config.json; null: what is in `align`
    tower: str | None = None  # a name such as clip-l14-336, or a folder; null: what is in `align`
    image_size: int | None = Field(default=None, ge=1)  # pixels; null: the tower's own
    projector: Projector = "mlp2x_gelu"
    select_layer: int = -2


@config_dataclass(config=FORBID, kw_only=True)
class _PlannedTune(TuneConfig):
    """Stage 2 before there is a stage 1."""

    align: Path = UNNAMED


PlanT = TypeVar("PlanT", bound=LlavaPlanConfig)
StageT = TypeVar("StageT", bound=StageConfig)


@dataclass(frozen=True)
class Run:
    """What the arithmetic reads of a stage's recipe."""

    stage: Stage
    llm: Llm
    tower: VisionTower
    samples: int
    batch_size: int
    device_batch_size: int
    max_length: int
    projector: Projector = "mlp2x_gelu"
    select_layer: int = -2
    method: Method | None = None  # of the language model; None: frozen
    rank: int = 128
    dropout: float = 0.05
    tower_trained: bool = False
    parallel: Parallel = "ddp"
    checkpointing: bool = False
    packing: bool = False
    group: Group = "modality_length"
    compute: int = 2  # bytes of a frozen weight, and of what products take and give
    save: Save = "merged"
    fused: bool = True  # GPU kernels for attention and loss

    @property
    def adapters(self) -> bool:
        return self.method in ("lora", "qlora")

    @property
    def read_layers(self) -> int:
        """Blocks of the tower below the hidden state that the projector reads: what is above has no gradient."""
        return self.select_layer if self.select_layer >= 0 else self.tower.layers + 1 + self.select_layer


class Lengths(NamedTuple):
    """Of a sample, on average; and of the largest device batch."""

    tokens: float
    squares: float  # of the tokens: attention's pairs
    labels: float
    pictures: float  # that the tower sees
    row_tokens: float  # that are computed: padding too
    row_squares: float
    peak_tokens: float  # computed at once
    peak_squares: float
    peak_labels: float
    peak_pictures: float


def plan_align(package_folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Plan stage 1: print it, write it where `out` says, return it.

    Args:
        package_folder: where the recipes' names are looked up.
        settings: recipes, then overrides: of `LlavaPlanConfig` where it has such a key, else of the recipe.

    Raises:
        InputError: for an unknown key, model or tower, or a batch that the GPUs cannot share evenly.
    """
    cluster, config = _read(LlavaPlanConfig, AlignConfig, package_folder, settings)
    run = Run(
        stage="align",
        llm=read_llm(config.llm),
        tower=read_tower(config.tower, config.image_size),
        projector=config.projector,
        select_layer=config.select_layer,
        **_common("align", config, cluster),
    )
    return _finish(run, config, cluster)


def plan_tune(package_folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Plan stage 2: print it, write it where `out` says, return it.

    Args:
        package_folder: where the recipes' names are looked up.
        settings: recipes, then overrides: of `TunePlanConfig` where it has such a key, else of the recipe.

    Raises:
        InputError: for an unknown key, model or tower, no model at all, or a batch that the GPUs cannot share evenly.
    """
    cluster, config = _read(TunePlanConfig, _PlannedTune, package_folder, settings)
    if config.align == UNNAMED and (cluster.llm is None or cluster.tower is None):
        raise InputError(
            "stage 2 of which model? Say both llm= and tower= (llm=vicuna-7b tower=clip-l14-336, for example), or align= with "
            "the folder of a finished stage 1"
        )
    run = Run(
        stage="tune",
        llm=read_llm(cluster.llm or str(config.align)),
        tower=read_tower(cluster.tower or str(config.align), cluster.image_size),
        projector=cluster.projector,
        select_layer=cluster.select_layer,
        method=config.method,
        rank=config.lora.rank,
        dropout=config.lora.dropout,
        tower_trained=config.tower_learning_rate is not None,
        save=config.save,
        **_common("tune", config, cluster),
    )
    return _finish(run, config, cluster)


def _read(
    plan: type[PlanT], stage: type[StageT], package_folder: Path, settings: Sequence[str]
) -> tuple[PlanT, StageT]:
    """The plan's settings and the stage's; where data and results lie need not be said."""
    of_plan, of_run = split_settings(plan, settings)
    named = {setting.partition("=")[0] for setting in of_run}
    for key in ("data.json", "data.images", "out"):
        if named.isdisjoint((key, key.partition(".")[0])):
            of_run.append(f"{key}={UNNAMED}")
    return load_config(plan, None, of_plan), load_settings(stage, package_folder, of_run)


def _common(stage: Stage, config: StageConfig, cluster: LlavaPlanConfig) -> dict[str, Any]:
    records = sum(source.records for source in MIXTURES[stage].values())
    precision = config.precision if config.precision != "auto" else "float32" if cluster.gpu == "cpu" else "bfloat16"
    return {
        "samples": config.samples or cluster.records or records,
        "batch_size": config.batch_size,
        "device_batch_size": _at_once(config, cluster.gpus),
        "max_length": config.data.max_length,
        "parallel": config.parallel,
        "checkpointing": config.gradient_checkpointing,
        "packing": config.packing,
        "group": config.group,
        "compute": FP32 if precision == "float32" else 2,
        "fused": cluster.gpu != "cpu",
    }


def _at_once(config: StageConfig, gpus: int) -> int:
    """Samples that a process works on at once, as training takes them.

    Raises:
        InputError: if a batch cannot be shared and cut up evenly.
    """
    share = config.batch_size // gpus
    at_once = min(config.device_batch_size or share, share)
    if config.batch_size % gpus:
        raise InputError(f"batch_size {config.batch_size} is not a multiple of gpus={gpus}")
    if share % at_once:
        raise InputError(
            f"batch_size {config.batch_size} over {gpus} GPUs is {share} samples each, which is not a multiple of "
            f"device_batch_size {config.device_batch_size}"
        )
    return at_once


def _finish(run: Run, config: StageConfig, cluster: LlavaPlanConfig) -> dict[str, Any]:
    result = {"config": to_dict(config), **estimate(run, cluster)}
    print_plan(result)
    if cluster.out is not None:
        write_json(cluster.out, result)
    return result


def estimate(run: Run, cluster: LlavaPlanConfig) -> dict[str, Any]:
    """Everything about a stage on a machine, as JSON-able values: FLOPs, bytes, seconds."""
    n = lengths(run, cluster)
    flops = flops_per_sample(run, n)
    model = sum(flops.values(), Flops()).model
    executed = executed_flops(run, n)
    seconds = run.samples * executed / flop_rate(cluster)
    memory = memory_per_gpu(run, cluster, n)
    steps = run.samples // run.batch_size
    checkpoint = checkpoint_bytes(run)
    network = bytes_sent(run, cluster)
    return {
        "run": asdict(run),
        "cluster": to_dict(cluster),
        "parameters": {**parameter_counts(run), "trained": trained_parameters(run)},
        "lengths": n._asdict() | {"padding": 1 - n.tokens / n.row_tokens},
        "flops_per_sample": {part: {**asdict(value), "share": value.model / model} for part, value in flops.items()},
        "flops": {"model": run.samples * model, "executed": run.samples * executed},
        "memory": _with_total(memory, cluster),
        "choices": choices(run, cluster),
        "time": {
            "steps": steps,
            "seconds_per_step": seconds / max(1, steps),
            "samples_per_second": run.samples / seconds,
            "tokens_per_second": run.samples * n.tokens / seconds,
            "hours": seconds / 3600,
            "gpu_hours": cluster.gpus * seconds / 3600,
            "mfu": cluster.mfu * model / executed if cluster.gpu != "cpu" else None,
        },
        "network": {"bytes_per_step": network, "per_second": network * steps / seconds},  # what a GPU sends
        "disk": {
            "model": result_bytes(run),
            "checkpoint": checkpoint,
            "kept_checkpoints": 2 * checkpoint,  # as training keeps them
            "seconds_per_checkpoint": checkpoint / cluster.write_bandwidth,
            "total": result_bytes(run) + 2 * checkpoint,
        },
    }


def flop_rate(cluster: LlavaPlanConfig) -> float:
    """FLOP/s of all GPUs together, as assumed."""
    if cluster.gpu == "cpu":
        return cluster.gpus * cluster.cores * cluster.core_flops
    return cluster.gpus * GPUS[cluster.gpu].peak * cluster.mfu


def usable_memory(cluster: LlavaPlanConfig) -> float:
    """Bytes of a GPU, or of a CPU process."""
    whole = cluster.cpu_memory * GIB / cluster.gpus if cluster.gpu == "cpu" else GPUS[cluster.gpu].mib * 2**20
    return whole * cluster.usable_memory


# ---------------------------------------------------------------------------------------------------------------------
# Lengths
# ---------------------------------------------------------------------------------------------------------------------


def lengths(run: Run, cluster: LlavaPlanConfig) -> Lengths:
    """Of samples drawn from the stage's mixture, in batches as training makes them."""
    return _lengths(
        run.stage, run.tower.image_tokens, cluster.tiles, cluster.text_tokens, run.max_length, run.batch_size,
        run.device_batch_size, run.packing, run.group,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _lengths(
    stage: Stage,
    image_tokens: int,
    tiles: float,
    text_tokens: float | None,
    max_length: int,
    batch_size: int,
    device_batch_size: int,
    packing: bool,
    group: Group,
) -> Lengths:
    drawn = draw(MIXTURES[stage], BATCHES * batch_size)
    factor = 1.0 if text_tokens is None else text_tokens / drawn.text.mean()
    tokens = np.minimum(factor * drawn.text + drawn.picture * image_tokens * tiles, max_length)
    read = tokens - drawn.picture * image_tokens * tiles  # a sample that is too long loses its end
    labels = np.minimum(factor * drawn.learned, np.maximum(read, 1))
    pictures = drawn.picture * tiles
    order = _order(tokens, drawn.picture, batch_size, group)
    parts = order.reshape(-1, device_batch_size)
    if packing:  # the parts of a batch have about as many tokens each, and so have the rows of a part
        totals = tokens[order].reshape(-1, batch_size).sum(1).repeat(batch_size // device_batch_size)
        totals *= device_batch_size / batch_size
        rows = np.ceil(totals / max_length)
        longest = np.maximum(totals / rows, tokens[parts].max(1))
    else:
        rows, longest = np.full(len(parts), device_batch_size), tokens[parts].max(1)
    computed, squares = rows * longest, rows * longest**2
    largest = int(computed.argmax())
    return Lengths(
        tokens=float(tokens.mean()),
        squares=float((tokens**2).mean()),
        labels=float(labels.mean()),
        pictures=float(pictures.mean()),
        row_tokens=float(computed.sum() / len(order)),
        row_squares=float(squares.sum() / len(order)),
        peak_tokens=float(computed[largest]),
        peak_squares=float(squares[largest]),
        peak_labels=float(labels[parts].sum(1).max()),
        peak_pictures=float(pictures[parts].sum(1).max()),
    )


def _order(tokens: np.ndarray, picture: np.ndarray, batch_size: int, group: Group) -> np.ndarray:
    """Samples in batches as `batching.grouped` makes them, but for the order of the batches."""
    if group == "none":
        return np.arange(len(tokens))
    if group == "length":
        stretches = _stretches(np.arange(len(tokens)), 16 * batch_size)
    else:  # what is left of a kind is a batch or less, and is seen mixed
        kinds = [np.flatnonzero(picture), np.flatnonzero(~picture)]
        whole = [kind[: len(kind) - len(kind) % batch_size] for kind in kinds]
        rest = np.concatenate([kind[len(part) :] for kind, part in zip(kinds, whole, strict=True)])
        stretches = [batch for part in (*whole, rest) for batch in _stretches(part, batch_size)]
    return np.concatenate([stretch[np.argsort(-tokens[stretch])] for stretch in stretches])


def _stretches(items: np.ndarray, size: int) -> list[np.ndarray]:
    return [items[start : start + size] for start in range(0, len(items), size)]


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def parameter_counts(run: Run) -> dict[str, int]:
    """Of each part of the LLaVA, by the names in its table of trainable parameters."""
    width = run.llm.width
    counts = {
        "vision tower": run.tower.parameters,
        "projector": (run.tower.width + 1) * width + (width + 1) * width,
        "language model": run.llm.parameters,
        "adapters": run.llm.layers * run.rank * (run.llm.inputs + run.llm.outputs) if run.adapters else 0,
    }
    return {**counts, "total": sum(counts.values())}


def trained_parameters(run: Run) -> int:
    """That have a gradient and AdamW's two moments."""
    counts = parameter_counts(run)
    projector = counts["projector"] if run.projector != "linear" else (run.tower.width + 1) * run.llm.width
    language = counts["language model"] if run.method == "full" else counts["adapters"]
    tower = run.tower
    below = tower.parameters - tower.above - (tower.layers - run.read_layers) * tower.block
    return projector + language + (below if run.tower_trained else 0)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def flops_per_sample(run: Run, n: Lengths) -> dict[str, Flops]:
    """FLOPs of one sample by part, of its real tokens."""
    return _flops(run, n.tokens, n.squares, n)


def executed_flops(run: Run, n: Lengths) -> float:
    """Of one sample, with its share of the padding and with what is computed again."""
    return sum(_flops(run, n.row_tokens, n.row_squares, n).values(), Flops()).executed


def _flops(run: Run, tokens: float, squares: float, n: Lengths) -> dict[str, Flops]:
    pictures, labels, chunked = n.pictures, n.labels, n.peak_labels > LOSS_CHUNK
    llm, full = run.llm, run.method == "full"
    parts = {"tower": _tower_flops(run, pictures)}

    first, second = run.tower.image_tokens * run.tower.width * llm.width, run.tower.image_tokens * llm.width**2
    parts["projector"] = product(pictures * first, 1 + run.tower_trained)
    parts["projector"] += product(pictures * second, 1 if run.projector == "linear" else 2)

    # The projector lies below the language model: its gradient goes through all of it, frozen or not.
    blocks = product(llm.layers * tokens * llm.linear, 1 + full)
    attention = product(llm.layers * 2 * squares * llm.queries, 2)
    adapters = Flops()
    if run.adapters:
        adapters = product(llm.layers * tokens * run.rank * (llm.inputs + llm.outputs), 2)
    if run.checkpointing:  # all but the last product of a block, whose result nothing needs
        last = 2.0 * llm.layers * tokens * llm.width * (run.rank if run.adapters else llm.mlp)
        blocks = replace(blocks, recomputed=blocks.forward - (0 if run.adapters else last))
        adapters = replace(adapters, recomputed=adapters.forward - last if run.adapters else 0.0)
        attention = replace(attention, recomputed=attention.forward)
    parts |= {"language model": blocks, "attention": attention}
    if run.adapters:
        parts["adapters"] = adapters

    head = product(labels * llm.width * llm.vocab, 1 + full)
    # The fused kernel takes the logits' gradient while it has them; the plain loss computes chunks again, where there are several.
    parts["head"] = replace(head, recomputed=head.forward if chunked and not run.fused else 0.0)
    return parts


def _tower_flops(run: Run, pictures: float) -> Flops:
    """All blocks run forward; what trains has gradients up to the hidden state that the projector reads."""
    tower = run.tower
    block = product(tower.tokens * tower.linear + 2 * tower.tokens**2 * tower.width, 2)
    patches = product(tower.patches * 3 * tower.patch_size**2 * tower.width, 1)  # no gradient with respect to pixels
    forward = tower.layers * block.forward + patches.forward
    if not run.tower_trained:
        return Flops(pictures * forward)
    again = block.forward - 2.0 * tower.tokens * tower.mlp * tower.width if run.checkpointing else 0.0
    return Flops(
        pictures * forward,
        pictures * (run.read_layers * block.backward + patches.backward),
        pictures * run.read_layers * again,
    )


def bytes_sent(run: Run, cluster: LlavaPlanConfig) -> float:
    """Bytes that each GPU sends in a step, with ring algorithms."""
    counts, trained = parameter_counts(run), trained_parameters(run)
    parts = math.ceil(run.batch_size / cluster.gpus / run.device_batch_size)
    if run.parallel == "zero3":  # weights gathered forward and backward, in each part of an accumulated batch
        shared = parts * run.compute * (2 * counts["total"] + trained)
    elif run.parallel == "zero2":  # gradients of each part reduced to their owners; new weights gathered
        shared = run.compute * trained * (parts + 1)
    else:
        shared = FP32 * 2 * trained
    return shared * (cluster.gpus - 1) / cluster.gpus


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory_per_gpu(run: Run, cluster: LlavaPlanConfig, n: Lengths) -> dict[str, float]:
    """Bytes at the peak of a step, by what holds them, in eager mode."""
    counts, trained, compute = parameter_counts(run), trained_parameters(run), run.compute
    zero, shards = run.parallel != "ddp", cluster.gpus
    quantised = run.llm.layers * run.llm.linear if run.method == "qlora" else 0
    frozen = counts["total"] - trained - quantised
    if zero:  # everything in the compute precision; a copy in fp32 beside the moments
        weights = compute * counts["total"] / (shards if run.parallel == "zero3" else 1)
        gradients, optimizer = compute * trained / shards, 3 * FP32 * trained / shards
    else:
        weights = FP32 * trained + compute * frozen + NF4 * quantised
        gradients, optimizer = float(FP32 * trained), float(2 * FP32 * trained)
    block = run.llm.linear + run.llm.vectors
    gathered = 0.0
    if run.parallel == "zero3" and shards > 1:  # the block at work and the next one; embedding and head
        gathered = compute * (2.0 * block + run.llm.embedding * (1 if run.llm.tied else 2))
    return {
        "weights": weights,
        "gathered": gathered,
        "bf16 copies": 2.0 * trained if not zero and compute == 2 else 0.0,  # autocast's
        "gradients": gradients,
        "buckets": float(FP32 * trained) if not zero and shards > 1 else 0.0,  # in which DDP adds them up
        "optimizer": optimizer,
        "activations": activation_bytes(run, n),
        "workspace": workspace_bytes(run, n),
        "batch": n.peak_pictures * 3 * run.tower.image_size**2 * FP32 + 24 * n.peak_tokens,
    }


def activation_bytes(run: Run, n: Lengths) -> float:
    """Bytes that the forward pass of the largest device batch keeps for the backward pass."""
    llm, tower, compute, full = run.llm, run.tower, run.compute, run.method == "full"
    tokens, stream = n.peak_tokens, _stream(run)
    kept = llm.layers * tokens * stream * llm.width if run.checkpointing else llm.layers * _block_bytes(run, n)
    kept += tokens * (llm.width * (FP32 + (stream if full else 0)) + 8)  # final norm; ids
    kept += n.peak_labels * compute * llm.width  # what the head reads
    kept += n.peak_pictures * compute * (tower.tokens * tower.width + 2 * tower.image_tokens * llm.width)  # projector
    if run.tower_trained:
        entering = compute * tower.tokens * tower.width if run.checkpointing else _tower_block_bytes(run)
        # The blocks above the hidden state that is read keep theirs too, until the forward pass has ended.
        kept += n.peak_pictures * (tower.layers * entering + 3 * tower.image_size**2 * compute)
    return kept


def _stream(run: Run) -> int:
    """Bytes of a number of the residual stream: fp32 where the embedding trains in fp32."""
    return FP32 if run.method == "full" and run.parallel == "ddp" else run.compute


def _block_bytes(run: Run, n: Lengths) -> float:
    """Kept by one block of the language model for the largest device batch."""
    llm, compute, full, stream = run.llm, run.compute, run.method == "full", _stream(run)
    mixed = compute == 2 and run.parallel == "ddp"  # weights in fp32 under autocast: each product casts its own input
    norms = 2 * (llm.width * (FP32 + (stream if full else 0)) + FP32)
    if llm.qk_norm:
        norms += (llm.queries + llm.keys) * FP32
    attention = compute * 3 * llm.queries  # rotated queries; keys and values, repeated for each query head
    attention += (compute * llm.queries + FP32 * llm.heads) if run.fused else 0  # result and log-sum-exp
    middle = 3 * compute * llm.mlp  # of the MLP: gate before and after its activation, and up
    shared = (
        2 * llm.width + llm.mlp + (0 if run.fused else llm.queries)
    )  # entering the matrices, where nothing is copied
    entering = 0.0
    if full:
        entering = compute * (5 * llm.width + llm.mlp + (0 if run.fused else llm.queries) if mixed else shared)
    elif run.adapters:
        dropped = run.dropout > 0
        own = llm.inputs * (compute + dropped)  # a copy for each adapter, and dropout's mask
        entering = (own if mixed or dropped else compute * shared) + 7 * compute * run.rank
    kept = n.peak_tokens * (norms + attention + middle + entering)
    if not run.fused:  # plain attention keeps its weights, in fp32 and in the compute precision
        kept += llm.heads * n.peak_squares * (FP32 + (2 if compute == 2 else 0))
    return kept


def _tower_block_bytes(run: Run) -> float:
    """Kept by one block of a trained tower for one picture: norms, q, k, v, attention's result, and the MLP's middle twice."""
    tower, compute = run.tower, run.compute
    return tower.tokens * (tower.width * (2 * FP32 + 6 * compute) + 2 * compute * tower.mlp + FP32 * (4 + tower.heads))


def workspace_bytes(run: Run, n: Lengths) -> float:
    """The largest of what exists for a moment only: a block's backward pass, a chunk of logits."""
    llm, compute, stream = run.llm, run.compute, _stream(run)
    # Gradients of the MLP's middle or of plain attention's weights, whichever are more; and of the residual stream.
    attention = 0 if run.fused else 2 * FP32 * llm.heads * n.peak_squares
    middle = 3 if run.method is None else 2  # where a weight trains, what entered it goes as its gradient comes
    block = max(middle * compute * llm.mlp * n.peak_tokens, attention) + 2 * stream * llm.width * n.peak_tokens
    if run.checkpointing:
        block += _block_bytes(run, n)
    if run.method == "qlora":
        block += compute * llm.mlp * llm.width  # the matrix at work, in the compute precision
    return max(block, _loss_bytes(run, n))


def _loss_bytes(run: Run, n: Lengths) -> float:
    """Of logits and their gradient; of the head's gradient before it is added to what is there, and its copy for autocast."""
    llm, full = run.llm, run.method == "full"
    head = FP32 * llm.embedding if full else 0
    if not run.fused:
        return head + 3 * FP32 * min(n.peak_labels, LOSS_CHUNK) * llm.vocab
    copy = run.compute * llm.embedding if full and run.parallel == "ddp" else 0
    parts = math.ceil(llm.vocab / llm.width)  # Liger's chunks: about as many bytes of logits as of what the head reads
    rows = min(n.peak_labels, 2 ** math.ceil(math.log2(max(1, n.peak_labels / parts))))
    return head + copy + run.compute * (rows * llm.vocab + n.peak_labels * llm.width)


def _with_total(memory: dict[str, float], cluster: LlavaPlanConfig) -> dict[str, Any]:
    total = sum(memory.values())
    return {**memory, "total": total, "usable": usable_memory(cluster), "fits": total <= usable_memory(cluster)}


# ---------------------------------------------------------------------------------------------------------------------
# Disk
# ---------------------------------------------------------------------------------------------------------------------


def result_bytes(run: Run) -> int:
    """Of the stage's result: a whole LLaVA, or the adapters and the projector."""
    counts = parameter_counts(run)
    if run.save == "adapter" and run.stage == "tune":
        return FP32 * trained_parameters(run)
    return run.compute * (counts["total"] - counts["adapters"])


def checkpoint_bytes(run: Run) -> int:
    """Of one checkpoint: what trains, in fp32, and AdamW's two moments; under ZeRO the weights in the compute precision too."""
    return trained_parameters(run) * (3 * FP32 + (run.compute if run.parallel != "ddp" else 0))


# ---------------------------------------------------------------------------------------------------------------------
# Choices
# ---------------------------------------------------------------------------------------------------------------------


def choices(run: Run, cluster: LlavaPlanConfig) -> list[dict[str, Any]]:
    """For each way to train, to share and to save memory: the largest device batch that fits, and the hours."""
    methods: tuple[Method | None, ...] = ("lora", "qlora", "full") if run.stage == "tune" else (None,)
    parallels: tuple[Parallel, ...] = ("ddp", "zero2", "zero3") if cluster.gpus > 1 else ("ddp",)
    return [
        _choice(replace(run, method=method, parallel=parallel, checkpointing=again), cluster)
        for method in methods
        for parallel in parallels
        for again in (False, True)
        if not (method == "qlora" and parallel != "ddp")  # as the config refuses
    ]


def _choice(run: Run, cluster: LlavaPlanConfig) -> dict[str, Any]:
    size = run.batch_size // cluster.gpus
    while True:
        tried = replace(run, device_batch_size=size)
        n = lengths(tried, cluster)
        memory = sum(memory_per_gpu(tried, cluster, n).values())
        fits = memory <= usable_memory(cluster)
        if fits or size % 2:
            return {
                "method": run.method or "projector",
                "parallel": run.parallel,
                "gradient_checkpointing": run.checkpointing,
                "device_batch_size": size if fits else None,
                "memory": memory,
                "hours": run.samples * executed_flops(tried, n) / flop_rate(cluster) / 3600 if fits else None,
                "checkpoint": checkpoint_bytes(tried),
            }
        size //= 2


# ---------------------------------------------------------------------------------------------------------------------
# Print
# ---------------------------------------------------------------------------------------------------------------------


def print_plan(result: dict[str, Any]) -> None:
    """The plan as tables on the terminal."""
    run, cluster, parameters, n = (result[key] for key in ("run", "cluster", "parameters", "lengths"))
    time, memory, disk, network = (result[key] for key in ("time", "memory", "disk", "network"))
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    title = "stage 1: projector" if run["stage"] == "align" else f"stage 2: {run['method']}"
    trained = ", tower trained" if run["tower_trained"] else ""
    console.print(
        f"[bold]{title}{trained}[/bold]: {si(parameters['language model'])} parameters of language model, "
        f"{si(parameters['vision tower'])} of tower, {si(parameters['trained'])} trained; {run['samples']:,} samples, batch "
        f"{run['batch_size']} ({run['device_batch_size']} at once), {run['parallel']}, on {cluster['gpus']} × {cluster['gpu']}",
        soft_wrap=True,
    )
    console.print(flops_table("GFLOP a sample", result["flops_per_sample"]))
    console.print(memory_table(f"GiB a {'process' if cluster['gpu'] == 'cpu' else 'GPU'}", memory))
    table = Table("trains", "parallel", "gradient checkpointing", "largest device batch", "GiB a GPU", "hours",
                  "GB a checkpoint", box=box.SIMPLE_HEAD)  # fmt: skip
    for choice in result["choices"]:
        fits = choice["device_batch_size"] is not None
        table.add_row(
            choice["method"], choice["parallel"], "yes" if choice["gradient_checkpointing"] else "no",
            str(choice["device_batch_size"]) if fits else "none fits", f"{choice['memory'] / GIB:.1f}",
            f"{choice['hours']:.1f}" if fits else "", f"{choice['checkpoint'] / 1e9:.1f}",
        )  # fmt: skip
    console.print(to_the_right(table))
    if not memory["fits"]:
        console.print(f"[bold red]does not fit into a {cluster['gpu']}[/bold red]: see what does, above\n")
    reached = "" if time["mfu"] is None else f", MFU {100 * time['mfu']:.0f} %"
    gpu_hours = "" if cluster["gpu"] == "cpu" else f" ({time['gpu_hours']:,.1f} GPU hours)"
    facts = {
        "lengths": f"{n['tokens']:.0f} tokens a sample, {n['labels']:.0f} of them learned; {100 * n['padding']:.0f} % of what is "
        "computed is padding",
        "work": f"{result['flops']['model']:.3g} FLOP, {result['flops']['executed']:.3g} with padding and what is computed twice",
        "time": f"{time['hours']:.2f} hours{gpu_hours}, {time['steps']:,} steps of "
        f"{time['seconds_per_step']:.2f} s, {time['samples_per_second']:,.1f} samples/s, "
        f"{time['tokens_per_second']:,.0f} tokens/s{reached}",
        "disk": f"{si(disk['model'])}B of result, {si(disk['kept_checkpoints'])}B for two checkpoints "
        f"({disk['seconds_per_checkpoint']:.0f} s to write one)",
    }
    if cluster["gpus"] > 1:
        facts["network"] = f"each GPU sends {si(network['bytes_per_step'])}B a step, {si(network['per_second'])}B/s"
    for name, fact in facts.items():
        console.print(f"{name:<12}{fact}", soft_wrap=True)
