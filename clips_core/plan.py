"""What a pretraining run will cost, by arithmetic alone: FLOPs, memory, days, storage, bandwidth. Imports no torch.

The work is counted as torch counts it: two FLOPs a multiply-add, matrix products and convolutions only, attention dense even where
it is causal. tests/test_plan.py holds the counts against torch's FlopCounterMode and the memory against real models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from rich import box
from rich.console import Console
from rich.table import Table

from clips_core.config import (
    FORBID,
    ModelConfig,
    PretrainConfig,
    TransformerConfig,
    load_config,
    load_settings,
    to_dict,
)
from clips_core.errors import InputError
from clips_core.folders import write_json

GIB = 2**30
FP32 = 4  # bytes
CAPTION_CHUNK = 4096  # rows of caption logits that exist at once, as in `loss.summed_caption_loss`
CONTRASTIVE_CHUNK = 1024  # of contrastive logits, as in `loss.info_nce`


class Gpu(NamedTuple):
    """Vendor's data sheet; and what nvidia-smi shows as memory."""

    peak: float  # dense bf16 tensor-core FLOP/s
    mib: int
    bandwidth: float  # of its memory, bytes a second


GPUS = {
    "a100": Gpu(312e12, 81_920, 2.039e12),
    "h100": Gpu(989e12, 81_559, 3.35e12),  # SXM
    "h200": Gpu(989e12, 143_771, 4.8e12),
    "l40s": Gpu(362e12, 46_068, 0.864e12),
    "rtx4090": Gpu(165e12, 24_564, 1.008e12),
}


@config_dataclass(config=FORBID)
class PlanConfig:
    """The cluster and the assumptions. Everything about the run itself stands in its recipe."""

    gpus: int = Field(default=8, ge=1)
    gpu: Literal["a100", "h100", "h200", "l40s", "rtx4090"] = "h100"
    gpus_per_node: int = Field(default=8, ge=1)
    # Share of the peak that the run would reach if it recomputed nothing. Published CLIP trainings ran at 11–19 % on A100; this
    # project aims at 40 % on an H100 with bf16, torch.compile and flash attention.
    mfu: float = Field(default=0.30, gt=0, le=1)
    usable_memory: float = Field(default=0.90, gt=0, le=1)  # the rest: CUDA context, NCCL's buffers, fragmentation
    target_tokens: float = Field(default=64, ge=0)  # mean tokens of a synthetic caption (Recap-DataComp: 49 words)
    web_tokens: float = Field(default=16, ge=0)  # of a web caption (10 words)
    pictures: int = Field(default=1_000_000_000, ge=1)  # in the data set; more samples than that are further epochs
    stored_size: int | None = None  # side of the stored pictures; null: the smallest crop still fills image_size
    bytes_per_pixel: float = Field(
        default=0.4, gt=0
    )  # JPEG of quality 90 or so (LAION-400M at 256 px: 25 KB a picture)
    bytes_per_sample: int = Field(default=3072, ge=0)  # captions, and tar headers and padding of three files
    samples_per_shard: int = Field(default=10_000, ge=1)  # img2dataset's default
    images_per_core: float = Field(default=1_000, gt=0)  # pictures that a CPU core decodes a second, pre-resized
    network_bandwidth: float = Field(default=50e9, gt=0)  # bytes a second between nodes, for each GPU (400 Gbit/s)
    write_bandwidth: float = Field(default=2e9, gt=0)  # bytes a second of the file system that takes the checkpoints
    out: Path | None = None  # a JSON file with all of it


@dataclass(frozen=True)
class Flops:
    """Of one picture."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0  # forward again: gradient caching, activation checkpointing

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    @property
    def model(self) -> float:
        """Forward and backward, what MFU counts."""
        return self.forward + self.backward

    @property
    def executed(self) -> float:
        return self.model + self.recomputed


class Lengths(NamedTuple):
    """Tokens of one picture's sequences."""

    patches: int  # N
    text: int  # T
    texts: int  # K: how many texts the encoder reads
    prefix: int  # P: what the decoder's queries see besides each other
    queries: int  # M
    targets: float  # mean number of real ones among the M


