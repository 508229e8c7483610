"""The study of towers: its commands, its folder, jobs, interruptions; and once, in the slow tests, the whole of it."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import llava_bridge
from clips_core.config import load_config, load_settings
from clips_core.errors import InputError, Stopped
from clips_core.folders import claimed, read_json, write_json
from eval_suites import study_towers as module
from eval_suites.cli import main
from eval_suites.records import entries_of
from eval_suites.steps import Command, run_step
from eval_suites.study_towers import TowerStudyConfig, Training, commands, overrides, study_towers, swept, trainings
from eval_suites.sweep import best_rate, split_conversations, trials
from llava_bridge.config import AlignConfig, TuneConfig
from llava_bridge.held_out import HeldOutConfig
from tests.test_report import Question, make_benchmarks, make_entry

PACKAGE = Path(module.__file__).parent
TWO = ["towers.a=clips:runs/a", "towers.b=hf:org/b"]


def config(*settings: str, recipe: str = "study_towers_demo") -> TowerStudyConfig:
    return load_settings(TowerStudyConfig, PACKAGE, [recipe, *settings])


def keys(command: Command) -> dict[str, str]:
    return dict(word.split("=", 1) for word in command.words if "=" in word)


# ------------------------------------------------------------------------------------------------------ commands


def test_trainings_differ_in_tower_and_seed_alone(tmp_path: Path) -> None:
    study = config(f"out={tmp_path}", *TWO, "seeds=[0, 7]")
    assert trainings(study) == [Training("a", 0), Training("b", 0), Training("a", 7), Training("b", 7)]
    for stage in range(3):
        of = {training: keys(commands(study, training)[stage]) for training in trainings(study)}
        differing = {key for key in of[Training("a", 0)] if len({own[key] for own in of.values()}) > 1}
        assert differing == [{"out", "tower", "seed"}, {"out", "align", "tower", "seed"}, {"out", "model"}][stage]


def test_commands_are_what_a_reader_would_type(tmp_path: Path) -> None:
    """The stages' own config classes read them back."""
    study = config(
        f"out={tmp_path}",
        *TWO,
        "align.learning_rate=5e-4",
        "own.b.image_size=336",
        "align.system_prompt=Look, then say.",
    )
    align, tune, evaluate = commands(study, Training("b", 0))
    words = shlex.split(str(align))
    assert words[1:4] == ["-m", "eval_suites.cli", "align"]
    bridge = Path(llava_bridge.__file__).parent
    first = load_settings(AlignConfig, bridge, words[4:])
    assert (first.tower, first.image_size, first.learning_rate, first.seed) == ("hf:org/b", 336, 5e-4, 0)
    assert first.system_prompt == "Look, then say."
    second = load_settings(TuneConfig, bridge, shlex.split(str(tune))[4:])
    assert second.align == first.out and second.tower == first.tower
    assert keys(evaluate)["model"] == str(second.out)  # the run, not its model/: that may be an adapter
    assert evaluate.finished == tmp_path / "b/seed0/eval/shuffled/manifest.json"
    assert "image_size" not in keys(commands(study, Training("a", 0))[0])
    on_eight = commands(config(f"out={tmp_path}", *TWO, "gpus=8"), Training("a", 0))
    for words, _ in on_eight:
        assert words[1:6] == ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "8"]


def test_every_shipped_recipe_fits_its_stages() -> None:
    for recipe in ("study_towers_demo", "study_towers_llava15", "study_towers_world", "study_towers_world_long"):
        assert len(commands(config(*TWO, recipe=recipe), Training("a", 0))) == 3


def test_options_of_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert overrides(["hf:openai/clip-vit-large-patch14-336", "ours=clips:runs/x"], "org/llm", 2, "pad", True) == [
        'towers={"clip-vit-large-patch14-336": "hf:openai/clip-vit-large-patch14-336", "ours": "clips:runs/x"}',
        'align.llm="org/llm"', "seeds=[0, 1]", 'align.image_mode="pad"', "dry_run=true",
    ]  # fmt: skip
    # As in the guide: argparse takes all words behind --towers for towers.
    assert overrides(["a=hf:org/a", "evaluate.data=benchmarks", "out=runs/new"], None, None, None, False) == [
        'towers={"a": "hf:org/a"}', "evaluate.data=benchmarks", "out=runs/new",
    ]  # fmt: skip
    with pytest.raises(InputError, match="would both be called 'x'; write NAME=SPEC"):
        overrides(["clips:runs/x", "hf:org/x"], None, None, None, False)
    assert main(["study", "towers", "study_towers_demo", f"out={tmp_path / 'new'}", "--towers", "x=clips:x", "y=clips:y",
                 "--seeds", "2", "--dry-run"]) == 0  # fmt: skip
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2 * 2 * 3 + 1 and " compare " in printed[-1]
    assert not (tmp_path / "new").exists()


