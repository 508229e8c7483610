"""Typed configs: dataclasses, a YAML recipe, dotted overrides. Imports no torch.

A config is a `pydantic.dataclasses.dataclass(config=FORBID)`. A recipe is a YAML file whose keys are the dataclass's fields;
an override is `dotted.key=value`, its value read as YAML. Whatever is unknown or of the wrong type is one `InputError` that
names the file, the line, the key and the nearest key that exists.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from clips_core import sizes
from clips_core.errors import InputError

T = TypeVar("T")
FORBID = ConfigDict(extra="forbid", validate_default=True)

Method = Literal["clips", "clip", "clip_mix", "coca"]
Strategy = Literal["sub_caption", "truncation", "random_mask", "block_mask"]


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
    """Sizes of a CLIPS model: spelt out, or by a name of `sizes.SIZES`. The defaults of the texts are the released models'."""

    image_size: int  # pixels, square
    patch_size: int  # pixels
    vision: TransformerConfig
    text: TransformerConfig
    embed_dim: int  # width of the shared image–text space
    decoder: TransformerConfig | None = None  # the caption decoder of the methods `clips` (null: without it) and `coca`
    context_length: int = 80  # tokens of the text encoder, bos, eos and CLS included
    learnable_tokens: int = 128  # the decoder's queries: the longest caption that it can write
    vocab_size: int = 32_000  # rows of the token embedding and of the vocabulary head
    # What the text encoder does about pads. attended: they are tokens as any other, as in the released models, and CLS at the last
    # place is pooled. masked: they are neither seen nor computed, and the last real token is pooled; for training from scratch.
    text_padding: Literal["attended", "masked"] = "attended"
    size: str | None = None  # B/16, say: stands for all of patch_size, vision, text, decoder, embed_dim not given

    @model_validator(mode="before")
    @classmethod
    def _fill_in_size(cls, values: Any) -> Any:
        """A run's folder keeps the result: the size's name and all that it stands for."""
        return sizes.fill_in(values) if isinstance(values, dict) else values

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.vision.width % 4 or self.vision.width < 8:
            raise ValueError(
                f"vision.width {self.vision.width} must be a multiple of 4, and at least 8 (2-D sin-cos positions)"
            )


def _as_list(value: Any) -> Any:
    return [str(value)] if isinstance(value, str | Path) else value


def _as_sources(value: Any) -> Any:
    """One path, or several without weights, are one source."""
    paths = _as_list(value)
    if isinstance(paths, list) and paths and all(isinstance(path, str | Path) for path in paths):
        return [{"path": [str(path) for path in paths], "weight": 1.0}]
    return value


Names = Annotated[list[str], BeforeValidator(_as_list)]  # one may be written without brackets


@dataclass(config=FORBID)
class SourceConfig:
    """One of several sources that are mixed."""

    path: Names  # as data.train
    weight: float  # its share of the samples is weight / sum of all weights, whatever its size

    def __post_init__(self) -> None:
        if not 0 < self.weight < float("inf"):
            raise ValueError("weight must be greater than 0")


