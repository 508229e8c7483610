"""A trained model made public: its model card, and the push to the Hugging Face hub.

What leaves the machine names no path of it: of a path, the last part stays.
"""

import dataclasses
import hashlib
import tempfile
from pathlib import Path
from typing import Any, get_args

import httpx2
import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from clips_core.errors import InputError
from clips_core.folders import MANIFEST, read_json, read_manifest, sha256_file, write_bytes, write_json
from llava_bridge.config import AlignConfig, TuneConfig
from llava_bridge.hub import is_repository

CARD = "README.md"
ADAPTER, ADAPTER_CONFIG = "adapter", "adapter_config.json"  # a run's folder of adapters, and PEFT's file in it
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the setting llm=smollm2 stands for
NAMES = ("tower", "llm", "template")  # settings that hold a path or a name


def write_card(folder: Path, manifest: dict[str, Any], license: str = "unknown") -> Path:
    """Write the model card of a run of stage 1 or 2, from the run's manifest.

    Args:
        folder: the model's (or the adapters') folder, which gets a README.md.
        license: an identifier of the hub, such as apache-2.0. What holds for the result depends on tower, language model and
            data, so it is unknown unless somebody says it.
    """
    path = folder / CARD
    write_bytes(path, str(model_card(manifest, license, is_adapter(folder))).encode())
    return path


def push(run: Path, repo: str, private: bool = False, license: str | None = None) -> str:
    """Upload a finished run's model with its card and manifest to the hub, in one commit; the address of the repository.

    The weights are compared with the manifest first. A card that lies in the model's folder is taken as it is (edit it
    there); without one it is written.

    Args:
        repo: ORG/NAME, made if it is not there.
        private: whether only its owners may see it. An existing public repository is refused then.
        license: replaces the card's.

    Raises:
        InputError: if the run is unfinished or changed since, the name is not one, or the hub cannot be reached or refuses.
    """
    manifest = read_manifest(run)
    folder = _verified_folder(run, manifest)
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"repository {repo!r}: {error}") from None
    if "/" not in repo:
        raise InputError(f"repository {repo!r}: must be ORG/NAME or USER/NAME")
    if get_token() is None:
        raise InputError("no token for the hub: run  hf auth login  or set HF_TOKEN")
    with tempfile.TemporaryDirectory() as temporary:
        package = Path(temporary)
        for path in folder.iterdir():
            (package / path.name).symlink_to(path.resolve())
        if is_adapter(folder):
            (package / ADAPTER_CONFIG).unlink()
            write_json(package / ADAPTER_CONFIG, read_json(folder / ADAPTER_CONFIG) | {"base_model_name_or_path": None})
        _put_card(package, manifest, license)
        write_json(package / MANIFEST, public_manifest(manifest))
        try:
            return _upload(package, repo, private)
        except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
            said = " ".join(str(error).split())
            raise InputError(
                f"the hub did not take {repo} ({said}); nothing is lost, run the same command again"
            ) from None


def _verified_folder(run: Path, manifest: dict[str, Any]) -> Path:
    """The folder of a run's model or adapters, its weights compared with the manifest (without torch, which loading takes)."""
    folder = run / (ADAPTER if ADAPTER in manifest.get("outputs", {}) else "model")
    recorded = {name: digest for name, digest in manifest["weights"].items() if name.startswith(f"{folder.name}/")}
    if not recorded:
        raise InputError(f"{run}: its {MANIFEST} records no model, so this is not the folder of stage 1 or 2")
    for name, digest in recorded.items():
        found = sha256_file(run / name) if (run / name).is_file() else "no such file"
        if found != digest:
            raise InputError(f"{run / name}: {found}, but {run / MANIFEST} records {digest}; run the stage again")
    return folder


def _put_card(package: Path, manifest: dict[str, Any], license: str | None) -> None:
    """The card beside the links to the model's files."""
    path = package / CARD
    try:
        card = ModelCard(path.read_text(encoding="utf-8")) if path.exists() else None
    except (ValueError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())
        raise InputError(
            f"{path.resolve()}: the block at its top is no YAML that a model card can have ({said})"
        ) from None
    card = card or model_card(manifest, adapter=is_adapter(package))
    if license is not None:
        card.data["license"] = license
    path.unlink(missing_ok=True)  # a link: the model's own folder stays as it is
    write_bytes(path, str(card).encode())


