"""What answering a suite will cost, by arithmetic alone: hours, memory, disk. Imports no torch.

A question is one pass over its picture and prompt, which a GPU computes at some share of its peak, and then one pass per token of
the answer, which takes as long as reading the weights, and launching the kernels, does.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from rich import box
from rich.console import Console
from rich.table import Table

from clips_core.config import FORBID, load_config, load_settings, to_dict
from clips_core.errors import InputError
from clips_core.folders import write_json
from clips_core.plan import FP32, GIB, GPUS, PlanConfig, plan, si, split_settings, to_the_right
from eval_suites.benchmarks import EvalConfig, load_suite
from llava_bridge.architectures import Llm, VisionTower, read_llm, read_tower
from llava_bridge.plan import LlavaPlanConfig, TunePlanConfig, plan_align, plan_tune

RECORD_BYTES = 1500  # of a question: its answer as it was made, and its record


class Questions(NamedTuple):
    """Of one of lmms-eval's tasks: the split's published size, and what it takes for lengths."""

    asked: int
    prompt: int  # tokens, template included
    answer: int  # tokens of a batch's longest answer
    pictures: float = 1.0  # of a question
    stored: int | None = None  # pictures in the files, where that is not one for each question


TASKS = {
    "pope": Questions(9_000, 60, 3),
    "mme": Questions(2_374, 70, 3),
    "gqa": Questions(12_578, 65, 4, stored=398),
    "textvqa_val": Questions(5_000, 65, 12),
    "chartqa": Questions(2_500, 70, 12),
    "mmmu_val": Questions(900, 180, 16, pictures=1.1),
    "mmvet": Questions(218, 65, 400),
    "nocaps_val": Questions(4_500, 55, 60),
    "ocrbench": Questions(1_000, 65, 64),
    "seedbench": Questions(17_990, 110, 3, pictures=2.5),  # the 3,757 videos have eight pictures each
    "scienceqa_img": Questions(2_017, 130, 3),
    "mmbench_en_dev": Questions(4_329, 110, 3),
    "docvqa_val": Questions(5_349, 65, 24, stored=1_286),
    "vqav2_val": Questions(214_354, 60, 4, stored=40_504),
    "ai2d": Questions(3_088, 100, 3),
}


@config_dataclass(config=FORBID, kw_only=True)
class EvalPlanConfig:
    """The machine and the assumptions. Suite, kinds of pictures, batch and precision are `EvalConfig`'s."""

    llm: str | None = None  # a name such as vicuna-7b, or a folder with a config.json; null: what is in `model`
    tower: str | None = None  # a name such as clip-l14-336, or a folder; null: what is in `model`
    image_size: int | None = Field(default=None, ge=1)
    gpu: Literal["a100", "h100", "h200", "l40s", "rtx4090", "cpu"] = "h100"
    gpus: int = Field(default=1, ge=1)  # that share the questions
    mfu: float = Field(default=0.35, gt=0, le=1)  # share of the peak while prompts are read
    bandwidth: float = Field(default=0.6, gt=0, le=1)  # share of the memory's while tokens are made
    launch: float = Field(
        default=8e-4, ge=0
    )  # seconds a block of the LLM and token, for transformers' loop to launch it
    picture_seconds: float = Field(default=0.02, ge=0)  # of a CPU core that decodes and resizes one
    usable_memory: float = Field(default=0.90, gt=0, le=1)
    cores: int = Field(default=2, ge=1)  # of a CPU
    core_flops: float = Field(default=100e9, gt=0)  # that a CPU core reaches
    core_bandwidth: float = Field(default=6e9, gt=0)  # bytes a second that it reads weights with
    cpu_memory: float = Field(default=16, gt=0)  # GiB
    bytes_per_picture: float = Field(default=150e3, gt=0)  # in the benchmark's files
    questions: dict[str, int] = Field(default_factory=dict)  # of tasks whose number is not known here, or is another
    tiles: float = Field(default=1, ge=1)  # pictures that the tower sees of one: LLaVA-NeXT's anyres has up to 5
    out: Path | None = None  # a JSON file with all of it


