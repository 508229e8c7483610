"""Stage 1 and stage 2 with padded and packed batches, and TRL's SFTTrainer beside them, in one run.

    python scripts/bench/llava.py [--llm llama-3.2-1b --tower clip-l14-336 --batch 64 --at-once 4 --device cuda --precision bf16]

- random, grouped, length, packed: the stage as `clips-llava align` and `tune` run it, with `group: none`, `modality_length`,
  `length`, and with `packing: true`;
- trl: TRL's SFTTrainer and its collator for pictures, stage 2 only, on the batches of `random`.

They train the same model on the same samples, as long as LLaVA-1.5's, in processes of their own that take turns. Weights are
random and the learning rate is 0: so every arm must come to the same mean loss over the same labels, else the run is an error.
docs/benchmarks.md says what the columns mean.
"""

import argparse
import contextlib
import dataclasses
import gc
import io
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.profiler import profile
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    TrainerCallback,
)

from clips_core import meter
from clips_core.errors import InputError
from clips_core.folders import environment, write_json
from clips_core.measure import in_turns, peak_bytes, print_table, spread
from clips_core.plan import Flops
from llava_bridge import mixture, plan, train
from llava_bridge.architectures import Llm, VisionTower, read_llm, read_tower
from llava_bridge.batching import SampleDataset, real_tokens
from llava_bridge.config import AlignConfig, ConversationConfig, StageConfig, TuneConfig
from llava_bridge.conversations import IGNORE, Encoder
from llava_bridge.methods import ALIGN_CONTRACT, part_of, set_trainable, tune_contract
from llava_bridge.mllm import chat_template, projector_parameters
from llava_bridge.records import Conversation
from llava_bridge.templates import read_template

