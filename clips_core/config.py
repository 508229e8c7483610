"""Typed configs: dataclasses, a YAML recipe, dotted overrides. Imports no torch.

A config is a `pydantic.dataclasses.dataclass(config=FORBID)`. A recipe is a YAML file whose keys are the dataclass's fields;
an override is `dotted.key=value`, its value read as YAML. Whatever is unknown or of the wrong type is one `InputError` that
names the file, the line, the key and the nearest key that exists.
"""

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from clips_core.errors import InputError

T = TypeVar("T")
FORBID = ConfigDict(extra="forbid", validate_default=True)

Method = Literal["clips", "clip", "clip_mix"]


@dataclass(config=FORBID)
class TransformerConfig:
    """One transformer of pre-norm blocks with MLP ratio 4."""

    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not divisible by heads {self.heads}")


@dataclass(config=FORBID)
class ModelConfig:
    """Sizes of a CLIPS model. The defaults of the texts are the released models'."""

    image_size: int  # pixels, square
    patch_size: int  # pixels
    vision: TransformerConfig
    text: TransformerConfig
    embed_dim: int  # width of the shared image–text space
    decoder: TransformerConfig | None = None  # the caption decoder; only the method `clips` has one
    context_length: int = 80  # tokens of the text encoder, bos, eos and CLS included
    learnable_tokens: int = 128  # the decoder's queries: the longest caption that it can write
    vocab_size: int = 32_000  # rows of the token embedding and of the vocabulary head

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.vision.width % 4 or self.vision.width < 8:
            raise ValueError(
                f"vision.width {self.vision.width} must be a multiple of 4, and at least 8 (2-D sin-cos positions)"
            )


@dataclass(config=FORBID)
class DataConfig:
    """What is read, and how."""

    train: Path  # folder, glob pattern or file: webdataset shards
    vocab: Path | None = None  # vocab.txt; BERT's 30,522 entries when left out
    image: list[str] = dataclasses.field(
        default_factory=lambda: ["jpg", "jpeg", "png", "webp"]
    )  # extensions of the picture
    web_caption: str = "txt"  # extension, or json.FIELD
    synthetic_caption: str = (
        "json.re_caption"  # extension, or json.FIELD; a sample without one trains on its web caption
    )
    crop_area: float = (
        1.0  # random resized crop keeps at least this share of the area; 1: no crop (the paper's value is 0.4)
    )
    colour_jitter: float = (
        0.0  # strength of brightness, contrast and saturation jitter (the paper's value is 0.4, with grey)
    )
    workers: int = 1  # loader processes; 0: in the training process


@dataclass(config=FORBID)
class EvaluationConfig:
    """Zero-shot retrieval on held-out pictures, while training and after."""

    shards: Path | None = None  # one caption per picture; None: no evaluation
    caption: str = "txt"  # extension, or json.FIELD
    every: int = 0  # samples between evaluations; 0: only after training


@dataclass(config=FORBID)
class PretrainConfig:
    """One pretraining run. The recipe fills in `model`; `out` and the data come from the command line."""

    out: Path  # the run's folder
    data: DataConfig
    model: ModelConfig
    samples: int  # pictures seen in all, counted with repetition
    batch_size: int
    learning_rate: float  # the peak
    method: Method = "clips"
    warmup_samples: int = 0
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    max_logit_scale: float | None = None  # upper bound of exp(logit_scale); CLIP's is 100, the authors have none
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast; weights and optimizer stay in fp32
    compile: bool = False  # torch.compile of the towers and the decoder
    seed: int = 0
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    log_every: int = 20  # steps
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if (self.method == "clips") != (self.model.decoder is not None):
            raise ValueError("model.decoder must be given for the method clips, and for no other")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: a contrastive loss needs another picture to tell apart")
        if self.samples < self.batch_size:
            raise ValueError(f"samples {self.samples} is less than one batch of {self.batch_size}")


def load_config(cls: type[T], recipe: Path | str | None = None, overrides: Sequence[str] = ()) -> T:
    """Build `cls` from its defaults, then the recipe, then the overrides.

    Raises:
        InputError: naming file, line, key and the nearest key, or the type that was expected.
    """
    values, lines = _read_recipe(Path(recipe)) if recipe is not None else ({}, {})
    origin = {key: f"{recipe}, line {line}" for key, line in lines.items()}
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(f"override {override!r}: write it as key=value, for example seed=1")
        _set(values, tuple(key.split(".")), _parse_value(override, text))
        origin[tuple(key.split("."))] = f"override {override!r}"
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        raise InputError("; ".join(_explain(cls, e, origin, recipe) for e in error.errors())) from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-able values (paths become strings)."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


def recipe_path(package_folder: Path, name: str | Path) -> Path:
    """A recipe by the name of one that ships beside `package_folder`'s code, or by its path."""
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise InputError(f"recipe {name}: no such file")
        return Path(name)
    shipped = sorted(path.stem for path in (package_folder / "recipes").glob("*.yaml"))
    if str(name) not in shipped:
        nearest = _nearest(str(name), shipped)
        raise InputError(f"no recipe {str(name)!r}{nearest}: give a .yaml file or one of {', '.join(shipped)}")
    return package_folder / "recipes" / f"{name}.yaml"


def _read_recipe(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The recipe's values, and the line of each dotted key."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read ({error})") from None
    try:
        values = yaml.safe_load(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise InputError(f"recipe {path}: must be a mapping of keys to values, not a {type(values).__name__}")
    lines: dict[tuple[str, ...], int] = {}

    def walk(mapping: yaml.MappingNode, prefix: tuple[str, ...]) -> None:
        for key_node, value_node in mapping.value:
            key = (*prefix, str(key_node.value))
            lines[key] = key_node.start_mark.line + 1
            if isinstance(value_node, yaml.MappingNode):
                walk(value_node, key)

    assert isinstance(node, yaml.MappingNode)
    walk(node, ())
    return values, lines


def _parse_value(override: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: its value is not YAML") from None


def _set(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    for part in key[:-1]:
        child = values.get(part)
        if not isinstance(child, dict):
            child = values[part] = {}
        values = child
    values[key[-1]] = value


def _explain(cls: type, error: Any, origin: dict[tuple[str, ...], str], recipe: Path | str | None) -> str:
    key = tuple(str(part) for part in error["loc"])
    # The longest prefix of the key that was written down; or, for an unknown branch, whatever was written below it.
    known = next((origin[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origin), None)
    known = known or next((place for written, place in origin.items() if key and written[: len(key)] == key), None)
    where = known or (str(recipe) if recipe is not None else cls.__name__)
    name = ".".join(key)
    if error["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        fields = _fields_at(cls, key[:-1])
        return f"{where}: unknown key {name!r}{_nearest(key[-1], fields)}; the keys here are {', '.join(fields)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"{where}: key {name!r} is required"
    shown = f" (got {error['input']!r})" if key else ""
    return f"{where}: key {name!r}: {error['msg']}{shown}" if key else f"{where}: {error['msg']}"


def _fields_at(cls: Any, key: Sequence[str]) -> list[str]:
    """Field names of the (nested) dataclass that `key` leads to."""
    for part in key:
        types = {f.name: f.type for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else {}
        candidates = [types.get(part), *get_args(types.get(part))]
        cls = next((c for c in candidates if dataclasses.is_dataclass(c)), None)
    return [f.name for f in dataclasses.fields(cls)] if cls is not None else []


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
