"""Tower + projector + language model → a stock transformers LLaVA, and back from its folder.

The result holds no code of ours: `AutoModelForImageTextToText` and `AutoProcessor` load the folder.
"""

import json
import shutil
from pathlib import Path
from typing import Any, TypeAlias

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoProcessor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PretrainedConfig,
    PreTrainedModel,
)

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_json, read_manifest, sha256_file
from llava_bridge.config import ImageMode, Projector
from llava_bridge.conversations import IGNORE, Conversation, Encoder, count_image_tokens
from llava_bridge.image_modes import grid_pinpoints, image_processor
from llava_bridge.llm import (
    check_report,
    check_shapes,
    choose_pad,
    read_config,
    read_model,
    read_tokenizer,
    skeleton,
    stop_ids,
    text_logits,
)
from llava_bridge.templates import read_template, shipped_templates
from llava_bridge.towers import Tower

Mllm: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
MllmProcessor: TypeAlias = LlavaProcessor | LlavaNextProcessor
CLASSES = {"llava": LlavaForConditionalGeneration, "llava_next": LlavaNextForConditionalGeneration}  # by model_type

IMAGE_TOKEN = "<image>"
# Where the three parts stand among a stock LLaVA's parameters.
VISION_TOWER, PROJECTOR, LANGUAGE_MODEL = (
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "model.language_model.",
)
IMAGE_NEWLINE = "model.image_newline"  # of anyres alone: what ends a row of tiles' tokens; it trains with the projector

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
    image_mode: ImageMode = "square",
    template: str | None = None,
) -> tuple[Mllm, MllmProcessor]:
    """A LLaVA whose every weight comes from the tower or the LLM, but for the projector's, which are drawn from `seed`.

    Args:
        llm_folder: a causal LM in HF layout.
        projector: `mlp2x_gelu`, or `linear` (a stock LLaVA has two layers: the second is then the identity).
        select_layer: the tower's hidden state that the projector reads.
        system_prompt: what the chat template says first; None: whatever the template itself does.
        image_mode: how pictures become the tower's (`image_modes`); with `anyres` the result is a LlavaNext, and the embedding
            that ends a row of tiles is drawn from `seed` too.
        template: the chat template: a name of `llava_bridge.templates`, or a path that ends in .jinja; None: the LLM's own.

    Raises:
        InputError: if tower and LLM do not fit, before any weight of the LLM is read; if its text logits are others inside the
            LLaVA than outside.
    """
    # ---------------------------------------------------------------------------------------- what fits, by configs alone
    tower.check_layer(select_layer)
    text_config = read_config(llm_folder)
    tokenizer = read_tokenizer(llm_folder)
    rows = max(tokenizer.get_vocab().values()) + 1
    if rows > text_config.vocab_size:
        raise InputError(
            f"language model {llm_folder}: its tokenizer has ids up to {rows - 1}, but the model has {text_config.vocab_size} rows"
        )
    stops = stop_ids(llm_folder, text_config, tokenizer)
    processor = _build_processor(tower, tokenizer, llm_folder, image_mode, template, system_prompt)
    end_of_turn = _end_of_turn(processor, f"language model {llm_folder}")
    choose_pad(tokenizer, {tokenizer.eos_token_id, end_of_turn})
    longest = max(count_image_tokens(processor, _extreme_sizes(tower, image_mode)))
    if longest >= text_config.max_position_embeddings:
        raise InputError(
            f"tower {tower.spec!r} gives {longest} image tokens, but the language model {llm_folder} has "
            f"room for {text_config.max_position_embeddings} tokens in all"
        )
    llm = skeleton(text_config)
    check_shapes(llm_folder, llm)
    text_config.vocab_size = max(text_config.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    text_config.pad_token_id = tokenizer.pad_token_id
    config = _mllm_config(tower, text_config, processor, projector, select_layer, image_mode)
    frame = _frame(config, llm, llm_folder)

    # ------------------------------------------------------------------------------------------------------------ weights
    weights = {VISION_TOWER + key: value for key, value in tower.vision_model.state_dict().items()}
    weights |= _projector_weights(tower.hidden_size, text_config.hidden_size, projector, seed, image_mode)
    llm_weights, expected = _llm_weights(llm_folder, text_config.vocab_size, dtype)
    model = _assemble(config, frame, weights | llm_weights, dtype)
    del weights, llm_weights
    _check_text_logits(model, expected, llm_folder)
    _check_image_tokens(model, processor, tower, _extreme_sizes(tower, image_mode))
    ends = sorted({*stops, end_of_turn})
    model.generation_config.eos_token_id = ends if len(ends) > 1 else ends[0]
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model, processor


def save_mllm(model: Mllm, processor: MllmProcessor, folder: Path) -> None:
    """Write the folder anew: config, safetensors, processor, tokenizer, chat template."""
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_mllm(folder: Path | str, dtype: torch.dtype | None = None) -> tuple[Mllm, MllmProcessor]:
    """A saved LLaVA (of image_mode anyres, a LlavaNext), from a run folder of stage 1 or 2 or a bare model folder.

    The weights of a run folder must be the ones that the run wrote.

    Args:
        dtype: of the weights; None: as they were saved.

    Raises:
        InputError: if the folder is missing or unfinished, or weights are missing, left over, or changed since.
    """
    if (Path(folder) / "adapter").is_dir() and (Path(folder) / MANIFEST).is_file():
        from llava_bridge.adapters import load_adapter  # which builds on this module

        return load_adapter(Path(folder), dtype)  # a stage 2 that kept its adapters apart
    folder = verified_model_folder(Path(folder))
    kind = read_json(folder / "config.json").get("model_type")
    if kind not in CLASSES:
        raise InputError(
            f"{folder / 'config.json'}: its model_type is {kind!r}, and a LLaVA's is one of {', '.join(CLASSES)}"
        )
    try:
        processor = AutoProcessor.from_pretrained(folder, backend="pil")  # as in training: torchvision's pixels differ
        model, report = CLASSES[kind].from_pretrained(
            folder, dtype=dtype or "auto", output_loading_info=True, use_safetensors=True
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise InputError(f"{folder}: not a LLaVA that can be loaded ({' '.join(str(error).split())})") from None
    check_report(report, folder)
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
        manifest = read_manifest(mllm_folder)
        trained = manifest["inputs"].get("tower")
        if manifest["outputs"].get("tower") == "tuned":
            raise InputError(
                f"tower {tower.spec!r} is not the tower in {mllm_folder}: stage 2 tuned that one (tower_learning_rate), and "
                "what was trained knows no other; use the model as it is, or run stage 2 with the tower frozen"
            )
        if trained != tower.weight_hash:
            raise InputError(
                f"tower {tower.spec!r} has hash {tower.weight_hash}, but the projector in {mllm_folder} was trained with "
                f"the tower of hash {trained}: run stage 1 again (clips-llava align)"
            )


def projector_parameters(model: Mllm) -> set[str]:
    """Names of the projector's parameters that training moves; a linear projector's identity stays what it is."""
    frozen = PROJECTOR + "linear_2." if model.config.projector_hidden_act == "linear" else None
    names = {name for name, _ in model.named_parameters() if name.startswith((PROJECTOR, IMAGE_NEWLINE))}
    return {name for name in names if frozen is None or not name.startswith(frozen)}


def fixed_image_tokens(model: Mllm) -> int | None:
    """Tokens of each picture, as an `Encoder` wants it; None: each picture has a number of its own (anyres)."""
    return None if model.config.model_type == "llava_next" else int(model.config.image_seq_length)


# ---------------------------------------------------------------------------------------------------- configs, processor


def _mllm_config(
    tower: Tower,
    text_config: PretrainedConfig,
    processor: MllmProcessor,
    projector: Projector,
    select_layer: int,
    image_mode: ImageMode,
) -> LlavaConfig | LlavaNextConfig:
    common = {
        "vision_config": tower.vision_model.config,
        "text_config": text_config,
        "image_token_index": processor.image_token_id,
        "image_seq_length": tower.num_image_tokens,  # of anyres, those of one tile
        "projector_hidden_act": "linear" if projector == "linear" else "gelu",
        "vision_feature_layer": select_layer,
        "vision_feature_select_strategy": processor.vision_feature_select_strategy,
        "tie_word_embeddings": text_config.tie_word_embeddings,
    }
    if image_mode == "anyres":
        return LlavaNextConfig(**common, image_grid_pinpoints=grid_pinpoints(tower.image_size))
    return LlavaConfig(**common)


def _build_processor(
    tower: Tower,
    tokenizer: Any,
    llm_folder: Path,
    image_mode: ImageMode,
    template: str | None,
    system_prompt: str | None,
) -> MllmProcessor:
    """The MLLM's processor; its tokenizer is `tokenizer`, to which the token of a picture is added."""
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own  # some have another for tools, say
    text = own if template is None else read_template(template)
    if text is None:
        raise InputError(
            f"language model {llm_folder}: its tokenizer has no chat template; take the instruct model, or set template to one "
            f"of {', '.join(shipped_templates())}"
        )
    if "strftime_now" in text:
        raise InputError(
            f"language model {llm_folder}: its chat template writes today's date, so that what is learned would change from day to "
            f"day; set template to one of {', '.join(shipped_templates())} that is of its format, or to a file of your own"
        )
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True, normalized=False)], special_tokens=True)
    tokenizer.chat_template = chat_template(text, system_prompt)
    kind = LlavaNextProcessor if image_mode == "anyres" else LlavaProcessor
    return kind(
        image_processor=image_processor(tower, image_mode),
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


def _end_of_turn(processor: MllmProcessor, name: str) -> int:
    """The token that the chat template puts after an answer, at which generation has to stop.

    Found by encoding a conversation as stage 2 does: what is learned there are the answers' words and this token.

    Raises:
        InputError: if stage 2 could not learn from the template, or no special token follows an answer.
    """
    turns = ("What is it?", "A bird.", "How many?", "Two.")
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns))
    sample = Encoder(processor, num_image_tokens=0, max_length=2**31).chat(Conversation(name, (), messages))
    learned = sample.labels[sample.labels != IGNORE].tolist()
    special = {*processor.tokenizer.all_special_ids, *processor.tokenizer.added_tokens_decoder}
    for token in learned:
        if token in special:
            return int(token)
    ends = processor.tokenizer.decode(learned)
    raise InputError(
        f"{name}: its chat template ends answers with words ({ends!r}) and no token of the tokenizer's own, so that generation "
        "could not stop there; choose a template of the tokenizer's format"
    )


