"""The two stages on transformers' Trainer, read from top to bottom: check → build → train → save.

Stage 1 (`align`) trains the projector alone, stage 2 (`tune`) the language model (LoRA, QLoRA or in full) and the projector.
Each writes one folder: OUT/model, a stock LLaVA (or OUT/adapter), and OUT/manifest.json with the hashes of what went in.
Killed and run again, a stage goes on from its newest whole checkpoint, exactly.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from tqdm import tqdm
from transformers import (
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
from llava_bridge.adapters import save_adapter
from llava_bridge.batching import Collator, SampleDataset, balanced, draw, grouped, packed_row_length, real_tokens
from llava_bridge.card import write_card
from llava_bridge.config import AlignConfig, StageConfig, TuneConfig
from llava_bridge.conversations import Conversation, Encoder, Sample, read_conversations
from llava_bridge.image_modes import image_processor
from llava_bridge.lengths import encoding_key, sample_lengths
from llava_bridge.llm import llm_folder, weight_hash
from llava_bridge.loss import supervised_loss
from llava_bridge.methods import (
    ALIGN_CONTRACT,
    Role,
    add_lora,
    check_contract,
    language_parameters,
    merge_lora,
    part_of,
    quantize,
    set_trainable,
    tower_parameters,
    trainable_table,
    tune_contract,
    wrapped,
)
from llava_bridge.mllm import (
    Mllm,
    MllmProcessor,
    build_mllm,
    check_swap,
    fixed_image_tokens,
    load_mllm,
    projector_parameters,
    save_mllm,
)
from llava_bridge.parallel import check_launch, deepspeed_config, samples_at_once, session, world_size
from llava_bridge.precision import resolve_precision
from llava_bridge.templates import read_template
from llava_bridge.towers import Tower, load_tower

COMPLETE = "complete.json"  # a checkpoint's last file: without it the checkpoint does not count
LENGTHS = "lengths"  # beginning of the folder that keeps the samples' lengths until the run is finished
TRAINABLE = "trainable.safetensors"  # a checkpoint's weights: only what trains
# Settings that say how the work is done, and change nothing of what comes out but its rounding.
WITHOUT_EFFECT = ("out", "workers", "save_every", "device_batch_size", "parallel", "gradient_checkpointing")

Groups = list[tuple[float, set[str]]]  # (learning rate, names of parameters) each


def align(config: AlignConfig) -> Path:
    """Stage 1: train the projector between a tower and a language model, everything else frozen.

    Returns:
        `config.out`, with model/, metrics.jsonl and manifest.json; at once if it is finished already.

    Raises:
        InputError: for whatever is wrong with tower, language model, data or folder, before any training.
    """
    # -------------------------------------------------------------------------------------------------- inputs
    dtype = resolve_precision(config.precision)
    check_launch(config, dtype)
    tower = load_tower(config.tower, config.image_size)
    llm = llm_folder(config.llm)
    conversations = read_conversations(config.data.json, config.data.images)
    inputs = {"tower": tower.weight_hash, "llm": weight_hash(llm), "data": sha256_file(config.data.json)}
    if config.template is not None and config.template.endswith(".jinja"):  # a file, which may change under its name
        inputs["template"] = hashlib.sha256(read_template(config.template).encode()).hexdigest()
    if is_finished(config.out, "align", settings(config), inputs):
        return config.out

    # -------------------------------------------------------------------------------------------------- model, data
    model, processor = build_mllm(
        tower,
        llm,
        config.projector,
        config.select_layer,
        config.system_prompt,
        dtype,
        config.seed,
        image_mode=config.image_mode,
        template=config.template,
    )
    choose_attention(model)
    collator = make_collator(model, processor, config)
    encoder = Encoder(processor, fixed_image_tokens(model), config.data.max_length, config.data.caption_end)
    dataset = prepare_samples(conversations, encoder, "align", inputs["data"], config)
    projector = projector_parameters(model)
    idle = {name for name, _ in model.named_parameters() if part_of(name) == "projector"} - projector
    groups = [(config.learning_rate, projector)]

    # -------------------------------------------------------------------------------------------------- train, save
    with session(config.parallel):
        trainer = run_trainer("align", config, inputs, model, groups, dataset, collator, dtype, ALIGN_CONTRACT, idle)

        def save(trained: nn.Module) -> dict[str, Any]:
            save_mllm(trained.to(dtype), processor, config.out / "model")
            return {"model": "model", "dtype": dtype_name(dtype)}

        finish("align", config, inputs, trainer, save)
    return config.out


def tune(config: TuneConfig) -> Path:
    """Stage 2: train the language model by the config's method, the projector in full, and the tower if it is asked for.

    Returns:
        `config.out`, with model/ (adapters merged) or adapter/, metrics.jsonl and manifest.json; at once if it is finished
        already.

    Raises:
        InputError: for whatever is wrong with stage 1's folder, the tower, data or folder, before any training.
    """
    # -------------------------------------------------------------------------------------------------- inputs
    dtype = resolve_precision(config.precision)
    check_launch(config, dtype)
    aligned = read_manifest(config.align, "align")
    tower = None if config.tower is None else load_tower(config.tower, aligned["config"].get("image_size"))
    if tower is not None:
        check_swap(tower, config.align)
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
    base, processor = load_mllm(config.align, dtype)
    if config.image_mode not in (None, aligned["config"].get("image_mode", "square")):
        processor.image_processor = change_image_mode(base, tower, config)
    if config.save == "adapter" and base.config.model_type != "llava":
        raise InputError(
            f"save=adapter cannot hold all that trains of {config.align} (image_mode anyres); take save=merged"
        )
    choose_attention(base)
    collator = make_collator(base, processor, config)
    encoder = Encoder(processor, fixed_image_tokens(base), config.data.max_length)
    dataset = prepare_samples(conversations, encoder, "tune", inputs["data"], config)
    model, groups, idle = choose_parameters(base, config, dtype)

    # -------------------------------------------------------------------------------------------------- train, save
    with session(config.parallel):
        trainer = run_trainer(
            "tune", config, inputs, model, groups, dataset, collator, dtype, tune_contract(config), idle
        )

        def save(trained: nn.Module) -> dict[str, Any]:
            outputs = {"tower": "kept" if config.tower_learning_rate is None else "tuned", "dtype": dtype_name(dtype)}
            if config.save == "adapter":
                save_adapter(trained, processor, config.align / "model", config.out / "adapter")
                return {"adapter": "adapter", **outputs}
            merged = trained.to(dtype) if config.method == "full" else merge_lora(trained, dtype)
            save_mllm(merged, processor, config.out / "model")
            return {"model": "model", **outputs}

        finish("tune", config, inputs, trainer, save)
    return config.out


# ------------------------------------------------------------------------------------------------------------ before


def settings(config: StageConfig) -> dict[str, Any]:
    """The settings that make a result what it is."""
    return {key: value for key, value in to_dict(config).items() if key not in WITHOUT_EFFECT}


def choose_attention(model: Mllm) -> None:
    """On a CPU, plain attention in the language model: at these lengths the fused one's backward is far slower."""
    if not torch.cuda.is_available():
        model.model.language_model.set_attn_implementation("eager")


