"""Tower + projector + language model → a stock transformers LLaVA, and back from its folder.

The result holds no code of ours: `AutoModelForImageTextToText` and `AutoProcessor` load the folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PretrainedConfig,
)

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_json, read_manifest, sha256_file
from llava_bridge.config import Projector
from llava_bridge.towers import Tower

IMAGE_TOKEN = "<image>"
# Where the three parts stand among a stock LLaVA's parameters.
VISION_TOWER, PROJECTOR, LANGUAGE_MODEL = (
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.language_model.",
)

# A LLaVA's messages may hold lists of parts ({"type": "image"}, {"type": "text", "text": …}), but most LLMs' templates join
# strings only. Put before such a template, this flattens the parts; strings pass unchanged.
FLATTEN_PARTS = """\
{%- set flat = namespace(messages=[], text='') %}
{%- for message in messages %}
{%- if message['content'] is string %}
{%- set flat.messages = flat.messages + [message] %}
{%- else %}
{%- set flat.text = '' %}
{%- for part in message['content'] %}
{%- set flat.text = flat.text + ('<image>\\n' if part['type'] == 'image' else part['text']) %}
{%- endfor %}
{%- set flat.messages = flat.messages + [{'role': message['role'], 'content': flat.text}] %}
{%- endif %}
{%- endfor %}
"""
DEFAULT_SYSTEM = """\
{%- if not flat.messages or flat.messages[0]['role'] != 'system' %}
{%- set flat.messages = [{'role': 'system', 'content': SYSTEM}] + flat.messages %}
{%- endif %}
"""
USE_FLAT = "{%- set messages = flat.messages %}"


def build_mllm(
    tower: Tower,
    llm_folder: Path,
    projector: Projector = "mlp2x_gelu",
    select_layer: int = -2,
    system_prompt: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A LLaVA whose every weight comes from the tower or the LLM, but for the projector's, which are drawn from `seed`.

    Args:
        llm_folder: a causal LM in HF layout whose tokenizer has a chat template.
        projector: `mlp2x_gelu`, or `linear` (a stock LLaVA has two layers: the second is then the identity).
        select_layer: the tower's hidden state that the projector reads.
        system_prompt: what the chat template says first; None: whatever the LLM's own template does.

    Raises:
        InputError: if tower and LLM do not fit, before any weight of the LLM is read.
    """
    tower.check_layer(select_layer)
    text_config = _read_text_config(llm_folder)
    if tower.num_image_tokens >= text_config.max_position_embeddings:
        raise InputError(
            f"tower {tower.spec!r} gives {tower.num_image_tokens} image tokens, but the language model {llm_folder} has "
            f"room for {text_config.max_position_embeddings} tokens in all"
        )
    processor = _build_processor(tower, llm_folder, system_prompt)
    text_config.vocab_size = max(text_config.vocab_size, len(processor.tokenizer))
    config = LlavaConfig(
        vision_config=tower.vision_model.config,
        text_config=text_config,
        image_token_index=processor.image_token_id,
        image_seq_length=tower.num_image_tokens,
        projector_hidden_act="linear" if projector == "linear" else "gelu",
        vision_feature_layer=select_layer,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    weights = {VISION_TOWER + key: value for key, value in tower.vision_model.state_dict().items()}
    weights |= _projector_weights(tower.hidden_size, text_config.hidden_size, projector, seed)
    weights |= _llm_weights(llm_folder, text_config.vocab_size)
    model = _assemble(config, weights, dtype)
    _check_image_tokens(model, processor, tower)
    return model, processor


def save_mllm(model: LlavaForConditionalGeneration, processor: LlavaProcessor, folder: Path) -> None:
    """Write the folder anew: config, safetensors, processor, tokenizer, chat template."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_mllm(
    folder: Path | str, dtype: torch.dtype | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A saved LLaVA, from a run folder of stage 1 or 2 (whose weights must be the ones it wrote) or a bare model folder.

    Args:
        dtype: of the weights; None: as they were saved.

    Raises:
        InputError: if the folder is missing or unfinished, or weights are missing, left over, or changed since.
    """
    folder = verified_model_folder(Path(folder))
    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")  # as in training: torchvision's pixels differ
        model, report = LlavaForConditionalGeneration.from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: not a LLaVA that can be loaded ({' '.join(str(error).split())})") from None
    _check_report(report, folder)
    return model, processor


def verified_model_folder(folder: Path) -> Path:
    """The model folder of a run, its weights compared with the run's manifest; a bare model folder as it is."""
    if (folder / "config.json").is_file():
        return folder
    recorded = {name: value for name, value in read_manifest(folder)["weights"].items() if name.startswith("model/")}
    if not recorded:
        raise InputError(f"{folder}: its {MANIFEST} records no model, so this is not the folder of stage 1 or 2")
    for name, expected in recorded.items():
        found = sha256_file(folder / name) if (folder / name).is_file() else "no such file"
        if found != expected:
            raise InputError(
                f"{folder / name}: {found}, but {folder / MANIFEST} records {expected}; run the stage again"
            )
    return folder / "model"


def check_swap(tower: Tower, mllm_folder: Path) -> None:
    """Refuse a tower that is not the one that a trained projector knows.

    Args:
        mllm_folder: a run folder of stage 1 or 2, or a bare model folder (only sizes can be compared then).

    Raises:
        InputError: naming both, if another tower was trained with, or the sizes differ.
    """
    model_folder = mllm_folder if (mllm_folder / "config.json").is_file() else mllm_folder / "model"
    config = read_json(model_folder / "config.json")
    vision = config.get("vision_config", {})
    for name, found, trained in (
        ("hidden size", tower.hidden_size, vision.get("hidden_size")),
        ("image size", tower.image_size, vision.get("image_size")),
        ("image tokens", tower.num_image_tokens, config.get("image_seq_length")),
    ):
        if found != trained:
            raise InputError(
                f"tower {tower.spec!r} has {name} {found}, but the projector in {model_folder} was trained for {trained}: "
                "run stage 1 again (clips-llava align)"
            )
    if (mllm_folder / MANIFEST).is_file():
        trained = read_manifest(mllm_folder)["inputs"].get("tower")
        if trained != tower.weight_hash:
            raise InputError(
                f"tower {tower.spec!r} has hash {tower.weight_hash}, but the projector in {mllm_folder} was trained with "
                f"the tower of hash {trained}: run stage 1 again (clips-llava align)"
            )


def projector_parameters(model: LlavaForConditionalGeneration) -> set[str]:
    """Names of the projector's parameters that training moves; a linear projector's identity stays what it is."""
    frozen = PROJECTOR + "linear_2." if model.config.projector_hidden_act == "linear" else None
    names = {name for name, _ in model.named_parameters() if name.startswith(PROJECTOR)}
    return {name for name in names if frozen is None or not name.startswith(frozen)}


# ---------------------------------------------------------------------------------------------------- configs, processor


def _read_text_config(folder: Path) -> PretrainedConfig:
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"language model {folder}: its config cannot be used ({' '.join(str(error).split())})"
        ) from None
    for name in ("hidden_size", "vocab_size", "max_position_embeddings"):
        if getattr(config, name, None) is None:
            raise InputError(
                f"language model {folder}: model type {config.model_type!r} has no {name}, so it is no decoder LLM"
            )
    return config