# --------------------------------------------------------------------------------------------------------------- weights


def _projector_weights(
    vision_size: int, text_size: int, kind: Projector, seed: int, image_mode: ImageMode
) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        first, second = nn.Linear(vision_size, text_size), nn.Linear(text_size, text_size)
        newline = torch.randn(text_size) / text_size**0.5  # as LLaVA-NeXT draws it
    if kind == "linear":
        nn.init.eye_(second.weight)
        nn.init.zeros_(second.bias)
    weights = {
        f"{PROJECTOR}{name}.{key}": value.detach()
        for name, layer in (("linear_1", first), ("linear_2", second))
        for key, value in layer.state_dict().items()
    }
    return weights | ({IMAGE_NEWLINE: newline} if image_mode == "anyres" else {})


def _llm_weights(folder: Path, vocab_size: int, dtype: torch.dtype) -> tuple[dict[str, Tensor], Tensor]:
    """The LLM's weights under their names in a LLaVA, with a row for each token that was added; and its logits in `dtype`."""
    llm = read_model(folder)
    weights = llm.state_dict()
    for parameter in llm.parameters():  # as `from_pretrained` does: rotary frequencies, which are buffers, stay in fp32
        parameter.data = parameter.data.to(dtype)
    logits = text_logits(llm)  # `weights` keep the type that they are stored in
    names = {module: name for name, module in llm.named_modules()}
    for module in filter(None, (llm.get_input_embeddings(), llm.get_output_embeddings())):
        key = names[module] + ".weight"
        weights[key] = _add_rows(weights[key], vocab_size)
    return {_name_inside(key, llm): value for key, value in weights.items()}, logits


