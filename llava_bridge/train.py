"""The two stages on transformers' Trainer, read from top to bottom: check → build → train → save.

Stage 1 (`align`) trains the projector alone, stage 2 (`tune`) LoRA on the language model and the projector in full. Each
writes one folder: OUT/model, a stock LLaVA, and OUT/manifest.json with the hashes of what went in. Killed and run again, a
stage goes on from its newest whole checkpoint, exactly.
"""

import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler, SequentialSampler
from tqdm import tqdm
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from clips_core.config import to_dict
from clips_core.errors import InputError
from clips_core.folders import (
    MetricsLog,
    first_difference,
    is_finished,
    read_json,
    read_manifest,
    sha256_file,
    write_json,
    write_manifest,
)
from llava_bridge.config import AlignConfig, LoraConfig, StageConfig, TuneConfig
from llava_bridge.conversations import (
    IGNORE,
    Collator,
    Conversation,
    Encoder,
    Sample,
    SampleDataset,
    draw,
    group_by_length,
    read_conversations,
)
from llava_bridge.llm import llm_folder, weight_hash
from llava_bridge.mllm import (
    LANGUAGE_MODEL,
    PROJECTOR,
    VISION_TOWER,
    build_mllm,
    check_swap,
    load_mllm,
    projector_parameters,
    save_mllm,
)
from llava_bridge.precision import resolve_precision
from llava_bridge.towers import load_tower

COMPLETE = "complete.json"  # a checkpoint's last file: without it the checkpoint does not count
TRAINABLE = "trainable.safetensors"  # a checkpoint's weights: only what trains
WITHOUT_EFFECT = ("out", "workers", "save_every")  # settings that change nothing of the result


def align(config: AlignConfig) -> Path:
    """Stage 1: train the projector between a tower and a language model, everything else frozen.

    Returns:
        `config.out`, with model/, metrics.jsonl and manifest.json; at once if it is finished already.

    Raises:
        InputError: for whatever is wrong with tower, language model, data or folder, before any training.
    """
    # -------------------------------------------------------------------------------------------------- inputs
    tower = load_tower(config.tower, config.image_size)
    llm = llm_folder(config.llm)
    conversations = read_conversations(config.data.json, config.data.images)
    inputs = {"tower": tower.weight_hash, "llm": weight_hash(llm), "data": sha256_file(config.data.json)}
    if is_finished(config.out, "align", settings(config), inputs):
        return config.out

    # -------------------------------------------------------------------------------------------------- model, data
    dtype = resolve_precision(config.precision)
    model, processor = build_mllm(
        tower, llm, config.projector, config.select_layer, config.system_prompt, dtype, config.seed
    )
    choose_attention(model)
    encoder = Encoder(processor, model.config.image_seq_length, config.data.max_length)
    dataset = prepare_samples(conversations, encoder.plain, config)

    # -------------------------------------------------------------------------------------------------- train, save
    groups = [(config.learning_rate, projector_parameters(model))]
    trainer = run_trainer("align", config, inputs, model, groups, dataset, Collator(processor))
    finish("align", config, inputs, model.to(dtype), processor, trainer)
    return config.out


def tune(config: TuneConfig) -> Path:
    """Stage 2: train LoRA on all linear layers of the language model, and the projector in full; the tower stays.

    Returns:
        `config.out`, with model/ (adapters merged), metrics.jsonl and manifest.json; at once if it is finished already.

    Raises:
        InputError: for whatever is wrong with stage 1's folder, the tower, data or folder, before any training.
    """
    # -------------------------------------------------------------------------------------------------- inputs
    aligned = read_manifest(config.align, "align")
    if config.tower is not None:
        check_swap(load_tower(config.tower, aligned["config"].get("image_size")), config.align)
    conversations = read_conversations(config.data.json, config.data.images)
    inputs = {
        "tower": aligned["inputs"]["tower"],
        "llm": aligned["inputs"]["llm"],
        "align": weight_hash(config.align / "model"),
        "data": sha256_file(config.data.json),
    }
    if is_finished(config.out, "tune", settings(config), inputs):
        return config.out

    # -------------------------------------------------------------------------------------------------- model, data
    dtype = resolve_precision(config.precision)
    base, processor = load_mllm(config.align, dtype)
    choose_attention(base)
    encoder = Encoder(processor, base.config.image_seq_length, config.data.max_length)
    dataset = prepare_samples(conversations, encoder.chat, config)
    model, adapters, projector = add_lora(base, config.lora, config.seed)

    # -------------------------------------------------------------------------------------------------- train, save
    groups = [(config.learning_rate, adapters), (config.projector_learning_rate, projector)]
    trainer = run_trainer("tune", config, inputs, model, groups, dataset, Collator(processor))
    finish("tune", config, inputs, merge_lora(model, dtype), processor, trainer)
    return config.out


