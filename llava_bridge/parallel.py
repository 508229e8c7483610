"""Several processes: DeepSpeed's ZeRO through transformers' Trainer, and the layers that FSDP shards by.

ddp needs nothing of this. zero2 and zero3 are built here from the config; a session sets up what Accelerate and DeepSpeed
look for, also on a CPU (gloo), and leaves no trace of it for the next training in this process.
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from torch import nn

from clips_core.errors import InputError
from llava_bridge.config import Parallel, StageConfig
from llava_bridge.llm import default_cache

INSTALL_DEEPSPEED = "DS_BUILD_OPS=0 pip install deepspeed"


def world_size() -> int:
    """How many processes torchrun started (1 without it)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launch(config: StageConfig, dtype: torch.dtype) -> None:
    """Refuse what would train otherwise than the config says, before any work.

    Raises:
        InputError: saying what is missing, or how to start it.
    """
    on_gpu, processes = torch.cuda.is_available(), world_size()
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        where = (
            "its checkpoints do not resume exactly" if on_gpu else "on a CPU Accelerate does not shard, without a word"
        )
        raise InputError(f"ACCELERATE_USE_FSDP is set, but {where}: unset it and take parallel=zero3, which shards")
    if on_gpu and torch.cuda.device_count() > 1 and processes == 1 and "LOCAL_RANK" not in os.environ:
        raise InputError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: start one process for each with torchrun, "
            "or choose one with CUDA_VISIBLE_DEVICES"
        )
    if config.batch_size % processes:
        raise InputError(f"batch_size {config.batch_size} is not a multiple of {processes} processes")
    share = config.batch_size // processes
    if share % samples_at_once(config):
        raise InputError(
            f"batch_size {config.batch_size} over {processes} processes is {share} samples each, which is not a multiple "
            f"of device_batch_size {config.device_batch_size}"
        )
    if config.parallel == "ddp":
        return
    if importlib.util.find_spec("deepspeed") is None:
        raise InputError(f"parallel={config.parallel} needs deepspeed: run  {INSTALL_DEEPSPEED}")
    if "LOCAL_RANK" not in os.environ:
        raise InputError(f"parallel={config.parallel}: start with torchrun (torchrun --nproc-per-node GPUS …)")
    if not on_gpu and dtype != torch.float32:
        raise InputError(f"parallel={config.parallel} computes in fp32 on a CPU: set precision=float32")


def samples_at_once(config: StageConfig) -> int:
    """Samples that a process works on at once: device_batch_size, or its share of the batch where that is less."""
    share = config.batch_size // world_size()
    return min(config.device_batch_size or share, share)


def deepspeed_config(config: StageConfig, dtype: torch.dtype, hidden_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration of zero2 or zero3.

    With bf16, weights and gradients are in bf16, and the optimizer holds the weights once more in fp32, dealt out over the
    processes. Buckets are sized by the language model's width, as transformers' "auto" does it.

    Args:
        hidden_size: width of the language model.
    """
    at_once = samples_at_once(config)
    zero: dict[str, Any] = {
        "stage": 3 if config.parallel == "zero3" else 2,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
        "reduce_bucket_size": hidden_size * hidden_size,
    }
    if config.parallel == "zero3":
        zero |= {
            "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
            "stage3_param_persistence_threshold": 10 * hidden_size,
            "stage3_gather_16bit_weights_on_model_save": True,  # the result is put together on the main process
        }
    return {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": at_once,
        "gradient_accumulation_steps": config.batch_size // (world_size() * at_once),
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,  # torch's AdamW, the same as without ZeRO
        "zero_optimization": zero,
    }


@contextlib.contextmanager
def session(parallel: Parallel) -> Iterator[None]:
    """Around a training and the saving of its result: whatever ZeRO needs in this process, and only as long."""
    if parallel == "ddp":
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # DeepSpeed reads its checkpoints with full pickle. torch's switch makes that safe: tensors, and these three types.
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default_cache() / "torch_extensions"))  # compiled once, then kept
    AcceleratorState._reset_state(reset_partial_state=True)
    if not torch.cuda.is_available():
        # Left to themselves, Accelerate and the Trainer would run one lone training in each process.
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        PartialState(backend="gloo")
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        for name in ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "ACCELERATE_USE_DEEPSPEED"):
            os.environ.pop(name, None)
        unset_hf_deepspeed_config()
        AcceleratorState._reset_state(reset_partial_state=True)


def layer_classes(model: Any) -> list[type[nn.Module]]:
    """The classes that FSDP wraps one by one: the language model's decoder layer and the tower's layer."""
    return [_repeated(model.model.language_model), _repeated(model.model.vision_tower)]


def _repeated(part: nn.Module) -> type[nn.Module]:
    """The class of the blocks that a transformer is a stack of."""
    stack = max((m for m in part.modules() if isinstance(m, nn.ModuleList)), key=len)
    return type(stack[0])
