"""Pretrain a CLIPS tower: build → step → loop → export, read from top to bottom."""

import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from clips_core import checkpoint, formats, zero_shot
from clips_core.average import Average
from clips_core.config import PretrainConfig, to_dict, what_trains
from clips_core.data import PretrainDataset, batches, collate
from clips_core.decoding import decode_captions
from clips_core.distributed import (
    barrier,
    from_main,
    gather_objects,
    is_main,
    max_over_processes,
    process_group,
    rank,
    world_size,
)
from clips_core.errors import InputError, Stopped
from clips_core.folders import (
    MetricsLog,
    first_difference,
    is_finished,
    read_json,
    sha256_file,
    write_json,
    write_manifest,
)
from clips_core.meter import Meter, Trackers
from clips_core.model import CLIPS, decayed_parameters
from clips_core.step import parallel, training_step
from clips_core.tokenizer import BERT_VOCAB, ClipsTokenizer

STAGE = "pretrain"
COUNTED = 32  # samples that FLOPs are counted on, at most
SKIPPED_STEPS = "skipped_steps.jsonl"


def pretrain(config: PretrainConfig) -> Path:
    """Train one tower and export it. Run again after an interruption, it goes on from the newest whole checkpoint.

    Under torchrun every process calls this, with the same config.

    Returns:
        `config.out`, with metrics.jsonl, checkpoints/, zero_shot.json, best/, export/{hf,open_clip}/ and manifest.json.

    Raises:
        InputError: if the data, the vocabulary or the folder does not fit the config.
        Stopped: after SIGTERM or SIGUSR1, with the state saved. Ctrl-C raises KeyboardInterrupt in the same way.
    """
    with process_group() as device:
        return _pretrain(config, device)


