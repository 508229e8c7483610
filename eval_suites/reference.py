"""`clips-llava study reference`: does LLaVA-1.5 come out here as it was published?

The released model is evaluated, and one is trained from its tower and language model by the same recipe; each figure stands beside
the published one and the range that is accepted. That is the anchor of all that is measured here: a harness or a training that
misses it measures something else than the field does.

Every step is a command of its own (`dry_run` prints them), goes on where it was interrupted, and is passed over once it is
finished. All of it runs on one machine, so on a cluster it is one job: `sbatch … --wrap "clips-llava study reference …"`.

    OUT/released/{model,eval/real}    OUT/retrained/seed0/{align,tune,eval/real}    OUT/reference.json, reference.md
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass
from rich.console import Console

from clips_core.config import FORBID, to_dict
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, claimed, first_difference, read_json, read_manifest, write_bytes, write_json
from eval_suites import anchor
from eval_suites.anchor import Anchor, AnchorRow, Measured, anchor_table
from eval_suites.benchmarks import EvalConfig, Suite, find_model, load_suite, suite_of
from eval_suites.grid import written
from eval_suites.steps import Command, run_step
from eval_suites.study_towers import SETTINGS, TowerStudyConfig, Training
from eval_suites.study_towers import commands as training_commands

RETRAINED = "retrained"
ERRORS = {"released": 1, "retrained": 2}  # standard errors beyond what has been seen


@dataclass(config=FORBID)
class Seen:
    """What somebody else measured."""

    value: float
    source: str


@dataclass(config=FORBID)
class PublishedValue:
    """A benchmark's published value, and what is accepted around it."""

    published: float
    source: str
    error: Annotated[float, Field(gt=0)]  # standard error at the benchmark's number of questions
    why: str = ""  # what else there is to say of the range
    released: list[Seen] = dataclasses.field(default_factory=list)  # measured by others of the released model,
    retrained: list[Seen] = dataclasses.field(default_factory=list)  # and of trainings by the recipe


@dataclass(config=FORBID)
class Released:
    """The released model, asked as it was published. Its conversion may ask otherwise: null leaves it so."""

    model: Path | str  # a folder, or ORG/NAME[@REVISION] on the hub
    image_mode: Literal["pad"] | None = None  # pad: pictures are made square by a border of the mean colour
    template: str | None = None  # chat template: name of a shipped one, or a path ending in .jinja


@dataclass(config=FORBID)
class ReferenceConfig:
    """What is evaluated, trained, and expected."""

    out: Path  # the study's folder
    released: Released
    tower: str  # of the model that is trained: a tower spec
    # Keys of `clips-llava align`, `tune` and `eval run`; `recipe` names the recipes that they are laid over.
    align: dict[str, Any]
    tune: dict[str, Any]
    evaluate: dict[str, Any]
    columns: dict[str, PublishedValue]  # by the suite's names for its columns
    seed: int = 0
    gpus: int = 1  # of this machine
    dry_run: bool = False  # print the commands and stop


def accepted(value: PublishedValue) -> dict[str, tuple[float, float]]:
    """The ranges for the released model and for a retrained one.

    The span of the published value and what others measured, and beyond it on both sides one standard error for the released model
    (other kernels and number types change some answers), two for a retrained one, for which the released model's values count too.
    """
    seen = {"released": [value.published, *(each.value for each in value.released)]}
    seen["retrained"] = [*seen["released"], *(each.value for each in value.retrained)]
    return {
        model: (min(values) - ERRORS[model] * value.error, max(values) + ERRORS[model] * value.error)
        for model, values in seen.items()
    }


def study_reference(config: ReferenceConfig) -> Path:
    """Do every step that is not finished; after each evaluation, write the table.

    Returns:
        `config.out`.

    Raises:
        InputError: before the first step, if settings are wrong or `out` holds a study with others; later, if a step fails.
        Stopped: if a step was stopped by SIGTERM, its state saved.
    """
    steps = commands(config)
    suite = _suite(config)
    if config.dry_run:
        if _changes(config.released):
            print(f"# {_released_model(config)}: {config.released.model}, {_changes(config.released)}")
        print("\n".join(map(str, steps)))
        return config.out
    with claimed(config.out) as ours:
        if not ours:
            raise InputError(f"{config.out}: another process is at it")
        _agree_on_settings(config)
        if not steps[0].finished.exists() and _changes(config.released):
            ask_as_published(config.released, config.out / "released" / "model")
        for number, step in enumerate(steps, start=1):
            if not step.finished.exists():
                print(f"\n[{number}/{len(steps)}]\n$ {step}", flush=True)
                run_step(step)
            if step.finished.parent.parent.name == "eval":
                found = _measure(config, suite)
        write_table(config.out, found)
    return config.out


# --- what is to be done ---------------------------------------------------------------------------------------------


def commands(config: ReferenceConfig) -> list[Command]:
    """The released model's evaluation, stage 1, stage 2, and the evaluation of what these made.

    Raises:
        InputError: if a key is unknown, wrong, or the study's own.
    """
    study = TowerStudyConfig(
        config.out,
        {RETRAINED: config.tower},
        config.align,
        config.tune,
        config.evaluate,
        seeds=[config.seed],
        gpus=config.gpus,
    )
    trained = training_commands(study, Training(RETRAINED, config.seed))
    last, folder = trained[-1], config.out / "released" / "eval"
    own = {"model": _released_model(config), "out": str(folder)}
    words = [f"{key}={written(own[key])}" if (key := word.partition("=")[0]) in own else word for word in last.words]
    return [Command(words, folder / last.finished.parent.name / MANIFEST), *trained]


def _released_model(config: ReferenceConfig) -> str:
    """What is evaluated: the model itself, or the folder where it is asked as published."""
    return str(config.out / "released" / "model") if _changes(config.released) else str(config.released.model)