def _name_inside(name: str, llm: PreTrainedModel) -> str:
    """An LLM's parameter by its name in a LLaVA."""
    prefix = llm.base_model_prefix + "."
    return LANGUAGE_MODEL + name.removeprefix(prefix) if name.startswith(prefix) else name


def _add_rows(matrix: Tensor, rows: int) -> Tensor:
    """Grow a vocabulary matrix [V, D] to `rows`. New rows are the mean row: never a likely next word, and nothing random."""
    mean = matrix.float().mean(0, keepdim=True).to(matrix.dtype)
    return torch.cat([matrix, mean.expand(rows - len(matrix), -1)])


def _frame(config: LlavaConfig | LlavaNextConfig, llm: PreTrainedModel, folder: Path) -> Mllm:
    """The LLaVA that a config describes, without weights; it must have a place for each of the language model's.

    Which is so for decoders whose parts are named as Llama's, with a vocabulary's matrix and no bias at the end.
    """
    misfit = f"language model {folder}: model type {llm.config.model_type!r} does not fit a stock LLaVA, which has"
    given = {_name_inside(name, llm) for name in llm.state_dict()}
    if LANGUAGE_MODEL + "embed_tokens.weight" not in given:
        raise InputError(f"{misfit} its words' embeddings in embed_tokens")
    with torch.device("meta"):
        frame = CLASSES[config.model_type](config)
    places = {name for name in frame.state_dict() if not name.startswith((VISION_TOWER, PROJECTOR, IMAGE_NEWLINE))}
    for problem, names in (("no place for", given - places), ("places that it leaves empty:", places - given)):
        if names:
            raise InputError(f"{misfit} {problem} {', '.join(sorted(names)[:3])}{' …' if len(names) > 3 else ''}")
    return frame


