"""A stage 2 that is kept as its adapters: OUT/adapter in PEFT's own layout, which needs stage 1's model beneath it."""

import copy
import shutil
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoProcessor

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_manifest, sha256_file
from llava_bridge.llm import weight_hash
from llava_bridge.methods import PEFT_PREFIX, merge_lora, quantize
from llava_bridge.mllm import PROJECTOR, Mllm, MllmProcessor, load_mllm

WEIGHTS = "adapter_model.safetensors"


def save_adapter(model: peft.PeftModel, processor: MllmProcessor, base_model: Path, folder: Path) -> None:
    """Write the adapters and the projector as `PeftModel.from_pretrained(stage 1's model, folder)` reads them.

    The projector trains in full and beside PEFT; in the folder it is one of PEFT's `modules_to_save`. The processor lies
    there too: stage 2's may prepare pictures in another way than stage 1's.

    Args:
        base_model: stage 1's model folder, which adapter_config.json names.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    projector = {name: value for name, value in model.state_dict().items() if name.startswith(PEFT_PREFIX + PROJECTOR)}
    weights: dict[str, Tensor] = peft.get_peft_model_state_dict(model, save_embedding_layers=False) | projector
    save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    config = copy.deepcopy(model.peft_config["default"])
    config.modules_to_save = [PROJECTOR.rstrip(".").rpartition(".")[2]]
    config.base_model_name_or_path = base_model.as_posix()
    config.inference_mode = True
    config.save_pretrained(folder)
    processor.save_pretrained(folder)


def load_adapter(run: Path, dtype: torch.dtype | None = None) -> tuple[Mllm, MllmProcessor]:
    """The LLaVA of a stage 2 that was saved as an adapter, merged: computes what `save: merged` would have written.

    Args:
        run: its folder. Stage 1's folder must be where it was, or its path relative to the working directory.
        dtype: of the weights; None: as they were trained.

    Raises:
        InputError: if an adapter or stage 1's model is missing, or is not the one that was trained.
    """
    manifest = read_manifest(run, "tune")
    name = f"{manifest['outputs']['adapter']}/{WEIGHTS}"
    found = sha256_file(run / name) if (run / name).is_file() else "no such file"
    if found != manifest["weights"][name]:
        raise InputError(
            f"{run / name}: {found}, but {run / MANIFEST} records {manifest['weights'][name]}; run the stage again"
        )
    aligned = Path(manifest["config"]["align"])
    trained = getattr(torch, manifest["outputs"]["dtype"])
    base, _ = load_mllm(aligned, trained)
    if weight_hash(aligned / "model") != manifest["inputs"]["align"]:
        raise InputError(f"{run}: its adapter was trained on another model than the one that is in {aligned} now")
    if manifest["config"]["method"] == "qlora":
        quantize(base, trained)  # the adapter was trained on weights rounded to 4 bits
    folder = (run / name).parent
    processor = AutoProcessor.from_pretrained(folder, backend="pil")  # as in training: torchvision's pixels differ
    return merge_lora(peft.PeftModel.from_pretrained(base, folder), dtype or trained), processor