Stage = Literal["align", "tune"]
ARMS = ("random", "grouped", "length", "packed", "trl")
GROUPS = {"random": "none", "grouped": "modality_length", "length": "length", "packed": "modality_length"}
SMALL = 16  # on a CPU every length is divided by this, image tokens too
TINY_LLM = Llm(width=192, layers=4, heads=3, kv_heads=1, head_width=64, mlp=576, vocab=4000, tied=True)
TINY_TOWER = VisionTower(
    "clip_vision_model", 96, 4, 3, 384, patch_size=8, image_size=48, prefix=1
)  # 36 tokens: 576 / 16
PICTURES = 32  # that the samples show in turn
PHOTO = (640, 480)  # COCO's size
SPECIAL = ("<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>")
# Of one caption and its end; of <|im_start|>user … <|im_end|> <|im_start|>assistant … <|im_end|>.
TEMPLATE_TOKENS = {"align": 1, "tune": 6}
# Of mean losses over the same labels: how far rounding may move one, relatively.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
TARGETS: dict[
    tuple[Stage, str, str], float
] = {  # (stage, arm, baseline): by how much faster, on an H100 at LLaVA-1.5's lengths
    ("tune", "packed", "random"): 1.5,
    ("tune", "packed", "length"): 1.15,
    ("tune", "packed", "trl"): 1.3,
}
MFU_TARGET = 0.45
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is measured, and how often."""

    llm: str  # "tiny", or a name or folder that a plan takes
    tower: str
    scale: int  # lengths are LLaVA-1.5's divided by this
    samples: int  # of a turn
    batch: int  # samples of an optimizer step
    at_once: int  # of these, the ones that are worked on at once
    precision: str  # fp32, or bf16 by autocast
    attention: str  # as transformers names it
    checkpointing: bool
    workers: int
    device: str
    repeats: int  # turns that each arm takes
    stages: tuple[Stage, ...]
    arms: tuple[str, ...]


# So that a run without arguments takes three minutes at most.
DEFAULTS = {
    "cpu": {"llm": "tiny", "tower": "tiny", "scale": SMALL, "samples": 64, "batch": 32, "at_once": 8, "precision": "fp32",
            "attention": "eager", "workers": 0, "repeats": 3},
    "cuda": {"llm": "llama-3.2-1b", "tower": "clip-l14-336", "scale": 1, "samples": 512, "batch": 64, "at_once": 4,
             "precision": "bf16", "attention": "sdpa", "workers": 8, "repeats": 3},
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Model and data
# ---------------------------------------------------------------------------------------------------------------------


def shapes(settings: Settings) -> tuple[Llm, VisionTower]:
    """Of the language model and the tower."""
    llm = TINY_LLM if settings.llm == "tiny" else read_llm(settings.llm)
    tower = TINY_TOWER if settings.tower == "tiny" else read_tower(settings.tower)
    if tower.kind != "clip_vision_model" or llm.qkv_bias or llm.qk_norm:
        raise InputError("the benchmark builds Llamas and CLIP towers: --llm llama-3.2-1b --tower clip-l14-336, say")
    return llm, tower


def make_model(settings: Settings) -> LlavaForConditionalGeneration:
    """A stock LLaVA with random weights on the device, all in the compute precision."""
    llm, tower = shapes(settings)
    vision = CLIPVisionConfig(
        hidden_size=tower.width, num_hidden_layers=tower.layers, num_attention_heads=tower.heads,
        intermediate_size=tower.mlp, patch_size=tower.patch_size, image_size=tower.image_size,
    )  # fmt: skip
    text = LlamaConfig(
        hidden_size=llm.width, num_hidden_layers=llm.layers, num_attention_heads=llm.heads, head_dim=llm.head_width,
        num_key_value_heads=llm.kv_heads, intermediate_size=llm.mlp, vocab_size=llm.vocab, tie_word_embeddings=llm.tied,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=None, eos_token_id=SPECIAL.index("<|im_end|>"),
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=SPECIAL.index("<image>"),
        image_seq_length=tower.image_tokens, tie_word_embeddings=llm.tied,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(settings.device):
        model = LlavaForConditionalGeneration(config)
    model.to(torch.bfloat16 if settings.precision == "bf16" else torch.float32)
    model.model.language_model.set_attn_implementation(settings.attention)
    return model


def make_processor(settings: Settings) -> LlavaProcessor:
    """A LLaVA's processor around a tokenizer of whole words: a text of n words has n tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    llm, tower = shapes(settings)
    words = [*SPECIAL, "user", "assistant"]
    words += [f"w{i}" for i in range(llm.vocab - len(words))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>",
        model_input_names=["input_ids", "attention_mask"],
        additional_special_tokens=["<|im_start|>", "<image>"],
    )  # fmt: skip
    size = {"height": tower.image_size, "width": tower.image_size}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False),
        tokenizer=fast, patch_size=tower.patch_size, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=chat_template(read_template("chatml"), None),
    )  # fmt: skip


