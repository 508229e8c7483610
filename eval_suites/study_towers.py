"""`clips-llava study towers`: which tower makes the better LLaVA?

For every tower and seed: stage 1, stage 2, benchmarks; then the comparison. Everything but the tower is held the same, by
construction: all trainings of a seed take their settings from the same keys, see the same data in the same order and start from the
same projector where the towers' widths agree. With one tower it is the swap.

A spec with {seed} in it is another pretraining for each seed: then the study speaks of ways of pretraining, and not of two towers.

Every step is a command of its own that a reader could have typed (`dry_run` prints them all), goes on where it was
interrupted, and is passed over once it is finished. They run one after another, or as SLURM jobs, one for each tower and seed.

    OUT/NAME/seed0/{align,tune,eval/real,…}    OUT/NAME/tower, or seed0/tower -> the pretraining run, where the tower has one
    OUT/report.html, report.json               after every seed that all towers have
"""

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic.dataclasses import dataclass

import eval_suites
import llava_bridge
from clips_core.config import FORBID, load_config, recipe_path, to_dict
from clips_core.errors import InputError
from clips_core.folders import MANIFEST, claimed, first_difference, read_json, write_bytes, write_json
from eval_suites.benchmarks import EvalConfig
from eval_suites.grid import settings_of
from eval_suites.kept import keep, restore
from eval_suites.records import entries_of
from eval_suites.steps import OWN_KEYS, Command, launcher, run_step
from eval_suites.sweep import SweepConfig, best_rate, trials
from llava_bridge.config import AlignConfig, TuneConfig

SETTINGS = "settings.json"  # of a study's folder: what its trainings have in common
SEED = "{seed}"  # in a tower's spec: the training's seed


@dataclass(config=FORBID)
class TowerStudyConfig:
    """Towers, and the one recipe that they are all put through."""

    out: Path  # the study's folder
    towers: dict[str, str]  # by name: the tower spec, such as clips:runs/clips, or clips:runs/clips_seed{seed}
    # Keys of `clips-llava align`, `tune` and `eval run`; `recipe` names the recipes that they are laid over.
    align: dict[str, Any]
    tune: dict[str, Any]
    evaluate: dict[str, Any]
    seeds: list[int] = dataclasses.field(
        default_factory=lambda: [0]
    )  # trainings of each tower; from 3 on about recipes
    # By tower: keys of `clips-llava align` that are the tower's own nature, such as {siglip: {image_size: 384}}.
    own: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    sweep: SweepConfig | None = None  # of stage 1's learning rate; null: every tower is trained at align.learning_rate
    # Folder of JSON files, one a finished training without its weights; those that are there are not run again. null: none.
    results: Path | None = None
    reference: Path | None = None  # folder of a `study reference`: the anchor, shown on the page
    waive: list[str] = dataclasses.field(
        default_factory=list
    )  # settings that may differ after all, as of `clips-llava compare`
    gpus: int = 1  # of this machine, that both stages and the benchmarks run on
    # Options of sbatch, such as '--partition=gpu --gpus=8 --time=24:00:00': each tower and seed becomes a job. null: here and now.
    sbatch: str | None = None
    dry_run: bool = False  # print the commands and stop

    def __post_init__(self) -> None:
        if not self.towers or not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("towers and seeds must name at least one, and each seed once")
        for name in self.towers:
            if not name or not all(sign.isalnum() or sign in "-_." for sign in name) or name.startswith("."):
                raise ValueError(f"towers: {name!r} becomes a folder: letters, digits, - _ . only")
        if self.sweep is not None and self.sbatch is not None:
            raise ValueError(
                "sweep and sbatch do not go together: run the sweep first, in another out, then submit with the rates that it "
                "printed: own.NAME.learning_rate=… for each tower, and waive=[align.learning_rate]"
            )
        for name in self.own:
            if name not in self.towers:
                raise ValueError(f"own: no tower is called {name!r}; the towers are {', '.join(self.towers)}")