@dataclass(config=FORBID)
class DataConfig:
    """What is read, and how."""

    # Folder, file, glob or brace pattern (shards/{00000..01023}.tar), path or url (s3://…), or several of them; or sources
    # with weights. webdataset tars, parquet with the pictures' bytes in a column, or .jsonl and .csv listings.
    train: Annotated[list[SourceConfig], BeforeValidator(_as_sources)]
    vocab: Path | None = None  # vocab.txt; BERT's 30,522 entries when left out
    image: Names = dataclasses.field(
        default_factory=lambda: ["jpg", "jpeg", "png", "webp", "image"]
    )  # extensions or columns of the picture; the first that a sample has
    # Captions: extension or column, or json.FIELD; of several, the first that a sample has and that is not empty.
    web_caption: Names = dataclasses.field(default_factory=lambda: ["txt", "caption"])
    synthetic_caption: Names = dataclasses.field(
        default_factory=lambda: ["json.re_caption", "synthetic_caption"]
    )  # a sample without one trains on its web caption
    crop_area: float = (
        1.0  # random resized crop keeps at least this share of the area; 1: no crop (the paper's value is 0.4)
    )
    colour_jitter: float = 0.0  # strength of colour jitter with grey (the paper's value is 0.4); 0: none
    workers: int = 1  # loader processes; 0: in the training process
    shuffle_chunks: int = 16  # tars (or row groups, or 1,000 lines) whose samples are shuffled jointly
    lanes: int = 1  # chunks are dealt to so many lanes; a multiple of the processes: no two read the same chunk
    cache: Path | None = None  # folder for local copies of the chunks in use; null: the system's temporary folder
    exclude: Path | None = None  # repair.jsonl of `data check`: the samples that it says to leave out are left out
    max_bad_share: float = 0.01  # more unusable samples than this share stop the run; fewer are replaced

    def __post_init__(self) -> None:
        if not 0 < self.crop_area <= 1:
            raise ValueError("crop_area must be greater than 0, and at most 1")
        if not 0 <= self.colour_jitter <= 1:
            raise ValueError("colour_jitter must be between 0 and 1")
        if not 0 <= self.max_bad_share <= 1:
            raise ValueError("max_bad_share must be between 0 and 1")
        if self.workers < 0 or self.shuffle_chunks < 1 or self.lanes < 1:
            raise ValueError("workers must be at least 0, shuffle_chunks and lanes at least 1")
        if not self.train or not all(source.path for source in self.train):
            raise ValueError("train must name at least one path")


@dataclass(config=FORBID)
class EvaluationConfig:
    """Zero-shot retrieval on held-out pictures, while training and after."""

    shards: Names | None = None  # as data.train: tars, parquet or listings; null: no evaluation
    # Extension or column, or json.FIELD; the first that a sample has. Each line of a text, or each text of a list, is a caption.
    caption: Names = dataclasses.field(default_factory=lambda: ["txt", "caption"])
    every: int = 0  # samples between evaluations; 0: only after training
    captions: int = 4  # of that many held-out pictures, what the caption decoder writes of each goes into the log


@dataclass(config=FORBID)
class TextConfig:
    """Which part of a caption the text encoder reads (the paper's section 3.1)."""

    source: Literal["web", "synthetic"] = "web"  # the caption of the method `clip`
    strategy: Strategy = (
        "sub_caption"  # how a synthetic caption is shortened: the second text of `clips`, the one of `clip`
    )
    length: int | None = None  # body tokens that the strategy keeps; null: all that fit the text encoder

    def __post_init__(self) -> None:
        if self.length is not None and self.length < 1:
            raise ValueError("length must be at least 1")


