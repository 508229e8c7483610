"""The whole path, once: from captioned pictures to two LLaVAs compared.

    world → pretrain clip_mix and clips → align → tune → benchmarks → report

Everything lies under one folder, one folder a stage. A stage that has finished is not run again, and one that was interrupted
goes on, so running the demo again after Ctrl-C or a kill continues where it was.
"""

import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path

import clips_core
import llava_bridge
from clips_core.config import PretrainConfig, load_config, recipe_path
from clips_core.folders import read_json, write_json
from eval_suites.report import Entry, compare

TOWERS = ("clip_mix", "clips")  # the paper's baseline first; a tower's name is its method
BASELINE = ["method=clip_mix", "model.decoder=null"]


def run_demo(smoke: bool = False, out: Path | None = None) -> Path:
    """Run every stage that has not finished, then compare. Returns the folder with report.html and report.json.

    Args:
        smoke: the recipes `smoke_*` in place of `demo_*`: the same path, too small to learn much.
        out: default runs/demo, or runs/smoke.
    """
    size = "smoke" if smoke else "demo"
    out = out or Path("runs") / size
    stages = _stages(size, out)
    clock = Clock(out / "seconds.json")
    for number, (name, stage) in enumerate(stages, start=1):
        print(f"\n[{number}/{len(stages)}] {name}   ({clock.total() / 60:.1f} minutes so far)", flush=True)
        with_clock(clock, name, stage)
    print()
    entries = [Entry.of(out / tower) for tower in TOWERS]
    compare(entries, out, out / "world" / "benchmarks", clock.seconds, with_aims=True)
    print(f"\n{clock.total() / 60:.1f} minutes in all. The page: {out / 'report.html'}")
    return out


def _stages(size: str, out: Path) -> list[tuple[str, Callable[[], object]]]:
    """Name and function of every stage, in order. Libraries are imported when a stage needs them."""
    core, bridge = Path(clips_core.__file__).parent, Path(llava_bridge.__file__).parent
    world = out / "world"
    conversations = [f"data.images={world / 'llava' / 'images'}"]

    def draw() -> None:
        from clips_core.world import WorldConfig, make_world

        make_world(load_config(WorldConfig, recipe_path(core, f"{size}_world"), [f"out={world}"]))

    def pretrain_tower(tower: str) -> None:
        from clips_core.train import pretrain

        data = [f"data.train={world / 'pretrain'}", f"data.vocab={world / 'vocab.txt'}"]
        settings = [f"out={out / tower / 'tower'}", *data, f"evaluation.shards={world / 'retrieval'}"]
        settings += BASELINE if tower == "clip_mix" else []
        pretrain(load_config(PretrainConfig, recipe_path(core, f"{size}_pretrain"), settings))

    def align_tower(tower: str) -> None:
        from llava_bridge.config import AlignConfig
        from llava_bridge.train import align

        settings = [f"out={out / tower / 'align'}", f"tower=clips:{out / tower / 'tower'}", *conversations]
        settings += [f"data.json={world / 'llava' / 'align.json'}"]
        align(load_config(AlignConfig, recipe_path(bridge, f"{size}_align"), settings))

    def tune_tower(tower: str) -> None:
        from llava_bridge.config import TuneConfig
        from llava_bridge.train import tune

        settings = [f"out={out / tower / 'tune'}", f"align={out / tower / 'align'}", *conversations]
        settings += [f"tower=clips:{out / tower / 'tower'}", f"data.json={world / 'llava' / 'tune.json'}"]
        tune(load_config(TuneConfig, recipe_path(bridge, f"{size}_tune"), settings))

    def benchmark(tower: str) -> None:
        from eval_suites.benchmarks import EvalConfig, run_suite

        model, folder = out / tower / "tune" / "model", out / tower / "eval"
        settings = [
            f"model={model}",
            f"out={folder}",
            f"data={world / 'benchmarks'}",
            "pictures=[real, blank, shuffled]",
        ]
        run_suite(load_config(EvalConfig, None, settings))

    def for_towers(name: str, stage: Callable[[str], None]) -> list[tuple[str, Callable[[], object]]]:
        return [(f"{name} {tower}", lambda tower=tower: stage(tower)) for tower in TOWERS]  # type: ignore[misc]

    return [
        ("world", draw),
        *for_towers("pretrain", pretrain_tower),
        *for_towers("align", align_tower),
        *for_towers("tune", tune_tower),
        *for_towers("eval", benchmark),
    ]


class Clock:
    """Seconds by stage, kept on disk: what an interrupted run spent counts too."""

    def __init__(self, path: Path):
        self.path = path
        self.seconds: dict[str, float] = read_json(path) if path.exists() else {}

    def total(self) -> float:
        return sum(self.seconds.values())

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds
        write_json(self.path, self.seconds)


def with_clock(clock: Clock, name: str, stage: Callable[[], object]) -> None:
    """Run a stage; what it took is recorded even when it is interrupted."""
    started = time.monotonic()
    try:
        stage()
    finally:
        clock.add(name, time.monotonic() - started)
        give_back_memory()


def give_back_memory() -> None:
    """Return what the last stage freed to the system: glibc keeps gigabytes of small pieces, which the next stage would add to."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # other C libraries have none
        trim(0)