def change_image_mode(model: Mllm, tower: Tower | None, config: TuneConfig) -> Any:
    """The image processor of a stage 2 that makes pictures square in another way than stage 1 did, as in LLaVA-1.5."""
    assert config.image_mode is not None
    if model.config.model_type != "llava":
        raise InputError(f"image_mode={config.image_mode}: {config.align} was trained with anyres, another model")
    if tower is None:
        raise InputError(f"image_mode={config.image_mode} is not stage 1's: name the tower too (tower=SPEC)")
    return image_processor(tower, config.image_mode)


def make_collator(model: Mllm, processor: MllmProcessor, config: StageConfig) -> Collator:
    """Padded batches, or packed ones where the language model keeps the samples of a row apart."""
    if not config.packing:
        return Collator(processor)
    return Collator(processor, True, packed_row_length(model.model.language_model, config.data.max_length))


def prepare_samples(
    conversations: Sequence[Conversation], encoder: Encoder, stage: str, data_hash: str, config: StageConfig
) -> SampleDataset:
    """The training's samples in the order in which they are seen, a pure function of data, seed and batch size."""
    encode = encoder.plain if stage == "align" else encoder.chat
    drawn = draw(len(conversations), config.samples or len(conversations), config.seed)
    known = config.out / f"{LENGTHS}-{encoding_key(encoder, stage, data_hash)[:12]}"
    lengths = sample_lengths(conversations, sorted(set(drawn)), encode, known)
    pictured = {i for i in lengths if conversations[i].images}
    order = grouped(drawn, lengths, pictured, config.batch_size, config.group, config.seed)
    if config.packing:
        order = balanced(order, lengths, config.batch_size, samples_at_once(config))
    return SampleDataset(conversations, encode, order)


