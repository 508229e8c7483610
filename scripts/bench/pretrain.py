"""A training step of ours against the plain version of it and against open_clip's CoCa, side by side in one run.

    python scripts/bench/pretrain.py [--size B/16 --image-size 112 --batch 512 --device cuda --precision bf16 --compile]

- ours:  `training_step`, the optimizer's step and all else that a step of `clips-llava pretrain` does;
- plain: the same with other loss and decoder functions: all logits at once, all learnable tokens through all layers under one
         dense mask. Before anything is timed, both must give the same loss and gradients in fp32;
- coca:  open_clip's CoCa and CoCaLoss with towers and decoder of the same sizes.

They take turns, on the same batches, under the same precision and compilation. docs/benchmarks.md says what the columns mean.
"""

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import profile, record_function
from torch.utils.flop_counter import FlopCounterMode

from clips_core import meter, model, step
from clips_core.config import PretrainConfig, load_config
from clips_core.errors import InputError
from clips_core.folders import environment, write_json
from clips_core.loss import CAPTION_WEIGHT, CONTRASTIVE_WEIGHT, caption_loss_plain, info_nce_plain
from clips_core.measure import in_turns, peak_bytes, print_table, spread
from clips_core.model import CLIPS, CaptionDecoder, DecoderBlock, Encoded, open_clip_config
from clips_core.plan import PlanConfig
from clips_core.step import training_step
from clips_core.tokenizer import EOS, PAD, RESERVED, ClipsTokenizer
from clips_core.train import build_optimizer, clip_gradients
from clips_core.zero_shot import normalise

# Of loss and of each gradient, max|ours − plain| / max|plain| in fp32. Rounding adds up with size: of the gradients 4e-6 for Ti,
# 1.7e-5 for B on a CPU, and a GPU's attention kernels differ more from one another.
TOLERANCE = 1e-4
CHECKED_ROWS, COUNTED_ROWS = 4, 32
BATCHES = 4  # that are taken in turn
PARTS = ("image tower", "text tower", "decoder", "caption loss", "contrastive loss", "backward", "optimizer")
MIB = 2**20

Batch = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    size: str
    image_size: int  # pixels
    batch: int  # pictures
    precision: str  # fp32, or bf16 by autocast
    device: str
    compile: bool  # the transformers' blocks, as pretraining does
    warmup: int  # steps of each variant that are not timed
    repeats: int  # turns that each variant takes
    steps: int  # training steps of a turn
    variants: tuple[str, ...]