def _assemble(
    config: LlavaConfig | LlavaNextConfig, frame: Mllm, weights: dict[str, Tensor], dtype: torch.dtype
) -> Mllm:
    for name, value in frame.state_dict().items():
        # A stock LLaVA gives every ViT a pooler that nothing reads. Zeros, since chance is no weight.
        if name.startswith(VISION_TOWER + "pooler.") and name not in weights:
            weights[name] = torch.zeros(value.shape)
    model, report = type(frame).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
    )
    check_report(report, "the assembled LLaVA")
    for part in (model.config, model.config.vision_config, model.config.text_config):
        part.name_or_path = ""  # else a saved config tells where on this machine the parts came from
    return model


# ---------------------------------------------------------------------------------------------------- the last guards


def _check_text_logits(model: Mllm, expected: Tensor, folder: Path) -> None:
    """The LLM must say the same inside the LLaVA as outside: some scale their embeddings or logits in places of their own."""
    found = text_logits(model)[:, : expected.shape[1]]
    difference = ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()
    if not difference < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise InputError(
            f"language model {folder}: inside a stock LLaVA its logits differ from its own by {difference:.1e} of the largest, so "
            f"that model type {model.config.text_config.model_type!r} cannot be used there"
        )


def _extreme_sizes(tower: Tower, image_mode: ImageMode) -> list[tuple[int, int]]:
    """Sizes (height, width) of pictures among which are those with the most tokens."""
    side = tower.image_size
    if image_mode != "anyres":
        return [(side, side)]
    pinpoints = [(height, width) for height, width in grid_pinpoints(side)]
    return [(side, side), *pinpoints, (2 * side + 1, side + 5), (side // 2, 7 * side + 3), (5 * side + 1, 3)]


@torch.no_grad()
def _check_image_tokens(model: Mllm, processor: MllmProcessor, tower: Tower, sizes: list[tuple[int, int]]) -> None:
    """Tower, model and processor must agree on the tokens of a picture; off by one is LLaVA's classic."""
    for height, width in sizes:
        image = Image.new("RGB", (width, height))
        batch = processor(images=image, text=IMAGE_TOKEN, return_tensors="pt")
        counts = {
            "processor": int((batch["input_ids"] == processor.image_token_id).sum()),
            "processor, from the size alone": count_image_tokens(processor, [(height, width)])[0],
        }
        pixels = batch["pixel_values"].to(model.dtype)
        if (height, width) == sizes[0]:  # the tower itself runs once: a picture has up to six tiles
            options = {"image_sizes": batch["image_sizes"]} if "image_sizes" in batch else {}
            counts["model"] = len(model.model.get_image_features(pixel_values=pixels, **options).pooler_output[0])
        if "image_sizes" in batch:
            tiles = [torch.zeros(pixels.shape[1], tower.num_image_tokens, 1)]
            strategy = model.config.vision_feature_select_strategy
            packed, _ = model.model.pack_image_features(tiles, batch["image_sizes"], strategy, torch.zeros(1))
            counts["model, from tiles of the tower's tokens"] = len(packed[0])
        else:
            counts["tower"] = tower.num_image_tokens
        if len(set(counts.values())) != 1:
            raise InputError(f"tower {tower.spec!r}: tokens of a picture of {width} × {height} pixels differ: {counts}")