@dataclass(config=FORBID)
class PretrainConfig:
    """One pretraining run. The recipe fills in `model`; `out` and the data come from the command line."""

    out: Path  # the run's folder
    data: DataConfig
    model: ModelConfig
    samples: int  # pictures seen in all, counted with repetition
    batch_size: int  # pictures of one optimizer step, over all processes
    learning_rate: float  # the peak
    method: Method = "clips"
    texts: TextConfig = dataclasses.field(default_factory=TextConfig)
    contrastive_sub: bool = True  # of `clips`: the second contrastive term, between pictures and sub-captions
    init_from: str | None = None  # a finished run, an open_clip folder or hf-hub: name to go on from; null: random
    frozen: list[str] = dataclasses.field(default_factory=list)  # parts that do not train: visual, text, decoder
    warmup_samples: int = 0
    weight_decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float | None = None  # clips the gradient's norm; the authors do not
    max_logit_scale: float | None = None  # upper bound of exp(logit_scale); CLIP's is 100, the authors have none
    ema_decay: float | None = None  # of an average of the weights, which is evaluated and exported in their place
    precision: Literal["fp32", "bf16"] = "bf16"  # bf16: autocast; weights and optimizer stay in fp32
    compile: bool = False  # torch.compile of the transformers' blocks
    micro_batch: int | None = (
        None  # pictures that one device works on at a time (gradient caching); null: all of its own
    )
    activation_checkpointing: bool = (
        False  # recompute the blocks in the backward pass: a third more work, far less memory
    )
    sharding: Literal["ddp", "fsdp"] = (
        "ddp"  # with several processes: a replica in each, or weights and state in shards
    )
    seed: int = 0
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    max_skipped_steps: int = 3  # in a row, for a loss or gradient that is not finite; one more stops the run
    trackers: list[Literal["tensorboard", "wandb"]] = dataclasses.field(default_factory=list)  # beside metrics.jsonl
    log_every: int = 20  # steps
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        if self.method in ("clip", "clip_mix") and self.model.decoder is not None:
            raise ValueError(f"the method {self.method} has no caption decoder: set model.decoder to null")
        if self.method == "coca" and self.model.decoder is None:
            raise ValueError("the method coca needs model.decoder")
        if self.batch_size < 2:
            raise ValueError("batch_size must be at least 2: a contrastive loss needs another picture to tell apart")
        if self.samples < self.batch_size:
            raise ValueError(f"samples {self.samples} is less than one batch of {self.batch_size}")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError("micro_batch must be at least 1")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError("ema_decay must be between 0 and 1")
        unknown = set(self.frozen) - {"visual", "text", "decoder"}
        if unknown or {"visual", "text"} <= set(self.frozen):
            raise ValueError("frozen may name visual, text and decoder, but not both towers")


def load_config(
    cls: type[T], recipe: Path | str | Sequence[Path | str] | None = None, overrides: Sequence[str] = ()
) -> T:
    """Build `cls` from its defaults, then the recipe (or several, a later one over an earlier one), then the overrides.

    Raises:
        InputError: naming file, line, key and the nearest key, or the type that was expected.
    """
    recipes = [recipe] if isinstance(recipe, Path | str) else list(recipe or ())
    values: dict[str, Any] = {}
    origin: dict[tuple[str, ...], str] = {}
    for path in recipes:
        _lay_over(values, origin, *_read_recipe(Path(path)))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise InputError(f"override {override!r}: write it as key=value, for example seed=1")
        _set(values, tuple(key.split(".")), _parse_value(override, text))
        origin[tuple(key.split("."))] = f"override {override!r}"
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        source = ", ".join(map(str, recipes)) or cls.__name__
        raise InputError("; ".join(_explain(cls, e, origin, source) for e in error.errors())) from None


def load_settings(cls: type[T], package_folder: Path, settings: Sequence[str]) -> T:
    """`load_config` from a command line: names or paths of recipes first, if any, then overrides.

    Args:
        package_folder: the folder of the package whose `recipes/` the names are looked up in.
        settings: `["one_node/clips_b16_112", "debug", "seed=1"]`, say.
    """
    recipes = list(itertools.takewhile(lambda setting: "=" not in setting, settings))
    return load_config(cls, [recipe_path(package_folder, name) for name in recipes], settings[len(recipes) :])


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON-able values (paths become strings)."""
    return TypeAdapter(type(config)).dump_python(config, mode="json")


# Settings of a pretraining run that say how a step is computed, shown and kept, and not what comes out.
HOW_NOT_WHAT = (
    "micro_batch", "activation_checkpointing", "sharding", "compile", "trackers", "log_every", "save_every", "keep_checkpoints",
    "max_skipped_steps",
)  # fmt: skip


def what_trains(config: PretrainConfig) -> dict[str, Any]:
    """A run's settings without its folder and `HOW_NOT_WHAT`: two runs that are alike in these come out alike."""
    settings = {name: value for name, value in to_dict(config).items() if name not in ("out", *HOW_NOT_WHAT)}
    return settings | {"data": {k: v for k, v in settings["data"].items() if k not in ("workers", "cache")}}


