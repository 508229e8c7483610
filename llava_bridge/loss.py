"""The loss of both stages: cross-entropy summed over the labels, without ever holding the logits of a batch.

At a vocabulary of 128 thousand the logits [B, T, V] would cost more memory than all the rest. They are computed at labelled
positions only, and of these for a chunk at a time, inside the vocabulary head's own forward: so what wraps the model (DDP,
DeepSpeed, FSDP, PEFT, autocast) finds everything where it expects it.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llava.modeling_llava import LlavaModel
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches

from llava_bridge.conversations import IGNORE

CHUNK = 1024  # labelled positions whose logits exist at once


def supervised_loss(model: nn.Module, head: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of a LLaVA summed over all labels: what the sum of its own loss would be, logits as its head makes them.

    (A soft cap on the logits, as Gemma-2 alone has it, is no part of a stock LLaVA around it: neither in training nor after.)

    Args:
        model: a LLaVA or LLaVA-NeXT, however wrapped.
        head: its vocabulary head.
        batch: padded or packed, as a `Collator` makes it. Without a picture the tower sees a blank one that changes nothing, so
            that each process runs, and has gradients for, the same parameters in every step.

    Returns:
        scalar fp32.

    Raises:
        RuntimeError: if the samples of a packed batch would not be kept apart.
    """
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    packed = "position_ids" in batch
    if packed:
        _check_packed(batch)
    targets = batch["labels"][:, 1:]
    labelled = targets != IGNORE
    logits: Callable[[Tensor], Tensor] = head.forward

    def loss(hidden: Tensor) -> Tensor:  # [B, T, D] → scalar
        rows, labels = hidden[:, :-1][labelled], targets[labelled]
        if isinstance(head, nn.Linear) and _has_kernel(logits, rows):
            return fused_cross_entropy(rows, labels, head.weight, head.bias)
        return chunked_cross_entropy(rows, labels, logits, CHUNK)

    with _forward_replaced(head, loss), _tower_always_runs(model, inputs):
        outputs = model(**inputs, use_cache=False)
    if packed and outputs.past_key_values is not None:
        raise RuntimeError("packed samples see each other through the cache: it must be off")
    return outputs.logits


def _check_packed(batch: Mapping[str, Tensor]) -> None:
    positions = batch["position_ids"]
    if "attention_mask" in batch:
        raise RuntimeError("packed samples see each other where there is an attention mask: it must be left out")
    first = positions == 0
    if not bool(first[:, 0].all()) or not bool((first[:, 1:] | (positions.diff(dim=1) == 1)).all()):
        raise RuntimeError("positions of a packed batch must count up from 0 in each sample")
    if not bool((batch["labels"][first] == IGNORE).all()):
        raise RuntimeError(
            "a packed sample's first token must not be learned: it would be predicted from another sample"
        )


# --------------------------------------------------------------------------------------------------------- cross-entropy


def chunked_cross_entropy(rows: Tensor, labels: Tensor, logits: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Summed cross-entropy of `logits(rows)` [L, V] and labels [L], with at most `chunk` × V of the logits at a time.

    Plain torch, for any head and device. Where there is more than one chunk, the backward pass computes its logits anew.
    """

    def part(rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits(rows).float(), labels, reduction="sum")

    if len(rows) <= chunk:
        return part(rows, labels)
    parts = [
        checkpoint(part, *pair, use_reentrant=False)
        for pair in zip(rows.split(chunk), labels.split(chunk), strict=True)
    ]
    return torch.stack(parts).sum()


def fused_cross_entropy(rows: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same of a linear head by Liger's Triton kernel, which takes the gradients in the forward pass, chunk by chunk.

    Args:
        rows: [L, D], L > 0.
        weight, bias: the head's, [V, D] and [V]. Their gradients are added up in fp32.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    if torch.is_autocast_enabled(rows.device.type):  # once, not in each chunk
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    kernel = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
    result: Tensor = kernel(weight, rows, labels, bias)
    return result


def _has_kernel(logits: Callable[[Tensor], Tensor], rows: Tensor) -> bool:
    """Whether Liger's kernel can stand in for this forward: a plain linear layer's on a GPU, neither quantised nor adapted."""
    plain = getattr(logits, "__func__", None) is nn.Linear.forward
    return plain and rows.is_cuda and len(rows) > 0 and find_spec("liger_kernel") is not None


@contextmanager
def _forward_replaced(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """The head's forward replaced, and only that: hooks that gather its weights (ZeRO-3, FSDP) still run before and after."""
    own = head.__dict__.get("forward")
    head.__dict__["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del head.__dict__["forward"]
        else:
            head.__dict__["forward"] = own


# ----------------------------------------------------------------------------------------------------------- blank picture


@contextmanager
def _tower_always_runs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Without pictures, the features of a blank one times zero are added to the text's embeddings.

    Else ZeRO-3, whose processes gather a layer's weights together, would hang where one process has pictures and another none,
    and the projector's optimizer state would depend on how a batch is dealt out. It happens right before the language model
    runs, where pictures are looked at too: the processes must gather in the same order.
    """
    llava = next((part for part in model.modules() if isinstance(part, LlavaModel | LlavaNextModel)), None)
    if llava is None or "pixel_values" in inputs:
        yield
        return

    def look(
        _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        embeddings = options["inputs_embeds"]
        features = llava.get_image_features(**_blank_picture(llava, embeddings.device), return_dict=True).pooler_output
        nothing = sum((0 * picture).sum() for picture in features)
        return arguments, {**options, "inputs_embeds": embeddings + nothing.to(embeddings.dtype)}

    hook = llava.language_model.register_forward_pre_hook(look, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _blank_picture(llava: LlavaModel | LlavaNextModel, device: torch.device) -> dict[str, Tensor]:
    """What the image processor would make of a picture of the tower's size, all zeros."""
    vision = llava.config.vision_config
    size = vision.image_size
    pixels = torch.zeros(1, vision.num_channels, size, size, dtype=llava.vision_tower.dtype, device=device)
    if isinstance(llava, LlavaModel):
        return {"pixel_values": pixels}
    tiles = image_size_to_num_patches([size, size], llava.config.image_grid_pinpoints, size)
    return {
        "pixel_values": pixels.expand(1, tiles, -1, -1, -1),
        "image_sizes": torch.tensor([[size, size]], device=device),
    }