def overrides(
    towers: Sequence[str] | None, llm: str | None, seeds: int | None, image_mode: str | None, dry_run: bool
) -> list[str]:
    """The command line's options as `key=value`. A tower without a name is called by the last word of its spec.

    Args:
        towers: all words behind `--towers`; a key of the study among them, such as `evaluate.data=benchmarks`, is a setting.

    Raises:
        InputError: if two towers would have one name.
    """
    named: dict[str, str] = {}
    settings = []
    keys = {field.name for field in dataclasses.fields(TowerStudyConfig)}
    for given in towers or ():
        name, separator, spec = given.partition("=")
        if separator and name.partition(".")[0] in keys:
            settings.append(given)
            continue
        if not separator:
            name, spec = re.sub(r"[^\w.-]+", "-", re.split(r"[/:]", given.rstrip("/"))[-1]).strip("-."), given
        if name in named:
            raise InputError(f"--towers: {named[name]} and {spec} would both be called {name!r}; write NAME=SPEC")
        named[name] = spec
    said = {
        "towers": named or None,
        "align.llm": llm,
        "seeds": seeds and list(range(seeds)),
        "align.image_mode": image_mode,
    }
    options = [
        f"{key}={json.dumps(value)}"
        for key, value in (said | {"dry_run": dry_run or None}).items()
        if value is not None
    ]
    return options + settings


class Training(NamedTuple):
    """One LLaVA of the study."""

    tower: str
    seed: int


def study_towers(config: TowerStudyConfig) -> Path:
    """Do every step that is not finished, and compare the towers. Several processes may share `out`.

    Returns:
        `config.out`.

    Raises:
        InputError: before the first training, if settings are wrong, or `out` holds a study with others; later, if a step fails,
            naming its command.
        Stopped: if a step was stopped by SIGTERM, its state saved.
    """
    steps = {training: commands(config, training) for training in trainings(config)}
    if config.dry_run:
        for tower in config.towers if config.sweep else ():
            print("\n".join(str(step) for trial in trials(*swept(config, tower)).values() for step in trial))
        for of_training in steps.values():
            print("\n".join(map(str, of_training)))
        print(_compare_command(config))
        return config.out
    _agree_on_settings(config)
    _keep_and_restore(config, steps)
    if config.sbatch is not None:
        _submit(config, steps)
        return config.out
    if config.sweep is not None:
        rates = {tower: best_rate(*swept(config, tower)) for tower in config.towers}
        steps = {training: commands(config, training, rates[training.tower]) for training in steps}
    for number, (training, of_training) in enumerate(steps.items(), start=1):
        folder = config.out / training.tower / f"seed{training.seed}"
        with claimed(folder) as ours:
            if not ours:
                print(
                    f"[{number}/{len(steps)}] {training.tower}, seed {training.seed}: another process has it",
                    flush=True,
                )
                continue
            for step in of_training:
                if not step.finished.exists():
                    print(f"\n[{number}/{len(steps)}] {training.tower}, seed {training.seed}\n$ {step}", flush=True)
                    run_step(step)
            _keep_and_restore(config, {training: of_training})
        compare_finished(config)
    missing = [
        training for training, of_training in steps.items() if not all(step.finished.exists() for step in of_training)
    ]
    if missing:
        print(
            f"{len(missing)} of {len(steps)} trainings are not finished; another process has them, or run the same command again"
        )
    return config.out


# --- what is to be done ---------------------------------------------------------------------------------------------


def trainings(config: TowerStudyConfig) -> list[Training]:
    """All towers with the first seed, then with the next: an unfinished study is a smaller whole one."""
    return [Training(tower, seed) for seed in config.seeds for tower in config.towers]


