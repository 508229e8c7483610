"""Runs in the original LLaVA's environment: what exported towers compute there.

    python upstream_towers.py JOB.json OUT.safetensors

JOB: {"pictures": [PNG …], "towers": {name: folder}, "layers": [select layer …]}. OUT: for each tower, `NAME pixels [P, 3, S, S]`,
`NAME LAYER FEATURES [P, N, D]`, and `NAME within another`: of a tower that was built while transformers loaded a model around it.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import init_empty_weights
from PIL import Image
from safetensors.torch import save_file
from transformers.modeling_utils import no_init_weights

from llava_bridge import upstream

upstream.install()
from llava.model.multimodal_encoder.builder import build_vision_tower  # noqa: E402

job = json.loads(Path(sys.argv[1]).read_text())
pictures = [Image.open(path).convert("RGB") for path in job["pictures"]]
results = {}
for name, folder in job["towers"].items():
    for layer in job["layers"]:
        for features in ("patch", "cls_patch"):
            arguments = SimpleNamespace(
                mm_vision_tower=folder, mm_vision_select_layer=layer, mm_vision_select_feature=features
            )
            try:
                tower = build_vision_tower(arguments)
            except ValueError as error:
                assert "no class token" in str(error) and features == "cls_patch"
                continue
            pixels = tower.image_processor.preprocess(pictures, return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                results[f"{name} {layer} {features}"] = tower(pixels).contiguous()
            assert tuple(tower(pixels).shape[1:]) == (tower.num_patches, tower.hidden_size)
    results[f"{name} pixels"] = pixels
    # As when a checkpoint that says it holds a tuned tower is loaded, and does not: nothing may stay empty or random.
    arguments = SimpleNamespace(mm_vision_tower=folder, mm_vision_select_layer=-2, unfreeze_mm_vision_tower=True)
    with no_init_weights(), init_empty_weights():
        tower = build_vision_tower(arguments, delay_load=True)
    with torch.no_grad():
        results[f"{name} within another"] = tower(pixels).contiguous()
save_file(results, sys.argv[2])