def choose_parameters(base: Mllm, config: TuneConfig, dtype: torch.dtype) -> tuple[nn.Module, Groups, set[str]]:
    """Stage 2's model and what trains in it.

    Returns:
        the model, wrapped by PEFT for adapters; the parameters with their learning rates; and those that have no effect, or
        stay what they are, in parts that train.
    """
    projector = projector_parameters(base)
    tower = set() if config.tower_learning_rate is None else tower_parameters(base)
    trained = {part for part, role in tune_contract(config).items() if role == "trained"} - {"language model"}
    idle = {name for name, _ in base.named_parameters() if part_of(name) in trained} - projector - tower
    if config.method == "full":
        model, language = base, language_parameters(base)
    else:
        if config.method == "qlora":
            quantize(base, dtype)
        model, language = add_lora(base, config.lora, config.seed)
        projector, tower, idle = wrapped(projector), wrapped(tower), wrapped(idle)
    groups = [(config.learning_rate, language), (config.projector_learning_rate, projector)]
    if config.tower_learning_rate is not None:
        groups.append((config.tower_learning_rate, tower))
    return model, groups, idle


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---------------------------------------------------------------------------------------------------------- training


def run_trainer(
    stage: str,
    config: StageConfig,
    inputs: dict[str, str],
    model: Any,
    groups: Groups,
    dataset: SampleDataset,
    collator: Collator,
    dtype: torch.dtype,
    contract: dict[str, Role],
    idle: Collection[str] = (),
) -> "StageTrainer":
    """Train exactly the parameters of `groups`, which must be what `contract` says, from the newest whole checkpoint on.

    Args:
        dtype: of the frozen weights, and in which the model multiplies.
        idle: names of parameters that stay what they are though the contract's part trains.
    """
    processes, at_once, on_gpu = world_size(), samples_at_once(config), torch.cuda.is_available()
    zero = config.parallel != "ddp"
    # Without ZeRO what trains is kept in fp32 and multiplied in bf16 by autocast; ZeRO's optimizer has a copy in fp32.
    set_trainable(model, set().union(*(names for _, names in groups)), idle, in_fp32=not zero)
    check_contract(model, contract, idle)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    deepspeed = deepspeed_config(config, dtype, model.config.text_config.hidden_size) if zero else None
    arguments = TrainingArguments(
        output_dir=str(config.out / "checkpoints"),
        num_train_epochs=1,  # the dataset is the whole training in order
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=config.batch_size // (processes * at_once),
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=config.warmup_ratio,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=dtype == torch.bfloat16,
        seed=config.seed,
        save_strategy="steps",
        save_steps=config.save_every,
        save_total_limit=2,  # the newest, and the one before in case the newest is cut off while it is written
        logging_steps=1,
        logging_nan_inf_filter=False,
        dataloader_num_workers=config.workers,
        dataloader_pin_memory=on_gpu,
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,  # every batch runs every part that trains, with or without a picture
        use_cpu=not on_gpu and not zero,  # Accelerate takes DeepSpeed for a GPU's, so session() has seen to the CPU
        deepspeed=deepspeed,
        accelerator_config={"use_configured_state": zero and not on_gpu},
        use_cache=True,  # only ends up in the model's config: training passes use_cache=False itself
        report_to="none",
        disable_tqdm=True,
    )
    run: dict[str, Any] = {"stage": stage, "config": settings(config), "inputs": inputs, "parallel": config.parallel}
    if zero:
        run["processes"] = processes  # each has a part of the state
    with arguments.main_process_first(local=False):  # which deletes what is incomplete
        checkpoint = newest_checkpoint(config.out / "checkpoints", run)
    trainer = StageTrainer(groups, run, model=model, args=arguments, train_dataset=dataset, data_collator=collator)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Progress(stage, MetricsLog(config.out / "metrics.jsonl")))
    if trainer.accelerator.num_processes != processes or trainer.is_deepspeed_enabled != zero:
        raise InputError(
            f"{processes} processes were started with parallel={config.parallel}, but they train as "
            f"{trainer.accelerator.num_processes} ({trainer.accelerator.distributed_type.value})"
        )
    if trainer.is_world_process_zero():
        print(trainable_table(model), flush=True)
        if deepspeed is not None:
            write_json(config.out / "deepspeed.json", deepspeed)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return trainer