def commands(config: TowerStudyConfig, training: Training, learning_rate: float | None = None) -> list[Command]:
    """Stage 1, stage 2 and benchmarks of one LLaVA.

    Args:
        learning_rate: of stage 1, as the tower's sweep has found it; None: the recipe's.

    Raises:
        InputError: if a key is unknown, wrong, or the study's own.
    """
    folder, spec = config.out / training.tower / f"seed{training.seed}", spec_of(config, training)
    align, tune = folder / "align", folder / "tune"
    seeded = {"tower": spec, "seed": training.seed}
    own = dict(config.own.get(training.tower, {}))
    if learning_rate is not None:
        own["learning_rate"] = learning_rate
    start = launcher(config.gpus)
    bridge, suites = Path(llava_bridge.__file__).parent, Path(str(eval_suites.__file__)).parent
    stages = [
        ("align", start, AlignConfig, bridge, config.align, {**own, **seeded, "out": str(align)}, align),
        ("tune", start, TuneConfig, bridge, config.tune, {**seeded, "align": str(align), "out": str(tune)}, tune),
        ("evaluate", start, EvalConfig, suites, config.evaluate, {"model": str(tune), "out": str(folder / "eval")}, None),
    ]  # fmt: skip
    found = []
    for key, starter, kind, package, values, own_values, run in stages:
        recipes, settings = settings_of(key, values, own_values, OWN_KEYS)
        try:
            loaded: Any = load_config(kind, [recipe_path(package, name) for name in recipes], settings)
        except InputError as error:
            raise InputError(f"{key}: {error}") from None
        stage = ["eval", "run"] if key == "evaluate" else [key]
        last = run or folder / "eval" / loaded.pictures[-1]  # pictures are answered in their order
        found.append(Command([*starter, "-m", "eval_suites.cli", *stage, *recipes, *settings], last / MANIFEST))
    return found


def spec_of(config: TowerStudyConfig, training: Training) -> str:
    """The spec of a training's tower: its own, where towers are pretrained anew for each seed."""
    return config.towers[training.tower].replace(SEED, str(training.seed))


def swept(config: TowerStudyConfig, tower: str) -> tuple[SweepConfig, dict[str, Any], dict[str, Any], Path, str, int]:
    """What a tower's sweep takes (see `eval_suites.sweep.trials`)."""
    assert config.sweep is not None
    own = {
        **config.own.get(tower, {}),
        "tower": spec_of(config, Training(tower, config.seeds[0])),
        "seed": config.seeds[0],
    }
    return config.sweep, config.align, own, config.out, tower, config.gpus


# --- doing it -------------------------------------------------------------------------------------------------------


def _agree_on_settings(config: TowerStudyConfig) -> None:
    """Write down the recipe, or compare it with that of an earlier run. More towers and more seeds may be added.

    Before the first training the sweep may be made wider: its trials stand for themselves.
    """
    settings = {name: to_dict(config)[name] for name in ("align", "tune", "evaluate", "sweep")}
    own = {name: config.own.get(name, {}) for name in config.towers}
    with claimed(config.out, wait=True):
        path = config.out / SETTINGS
        before = read_json(path) if path.exists() else settings | {"own": {}}
        if not any(config.out.glob("*/seed*/align")):
            before["sweep"] = settings["sweep"]
        known = before.get("own", {})
        difference = first_difference(before, settings | {"own": {name: own.get(name, known[name]) for name in known}})
        if difference is None:
            write_json(path, settings | {"own": known | own})
    if difference is not None:
        raise InputError(
            f"{config.out} holds a study with another recipe ({difference}); choose another out or delete it"
        )
    for name, spec in config.towers.items():
        _link_tower(config.out / name, spec)
    for training in trainings(config):
        if SEED in config.towers[training.tower]:
            _link_tower(config.out / training.tower / f"seed{training.seed}", spec_of(config, training))


