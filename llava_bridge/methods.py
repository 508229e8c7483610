"""What of a LLaVA trains, and how: parts in full, adapters on the language model (LoRA), the same over 4 bits (QLoRA).

Which part does what is a stage's contract. It is printed as a table and asserted before the first step.
"""

import os
import re
import warnings
from collections.abc import Collection, Iterable
from types import ModuleType
from typing import Literal

import peft
import torch
from torch import nn

from clips_core.errors import InputError
from llava_bridge.config import LoraConfig, TuneConfig
from llava_bridge.mllm import IMAGE_NEWLINE, LANGUAGE_MODEL, PROJECTOR, VISION_TOWER, Mllm

Role = Literal["frozen", "trained"]
PARTS = ("vision tower", "projector", "language model", "adapters")
PEFT_PREFIX = "base_model.model."  # before the names of a model that PEFT has wrapped
ALIGN_CONTRACT: dict[str, Role] = {
    "vision tower": "frozen", "projector": "trained", "language model": "frozen", "adapters": "frozen"
}  # fmt: skip


def tune_contract(config: TuneConfig) -> dict[str, Role]:
    """What each part does in stage 2."""
    full = config.method == "full"
    return {
        "vision tower": "frozen" if config.tower_learning_rate is None else "trained",
        "projector": "trained",
        "language model": "trained" if full else "frozen",
        "adapters": "frozen" if full else "trained",
    }


def part_of(name: str) -> str:
    """The part of a LLaVA, wrapped by PEFT or not, that a parameter belongs to."""
    return (
        "vision tower" if VISION_TOWER in name
        else "projector" if PROJECTOR in name or IMAGE_NEWLINE in name
        else "adapters" if ".lora_" in name
        else "language model"
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- names that may train


def language_parameters(model: nn.Module) -> set[str]:
    """Names of all weights of the language model, embeddings and head included."""
    return {name for name, _ in model.named_parameters() if part_of(name) == "language model"}


def tower_parameters(model: Mllm) -> set[str]:
    """Names of the tower's parameters that its features depend on.

    The blocks after the select layer, the last LayerNorm and a pooler have no effect there: no gradient would reach them.
    Found by asking autograd, so it holds for any kind of tower.
    """
    tower, layers = model.model.vision_tower, model.config.vision_feature_layer
    size = model.config.vision_config.image_size
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(VISION_TOWER)}
    first = next(iter(parameters.values()))
    picture = torch.zeros(1, 3, size, size, dtype=first.dtype, device=first.device)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    states = tower(picture, output_hidden_states=True).hidden_states
    features = [states[layer].float().sum() for layer in ([layers] if isinstance(layers, int) else layers)]
    gradients = torch.autograd.grad(torch.stack(features).sum(), list(parameters.values()), allow_unused=True)
    return {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}


def wrapped(names: Iterable[str]) -> set[str]:
    """Names of a model's parameters once PEFT has wrapped it."""
    return {PEFT_PREFIX + name for name in names}


# ------------------------------------------------------------------------------------------------------- LoRA and QLoRA


def add_lora(base: Mllm, config: LoraConfig, seed: int) -> tuple[peft.PeftModel, set[str]]:
    """Adapters on every linear layer of the language model, and nowhere else.

    Returns:
        the wrapped model, and the names of the adapters' parameters.
    """
    layers = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    kinds = sorted({name.rpartition(".")[2] for name in layers if name.startswith(LANGUAGE_MODEL)})
    lora = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=rf"{re.escape(LANGUAGE_MODEL)}.*\.({'|'.join(kinds)})",
    )
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of transformers, at peft's address
        model = peft.get_peft_model(base, lora)
    return model, {name for name, _ in model.named_parameters() if part_of(name) == "adapters"}


def merge_lora(model: peft.PeftModel, dtype: torch.dtype) -> Mllm:
    """The adapters added into the weights, in fp32: in bf16 most of a small change would be rounded away twice.

    Weights in 4 bits are what they stand for from here on, so the result computes what was trained.
    """
    dequantize(model)
    return model.float().merge_and_unload().to(dtype)


def quantize(model: Mllm, dtype: torch.dtype) -> None:
    """The linear layers of the language model's blocks → 4 bits, in place (NF4 with nested scales, as QLoRA).

    Head, embeddings, norms, projector and tower stay as they are.

    Args:
        dtype: in which the layers multiply.
    """
    bnb = bitsandbytes()
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"  # seconds, or minutes
    language = model.model.language_model
    layers = {name: module for name, module in language.named_modules() if isinstance(module, nn.Linear)}
    for name, layer in layers.items():
        small = bnb.nn.Linear4bit(
            layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4",
            device="meta",
        )  # fmt: skip
        weight = layer.weight.detach()
        small.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=small).to(device)
        small.bias = layer.bias
        language.set_submodule(name, small)


def dequantize(model: nn.Module) -> None:
    """Layers in 4 bits → plain linear layers of the values that they stand for, in place; a model without any stays."""
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    for name, layer in layers.items():
        weight = bitsandbytes().functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        plain.weight = nn.Parameter(weight, requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(name, plain)


def bitsandbytes() -> ModuleType:
    """The library, or what to do about its absence."""
    try:
        import bitsandbytes as library
    except ImportError:
        raise InputError("method=qlora needs bitsandbytes: run  pip install bitsandbytes") from None
    return library


# --------------------------------------------------------------------------------------------------------- the contract


def set_trainable(model: nn.Module, names: set[str], idle: Collection[str] = (), in_fp32: bool = True) -> None:
    """Train exactly these parameters.

    Args:
        idle: parameters of parts that train which do not; a part is of one type.
        in_fp32: keep both in fp32, since bf16 would swallow small steps (unless the optimizer holds a copy in fp32).

    Raises:
        RuntimeError: if a name is not the model's.
    """
    parameters = dict(model.named_parameters())
    wrong = sorted(name for name in names if name not in parameters)
    if wrong or not names:
        raise RuntimeError(f"not to be trained: {wrong[:3]}")
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
        if in_fp32 and (name in names or name in idle):
            parameter.data = parameter.data.float()


def check_contract(model: nn.Module, contract: dict[str, Role], idle: Collection[str] = ()) -> None:
    """Every parameter of a trained part trains, and none of a frozen part does.

    Args:
        idle: names (ends of names) in trained parts that have no effect, or are what they are for good.

    Raises:
        RuntimeError: naming the first parameters that break the contract.
    """
    wrong = [
        f"{name} ({part_of(name)} {contract[part_of(name)]}, but it {'trains' if p.requires_grad else 'does not'})"
        for name, p in model.named_parameters()
        if p.requires_grad != (contract[part_of(name)] == "trained" and not (idle and name.endswith(tuple(idle))))
    ]
    if wrong:
        raise RuntimeError(f"{len(wrong)} parameters break the stage's contract: {'; '.join(wrong[:3])}")


def count_parameters(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters in all and trainable ones, per part of a LLaVA. A weight in 4 bits counts as one."""
    counts = {part: {"parameters": 0, "trainable": 0} for part in PARTS}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        count = parameter.numel() if state is None else state.shape.numel()
        counts[part_of(name)]["parameters"] += count
        counts[part_of(name)]["trainable"] += count * parameter.requires_grad
    return counts


def trainable_table(model: nn.Module) -> str:
    """What trains and what does not, as a table to print."""
    rows = [
        f"{part:<16}{count['parameters']:>14,}{count['trainable']:>14,}"
        for part, count in count_parameters(model).items()
        if count["parameters"]
    ]
    return "\n".join([f"{'part':<16}{'parameters':>14}{'trainable':>14}", *rows])