def plan(package_folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Plan the run of a command line, print it, and write it where `out` says.

    Args:
        package_folder: where the recipes' names are looked up.
        settings: recipes, then overrides: of `PlanConfig` where it has such a key, else of the recipe.

    Raises:
        InputError: for an unknown key, or a batch that the GPUs cannot share evenly.
    """
    of_plan, of_run = split_settings(PlanConfig, settings)
    cluster = load_config(PlanConfig, None, of_plan)
    run = load_settings(PretrainConfig, package_folder, of_run)
    result = estimate(run, cluster)
    print_plan(result)
    if cluster.out is not None:
        write_json(cluster.out, result)
    return result


def split_settings(plan_config: type, settings: Sequence[str]) -> tuple[list[str], list[str]]:
    """The overrides whose key is the plan's own, and all the others, with the names of recipes."""
    own = {field.name for field in fields(plan_config)}
    of_plan = [s for s in settings if "=" in s and s.partition("=")[0].split(".")[0] in own]
    return of_plan, [s for s in settings if s not in of_plan]


def estimate(run: PretrainConfig, cluster: PlanConfig) -> dict[str, Any]:
    """Everything about a run on a cluster, as JSON-able values: FLOPs, bytes, seconds.

    Raises:
        InputError: if the GPUs cannot share the batch evenly.
    """
    if run.batch_size % cluster.gpus:
        raise InputError(f"batch_size {run.batch_size} is not a multiple of gpus={cluster.gpus}")
    steps = run.samples // run.batch_size
    flops = flops_per_sample(run, cluster)
    total = sum(flops.values(), Flops())
    memory = memory_per_gpu(run, cluster)
    speed = images_per_second(run, cluster)
    seconds = run.samples / speed
    stored = cluster.stored_size or math.ceil(run.model.image_size / math.sqrt(run.data.crop_area))
    sample_bytes = stored**2 * cluster.bytes_per_pixel + cluster.bytes_per_sample
    pictures = min(run.samples, cluster.pictures)
    parameters = parameter_counts(run.model)
    trained = trained_parameters(run)
    sent = bytes_sent(run, cluster)
    # Weights; AdamW's two moments and the average of what trains.
    checkpoint = FP32 * (parameters["total"] + trained * (2 + (run.ema_decay is not None)))
    return {
        "run": to_dict(run),
        "cluster": to_dict(cluster),
        "parameters": {**parameters, "trained": trained},
        "flops_per_sample": {
            part: {**asdict(value), "share": value.model / total.model} for part, value in flops.items()
        },
        "flops": {"model": run.samples * total.model, "executed": run.samples * total.executed},
        "memory": {
            **memory,
            "total": sum(memory.values()),
            "usable": usable_memory(cluster),
            "fits": sum(memory.values()) <= usable_memory(cluster),
        },
        "choices": [
            _choice(run, cluster, sharding, again) for sharding in _shardings(cluster) for again in (False, True)
        ],
        "time": {
            "steps": steps,
            "images_per_second": speed,
            "seconds_per_step": run.batch_size / speed,
            "mfu": cluster.mfu * total.model / total.executed,  # the model's FLOPs over all of the time
            "seconds": seconds,
            "days": seconds / 86_400,
            "gpu_hours": cluster.gpus * seconds / 3600,
        },
        "data": {
            "epochs": run.samples / pictures,
            "stored_size": stored,
            "bytes_per_sample": sample_bytes,
            "shards": math.ceil(pictures / cluster.samples_per_shard),
            "storage": pictures * sample_bytes,
            "read_bandwidth": speed * sample_bytes,
            "read_bandwidth_per_node": speed * sample_bytes * min(cluster.gpus_per_node, cluster.gpus) / cluster.gpus,
            "decoding_cores_per_node": math.ceil(
                speed / cluster.images_per_core * min(cluster.gpus_per_node, cluster.gpus) / cluster.gpus
            ),
        },
        "network": {"bytes_per_step": sent, "per_second": sent * speed / run.batch_size},  # what a GPU sends
        "checkpoint": {
            "bytes": checkpoint,
            "kept_bytes": checkpoint * run.keep_checkpoints,
            "seconds": checkpoint / cluster.write_bandwidth,
            "seconds_between": run.save_every * run.batch_size / speed,
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Parameters
# ---------------------------------------------------------------------------------------------------------------------


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters of each part, by the names of the model's attributes; the fixed position embeddings are counted too."""
    vision, text, decoder = model.vision, model.text, model.decoder
    tokens = (model.image_size // model.patch_size) ** 2 + 1
    counts = {
        "visual": 3 * model.patch_size**2 * vision.width
        + (1 + tokens) * vision.width
        + _block_parameters(vision)
        + 2 * vision.width
        + vision.width * model.embed_dim,
        "text": (model.vocab_size + model.context_length) * text.width
        + _block_parameters(text)
        + 2 * text.width
        + text.width * model.embed_dim,
        "decoder": 0
        if decoder is None
        else (vision.width + text.width + model.learnable_tokens + 2 + model.vocab_size) * decoder.width
        + _block_parameters(decoder),
    }
    return {**counts, "total": sum(counts.values()) + 1}  # 1: logit_scale


def _block_parameters(transformer: TransformerConfig) -> int:
    """Of all blocks: 12 d² in matrices, 13 d in biases and LayerNorms."""
    return transformer.layers * (12 * transformer.width**2 + 13 * transformer.width)


def trained_parameters(run: PretrainConfig) -> int:
    """Parameters that have a gradient and AdamW's two moments."""
    counts = parameter_counts(run.model)
    frozen = sum(counts[part] for part in run.frozen)
    fixed_positions = ((run.model.image_size // run.model.patch_size) ** 2 + 1) * run.model.vision.width
    return counts["total"] - frozen - (0 if "visual" in run.frozen else fixed_positions)


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


def lengths(run: PretrainConfig, cluster: PlanConfig) -> Lengths:
    """Sequence lengths of a picture. In a batch of any size some caption fills all learnable tokens."""
    model = run.model
    patches = (model.image_size // model.patch_size) ** 2
    texts = 2 if run.method == "clips" and run.contrastive_sub else 1
    # coca writes the text that it encodes, which is synthetic in one case of five, and sees the picture alone
    targets = cluster.target_tokens if run.method == "clips" else 0.8 * cluster.web_tokens + 0.2 * cluster.target_tokens
    return Lengths(
        patches=patches,
        text=model.context_length,
        texts=texts,
        prefix=patches + (model.context_length - 1 if run.method == "clips" else 0),
        queries=model.learnable_tokens,
        targets=min(targets, model.learnable_tokens),
    )


def flops_per_sample(run: PretrainConfig, cluster: PlanConfig) -> dict[str, Flops]:
    """FLOPs of one picture by part: vision, text (all of them), decoder, head, contrastive."""
    model, n = run.model, lengths(run, cluster)
    local = run.batch_size // cluster.gpus
    cached = run.micro_batch is not None and run.micro_batch < local
    trained = {part: part not in run.frozen for part in ("visual", "text", "decoder")}

    vision = _tower(model.vision, n.patches + 1, trained["visual"])
    again = _again(vision, model.vision, n.patches + 1) if run.activation_checkpointing and trained["visual"] else 0
    patch = 2.0 * n.patches * 3 * model.patch_size**2 * model.vision.width
    vision += Flops(patch, patch * trained["visual"])  # no gradient with respect to pixels
    vision += product(model.vision.width * model.embed_dim, 2 * trained["visual"])
    vision = replace(vision, recomputed=vision.forward * cached + again)

    text = _tower(model.text, n.text, trained["text"])
    again = _again(text, model.text, n.text) if run.activation_checkpointing and trained["text"] else 0
    text += product(model.text.width * model.embed_dim, 2 * trained["text"])
    text = replace(text, recomputed=text.forward * cached + again)
    text = Flops(n.texts * text.forward, n.texts * text.backward, n.texts * text.recomputed)

    # Per InfoNCE: both directions forward, logits again and the products with the features backward.
    pairs = run.batch_size * model.embed_dim
    parts = {"vision": vision, "text": text}
    if model.decoder is not None:
        parts["decoder"] = _decoder(run, n, trained)
        grads = 1 + trained["decoder"]
        parts["head"] = product(n.targets * model.decoder.width * model.vocab_size, grads)
    parts["contrastive"] = Flops(n.texts * 4.0 * pairs, n.texts * 8.0 * pairs)
    return parts


def product(multiply_adds: float, gradients: float) -> Flops:
    """A matrix product with so many gradients: of its weight, of its input."""
    return Flops(2.0 * multiply_adds, 2.0 * multiply_adds * gradients)


def _again(blocks: Flops, transformer: TransformerConfig, rows: float) -> float:
    """What activation checkpointing computes again: all but each block's last product, whose result nothing needs.

    Args:
        rows: tokens that go through the last product, the mean of all blocks.
    """
    return blocks.forward - 2.0 * transformer.layers * 4 * rows * transformer.width**2


def _tower(transformer: TransformerConfig, tokens: int, trained: bool) -> Flops:
    """The blocks of a tower. Nothing lies below a tower, so a frozen one has no backward pass at all."""
    width = transformer.width
    linear = product(transformer.layers * 12 * tokens * width**2, 2 * trained)
    attention = product(transformer.layers * 2 * tokens**2 * width, 2 * trained)
    return linear + attention


def _decoder(run: PretrainConfig, n: Lengths, trained: dict[str, bool]) -> Flops:
    """Projections and blocks: the last block computes queries only, the others all, with prefix ↔ prefix and queries → all."""
    model, decoder = run.model, run.model.decoder
    assert decoder is not None
    own = trained["decoder"]
    read = n.text - 1 if run.method == "clips" else n.queries  # tokens that text_proj maps
    width, everything = decoder.width, n.prefix + n.queries
    projections = product(n.patches * model.vision.width * width, own + trained["visual"])
    projections += product(read * model.text.width * width, own + trained["text"])
    linear = (decoder.layers - 1) * 12 * everything + (2 * everything + 10 * n.queries)
    attention = (decoder.layers - 1) * 2 * (n.prefix**2 + n.queries * everything) + 2 * n.queries * everything
    blocks = product(linear * width**2, own + 1) + product(attention * width, 2)
    rows = everything - n.prefix / decoder.layers
    return projections + replace(
        blocks, recomputed=_again(blocks, decoder, rows) if run.activation_checkpointing else 0
    )


def images_per_second(run: PretrainConfig, cluster: PlanConfig) -> float:
    """Of all GPUs together."""
    total = sum(flops_per_sample(run, cluster).values(), Flops())
    return cluster.gpus * GPUS[cluster.gpu].peak * cluster.mfu / total.executed


def bytes_sent(run: PretrainConfig, cluster: PlanConfig) -> float:
    """Bytes that each GPU sends in a step, with ring algorithms: gradients once under DDP, weights and gradients of every
    micro-batch under FSDP; the features of the contrastive terms."""
    counts, trained = parameter_counts(run.model), trained_parameters(run)
    local = run.batch_size // cluster.gpus
    micro_batches = math.ceil(local / min(run.micro_batch or local, local))
    features = (1 + lengths(run, cluster).texts) * run.model.embed_dim * run.batch_size
    if run.sharding == "ddp":
        shared = 2 * trained  # an all-reduce is a reduce-scatter and an all-gather
    else:  # gathered forward and backward, and forward once more for the features of gradient caching
        gathers = micro_batches * (2 + (micro_batches > 1))
        shared = gathers * counts["total"] + micro_batches * trained
    return FP32 * (shared + features) * (cluster.gpus - 1) / cluster.gpus


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def usable_memory(cluster: PlanConfig) -> float:
    return GPUS[cluster.gpu].mib * 2**20 * cluster.usable_memory


def memory_per_gpu(run: PretrainConfig, cluster: PlanConfig) -> dict[str, float]:
    """Bytes at the peak of a step, by what holds them, in eager mode."""
    model, counts = run.model, parameter_counts(run.model)
    trained, compute = trained_parameters(run), _compute_bytes(run)
    total, shards = counts["total"], cluster.gpus if run.sharding == "fsdp" else 1
    sharded = 1 / shards
    blocks = {part: _block_parameters(t) / t.layers for part, t in _transformers(model).items()}
    gathered = 0.0
    if shards > 1:  # the block at work and the next one, weights and gradients; and what lies outside of blocks
        outside = total - sum(t.layers * blocks[part] for part, t in _transformers(model).items())
        gathered = FP32 * 2 * (2 * max(blocks.values()) + outside)
    matrices = sum(12 * t.layers * t.width**2 for t in _transformers(model).values())
    matrices += model.decoder.width * model.vocab_size if model.decoder is not None else 0
    # Under FSDP autocast's copies go with the gathered weights they were made of.
    copies = compute * (matrices if shards == 1 else 2 * max(blocks.values())) if run.precision == "bf16" else 0
    micro = min(run.micro_batch or run.batch_size, run.batch_size // cluster.gpus)
    return {
        "weights": FP32 * total * sharded,
        "gathered": gathered,
        "bf16 copies": copies,
        "gradients": FP32 * trained * sharded,
        "optimizer": FP32 * 2 * trained * sharded,
        "ema": FP32 * trained * sharded if run.ema_decay is not None else 0,
        "activations": micro * activation_bytes(run, cluster),
        "workspace": _workspace(run, cluster, micro),
        "batch": _batch_bytes(run, cluster),
    }


def activation_bytes(run: PretrainConfig, cluster: PlanConfig) -> float:
    """Bytes that one picture's forward pass keeps for the backward pass."""
    model, n, compute = run.model, lengths(run, cluster), _compute_bytes(run)
    again = run.activation_checkpointing
    total = 0.0
    if "visual" not in run.frozen:
        total += 3 * model.image_size**2 * compute  # pixels, for the gradient of the first layer's weight
        total += _kept_by_blocks(model.vision, n.patches + 1, compute, compute, again)
    if "text" not in run.frozen:  # its residual stream stays in fp32, as its embedding gives it
        total += n.texts * _kept_by_blocks(model.text, n.text, compute, FP32, again)
        total += n.texts * n.text * (FP32 * model.text.width + 8)  # what the final LayerNorm reads a row of; ids
    if model.decoder is not None:
        width, everything = model.decoder.width, n.prefix + n.queries
        read = n.text - 1 if run.method == "clips" else n.queries
        total += compute * (n.patches * model.vision.width + read * model.text.width)  # inputs of the projections
        full = replace_layers(model.decoder, model.decoder.layers - 1)
        total += _kept_by_blocks(full, everything, compute, compute, again)
        # One copy more than in a tower: the two attention calls' results are joined.
        total += 0 if again else full.layers * everything * width * compute
        # The last block: input; normed input, keys and values of all; for the queries alone attention and MLP.
        last = width * (FP32 * everything + compute * (3 * everything + 13 * n.queries) + FP32 * n.queries)
        total += width * everything * compute if again else last
        total += width * n.queries * FP32 + width * n.targets * compute  # final LayerNorm; the head's gradient
    return total


def replace_layers(transformer: TransformerConfig, layers: int) -> TransformerConfig:
    """The same transformer with another number of layers."""
    return TransformerConfig(transformer.width, layers, transformer.heads)


def _kept_by_blocks(transformer: TransformerConfig, tokens: int, compute: int, stream: int, again: bool) -> float:
    """Bytes kept by all blocks; under activation checkpointing, what enters each of them: the residual stream."""
    if again:
        return float(transformer.layers * tokens * transformer.width * stream)
    return transformer.layers * _kept_by_block(transformer, tokens, compute)


def _kept_by_block(transformer: TransformerConfig, tokens: int, compute: int) -> float:
    """Two LayerNorms' inputs in fp32 (autocast casts them on a GPU); in the compute precision: their outputs, q, k, v, the
    attention's result, and the MLP's middle before and after GELU; the LayerNorms' and attention's statistics."""
    statistics = tokens * FP32 * (4 + transformer.heads)
    return tokens * transformer.width * (2 * FP32 + 14 * compute) + statistics


def _workspace(run: PretrainConfig, cluster: PlanConfig, micro: int) -> float:
    """The largest of what exists for a moment only: a block's backward pass, a chunk of caption logits, of contrastive ones."""
    model, n, compute = run.model, lengths(run, cluster), _compute_bytes(run)
    sequences = {"visual": n.patches + 1, "text": n.texts * n.text, "decoder": n.prefix + n.queries}
    in_block, caption = 0.0, 0.0
    for part, transformer in _transformers(model).items():
        tokens = micro * sequences[part]
        # Gradients of the MLP's middle before and after GELU, of the block's output; the block itself, when it is computed again.
        block = float(tokens * transformer.width * (8 * compute + FP32))
        if run.activation_checkpointing:  # all but its input
            block += _kept_by_block(transformer, tokens, compute) - tokens * transformer.width * FP32
        in_block = max(in_block, block)
    if model.decoder is not None:
        rows = min(CAPTION_CHUNK, micro * n.targets)
        caption = rows * model.vocab_size * (FP32 + 2 * compute) + FP32 * model.vocab_size * model.decoder.width
    contrastive = CONTRASTIVE_CHUNK * run.batch_size * FP32
    return max(in_block, caption, float(contrastive))


def _batch_bytes(run: PretrainConfig, cluster: PlanConfig) -> float:
    """The process's own batch, and the features of the global one."""
    model, n, local = run.model, lengths(run, cluster), run.batch_size // cluster.gpus
    own = local * (3 * model.image_size**2 + 8 * (n.texts * n.text + n.queries))
    return own + FP32 * (1 + n.texts) * model.embed_dim * (run.batch_size + 2 * local)


def _compute_bytes(run: PretrainConfig) -> int:
    return 2 if run.precision == "bf16" else FP32


def _transformers(model: ModelConfig) -> dict[str, TransformerConfig]:
    parts = {"visual": model.vision, "text": model.text, "decoder": model.decoder}
    return {name: transformer for name, transformer in parts.items() if transformer is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Choices
# ---------------------------------------------------------------------------------------------------------------------


def _shardings(cluster: PlanConfig) -> tuple[Literal["ddp", "fsdp"], ...]:
    return ("ddp", "fsdp") if cluster.gpus > 1 else ("ddp",)


def _choice(run: PretrainConfig, cluster: PlanConfig, sharding: Literal["ddp", "fsdp"], again: bool) -> dict[str, Any]:
    """With these settings, the largest micro-batch that fits, the local batch halved and halved again; None where none does."""
    micro = run.batch_size // cluster.gpus
    while True:
        tried = replace(run, sharding=sharding, activation_checkpointing=again, micro_batch=micro)
        memory = sum(memory_per_gpu(tried, cluster).values())
        fits = memory <= usable_memory(cluster)
        if fits or micro % 2:
            return {
                "sharding": sharding,
                "activation_checkpointing": again,
                "micro_batch": micro if fits else None,
                "memory": memory,
                "days": run.samples / images_per_second(tried, cluster) / 86_400 if fits else None,
            }
        micro //= 2


# ---------------------------------------------------------------------------------------------------------------------
# Print
# ---------------------------------------------------------------------------------------------------------------------


def print_plan(result: dict[str, Any]) -> None:
    """The plan as tables on the terminal."""
    run, cluster, time, data, memory = (result[key] for key in ("run", "cluster", "time", "data", "memory"))
    model, parameters, checkpoint, network = (
        run["model"], result["parameters"], result["checkpoint"], result["network"],
    )  # fmt: skip
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    console.print(
        f"[bold]{run['method']}, {model['size'] or 'a size of its own'} at {model['image_size']} px[/bold]: "
        f"{si(run['samples'])} samples, batch {run['batch_size']:,}, {parameters['total'] / 1e6:.1f} M parameters "
        f"({parameters['trained'] / 1e6:.1f} M trained), on {cluster['gpus']} × {cluster['gpu']}"
    )

    choices = Table(
        "sharding", "activation checkpointing", "largest micro_batch", "GiB a GPU", "days", box=box.SIMPLE_HEAD
    )
    for choice in result["choices"]:
        fits = choice["micro_batch"] is not None
        choices.add_row(
            choice["sharding"], "yes" if choice["activation_checkpointing"] else "no",
            f"{choice['micro_batch']:,}" if fits else "none fits", f"{choice['memory'] / GIB:.1f}",
            f"{choice['days']:.2f}" if fits else "",
        )  # fmt: skip
    for table in (
        flops_table("GFLOP a picture", result["flops_per_sample"]),
        memory_table("GiB a GPU", memory),
        to_the_right(choices),
    ):
        console.print(table)
    if not memory["fits"]:
        console.print(f"[bold red]does not fit into a {cluster['gpu']}[/bold red]: see which micro_batch does, above\n")

    facts = {
        "work": f"{result['flops']['model']:.3g} FLOP, {result['flops']['executed']:.3g} with what is computed twice",
        "time": f"{time['days']:.2f} days ({time['gpu_hours']:,.0f} GPU hours), {time['steps']:,} steps of "
        f"{time['seconds_per_step']:.2f} s, {time['images_per_second']:,.0f} images/s, MFU {100 * time['mfu']:.0f} % "
        f"(assumed: {100 * cluster['mfu']:.0f} % of the peak if nothing were computed twice)",
        "data": f"{data['shards']:,} shards, {si(data['storage'])}B at {data['stored_size']} px "
        f"({si(data['bytes_per_sample'])}B a sample), {data['epochs']:.2f} epochs",
        "reading": f"{si(data['read_bandwidth'])}B/s in all, {si(data['read_bandwidth_per_node'])}B/s and "
        f"{data['decoding_cores_per_node']:,} decoding cores a node",
        "checkpoint": f"{si(checkpoint['bytes'])}B in {checkpoint['seconds']:.0f} s, every "
        f"{checkpoint['seconds_between'] / 60:.0f} min; {si(checkpoint['kept_bytes'])}B for those that are kept",
    }  # fmt: skip
    if cluster["gpus"] > 1:
        facts["network"] = f"each GPU sends {si(network['bytes_per_step'])}B a step, {si(network['per_second'])}B/s"
        if cluster["gpus"] > cluster["gpus_per_node"] and network["per_second"] > cluster["network_bandwidth"]:
            facts["network"] += (
                f": [bold red]more than {si(cluster['network_bandwidth'])}B/s, so it takes longer[/bold red]"
            )
    for name, fact in facts.items():
        console.print(f"{name:<12}{fact}", soft_wrap=True)


def flops_table(title: str, flops_per_sample: Mapping[str, Mapping[str, float]]) -> Table:
    """GFLOP by part: forward, backward, recomputed, share of forward and backward."""
    table = Table(title, *("forward", "backward", "recomputed", "share"), box=box.SIMPLE_HEAD)
    keys = ("forward", "backward", "recomputed")
    sums = {key: sum(value[key] for value in flops_per_sample.values()) for key in keys}
    for part, value in {**flops_per_sample, "all": {**sums, "share": 1.0}}.items():
        figures = [f"{value[key] / 1e9:,.2f}" for key in keys]
        table.add_row(part, *figures, f"{100 * value['share']:.1f} %", style="bold" if part == "all" else None)
    return to_the_right(table)


def memory_table(title: str, memory: Mapping[str, Any]) -> Table:
    """GiB by what holds them, the sum in red where it does not fit."""
    table = Table(title, "", box=box.SIMPLE_HEAD)
    for part, size in memory.items():
        if part not in ("total", "usable", "fits") and size:
            table.add_row(part, f"{size / GIB:.2f}")
    table.add_row("all", f"{memory['total'] / GIB:.2f}", style="bold" if memory["fits"] else "bold red")
    table.add_row("usable", f"{memory['usable'] / GIB:.2f}")
    return to_the_right(table)


def to_the_right(table: Table) -> Table:
    """The same table, its figures to the right under their headings."""
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def si(value: float) -> str:
    """1_250_000_000 → `1.25 G`."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {prefix}"
    return f"{value:.3g} "
