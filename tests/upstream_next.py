"""Runs in the original LLaVA's environment, a checkout of LLaVA-NeXT before it on the path: NeXT's model around an exported tower.

    python upstream_next.py TOWER OUT.safetensors

OUT: `features [N, D]` of a wide picture in tiles, `answer`, and the tower's weights (`kept NAME`) after loading once more from a
folder that has none of them.
"""

import sys
import tempfile

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava_bridge import upstream

upstream.install()
from llava.constants import IMAGE_TOKEN_INDEX  # noqa: E402
from llava.mm_utils import process_images  # noqa: E402
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM  # noqa: E402

tower = sys.argv[1]
torch.manual_seed(0)
config = LlavaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=100, pad_token_id=0,
    mm_vision_tower=tower, mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_hidden_size=64,
    mm_projector_type="mlp2x_gelu", mm_patch_merge_type="spatial_unpad", image_aspect_ratio="anyres",
    image_grid_pinpoints=[[48, 96], [96, 48], [96, 96]], tokenizer_model_max_length=512,
)  # fmt: skip
llava = LlavaLlamaForCausalLM(config).eval()
torch.nn.init.normal_(llava.model.image_newline)
vision_tower = llava.get_vision_tower()
assert type(vision_tower).__name__ == "ExportedTower" and vision_tower.is_loaded
picture = Image.effect_noise((200, 90), 80).convert("RGB")
pixels = process_images([picture], vision_tower.image_processor, config)
ids = torch.tensor([[1, IMAGE_TOKEN_INDEX, 5, 6]])
with torch.inference_mode():
    *_, embeddings, _ = llava.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, None, pixels, ["image"], [picture.size]
    )
    answer = llava.generate(
        ids, images=pixels, image_sizes=[picture.size], modalities=["image"], do_sample=False, max_new_tokens=4
    )
results = {"features": embeddings[0, 1:-2].clone(), "answer": answer[0].clone()}
with tempfile.TemporaryDirectory() as folder:
    state = {name: value for name, value in llava.state_dict().items() if "vision_tower" not in name}
    llava.save_pretrained(folder, state_dict=state)
    again = LlavaLlamaForCausalLM.from_pretrained(folder, low_cpu_mem_usage=True)
for name, value in again.get_vision_tower().vision_tower.state_dict().items():
    results[f"kept {name}"] = value.clone()
assert load_file(f"{tower}/model.safetensors")
save_file(results, sys.argv[2])