def _pretrain(config: PretrainConfig, device: torch.device) -> Path:
    # -------------------------------------------------------------------------------------------------- inputs
    tokenizer, dataset = open_data(config)
    inputs = {"data": dataset.sources.fingerprint(), "vocab": sha256_file(tokenizer.vocab_path)}
    if config.init_from is not None:
        inputs |= {f"init_from {name}": digest for name, digest in formats.locate(config.init_from).hashes().items()}
    if from_main(is_finished(config.out, STAGE, config, inputs) if is_main() else None):
        return config.out
    if is_main():
        _claim(config, inputs)
    held_out = None
    if config.evaluation.shards is not None and is_main():
        held_out = zero_shot.RetrievalSet(config.evaluation, config.data, config.model.image_size)

    # -------------------------------------------------------------------------------------------------- model
    torch.manual_seed(config.seed)  # the same weights on every process
    plain = CLIPS(config.model).to(device)
    if config.init_from is not None:
        start_from(plain, config.init_from, tokenizer)
    for part in config.frozen:
        getattr(plain, part).requires_grad_(False)
    flops = flops_per_sample(plain, dataset, config)
    parameters = sum(p.numel() for p in plain.parameters())
    if config.activation_checkpointing:
        plain.set_activation_checkpointing()
    model = parallel(plain, config.sharding)
    optimizer = build_optimizer(plain, config)
    average = Average(plain, config.ema_decay) if config.ema_decay is not None else None

    # -------------------------------------------------------------------------------------------------- resume
    step, total_steps = 0, config.samples // config.batch_size
    counters: dict[str, Any] = {"seconds": 0.0, "best": None, "skipped_steps": 0, "skipped_in_a_row": 0}
    restored = checkpoint.load_latest(
        config.out / "checkpoints", plain, optimizer, average.tensors if average is not None else None
    )
    if restored is not None:
        step, counters = restored[0], counters | restored[1]
    log = _Log(config, step) if is_main() else None
    if config.compile:  # after restoring, since compiled modules are wrapped in place
        for block in plain.blocks():
            block.compile()

    # -------------------------------------------------------------------------------------------------- loop
    if is_main():
        print(
            f"pretraining {config.out}: {config.method}, {parameters / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOP a picture "
            f"(forward and backward), {config.samples} pictures on {world_size()} × {device.type}"
        )
    started = time.monotonic() - counters["seconds"]

    def evaluate_and_log(usable: CLIPS) -> dict[str, Any]:
        """Zero-shot retrieval of weights as they would be exported; the best so far are kept in `best/`."""
        if log is None or held_out is None:
            return {}
        result = evaluate(usable, held_out, tokenizer)
        row: dict[str, Any] = {"zero_shot": _summary(result)}
        if usable.decoder is not None and config.evaluation.captions:
            pixels = held_out.pixels[: config.evaluation.captions].to(device)
            row["captions"] = decode_captions(
                usable, tokenizer, zero_shot.normalise(pixels), [""] * len(pixels), config.method == "coca"
            )
        log.log(step=step, samples=step * config.batch_size, seconds=time.monotonic() - started, **row)
        score = (result["image_to_text"]["R@1"] + result["text_to_image"]["R@1"]) / 2
        if config.evaluation.every and (counters["best"] is None or score > counters["best"]["mean R@1"]):
            counters["best"] = {"step": step, "mean R@1": score}
            formats.export(usable, tokenizer, config.out / "best")
            write_json(config.out / "best" / "best.json", counters["best"])
        return result

    plain.train()
    meter = Meter(config.batch_size, flops, world_size(), device)
    log_of_skipped = config.out / "skipped.jsonl"
    stream = batches(
        dataset, step, total_steps, config.batch_size, config.data.workers, rank(), world_size(), log_of_skipped
    )
    bar = tqdm(total=total_steps, initial=step, unit="step", desc=f"pretrain {config.method}", disable=not is_main())
    with stop_requested() as stop, bar:
        for batch in meter.timed(stream):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step * config.batch_size, config)
            rows = {name: value.to(device, non_blocking=True) for name, value in batch.tensors.items()}
            metrics = {
                name: value.item() for name, value in training_step(model, plain.logit_scale, rows, config).items()
            }
            norm = clip_gradients(plain, config.max_grad_norm)
            finite = math.isfinite(metrics["loss"]) and math.isfinite(norm)  # the same on every process
            if finite:
                optimizer.step()
                if config.max_logit_scale is not None:
                    with torch.no_grad():
                        plain.logit_scale.clamp_(max=math.log(config.max_logit_scale))
                if average is not None:
                    average.update(plain)
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            counters["skipped_in_a_row"] = 0 if finite else counters["skipped_in_a_row"] + 1
            if not finite:
                counters["skipped_steps"] += 1
                _skip_step(config, step, metrics["loss"], norm, batch.keys, counters["skipped_in_a_row"])

            if log is not None and finite and (step % config.log_every == 0 or step == total_steps):
                log.log(
                    step=step,
                    samples=step * config.batch_size,
                    seconds=time.monotonic() - started,
                    **metrics,
                    gradient_norm=norm,
                    lr=optimizer.param_groups[0]["lr"],
                    logit_scale=plain.logit_scale.exp().item(),
                    skipped_steps=counters["skipped_steps"],
                    **meter.read(),
                )
                bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()})
            every = config.evaluation.every
            if every and step < total_steps and step * config.batch_size % every < config.batch_size:
                evaluate_and_log(usable_weights(plain, average))
            signum = stop()
            if (step % config.save_every == 0 or signum) and step < total_steps:
                counters["seconds"] = time.monotonic() - started
                checkpoint.save(
                    config.out / "checkpoints", step, plain, optimizer, counters, config.keep_checkpoints,
                    average.tensors if average is not None else None,
                )  # fmt: skip
                if signum:
                    message = f"saved at step {step} of {total_steps}; run the same command to go on"
                    raise KeyboardInterrupt(message) if signum == signal.SIGINT else Stopped(message)
    seconds = time.monotonic() - started

    # -------------------------------------------------------------------------------------------------- results
    usable = usable_weights(plain, average)
    result = evaluate_and_log(usable)
    if log is not None:
        outputs: dict[str, Any] = {
            "method": config.method,
            "captioners": dataset.sources.captioners(),
            "parameters": parameters,
            "flops_per_sample": flops,
            "samples": total_steps * config.batch_size,
            "processes": world_size(),
            "skipped_steps": counters["skipped_steps"],
            "seconds": seconds,
        }
        if result:
            write_json(config.out / "zero_shot.json", result)
            outputs |= {"zero_shot": _summary(result), "best": counters["best"]}
            print(f"{config.out}: {_sentence(result)}, {seconds:.0f} seconds")
        formats.export(usable, tokenizer, config.out / "export")
        write_manifest(config.out, STAGE, config, inputs, outputs)
        log.close()
    barrier()
    return config.out