def _changes(released: Released) -> str:
    """What is changed in how the released model is asked, in words."""
    pad = "with pictures padded to a square" if released.image_mode else ""
    template = f"with the chat template {released.template}" if released.template else ""
    return " and ".join(filter(None, [pad, template]))


def _suite(config: ReferenceConfig) -> Suite:
    """The suite, which must have the columns that something is expected of."""
    suite = load_suite(str(config.evaluate.get("suite", EvalConfig.suite)))
    if "real" not in config.evaluate.get("pictures", ["real"]):
        raise InputError("evaluate.pictures: published values are of the questions' own pictures; add real")
    for column in config.columns:
        if column not in suite.columns:
            raise InputError(
                f"columns.{column}: the suite {suite.name} has no such column (it has: {', '.join(suite.columns)})"
            )
    return suite


def _agree_on_settings(config: ReferenceConfig) -> None:
    """Write down what is evaluated and trained, or compare it with that of an earlier run."""
    settings = {name: to_dict(config)[name] for name in ("released", "tower", "align", "tune", "evaluate", "seed")}
    path = config.out / SETTINGS
    if not path.exists():
        write_json(path, settings)
    difference = first_difference(read_json(path), settings)
    if difference is not None:
        raise InputError(
            f"{config.out} holds a study with other settings ({difference}); choose another out or delete it"
        )


def ask_as_published(released: Released, folder: Path) -> None:
    """The released model in `folder`: its files linked, and a processor of ours that asks it as it was published.

    Raises:
        InputError: if there is no such model, or no such template.
    """
    from transformers import AutoProcessor, LlavaImageProcessorPil

    from llava_bridge.mllm import chat_template
    from llava_bridge.templates import read_template

    source = find_model(EvalConfig(model=released.model, data=Path(), out=Path())).folder
    if source is None or not (source / "config.json").is_file():
        raise InputError(f"released.model {released.model}: no config.json there; a stock transformers LLaVA is needed")
    processor = AutoProcessor.from_pretrained(source, local_files_only=True)
    if released.image_mode == "pad":
        processor.image_processor = LlavaImageProcessorPil.from_pretrained(source, do_pad=True, local_files_only=True)
    if released.template is not None:
        processor.chat_template = chat_template(read_template(released.template), None)
        processor.tokenizer.chat_template = processor.chat_template
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    for file in (*source.glob("*.safetensors*"), source / "config.json", source / "generation_config.json"):
        target = folder / file.name
        target.unlink(missing_ok=True)
        target.symlink_to(file.resolve())


# --- what came of it ------------------------------------------------------------------------------------------------


def _measure(config: ReferenceConfig, suite: Suite) -> Anchor:
    """The table, of what is finished; written down."""
    folders = {
        "released": config.out / "released" / "eval" / "real",
        "retrained": config.out / RETRAINED / f"seed{config.seed}" / "eval" / "real",
    }
    manifests = {model: read_manifest(path, "eval") for model, path in folders.items() if (path / MANIFEST).is_file()}
    rows = []
    for name, value in config.columns.items():
        column, ranges = suite.columns[name], accepted(value)
        measured: dict[str, Measured | None] = dict.fromkeys(folders)
        for model, manifest in manifests.items():
            asked, figures = suite_of(manifest, folders[model]), manifest["outputs"]["results"].get(column.task)
            if figures is None:
                continue  # waits for its judge
            questions = asked.tasks[column.task].tables[0].rows
            measured[model] = Measured.of(
                figures[column.metric] * column.scale, int(figures["n"]), questions, ranges[model]
            )
        rows.append(
            AnchorRow(
                name, column.task, column.metric, value.published, value.source, range_words(value), ranges, **measured
            )
        )
    asked_so = next(iter(manifests.values()))["config"]
    found = Anchor(
        str(config.released.model),
        config.tower,
        rows,
        {key: asked_so.get(key) for key in (*anchor.HOW, "batch_size", "device")},
    )
    write_json(config.out / anchor.RECORD, asdict(found))
    write_bytes(config.out / "reference.md", as_markdown(found).encode())
    return found


def range_words(value: PublishedValue) -> str:
    """How the ranges came about."""
    seen = [f"{each.value:g} ({each.source})" for each in value.released]
    trained = [f"{each.value:g} ({each.source})" for each in value.retrained]
    told = f"standard error {value.error:g}"
    told += f"; the released model elsewhere: {', '.join(seen)}" if seen else ""
    told += f"; trained elsewhere: {', '.join(trained)}" if trained else ""
    return f"{told}. {value.why}".strip()


def write_table(out: Path, found: Anchor) -> None:
    """In the terminal; the files are written."""
    console = Console()
    console.print(anchor_table(found))
    for sentence in anchor.sentences(found):
        console.print(f"• {sentence}", highlight=False, markup=False)
    print(out / "reference.md")


def as_markdown(found: Anchor) -> str:
    """The table, and where its numbers come from."""
    lines = [f"# {found.model}, as published and as it comes out here", ""]
    lines += _table(anchor.HEAD, [anchor.cells(row) for row in found.rows])
    lines += ["", *(f"- {sentence}" for sentence in anchor.sentences(found)), ""]
    lines += ["Accepted: the span of the published value and of what others measured, and beyond it on both sides",
              "one standard error for the released model and two for a retrained one.", ""]  # fmt: skip
    lines += _table(
        ["benchmark", "figure", "published by", "range"],
        [[row.column, f"`{row.metric}` of `{row.task}`", row.source, row.why] for row in found.rows],
    )
    evaluation = ", ".join(f"{key} {value}" for key, value in found.evaluation.items())
    return "\n".join([*lines, "", f"Evaluated with {evaluation}.", ""])


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
