"""Pretrain a CLIPS tower: build → step → loop → export, read from top to bottom."""

import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from clips_core import checkpoint, formats, zero_shot
from clips_core.config import PretrainConfig
from clips_core.data import PretrainDataset, batches, fingerprint
from clips_core.errors import InputError
from clips_core.folders import MetricsLog, is_finished, sha256_file, write_json, write_manifest
from clips_core.loss import CAPTION_WEIGHT, CONTRASTIVE_WEIGHT, caption_loss, info_nce
from clips_core.model import CLIPS, decayed_parameters
from clips_core.tokenizer import BERT_VOCAB, ClipsTokenizer

STAGE = "pretrain"


def pretrain(config: PretrainConfig) -> Path:
    """Train one tower and export it. Run again after an interruption, it goes on from the newest whole checkpoint.

    Returns:
        `config.out`, with metrics.jsonl, checkpoints/, zero_shot.json, export/{hf,open_clip}/ and manifest.json.

    Raises:
        InputError: if the data, the vocabulary or the folder does not fit the config.
    """
    # -------------------------------------------------------------------------------------------------- inputs
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # launched by torchrun: each process would train a model of its own
        raise InputError("pretraining runs in one process so far; start it without torchrun")
    tokenizer = ClipsTokenizer(config.data.vocab or BERT_VOCAB)
    dataset = PretrainDataset(
        config.data,
        config.method,
        tokenizer,
        config.model.image_size,
        config.model.context_length,
        config.model.learnable_tokens,
        config.seed,
    )
    if len(tokenizer) > config.model.vocab_size:
        raise InputError(
            f"vocabulary {tokenizer.vocab_path} has {len(tokenizer)} entries, but model.vocab_size is {config.model.vocab_size}"
        )
    inputs = {"data": fingerprint(dataset.shards), "vocab": sha256_file(tokenizer.vocab_path)}
    if is_finished(config.out, STAGE, config, inputs):
        return config.out
    held_out = None
    if config.evaluation.shards is not None:
        held_out = zero_shot.RetrievalSet(
            config.evaluation, config.evaluation.shards, config.data.image, config.model.image_size
        )

    # -------------------------------------------------------------------------------------------------- model
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    model = CLIPS(config.model).to(device)
    optimizer = build_optimizer(model, config)
    flops = flops_per_sample(model, dataset)
    total_steps = config.samples // config.batch_size
    log = MetricsLog(config.out / "metrics.jsonl")

    # -------------------------------------------------------------------------------------------------- resume
    step, seconds = 0, 0.0
    restored = checkpoint.load_latest(config.out / "checkpoints", model, optimizer)
    if restored is not None:
        step, seconds = restored[0], restored[1]["seconds"]
    log.cut_after(step)
    if config.compile:  # after restoring, since compiled modules are wrapped in place
        for module in (model.visual, model.text, model.decoder):
            if module is not None:
                module.compile()

    # -------------------------------------------------------------------------------------------------- loop
    print(
        f"pretraining {config.out}: {config.method}, {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, "
        f"{flops / 1e9:.2f} GFLOP a picture (forward and backward), {config.samples} pictures on {device}"
    )
    model.train()
    started = time.monotonic() - seconds
    stream = batches(
        dataset, step * config.batch_size, total_steps * config.batch_size, config.batch_size, config.data.workers
    )
    with (
        stop_requested() as stop,
        tqdm(total=total_steps, initial=step, unit="step", desc=f"pretrain {config.method}") as bar,
    ):
        for batch in stream:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step * config.batch_size, config)
            metrics = training_step(model, {name: value.to(device) for name, value in batch.items()}, config)
            metrics["loss"].backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if config.max_logit_scale is not None:
                with torch.no_grad():
                    model.logit_scale.clamp_(max=math.log(config.max_logit_scale))
            step += 1
            bar.update()

            if step % config.log_every == 0 or step == total_steps:
                row = {name: value.item() for name, value in metrics.items()}
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(f"step {step}: the loss is {row['loss']}; lower the learning rate")
                elapsed = time.monotonic() - started
                log.log(
                    step=step,
                    samples=step * config.batch_size,
                    seconds=elapsed,
                    **row,
                    lr=optimizer.param_groups[0]["lr"],
                    logit_scale=model.logit_scale.exp().item(),
                    images_per_second=bar.format_dict["rate"] and bar.format_dict["rate"] * config.batch_size,
                )
                bar.set_postfix({name: f"{value:.3f}" for name, value in row.items()})
            every = config.evaluation.every
            if held_out and every and step < total_steps and step * config.batch_size % every < config.batch_size:
                log.log(step=step, samples=step * config.batch_size, seconds=time.monotonic() - started,
                        zero_shot=_summary(evaluate(model, held_out, tokenizer)))  # fmt: skip
            if (step % config.save_every == 0 or stop()) and step < total_steps:
                counters = {"seconds": time.monotonic() - started}
                checkpoint.save(config.out / "checkpoints", step, model, optimizer, counters, config.keep_checkpoints)
                if stop():
                    raise KeyboardInterrupt(f"saved at step {step} of {total_steps}; run the same command to go on")
    seconds = time.monotonic() - started

    # -------------------------------------------------------------------------------------------------- results
    outputs: dict[str, Any] = {
        "method": config.method,
        "parameters": sum(p.numel() for p in model.parameters()),
        "flops_per_sample": flops,
        "samples": total_steps * config.batch_size,
        "seconds": seconds,
    }
    if held_out is not None:
        result = evaluate(model, held_out, tokenizer)
        write_json(config.out / "zero_shot.json", result)
        log.log(step=step, samples=step * config.batch_size, seconds=seconds, zero_shot=_summary(result))
        outputs["zero_shot"] = _summary(result)
        print(f"{config.out}: {_sentence(result)}, {seconds:.0f} seconds")
    formats.export(model, tokenizer, config.out / "export")
    write_manifest(config.out, STAGE, config, inputs, outputs)
    return config.out