def _link_tower(folder: Path, spec: str) -> None:
    """Write down a tower's spec. Where that is a pretraining run, point to it: its cost and retrieval belong to the comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    said = folder / "tower.txt"
    if said.is_file() and said.read_text(encoding="utf-8") != spec:
        raise InputError(
            f"{folder}: holds the tower {said.read_text(encoding='utf-8')}, not {spec}; give one of them another name"
        )
    write_bytes(said, spec.encode())
    kind, _, place = spec.partition(":")
    if kind == "clips" and (Path(place) / MANIFEST).is_file() and not (folder / "tower").exists():
        (folder / "tower").unlink(missing_ok=True)  # of a run that has moved
        (folder / "tower").symlink_to(Path(place).resolve(), target_is_directory=True)


def _keep_and_restore(config: TowerStudyConfig, steps: Mapping[Training, Sequence[Command]]) -> None:
    """Write finished trainings to `results`, and those that are there, but not here, from `results`."""
    if config.results is None:
        return
    for training, of_training in steps.items():
        path = config.results / f"{training.tower}-seed{training.seed}.json"
        settings = {name: to_dict(config)[name] for name in ("align", "tune", "evaluate")}
        settings |= {"tower": spec_of(config, training), "own": config.own.get(training.tower, {})}
        if path.is_file():
            restore(path, config.out, settings)
        elif all(step.finished.exists() for step in of_training):
            entry = next(own for own in entries_of(config.out / training.tower) if own.seed == training.seed)
            keep(path, config.out, entry, settings)


def compare_finished(config: TowerStudyConfig) -> None:
    """The report over the seeds that all towers have; with one tower there is nothing to compare."""
    entries = {name: {entry.seed: entry for entry in entries_of(config.out / name)} for name in config.towers}
    asked = _evaluation(config)
    done = {
        name: {
            seed
            for seed in own
            if all((own[seed].real.parent / pictures / MANIFEST).is_file() for pictures in asked.pictures)
        }
        for name, own in entries.items()
    }
    shared = [seed for seed in config.seeds if all(seed in seeds for seeds in done.values())]
    if len(config.towers) < 2 or not shared:
        return
    from eval_suites.report import compare

    compare(
        [entries[name][seed] for name in config.towers for seed in shared],
        config.out,
        asked.data,
        waived=_waived(config),
        reference=config.reference,
    )


def _waived(config: TowerStudyConfig) -> list[str]:
    """What may differ: besides what the user names, the learning rates that a sweep has found."""
    return [*config.waive, *(["align.learning_rate"] if config.sweep else [])]


def _evaluation(config: TowerStudyConfig) -> EvalConfig:
    """What all models are asked, whichever it is."""
    recipes, settings = settings_of("evaluate", config.evaluate, {"model": "-", "out": "-"}, OWN_KEYS)
    package = Path(str(eval_suites.__file__)).parent
    return load_config(EvalConfig, [recipe_path(package, name) for name in recipes], settings)


def _compare_command(config: TowerStudyConfig) -> str:
    folders = [str(config.out / name) for name in config.towers]
    start = [sys.executable, "-m", "eval_suites.cli", "compare"]
    waived = ["--waive", *_waived(config)] if _waived(config) else []
    anchor = ["--reference", str(config.reference)] if config.reference is not None else []
    return shlex.join([
        *start, *folders, "--data", str(_evaluation(config).data), "--out", str(config.out), *waived, *anchor,
    ])  # fmt: skip


# --- SLURM ----------------------------------------------------------------------------------------------------------


def _submit(config: TowerStudyConfig, steps: Mapping[Training, Sequence[Command]]) -> None:
    """A job for each tower and seed that is not finished, and one that compares once all of them have succeeded."""
    jobs = []
    for training, of_training in steps.items():
        todo = [step for step in of_training if not step.finished.exists()]
        if todo:
            name = f"{training.tower}-seed{training.seed}"
            jobs.append(_sbatch(config, name, [str(step) for step in todo], []))
    after = [f"--dependency=afterok:{':'.join(jobs)}"] if jobs else []
    last = _sbatch(config, "compare", [_compare_command(config)], after) if len(config.towers) > 1 else None
    print(f"submitted {len(jobs)} trainings{f' and the comparison, job {last}' if last else ''}: {', '.join(jobs)}")


def _sbatch(config: TowerStudyConfig, name: str, lines: Sequence[str], options: Sequence[str]) -> str:
    """Submit a script; returns the job's number."""
    script = config.out / "jobs" / f"{name}.sh"
    script.parent.mkdir(parents=True, exist_ok=True)
    script.write_text(
        "\n".join(["#!/usr/bin/env bash", "set -euo pipefail", f"cd {shlex.quote(os.getcwd())}", *lines]) + "\n"
    )
    log = f"--output={config.out / 'jobs' / name}-%j.out"
    words = [
        "sbatch",
        "--parsable",
        f"--job-name={name}",
        log,
        *shlex.split(config.sbatch or ""),
        *options,
        str(script),
    ]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise InputError("sbatch: not found here; submit on a machine of the cluster, or leave sbatch out") from None
    except subprocess.CalledProcessError as error:
        raise InputError(f"sbatch refused {script}: {error.stderr.strip()}") from None
    return done.stdout.strip().partition(";")[0]
