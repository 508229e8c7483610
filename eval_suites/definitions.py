"""lmms-eval's own definitions of its tasks: looked up by name, asked for what a suite leaves out, loaded under names of ours.

A task under a name of ours is lmms-eval's task with other prompt settings (TextVQA with OCR tokens, say): a small definition that
includes the built-in one. No line of a task's code is changed.
"""

import functools
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from clips_core.errors import InputError
from eval_suites.local_data import Table

if TYPE_CHECKING:
    from eval_suites.benchmarks import BenchmarkTask


@functools.cache
def task_manager() -> Any:
    """lmms-eval's index of its tasks: some thousand YAML files, seconds to read."""
    from lmms_eval.tasks import TaskManager

    return TaskManager()


def definition_path(where: str, name: str) -> Path:
    """The YAML file that defines lmms-eval's task `name`.

    Raises:
        InputError: if there is no such task, or it is a group.
    """
    entry = task_manager().task_index.get(name)
    if entry is None:
        raise InputError(f"{where}: {name!r}: lmms-eval has no such task")
    if entry["type"] != "task":
        raise InputError(f"{where}: {name!r}: is a {entry['type']} of tasks: name them one by one")
    return Path(entry["yaml_path"])


def definition(where: str, name: str) -> dict[str, Any]:
    """What the file says, with what it includes; in the place of its functions stand syntax nodes, and nothing is imported."""
    from lmms_eval.utils import load_yaml_config

    return dict(load_yaml_config(str(definition_path(where, name)), mode="simple"))


def split_of(known: Mapping[str, Any]) -> str:
    """The split that a task's questions are in, as lmms-eval chooses it."""
    return str(known.get("test_split") or known.get("validation_split") or "").strip()


def version_of(known: Mapping[str, Any]) -> str:
    """The version that a definition gives itself; `unknown` if it gives none."""
    metadata = known.get("metadata") or {}
    for entry in metadata if isinstance(metadata, list) else [metadata]:
        if isinstance(entry, dict) and "version" in entry:
            return str(entry["version"])
    return "unknown"


def completed(where: str, name: str, task: "BenchmarkTask") -> "BenchmarkTask":
    """The task with all that it leaves out taken from lmms-eval's definition: files, metrics, version, settings to drop.

    Raises:
        InputError: naming what the definition does not say either.
    """
    from loguru import logger

    logger.disable("lmms_eval")  # its index tells of each file that is no task
    try:
        known = definition(where, task.task or name)
    finally:
        logger.enable("lmms_eval")
    if known.get("output_type") != "generate_until":
        raise InputError(
            f"{where}: its answers are {known.get('output_type')!r}; only generated ones can be given here"
        )
    if len(known.get("filter_list") or ()) > 1 or int(known.get("repeats") or 1) > 1:
        raise InputError(
            f"{where}: is scored on several readings of an answer or several answers; that is not supported"
        )
    metrics = task.metrics or [
        str(metric["metric"])
        for metric in known.get("metric_list") or ()
        if isinstance(metric["metric"], str) and "submission" not in metric["metric"]
    ]
    if not metrics:
        raise InputError(f"{where}: lmms-eval's definition names no metric with a value: give `metrics`")
    tables = task.tables or [
        Table(str(known["dataset_path"]), split_of(known), configuration=known.get("dataset_name"))
    ]
    return replace(
        task,
        tables=tables,
        metrics=metrics,
        primary=task.primary or metrics[0],
        version=version_of(known) if task.version == "unknown" else task.version,
        # An empty answer is an error here: so the model has to say something.
        generation={"min_new_tokens": 1, **_not_generation(known), **task.generation},
    )


def _not_generation(known: Mapping[str, Any]) -> dict[str, None]:
    """Settings of a definition that are not of generation in transformers (for models of lmms-eval's own): dropped."""
    from transformers import GenerationConfig

    own = vars(GenerationConfig()).keys() | {"until"}
    return {key: None for key in known.get("generation_kwargs") or {} if key not in own}


def load_tasks(
    where: str, tasks: Mapping[str, "BenchmarkTask"], kind: Literal["chat", "simple"] = "chat"
) -> dict[str, Any]:
    """lmms-eval's task objects, by the suite's names. Loads their files, so call it inside `working_from`.

    Args:
        kind: the class of models that they are for.
    """
    from lmms_eval.tasks import TaskManager, get_task_dict

    built_in = [name for name, task in tasks.items() if task.task is None and not task.prompt]
    loaded = get_task_dict(built_in, task_manager(), kind) if built_in else {}
    own = {name: task for name, task in tasks.items() if name not in built_in}
    if own:
        with tempfile.TemporaryDirectory() as folder:
            for name, task in own.items():
                path = Path(folder) / f"{name}.yaml"
                path.write_text(yaml.safe_dump(_own_definition(where, name, task)), encoding="utf-8")
            manager = TaskManager(include_path=folder, include_defaults=False)
            loaded |= get_task_dict(list(own), manager, kind)
    return {name: loaded[name] for name in tasks}


def _own_definition(where: str, name: str, task: "BenchmarkTask") -> dict[str, Any]:
    if name in task_manager().task_index:
        raise InputError(
            f"{where}: {name!r} is lmms-eval's own: with another prompt, give it a name of yours and `task: {name}`"
        )
    kind = task.task or name
    path, settings = definition_path(where, kind), definition(where, kind).get("lmms_eval_specific_kwargs") or {}
    default = settings.get("default", {})
    if unknown := task.prompt.keys() - default.keys():
        known = ", ".join(default) or "none"
        raise InputError(f"{where}: {kind} has no prompt setting {min(unknown)!r} (it has: {known})")
    return {
        "include": str(path),
        "task": name,
        "lmms_eval_specific_kwargs": {"default": {**default, **task.prompt}},
    }


def forget_earlier_sums(task: Any) -> None:
    """Set the counts to zero that OCRBench's aggregation keeps in its module, adding up over all runs of a process."""
    aggregation: Mapping[str, Callable[..., Any]] = task.aggregation()
    for function in aggregation.values():
        counts = getattr(function, "__globals__", {}).get("OCRBench_score")
        if counts is not None:
            counts.update(dict.fromkeys(counts, 0))