def _claim(config: PretrainConfig, inputs: dict[str, str]) -> None:
    """Write what this run is into its folder; if that holds another unfinished run, say in what they differ.

    Settings that change how a step is computed and not what may differ.

    Raises:
        InputError: naming the first setting that differs.
    """
    run = {"config": what_trains(config), "inputs": inputs}
    path = config.out / "run.json"
    difference = first_difference(read_json(path), run) if path.exists() else None
    if difference is not None:
        raise InputError(
            f"{config.out} holds the beginning of another run ({difference}); give the same settings to go on with it, or "
            "another `out`, with init_from if it shall start from finished weights"
        )
    write_json(path, run)


def start_from(model: CLIPS, spec: str, tokenizer: ClipsTokenizer) -> None:
    """Copy the weights of an earlier run or a released tower, its position embeddings brought to the model's picture size.

    The caption decoder comes along where the source has one of the same size, and starts anew where it has not; which of the two
    is printed.

    Raises:
        InputError: if the towers are of another size, or their vocabulary is another.
    """
    source, source_tokenizer = formats.load_model(spec, model.config.image_size)
    if source.config.text_padding != model.config.text_padding:
        raise InputError(f"init_from {spec}: was trained with model.text_padding={source.config.text_padding}")
    if source_tokenizer.tokens != tokenizer.tokens:
        raise InputError(
            f"init_from {spec}: its vocabulary is not {tokenizer.vocab_path}; set data.vocab to its vocab.txt"
        )
    ours, theirs = model.state_dict(), source.state_dict()
    decoder = {name for name in ours if name.startswith("decoder.")}
    for name in sorted(ours.keys() - decoder):
        if ours[name].shape != theirs[name].shape:
            raise InputError(
                f"init_from {spec}: its {name} is {list(theirs[name].shape)}, and this model's {list(ours[name].shape)}"
            )
    kept = all(name in theirs and theirs[name].shape == ours[name].shape for name in decoder)
    model.load_state_dict({name: theirs[name] if kept or name not in decoder else ours[name] for name in ours})
    if is_main():
        fate = ", its caption decoder too" if kept else "; the caption decoder starts anew"
        print(f"going on from {spec}{fate if decoder else ''}")


