"""How many tokens each conversation has: found once, by all processes together, and kept with the run.

The order of a training follows from the lengths of all samples, and mix-665K takes one process a quarter of an hour to render
and tokenize. So the processes of a launch deal the work out through the run's folder, and a run that goes on finds it done.
"""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from clips_core.folders import claimed, write_bytes
from llava_bridge.conversations import Conversation, Encoder, Sample

PART = 10_000  # conversations of a file


def encoding_key(encoder: Encoder, stage: str, data_hash: str) -> str:
    """Hex SHA-256 of all that lengths depend on."""
    depends = {
        "data": data_hash,
        "stage": stage,
        "tokenizer": encoder.processor.tokenizer.backend_tokenizer.to_str(),
        "template": encoder.processor.chat_template,
        "image_tokens": encoder.num_image_tokens,
        "max_length": encoder.max_length,
        "caption_end": encoder.caption_end,
    }
    return hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()


def sample_lengths(
    conversations: Sequence[Conversation], wanted: Sequence[int], encode: Callable[[Conversation], Sample], folder: Path
) -> dict[int, int]:
    """Tokens of each of the `wanted` conversations, which are all encoded once: so none of them is bad.

    Args:
        wanted: their numbers, ascending.
        folder: of the parts that are found, `folder`/0.npy and so on. Processes that share it share the work.

    Raises:
        BadSample: naming the sample, of the first that cannot be learned from.
    """
    parts = [wanted[start : start + PART] for start in range(0, len(wanted), PART)]
    if len(parts) == 1:  # seconds
        return dict(zip(wanted, _encoded(conversations, wanted, encode), strict=True))
    paths = [folder / f"{number}.npy" for number in range(len(parts))]
    for wait in (False, True):  # first what nobody has begun, then what others have not finished, or were killed in
        for path, part in zip(paths, parts, strict=True):
            if path.exists():
                continue
            with claimed(folder / f"{path.stem}.claim", wait) as ours:
                if ours and not path.exists():
                    file = io.BytesIO()
                    np.save(file, np.array(_encoded(conversations, part, encode), dtype=np.int32), allow_pickle=False)
                    write_bytes(path, file.getvalue())
    lengths = np.concatenate([np.load(path, allow_pickle=False) for path in paths])
    return dict(zip(wanted, lengths.tolist(), strict=True))


def _encoded(
    conversations: Sequence[Conversation], numbers: Sequence[int], encode: Callable[[Conversation], Sample]
) -> list[int]:
    return [len(encode(conversations[i])) for i in tqdm(numbers, desc="tokenizing", unit="sample")]