def make_pictures(folder: Path) -> list[Path]:
    """JPEGs of a photograph's size and smoothness."""
    rng = np.random.default_rng(0)
    files = []
    for number in range(PICTURES):
        small = Image.fromarray(rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        files.append(folder / f"{number}.jpg")
        small.resize(PHOTO, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


def make_conversations(stage: Stage, settings: Settings, pictures: Sequence[Path]) -> list[Conversation]:
    """One question and one answer each, of the lengths in `llava_bridge.mixture`: so TRL learns from the same tokens as we."""
    llm, tower = shapes(settings)
    rng = np.random.default_rng(1)
    tokens, seen = drawn_lengths(stage, settings)
    learned = learned_shares(stage, settings)
    conversations = []
    for number, length in enumerate(tokens - seen * tower.image_tokens):
        words = [f"w{i}" for i in rng.integers(0, llm.vocab - len(SPECIAL) - 2, int(length) - TEMPLATE_TOKENS[stage])]
        # Stage 1 reads the answer alone.
        question = 0 if stage == "align" else min(len(words) - 1, max(1, round((1 - learned[number]) * len(words))))
        mark = "<image>\n" if seen[number] else ""
        messages = (
            {"role": "user", "content": mark + " ".join(words[:question])},
            {"role": "assistant", "content": " ".join(words[question:])},
        )
        images = (pictures[number % len(pictures)],) if seen[number] else ()
        conversations.append(Conversation(f"sample {number}", images, messages))
    return conversations


def drawn_lengths(stage: Stage, settings: Settings) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each sample, image tokens included, and whether it has a picture: int64 and bool [samples]."""
    _, tower = shapes(settings)
    drawn = mixture.draw(mixture.MIXTURES[stage], settings.samples)
    text = np.maximum(TEMPLATE_TOKENS[stage] + 2, (drawn.text / settings.scale).round()).astype(np.int64)
    return np.minimum(text + drawn.picture * tower.image_tokens, max_length(settings)), drawn.picture


def learned_shares(stage: Stage, settings: Settings) -> np.ndarray:
    """Of each sample's text, the share that has a label."""
    drawn = mixture.draw(mixture.MIXTURES[stage], settings.samples)
    return drawn.learned / drawn.text


def max_length(settings: Settings) -> int:
    return 2048 // settings.scale


def stage_config(stage: Stage, arm: str, settings: Settings, out: Path) -> StageConfig:
    """The stage's config for one of our arms."""
    common: dict[str, Any] = {
        "out": out,
        "data": ConversationConfig(Path("unused"), Path("unused"), max_length(settings)),
        "batch_size": settings.batch,
        "device_batch_size": settings.at_once,
        "learning_rate": 0.0,
        "group": GROUPS[arm],
        "packing": arm == "packed",
        "gradient_checkpointing": settings.checkpointing,
        "precision": {"bf16": "bfloat16", "fp32": "float32"}[settings.precision],
        "workers": settings.workers,
        "save_every": 10**9,
    }
    if stage == "align":
        return AlignConfig(**common, tower="unused")
    return TuneConfig(**common, align=Path("unused"), method="full", projector_learning_rate=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# One training
# ---------------------------------------------------------------------------------------------------------------------


class Stopwatch(TrainerCallback):
    """Seconds from the first step's beginning to the last one's end, and the loss of each step. No checkpoint is written."""

    def __init__(self, device: str):
        self.device, self.started, self.seconds = device, 0.0, 0.0
        self.losses: list[float] = []

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = self.started or self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_save = False
        if state.global_step == state.max_steps:
            self.seconds = self._now() - self.started

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **_: Any) -> None:
        if logs is not None and "loss" in logs:
            self.losses.append(logs["loss"])


def train_ours(stage: Stage, arm: str, settings: Settings, conversations: Sequence[Conversation]) -> dict[str, float]:
    """One pass over the conversations by our stage."""
    watch = Stopwatch(settings.device)

    class Timed(train.StageTrainer):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            self.add_callback(watch)

    with tempfile.TemporaryDirectory(prefix="bench-") as folder, replaced(train, "StageTrainer", Timed), silent():
        config = stage_config(stage, arm, settings, Path(folder))
        dtype = train.resolve_precision(config.precision)
        model, processor = make_model(settings), make_processor(settings)
        dataset, collator = our_samples(stage, config, model, processor, conversations)
        if isinstance(config, TuneConfig):
            trained, groups, idle = train.choose_parameters(model, config, dtype)
            contract = tune_contract(config)
        else:
            trained, contract, projector = model, ALIGN_CONTRACT, projector_parameters(model)
            groups = [(config.learning_rate, projector)]
            idle = {name for name, _ in model.named_parameters() if part_of(name) == "projector"} - projector
        train.run_trainer(stage, config, {}, trained, groups, dataset, collator, dtype, contract, idle)
    counts = [count(dataset, batch) for batch in chunks(range(len(dataset)), settings.batch)]
    return outcome(watch, counts)


def our_samples(
    stage: Stage,
    config: StageConfig,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    conversations: Sequence[Conversation],
) -> tuple[SampleDataset, Any]:
    """The samples in the order in which training sees them, and what makes batches of them."""
    encoder = Encoder(processor, model.config.image_seq_length, config.data.max_length)
    dataset = train.prepare_samples(conversations, encoder, stage, "generated", config)
    return dataset, train.make_collator(model, processor, config)


def train_trl(settings: Settings, conversations: Sequence[Conversation]) -> dict[str, float]:
    """One pass over the conversations by TRL's SFTTrainer, in the order and the batches of our arm `random`."""
    try:
        import trl
    except ImportError:
        raise InputError("the arm trl needs TRL: pip install -r requirements/bench.txt") from None
    watch = Stopwatch(settings.device)
    model, processor = make_model(settings), make_processor(settings)
    # As in our stage 2 in full: language model and projector train, in fp32; the tower is frozen.
    names = {name for name, _ in model.named_parameters() if part_of(name) in ("language model", "projector")}
    set_trainable(model, names)
    order = train.draw(len(conversations), len(conversations), 0)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, silent():
        trainer = trl.SFTTrainer(
            model=model,
            args=trl.SFTConfig(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=settings.at_once,
                gradient_accumulation_steps=settings.batch // settings.at_once, learning_rate=0.0,
                max_length=max_length(settings), bf16=settings.precision == "bf16",
                gradient_checkpointing=settings.checkpointing, train_sampling_strategy="sequential",
                dataloader_num_workers=settings.workers, logging_steps=1, save_strategy="no", report_to="none",
                use_cpu=settings.device == "cpu", disable_tqdm=True, dataloader_pin_memory=settings.device == "cuda",
                # Cross-entropy of the answer, as ours.
                completion_only_loss=True,
            ),
            train_dataset=trl_dataset([conversations[i] for i in order]),
            processing_class=processor,
            callbacks=[watch],
        )  # fmt: skip
        trainer.train()
        batches = [trainer.data_collator([trainer.train_dataset[i] for i in part])
                   for part in chunks(range(len(order)), settings.at_once)]  # fmt: skip
    per_step = settings.batch // settings.at_once
    counts = [
        (sum(real_tokens(b) for b in step), sum(int((b["labels"][:, 1:] != IGNORE).sum()) for b in step))
        for step in (batches[i : i + per_step] for i in range(0, len(batches), per_step))
    ]
    return outcome(watch, counts)


def trl_dataset(conversations: Sequence[Conversation]) -> Any:
    """Prompt, completion and pictures, which are decoded when a batch is made of them, as ours are."""
    import datasets

    rows = [
        {
            "prompt": [{"role": "user", "content": c.messages[0]["content"].removeprefix("<image>\n")}],
            "completion": [{"role": "assistant", "content": c.messages[1]["content"]}],
            "images": [str(path) for path in c.images],
        }
        for c in conversations
    ]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def count(dataset: SampleDataset, positions: Sequence[int]) -> tuple[int, int]:
    """Tokens, and labels that something is predicted for."""
    samples = [dataset[i] for i in positions]
    return sum(len(s) for s in samples), sum(int((s.labels[1:] != IGNORE).sum()) for s in samples)


def chunks(items: Sequence[int], size: int) -> list[Sequence[int]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def outcome(watch: Stopwatch, counts: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Of one training: seconds, tokens, labels, and the mean loss over the labels."""
    tokens, labels = (sum(column) for column in zip(*counts, strict=True))
    if len(watch.losses) != len(counts):
        raise RuntimeError(f"{len(watch.losses)} steps were logged, not {len(counts)}")
    loss = sum(value * step[1] for value, step in zip(watch.losses, counts, strict=True)) / labels
    return {"seconds": watch.seconds, "tokens": tokens, "labels": labels, "loss": loss}


@contextmanager
def replaced(owner: Any, attribute: str, value: Any) -> Iterator[None]:
    """Within, the attribute has another value."""
    before = getattr(owner, attribute)
    setattr(owner, attribute, value)
    try:
        yield
    finally:
        setattr(owner, attribute, before)


@contextmanager
def silent() -> Iterator[None]:
    """Within, nothing is printed: progress bars and tables of five trainings at a time tell nobody anything."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


class Runner:
    """One arm, in a process of its own. Each turn builds its model anew and frees it, so that the arms share a GPU."""

    def __init__(self, settings: Settings, arm: str, folder: Path):
        self.settings, self.arm = settings, arm
        pictures = sorted(folder.glob("*.jpg"), key=lambda path: int(path.stem))
        self.conversations = {stage: make_conversations(stage, settings, pictures) for stage in settings.stages}
        self.warm: set[Stage] = set()

    def train(self, stage: Stage, steps: int | None = None) -> dict[str, float]:
        """One training over all samples, or over the first steps'."""
        conversations = self.conversations[stage]
        if steps is not None:
            conversations = conversations[: steps * self.settings.batch]
        if self.arm == "trl":
            result = train_trl(self.settings, conversations)
        else:
            result = train_ours(stage, self.arm, self.settings, conversations)
        if self.settings.device == "cuda":
            gc.collect()  # a Trainer and its model refer to one another
            torch.cuda.empty_cache()
        return result

    def turn(self, stage: Stage) -> dict[str, float]:
        """A training, and on a GPU its peak memory. The first turn begins with a step that is not timed."""
        if stage not in self.warm:
            self.train(stage, 1)
            self.warm.add(stage)
        if self.settings.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        result = self.train(stage)
        if self.settings.device == "cuda":
            result["peak_memory"] = float(meter.peak_memory(torch.device("cuda")))
        return result

    def cpu_memory(self, stage: Stage) -> float:
        """On a CPU: the most that a step allocates, model, gradients and optimizer included."""
        return float(peak_bytes(lambda: self.train(stage, 1)))

    def profile(self, stage: Stage) -> str:
        """The costliest operators of a step."""
        with profile() as recorded:
            self.train(stage, 1)
        order = "self_device_time_total" if self.settings.device == "cuda" else "self_cpu_time_total"
        return str(recorded.key_averages().table(sort_by=order, row_limit=15, max_name_column_width=60))


_runner: Runner  # of this process


def prepare(settings: Settings, arm: str, folder: Path) -> None:
    global _runner
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _runner = Runner(settings, arm, folder)


def call(method: str, stage: Stage) -> Any:
    return getattr(_runner, method)(stage)


def run(settings: Settings) -> dict[str, Any]:
    """Compare the arms: `{"environment", "settings", "lengths", "stages": {stage: {arm: {…}}}, "targets"}`, plain JSON values.

    Raises:
        RuntimeError: if two arms saw other tokens or labels, or came to another loss.
    """
    shapes(settings)
    spawn = multiprocessing.get_context("spawn")
    stages: dict[Stage, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-pictures-") as name, ExitStack() as stack:
        folder = Path(name)
        make_pictures(folder)
        pools = {arm: stack.enter_context(ProcessPoolExecutor(1, mp_context=spawn)) for arm in settings.arms}
        ready = [pool.submit(prepare, settings, arm, folder) for arm, pool in pools.items()]
        for future in ready:
            future.result()
        for stage in settings.stages:
            stages[stage] = measure(stage, settings, pools)
        targets = compare(settings, stages)
        for target in targets:
            if not target["met"]:
                target["profile"] = {arm: pools[arm].submit(call, "profile", target["stage"]).result()
                                     for arm in target["arms"]}  # fmt: skip
    return {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "settings": dataclasses.asdict(settings),
        "lengths": {stage: quantiles(stage, settings) for stage in settings.stages},
        "stages": stages,
        "targets": targets,
    }


def measure(stage: Stage, settings: Settings, pools: Mapping[str, ProcessPoolExecutor]) -> dict[str, Any]:
    """All arms of one stage."""
    arms = [arm for arm in pools if not (stage == "align" and arm == "trl")]
    turns: dict[str, list[dict[str, float]]] = {arm: [] for arm in arms}

    def take_turn(arm: str) -> float:
        turns[arm].append(pools[arm].submit(call, "turn", stage).result())
        return settings.samples / turns[arm][-1]["seconds"]

    rates = in_turns({arm: partial(take_turn, arm) for arm in arms}, settings.repeats)
    expected = int(drawn_lengths(stage, settings)[0].sum())
    check_same(stage, {arm: values[-1] for arm, values in turns.items()}, expected, TOLERANCE[settings.precision])
    peak = meter.peak_flops(torch.device(settings.device))
    results: dict[str, Any] = {}
    for arm in arms:
        last, rate = turns[arm][-1], spread(rates[arm])
        flops = flops_per_sample(stage, settings, last)
        if settings.device == "cpu":
            memory = pools[arm].submit(call, "cpu_memory", stage).result()
        else:
            memory = max(turn["peak_memory"] for turn in turns[arm])
        results[arm] = {
            "samples_per_second": rate._asdict(),
            "tokens_per_second": rate.median * last["tokens"] / settings.samples,
            "faster_than": {
                other: spread([a / b for a, b in zip(rates[arm], rates[other], strict=True)])._asdict()
                for other in arms if other != arm
            },
            "peak_memory": memory,
            "flops_per_sample": flops,
            "flops_per_second": rate.median * flops,
            "mfu": None if peak is None else rate.median * flops / peak,
            **{name: last[name] for name in ("tokens", "labels", "loss")},
        }  # fmt: skip
    return results


def check_same(stage: Stage, arms: Mapping[str, Mapping[str, float]], tokens: int, tolerance: float) -> None:
    """Every arm saw so many tokens and the same labels, and came to the same mean loss.

    Raises:
        RuntimeError: naming the first that did not: then the times would compare different work.
    """
    first, expected = next(iter(arms.items()))
    for arm, found in arms.items():
        if found["tokens"] != tokens:
            raise RuntimeError(f"{stage}: {arm} saw {found['tokens']} tokens, {tokens} were drawn")
        if found["labels"] != expected["labels"]:
            raise RuntimeError(
                f"{stage}: {arm} learned from {found['labels']} labels, {first} from {expected['labels']}"
            )
        if not abs(found["loss"] - expected["loss"]) <= tolerance * expected["loss"]:
            raise RuntimeError(f"{stage}: {arm} has a mean loss of {found['loss']}, {first} of {expected['loss']}")


def flops_per_sample(stage: Stage, settings: Settings, seen: Mapping[str, float]) -> float:
    """The model's FLOPs, by the plan's count, of the real tokens alone: what MFU is about."""
    llm, tower = shapes(settings)
    tokens, pictures = drawn_lengths(stage, settings)
    squares, mean = float((tokens**2).mean()), float(tokens.mean())
    labels = seen["labels"] / settings.samples
    n = plan.Lengths(mean, squares, labels, float(pictures.mean()), mean, squares, 0, 0, 0, 0)
    run = plan.Run(
        stage, llm, tower, settings.samples, settings.batch, settings.at_once, max_length(settings),
        method="full" if stage == "tune" else None,
    )  # fmt: skip
    return sum(plan.flops_per_sample(run, n).values(), Flops()).model


def quantiles(stage: Stage, settings: Settings) -> dict[str, float]:
    """Of the samples' lengths."""
    tokens, pictures = drawn_lengths(stage, settings)
    values = {f"{share} %": float(np.quantile(tokens, share / 100)) for share in (5, 25, 50, 75, 95, 100)}
    return values | {"mean": float(tokens.mean()), "with a picture": float(pictures.mean())}


def compare(settings: Settings, stages: Mapping[Stage, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The targets that this run can say something about: those are of a GPU and of LLaVA-1.5's lengths."""
    if settings.device != "cuda" or settings.scale != 1:
        return []
    found: list[dict[str, Any]] = []
    for (stage, arm, other), wanted in TARGETS.items():
        arms = stages.get(stage, {})
        if arm in arms and other in arms:
            value = arms[arm]["faster_than"][other]["median"]
            found.append({"stage": stage, "arms": [arm, other], "what": f"{arm} faster than {other}", "wanted": wanted,
                          "found": value, "met": value >= wanted})  # fmt: skip
    packed = stages["tune"].get("packed") if "tune" in stages else None
    if packed is not None and packed["mfu"] is not None:
        found.append({"stage": "tune", "arms": ["packed"], "what": "MFU of packed", "wanted": MFU_TARGET,
                      "found": packed["mfu"], "met": packed["mfu"] >= MFU_TARGET})  # fmt: skip
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Print
# ---------------------------------------------------------------------------------------------------------------------


def report(result: Mapping[str, Any]) -> None:
    """The comparison as tables."""
    settings, where = result["settings"], result["environment"]
    llm, tower = shapes(Settings(**settings))
    print(
        f"LLM {settings['llm']} ({llm.parameters / 1e6:.0f} M), tower {settings['tower']} ({tower.parameters / 1e6:.0f} M), "
        f"{tower.image_tokens} image tokens; batch {settings['batch']}, {settings['at_once']} at once; {settings['precision']}, "
        f"{settings['attention']} attention{', gradient checkpointing' if settings['checkpointing'] else ''}\n"
        f"on {where['device']} ({where['threads']} threads), torch {where['packages']['torch']}, "
        f"median of {settings['repeats']} turns of {settings['samples']} samples, lowest and highest in brackets"
    )
    names = {"align": "stage 1 (projector)", "tune": "stage 2 (language model in full, projector)"}
    cpu = settings["device"] == "cpu"
    for stage, arms in result["stages"].items():
        lengths = result["lengths"][stage]
        print(f"\n{names[stage]}; tokens a sample: " + ", ".join(
            f"{name} {value:.0f}" if name != "with a picture" else f"{100 * value:.0f} % with a picture"
            for name, value in lengths.items()
        ))  # fmt: skip
        others = [arm for arm in ("random", "length", "trl") if arm in arms]
        rows = [
            [
                arm,
                _shown(value["samples_per_second"], ".1f"),
                f"{value['tokens_per_second']:,.0f}",
                *(_shown(value["faster_than"][other], ".2f") if other != arm else "" for other in others),
                f"{value['peak_memory'] / MIB:,.0f}",
                f"{value['flops_per_second'] / 1e12:.3g}",
                "" if value["mfu"] is None else f"{100 * value['mfu']:.1f} %",
                f"{value['loss']:.4f}",
            ]
            for arm, value in arms.items()
        ]
        columns = [
            "",
            "samples/s",
            "tokens/s",
            *(f"× {other}" for other in others),
            "peak MiB",
            "TFLOP/s",
            "MFU",
            "loss",
        ]
        if cpu:
            columns.remove("MFU")
            for row in rows:
                del row[-2]
        print_table(columns, rows)
    for target in result["targets"]:
        print(
            f"{target['what']}: {target['found']:.2f}, wanted {target['wanted']}: {'met' if target['met'] else 'MISSED'}"
        )
        for arm, table in target.get("profile", {}).items():
            print(f"{arm}, one step:\n{table}")


def _shown(value: Mapping[str, float], form: str) -> str:
    return f"{value['median']:{form}} ({value['low']:{form}}–{value['high']:{form}})"


def parse(arguments: Sequence[str]) -> tuple[Settings, Path | None]:
    """The settings of a command line, and the file for the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--llm", help="a Llama of llava_bridge.architectures, a folder, or tiny (CPU: tiny, CUDA: llama-3.2-1b)"
    )
    parser.add_argument("--tower", help="a CLIP tower, likewise (CPU: tiny, CUDA: clip-l14-336)")
    parser.add_argument("--scale", type=int, help=f"lengths are LLaVA-1.5's divided by this (CPU: {SMALL}, CUDA: 1)")
    parser.add_argument("--samples", type=int, help="of a turn (CPU: 64, CUDA: 512)")
    parser.add_argument("--batch", type=int, help="samples of an optimizer step (CPU: 32, CUDA: 64)")
    parser.add_argument("--at-once", type=int, help="of these, the ones that are worked on at once (CPU: 8, CUDA: 4)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="(CPU: fp32, CUDA: bf16)")
    parser.add_argument("--attention", help="of the language model, as transformers names it (CPU: eager, CUDA: sdpa)")
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing")
    parser.add_argument("--workers", type=int, help="loader processes of each arm (CPU: 0, CUDA: 8)")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="(cuda where there is one)")
    parser.add_argument("--repeats", type=int, help="turns of each arm (3)")
    parser.add_argument("--stages", nargs="+", choices=["align", "tune"], default=["align", "tune"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    values = vars(parser.parse_args(arguments))
    file = values.pop("json")
    device = values["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU here")
    given = {name: value for name, value in values.items() if value is not None}
    given |= {"device": device, "stages": tuple(values["stages"]), "arms": tuple(values["arms"])}
    settings = Settings(**{**DEFAULTS[device], **given})
    for name in ("samples", "batch", "at_once", "repeats", "scale"):
        if getattr(settings, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1")
    if settings.samples % settings.batch or settings.batch % settings.at_once:
        raise InputError("--samples must be a multiple of --batch, and --batch of --at-once")
    return settings, file


def main(arguments: Sequence[str] = ()) -> int:
    try:
        settings, file = parse(arguments)
        result = run(settings)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory, lower --at-once: {error}", file=sys.stderr)
        return 2
    report(result)
    if file is not None:
        write_json(file, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