def recipe_path(package_folder: Path, name: str | Path) -> Path:
    """A recipe by the name of one that ships beside `package_folder`'s code (`one_node/clips_b16_112`), or by its path."""
    if Path(name).suffix in (".yaml", ".yml"):
        if not Path(name).is_file():
            raise InputError(f"recipe {name}: no such file")
        return Path(name)
    folder = package_folder / "recipes"
    shipped = sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))
    if str(name) not in shipped:
        nearest = _nearest(str(name), shipped)
        raise InputError(f"no recipe {str(name)!r}{nearest}: give a .yaml file or one of {', '.join(shipped)}")
    return folder / f"{name}.yaml"


class _Loader(yaml.SafeLoader):
    """The safe loader, but that 8e-6 and 12.8e9 are numbers: YAML 1.1 takes them for text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _load_yaml(text: str) -> Any:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The recipe's values over those of the one that it `extends`, and where each dotted key was written."""
    if path.resolve() in above:
        raise InputError(f"recipe {path}: extends itself, by way of {', '.join(p.name for p in above)}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path}: cannot be read ({error})") from None
    try:
        values = _load_yaml(text)
        node = yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise InputError(f"recipe {path}: not YAML ({' '.join(str(error).split())})") from None
    if values is None:
        return {}, {}
    if not isinstance(values, dict):
        raise InputError(f"recipe {path}: must be a mapping of keys to values, not a {type(values).__name__}")
    origin: dict[tuple[str, ...], str] = {}

    def walk(mapping: yaml.MappingNode, prefix: tuple[str, ...]) -> None:
        for key_node, value_node in mapping.value:
            key = (*prefix, str(key_node.value))
            origin[key] = f"{path}, line {key_node.start_mark.line + 1}"
            if isinstance(value_node, yaml.MappingNode):
                walk(value_node, key)

    assert isinstance(node, yaml.MappingNode)
    walk(node, ())
    base = values.pop("extends", None)
    if base is None:
        return values, origin
    if not isinstance(base, str) or not (path.parent / base).is_file():
        raise InputError(
            f"{origin['extends',]}: key 'extends': no recipe {base!r} beside this one; write base.yaml, say"
        )
    below, below_origin = _read_recipe(path.parent / base, (*above, path.resolve()))
    _lay_over(below, below_origin, values, origin)
    return below, below_origin


def _lay_over(
    values: dict[str, Any],
    origin: dict[tuple[str, ...], str],
    new_values: dict[str, Any],
    new_origin: dict[tuple[str, ...], str],
) -> None:
    """Lay a recipe over `values` in place, mapping by mapping."""

    def merge(below: dict[str, Any], above: dict[str, Any]) -> None:
        for key, value in above.items():
            if isinstance(value, dict) and isinstance(below.get(key), dict):
                merge(below[key], value)
            else:
                below[key] = value

    merge(values, new_values)
    origin.update(new_origin)


def _parse_value(override: str, text: str) -> Any:
    try:
        return _load_yaml(text)
    except yaml.YAMLError:
        raise InputError(f"override {override!r}: its value is not YAML") from None


def _set(values: dict[str, Any], key: tuple[str, ...], value: Any) -> None:
    for part in key[:-1]:
        child = values.get(part)
        if not isinstance(child, dict):
            child = values[part] = {}
        values = child
    values[key[-1]] = value


def _explain(cls: type, error: Any, origin: dict[tuple[str, ...], str], source: str) -> str:
    key = tuple(str(part) for part in error["loc"])
    # The longest prefix of the key that was written down; or, for an unknown branch, whatever was written below it.
    known = next((origin[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origin), None)
    known = known or next((place for written, place in origin.items() if key and written[: len(key)] == key), None)
    where = known or source
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
        if part not in types:  # a name in a dict of dataclasses, or a place in a list of them
            continue
        candidates = [types.get(part), *get_args(types.get(part))]
        cls = next((c for c in candidates if dataclasses.is_dataclass(c)), None)
    return [f.name for f in dataclasses.fields(cls)] if cls is not None else []


def _nearest(name: str, known: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