def choose_plan(settings: Sequence[str]) -> tuple[type, Callable[[Sequence[str]], dict[str, Any]], list[str]]:
    """What `clips-llava plan [pretrain | align | tune | eval] …` is to plan.

    Returns:
        the plan's own config class, the function that plans, and the settings that are left for it.
    """
    import clips_core
    import eval_suites
    import llava_bridge

    plans: dict[str, tuple[type, Callable[..., dict[str, Any]], ModuleType]] = {
        "pretrain": (PlanConfig, plan, clips_core),
        "align": (LlavaPlanConfig, plan_align, llava_bridge),
        "tune": (TunePlanConfig, plan_tune, llava_bridge),
        "eval": (EvalPlanConfig, plan_eval, eval_suites),
    }
    named = bool(settings) and settings[0] in plans
    config, function, package = plans[settings[0] if named else "pretrain"]
    assert package.__file__ is not None
    return config, partial(function, Path(package.__file__).parent), list(settings[named:])


def plan_eval(package_folder: Path, settings: Sequence[str]) -> dict[str, Any]:
    """Plan an evaluation: print it, write it where `out` says, return it.

    Args:
        package_folder: where the recipes' names are looked up.
        settings: recipes, then overrides: of `EvalPlanConfig` where it has such a key, else of `EvalConfig`.

    Raises:
        InputError: for an unknown key, model, tower, suite or number of questions.
    """
    of_plan, of_run = split_settings(EvalPlanConfig, settings)
    machine = load_config(EvalPlanConfig, None, of_plan)
    named = {setting.partition("=")[0] for setting in of_run}
    needed = ("data", "out") if machine.llm is None or machine.tower is None else ("model", "data", "out")
    unnamed = [f"{key}=unnamed" for key in needed if key not in named]
    config = load_settings(EvalConfig, package_folder, [*of_run, *unnamed])
    llm = read_llm(machine.llm or str(config.model))
    tower = read_tower(machine.tower or str(config.model), machine.image_size)
    result = estimate(llm, tower, config, machine)
    print_plan(result)
    if machine.out is not None:
        write_json(machine.out, result)
    return result


def questions_of(task: str, machine: EvalPlanConfig, limit: int | None) -> Questions:
    """What is known of a task, by its name or by the longest name that it begins with.

    Raises:
        InputError: if nothing is, and the plan's `questions` does not say.
    """
    name = max((known for known in TASKS if task == known or task.startswith(f"{known}_")), key=len, default=None)
    count = machine.questions.get(task)
    if name is None and count is None:
        raise InputError(f"task {task!r}: how many questions it has is not known here; say questions.{task}=1000, say")
    known = TASKS[name] if name is not None else Questions(0, 80, 16)
    count = min(count or known.asked, limit or 10**9)
    return known._replace(asked=count, stored=None if known.stored is None else min(known.stored, count))


def estimate(llm: Llm, tower: VisionTower, config: EvalConfig, machine: EvalPlanConfig) -> dict[str, Any]:
    """Everything about an evaluation, as JSON-able values: seconds, bytes."""
    kinds = len(dict.fromkeys(config.pictures))
    tasks = {name: questions_of(name, machine, config.limit) for name in load_suite(config.suite).tasks}
    compute = _compute_bytes(config, machine)
    parts = {
        name: seconds_of_task(task, llm, tower, config.batch_size, compute, machine) for name, task in tasks.items()
    }
    seconds = kinds * sum(sum(value.values()) for value in parts.values())
    longest = max(
        task.pictures * tower.image_tokens * machine.tiles + task.prompt + task.answer for task in tasks.values()
    )
    parameters = llm.parameters + tower.parameters + (tower.width + llm.width + 2) * llm.width
    memory = {
        "weights": float(compute * parameters),
        "keys and values": config.batch_size * longest * 2 * llm.keys * llm.layers * compute,
        # A block at work: the residual stream in fp32, q, k, v and the MLP's middle; the logits of a batch's last tokens.
        "activations": config.batch_size * longest * (3 * FP32 * llm.width + compute * (3 * llm.queries + 3 * llm.mlp))
        + FP32 * config.batch_size * llm.vocab,
    }
    usable = machine.usable_memory * (
        machine.cpu_memory * GIB / machine.gpus if machine.gpu == "cpu" else GPUS[machine.gpu].mib * 2**20
    )
    total = sum(memory.values())
    questions = sum(task.asked for task in tasks.values())
    stored = sum(task.stored or task.asked * task.pictures for task in tasks.values())
    return {
        "config": to_dict(config),
        "machine": to_dict(machine),
        "model": {"llm": asdict(llm), "tower": asdict(tower), "parameters": parameters},
        "tasks": {
            name: {
                "questions": task.asked,
                "hours": {part: kinds * value / 3600 for part, value in parts[name].items()},
            }
            for name, task in tasks.items()
        },
        "questions": kinds * questions,
        "hours": seconds / 3600,
        "gpu_hours": machine.gpus * seconds / 3600,
        "memory": {**memory, "total": total, "usable": usable, "fits": total <= usable},
        "disk": {
            "data": stored * machine.bytes_per_picture,
            "results": kinds * questions * RECORD_BYTES,
            "model": compute * parameters,
        },
    }