# ------------------------------------------------------------------------------------------------------------ before


def settings(config: StageConfig) -> dict[str, Any]:
    """The settings that make a result what it is."""
    return {key: value for key, value in to_dict(config).items() if key not in WITHOUT_EFFECT}


def choose_attention(model: LlavaForConditionalGeneration) -> None:
    """On a CPU, plain attention in the language model: at these lengths the fused one's backward is far slower."""
    if not torch.cuda.is_available():
        model.model.language_model.set_attn_implementation("eager")


def prepare_samples(
    conversations: Sequence[Conversation], encode: Callable[[Conversation], Sample], config: StageConfig
) -> SampleDataset:
    """The training's samples in the order in which they are seen, a pure function of data, seed and batch size."""
    drawn = draw(len(conversations), config.samples or len(conversations), config.seed)
    seen = sorted(set(drawn))
    samples = {i: encode(conversations[i]) for i in tqdm(seen, desc="tokenizing", unit="sample")}
    lengths = {i: len(sample) for i, sample in samples.items()}
    return SampleDataset(samples, group_by_length(drawn, lengths, config.batch_size, config.seed))


def add_lora(
    base: LlavaForConditionalGeneration, config: LoraConfig, seed: int
) -> tuple[peft.PeftModel, set[str], set[str]]:
    """Adapters on every linear layer of the language model, and nowhere else.

    Returns:
        the wrapped model, the names of the adapters' parameters, and those of the projector's.
    """
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    kinds = sorted({name.rpartition(".")[2] for name in layers if name.startswith(LANGUAGE_MODEL)})
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=rf"{re.escape(LANGUAGE_MODEL)}.*\.({'|'.join(kinds)})",
    )
    projector = projector_parameters(base)
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at peft's address
        model = peft.get_peft_model(base, lora)
    names = [name for name, _ in model.named_parameters()]
    adapters = {name for name in names if ".lora_" in name}
    return model, adapters, {name for name in names if name.endswith(tuple(projector))}