# So that a run without arguments takes a minute or two.
DEFAULTS = {
    "cpu": {"size": "Ti/16", "image_size": 112, "batch": 16, "precision": "fp32", "warmup": 1, "repeats": 3, "steps": 1},
    "cuda": {"size": "B/16", "image_size": 112, "batch": 256, "precision": "bf16", "warmup": 8, "repeats": 7, "steps": 8},
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The plain version of our step
# ---------------------------------------------------------------------------------------------------------------------


class DenseBlock(DecoderBlock):
    """The caption decoder's block on one sequence under one mask."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        """[B, L, D] and the bool [L, L] of which queries see which keys → [B, L, D]."""
        q, k, v = self._split_heads(self.in_proj(self.ln_1(x)))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.out_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))


class DenseDecoder(CaptionDecoder):
    """The caption decoder as METHOD words it: image tokens, web caption and all learnable tokens through every layer."""

    def forward(self, image_tokens: Tensor, text_tokens: Tensor) -> Tensor:  # type: ignore[override]
        """States of all N learnable tokens after the final LayerNorm, [B, N, D]."""
        prefix = torch.cat([self.image_proj(image_tokens), self.text_proj(text_tokens)], dim=1)
        queries = self.learnable_tokens.to(prefix.dtype).expand(len(prefix), -1, -1)
        x, length = torch.cat([prefix, queries], dim=1), prefix.shape[1]
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        seen[:length, :length] = True  # the prefix in both directions; it never sees the learnable tokens
        for block in self.blocks:
            x = block(x, seen)
        return self.ln_final(x[:, length:])


class PlainCLIPS(CLIPS):
    """The same model, weight for weight, with the dense decoder; a forward gives the mean caption loss in place of the sum."""

    caption_loss = staticmethod(caption_loss_plain)
    info_nce = staticmethod(info_nce_plain)

    def __init__(self, config: Any):
        super().__init__(config)
        assert self.decoder is not None
        self.decoder.__class__ = DenseDecoder
        for block in self.decoder.blocks:
            block.__class__ = DenseBlock

    def forward(  # type: ignore[override]
        self, image: Tensor, texts: Tensor, target: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        encoded: Encoded = self.encode(image, texts)
        decoder = cast(Any, self.decoder)
        hidden = decoder(encoded.image_tokens, encoded.web_tokens)
        target = F.pad(target, (0, hidden.shape[1] - target.shape[1]), value=PAD)
        return encoded.image, encoded.text, self.caption_loss(hidden, decoder.head.weight, target)


def plain_step(plain: PlainCLIPS, batch: Batch, config: PretrainConfig) -> dict[str, Tensor]:
    """`training_step` in words: losses, and their gradients in the parameters' `grad`."""
    with autocast(config, batch):
        z_img, z_txt, caption = plain(normalise(batch["image"]), batch["texts"], batch["target"])
    scale = plain.logit_scale.exp()
    web, sub = (plain.info_nce(z_img, z_txt[:, kind], scale) for kind in (0, 1))
    loss = CONTRASTIVE_WEIGHT * (web + sub) / 2 + CAPTION_WEIGHT * caption
    loss.backward()
    losses = {"loss": loss, "contrastive_web": web, "contrastive_sub": sub, "caption": caption}
    return {name: value.detach() for name, value in losses.items()}


def autocast(config: PretrainConfig, batch: Batch) -> AbstractContextManager[Any]:
    """As in `training_step`."""
    return torch.autocast(batch["image"].device.type, torch.bfloat16) if config.precision == "bf16" else nullcontext()


# ---------------------------------------------------------------------------------------------------------------------
# The variants
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Variant:
    """One of those that are compared."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    blocks: list[nn.Module]  # the units that are compiled
    losses: Callable[[Batch], dict[str, Tensor]]  # forward and backward
    parts: list[tuple[str, Any, str]]  # name of a part, and the function that does it, as attribute of something


def make_ours(config: PretrainConfig) -> Variant:
    """`training_step` on `CLIPS`."""
    torch.manual_seed(config.seed)
    clips = CLIPS(config.model)
    losses = [("caption loss", model, "summed_caption_loss"), ("contrastive loss", step, "info_nce")]
    return _variant(
        clips, clips.blocks(), lambda batch: training_step(clips, clips.logit_scale, batch, config), config, losses
    )


def make_plain(config: PretrainConfig) -> Variant:
    """`plain_step`, with the weights that `make_ours` starts from."""
    torch.manual_seed(config.seed)
    plain = PlainCLIPS(config.model)
    losses = [("caption loss", plain, "caption_loss"), ("contrastive loss", plain, "info_nce")]
    return _variant(plain, plain.blocks(), lambda batch: plain_step(plain, batch, config), config, losses)


def make_coca(config: PretrainConfig) -> Variant:
    """open_clip's CoCa: one caption a picture, which its text tower encodes and its decoder writes.

    The image tower is ours, but for the attentional pooling that CoCa's decoder needs; the text tower is causal and brings its own
    CLS, as in every CoCa of open_clip.
    """
    try:
        from open_clip.coca_model import CoCa
        from open_clip.loss import ClipLoss, CoCaLoss
    except ImportError:
        raise InputError("the variant coca needs open_clip: pip install open_clip_torch") from None
    sizes = config.model
    assert sizes.decoder is not None
    ours = open_clip_config(sizes)
    patches = (sizes.image_size // sizes.patch_size) ** 2
    vision = {
        **ours["vision_cfg"],
        "attentional_pool": True,
        "attn_pooler_queries": min(256, 1 + patches),  # open_clip's default, but no more than there are tokens
        "pool_type": "tok",
        "final_ln_after_pool": False,
        "output_tokens": True,
    }
    text = {
        **{key: ours["text_cfg"][key] for key in ("vocab_size", "width", "heads", "layers")},
        "context_length": sizes.context_length - 1,  # and the CLS
        "embed_cls": True,
        "output_tokens": True,
    }
    decoder = {
        **dataclasses.asdict(sizes.decoder),
        "context_length": sizes.context_length - 1,
        "vocab_size": sizes.vocab_size,
    }
    torch.manual_seed(config.seed)
    coca = CoCa(sizes.embed_dim, decoder, text, vision)
    nn.init.normal_(
        coca.text_decoder.text_projection, std=sizes.decoder.width**-0.5
    )  # open_clip leaves it uninitialised
    criterion = CoCaLoss(caption_loss_weight=CAPTION_WEIGHT, clip_loss_weight=CONTRASTIVE_WEIGHT, pad_id=PAD)

    def losses(batch: Batch) -> dict[str, Tensor]:
        with autocast(config, batch):  # the losses too, as in open_clip's own loop
            out = coca(normalise(batch["image"]), batch["caption"])
            terms = criterion(**out, output_dict=True)
        loss = terms["contrastive_loss"] + terms["caption_loss"]
        loss.backward()
        return {
            "loss": loss.detach(),
            "contrastive": terms["contrastive_loss"].detach() / CONTRASTIVE_WEIGHT,
            "caption": terms["caption_loss"].detach() / CAPTION_WEIGHT,
        }

    towers = (coca.visual.transformer.resblocks, coca.text.transformer.resblocks)
    blocks = [block for part in (*towers, coca.text_decoder.resblocks, coca.text_decoder.cross_attn) for block in part]
    parts = [("caption loss", criterion.caption_loss, "forward"), ("contrastive loss", ClipLoss, "forward")]
    return _variant(coca, blocks, losses, config, parts)


MAKE = {"ours": make_ours, "plain": make_plain, "coca": make_coca}


def _variant(
    module: Any,
    blocks: list[nn.Module],
    losses: Callable[[Batch], dict[str, Tensor]],
    config: PretrainConfig,
    parts: list[tuple[str, Any, str]],
) -> Variant:
    optimizer = build_optimizer(module, config)
    decoder = module.text_decoder if hasattr(module, "text_decoder") else module.decoder
    towers = [("image tower", module.visual), ("text tower", module.text), ("decoder", decoder)]
    parts = [
        *((name, owner, "forward") for name, owner in towers),
        *parts,
        ("backward", torch.Tensor, "backward"),
        ("optimizer", optimizer, "step"),
    ]
    return Variant(module, optimizer, blocks, losses, parts)


def train_step(variant: Variant, batch: Batch) -> dict[str, float]:
    """What a step of pretraining does with a batch that is on the device."""
    metrics = {name: value.item() for name, value in variant.losses(batch).items()}
    clip_gradients(variant.model, None)
    variant.optimizer.step()
    variant.optimizer.zero_grad(set_to_none=True)
    return metrics


def make_config(settings: Settings) -> PretrainConfig:
    """The pretraining run that a step of is measured."""
    return load_config(
        PretrainConfig,
        None,
        ["out=unused", "data.train=unused", f"model.size={settings.size}", f"model.image_size={settings.image_size}",
         "samples=1000000000", f"batch_size={settings.batch}", "learning_rate=1e-4", f"precision={settings.precision}"],
    )  # fmt: skip


def make_batches(settings: Settings, config: PretrainConfig) -> list[Batch]:
    """Random pictures, and random captions as long as those of Recap-DataComp: web captions of 16 tokens, synthetic ones of 64.

    `image`, `texts`, `target` as in `data.Batch`; `caption`, int64 [B, T − 1]: the synthetic caption as CoCa reads and writes it.
    """
    rng, sizes = np.random.default_rng(0), config.model
    device = torch.device(settings.device)
    lengths, frame = PlanConfig(), ClipsTokenizer().frame

    def bodies(mean: float) -> list[np.ndarray]:
        drawn = rng.lognormal(np.log(mean) - 0.08, 0.4, settings.batch)  # 0.08 = 0.4² / 2: so that the mean is the mean
        return [rng.integers(len(RESERVED), sizes.vocab_size, max(1, round(length))) for length in drawn]

    result = []
    for _ in range(BATCHES):
        web, sub, synthetic = (bodies(mean) for mean in (lengths.web_tokens, lengths.web_tokens, lengths.target_tokens))
        target = np.full((settings.batch, sizes.learnable_tokens), PAD)
        for row, body in zip(target, synthetic, strict=True):
            kept = body[: len(row) - 1]
            row[: len(kept)], row[len(kept)] = kept, EOS
        longest = int((target != PAD).sum(axis=1).max())
        web_ids, sub_ids, caption = (
            frame([body.tolist() for body in part], sizes.context_length) for part in (web, sub, synthetic)
        )
        pixels = rng.integers(0, 256, (settings.batch, 3, sizes.image_size, sizes.image_size), dtype=np.uint8)
        arrays = {
            "image": pixels,
            "texts": np.stack([web_ids, sub_ids], axis=1),
            "target": target[:, : -(-longest // 8) * 8],  # as `data.collate` cuts it
            "caption": caption[:, :-1],  # without our CLS: CoCa's text tower brings its own
        }
        result.append({name: torch.from_numpy(array).to(device) for name, array in arrays.items()})
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def check(config: PretrainConfig, batch: Batch) -> dict[str, dict[str, float]]:
    """`difference` of ours and the plain version on the CPU, and on the batch's device if that is another.

    Raises:
        RuntimeError: if one is above `TOLERANCE`: then the times would compare different computations.
    """
    exact = dataclasses.replace(config, precision="fp32")
    ours, plain = make_ours(exact), make_plain(exact)
    found = {}
    for device in dict.fromkeys(("cpu", batch["image"].device.type)):
        rows = {name: value[:CHECKED_ROWS].to(device) for name, value in batch.items()}
        for variant in (ours, plain):
            variant.model.to(device)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            found[device] = difference(ours, plain, rows)
        if not all(value <= TOLERANCE for value in found[device].values()):
            raise RuntimeError(f"ours and plain differ on {device}: {found[device]}, allowed is {TOLERANCE}")
    if torch.cuda.is_available():
        del ours, plain
        torch.cuda.empty_cache()
    return found


def difference(ours: Variant, plain: Variant, batch: Batch) -> dict[str, float]:
    """max|ours − plain| / max|plain| of the loss, and the worst of all parameters' gradients."""
    found = []
    for variant in (ours, plain):
        variant.optimizer.zero_grad(set_to_none=True)
        loss = variant.losses(batch)["loss"]
        found.append({name: p.grad for name, p in variant.model.named_parameters() if p.grad is not None} | {"": loss})
    if found[0].keys() != found[1].keys():
        raise RuntimeError(f"gradients of one alone: {sorted(found[0].keys() ^ found[1].keys())}")
    relative = {name: ((found[0][name] - b).abs().max() / b.abs().max()).item() for name, b in found[1].items()}
    return {"loss": relative.pop(""), "gradients": max(relative.values())}


def seconds_per_step(variant: Variant, batches: Sequence[Batch], steps: int) -> float:
    """Mean of so many training steps."""
    synchronise(batches[0])
    started = time.perf_counter()
    for number in range(steps):
        train_step(variant, batches[number % len(batches)])
    synchronise(batches[0])
    return (time.perf_counter() - started) / steps


def synchronise(batch: Batch) -> None:
    if batch["image"].is_cuda:
        torch.cuda.synchronize()


def flops_per_sample(variant: Variant, batch: Batch) -> float:
    """Of forward and backward, as torch counts them, over some rows of the batch."""
    rows = {name: value[:COUNTED_ROWS] for name, value in batch.items()}
    with FlopCounterMode(display=False) as counter:
        variant.losses(rows)
    variant.optimizer.zero_grad(set_to_none=True)
    return counter.get_total_flops() / len(rows["image"])


def allocated_bytes(variant: Variant, batch: Batch) -> int:
    """On the CPU: weights and optimizer state, and the most that a training step allocates beside them."""
    held = [*variant.model.parameters(), *variant.model.buffers()]
    held += [t for state in variant.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
    return sum(t.numel() * t.element_size() for t in held) + peak_bytes(lambda: train_step(variant, batch))


class Stopwatch:
    """Seconds in each part, on the device's clock; each is a range of the profiler's too."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any, Any]] = []

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, with its calls timed."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                start = self._mark()
                result = function(*args, **kwargs)
                self.marks.append((name, start, self._mark()))
            return result

        return run

    def read(self) -> dict[str, float]:
        """The sum of each part since the start."""
        if self.cuda:
            torch.cuda.synchronize()
        sums: dict[str, float] = {}
        for name, start, end in self.marks:
            sums[name] = sums.get(name, 0.0) + (start.elapsed_time(end) / 1000 if self.cuda else end - start)
        return sums


def seconds_of_parts(variant: Variant, batches: Sequence[Batch], steps: int) -> dict[str, float]:
    """Seconds of each of `PARTS` in a training step, and of the rest of it."""
    watch = Stopwatch(batches[0]["image"].device)
    with ExitStack() as stack:
        for name, owner, attribute in variant.parts:
            stack.enter_context(replaced(owner, attribute, watch.timed(name, getattr(owner, attribute))))
        train_step(variant, batches[0])
        watch.marks.clear()  # of the step that only warmed up
        total = seconds_per_step(variant, batches, steps)
    parts = {name: seconds / steps for name, seconds in watch.read().items()}
    return {**{name: parts[name] for name in PARTS}, "rest": total - sum(parts.values())}


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Within, the attribute of a module, class or object has another value."""
    own, before = attribute in vars(owner), getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        if own:
            setattr(owner, attribute, before)
        else:
            delattr(owner, attribute)


def write_trace(variant: Variant, batches: Sequence[Batch], folder: Path, name: str) -> None:
    """FOLDER/NAME.json.gz, for chrome://tracing or Perfetto, and the costliest operators on the terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    with profile() as recorded:
        seconds_of_parts(variant, batches, 1)
    recorded.export_chrome_trace(str(folder / f"{name}.json.gz"))
    order = "self_device_time_total" if batches[0]["image"].is_cuda else "self_cpu_time_total"
    print(f"{name}, one step:\n{recorded.key_averages().table(sort_by=order, row_limit=20, max_name_column_width=60)}")


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


class Runner:
    """One variant, ready to train, in a process of its own.

    So its memory is its own, torch.compile sees the shapes of no other variant, and the process is what a training run is.
    """

    def __init__(self, settings: Settings, name: str):
        self.settings, self.name = settings, name
        self.config, self.device = make_config(settings), torch.device(settings.device)
        self.variant, self.batches = MAKE[name](self.config), make_batches(settings, self.config)
        self.variant.model.to(self.device).train()  # the parameters stay the objects that the optimizer knows
        self.flops = flops_per_sample(self.variant, self.batches[0])
        if settings.compile:
            for block in self.variant.blocks:
                block.compile()
        self.first_step: dict[str, float] = {}
        for number in range(max(1, settings.warmup)):
            metrics = train_step(self.variant, self.batches[number % len(self.batches)])
            self.first_step = self.first_step or metrics
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.empty_cache()

    def turn(self) -> float:
        """Samples a second. The other processes get back what this one holds in reserve."""
        cuda = self.device.type == "cuda"
        if cuda:
            train_step(self.variant, self.batches[0])  # reserves memory again
        seconds = seconds_per_step(self.variant, self.batches, self.settings.steps)
        if cuda:
            torch.cuda.empty_cache()
        return self.settings.batch / seconds

    def facts(self, trace: Path | None) -> dict[str, Any]:
        """What does not depend on the others' speed."""
        peak = meter.peak_memory(self.device)  # before anything is profiled
        cuda = self.device.type == "cuda"
        result = {
            "peak_memory": peak if cuda else allocated_bytes(self.variant, self.batches[0]),
            "process_peak": None if cuda else peak,
            "flops_per_sample": self.flops,
            "parameters": sum(p.numel() for p in self.variant.model.parameters()),
            "seconds": seconds_of_parts(self.variant, self.batches, self.settings.steps),
            "first_step": self.first_step,
        }
        if trace is not None:
            write_trace(self.variant, self.batches, trace, self.name)
        if cuda:
            torch.cuda.empty_cache()
        return result


_runner: Runner  # of this process


def prepare(settings: Settings, name: str) -> None:
    global _runner
    _runner = Runner(settings, name)


def turn() -> float:
    return _runner.turn()


def facts(trace: Path | None) -> dict[str, Any]:
    return _runner.facts(trace)


def run(settings: Settings, trace: Path | None = None) -> dict[str, Any]:
    """Compare the variants: `{"environment", "settings", "targets", "difference", "variants": {name: {…}}}`, plain JSON values."""
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        pools = {name: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for name in settings.variants}
        ready = [pool.submit(prepare, settings, name) for name, pool in pools.items()]
        config = make_config(settings)
        batches = make_batches(settings, config)
        differences = check(config, batches[0])
        for future in ready:
            future.result()

        def take_turn(name: str) -> float:
            return pools[name].submit(turn).result()

        rates = in_turns({name: partial(take_turn, name) for name in pools}, settings.repeats)
        results = {name: pool.submit(facts, trace).result() for name, pool in pools.items()}
    peak = meter.peak_flops(torch.device(settings.device))
    for name, result in results.items():
        rate = spread(rates[name])
        result |= {
            "samples_per_second": rate._asdict(),
            "ours_is_faster_by": spread([a / b for a, b in zip(rates["ours"], rates[name], strict=True)])._asdict(),
            "flops_per_second": rate.median * result["flops_per_sample"],
            "mfu": rate.median * result["flops_per_sample"] / peak if peak is not None else None,
        }
    return {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "settings": dataclasses.asdict(settings),
        "targets": {
            "places": batches[0]["target"].shape[1],
            "real": torch.cat([(batch["target"] != PAD).sum(dim=1) for batch in batches]).float().mean().item(),
        },
        "differences": differences,
        "variants": results,
    }


def report(result: Mapping[str, Any]) -> None:
    """The comparison as tables."""
    settings, variants, where = result["settings"], result["variants"], result["environment"]
    print(
        f"{settings['size']} at {settings['image_size']} px, batch {settings['batch']}, {settings['precision']}"
        f"{', compiled' if settings['compile'] else ''}, on {where['device']}"
        f" ({where['threads']} threads), torch {where['packages']['torch']}\n"
        f"captions to write: {result['targets']['real']:.0f} tokens on average, {result['targets']['places']} places in a batch"
    )
    for device, found in result["differences"].items():
        print(
            f"ours and plain in fp32 on {device}: loss differs by {found['loss']:.1e}, gradients by {found['gradients']:.1e}"
        )
    print(f"median of {settings['repeats']} turns of {settings['steps']} steps, lowest and highest in brackets")
    cpu = settings["device"] == "cpu"
    columns = ["", "samples/s", "ours is faster by", "peak MiB", "ours takes", "GFLOP a sample", "TFLOP/s"]
    rows = []
    for name, value in variants.items():
        rows.append(
            [
                name,
                _shown(value["samples_per_second"], ".1f"),
                _shown(value["ours_is_faster_by"], ".2f") if name != "ours" else "",
                f"{value['peak_memory'] / MIB:,.0f}",
                f"{100 * variants['ours']['peak_memory'] / value['peak_memory']:.0f} %" if name != "ours" else "",
                f"{value['flops_per_sample'] / 1e9:.1f}",
                f"{value['flops_per_second'] / 1e12:.3g}",
                f"{value['process_peak'] / MIB:,.0f}"
                if cpu
                else f"{100 * value['mfu']:.1f} %"
                if value["mfu"]
                else "?",
            ]
        )
    print_table([*columns, "process MiB" if cpu else "MFU"], rows)
    print("milliseconds of a step:")
    print_table(
        ["", *variants],
        [
            [part, *(f"{1000 * value['seconds'][part]:,.1f}" for value in variants.values())]
            for part in (*PARTS, "rest")
        ],
    )


def _shown(value: Mapping[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['low']:{form}}–{value['high']:{form}})"


def parse(arguments: Sequence[str]) -> tuple[Settings, Path | None, Path | None]:
    """The settings of a command line, the file for the results, and the folder for traces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", help="a size of clips_core.sizes (CPU: Ti/16, CUDA: B/16)")
    parser.add_argument("--image-size", type=int, help="pixels (112)")
    parser.add_argument("--batch", type=int, help="pictures of a step (CPU: 16, CUDA: 256)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="(CPU: fp32, CUDA: bf16)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(cuda where there is one)")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the transformers' blocks")
    parser.add_argument("--warmup", type=int, help="steps of each variant before the first turn")
    parser.add_argument("--repeats", type=int, help="turns of each variant")
    parser.add_argument("--steps", type=int, help="training steps of a turn")
    parser.add_argument("--against", nargs="*", choices=["plain", "coca"], default=["plain", "coca"])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument(
        "--trace", type=Path, metavar="FOLDER", help="profile one step of each variant into this folder"
    )
    values = vars(parser.parse_args(arguments))
    file, trace, against = (values.pop(name) for name in ("json", "trace", "against"))
    device = values["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    given = {name: value for name, value in values.items() if value is not None}
    settings = Settings(**{**DEFAULTS[device], **given, "device": device, "variants": ("ours", *against)})
    for name in ("repeats", "steps"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name} must be at least 1")
    return settings, file, trace


def main(arguments: Sequence[str] = ()) -> int:
    try:
        settings, file, trace = parse(arguments)
        result = run(settings, trace)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory, lower --batch: {error}", file=sys.stderr)
        return 2
    report(result)
    if file is not None:
        write_json(file, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
