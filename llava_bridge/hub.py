"""Repositories of the Hugging Face hub: only the files that are read here, and from the cache where there is no network."""

from collections.abc import Sequence
from pathlib import Path

from clips_core.errors import InputError

# Of a repository's weights, the first set that is there; each is a tuple of file names and patterns.
WEIGHTS = [
    ("model.safetensors", "model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"),
]


def is_repository(name: str) -> bool:
    """Whether a name may be ORG/NAME or ORG/NAME@REVISION."""
    return name.count("/") == 1 and not name.startswith((".", "/", "~")) and not name.endswith("/")


def download(name: str, files: tuple[str, ...], weights: Sequence[tuple[str, ...]]) -> Path:
    """The local snapshot of ORG/NAME[@REVISION]: what the cache has, where there is no network.

    Args:
        files: names or patterns of what is fetched in any case.
        weights: sets of names or patterns; the first of which the repository has any file is fetched, and no other. None:
            no weights.

    Raises:
        InputError: if there is no such repository, no access to it, or neither a network nor a copy in the cache.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        for names in weights or [()]:
            folder = snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=[*files, *names],
                cache_dir=constants.HF_HUB_CACHE,
                local_files_only=constants.HF_HUB_OFFLINE,  # else a commit in the cache may be looked up all the same
            )
            if any(any(Path(folder).glob(pattern)) for pattern in names):
                break
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(
            f"{repository}: neither a folder here nor to be had from the hub or its cache {constants.HF_HUB_CACHE} "
            f"({' '.join(str(error).split())[:200]}); without a network, run `hf download {repository}` elsewhere and give "
            "the folder"
        ) from None
    return Path(folder)