def checkpoint_activations(model: Any) -> None:
    """Have each block's activations computed anew in the backward pass."""
    # transformers is renaming it. Without re-entrance: inputs that need no gradient, and hooks of DDP and ZeRO, are fine.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    # What was just enabled also makes the embeddings of pictures and words want gradients, for the sake of re-entrance: a
    # frozen tower would then have a backward pass, for nothing.
    llava = model.get_base_model() if hasattr(model, "get_base_model") else model
    llava.disable_input_require_grads()


class StageTrainer(Trainer):
    """transformers' Trainer, but: the loss only where there is a label, a learning rate per group of parameters, samples in
    the dataset's own order, and checkpoints that hold what trains and count only once they are complete.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(self, groups: Groups, run: dict[str, Any], **options: Any):
        self.groups, self.run = groups, run
        self.counts: dict[str, float] = {}  # of the step that is running
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

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """A step's parts on this process and the labels of the whole batch; what the batch consists of is kept for the log."""
        batches, labels = super().get_batch_samples(epoch_iterator, num_batches, device)
        if batches:
            counts = [
                sum(real_tokens(batch) for batch in batches),
                sum(batch["input_ids"].numel() for batch in batches),
            ]
            real, places = self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum").tolist()
            self.counts = {"supervised_tokens": int(labels), "tokens": real, "padding": round(1 - real / places, 4)}
        return batches, labels

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        super().log(logs | self.counts if "loss" in logs else logs, *args, **options)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_deepspeed_enabled:  # its own files hold the weights too
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
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
        self.accelerator.wait_for_everyone()  # each process writes its own random state, and its part of ZeRO's
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            files = sorted(path for path in folder.rglob("*") if path.is_file())
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
            write_json(folder / COMPLETE, {"run": self.run, "sizes": sizes})
        self.accelerator.wait_for_everyone()  # no process trains on, and dies, before the checkpoint counts


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
            counts = {name: logs[name] for name in ("supervised_tokens", "tokens", "padding")}
            self.log.log(step=state.global_step, loss=logs["loss"], lr=logs["learning_rate"], seconds=seconds, **counts)
            self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self.bar.update(state.global_step - self.bar.n)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if state.is_world_process_zero:
            self.bar.close()


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
    trainer: StageTrainer,
    save: Callable[[nn.Module], dict[str, Any]],
) -> None:
    """Write the result and, last, the manifest; the checkpoints have served.

    Args:
        save: writes the trained model below `config.out`, and says what it wrote, for the manifest. Called on one process.
    """
    model = whole_model(trainer)
    if trainer.is_world_process_zero():
        outputs = save(model)
        last = MetricsLog(config.out / "metrics.jsonl").rows()[-1]
        outputs |= {
            "steps": last["step"],
            "samples": len(trainer.train_dataset),
            "seconds": last["seconds"],
            "loss": last["loss"],
            "processes": world_size(),
            "parallel": config.parallel,
            "device_batch_size": samples_at_once(config),
        }
        # Before the manifest, which records all weights in the folder. A kill between the two costs time, not correctness.
        for path in (config.out / "checkpoints", *config.out.glob(f"{LENGTHS}-*")):
            shutil.rmtree(path, ignore_errors=True)
        manifest = write_manifest(config.out, stage, settings(config), inputs, outputs)
        write_card(config.out / (outputs.get("model") or outputs["adapter"]), manifest)
    trainer.accelerator.wait_for_everyone()


def whole_model(trainer: StageTrainer) -> nn.Module:
    """The trained model, on the main process with all its weights; called on every process."""
    model: nn.Module = trainer.model
    if trainer.is_deepspeed_enabled and trainer.deepspeed.zero_optimization_stage() == 3:
        state = trainer.accelerator.get_state_dict(
            trainer.deepspeed
        )  # gathered layer by layer, to the main process alone
        if trainer.is_world_process_zero():
            replace_parameters(model, state)
    return (
        model.cpu() if trainer.is_world_process_zero() else model
    )  # merged in fp32, it may not fit beside the optimizer


def replace_parameters(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Put whole parameters in the place of ZeRO-3's parts; tied ones, one tensor under two names, stay tied."""
    whole = {id(value): nn.Parameter(value, requires_grad=False) for value in state.values()}
    for name, _ in list(model.named_parameters(remove_duplicate=False)):
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, whole[id(state[name])])
