"""One training step: forward, losses, backward, over one process or many, in one pass or in micro-batches."""

from contextlib import nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from clips_core.config import PretrainConfig
from clips_core.distributed import sum_over_processes, world_size
from clips_core.loss import CAPTION_WEIGHT, CONTRASTIVE_WEIGHT, info_nce
from clips_core.model import CLIPS
from clips_core.tokenizer import PAD
from clips_core.zero_shot import normalise


def training_step(
    model: nn.Module, logit_scale: Tensor, batch: dict[str, Any], config: PretrainConfig
) -> dict[str, Tensor]:
    """Losses of the global batch, and their gradients in the parameters' `grad`.

    Args:
        model: a `CLIPS`, or one wrapped in DDP or FSDP.
        logit_scale: its parameter (the logarithm).
        batch: this process's rows, see `data.batches`.

    Returns:
        `{"loss", "contrastive…", "caption"}`: scalars of the whole global batch, the same on every process.
    """
    images = batch["image"]
    texts = batch["texts"] if config.contrastive_sub else batch["texts"][:, :1]
    targets, count = _targets(batch["target"], config)
    parts = list(
        zip(*(value.split(config.micro_batch or len(images)) for value in (images, texts, targets)), strict=True)
    )
    cached = len(parts) > 1
    precision = torch.autocast(images.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()

    # The contrastive term compares all with all. In micro-batches (GradCache, arXiv 2101.06983): first the features without a
    # graph and the loss's gradient with respect to them, then each micro-batch again with that gradient.
    if cached:
        with torch.no_grad(), precision:
            features = [model(normalise(image), text)[:2] for image, text, _ in parts]
        z_img, z_txt = (torch.cat(values).float().requires_grad_() for values in zip(*features, strict=True))
        metrics, loss = _contrastive(z_img, z_txt, logit_scale, config)
        (world_size() * loss).backward()
        d_img, d_txt = (value.grad.split(config.micro_batch) for value in (z_img, z_txt))  # type: ignore[union-attr]

    caption = torch.zeros((), device=images.device)
    for number, (image, text, target) in enumerate(parts):
        last = number == len(parts) - 1
        with _without_sync(model) if not last else nullcontext():
            with precision:
                z_img, z_txt, summed = model(
                    normalise(image), text, target if target.shape[1] else None, config.method == "coca"
                )
            if cached:
                loss = (z_img * d_img[number]).sum() + (z_txt * d_txt[number]).sum()
            else:
                metrics, loss = _contrastive(z_img, z_txt, logit_scale, config)
                loss = world_size() * loss  # DDP and FSDP take the mean over processes, and the loss is one of all
            if summed is not None:
                loss = loss + world_size() * CAPTION_WEIGHT * summed / count
                caption += summed.detach() / count
            loss.backward()
    if logit_scale.grad is not None:  # lies outside of DDP and FSDP, since no forward of theirs reads it
        sum_over_processes(logit_scale.grad).div_(world_size())
    if targets.shape[1]:
        metrics["caption"] = sum_over_processes(caption)
    contrastive = torch.stack([value for name, value in metrics.items() if name != "caption"]).mean()
    total = CONTRASTIVE_WEIGHT * contrastive + CAPTION_WEIGHT * metrics.get("caption", 0.0)
    return {"loss": total, **metrics}


def _contrastive(
    z_img: Tensor, z_txt: Tensor, logit_scale: Tensor, config: PretrainConfig
) -> tuple[dict[str, Tensor], Tensor]:
    """Each contrastive term, detached, and their weighted mean."""
    names = ("contrastive_web", "contrastive_sub") if config.method == "clips" else ("contrastive",)
    terms = {
        name: info_nce(z_img, z_txt[:, kind], logit_scale.exp())
        for kind, name in zip(range(z_txt.shape[1]), names, strict=False)
    }
    loss = CONTRASTIVE_WEIGHT * torch.stack(list(terms.values())).mean()
    return {name: term.detach() for name, term in terms.items()}, loss


def _targets(target: Tensor, config: PretrainConfig) -> tuple[Tensor, Tensor]:
    """The captions to write, and how many tokens of them the global batch has (at least 1).

    Where none of a process's rows has a caption, one pad stands for them: the decoder still runs, so that its parameters have a
    gradient on every process.
    """
    if config.model.decoder is None:
        return target[:, :0], torch.ones((), device=target.device)
    if target.shape[1] == 0:
        target = F.pad(target, (0, 1), value=PAD)
    return target, sum_over_processes((target != PAD).sum()).clamp(min=1)


def _without_sync(model: nn.Module) -> Any:
    """Gradients of all but the last micro-batch stay on this process."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def parallel(model: CLIPS, sharding: Literal["ddp", "fsdp"]) -> nn.Module:
    """The model as the processes train it together. `logit_scale` is left to `training_step`: no forward reads it.

    `ddp` wraps it; `fsdp` (FSDP2) shards its weights, gradients and optimizer state in place, a block at a time.
    """
    if not dist.is_initialized():
        return model
    device = model.logit_scale.device
    if sharding == "fsdp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.blocks():
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={model.logit_scale})
        return model
    # A parameter of the outermost module goes by two names there: one with a dot before it, one without.
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["logit_scale", ".logit_scale"])
    return DistributedDataParallel(
        model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True
    )
