"""The hook for the original LLaVA: its tower, its processor, its interface; `mm_projector.bin`; slow: all of the original."""

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from llava_samples import save_llm, save_tower
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BitImageProcessorPil,
    CLIPImageProcessorPil,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    ViTImageProcessorPil,
)
from upstream_environment import original_python, run_original

import llava_bridge.train
from clips_core.errors import InputError
from llava_bridge import upstream
from llava_bridge.config import AlignConfig, ConversationConfig, LoraConfig, TuneConfig
from llava_bridge.conversations import IGNORE, count_image_tokens
from llava_bridge.mllm import build_mllm, load_mllm
from llava_bridge.mm_projector import load_mm_projector, read_mm_projector, write_mm_projector
from llava_bridge.towers import export_tower, load_tower
from llava_bridge.train import align, tune

ROOT = Path(__file__).parents[1]
KINDS = ("vit", "clip", "siglip", "dinov2")


def save_exported(folder: Path, kind: str, processor: Any = None) -> Path:
    """What `clips-llava tower hf:… --export FOLDER` writes."""
    raw = save_tower(folder.with_name(f"{folder.name}_raw"), kind)
    if processor is not None:
        processor.save_pretrained(raw)
    export_tower(load_tower(f"hf:{raw}"), folder)
    return folder


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One exported tower of each kind, each with the processor that is usual for it."""
    folder = tmp_path_factory.mktemp("towers")
    processors = {
        "vit": ViTImageProcessorPil(size={"height": 48, "width": 48}),
        "clip": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}),
        "siglip": SiglipImageProcessorPil(size={"height": 48, "width": 48}),
        "dinov2": BitImageProcessorPil(size={"shortest_edge": 55}, crop_size={"height": 48, "width": 48}),
    }
    return {kind: save_exported(folder / kind, kind, processors[kind]) for kind in KINDS}


def arguments(folder: Path, layer: int = -2, features: str = "patch", **more: Any) -> SimpleNamespace:
    return SimpleNamespace(
        mm_vision_tower=str(folder), mm_vision_select_layer=layer, mm_vision_select_feature=features, **more
    )


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# -------------------------------------------------------------------------------------------------------------- the tower


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_the_towers_own(towers: dict[str, Path], kind: str) -> None:
    ours = load_tower(f"hf:{towers[kind]}")
    pixels = torch.randn(2, 3, 48, 48)
    for layer in (-1, -2, 0):
        theirs = upstream.ExportedTower(str(towers[kind]), arguments(towers[kind], layer))
        features = theirs(pixels)
        torch.testing.assert_close(features, ours.features(pixels, layer), atol=1e-5, rtol=1e-5)
        assert features.shape[1:] == (theirs.num_patches, theirs.hidden_size) == (36, 64)
    assert theirs.num_patches_per_side == 6 and theirs.image_size == theirs.config.image_size == 48
    assert not any(parameter.requires_grad for parameter in theirs.parameters())
    assert all("vision_tower" in name for name, _ in theirs.named_parameters())
    if kind == "siglip":
        with pytest.raises(ValueError, match="no class token"):
            upstream.ExportedTower(str(towers[kind]), arguments(towers[kind], features="cls_patch"))
    else:
        theirs = upstream.ExportedTower(str(towers[kind]), arguments(towers[kind], -2, "cls_patch"))
        expected = ours.features(pixels, -2, class_token=True)
        torch.testing.assert_close(theirs(pixels), expected, atol=1e-5, rtol=1e-5)
        assert theirs.num_patches == expected.shape[1]


def test_features_come_in_the_pixels_dtype_and_lists_stay_lists(towers: dict[str, Path]) -> None:
    tower = upstream.ExportedTower(str(towers["vit"]), arguments(towers["vit"])).to(torch.bfloat16)
    pixels = torch.randn(2, 3, 48, 48)
    assert tower.dtype == torch.bfloat16 and tower.dummy_feature.shape == (1, 64)
    batch, listed = tower(pixels), tower(list(pixels))
    assert batch.dtype == torch.float32 and isinstance(listed, list)
    assert [one.shape for one in listed] == [(1, 36, 64)] * 2
    torch.testing.assert_close(torch.cat(listed), batch, atol=0.05, rtol=0.05)


def test_a_delayed_tower_has_no_weights_but_knows_its_sizes(towers: dict[str, Path]) -> None:
    tower = upstream.ExportedTower(str(towers["siglip"]), arguments(towers["siglip"]), delay_load=True)
    assert not tower.is_loaded and not list(tower.parameters()) and not tower.state_dict()
    assert (tower.hidden_size, tower.num_patches, tower.config.image_size) == (64, 36, 48)
    tower.load_model(device_map="auto")
    weights = {name: value.clone() for name, value in tower.state_dict().items()}
    tower.vision_tower.requires_grad_(True)
    tower.load_model()  # LLaVA calls it again: what is there stays
    assert tower.is_loaded and next(tower.parameters()).requires_grad and weights.keys() == tower.state_dict().keys()


@pytest.mark.parametrize("tuned", [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,x"}])
def test_a_checkpoints_tuned_tower_has_a_place_to_go(towers: dict[str, Path], tuned: dict[str, Any]) -> None:
    tower = upstream.ExportedTower(str(towers["vit"]), arguments(towers["vit"], **tuned), delay_load=True)
    assert tower.is_loaded
    tower.requires_grad_(True)
    tower(torch.randn(1, 3, 48, 48)).sum().backward()
    assert tower.vision_tower.embeddings.cls_token.grad.abs().sum() > 0


def test_in_training_mode_it_is_not_random(tmp_path: Path) -> None:
    folder = save_tower(tmp_path / "tower", "vit", hidden_dropout_prob=0.5, attention_probs_dropout_prob=0.5)
    tower = upstream.ExportedTower(str(folder), arguments(folder))
    pixels = torch.randn(1, 3, 48, 48)
    assert torch.equal(tower.train()(pixels), tower.eval()(pixels))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(90, 70), (31, 113), (200, 48), (64, 64)])
def test_pixels_are_transformers_own(towers: dict[str, Path], kind: str, size: tuple[int, int]) -> None:
    """To the last bit, with the processor as transformers reads it from the same folder."""
    expected = load_tower(f"hf:{towers[kind]}").image_processor(picture(*size), return_tensors="pt")["pixel_values"]
    processor = upstream.ExactImageProcessor(towers[kind])
    assert torch.equal(processor.preprocess(picture(*size), return_tensors="pt")["pixel_values"], expected)
    assert torch.equal(processor([np.asarray(picture(*size))], return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tile_is_normalised_and_nothing_else(towers: dict[str, Path], kind: str) -> None:
    processor = upstream.ExactImageProcessor(towers[kind])
    side = processor.size["shortest_edge"]
    assert processor.crop_size == {"height": side, "width": side} and side == 48
    pixels = processor.preprocess(picture(side, side), return_tensors="pt")["pixel_values"][0]
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    restored = ((pixels * std + mean) * 255).round().permute(1, 2, 0).byte().numpy()
    assert np.array_equal(restored, np.asarray(picture(side, side)))


def test_what_is_no_exported_tower_is_refused(towers: dict[str, Path], tmp_path: Path) -> None:
    def changed(file: str, **values: Any) -> Path:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for source in towers["vit"].iterdir():
            (folder / source.name).write_bytes(source.read_bytes())
        (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **values}))
        return folder

    def refused(folder: Path, message: str, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            upstream.ExportedTower(str(folder), arguments(folder, **options))

    refused(tmp_path / "absent", r"absent.*cannot be read .*`clips-llava tower KIND:")
    refused(changed("config.json", model_type="swin"), "model type 'swin'; a tower is a folder that `clips-llava tower")
    refused(changed("config.json", image_size=64), r"pictures of 48 × 48 pixels, but its model takes 64 × 64")
    refused(changed("config.json", num_hidden_layers=3), "missing keys: ")
    refused(changed("config.json", num_hidden_layers=1), "unexpected keys: ")
    refused(changed("preprocessor_config.json", image_mean=None), "lacks image_mean")
    refused(changed("preprocessor_config.json", do_resize=False), "does not resize to a square and normalise")
    refused(changed("preprocessor_config.json", size={"longest_edge": 48}), "does not resize to a square")
    refused(towers["vit"], "has hidden states 0 … 2", layer=-4)
    refused(towers["vit"], "gives patch or cls_patch", features="slicefour_patch")
    refused(towers["vit"], "s2 is LLaVA-NeXT's own", s2=True)


def test_it_stands_alone() -> None:
    """Imported with nothing else of this project on the path, as an environment with the original has it."""
    code = (
        "import sys; import llava_bridge.upstream; "
        "print([m for m in sys.modules if m.split('.')[0] in ('clips_core', 'llava_bridge', 'eval_suites', 'peft')])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.stdout.strip() == "['llava_bridge', 'llava_bridge.upstream']", result.stderr


# ------------------------------------------------------------------------------------------------------------ the hook

ARCH = {
    # How LLaVA 1.2.2 and LLaVA-NeXT (as of April 2026) build the tower and what they ask it for.
    "llava": """