def build_optimizer(model: CLIPS, config: PretrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices of linear and convolution layers only."""
    decayed = decayed_parameters(model)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    scale = trained.pop("logit_scale")  # in a group of its own: FSDP shards all but this one
    groups = [
        {"params": [value for name, value in trained.items() if name in decayed], "weight_decay": config.weight_decay},
        {"params": [value for name, value in trained.items() if name not in decayed], "weight_decay": 0.0},
        {"params": [scale], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)


def learning_rate(samples: int, config: PretrainConfig) -> float:
    """Linear warm-up, then a cosine to zero. `samples`: pictures seen before this step."""
    if samples < config.warmup_samples:
        return config.learning_rate * (samples + config.batch_size) / (config.warmup_samples + config.batch_size)
    progress = (samples - config.warmup_samples) / max(1, config.samples - config.warmup_samples)
    return config.learning_rate * (1 + math.cos(math.pi * min(1.0, progress))) / 2


@torch.no_grad()
def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """The norm of all gradients together, of all shards; where it is above `max_norm`, they are scaled down to that."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    sharded = [g for g in gradients if isinstance(g, DTensor)]
    norm = get_total_norm([g for g in gradients if not isinstance(g, DTensor)]).item()
    if sharded:
        whole = get_total_norm(sharded)
        norm = math.hypot(norm, (whole.full_tensor() if isinstance(whole, DTensor) else whole).item())
    if max_norm is not None and norm > max_norm:
        for gradient in gradients:
            gradient.mul_(max_norm / norm)
    return norm


def usable_weights(model: CLIPS, average: Average | None) -> CLIPS:
    """The weights that are evaluated and exported, in a plain model: the averaged ones where there are any.

    Called by every process. It is `model` itself where that is already so.
    """
    sharded = any(isinstance(value, DTensor) for value in model.parameters())
    if not sharded and average is None:
        return model
    state = get_model_state_dict(model) | (average.tensors if average is not None else {})
    usable = CLIPS(model.config)
    usable.load_state_dict(
        {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in state.items()}
    )
    return usable.to(model.logit_scale.device)


def evaluate(model: CLIPS, held_out: zero_shot.RetrievalSet, tokenizer: ClipsTokenizer) -> dict[str, Any]:
    """Zero-shot retrieval of the model as it stands (see `zero_shot.retrieval`)."""
    return zero_shot.retrieval(*zero_shot.embed(model, held_out, tokenizer), held_out.owner)


def open_data(config: PretrainConfig) -> tuple[ClipsTokenizer, PretrainDataset]:
    """Tokenizer and data of a run.

    Raises:
        InputError: if they are missing, damaged, too few for the processes, or do not fit the model.
    """
    tokenizer = ClipsTokenizer(config.data.vocab or BERT_VOCAB, config.model.text_padding == "attended")
    dataset = PretrainDataset(config, tokenizer)
    dataset.check(config.batch_size, world_size())
    if len(tokenizer) > config.model.vocab_size:
        raise InputError(
            f"vocabulary {tokenizer.vocab_path} has {len(tokenizer)} entries, but model.vocab_size is {config.model.vocab_size}"
        )
    return tokenizer, dataset


def flops_per_sample(model: CLIPS, dataset: PretrainDataset, config: PretrainConfig) -> float:
    """FLOPs of one training step (forward and backward) a picture, counted by torch on real samples.

    They are as many as are computed at once, up to `COUNTED`: the decoder's queries follow the longest caption among them.
    """
    count = min(COUNTED, config.micro_batch or config.batch_size // world_size())
    batch = collate([dataset[i * config.data.lanes] for i in range(count)])  # of the first lane
    if isinstance(batch, InputError):
        raise batch
    rows = {name: value.to(model.logit_scale.device) for name, value in batch.tensors.items()}
    with FlopCounterMode(display=False) as counter:
        training_step(model, model.logit_scale, rows, dataclasses.replace(config, micro_batch=None))
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() / count


@contextmanager
def stop_requested() -> Iterator[Callable[[], int]]:
    """Within, Ctrl-C, SIGTERM and SIGUSR1 do not interrupt a step: the yielded function says which one any process got, or 0."""
    received = 0

    def receive(signum: int, frame: FrameType | None) -> None:
        nonlocal received
        received = signum

    def anywhere() -> int:
        return max_over_processes(received)

    previous = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield anywhere
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Log:
    """metrics.jsonl, cut back to the step that the run goes on from, and the trackers beside it."""

    def __init__(self, config: PretrainConfig, step: int):
        self.metrics = MetricsLog(config.out / "metrics.jsonl")
        self.metrics.cut_after(step)
        if (config.out / SKIPPED_STEPS).exists():
            MetricsLog(config.out / SKIPPED_STEPS).cut_after(step)
        self.trackers = Trackers(list(config.trackers), config.out, to_dict(config))

    def log(self, **values: Any) -> None:
        self.metrics.log(**values)
        self.trackers.log(values)

    def close(self) -> None:
        self.trackers.close()


def _skip_step(config: PretrainConfig, step: int, loss: float, norm: float, keys: list[str], in_a_row: int) -> None:
    """Record a step without a finite loss and gradient, with its samples; more than `max_skipped_steps` in a row end the run."""
    everyone = [key for part in gather_objects(keys) for key in part]
    path = config.out / SKIPPED_STEPS
    if is_main():
        MetricsLog(path).log(step=step, loss=str(loss), gradient_norm=str(norm), keys=everyone)
        print(
            f"\nwarning: step {step} is skipped: loss {loss}, gradient norm {norm}; its samples are in {path}",
            file=sys.stderr,
        )
    if in_a_row > config.max_skipped_steps:
        raise InputError(
            f"step {step}: the loss is {loss} and the gradient's norm {norm}, for {in_a_row} steps in a row "
            f"(max_skipped_steps={config.max_skipped_steps}); look at the samples in {path}; the same command tries again "
            "from the last checkpoint, and a lower learning_rate needs a new folder"
        )


def _summary(result: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in result.items() if name not in ("ranks", "owner")}


def _sentence(result: dict[str, Any]) -> str:
    def recalls(direction: str) -> str:
        return " / ".join(f"{100 * value:.1f}" for value in result[direction].values())

    return (
        f"retrieval among {result['n']} held-out pictures, R@1/5/10 in %: image → text {recalls('image_to_text')}, "
        f"text → image {recalls('text_to_image')}; chance {100 * result['chance']['R@1']:.1f}"
    )