def _build_processor(tower: Tower, llm_folder: Path, system_prompt: str | None) -> LlavaProcessor:
    try:
        tokenizer = AutoTokenizer.from_pretrained(llm_folder, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"language model {llm_folder}: no tokenizer ({' '.join(str(error).split())})") from None
    if tokenizer.chat_template is None:
        raise InputError(f"language model {llm_folder}: its tokenizer has no chat template; take the instruct model")
    if tokenizer.eos_token is None:
        raise InputError(f"language model {llm_folder}: its tokenizer has no eos token, so it could never stop")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = chat_template(tokenizer.chat_template, system_prompt)
    return LlavaProcessor(
        image_processor=tower.image_processor,
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy="default" if tower.num_prefix_tokens else "full",
        num_additional_image_tokens=tower.num_prefix_tokens,
        chat_template=tokenizer.chat_template,
    )


def chat_template(llm_template: str, system_prompt: str | None) -> str:
    """An LLM's chat template that also takes a LLaVA's lists of parts and, if wanted, another default system prompt."""
    # json.dumps writes a string that is a Jinja literal too.
    system = "" if system_prompt is None else DEFAULT_SYSTEM.replace("SYSTEM", json.dumps(system_prompt))
    return FLATTEN_PARTS + system + USE_FLAT + llm_template