def seconds_of_task(
    task: Questions, llm: Llm, tower: VisionTower, batch_size: int, compute: int, machine: EvalPlanConfig
) -> dict[str, float]:
    """Seconds for all questions under one kind of pictures: their pictures, their prompts, their answers."""
    if machine.gpu == "cpu":
        peak, bandwidth, launch = machine.cores * machine.core_flops, machine.cores * machine.core_bandwidth, 0.0
    else:
        gpu = GPUS[machine.gpu]
        peak, bandwidth, launch = machine.mfu * gpu.peak, machine.bandwidth * gpu.bandwidth, machine.launch
    pictures = task.pictures * machine.tiles
    prompt = pictures * tower.image_tokens + task.prompt
    reading = task.asked * prompt_flops(llm, tower, pictures, prompt) / peak
    # A step makes a token for each question of a batch: all weights are read, and each question's keys and values.
    length = prompt + task.answer / 2
    read = compute * (llm.layers * (llm.linear + 2 * batch_size * length * llm.keys) + llm.embedding)
    worked = batch_size * 2 * (llm.layers * (llm.linear + 2 * length * llm.queries) + llm.embedding)
    step = max(read / bandwidth, worked / peak) + launch * llm.layers
    steps = -(-task.asked // batch_size) * task.answer
    decoded = task.asked * task.pictures * machine.picture_seconds
    return {name: value / machine.gpus for name, value in
            {"pictures": decoded, "prompts": reading, "answers": steps * step}.items()}  # fmt: skip


def prompt_flops(llm: Llm, tower: VisionTower, pictures: float, prompt: float) -> float:
    """Forward FLOPs of one question's pictures and prompt; the head at its last token alone."""
    seen = tower.layers * 2 * (tower.tokens * tower.linear + 2 * tower.tokens**2 * tower.width)
    seen += 2 * tower.patches * 3 * tower.patch_size**2 * tower.width
    seen += 2 * tower.image_tokens * (tower.width + llm.width) * llm.width  # projector
    read = llm.layers * 2 * (prompt * llm.linear + 2 * prompt**2 * llm.queries) + 2 * llm.embedding
    return pictures * seen + read


def _compute_bytes(config: EvalConfig, machine: EvalPlanConfig) -> int:
    if config.precision == "auto":
        return FP32 if machine.gpu == "cpu" else 2
    return FP32 if config.precision == "float32" else 2


def print_plan(result: dict[str, Any]) -> None:
    """The plan as tables on the terminal."""
    config, machine, memory, disk = (result[key] for key in ("config", "machine", "memory", "disk"))
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    kinds = ", ".join(config["pictures"])
    console.print(
        f"[bold]eval of suite {config['suite']}[/bold] ({kinds} pictures), batches of {config['batch_size']}, "
        f"{si(result['model']['parameters'])} parameters, on {machine['gpus']} × {machine['gpu']}"
    )
    table = Table("task", "questions", "pictures", "prompts", "answers", "hours", box=box.SIMPLE_HEAD)
    for name, task in result["tasks"].items():
        hours = task["hours"]
        table.add_row(
            name, f"{task['questions']:,}", *(f"{value:.2f}" for value in hours.values()), f"{sum(hours.values()):.2f}"
        )
    table.add_row("all", f"{result['questions']:,}", "", "", "", f"{result['hours']:.2f}", style="bold")
    console.print(to_the_right(table))
    held = ", ".join(f"{part} {size / GIB:.1f}" for part, size in memory.items() if part not in ("usable", "fits"))
    facts = {
        "time": f"{result['hours']:.2f} hours ({result['gpu_hours']:.1f} GPU hours), {kinds} pictures each",
        "memory": f"GiB: {held}, of {memory['usable'] / GIB:.0f} usable"
        + ("" if memory["fits"] else ": [bold red]does not fit, lower batch_size[/bold red]"),
        "disk": f"{si(disk['data'])}B of benchmark files, {si(disk['model'])}B of model, {si(disk['results'])}B of results",
    }
    for name, fact in facts.items():
        console.print(f"{name:<12}{fact}", soft_wrap=True)
