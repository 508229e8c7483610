"""Typed configs of stage 1 and stage 2. Imports no torch. Defaults are LLaVA-1.5's published hyper-parameters."""

import dataclasses
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from clips_core.config import FORBID

Projector = Literal["mlp2x_gelu", "linear"]
Precision = Literal["auto", "bfloat16", "float32"]


@dataclass(config=FORBID)
class ConversationConfig:
    """The conversations that a stage learns from."""

    json: Path  # LLaVA JSON: a list of {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}
    images: Path  # the folder that "image" is relative to
    max_length: int = 2048  # tokens of a sample, image tokens included; a longer one is cut at its end

    def __post_init__(self) -> None:
        if self.max_length < 2:
            raise ValueError("max_length must be at least 2")


@dataclass(config=FORBID, kw_only=True)
class StageConfig:
    """What both stages have in common."""

    out: Path  # the run's folder
    data: ConversationConfig
    batch_size: int  # samples of one optimizer step, over all processes and accumulated gradients
    learning_rate: float  # the peak
    samples: int | None = None  # seen in all, counted with repetition; None: one epoch
    gradient_accumulation: int = 1  # parts that a process's share of a batch is worked off in
    warmup_ratio: float = 0.03  # share of the steps in which the learning rate rises; then it falls as a cosine
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: Precision = (
        "auto"  # of the frozen weights and of the result; auto: bfloat16 where the hardware multiplies it
    )
    workers: int = 0  # loader processes; 0: in the training process
    save_every: int = 500  # steps between checkpoints
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "gradient_accumulation", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of gradient_accumulation {self.gradient_accumulation}"
            )
        if self.samples is not None and self.samples < 1:
            raise ValueError("samples must be at least 1")
        if not 0 <= self.warmup_ratio < 1:
            raise ValueError("warmup_ratio must be in [0, 1)")


@dataclass(config=FORBID, kw_only=True)
class AlignConfig(StageConfig):
    """Stage 1: the projector alone learns to put pictures into the LLM's words, on `<image>` + caption."""

    tower: str  # tower spec, such as clips:runs/clips
    image_size: int | None = None  # pixels; None: the tower's own resolution
    llm: str = "smollm2"  # smollm2, or a folder with a causal LM, its tokenizer and a chat template
    projector: Projector = "mlp2x_gelu"
    select_layer: int = (
        -2
    )  # which of the tower's hidden states the projector reads; 0 is the patch embedding, -1 the last
    system_prompt: str | None = None  # baked into the result's chat template; None: the template's own
    batch_size: int = 256
    learning_rate: float = 1e-3


@dataclass(config=FORBID)
class LoraConfig:
    """Low-rank adapters on all linear layers of the language model."""

    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError("rank must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError("dropout must be in [0, 1)")


@dataclass(config=FORBID, kw_only=True)
class TuneConfig(StageConfig):
    """Stage 2: LoRA on the language model, and the projector in full, on conversations."""

    align: Path  # the finished run folder of stage 1
    tower: str | None = None  # tower spec: refused unless stage 1 was trained with it; None: not compared
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    batch_size: int = 128
    learning_rate: float = 2e-4  # of the adapters
    projector_learning_rate: float = 2e-5