def _upload(package: Path, repo: str, private: bool) -> str:
    api = HfApi()
    address = api.create_repo(repo, private=private or None, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise InputError(f"{repo} is there already, and public: choose another name, or make it private on the hub")
    api.upload_folder(repo_id=repo, folder_path=package, commit_message="Upload with clips-llava")
    return str(address)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters in PEFT's layout, and not a model."""
    return (folder / ADAPTER_CONFIG).exists()


# --------------------------------------------------------------------------------------------------- what may be told


def _path_settings(config: type) -> set[str]:
    """Names of a config's settings that are paths, those of configs within it too."""
    found = set()
    for field in dataclasses.fields(config):
        for kind in (field.type, *get_args(field.type)):
            if kind is Path:
                found.add(field.name)
            elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
                found |= _path_settings(kind)
    return found


PATHS = _path_settings(AlignConfig) | _path_settings(TuneConfig)


def public_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """A stage's settings, of each path only the last part."""
    shown: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            shown[key] = public_settings(value)
        elif isinstance(value, str) and key in PATHS:
            shown[key] = Path(value).name
        else:
            shown[key] = public_name(value) if isinstance(value, str) and key in NAMES else value
    return shown


def public_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest whose settings name no path of this machine."""
    return {**manifest, "config": public_settings(manifest["config"])}


def public_name(spec: str) -> str:
    """A tower, language model or template as its user named it; of a folder or file only the last part."""
    *kinds, name = spec.split(":")
    return ":".join([*kinds, Path(name).name]) if _is_local(kinds, name) else spec


def hub_name(spec: str) -> str | None:
    """The hub's repository that a tower or language model is from, or None: a folder, or another library's name."""
    if spec == "smollm2":
        return SMOLLM2
    *kinds, name = spec.split(":")
    repository = name.partition("@")[0]
    named = kinds in ([], ["hf"]) or "hf-hub" in kinds
    return repository if named and is_repository(repository) and not _is_local(kinds, name) else None


def _is_local(kinds: list[str], name: str) -> bool:
    # A relative path of two parts looks like a name on the hub: whether it is there decides. The clips kind has no other names.
    return "hf-hub" not in kinds and (kinds == ["clips"] or not is_repository(name) or Path(name).exists())


# ----------------------------------------------------------------------------------------------------------- the card


def model_card(manifest: dict[str, Any], license: str = "unknown", adapter: bool = False) -> ModelCard:
    """The card of a run of stage 1 or 2: what it is made of, by which settings, how to load it, and what it cannot do.

    Of a stage 2, tower and language model are named if the run of stage 1 is still where it was.
    """
    aligned = _stage_1(manifest)
    tower, llm = aligned["config"].get("tower"), aligned["config"].get("llm")
    data = ModelCardData(
        license=license,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="image-text-to-text",
        tags=["llava", "clips-llava", *(["clips"] if str(tower).startswith("clips:") else []), *(["lora"] * adapter)],
        base_model=[name for name in (hub_name(spec) for spec in (llm, tower) if spec) if name] or None,
    )
    parts = [
        f"---\n{data.to_yaml()}\n---\n",
        f"# LLaVA: {_shown(tower)} → {_shown(llm)}",
        _summary(manifest),
        "## Made of",
        _table_of_parts(manifest, aligned),
        "## Loading",
        _loading(manifest, adapter),
        "## Training",
        _training(manifest),
        "## Limits",
        _limits(manifest),
    ]
    return ModelCard("\n\n".join(parts) + "\n")


def _stage_1(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of the stage 1 that a model comes from; without tower and language model if it is gone or another now."""
    if manifest["stage"] == "align":
        return manifest
    unknown: dict[str, Any] = {"config": {"tower": manifest["config"].get("tower")}, "inputs": {}}
    try:
        found = read_manifest(manifest["config"]["align"], "align")
    except InputError:
        return unknown
    return found if _weight_hash(found) == manifest["inputs"].get("align") else unknown


def _weight_hash(manifest: dict[str, Any]) -> str:
    """Of a run's model, as `llm.weight_hash` takes it from the files."""
    digests = [digest for name, digest in sorted(manifest["weights"].items()) if name.startswith("model/")]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def _shown(spec: str | None) -> str:
    return "unnamed" if spec is None else public_name(spec)


def _summary(manifest: dict[str, Any]) -> str:
    if manifest["stage"] == "align":
        return (
            "A vision tower and a language model, joined by a projector that was trained on captions (stage 1 of LLaVA). "
            "Everything but the projector is as it was."
        )
    method = {"full": "in full", "qlora": "by adapters over weights in 4 bits"}.get(
        manifest["config"].get("method", "lora"), "by low-rank adapters"
    )
    tower = (
        "the vision tower was not trained"
        if manifest["config"].get("tower_learning_rate") is None
        else "the vision tower was trained along, and is no longer the one named below"
    )
    return (
        "A vision tower and a language model, joined by a projector that was trained on captions (stage 1 of LLaVA), then "
        f"tuned on conversations (stage 2): the language model {method}, the projector in full; {tower}."
    )


def _table_of_parts(manifest: dict[str, Any], aligned: dict[str, Any]) -> str:
    """Name and hash of whatever the model comes from."""
    first, last = aligned["config"], manifest["config"]
    rows = [
        ("vision tower", _shown(first.get("tower")), manifest["inputs"].get("tower")),
        ("language model", _shown(first.get("llm")), manifest["inputs"].get("llm")),
    ]
    if "data" in first:
        rows.append(("captions, stage 1", Path(first["data"]["json"]).name, aligned["inputs"].get("data")))
    if manifest["stage"] == "tune":
        rows.append(("conversations, stage 2", Path(last["data"]["json"]).name, manifest["inputs"].get("data")))
    rows += [("the result", Path(name).name, digest) for name, digest in sorted(manifest["weights"].items())]
    lines = [f"| {part} | `{name}` | `{digest or 'not recorded'}` |" for part, name, digest in rows]
    return "\n".join(["| part | name | SHA-256 |", "|---|---|---|", *lines])


def _loading(manifest: dict[str, Any], adapter: bool) -> str:
    """How to use the folder with stock libraries. The code runs as it stands."""
    load = (
        """\
from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "."  # this folder, or the repository's name
base = "align/model"  # the model of stage 1 that the adapters belong to
model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base, dtype="auto"), name)
processor = AutoProcessor.from_pretrained(name, backend="pil")"""
        if adapter
        else """\
from transformers import AutoModelForImageTextToText, AutoProcessor

name = "."  # this folder, or the repository's name
model = AutoModelForImageTextToText.from_pretrained(name, dtype="auto")
processor = AutoProcessor.from_pretrained(name, backend="pil")"""
    )
    quantised = (
        "\n\nThe adapters were trained over a language model in 4 bits (NF4, nested scales): load the base with such a "
        "`BitsAndBytesConfig` for what was trained exactly."
        if adapter and manifest["config"].get("method") == "qlora"
        else ""
    )
    return f"""\
Stock libraries are enough: nothing here runs code of its own, so `trust_remote_code` stays off.

```python
{load}

parts = [{{"type": "image", "path": "picture.jpg"}}, {{"type": "text", "text": "What is in the picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": parts}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
answer = model.generate(**inputs, max_new_tokens=64, do_sample=False)
print(processor.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

`backend="pil"`: pictures are resized as in training. The other backend (torchvision) resizes a little differently.{quantised}"""


def _training(manifest: dict[str, Any]) -> str:
    outputs, environment = manifest["outputs"], manifest["environment"]
    packages = environment.get("packages", {})
    versions = ", ".join(f"{name} {packages[name]}" for name in ("torch", "transformers", "peft") if name in packages)
    settings = yaml.safe_dump(public_settings(manifest["config"]), sort_keys=False, allow_unicode=True)
    return f"""\
{outputs["steps"]} steps over {outputs["samples"]} samples, weights stored in {outputs["dtype"]}; the loss of the last step was \
{outputs["loss"]:.4f}. {versions}; {environment.get("device", "device unknown")}. Trained with clips-llava,
stage `{manifest["stage"]}`:

```yaml
{settings.strip()}
```"""


def _limits(manifest: dict[str, Any]) -> str:
    stage = (
        "- It has learnt captions only: it describes a picture, and follows instructions about it badly. Stage 2 is for that."
        if manifest["stage"] == "align"
        else "- It answers as its training conversations do, in their language and on their subjects."
    )
    return f"""\
{stage}
- It can state what is not in the picture, and inherits the faults and biases of tower, language model and data.
- This card says how the model was made, and nothing about how good it is: no benchmark result is part of it.
- The licence of the whole follows from tower, language model and data; whoever publishes the model has to settle it."""
