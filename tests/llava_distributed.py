"""Run under torchrun by test_parallel_llava.py: what a JSON file lists, one after the other.

`["align" | "tune", recipe, moment]` trains; where `moment` is not null, the process of rank 1 dies then. `["fsdp", folder, null]`
shards a LLaVA by hand. Each process writes what it holds of a model to OUT/held-RANK.json.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llava_runs import World
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from clips_core.config import load_config
from llava_bridge import train
from llava_bridge.batching import Collator
from llava_bridge.config import AlignConfig, TuneConfig
from llava_bridge.conversations import Encoder, read_conversations
from llava_bridge.loss import supervised_loss
from llava_bridge.mllm import load_mllm
from llava_bridge.parallel import layer_classes

RANK = int(os.environ["RANK"])


def size(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def held(trainer: train.StageTrainer) -> dict[str, int]:
    """Bytes of weights and of optimizer state in this process."""
    optimizer: Any = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # Accelerate's around DeepSpeed's around torch's
        optimizer = optimizer.optimizer
    return {
        "weights": size(getattr(p, "ds_tensor", p) for p in trainer.model.parameters()),
        "optimizer": size(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)),
    }


def run(stage: str, recipe: str, moment: str | None) -> None:
    config = load_config(AlignConfig if stage == "align" else TuneConfig, recipe)
    finish = train.finish
    save = train.StageTrainer._save_optimizer_and_scheduler

    def finish_and_tell(*arguments: Any) -> None:
        (config.out / f"held-{RANK}.json").write_text(json.dumps(held(arguments[3])))
        finish(*arguments)

    def save_or_die(self: train.StageTrainer, folder: str) -> None:
        if moment == "while checkpoint 4 is written" and folder.endswith("checkpoint-4") and RANK == 1:
            os._exit(9)
        save(self, folder)

    train.finish, train.StageTrainer._save_optimizer_and_scheduler = finish_and_tell, save_or_die  # type: ignore[method-assign]
    train.align(config) if isinstance(config, AlignConfig) else train.tune(config)
    train.finish, train.StageTrainer._save_optimizer_and_scheduler = finish, save  # type: ignore[method-assign]


def shard(folder: Path) -> None:
    """FSDP2 by hand with our layer classes: one process has a picture, the other none. Gradients are saved whole."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    world = World(folder)
    model, processor = load_mllm(folder / "align", torch.float32)
    model.requires_grad_(True)
    whole = size(model.parameters())
    for module in [m for m in model.modules() if type(m) in layer_classes(model)]:
        fully_shard(module)
    fully_shard(model)
    config = world.tune_config("fsdp")
    conversations = read_conversations(config.data.json, config.data.images)
    encoder = Encoder(processor, model.config.image_seq_length, 2048)
    samples = [encoder.chat(c) for c in conversations]
    mine = [s for s in samples if bool(s.images) == (RANK == 0)][:2]
    head: nn.Module = model.get_output_embeddings()
    loss = supervised_loss(model, head, Collator(processor)(mine))
    loss.backward()
    state = {"loss": loss.item(), "held": size(p.to_local() for p in model.parameters() if isinstance(p, DTensor))}
    assert all(isinstance(p, DTensor) for p in model.parameters())
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    config.out.mkdir(exist_ok=True)
    (config.out / f"held-{RANK}.json").write_text(json.dumps(state | {"whole": whole}))
    if RANK == 0:
        torch.save(gradients, config.out / "gradients.pt")
    dist.barrier()


if __name__ == "__main__":
    for kind, place, moment in json.loads(Path(sys.argv[1]).read_text()):
        shard(Path(place)) if kind == "fsdp" else run(kind, place, moment)
