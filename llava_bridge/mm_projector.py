"""A projector between a stock LLaVA of ours and the original LLaVA's `mm_projector.bin`: both ways, bit by bit."""

import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clips_core.errors import InputError
from clips_core.folders import read_json, replacing
from llava_bridge.config import Projector
from llava_bridge.mllm import PROJECTOR, Mllm

# The original's names (it numbers an MLP's layers) and a stock LLaVA's. A linear projector's second layer is the identity there.
NAMES: dict[Projector, dict[str, str]] = {
    "mlp2x_gelu": {
        "0.weight": "linear_1.weight", "0.bias": "linear_1.bias",
        "2.weight": "linear_2.weight", "2.bias": "linear_2.bias",
    },
    "linear": {"weight": "linear_1.weight", "bias": "linear_1.bias"},
}  # fmt: skip
_PREFIX = "model.mm_projector."  # of the original's keys


def read_mm_projector(file: Path) -> tuple[Projector, dict[str, Tensor]]:
    """The projector of an `mm_projector.bin` (or of the original's LoRA, `non_lora_trainables.bin`).

    Returns:
        its type, and its weights under a stock LLaVA's names (linear_1.weight [D_text, D_vision], …), as they were stored.

    Raises:
        InputError: if the file is missing or more than plain tensors, or is no projector of the two types that a stock LLaVA has.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except Exception as error:  # torch raises nearly anything on what is not its own, or is more than tensors
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file} cannot be read as plain tensors, and whatever else it holds is not run ({reason})"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{file}: must be a dict of tensors")
    weights = {re.sub(r"^.*\bmm_projector\.", "", name): value for name, value in state.items()}
    kind = next((kind for kind, names in NAMES.items() if names.keys() == weights.keys()), None)
    if kind is None:
        raise InputError(
            f"{file} holds {', '.join(sorted(state)[:6]) or 'nothing'}; a stock LLaVA takes the projectors "
            "mlp2x_gelu (0.weight, 0.bias, 2.weight, 2.bias) and linear (weight, bias), and nothing beside them"
        )
    ours = {NAMES[kind][name]: value for name, value in weights.items()}
    _check_shapes(ours, file)
    return kind, ours


def write_mm_projector(model_folder: Path, file: Path) -> Projector:
    """Write the projector of a stock LLaVA's folder (OUT/model of stage 1 or 2) as the original's `mm_projector.bin`.

    Returns:
        its type: the original's `--mm_projector_type`.

    Raises:
        InputError: if the folder holds no projector that the original has.
    """
    activation = read_json(model_folder / "config.json").get("projector_hidden_act")
    kinds: dict[str, Projector] = {"gelu": "mlp2x_gelu", "linear": "linear"}
    if activation not in kinds:
        raise InputError(
            f"{model_folder / 'config.json'}: projector_hidden_act {activation!r} is none of the original's"
        )
    kind = kinds[activation]
    ours = _stored_projector(model_folder)
    wanted = set(NAMES["mlp2x_gelu"].values())
    if ours.keys() != wanted:
        raise InputError(f"{model_folder}: its projector has {sorted(ours)}, and not {sorted(wanted)}")
    if kind == "linear":
        second = ours["linear_2.weight"]
        if not torch.equal(second, torch.eye(len(second), dtype=second.dtype)) or ours["linear_2.bias"].any():
            raise InputError(
                f"{model_folder}: its second layer is not the identity, so it is two linear layers, not one"
            )
    _check_shapes(ours, model_folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as opened:
        torch.save({_PREFIX + name: ours[our_name].contiguous() for name, our_name in NAMES[kind].items()}, opened)
    return kind


@torch.no_grad()
def load_mm_projector(model: Mllm, file: Path) -> None:
    """Put the projector of an `mm_projector.bin` into a LLaVA, in the LLaVA's precision.

    Raises:
        InputError: if type or sizes differ, naming both.
    """
    kind, weights = read_mm_projector(file)
    wanted: Projector = "linear" if model.config.projector_hidden_act == "linear" else "mlp2x_gelu"
    if kind != wanted:
        raise InputError(f"{file} is of type {kind}, but the LLaVA was built with projector={wanted}")
    parameters = {name.removeprefix(PROJECTOR): value for name, value in model.named_parameters() if PROJECTOR in name}
    found, needed = (tuple(w["linear_1.weight"].shape) for w in (weights, parameters))
    if found != needed:
        raise InputError(
            f"{file} leads from width {found[1]} to {found[0]}, but this tower and language model have "
            f"widths {needed[1]} and {needed[0]}"
        )
    for name, value in weights.items():
        parameters[name].copy_(value)


def _stored_projector(folder: Path) -> dict[str, Tensor]:
    """What stands under `multi_modal_projector.` in a folder's weights, one file or several."""
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118, it is no dict
                    before, found, after = name.partition("multi_modal_projector.")
                    if found and before in ("", "model."):
                        weights[after] = tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: cannot be read ({' '.join(str(error).split())})") from None
    return weights


def _check_shapes(weights: dict[str, Tensor], source: Path) -> None:
    """A projector [D_text, D_vision] whose other parts fit it."""
    width = weights["linear_1.weight"].shape[0]
    expected = {"linear_1.bias": (width,), "linear_2.weight": (width, width), "linear_2.bias": (width,)}
    for name, value in weights.items():
        wanted = expected.get(name, value.shape)
        if value.shape != wanted or not value.is_floating_point() or (name == "linear_1.weight" and value.ndim != 2):
            raise InputError(f"{source}: {name} is {tuple(value.shape)} {value.dtype}, which is no part of a projector")
