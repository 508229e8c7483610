"""Does this implementation compute what the authors' JAX model computes?

    python scripts/verify_reference.py FILE.npz

Builds the model from the shapes and heads in the file, imports the parameters by their JAX names, and prints, for every output
and every gradient in the file, max|a − b| / max|b|. Exits with 1 if one is above 1e-4, with 2 if the file is unusable.
"""

import argparse
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clips_core.errors import InputError
from clips_core.formats import jax_config, load_jax, to_jax
from clips_core.loss import CAPTION_WEIGHT, caption_loss, info_nce
from clips_core.model import CLIPS

TOLERANCE = 1e-4


def verify(file: Path) -> dict[str, float]:
    """max|a − b| / max|b| of every output and gradient in `file`, in fp32 on the CPU."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{file}: not a readable .npz ({error})") from None
    for name in ("image", "web", "sub", "labels", "z_img", "z_txt", "logits", "loss"):
        if name not in arrays:
            raise InputError(f"{file}: {name!r} is missing")
    parameters = {name.removeprefix("param/"): value for name, value in arrays.items() if name.startswith("param/")}
    heads = {key: int(arrays[f"meta/heads_{key}"]) for key in ("img", "txt", "dec") if f"meta/heads_{key}" in arrays}
    model = CLIPS(jax_config(parameters, image_size=arrays["image"].shape[1], heads=heads))
    load_jax(model, parameters)
    ours = _outputs(model, arrays)
    return {name: _difference(value, arrays[name]) for name, value in ours.items() if name in arrays}


def _outputs(model: CLIPS, arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    image = torch.from_numpy(arrays["image"]).permute(0, 3, 1, 2)
    texts = torch.from_numpy(np.stack([arrays["web"], arrays["sub"]], axis=1)).long()  # [B, 2, T]
    target = torch.from_numpy(arrays["labels"]).long()  # [B, N]
    assert model.decoder is not None
    encoded = model.encode(image, texts)
    z_img, z_txt, hidden = encoded.image, encoded.text, model.caption_states(encoded, target)
    temperature = model.logit_scale.exp()
    contrastive = (info_nce(z_img, z_txt[:, 0], temperature) + info_nce(z_img, z_txt[:, 1], temperature)) / 2
    caption = caption_loss(hidden, model.decoder.head.weight, target)
    loss = contrastive + CAPTION_WEIGHT * caption
    loss.backward()
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {
        "z_img": z_img,
        "z_txt": z_txt.transpose(0, 1).flatten(0, 1),
        "logits": model.decoder.head(hidden),
        "temperature": temperature,
        "contrastive": contrastive,
        "caption": caption,
        "loss": loss,
        **{f"grad/{name}": value for name, value in to_jax(gradients, model.config).items()},
    }


def _difference(ours: Tensor, reference: np.ndarray) -> float:
    a, b = ours.detach().numpy().astype(np.float64), reference.astype(np.float64)
    if a.size != b.size:
        raise InputError(f"shape {a.shape} where the reference has {b.shape}")
    return float(np.abs(a.reshape(b.shape) - b).max() / np.abs(b).max())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE.npz")
    try:
        differences = verify(parser.parse_args().file)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, difference in differences.items():
        print(f"{difference:9.2e}  {'ok ' if difference <= TOLERANCE else 'BAD'}  {name}")
    # NaN compares false with everything, so ask for what is good rather than for what is bad.
    good = all(difference <= TOLERANCE for difference in differences.values())
    print(f"{len(differences)} tensors, worst {max(differences.values()):.2e}, tolerance {TOLERANCE:.0e}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