from .multimodal_encoder.builder import build_vision_tower
class LlavaMetaModel:
    def __init__(self, config):
        self.vision_tower = build_vision_tower(config, delay_load=True)
    def initialize_vision_modules(self, model_args):
        if self.vision_tower is None:
            self.vision_tower = build_vision_tower(model_args)
        else:
            self.vision_tower.load_model()
        self.mm_hidden_size = self.vision_tower.hidden_size
""",
    "llava_next": """
from .multimodal_encoder.builder import build_vision_tower
class LlavaMetaModel:
    def __init__(self, config):
        self.vision_tower = build_vision_tower(config, delay_load=getattr(config, "delay_load", False))
        self.vision_cfg = self.vision_tower.config
        self.image_size = self.vision_tower.image_size  # read for tiles
    def initialize_vision_modules(self, model_args):
        if self.vision_tower is None:
            self.vision_tower = build_vision_tower(model_args)
        else:
            self.vision_tower.load_model()
        self.mm_hidden_size = getattr(object(), "hidden_size", self.vision_tower.hidden_size)
""",
}
BUILDER = """
def build_vision_tower(vision_tower_cfg, **kwargs):
    return "its own", getattr(vision_tower_cfg, "mm_vision_tower", getattr(vision_tower_cfg, "vision_tower", None)), kwargs
