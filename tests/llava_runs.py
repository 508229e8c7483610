"""Configs of tiny trainings of both stages, and what came of them, for the tests of llava_bridge.train."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from llava_samples import save_conversations, save_llm, save_tower
from safetensors.torch import load_file
from torch import Tensor

from llava_bridge.config import AlignConfig, ConversationConfig, LoraConfig, TuneConfig


@dataclasses.dataclass
class World:
    """A folder with tower/, llm/ and data/, and the configs of runs beside them."""

    folder: Path

    def align_config(self, out: str, **changes: Any) -> AlignConfig:
        settings = {
            "out": self.folder / out,
            "tower": f"hf:{self.folder / 'tower'}",
            "llm": str(self.folder / "llm"),
            "data": ConversationConfig(self.folder / "data" / "align.json", self.folder / "data" / "images"),
            "batch_size": 4,
            "samples": 24,
            "precision": "float32",
            "save_every": 2,
        }
        return AlignConfig(**{**settings, **changes})

    def tune_config(self, out: str, **changes: Any) -> TuneConfig:
        settings = {
            "out": self.folder / out,
            "align": self.folder / "align",
            "tower": f"hf:{self.folder / 'tower'}",
            "data": ConversationConfig(self.folder / "data" / "tune.json", self.folder / "data" / "images"),
            "batch_size": 4,
            "samples": 24,
            "learning_rate": 1e-2,
            "projector_learning_rate": 1e-3,
            "lora": LoraConfig(rank=4, alpha=8, dropout=0.1),
            "precision": "float32",
            "save_every": 2,
        }
        return TuneConfig(**{**settings, **changes})


def make_world(folder: Path, mixed: bool = False) -> World:
    """Its tower, language model and data. If `mixed`, every other conversation of stage 2 is without a picture."""
    save_tower(folder / "tower")
    save_llm(folder / "llm")
    save_conversations(folder / "data")
    if mixed:
        path = folder / "data" / "tune.json"
        conversations = json.loads(path.read_text())
        for conversation in conversations[::2]:
            del conversation["image"]
            turn = conversation["conversations"][0]
            turn["value"] = turn["value"].removeprefix("<image>\n")
        path.write_text(json.dumps(conversations))
    return World(folder)


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / "model" / "model.safetensors")


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# Run by `python -c` with [[stage, moment, recipe], …] as JSON. Each dies in its own fork of one process, which has imported
# everything once.
RUN_AND_DIE = """
import json, os, sys
from clips_core.config import load_config
from llava_bridge import train
from llava_bridge.config import AlignConfig, TuneConfig

def die(*_, **__):
    os._exit(9)

def run(stage, moment, recipe):
    if moment == "after step 3":  # checkpoint 2 is whole, step 3 is logged and lost
        log = train.Progress.on_log
        def on_log(self, args, state, control, **rest):
            log(self, args, state, control, **rest)
            if state.global_step == 3:
                die()
        train.Progress.on_log = on_log
    elif moment == "while checkpoint 4 is written":
        write = train.write_json
        train.write_json = lambda path, value: die() if "checkpoint-4" in str(path) else write(path, value)
    elif moment == "before checkpoint 4's optimizer":  # its weights are written
        save = train.StageTrainer._save_optimizer_and_scheduler
        def save_optimizer(self, folder):
            die() if "checkpoint-4" in folder else save(self, folder)
        train.StageTrainer._save_optimizer_and_scheduler = save_optimizer
    else:  # before the manifest
        train.save_mllm = die
    train.align(load_config(AlignConfig, recipe)) if stage == "align" else train.tune(load_config(TuneConfig, recipe))

for case in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        run(*case)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 9:
        sys.exit(f"{case}: ended with {status} and was not killed")
"""