def training_step(model: CLIPS, batch: dict[str, Tensor], config: PretrainConfig) -> dict[str, Tensor]:
    """Forward pass and losses of one batch (see `data.batches`): `{"loss", "contrastive…", "caption"}`, scalars."""
    image, texts, target = zero_shot.normalise(batch["image"]), batch["texts"], batch["target"]
    with torch.autocast(image.device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext():
        z_img, z_txt, hidden = model(image, texts, target.shape[1])
    scale = model.logit_scale.exp()
    names = ("contrastive_web", "contrastive_sub") if texts.shape[1] == 2 else ("contrastive",)
    metrics = {name: info_nce(z_img, z_txt[:, kind], scale) for kind, name in enumerate(names)}
    loss = CONTRASTIVE_WEIGHT * torch.stack(list(metrics.values())).mean()
    if model.decoder is not None:
        head = model.decoder.head.weight
        metrics["caption"] = (
            caption_loss(hidden, head, target) if hidden is not None else 0.0 * head.sum()  # a batch without a target
        )
        loss = loss + CAPTION_WEIGHT * metrics["caption"]
    return {"loss": loss, **metrics}


def build_optimizer(model: nn.Module, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear and convolution layers only."""
    decayed = decayed_parameters(model)
    trained = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    groups = [
        {"params": [value for name, value in trained if name in decayed], "weight_decay": config.weight_decay},
        {"params": [value for name, value in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(samples: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine to zero. `samples`: pictures seen before this step."""
    if samples < config.warmup_samples:
        return config.learning_rate * (samples + config.batch_size) / (config.warmup_samples + config.batch_size)
    progress = (samples - config.warmup_samples) / max(1, config.samples - config.warmup_samples)
    return config.learning_rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2


def evaluate(model: CLIPS, held_out: zero_shot.RetrievalSet, tokenizer: ClipsTokenizer) -> dict[str, Any]:
    """Zero-shot retrieval of the model as it stands (see `zero_shot.retrieval`)."""
    return zero_shot.retrieval(*zero_shot.embed(model, held_out, tokenizer))


def flops_per_sample(model: CLIPS, dataset: PretrainDataset) -> float:
    """FLOPs of one training step (forward and backward) a picture, counted by torch on two real samples."""
    batch = next(iter(batches(dataset, 0, 2, batch_size=2, workers=0)))
    device = model.logit_scale.device
    image = zero_shot.normalise(batch["image"].to(device))
    with FlopCounterMode(display=False) as counter:
        z_img, z_txt, hidden = model(image, batch["texts"].to(device), batch["target"].shape[1])
        loss = z_img.sum() + z_txt.sum()
        if hidden is not None and model.decoder is not None:
            loss = loss + caption_loss(hidden, model.decoder.head.weight, batch["target"].to(device))
        loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / 2


@contextmanager
def stop_requested() -> Iterator[Any]:
    """Within, Ctrl-C and SIGTERM do not interrupt a step: the yielded function says whether one was asked for."""
    requested = False

    def request(signum: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True

    previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name != "ranks"}


def _sentence(result: dict[str, Any]) -> str:
    def recalls(direction: str) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in result[direction].values())

    return (
        f"retrieval among {result['n']} held-out pictures, R@1/5/10 in %: image → text {recalls('image_to_text')}, "
        f"text → image {recalls('text_to_image')}; chance {100 * result['chance']['R@1']:.1f}"
    )