# --------------------------------------------------------------------------------------------------------------- weights


def _projector_weights(vision_size: int, text_size: int, kind: Projector, seed: int) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = nn.Linear(vision_size, text_size), nn.Linear(text_size, text_size)
    if kind == "linear":
        nn.init.eye_(second.weight)
        nn.init.zeros_(second.bias)
    return {
        f"{PROJECTOR}{name}.{key}": value.detach()
        for name, layer in (("linear_1", first), ("linear_2", second))
        for key, value in layer.state_dict().items()
    }


def _llm_weights(folder: Path, vocab_size: int) -> dict[str, Tensor]:
    """The LLM's weights under their names in a LLaVA, with a row for each token that was added."""
    try:
        llm, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"language model {folder}: cannot be loaded ({' '.join(str(error).split())})") from None
    _check_report(report, folder)
    weights = llm.state_dict()
    names = {module: name for name, module in llm.named_modules()}
    for module in filter(None, (llm.get_input_embeddings(), llm.get_output_embeddings())):
        key = names[module] + ".weight"
        weights[key] = _add_rows(weights[key], vocab_size)
    prefix = llm.base_model_prefix + "."
    return {
        LANGUAGE_MODEL + key.removeprefix(prefix) if key.startswith(prefix) else key: value
        for key, value in weights.items()
    }


def _add_rows(matrix: Tensor, rows: int) -> Tensor:
    """Grow a vocabulary matrix [V, D] to `rows`. New rows are the mean row: never a likely next word, and nothing random."""
    mean = matrix.float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - len(matrix), -1)])


def _assemble(config: LlavaConfig, weights: dict[str, Tensor], dtype: torch.dtype) -> LlavaForConditionalGeneration:
    with torch.device("meta"):
        skeleton = LlavaForConditionalGeneration(config)
    for name, value in skeleton.state_dict().items():
        # A stock LLaVA gives every ViT a pooler that nothing reads. Zeros, since chance is no weight.
        if name.startswith(VISION_TOWER + "pooler.") and name not in weights:
            weights[name] = torch.zeros(value.shape)
    model, report = LlavaForConditionalGeneration.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    _check_report(report, "the assembled LLaVA")
    for part in (model.config, model.config.vision_config, model.config.text_config):
        part.name_or_path = ""  # else a saved config tells where on this machine the parts came from
    return model


def _check_report(report: dict[str, Any], name: Any) -> None:
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            keys = ", ".join(sorted(str(key) for key in report[problem])[:3])
            raise InputError(f"{name}: {problem.replace('_', ' ')} among its weights: {keys} …")


@torch.no_grad()
def _check_image_tokens(model: LlavaForConditionalGeneration, processor: LlavaProcessor, tower: Tower) -> None:
    """Tower, model and processor must agree on the tokens of one picture; off by one is LLaVA's classic."""
    image = Image.new("RGB", (tower.image_size, tower.image_size))
    batch = processor(images=image, text=IMAGE_TOKEN, return_tensors="pt")
    counts = {
        "tower": tower.num_image_tokens,
        "processor": int((batch["input_ids"] == processor.image_token_id).sum()),
        "model": model.model.get_image_features(pixel_values=batch["pixel_values"].to(model.dtype))
        .pooler_output[0]
        .shape[0],
    }
    if len(set(counts.values())) != 1:
        raise InputError(f"tower {tower.spec!r}: image tokens differ: {counts}")
