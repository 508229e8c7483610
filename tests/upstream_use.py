"""Runs in the original LLaVA's environment: its own loading and answering, on what its own training wrote.

    python upstream_use.py JOB.json OUT.safetensors

JOB: {"picture": PNG, "question": text, "models": {name: {"path", "base"}}}. OUT: for each model `NAME answer` (bos and the
new tokens' ids), `NAME features [N, D]` of the picture after the projector, `NAME tiles [T, 3, S, S]` where it is one for tiles.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from llava_bridge import upstream

upstream.install()
from llava.constants import IMAGE_TOKEN_INDEX  # noqa: E402
from llava.conversation import conv_templates  # noqa: E402
from llava.mm_utils import get_model_name_from_path, process_images, tokenizer_image_token  # noqa: E402
from llava.model.builder import load_pretrained_model  # noqa: E402

job = json.loads(Path(sys.argv[1]).read_text())
picture = Image.open(job["picture"]).convert("RGB")
conversation = conv_templates["vicuna_v1"].copy()
conversation.append_message(conversation.roles[0], f"<image>\n{job['question']}")
conversation.append_message(conversation.roles[1], None)
results = {}
for name, model in job["models"].items():
    model_name = get_model_name_from_path(model["path"])
    tokenizer, llava, processor, _ = load_pretrained_model(model["path"], model["base"], model_name, device="cpu")
    assert type(llava.get_vision_tower()).__name__ == "ExportedTower"
    pixels = process_images([picture], processor, llava.config).to(llava.dtype)
    ids = tokenizer_image_token(conversation.get_prompt(), tokenizer, IMAGE_TOKEN_INDEX, return_tensors="pt")[None]
    with torch.inference_mode():
        answer = llava.generate(
            ids, images=pixels, image_sizes=[picture.size], do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        *_, embeddings, _ = llava.prepare_inputs_labels_for_multimodal(
            ids, None, None, None, None, pixels, [picture.size]
        )
    before = int((ids[0] == IMAGE_TOKEN_INDEX).nonzero()[0, 0])
    after = ids.shape[1] - before - 1
    results[f"{name} answer"] = answer[0].clone()
    results[f"{name} features"] = embeddings[0, before : embeddings.shape[1] - after].float().clone()
    if pixels.ndim == 5:
        results[f"{name} tiles"] = pixels[0].float().clone()
save_file(results, sys.argv[2])
