"""The loss of a LLaVA on conversations that it was not trained on, as training counts it."""

from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from clips_core.config import FORBID, to_dict
from clips_core.errors import InputError
from clips_core.folders import sha256_file, write_json
from llava_bridge.config import ConversationConfig, Precision


@dataclass(config=FORBID, kw_only=True)
class HeldOutConfig:
    """What is read, and by which model."""

    model: Path  # a run of stage 1 or 2, or a LLaVA's folder
    data: ConversationConfig
    out: Path  # a .json file that gets the figures
    stage: Literal["align", "tune"] = (
        "align"  # align: captions, as stage 1 reads them; tune: conversations, as stage 2 does
    )
    batch_size: int = 8
    precision: Precision = "auto"


def held_out_loss(config: HeldOutConfig) -> float:
    """Mean cross-entropy over all learned tokens of the conversations, written to `config.out` with what it was made of.

    Raises:
        InputError: if the model or the conversations cannot be read, or a conversation has nothing to learn.
    """
    import torch
    from tqdm import tqdm

    from llava_bridge.batching import Collator
    from llava_bridge.conversations import IGNORE, Encoder, read_conversations
    from llava_bridge.loss import supervised_loss
    from llava_bridge.mllm import fixed_image_tokens, load_mllm
    from llava_bridge.precision import resolve_precision

    if config.out.suffix != ".json":
        raise InputError(f"out={config.out}: name a .json file")
    conversations = read_conversations(config.data.json, config.data.images)
    dtype = resolve_precision(config.precision)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, processor = load_mllm(config.model, dtype)
    model.to(device).eval()
    encoder = Encoder(processor, fixed_image_tokens(model), config.data.max_length, config.data.caption_end)
    encode = encoder.plain if config.stage == "align" else encoder.chat
    samples = sorted(map(encode, conversations), key=len)  # like lengths together: little padding
    collate, total, labels = Collator(processor), 0.0, 0
    for start in tqdm(range(0, len(samples), config.batch_size), desc="held-out loss", unit="batch"):
        batch = {name: value.to(device) for name, value in collate(samples[start : start + config.batch_size]).items()}
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            total += float(supervised_loss(model, model.get_output_embeddings(), batch))
        labels += int((batch["labels"][:, 1:] != IGNORE).sum())
    loss = total / labels
    write_json(
        config.out,
        {
            "loss": loss,
            "labels": labels,
            "samples": len(samples),
            "config": to_dict(config),
            "data": sha256_file(config.data.json),
        },
    )
    print(f"{config.model}: {loss:.4f} a token over {labels} tokens of {len(samples)} held-out conversations")
    return loss
