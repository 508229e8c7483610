"""Typed configs of stage 1 and stage 2. Imports no torch. Defaults are LLaVA-1.5's published hyper-parameters."""

import dataclasses
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from clips_core.config import FORBID

Projector = Literal["mlp2x_gelu", "linear"]
Precision = Literal["auto", "bfloat16", "float32"]
ImageMode = Literal["square", "pad", "anyres"]
Parallel = Literal["ddp", "zero2", "zero3"]
Group = Literal["modality_length", "length", "none"]
Method = Literal["lora", "qlora", "full"]
Save = Literal["merged", "adapter"]


@dataclass(config=FORBID)
class ConversationConfig:
    """The conversations that a stage learns from."""

    json: Path  # LLaVA JSON: a list of {"id", "image", "conversations": [{"from": "human" | "gpt", "value"}]}
    images: Path  # the folder that "image" is relative to
    max_length: int = 2048  # tokens of a sample, image tokens included; a longer one is cut at its end
    caption_end: str | None = None  # ends a caption in stage 1; null: the eos token. LLaVA-1.5's is a line's end, "\n"

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
    # How a batch is worked off. It follows that the gradients of so many parts are accumulated: one recipe serves any
    # number of processes.
    device_batch_size: int | None = None  # samples that a process works on at once; None: its whole share of a batch
    # ddp: each process holds everything. zero2: DeepSpeed deals out gradients and optimizer state; zero3: the weights too.
    parallel: Parallel = "ddp"
    gradient_checkpointing: bool = False  # compute activations twice rather than keep them: less memory, a third slower
    # Which samples meet in a batch: all with pictures or all without, the longest first; of like length; or any.
    group: Group = "modality_length"
    packing: bool = False  # put samples end to end into rows without padding, each seeing itself alone
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
        for name in ("batch_size", "device_batch_size", "save_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.device_batch_size is not None and self.batch_size % self.device_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of device_batch_size {self.device_batch_size}"
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
    llm: str = "smollm2"  # smollm2, a folder with a causal LM and its tokenizer, or a hub name: org/name[@REVISION]
    projector: Projector = "mlp2x_gelu"
    # square: the tower's own processor. pad: first made square with the mean colour, as LLaVA-1.5. anyres: tiles, LLaVA-NeXT.
    image_mode: ImageMode = "square"
    template: str | None = None  # chat template: name of a shipped one, or a path ending in .jinja; None: the LLM's own
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
    """Stage 2: the language model (by adapters, or in full) and the projector learn from conversations."""

    align: Path  # the finished run folder of stage 1
    tower: str | None = None  # tower spec: refused unless stage 1 was trained with it; None: not compared
    image_mode: Literal["square", "pad"] | None = None  # of stage 2 and of the result; None: as in stage 1
    # Of the language model. lora: adapters on its linear layers. qlora: the same over weights in 4 bits. full: all weights.
    method: Method = "lora"
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)  # of the methods lora and qlora
    batch_size: int = 128
    learning_rate: float = 2e-4  # of the adapters, or of the language model (LLaVA-1.5 in full: 2e-5)
    projector_learning_rate: float = 2e-5
    tower_learning_rate: float | None = None  # None: the tower is frozen
    # merged: a stock LLaVA in OUT/model. adapter: in OUT/adapter, in PEFT's layout; it needs stage 1's model beneath it.
    save: Save = "merged"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save == "adapter" and self.method == "full":
            raise ValueError("save=adapter is for the methods lora and qlora: full has no adapters")
        if self.save == "adapter" and self.tower_learning_rate is not None:
            raise ValueError("save=adapter cannot hold a tuned tower: take save=merged, or leave the tower frozen")
        if self.method == "qlora" and self.parallel != "ddp":
            raise ValueError(
                f"parallel={self.parallel} cannot deal out weights in 4 bits: qlora goes with parallel=ddp"
            )