"""
TRAIN = """
import sys
from llava.train.llava_trainer import maybe_zero_3 as of_trainer
def maybe_zero_3(param, ignore_status=False, name=None):
    from deepspeed import zero
def train(attn_implementation=None):
    import llava.train.llava_trainer as trainer, torch
    copies = [zero(torch.ones(2, requires_grad=True), ignore_status=True) for zero in (maybe_zero_3, trainer.maybe_zero_3)]
    print("trained", sys.argv[1:], attn_implementation, [c.requires_grad for c in copies])
"""


@pytest.fixture(params=["llava", "llava_next"])
def package(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in with the original's interface: the function's two places, and what is asked of what it returns."""
    files = {
        "model/multimodal_encoder/builder.py": BUILDER,
        "model/llava_arch.py": ARCH[request.param],
        "train/train.py": TRAIN,
        "train/llava_trainer.py": "maybe_zero_3 = None\n",
        "train/train_mem.py": "from llava.train.train import train\nif __name__ == '__main__':\n    train('flash')\n",
        "serve/cli.py": "import sys\nprint(__name__, sys.argv)\n",
    }
    for name, text in files.items():
        file = tmp_path / "llava" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        for folder in file.relative_to(tmp_path).parents[:-1]:
            (tmp_path / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    yield lambda name: __import__(f"llava.{name}", fromlist=["x"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "llava"]:
        del sys.modules[name]


def test_the_hook_takes_exported_towers_and_leaves_the_rest(package: Any, towers: dict[str, Path]) -> None:
    upstream.install()
    hooked = package("model.llava_arch").build_vision_tower
    upstream.install()
    assert package("model.llava_arch").build_vision_tower is hooked
    assert package("model.multimodal_encoder.builder").build_vision_tower is hooked

    model = package("model.llava_arch").LlavaMetaModel(arguments(towers["clip"]))
    model.initialize_vision_modules(arguments(towers["clip"]))
    assert isinstance(model.vision_tower, upstream.ExportedTower) and model.vision_tower.is_loaded
    assert model.mm_hidden_size == 64
    first = SimpleNamespace(
        vision_tower=str(towers["vit"]), mm_vision_select_layer=-2
    )  # the model arguments of a training
    assert isinstance(hooked(first), upstream.ExportedTower)

    for name in ("openai/clip-vit-large-patch14-336", "/no/such/folder"):
        assert hooked(SimpleNamespace(mm_vision_tower=name), delay_load=True) == ("its own", name, {"delay_load": True})


def test_folders_that_the_original_would_misread(package: Any, tmp_path: Path) -> None:
    upstream.install()
    build = package("model.llava_arch").build_vision_tower
    for model_type, own in (("clip", True), ("siglip", False), ("convnext", False)):
        folder = tmp_path / model_type
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
        if own:
            assert build(arguments(folder))[0] == "its own"
        else:
            with pytest.raises(ValueError, match=f"model type '{model_type}' is not one of vit, .*`clips-llava tower"):
                build(arguments(folder))


def test_the_launcher(package: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find = upstream.importlib.util.find_spec
    monkeypatch.setattr(upstream.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find(name))
    monkeypatch.setattr(sys, "argv", ["before"])
    upstream.main(["train", "--bf16", "True"])
    assert capsys.readouterr().out == "trained ['--bf16', 'True'] None [False, False]\n"
    upstream.main(["run", "llava.train.train_mem", "--x"])
    assert capsys.readouterr().out == "trained ['--x'] flash [False, False]\n"
    upstream.main(["run", "llava.serve.cli", "--model-path", "m"])
    out = capsys.readouterr().out
    assert out.startswith("__main__ ['") and out.endswith("cli.py', '--model-path', 'm']\n")
    with pytest.raises(SystemExit, match=r"usage: python -m llava_bridge\.upstream"):
        upstream.main(["tune"])


def test_without_the_original_it_says_what_to_install() -> None:
    with pytest.raises(ImportError, match=r"not installed here .* pip install --no-deps llava-torch==1\.2\.2\.post1"):
        upstream.install()


# -------------------------------------------------------------------------------------------------------- mm_projector.bin


@pytest.fixture(scope="module")
def parts(towers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    return load_tower(f"hf:{towers['vit']}"), save_llm(tmp_path_factory.mktemp("llm"), hidden_size=32)


def original_projector(kind: str, vision: int, text: int) -> nn.Module:
    """As the original builds it."""
    torch.manual_seed(5)
    if kind == "linear":
        return nn.Linear(vision, text)
    return nn.Sequential(nn.Linear(vision, text), nn.GELU(), nn.Linear(text, text))


@pytest.mark.parametrize(
    ("kind", "prefix"),
    [("mlp2x_gelu", "model.mm_projector."), ("linear", "base_model.model.model.mm_projector."), ("mlp2x_gelu", "")],
)
def test_projectors_go_both_ways(parts: tuple[Any, Path], tmp_path: Path, kind: Any, prefix: str) -> None:
    theirs = original_projector(kind, 64, 32)
    state = {prefix + name: value for name, value in theirs.state_dict().items()}
    torch.save(state, tmp_path / "mm_projector.bin")
    model, _ = build_mllm(*parts, projector=kind)
    load_mm_projector(model, tmp_path / "mm_projector.bin")
    features = torch.randn(3, 5, 64)
    with torch.no_grad():
        assert torch.equal(model.model.multi_modal_projector(features), theirs(features))

    model.save_pretrained(tmp_path / "model", max_shard_size="500KB")  # in several files
    assert write_mm_projector(tmp_path / "model", tmp_path / "back.bin") == kind
    back = torch.load(tmp_path / "back.bin", weights_only=True)
    assert list(back) == [f"model.mm_projector.{name}" for name in theirs.state_dict()]
    for name, value in theirs.state_dict().items():
        assert torch.equal(back[f"model.mm_projector.{name}"], value)
    assert read_mm_projector(tmp_path / "back.bin")[0] == kind


def test_half_precision_survives(parts: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = build_mllm(*parts, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    write_mm_projector(tmp_path / "model", tmp_path / "mm_projector.bin")
    _, weights = read_mm_projector(tmp_path / "mm_projector.bin")
    for name, value in weights.items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, model.get_parameter(f"model.multi_modal_projector.{name}"))


def test_projectors_that_do_not_fit_are_refused(parts: tuple[Any, Path], tmp_path: Path) -> None:
    file = tmp_path / "mm_projector.bin"

    def refused(content: Any, message: str) -> None:
        torch.save(content, file)
        with pytest.raises(InputError, match=message):
            read_mm_projector(file)

    with pytest.raises(InputError, match="no such file"):
        read_mm_projector(tmp_path / "absent.bin")
    refused(print, "cannot be read as plain tensors, and whatever else it holds is not run")
    refused([torch.zeros(1)], "must be a dict of tensors")
    mlp = original_projector("mlp2x_gelu", 64, 32).state_dict()
    three = {**mlp, "4.weight": torch.zeros(32, 32), "4.bias": torch.zeros(32)}
    refused(three, r"holds 0\.bias, .* takes the projectors mlp2x_gelu")
    refused({**mlp, "model.embed_tokens.weight": torch.zeros(9, 32)}, "and nothing beside them")
    refused({**mlp, "2.weight": torch.zeros(32, 31)}, r"linear_2\.weight is \(32, 31\)")
    refused({**mlp, "0.bias": torch.zeros(32, dtype=torch.int64)}, r"linear_1\.bias is .* torch\.int64")

    model, _ = build_mllm(*parts)
    torch.save(original_projector("linear", 64, 32).state_dict(), file)
    with pytest.raises(InputError, match="is of type linear, but the LLaVA was built with projector=mlp2x_gelu"):
        load_mm_projector(model, file)
    torch.save(original_projector("mlp2x_gelu", 48, 32).state_dict(), file)
    with pytest.raises(InputError, match=r"leads from width 48 to 32, but .* have widths 64 and 32"):
        load_mm_projector(model, file)
    linear, _ = build_mllm(*parts, projector="linear")
    with torch.no_grad():
        linear.model.multi_modal_projector.linear_2.bias[0] = 1
    linear.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="its second layer is not the identity"):
        write_mm_projector(tmp_path / "model", file)


# ------------------------------------------------------------------------------------- slow: the original itself, and ours

STEPS, BATCH, MAX_LENGTH = 20, 4, 120
WORDS = ["red", "blue", "bird", "house", "left", "of", "two", "stars", "small", "near", "the", "a"]
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclasses.dataclass
class Recorded:
    """What a training saw: per step the loss, the parts of its batch, and the projector's gradient under a stock LLaVA's names."""

    losses: list[float]
    parts: list[list[dict[str, Tensor]]]
    gradients: list[dict[str, Tensor]]


@dataclasses.dataclass
class Original:
    """One tower, one language model, conversations: in both layouts."""

    python: Path
    folder: Path
    ours: dict[str, Recorded] = dataclasses.field(default_factory=dict)
    theirs: dict[str, Recorded] = dataclasses.field(default_factory=dict)
    order: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    adapters: dict[str, Path] = dataclasses.field(default_factory=dict)


@pytest.fixture(scope="module")
def python() -> Path:
    return original_python()


@pytest.mark.slow
def test_towers_compute_the_same_there(python: Path, towers: dict[str, Path], tmp_path: Path) -> None:
    """In transformers 4.37: pixels to the last bit, features as here, also where a model is being loaded around the tower."""
    pictures = [picture(90, 70, 1), picture(31, 113, 2), picture(48, 48, 3)]
    files = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for image, file in zip(pictures, files, strict=True):
        image.save(file)
    job = {"pictures": [*map(str, files)], "towers": {k: str(v) for k, v in towers.items()}, "layers": [-1, -2, 0]}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_original(python, "upstream_towers.py", tmp_path / "job.json", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    for kind, folder in towers.items():
        here = upstream.ExactImageProcessor(folder).preprocess(pictures, return_tensors="pt")["pixel_values"]
        pixels = found[f"{kind} pixels"]
        assert torch.equal(pixels, here)
        tower = load_tower(f"hf:{folder}")
        for layer in job["layers"]:
            for class_token, features in ((False, "patch"), (True, "cls_patch")):
                if kind == "siglip" and class_token:
                    assert f"{kind} {layer} {features}" not in found
                    continue
                expected = tower.features(pixels, layer, class_token)
                torch.testing.assert_close(found[f"{kind} {layer} {features}"], expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(found[f"{kind} within another"], found[f"{kind} -2 patch"], atol=0, rtol=0)


def save_data(folder: Path) -> None:
    """Pictures of all shapes; captions and conversations of uneven length, some text-only, some longer than MAX_LENGTH."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)

    def text(shortest: int, longest: int) -> str:
        return " ".join(rng.choice(WORDS, rng.integers(shortest, longest)))

    first, second = [], []
    for number in range(32):
        name = f"{number}.png"
        picture(*rng.integers(30, 90, 2).tolist(), seed=number).save(folder / "images" / name)
        longest = 150 if number % 8 == 7 else 24
        caption = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": text(2, longest)}]
        first.append({"id": f"a{number}", "image": name, "conversations": caption})
        turns = []
        for turn in range(rng.integers(1, 4)):
            mark = "<image>\n" if turn == 0 and number % 4 else ""
            turns.append({"from": "human", "value": f"{mark}Is there a {text(1, 4)}?"})
            turns.append({"from": "gpt", "value": text(1, 9) + (".\nOr not" if turn else "")})
        second.append({"id": f"t{number}", "conversations": turns, **({"image": name} if number % 4 else {})})
    (folder / "align.json").write_text(json.dumps(first))
    (folder / "tune.json").write_text(json.dumps(second))


def save_language_models(python: Path, folder: Path) -> None:
    """llm, for us; later llm_original is made of what we built of it. The tokenizer is a SentencePiece one in both."""
    lines = [SYSTEM, "USER: ASSISTANT: Describe it.", "Is there a ?", "Or not"] * 20 + [" ".join(WORDS)] * 60
    (folder / "corpus.txt").write_text("\n".join(lines))
    run_original(python, "upstream_tokenizer.py", folder / "corpus.txt", folder / "tokenizer")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    tokenizer.save_pretrained(folder / "llm")
    torch.manual_seed(1)
    LlamaForCausalLM(llama_config(len(tokenizer))).save_pretrained(folder / "llm")


def llama_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=vocab_size, max_position_embeddings=1024, initializer_range=0.1, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def give_to_original(folder: Path) -> None:
    """What we built of tower and language model, before any training, in the original's layout.

    Our language model has one row more, the one of <image>: the original gets it too, else its softmax is over one class fewer.
    """
    model, _ = build_mllm(load_tower(f"hf:{folder / 'tower'}"), folder / "llm", template="vicuna_v1")
    state = {
        name.replace("model.language_model.", "model."): value
        for name, value in model.state_dict().items()
        if name.startswith(("model.language_model.", "lm_head."))
    }
    llm = LlamaForCausalLM(llama_config(len(state["lm_head.weight"])))
    llm.load_state_dict(state)
    llm.save_pretrained(folder / "llm_original")
    for file in (folder / "tokenizer" / "slow").iterdir():
        (folder / "llm_original" / file.name).write_bytes(file.read_bytes())
    model.save_pretrained(folder / "start")
    assert write_mm_projector(folder / "start", folder / "start.bin") == "mlp2x_gelu"


def train_ours(world: Original, name: str, config: AlignConfig | TuneConfig) -> None:
    """Our own stage, unchanged, and what its steps saw."""
    recorded = Recorded([], [], [])

    class RecordingTrainer(llava_bridge.train.StageTrainer):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            samples = [self.train_dataset[i] for i in range(len(self.train_dataset))]
            world.order[name] = [int(s.where.rpartition("sample ")[2].split()[0]) - 1 for s in samples]
            adapters = {n: p.detach().clone() for n, p in self.model.named_parameters() if ".lora_" in n}
            if adapters:
                world.adapters[name] = world.folder / f"{name}_adapters.safetensors"
                save_file({n.replace("language_model.", ""): p for n, p in adapters.items()}, world.adapters[name])
            recorded.losses.append(0.0)
            recorded.parts.append([])

        def create_optimizer(self, *arguments: Any) -> Any:
            optimizer = super().create_optimizer(*arguments)
            optimizer.register_step_pre_hook(self.before_step)
            return optimizer

        def before_step(self, *_: Any) -> None:
            projector = {n: p for n, p in self.model.named_parameters() if "multi_modal_projector" in n}
            recorded.gradients.append({n.rpartition("projector.")[2]: p.grad.clone() for n, p in projector.items()})
            recorded.losses.append(0.0)
            recorded.parts.append([])

        def training_step(self, model: nn.Module, inputs: dict[str, Tensor], *rest: Any) -> Tensor:
            recorded.parts[-1].append({key: value.clone() for key, value in inputs.items()})
            loss = super().training_step(model, inputs, *rest)
            recorded.losses[-1] += float(loss)
            return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llava_bridge.train.StageTrainer", RecordingTrainer)
        (align if isinstance(config, AlignConfig) else tune)(config)
    del recorded.losses[-1], recorded.parts[-1]
    world.ours[name] = recorded


def original_arguments(world: Original, name: str, stage: str, parts: int, **more: Any) -> dict[str, Any]:
    """The original's command line for one of our trainings, as its scripts/v1_5 write it, on a CPU in fp32."""
    records = json.loads((world.folder / "data" / f"{stage}.json").read_text())
    file = world.folder / f"{name}.json"
    file.write_text(json.dumps([records[i] for i in world.order[name]]))  # in the order in which we saw them
    return {
        "model_name_or_path": world.folder / "llm_original", "version": "plain" if stage == "align" else "v1",
        "data_path": file, "image_folder": world.folder / "data" / "images", "vision_tower": world.folder / "tower",
        "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False, "image_aspect_ratio": "pad", "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH // parts, "gradient_accumulation_steps": parts, "weight_decay": 0.0,
        "warmup_ratio": 0.03, "lr_scheduler_type": "cosine", "logging_steps": 1, "model_max_length": MAX_LENGTH,
        "lazy_preprocess": True, "save_strategy": "no", "report_to": "none", "use_cpu": True, **more,
    }  # fmt: skip


@pytest.fixture(scope="module")
def original(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Original:
    """Six trainings of ours; the same by the original, those in parts once as it is and once with our normalisation."""
    world = Original(python, tmp_path_factory.mktemp("original"))
    folder = world.folder
    save_exported(folder / "tower", "vit")
    save_data(folder / "data")
    save_language_models(python, folder)
    give_to_original(folder)

    def data(stage: str) -> ConversationConfig:
        return ConversationConfig(folder / "data" / f"{stage}.json", folder / "data" / "images", MAX_LENGTH, "\n")

    common: dict[str, Any] = {"batch_size": BATCH, "samples": STEPS * BATCH, "precision": "float32", "save_every": 1000}
    first = {**common, "tower": f"hf:{folder / 'tower'}", "llm": str(folder / "llm"), "template": "vicuna_v1"}
    second = {**common, "align": folder / "align_parts", "tower": first["tower"], "image_mode": "pad",
              "lora": LoraConfig(4, 8, 0.0)}  # fmt: skip
    lora = {**second, "method": "lora", "learning_rate": 2e-3, "projector_learning_rate": 2e-4}
    full = {**second, "method": "full", "learning_rate": 2e-4, "projector_learning_rate": 2e-4}
    for name, stage, settings in (
        ("align", "align", first),
        ("align_parts", "align", {**first, "device_batch_size": 2}),
        ("lora", "tune", lora),
        ("lora_parts", "tune", {**lora, "device_batch_size": 2}),
        ("full", "tune", full),
        ("full_parts", "tune", {**full, "device_batch_size": 2}),
    ):
        kind: Any = AlignConfig if stage == "align" else TuneConfig
        train_ours(world, name, kind(out=folder / name, data=data(stage), **settings))
    write_mm_projector(folder / "align_parts" / "model", folder / "aligned.bin")

    runs = []

    def run(name: str, of: str, stage: str, as_ours: bool = False, tower_fp32: bool = True, **more: Any) -> None:
        labels = [sum(int((p["labels"][:, 1:] != IGNORE).sum()) for p in parts) for parts in world.ours[of].parts]
        start = folder / ("start.bin" if stage == "align" else "aligned.bin")
        options = {"output_dir": folder / f"llava-{name}", "pretrain_mm_mlp_adapter": start, **more}
        runs.append({
            "arguments": {k: str(v) for k, v in
                          original_arguments(world, of, stage, 2 if of.endswith("_parts") else 1, **options).items()},
            "record": str(folder / f"{name}.safetensors"), "labels": labels if as_ours else None,
            "adapters": str(world.adapters[of]) if of in world.adapters else None, "tower_fp32": tower_fp32,
        })  # fmt: skip

    plain = {"learning_rate": 1e-3, "tune_mm_mlp_adapter": True, "image_aspect_ratio": "square"}
    adapters = {"learning_rate": 2e-3, "mm_projector_lr": 2e-4, "lora_enable": True, "lora_r": 4, "lora_alpha": 8,
                "lora_dropout": 0.0}  # fmt: skip
    whole = {"learning_rate": 2e-4}
    run("align", "align", "align", **plain)
    run("align_half", "align", "align", tower_fp32=False, **plain)
    for name, stage, options in (("align", "align", plain), ("lora", "tune", adapters), ("full", "tune", whole)):
        run(f"{name}_parts", f"{name}_parts", stage, as_ours=True, **options)
        run(f"{name}_parts_own", f"{name}_parts", stage, **options)
        if stage == "tune":
            run(name, name, stage, **options)
    (folder / "job.json").write_text(json.dumps(runs))
    said = run_original(python, "upstream_train.py", folder / "job.json")
    assert "tokenization mismatch" not in said, said[-3000:]
    for job in runs:
        world.theirs[Path(job["record"]).stem] = read_record(Path(job["record"]))
    return world


def read_record(file: Path) -> Recorded:
    tensors = load_file(file)
    losses = tensors.pop("losses").tolist()
    recorded = Recorded(losses, [[] for _ in losses], [{} for _ in losses])
    names = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "2.weight": "linear_2.weight",
             "2.bias": "linear_2.bias"}  # fmt: skip
    for name, value in sorted(
        tensors.items(), key=lambda item: [int(p) if p.isdigit() else -1 for p in item[0].split(".")]
    ):
        step, part, rest = name.split(".", 2)
        if part == "gradient":
            recorded.gradients[int(step)][names[rest]] = value
            continue
        parts = recorded.parts[int(step)]
        parts += [{} for _ in range(int(part) + 1 - len(parts))]
        parts[int(part)][rest] = value
    return recorded


def deviations(ours: Recorded, theirs: Recorded) -> dict[str, float]:
    """The largest relative difference of a step's loss, and of a step's projector gradient (as vectors)."""
    losses = [abs(a - b) / abs(b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    gradients = []
    for a, b in zip(ours.gradients, theirs.gradients, strict=True):
        assert a.keys() == b.keys() and len(a) == 4
        one, other = (torch.cat([g[name].double().flatten() for name in sorted(a)]) for g in (a, b))
        gradients.append(float((one - other).norm() / other.norm()))
    return {"loss": max(losses), "gradient": max(gradients)}


TRAININGS = ("align", "align_parts", "lora", "lora_parts", "full", "full_parts")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_inputs_labels_and_pixels_are_the_originals(original: Original, name: str) -> None:
    ours, theirs = original.ours[name], original.theirs[name]
    _, processor = load_mllm(original.folder / "align_parts")
    image_tokens, lengths, cut, text_only = (48 // 8) ** 2, set(), 0, 0
    assert len(ours.parts) == len(theirs.parts) == STEPS
    for our_parts, their_parts in zip(ours.parts, theirs.parts, strict=True):
        assert len(our_parts) == len(their_parts) == (2 if name.endswith("_parts") else 1)
        for a, b in zip(our_parts, their_parts, strict=True):
            # The original puts the pictures' places in itself: its own result, padding and all, is what we begin with.
            assert torch.equal(a["labels"], b["expanded_labels"])
            pixels, seen = iter(a.get("pixel_values", [])), 0
            for row, (ids, labels, image) in enumerate(zip(b["input_ids"], b["labels"], b["images"], strict=True)):
                real = ids != 0  # the original's pad token is unk, which the words here have no need of
                repeats = torch.where(ids[real] == -200, image_tokens, 1)
                ids = ids[real].repeat_interleave(repeats)
                cut += len(ids) > MAX_LENGTH
                length = int(a["attention_mask"][row].sum())
                ids = torch.where(ids == -200, processor.image_token_id, ids)[:MAX_LENGTH]
                assert torch.equal(a["input_ids"][row][:length], ids)
                expected = labels[real].repeat_interleave(repeats)[:MAX_LENGTH]
                assert torch.equal(a["labels"][row][:length], expected)
                lengths.add(int((expected != IGNORE).sum()))
                if processor.image_token_id in ids:
                    assert torch.equal(next(pixels), image)
                    seen += 1
                else:
                    text_only += 1
            assert seen == len(a.get("pixel_values", []))
    assert len(lengths) > 5 and cut > 0 and (text_only > 0) == (not name.startswith("align"))


LOSS, GRADIENT = 3e-6, 3e-5  # the largest relative difference that is allowed of a step's loss and projector gradient


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAININGS)
def test_losses_and_gradients_are_the_originals(original: Original, name: str) -> None:
    """20 steps from the same weights and data; in parts, where both divide by the labels of the whole batch."""
    found = deviations(original.ours[name], original.theirs[name])
    print(f"\n{name}: {found}")
    assert found["loss"] < LOSS and found["gradient"] < GRADIENT
    losses = original.ours[name].losses
    assert len(losses) == STEPS and len(set(losses)) == STEPS


@pytest.mark.slow
def test_what_differs_on_purpose_is_seen(original: Original) -> None:
    """The comparison can fail: it does for parts that are each divided by their own labels, and for a tower in half precision."""
    for name in ("align_parts", "lora_parts", "full_parts"):
        own = deviations(original.ours[name], original.theirs[f"{name}_own"])
        print(f"\n{name}, each part by its own labels: {own}")
        assert 1000 * LOSS < own["loss"] < 0.5 and 1000 * GRADIENT < own["gradient"] < 1.5
    half = deviations(original.ours["align"], original.theirs["align_half"])
    print(f"\nalign, tower in half precision: {half}")
    assert GRADIENT < half["gradient"] < 0.01 and half["loss"] < 0.001


@pytest.mark.slow
def test_the_trained_projectors_are_the_same(original: Original) -> None:
    kind, theirs = read_mm_projector(original.folder / "llava-align" / "mm_projector.bin")
    ours = load_file(original.folder / "align" / "model" / "model.safetensors")
    start = load_file(original.folder / "start" / "model.safetensors")
    assert kind == "mlp2x_gelu"
    for name, value in theirs.items():
        name = f"model.multi_modal_projector.{name}"
        moved = (ours[name] - start[name]).norm()
        assert moved > 0 and (ours[name] - value).norm() < 0.02 * moved, name
    _, in_lora = read_mm_projector(original.folder / "llava-lora" / "non_lora_trainables.bin")
    assert in_lora.keys() == theirs.keys()


@pytest.mark.slow
def test_load_answer_and_tiles(original: Original, tmp_path: Path) -> None:
    """What the original trained, it loads and answers with: projector alone, in full, LoRA; and pictures in tiles."""
    folder = original.folder
    # Trained by the launcher as the original's scripts do, in bf16; then made a model for tiles, as LLaVA-1.6's are.
    tiles = tmp_path / "llava-tiles"
    options = {"learning_rate": 2e-4, "mm_patch_merge_type": "spatial_unpad", "output_dir": tiles, "max_steps": 2,
               "model_max_length": 1024, "pretrain_mm_mlp_adapter": folder / "aligned.bin", "bf16": True,
               "gradient_checkpointing": True, "group_by_modality_length": True}  # fmt: skip
    command = original_arguments(original, "full", "tune", 1, **options)
    run_original(
        original.python, "-m llava_bridge.upstream train", *(w for k, v in command.items() for w in (f"--{k}", str(v)))
    )
    config = json.loads((tiles / "config.json").read_text())
    pinpoints = [[48, 96], [96, 48], [96, 96], [144, 48], [48, 144]]
    config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": pinpoints}
    (tiles / "config.json").write_text(json.dumps(config))
    picture(100, 40, 7).save(tmp_path / "wide.png")
    base = str(folder / "llm_original")
    models = {
        "projector": {"path": str(folder / "llava-align_parts"), "base": base},
        "full": {"path": str(folder / "llava-full"), "base": None},
        "lora": {"path": str(folder / "llava-lora"), "base": base},
        "tiles": {"path": str(tiles), "base": None},
    }
    job = {"picture": str(tmp_path / "wide.png"), "question": "Is there a red bird?", "models": models}
    (tmp_path / "job.json").write_text(json.dumps(job))
    run_original(original.python, "upstream_use.py", tmp_path / "job.json", tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")

    pictured = Image.open(tmp_path / "wide.png")
    for name, run in (("projector", "align_parts"), ("full", "full"), ("lora", "lora")):
        model, processor = load_mllm(folder / run)
        pixels = processor.image_processor(pictured, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            (expected,) = model.model.get_image_features(pixel_values=pixels).pooler_output
        features = found[f"{name} features"]
        assert features.shape == expected.shape
        assert (features - expected).norm() < 0.01 * expected.norm(), name  # theirs are in fp16
        assert 1 < len(found[f"{name} answer"]) <= 9  # bos, then at most 8
    _, processor = build_mllm(
        load_tower(f"hf:{folder / 'tower'}"), folder / "llm", image_mode="anyres", template="vicuna_v1"
    )
    assert len(found["tiles features"]) == count_image_tokens(processor, [(40, 100)])[0]
    assert found["tiles tiles"].shape == (4, 3, 48, 48)  # the whole picture and three in a row
    assert 1 < len(found["tiles answer"]) <= 9


@pytest.mark.slow
@pytest.mark.skipif("LLAVA_NEXT" not in os.environ, reason="LLAVA_NEXT names no checkout of LLaVA-NeXT")
def test_llava_next(python: Path, towers: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA-NeXT's own model classes: build, tiles, answer, and a load that has no weights for the tower."""
    out = tmp_path / "out.safetensors"
    run_original(python, "upstream_next.py", towers["siglip"], out, before=os.environ["LLAVA_NEXT"])
    found = load_file(out)
    stored = load_file(towers["siglip"] / "model.safetensors")
    kept = {name.removeprefix("kept vision_model."): value for name, value in found.items() if name.startswith("kept ")}
    for name, value in stored.items():
        assert torch.equal(kept[name.removeprefix("vision_model.")], value), name
    # 36 of the whole picture, then 12 columns and an end of row for each of the rows that the picture fills.
    assert (len(found["features"]) - 36) % 13 == 0 and len(found["features"]) > 36 and len(found["answer"]) > 0
