"""What two trainings to be compared have in common, and in what they differ: by the nature of their towers, or otherwise.

A comparison of towers is one of towers only if all else is alike. What differs otherwise is refused unless it is waived by
name, and then it is printed.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from clips_core.errors import InputError
from clips_core.folders import read_json
from eval_suites.records import Run

Kind = Literal["identical", "nature", "otherwise"]

# Of a stage's settings: what is the study's bookkeeping. The folders' contents are compared by their hashes.
PLACES = ("out", "align", "tower", "data.json", "data.images")
SEEDS = ("align.seed", "tune.seed")  # trainings of one tower differ in them, and those of two are paired
PACKAGES = ("clips-llava", "torch", "transformers", "tokenizers", "peft", "accelerate", "pillow", "lmms-eval")
VISION = ("model_type", "image_size", "patch_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Setting:
    """One setting, and its value for each tower; None where it is unknown."""

    key: str
    values: dict[str, Any]
    kind: Kind
    waived: bool = False


def settings_table(runs: Sequence[Run], waived: Sequence[str] = ()) -> list[Setting]:
    """Every setting of the trainings, those that differ first.

    Args:
        runs: of two or more towers, all seeds.
        waived: keys, or beginnings of keys up to a dot, that may differ: `align.learning_rate`, `environment`.

    Raises:
        InputError: if anything else than the towers' nature differs and is not waived, naming all of it.
    """
    found = {(run.name, run.seed): settings_of(run) for run in sorted(runs, key=lambda run: run.seed)}
    table = []
    for key in dict.fromkeys(key for own in found.values() for key in own):
        by_tower: dict[str, list[Any]] = {}
        for (name, _), own in found.items():
            by_tower.setdefault(name, []).append(own.get(key))
        first = next(iter(by_tower.values()))
        if key in SEEDS:
            differs = any(
                mine != theirs for values in by_tower.values() for mine, theirs in zip(values, first, strict=False)
            )
        else:
            differs = any(value != first[0] for values in by_tower.values() for value in values)
        kind: Kind = "identical" if not differs else "nature" if is_nature(key) else "otherwise"
        shown = {
            name: values[0] if all(value == values[0] for value in values) else values
            for name, values in by_tower.items()
        }
        table.append(Setting(key, shown, kind, kind == "otherwise" and _is_waived(key, waived)))
    refused = [setting for setting in table if setting.kind == "otherwise" and not setting.waived]
    if refused:
        differences = "; ".join(
            f"{setting.key}: {', '.join(f'{name} {value!r}' for name, value in setting.values.items())}"
            for setting in refused
        )
        raise InputError(
            f"not only the towers differ ({differences}). Train or evaluate them alike, or waive it by name "
            f"(--waive {' '.join(setting.key for setting in refused)}): it is then printed in the report"
        )
    return sorted(table, key=lambda setting: ("nature", "otherwise", "identical").index(setting.kind))


def is_nature(key: str) -> bool:
    """Whether a setting belongs to the tower: what it is, how it was pretrained, what it costs in a LLaVA."""
    return key.startswith(("tower.", "pretraining.")) or key == "align.image_size"


def _is_waived(key: str, waived: Sequence[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in waived)


def settings_of(run: Run) -> dict[str, Any]:
    """All that is known of how a training came about, by dotted keys; what it has no record of is left out."""
    return dict(_settings(run))


def _settings(run: Run) -> Iterator[tuple[str, Any]]:
    manifests = run.manifests
    if "align" in manifests:
        yield "tower.spec", manifests["align"]["config"].get("tower")
        yield "tower.hash", manifests["align"]["inputs"].get("tower")
    if run.llava is not None:
        yield from _tower_in_llava(read_json(run.llava / "config.json"))
        processor = run.llava / "processor_config.json"
        if processor.is_file():
            pixels = read_json(processor).get("image_processor", {})
            yield from (
                (f"tower.pixels.{key}", pixels.get(key))
                for key in ("size", "crop_size", "do_center_crop", "resample", "image_mean", "image_std", "do_pad")
            )
    if "tower" in manifests:
        outputs = manifests["tower"]["outputs"]
        yield from (
            (f"pretraining.{key}", outputs.get(key))
            for key in ("method", "samples", "flops_per_sample", "parameters", "captioners")
        )
        yield "pretraining.data", manifests["tower"]["inputs"].get("data")
    for stage in ("align", "tune"):
        if stage in manifests:
            config = dict(_flat(manifests[stage]["config"]))
            yield from ((f"{stage}.{key}", value) for key, value in config.items() if key not in PLACES)
            yield f"{stage}.data", manifests[stage]["inputs"].get("data")
            yield f"{stage}.dtype", manifests[stage]["outputs"].get("dtype")
    if "align" in manifests:
        yield "llm.hash", manifests["align"]["inputs"].get("llm")
    evaluation = {key: value for key, value in manifests["real"]["config"].items() if key != "suite"}
    yield "evaluation.suite", run.suite.name
    for name, task in manifests["real"]["config"].get("suite", {}).get("tasks", {}).items():
        yield from ((f"evaluation.{name}.{key}", value) for key, value in _flat(task.get("generation") or {}))
    yield from ((f"evaluation.{key}", value) for key, value in _flat(evaluation))
    yield "evaluation.data", manifests["real"]["inputs"].get("data")
    for stage in ("align", "tune", "real"):
        recorded = manifests.get(stage, {}).get("environment")
        if recorded is not None:
            name = "evaluation" if stage == "real" else stage
            yield f"environment.{name}.device", recorded.get("device")
            yield f"environment.{name}.commit", recorded.get("commit")
            packages = recorded.get("packages", {})
            yield from (
                (f"environment.{name}.{package}", packages[package]) for package in PACKAGES if package in packages
            )


def _tower_in_llava(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    vision = config.get("vision_config", {})
    yield from ((f"tower.{key}", vision.get(key)) for key in VISION)
    yield "tower.image_tokens", config.get("image_seq_length")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
