"""Features of pictures, and of their captions, to parquet: `clips-llava embed`."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic.dataclasses import dataclass
from torch import Tensor

from clips_core import pictures, zero_shot
from clips_core.config import FORBID
from clips_core.pictures import Picture, PicturesConfig


@dataclass(config=FORBID)
class EmbedConfig(PicturesConfig):
    """Which model embeds which pictures, and what is stored."""

    caption: str | None = None  # extension, or json.FIELD; null: pictures alone
    dtype: Literal["float16", "float32"] = "float16"  # of the stored features


def embed_pictures(config: EmbedConfig) -> Path:
    """Write L2-normalised features, a parquet file a shard (or 10,000 files of a folder).

    Columns: `key`, `shard` (null for a file), `image_embedding` (a list of E numbers); with `caption`, also `caption` and
    `text_embedding`, both null for a picture without one.

    Returns:
        `config.out`, with the parquet files, skipped.jsonl (pictures that could not be read) and manifest.json.

    Raises:
        InputError: see `formats.load_model` and `pictures.go_over`.
    """
    model, tokenizer, files = pictures.load(config)
    width = model.config.embed_dim

    def answer(batch: list[Picture], pixels: Tensor) -> list[dict[str, Any]]:
        captions = [picture.caption for picture in batch if picture.caption]
        with pictures.autocast(config, model):
            images = zero_shot.embed_images(model, [pixels]).cpu().numpy()
            texts = iter(zero_shot.embed_texts(model, tokenizer, captions).cpu().numpy()) if captions else iter(())
        rows = []
        for picture, image in zip(batch, images, strict=True):
            row = {"key": picture.key, "shard": picture.shard, "image_embedding": image}
            if config.caption is not None:
                row["caption"] = picture.caption or None
                row["text_embedding"] = next(texts) if picture.caption else None
            rows.append(row)
        return rows

    def write(path: Path, rows: list[dict[str, Any]]) -> None:
        columns = {name: pa.array([row[name] for row in rows], pa.string()) for name in ("key", "shard")}
        columns["image_embedding"] = _vectors([row["image_embedding"] for row in rows], width, config.dtype)
        if config.caption is not None:
            columns["caption"] = pa.array([row["caption"] for row in rows], pa.string())
            columns["text_embedding"] = _vectors([row["text_embedding"] for row in rows], width, config.dtype)
        pq.write_table(pa.table(columns), path)

    size = model.config.image_size
    return pictures.go_over("embed", config, config.caption, size, files, answer, write, ".parquet")


def _vectors(rows: list[np.ndarray | None], width: int, dtype: str) -> pa.FixedSizeListArray:
    """Vectors of one width, or nulls, as an Arrow array."""
    values = np.zeros((len(rows), width), dtype=dtype)
    for value, row in zip(values, rows, strict=True):
        if row is not None:
            value[:] = row
    missing = pa.array([row is None for row in rows], pa.bool_())
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), width, mask=missing)