def test_settings_may_stand_behind_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "study",
        "towers",
        "study_towers_demo",
        "--towers",
        "x=clips:x",
        "--dry-run",
        f"out={tmp_path}",
        "seeds=[4]",
    ]
    assert main(words) == 0
    assert str(tmp_path / "x/seed4/align") in capsys.readouterr().out
    for wrong in ("--drie-run", "out"):
        with pytest.raises(SystemExit):
            main([*words, wrong])
        assert re.search(rf"unrecognized arguments: .*{wrong}$", capsys.readouterr().err.strip())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["align.tower=hf:x"], r"align\.tower: the study sets it; say it in towers"),
        (["tune.seed=3"], r"tune\.seed: the study sets it; say it in seeds"),
        (["align.learning_rat=1"], r"align: .*did you mean 'learning_rate'"),
        (["align.recipe=demo_aling"], r"align: .*did you mean 'demo_align'|no recipe 'demo_aling'"),
        (["seeds=[1, 1]"], r"each seed once"),
        (["sweep={rates: [1e-3], samples: 8}"], r"rates must be two or more"),
        (["own.c.image_size=2"], r"no tower is called 'c'; the towers are a, b"),
        (['towers={"../a": "hf:x"}'], r"becomes a folder: letters, digits"),
    ],
)
def test_one_clear_error(tmp_path: Path, settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        study_towers(config(f"out={tmp_path / 'new'}", *TWO, *settings))
    assert not (tmp_path / "new").exists()


def test_a_folder_keeps_its_recipe_and_its_towers(tmp_path: Path) -> None:
    study = config(f"out={tmp_path}", *TWO)
    module._agree_on_settings(study)
    module._agree_on_settings(config(f"out={tmp_path}", *TWO, "towers.c=hf:org/c", "seeds=[0, 1]"))  # may be added
    with pytest.raises(InputError, match=r"another recipe \(.*learning_rate"):
        module._agree_on_settings(config(f"out={tmp_path}", *TWO, "tune.learning_rate=1"))
    with pytest.raises(InputError, match=r"another recipe \(own\.b\.image_size"):
        module._agree_on_settings(config(f"out={tmp_path}", *TWO, "own.b.image_size=336"))
    module._agree_on_settings(
        config(f"out={tmp_path}", "towers.d=hf:org/d", "own.d.image_size=336")
    )  # a new tower's own
    with pytest.raises(InputError, match=r"another recipe \(own\.d\.image_size"):
        module._agree_on_settings(config(f"out={tmp_path}", "towers.d=hf:org/d"))
    sweep = "sweep={rates: [1e-3, 2e-3], samples: 8}"
    module._agree_on_settings(config(f"out={tmp_path}", *TWO, sweep))  # nothing is trained yet
    (tmp_path / "a/seed0/align").mkdir(parents=True)
    with pytest.raises(InputError, match=r"another recipe \(sweep"):  # half of the towers at other rates
        module._agree_on_settings(config(f"out={tmp_path}", *TWO))
    with pytest.raises(InputError, match=r"holds the tower hf:org/b, not hf:org/new"):
        module._agree_on_settings(config(f"out={tmp_path}", "towers.b=hf:org/new", sweep))


def test_a_tower_pretrained_anew_for_each_seed(tmp_path: Path) -> None:
    """Its spec names the seed: every training takes its own, and `compare` finds each one's pretraining."""
    for seed in (0, 1):
        write_json(tmp_path / f"clips_{seed}" / "manifest.json", {"stage": "pretrain"})
    study = config(
        f"out={tmp_path / 'out'}", f"towers.a=clips:{tmp_path}/clips_{{seed}}", "towers.b=hf:org/b", "seeds=[0, 1]"
    )
    assert [keys(commands(study, training)[0])["tower"] for training in trainings(study)] == [
        f"clips:{tmp_path}/clips_0", "hf:org/b", f"clips:{tmp_path}/clips_1", "hf:org/b",
    ]  # fmt: skip
    module._agree_on_settings(study)
    own = [entry.tower for entry in entries_of(tmp_path / "out/a")]
    assert [tower and tower.resolve().name for tower in own] == ["clips_0", "clips_1"]


# --------------------------------------------------------------------------------------------------------- sweep


def sweeping(tmp_path: Path, *settings: str) -> TowerStudyConfig:
    data = tmp_path / "captions.jsonl"
    data.write_text("".join(json.dumps({"id": number}) + "\n" for number in range(10)))
    swept = ["sweep={rates: [1e-3, 2e-3, 4e-3], samples: 64, held_out: 3}", f"align.data.json={data}"]
    return config(f"out={tmp_path / 'out'}", *TWO, *swept, *settings)


def test_trials_differ_in_the_rate_and_see_no_held_out_conversation(tmp_path: Path) -> None:
    study = sweeping(tmp_path)
    bridge = Path(llava_bridge.__file__).parent
    seen = {}
    for tower in study.towers:
        for rate, (align, loss) in trials(*swept(study, tower)).items():
            trial = load_settings(AlignConfig, bridge, align.words[4:])
            assert (trial.learning_rate, trial.samples, trial.tower) == (rate, 64, study.towers[tower])
            measured = load_settings(HeldOutConfig, bridge, loss.words[5:])
            assert measured.model == trial.out and measured.data.images == trial.data.images
            seen[tower, rate] = (trial.data.json, measured.data.json, trial.batch_size, trial.seed)
    assert len(seen) == 6 and len(set(seen.values())) == 1
    split_conversations(study.sweep, study.align, study.out)
    parts = [[record["id"] for record in read_json(path)] for path in next(iter(seen.values()))[:2]]
    assert list(map(len, parts)) == [7, 3] and sorted(parts[0] + parts[1]) == list(range(10))
    before = [path.read_bytes() for path in next(iter(seen.values()))[:2]]
    split_conversations(study.sweep, study.align, study.out)
    assert before == [path.read_bytes() for path in next(iter(seen.values()))[:2]]
    (tmp_path / "captions.jsonl").write_text("{}\n" * 5)
    with pytest.raises(InputError, match="was made of other data"):
        split_conversations(study.sweep, study.align, study.out)


def test_each_tower_learns_at_its_own_best_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = sweeping(tmp_path)
    losses = {"a": {1e-3: 2.0, 2e-3: 1.5, 4e-3: 1.9}, "b": {1e-3: 1.0, 2e-3: 1.5, 4e-3: 1.9}}
    for tower, by_rate in losses.items():
        for rate, (align, loss) in trials(*swept(study, tower)).items():
            align.finished.parent.mkdir(parents=True)
            align.finished.touch()
            write_json(loss.finished, {"loss": by_rate[rate]})
    assert [best_rate(*swept(study, tower)) for tower in study.towers] == [2e-3, 1e-3]
    printed = capsys.readouterr().out
    assert "b: 0.001 is at the sweep's end" in printed and "a: 0.002 is at" not in printed
    found = commands(study, Training("a", 0), best_rate(*swept(study, "a")))
    assert keys(found[0])["learning_rate"] == "0.002" and "learning_rate" not in keys(found[1])


# --------------------------------------------------------------------------------------------------------- steps


def python(code: str, finished: Path) -> Command:
    return Command([sys.executable, "-c", code], finished)


def test_a_step_that_fails_is_named(tmp_path: Path) -> None:
    run_step(python(f"open({str(tmp_path / 'done')!r}, 'w')", tmp_path / "done"))
    with pytest.raises(InputError, match=r"failed with exit status 2 .*: .*sys\.exit\(2\)"):
        run_step(python("import sys; sys.exit(2)", tmp_path / "done"))
    with pytest.raises(InputError, match=r"wrote no .*never"):
        run_step(python("pass", tmp_path / "never"))
    with pytest.raises(Stopped):
        run_step(python("import sys; sys.exit(75)", tmp_path / "done"))
    with pytest.raises(KeyboardInterrupt):
        run_step(python("import sys; sys.exit(130)", tmp_path / "done"))


def test_sigterm_reaches_the_step_and_waits_for_it(tmp_path: Path) -> None:
    """The step saves, ends with 75, and the study ends after it."""
    step = f"""
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3)
    pathlib.Path({str(tmp_path / "saved")!r}).touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
pathlib.Path({str(tmp_path / "started")!r}).touch()
time.sleep(60)
"""
    code = f"""
import sys
from pathlib import Path
from clips_core.errors import Stopped
from eval_suites.steps import Command, run_step
try:
    run_step(Command([sys.executable, "-c", {step!r}], Path("never")))
except Stopped:
    sys.exit(75)
"""
    study = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (tmp_path / "started").exists():
            assert study.poll() is None
        study.send_signal(signal.SIGTERM)
        assert study.wait(30) == 75 and (tmp_path / "saved").exists()
    finally:
        study.kill()


def test_a_step_that_outlives_a_killed_study_keeps_its_folder(tmp_path: Path) -> None:
    """kill -9 ends the study and not its step: another study must not start the same step beside it."""
    step = f"""
import os, pathlib, time
pathlib.Path({str(tmp_path / "step.tmp")!r}).write_text(str(os.getpid()))
os.rename({str(tmp_path / "step.tmp")!r}, {str(tmp_path / "step")!r})
time.sleep(60)
"""
    code = f"""
import sys
from pathlib import Path
from clips_core.folders import claimed
from eval_suites.steps import Command, run_step
with claimed(Path({str(tmp_path / "out")!r})):
    run_step(Command([sys.executable, "-c", {step!r}], Path("never")))
"""
    study = subprocess.Popen([sys.executable, "-c", code])
    try:
        while not (tmp_path / "step").exists():
            assert study.poll() is None
    finally:
        study.kill()
        study.wait()
    left = int((tmp_path / "step").read_text())
    with claimed(tmp_path / "out") as ours:
        assert not ours
    os.kill(left, signal.SIGKILL)
    with claimed(tmp_path / "out", wait=True) as ours:
        assert ours


# ---------------------------------------------------------------------------------------------------------- jobs


def test_jobs_hold_what_is_not_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sbatch that notes its arguments and gives numbers."""
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\nwc -l < {tmp_path}/submitted\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    study = config(f"out={tmp_path / 'out'}", *TWO, "sbatch=--gpus=8 --time=24:00:00")
    align = commands(study, Training("a", 0))[0]
    align.finished.parent.mkdir(parents=True)
    align.finished.touch()
    study_towers(study)
    submitted = (tmp_path / "submitted").read_text().splitlines()
    assert len(submitted) == 3 and all("--gpus=8 --time=24:00:00" in line for line in submitted)
    assert "--dependency=afterok:1:2" in submitted[2]
    scripts = {
        name: (tmp_path / "out" / "jobs" / f"{name}.sh").read_text() for name in ("a-seed0", "b-seed0", "compare")
    }
    assert str(align) not in scripts["a-seed0"] and str(commands(study, Training("a", 0))[1]) in scripts["a-seed0"]
    assert scripts["b-seed0"].count("eval_suites.cli") == 3 and " compare " in scripts["compare"]
    for name in scripts:
        assert subprocess.run(["bash", "-n", tmp_path / "out" / "jobs" / f"{name}.sh"]).returncode == 0
    fake.write_text("#!/bin/sh\necho 'invalid partition' >&2\nexit 1\n")
    with pytest.raises(InputError, match=r"sbatch refused .*a-seed0\.sh: invalid partition"):
        study_towers(study)


# ---------------------------------------------------------------------------------------------------- comparison


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Question]]:
    """Folders as a study leaves them: two towers, two seeds; the second seed of b lacks an evaluation."""
    root = tmp_path_factory.mktemp("finished")
    questions = make_benchmarks(root / "benchmarks")
    for seed in (0, 1):
        for name in ("a", "b"):
            made = make_entry(root / "made" / str(seed), name, questions, 0.7, seed=5 * seed + ord(name))
            target = root / "out" / name / f"seed{seed}"
            target.mkdir(parents=True)
            for field in ("align", "tune"):
                getattr(made, field).rename(target / field)
            (target / "eval").mkdir()
            for pictures in ("real", "blank", "shuffled"):
                getattr(made, pictures).rename(target / "eval" / pictures)
    return root, questions


def test_seeds_that_all_towers_have_are_compared(finished: tuple[Path, list[Question]]) -> None:
    root, questions = finished
    study = config(f"out={root / 'out'}", *TWO, "seeds=[0, 1]", f"evaluate.data={root / 'benchmarks'}")
    left_out = root / "out/b/seed1/eval/shuffled/manifest.json"
    manifest = left_out.read_bytes()
    left_out.unlink()
    module.compare_finished(study)
    primary = read_json(root / "out" / "report.json")["comparisons"][0]
    assert (primary["n_seeds"], primary["inference"], primary["n_samples"]) == (1, "checkpoint", len(questions))
    left_out.write_bytes(manifest)
    study_towers(study)  # every step is finished: nothing is run
    primary = read_json(root / "out" / "report.json")["comparisons"][0]
    assert (primary["n_seeds"], primary["inference"]) == (2, "recipe")


def test_finished_trainings_are_kept_and_a_study_goes_on_from_them(
    finished: tuple[Path, list[Question]], tmp_path: Path
) -> None:
    root, _ = finished
    shutil.copytree(root / "out", tmp_path / "here")
    shutil.copytree(
        root / "made/1/a/pretrain", tmp_path / "here/a/seed1/tower"
    )  # a pretraining of its own, for one of them
    common = [*TWO, "seeds=[0, 1]", f"evaluate.data={root / 'benchmarks'}", f"results={tmp_path / 'results'}"]
    study_towers(config(f"out={tmp_path / 'here'}", *common))
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == [
        "a-seed0.json", "a-seed1.json", "b-seed0.json", "b-seed1.json",
    ]  # fmt: skip
    study_towers(config(f"out={tmp_path / 'there'}", *common))  # a step that were run would fail: there is no tower
    here, there = (read_json(tmp_path / place / "report.json") for place in ("here", "there"))
    assert there["comparisons"] == here["comparisons"] and there["controls"] == here["controls"]
    towers = [entry.tower for entry in entries_of(tmp_path / "there/a")]
    assert towers == [None, tmp_path / "there/a/seed1/tower"]

    with pytest.raises(InputError, match=r"a-seed0\.json was made with other settings \(settings\.tune\.learning_rate"):
        study_towers(config(f"out={tmp_path / 'new'}", *common, "tune.learning_rate=1"))
    kept = read_json(tmp_path / "results/a-seed0.json")
    write_json(tmp_path / "results/a-seed0.json", kept | {"files": {"../../outside": ""}})
    with pytest.raises(InputError, match=r"outside.* would lie outside the study's folder"):
        study_towers(config(f"out={tmp_path / 'newer'}", *common))


def test_what_is_waived_is_waived_and_printed(
    finished: tuple[Path, list[Question]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster whose packages change in the middle of a study must not lose it."""
    root, _ = finished
    place = root / "out/b/seed0/tune/manifest.json"
    manifest = read_json(place)
    write_json(place, manifest | {"environment": manifest["environment"] | {"device": "another"}})
    common = [f"out={root / 'out'}", *TWO, f"evaluate.data={root / 'benchmarks'}"]
    with pytest.raises(InputError, match=r"environment\.tune\.device.*--waive"):
        module.compare_finished(config(*common))
    waiving = config(*common, "waive=[environment.tune.device]")
    module.compare_finished(waiving)
    write_json(place, manifest)
    assert "environment.tune.device" in capsys.readouterr().out
    assert module._compare_command(waiving).endswith("--waive environment.tune.device")


@pytest.mark.slow
def test_the_whole_study_on_the_smoke_world(tmp_path: Path) -> None:
    """Two towers, one seed, from their folders to the page; interrupted after the first training, it goes on."""
    from eval_suites.demo import run_demo

    demo = run_demo(smoke=True, out=tmp_path / "demo")
    data = {"json": str(demo / "world/llava/align.json"), "images": str(demo / "world/llava/images")}
    settings: list[Any] = [
        f"out={tmp_path / 'study'}", f"towers.clips=clips:{demo / 'clips/tower'}", f"towers.mix=clips:{demo / 'clip_mix/tower'}",
        f"align={{recipe: smoke_align, data: {data}}}",
        f"tune={{recipe: smoke_tune, data: {data | {'json': str(demo / 'world/llava/tune.json')}}}}",
        f"evaluate={{data: {demo / 'world/benchmarks'}, pictures: [real]}}",
    ]  # fmt: skip
    study_towers(load_config(TowerStudyConfig, None, settings))
    report = read_json(tmp_path / "study" / "report.json")
    assert list(report["towers"]) == ["clips", "mix"] and report["towers"]["clips"]["zero_shot"]
    own, made = (
        read_json(folder / "report.json")["towers"]["clips"]["benchmarks"] for folder in (tmp_path / "study", demo)
    )
    assert own["all questions"]["accuracy"] == made["all questions"]["accuracy"]  # the demo is the same training