def merge_lora(model: peft.PeftModel, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """The adapters added into the weights, in fp32: in bf16 most of a small change would be rounded away twice."""
    return model.float().merge_and_unload().to(dtype)


# ---------------------------------------------------------------------------------------------------------- training


def run_trainer(
    stage: str,
    config: StageConfig,
    inputs: dict[str, str],
    model: nn.Module,
    groups: list[tuple[float, set[str]]],
    dataset: SampleDataset,
    collator: Collator,
) -> "StageTrainer":
    """Train exactly the parameters of `groups`, (learning rate, names) each, from the newest whole checkpoint on."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    per_step = processes * config.gradient_accumulation
    if config.batch_size % per_step:
        raise InputError(
            f"batch_size {config.batch_size} is not a multiple of {processes} processes × gradient_accumulation "
            f"{config.gradient_accumulation}"
        )
    on_gpu = torch.cuda.is_available()
    if on_gpu and torch.cuda.device_count() > 1 and processes == 1:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: start one process for each with torchrun, "
            "or choose one with CUDA_VISIBLE_DEVICES"
        )
    set_trainable(model, set().union(*(names for _, names in groups)))
    run = {"stage": stage, "config": settings(config), "inputs": inputs}
    checkpoint = newest_checkpoint(config.out / "checkpoints", run)
    frozen_dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    arguments = TrainingArguments(
        output_dir=str(config.out / "checkpoints"),
        num_train_epochs=1,  # the dataset is the whole training in order
        per_device_train_batch_size=config.batch_size // per_step,
        gradient_accumulation_steps=config.gradient_accumulation,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=frozen_dtype == torch.bfloat16,
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,  # the newest, and the one before in case the newest is cut off while it is written
        logging_steps=1,
        logging_nan_inf_filter=False,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        use_cpu=not on_gpu,
        use_cache=True,  # only ends up in the model's config: training passes use_cache=False itself
        report_to="none",
        disable_tqdm=True,
    )
    trainer = StageTrainer(groups, run, model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(stage, MetricsLog(config.out / "metrics.jsonl")))
    if trainer.accelerator.num_processes != processes:
        raise InputError(
            f"{processes} processes were started, but they train as {trainer.accelerator.num_processes}: "
            "each would train alone"
        )
    if trainer.is_world_process_zero():
        print(trainable_table(model), flush=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


class StageTrainer(Trainer):
    """transformers' Trainer, but: the loss only where there is a label, a learning rate per group of parameters, samples in
    the dataset's own order, and checkpoints that hold what trains and count only once they are complete.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, groups: list[tuple[float, set[str]]], run: dict[str, Any], **options: Any):
        self.groups, self.run = groups, run
        super().__init__(**options)
        # The loss is divided by the labels of the whole batch here, so the Trainer has to count them and to divide no more.
        self.model_accepts_loss_kwargs = True

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy summed over this part's labels, over the number of labels in the whole (global) batch."""
        assert num_items_in_batch is not None and not return_outputs
        loss = supervised_loss(model, self.model.get_output_embeddings(), inputs) / num_items_in_batch
        # Gradients are averaged over processes, while this loss is to be summed over them.
        return loss * self.accelerator.num_processes

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            parameters = dict((model or self.model).named_parameters())
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            weight_decay = self.args.weight_decay
            self.optimizer = kind(
                [
                    {"params": [parameters[name] for name in sorted(names)], "lr": rate, "weight_decay": weight_decay}
                    for rate, names in self.groups
                ],
                **options,
            )
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset[Sample] | None = None) -> Sampler[int]:
        return SequentialSampler(self.train_dataset)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.model.state_dict() if state_dict is None else state_dict
        save_file({name: state[name].contiguous() for name in self._trained_names()}, folder / TRAINABLE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        state = load_file(Path(resume_from_checkpoint) / TRAINABLE)
        parameters = dict((model or self.model).named_parameters())
        assert state.keys() == self._trained_names()
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def _trained_names(self) -> set[str]:
        return set().union(*(names for _, names in self.groups))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # each process writes its own random state
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            write_json(folder / COMPLETE, {"run": self.run, "sizes": sizes})


def supervised_loss(model: nn.Module, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Cross-entropy of a causal LM summed over all labels [B, T], its vocabulary head run at labelled positions only.

    A vocabulary of tens of thousands at each position would cost more memory than all the rest, most of it for nothing.
    """
    targets = batch["labels"][:, 1:]
    labelled = targets != IGNORE

    def select(_: nn.Module, arguments: tuple[Tensor]) -> tuple[Tensor]:
        return (arguments[0][:, :-1][labelled],)  # [B, T, D] → [labels, D]

    # A hook, not a call of the model's parts: wrappers (DDP, PEFT, autocast) do their work in the model's own forward.
    hook = head.register_forward_pre_hook(select)
    try:
        others = {name: value for name, value in batch.items() if name != "labels"}
        logits = model(**others, use_cache=False).logits  # [labels, V]
    finally:
        hook.remove()
    return F.cross_entropy(logits.float(), targets[labelled], reduction="sum")


class Progress(TrainerCallback):
    """A progress bar with the time left, and one row of metrics per step."""

    def __init__(self, title: str, log: MetricsLog):
        self.title, self.log = title, log

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not state.is_world_process_zero:
            return
        self.log.cut_after(state.global_step)  # a run that was killed logged steps which are about to be repeated
        rows = self.log.rows()
        self.started = time.monotonic() - (rows[-1]["seconds"] if rows else 0.0)
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.title, unit="step")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"{self.title}: the loss is {logs['loss']} at step {state.global_step}; lower learning_rate"
            )
        if state.is_world_process_zero:
            seconds = round(time.monotonic() - self.started, 3)
            self.log.log(step=state.global_step, loss=logs["loss"], lr=logs["learning_rate"], seconds=seconds)
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.close()


# ------------------------------------------------------------------------------------------------------- what trains


def set_trainable(model: nn.Module, names: set[str]) -> None:
    """Train exactly these parameters, in fp32 (bf16 would swallow small steps), and never the tower.

    Raises:
        RuntimeError: if a name is not the model's, or is the tower's.
    """
    parameters = dict(model.named_parameters())
    wrong = sorted(name for name in names if name not in parameters or VISION_TOWER in name)
    if wrong or not names:
        raise RuntimeError(f"not to be trained: {wrong[:3]}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
        if name in names:
            parameter.data = parameter.data.float()


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters in all and trainable ones, per part of a LLaVA."""
    parts = ("vision tower", "projector", "language model", "adapters")
    counts = {part: {"parameters": 0, "trainable": 0} for part in parts}
    for name, parameter in model.named_parameters():
        part = (
            "vision tower" if VISION_TOWER in name
            else "projector" if PROJECTOR in name
            else "adapters" if ".lora_" in name
            else "language model"
        )  # fmt: skip
        counts[part]["parameters"] += parameter.numel()
        counts[part]["trainable"] += parameter.numel() * parameter.requires_grad
    return counts


def trainable_table(model: nn.Module) -> str:
    """What trains and what does not, as a table to print."""
    rows = [
        f"{part:<16}{count['parameters']:>14,}{count['trainable']:>14,}"
        for part, count in count_parameters(model).items()
        if count["parameters"]
    ]
    return "\n".join([f"{'part':<16}{'parameters':>14}{'trainable':>14}", *rows])


# -------------------------------------------------------------------------------------------------------- checkpoints


def newest_checkpoint(folder: Path, run: dict[str, Any]) -> Path | None:
    """The newest complete checkpoint; incomplete ones, left by a kill, are deleted.

    Raises:
        InputError: if it is one of another run, naming the first difference.
    """
    complete = []
    for path in folder.glob("checkpoint-*"):
        if _is_complete(path):
            complete.append(path)
        else:
            shutil.rmtree(path)
    if not complete:
        return None
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]))
    difference = first_difference(read_json(newest / COMPLETE)["run"], run)
    if difference is not None:
        raise InputError(f"{folder} holds another run ({difference}); choose another folder or delete this one")
    return newest


def _is_complete(checkpoint: Path) -> bool:
    if not (checkpoint / COMPLETE).is_file():
        return False
    sizes = read_json(checkpoint / COMPLETE)["sizes"]
    return all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )


# -------------------------------------------------------------------------------------------------------------- after


def finish(
    stage: str,
    config: StageConfig,
    inputs: dict[str, str],
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    trainer: StageTrainer,
) -> None:
    """Write the model and, last, the manifest; the checkpoints have served."""
    if trainer.is_world_process_zero():
        save_mllm(model, processor, config.out / "model")
        last = MetricsLog(config.out / "metrics.jsonl").rows()[-1]
        outputs = {
            "model": "model",
            "dtype": str(model.dtype).removeprefix("torch."),
            "steps": last["step"],
            "samples": len(trainer.train_dataset),
            "seconds": last["seconds"],
            "loss": last["loss"],
        }
        # Before the manifest, which records all weights in the folder. A kill between the two costs time, not correctness.
        shutil.rmtree(config.out / "checkpoints", ignore_errors=True)
        write_manifest(config.out, stage, settings(config), inputs, outputs)
    trainer.accelerator.wait_for_everyone()
