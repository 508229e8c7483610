"""Grids of pretrainings, trained one after another: what the studies of towers have in common.

Points are told apart by what they print as. Several processes may share a grid: each takes a `part` of it, or whatever no other
process has claimed. Under torchrun, all processes of a launch train each point together.
"""

import contextlib
import json
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import clips_core
from clips_core.config import PretrainConfig, load_config, recipe_path
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, claimed, write_bytes
from clips_core.recaption import parse_part
from eval_suites.demo import Clock, with_clock
from eval_suites.page import duration

P = TypeVar("P", bound=Hashable)


def point_config(pretrain: Mapping[str, Any], own: Mapping[str, Any], own_keys: Mapping[str, str]) -> PretrainConfig:
    """The pretraining of one point.

    Args:
        pretrain: keys of `clips-llava pretrain`, nested, and under `recipe` the recipes that they are laid over.
        own: keys that the study sets for this point, laid over all others.
        own_keys: those that may not stand in `pretrain`, and what to say of each.

    Raises:
        InputError: if a key is unknown, wrong, or the study's own.
    """
    core = Path(clips_core.__file__).parent
    recipes, settings = settings_of("pretrain", pretrain, own, own_keys)
    try:
        return load_config(PretrainConfig, [recipe_path(core, name) for name in recipes], settings)
    except InputError as error:
        raise InputError(f"pretrain: {error}") from None


def settings_of(
    stage: str, values: Mapping[str, Any], own: Mapping[str, Any], own_keys: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """A stage's recipes, and what is laid over them as `key=value`.

    Args:
        values, own, own_keys: as of `point_config`, for any stage.

    Raises:
        InputError: if a key is the study's own, or `recipe` names none.
    """
    values = dict(values)
    for key, instead in own_keys.items():
        if key in values:
            raise InputError(f"{stage}.{key}: the study sets it; {instead}")
    recipes = values.pop("recipe", [])
    recipes = [recipes] if isinstance(recipes, str) else recipes
    if not isinstance(recipes, list) or not all(isinstance(name, str) for name in recipes):
        raise InputError(f"{stage}.recipe: must be the name or path of a recipe, or a list of them, not {recipes!r}")
    return recipes, [f"{key}={written(value)}" for layer in (values, own) for key, value in leaves(layer)]


def written(value: Any) -> str:
    """A value as one would type it: a path or spec as it is, all else as JSON."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.:@+-]*/[\w./:@+-]*", value) else json.dumps(value)


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values: `{"data": {"train": "a"}}` → `data.train`, `"a"`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def train_points(
    out: Path,
    runs: Mapping[P, PretrainConfig],
    part: str | None,
    is_done: Callable[[P], bool],
    before: Callable[[], object],
    after_each: Callable[[], object],
    after_all: Callable[[], object],
) -> None:
    """Train every point of this process's part that is not done. An interrupted point goes on from its last checkpoint.

    Args:
        part: i/n: points i, i + n, … only; None: all.
        is_done, before, after_each, after_all: called by the main process alone: of each point; before anything is trained, to see
            that `out` is this study's; after each point that was trained here; and in the end.

    Raises:
        InputError: as `clips_core.train.pretrain`.
    """
    from clips_core.distributed import from_main, is_main, process_group  # torch: only now that the settings are right
    from clips_core.train import pretrain

    first, step = (0, 1) if part is None else parse_part(part)
    with process_group():
        if is_main():
            before()
        finished = from_main({point for point in runs if is_done(point)} if is_main() else None)
        own = [point for point in list(runs)[first::step] if point not in finished]
        if is_main():
            print(f"{out}: {len(runs)} trainings, {len(finished)} finished; {len(own)} to do here", flush=True)
        for number, point in enumerate(own, start=1):
            run = runs[point]
            with contextlib.ExitStack() as stack:
                ours = from_main(stack.enter_context(claimed(run.out)) if is_main() else None)
                if not ours or from_main(is_done(point) if is_main() else None):
                    if is_main():
                        print(f"\n[{number}/{len(own)}] {point}: another process has it", flush=True)
                    continue
                if is_main():
                    _announce(f"[{number}/{len(own)}] {point}", runs, own[number - 1 :])
                    _share_index(run, runs)
                    with_clock(Clock(run.out / "clock.json"), "pretrain", lambda run=run: pretrain(run))  # type: ignore[misc]
                    after_each()
                else:
                    pretrain(run)
        if is_main():
            after_all()


def is_finished(run: PretrainConfig) -> bool:
    return (run.out / MANIFEST).is_file()


def _share_index(run: PretrainConfig, runs: Mapping[P, PretrainConfig]) -> None:
    """Give a point the counts of samples that a finished one has made: large data is counted once, not once a point."""
    alike = [other for other in runs.values() if is_finished(other) and other.data.train == run.data.train]
    made = [other.out / "data_index.jsonl" for other in alike]
    index = next((path for path in made if path.exists()), None)
    if index is not None and not (run.out / index.name).exists():
        write_bytes(run.out / index.name, index.read_bytes())


def _announce(what: str, runs: Mapping[P, PretrainConfig], left: list[P]) -> None:
    """Print what begins, and the time left, from the seconds a picture of the points that are finished."""
    clocks = {run.out / "clock.json": run.samples for run in runs.values() if is_finished(run)}
    seconds = {path: Clock(path).total() for path in clocks if path.exists()}
    rest = ""
    if seconds:
        pace = sum(seconds.values()) / sum(clocks[path] for path in seconds)
        rest = f"   (about {duration(pace * sum(runs[point].samples for point in left))} left)"
    print(f"\n{what}{rest}", flush=True)
