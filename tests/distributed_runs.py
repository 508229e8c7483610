"""Run under torchrun by test_distributed.py: pretrains what a JSON file lists, `[[shards, out, settings], …]`, one after the other.

A run whose settings hold `die=STEP` is killed after that many steps.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from clips_core import train
from clips_core.distributed import process_group
from tests.test_pretrain import make_config

if __name__ == "__main__":
    step = train.training_step
    with process_group():
        for shards, out, settings in json.loads(Path(sys.argv[1]).read_text()):
            die = next((int(s.removeprefix("die=")) for s in settings if s.startswith("die=")), None)
            calls = 0

            def training_step(*args: Any, die: int | None = die) -> Any:
                global calls
                calls += 1
                if die is not None and calls > die + 1:  # the first call counts FLOPs
                    os._exit(9)
                return step(*args)

            train.training_step = training_step
            config = make_config(Path(shards), Path(out), *(s for s in settings if not s.startswith("die=")))
            train.pretrain(config)
