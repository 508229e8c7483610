"""A result made public: its card, its folder in stock transformers, weights that cannot be exchanged, and the push."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hub_server import TOKEN, Hub, serve_hub
from huggingface_hub import ModelCard
from llava_samples import save_llm, save_tower
from PIL import Image
from safetensors.torch import load_file, save_file

from clips_core.config import to_dict
from clips_core.errors import InputError
from clips_core.folders import read_manifest, sha256_file, write_manifest
from llava_bridge.adapters import save_adapter
from llava_bridge.card import hub_name, model_card, public_name, push, write_card
from llava_bridge.chat import load_chat_model
from llava_bridge.config import AlignConfig, ConversationConfig, LoraConfig, TuneConfig
from llava_bridge.llm import weight_hash
from llava_bridge.methods import add_lora, merge_lora
from llava_bridge.mllm import build_mllm, load_mllm, save_mllm
from llava_bridge.precision import resolve_precision
from llava_bridge.towers import load_tower

ROOT = Path(__file__).parents[1]
OUTPUTS = {"model": "model", "dtype": "float32", "steps": 6, "samples": 24, "seconds": 1.0, "loss": 2.34567}
TOWER = "model.vision_tower."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What both stages leave behind, without having trained: tower/, llm/, align/ and tune/."""
    folder = tmp_path_factory.mktemp("card")
    save_tower(folder / "my-tower")
    save_llm(folder / "my-llm")
    tower = load_tower(f"hf:{folder / 'my-tower'}")
    model, processor = build_mllm(tower, folder / "my-llm")
    data = ConversationConfig(folder / "secret" / "captions.json", folder / "secret" / "images")
    align = AlignConfig(out=folder / "align", tower=tower.spec, llm=str(folder / "my-llm"), data=data)
    save_mllm(model, processor, align.out / "model")
    inputs = {"tower": tower.weight_hash, "llm": weight_hash(folder / "my-llm"), "data": "c" * 64}
    write_manifest(align.out, "align", _settings(align), inputs, OUTPUTS)
    tune = TuneConfig(out=folder / "tune", align=align.out, data=data)
    tuned = model.model.vision_tower.get_parameter(_some_name(model))
    with torch.no_grad():
        tuned.add_(0.01)  # as with tower_learning_rate
    save_mllm(model, processor, tune.out / "model")
    inputs |= {"data": "d" * 64, "align": weight_hash(align.out / "model")}
    write_manifest(tune.out, "tune", _settings(tune), inputs, OUTPUTS)
    return folder


def _settings(config: Any) -> dict[str, Any]:
    return {key: value for key, value in to_dict(config).items() if key != "out"}


def _some_name(model: Any) -> str:
    """A weight of the tower's first block."""
    return next(name for name, p in model.model.vision_tower.named_parameters() if ".0." in name and p.ndim == 2)


# ------------------------------------------------------------------------------------------------------------ the card


def test_the_card_tells_what_the_model_is_made_of(folder: Path) -> None:
    manifest = read_manifest(folder / "tune")
    path = write_card(folder / "tune" / "model", manifest)
    card = ModelCard.load(path)
    assert card.data.to_dict() == {
        "license": "unknown", "library_name": "transformers", "pipeline_tag": "image-text-to-text",
        "tags": ["llava", "clips-llava"],
    }  # fmt: skip
    hashes = {
        "hf:my-tower": manifest["inputs"]["tower"],
        "my-llm": sha256_file(folder / "my-llm" / "model.safetensors"),
        "model.safetensors": sha256_file(folder / "tune" / "model" / "model.safetensors"),
        "captions.json": "d" * 64,
    }
    for name, digest in hashes.items():
        assert f"`{name}` | `{digest}`" in card.text, name
    assert f"`captions.json` | `{'c' * 64}`" in card.text
    assert "6 steps over 24 samples" in card.text and "2.3457" in card.text
    (shown,) = re.findall(r"```yaml\n(.*?)```", card.text, re.DOTALL)
    settings = _settings(TuneConfig(**manifest["config"], out=Path("x")))
    expected = settings | {"align": "align", "data": {**settings["data"], "json": "captions.json", "images": "images"}}
    assert yaml.safe_load(shown) == expected
    assert str(folder) not in path.read_text() and "/" not in card.text.partition("## Loading")[0].replace("image/", "")


def test_without_its_stage_1_a_card_still_has_the_hashes(folder: Path) -> None:
    manifest = read_manifest(folder / "tune")
    moved = {**manifest, "config": {**manifest["config"], "align": "gone"}}
    text = model_card(moved).text
    assert "unnamed" in text and "captions, stage 1" not in text
    assert manifest["inputs"]["tower"] in text and manifest["inputs"]["llm"] in text
    other = {**manifest, "inputs": {**manifest["inputs"], "align": "0" * 64}}
    assert "unnamed" in model_card(other).text, "it named the parts of another stage 1"


def test_a_card_of_each_kind(folder: Path) -> None:
    aligned = read_manifest(folder / "align")
    named = {**aligned["config"], "tower": "clips:hf-hub:UCSC-VLAA/ViT-L-14-CLIPS@v1", "llm": "smollm2"}
    card = model_card({**aligned, "config": named}, license="apache-2.0")
    assert card.data.license == "apache-2.0" and "clips" in card.data.tags
    assert card.data.base_model == ["HuggingFaceTB/SmolLM2-135M-Instruct", "UCSC-VLAA/ViT-L-14-CLIPS"]
    assert "Everything but the projector is as it was" in card.text and "captions only" in card.text
    tune = read_manifest(folder / "tune")
    for changes, words in (
        ({"method": "full"}, "language model in full"),
        ({"method": "qlora"}, "weights in 4 bits"),
        ({"tower_learning_rate": 1e-5}, "no longer the one named"),
    ):
        assert words in model_card({**tune, "config": {**tune["config"], **changes}}).text


@pytest.mark.parametrize(
    ("spec", "shown", "hub"),
    [
        ("clips:/home/me/runs/clips-b16", "clips:clips-b16", None),
        ("clips:runs/clips-b16", "clips:clips-b16", None),
        ("clips:hf-hub:UCSC-VLAA/ViT-L-14", "clips:hf-hub:UCSC-VLAA/ViT-L-14", "UCSC-VLAA/ViT-L-14"),
        ("hf:facebook/dinov2-large", "hf:facebook/dinov2-large", "facebook/dinov2-large"),
        ("hf:facebook/dinov2-large@main", "hf:facebook/dinov2-large@main", "facebook/dinov2-large"),
        ("hf:tests/data", "hf:data", None),
        ("hf:../towers/mine", "hf:mine", None),
        ("open_clip:ViT-B-16/openai", "open_clip:ViT-B-16/openai", None),
        ("open_clip:hf-hub:laion/CLIP", "open_clip:hf-hub:laion/CLIP", "laion/CLIP"),
        ("smollm2", "smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("lmsys/vicuna-7b-v1.5@abc", "lmsys/vicuna-7b-v1.5@abc", "lmsys/vicuna-7b-v1.5"),
        ("/models/vicuna", "vicuna", None),
    ],
)
def test_names_and_paths(spec: str, shown: str, hub: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert public_name(spec) == shown
    assert hub_name(spec) == hub


# --------------------------------------------------------------------------------------------------- the model's folder

ALONE = """
import sys

class NotHere:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("clips_core", "llava_bridge", "eval_suites"):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, NotHere())
"""


def test_the_cards_code_runs_where_nothing_of_ours_is_installed(folder: Path, tmp_path: Path) -> None:
    """Word for word, in the model's folder, by a Python that cannot import this package; it answers as we do."""
    model = folder / "tune" / "model"
    card = write_card(model, read_manifest(folder / "tune"))
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    picture = np.random.default_rng(0).integers(0, 256, (48, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(model / "picture.jpg")
    program = f"{ALONE}{code}\nimport json, hashlib\nprint(json.dumps(answer.tolist()))"
    try:
        done = subprocess.run([sys.executable, "-I", "-c", program], cwd=model, capture_output=True, text=True)
    finally:
        image = Image.open(model / "picture.jpg").convert("RGB")
        (model / "picture.jpg").unlink()
    assert done.returncode == 0, done.stderr
    llava, processor = load_mllm(folder / "tune")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "What is in the picture?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )  # fmt: skip
    expected = llava.generate(**inputs, max_new_tokens=64, do_sample=False)
    assert json.loads(done.stdout.splitlines()[-1]) == expected.tolist()


def test_a_tuned_tower_stays_tuned(folder: Path) -> None:
    """The result holds its own tower: neither the untuned one on disk nor its hub repository is looked at again."""
    model, _ = load_mllm(folder / "tune")
    untuned, _ = load_mllm(folder / "align")
    name = _some_name(model)
    saved = load_file(folder / "tune" / "model" / "model.safetensors")[TOWER + name]
    assert torch.equal(model.model.vision_tower.get_parameter(name), saved)
    assert not torch.equal(saved, untuned.model.vision_tower.get_parameter(name))


def test_an_exchanged_tower_is_refused(folder: Path, tmp_path: Path) -> None:
    """The tuned tower's weights replaced by those it came from: sizes and names fit, the hash does not."""
    run = tmp_path / "tune"
    shutil.copytree(folder / "tune", run)
    file = run / "model" / "model.safetensors"
    before = load_file(folder / "align" / "model" / "model.safetensors")
    weights = {name: before[name] if name.startswith(TOWER) else value for name, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"model\.safetensors: [0-9a-f]{64}, but .*manifest\.json records [0-9a-f]{64}"
    ):
        load_mllm(run)
    with pytest.raises(InputError, match="run the stage again"):
        push(run, "me/mine")


# ------------------------------------------------------------------------------------------------------------ adapters


@pytest.fixture(scope="module")
def adapter_run(folder: Path) -> Path:
    """A stage 2 with save=adapter: adapters that do something, and a projector that moved."""
    run = folder / "adapters"
    base, processor = load_mllm(folder / "align")
    model, names = add_lora(base, LoraConfig(rank=4, alpha=8, dropout=0.0), seed=0)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names or "multi_modal_projector" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, processor, folder / "align" / "model", run / "adapter")
    merged = merge_lora(model, torch.float32)
    save_file(
        {name: value.contiguous().clone() for name, value in merged.state_dict().items()}, folder / "merged.safetensors"
    )
    tune = read_manifest(folder / "tune")
    settings = {**tune["config"], "save": "adapter"}
    outputs = {**OUTPUTS, "adapter": "adapter", "tower": "kept"}
    del outputs["model"]
    write_manifest(run, "tune", settings, tune["inputs"], outputs)
    return run


def test_adapters_load_as_the_merged_model(folder: Path, adapter_run: Path) -> None:
    expected = load_file(folder / "merged.safetensors")
    for name in (adapter_run, adapter_run / "adapter"):
        model, _ = load_chat_model(name)
        state = model.float().state_dict()
        exact = resolve_precision("auto") == torch.float32
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=0 if exact else 1e-2, atol=1e-6 if exact else 1e-2)


def test_pushed_adapters_name_no_path(folder: Path, adapter_run: Path) -> None:
    with serve_hub() as hub:
        done = push_to(hub, adapter_run, "me/adapters")
        assert done.returncode == 0, done.stderr
    files = hub.files["me/adapters"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "manifest.json"} <= set(files)
    assert all(str(folder).encode() not in content for content in files.values())
    config = json.loads(files["adapter_config.json"])
    assert config["base_model_name_or_path"] is None and config["peft_type"] == "LORA"
    card = ModelCard(files["README.md"].decode())
    assert card.data.library_name == "peft" and "lora" in card.data.tags and "PeftModel" in card.text
    (adapter_run / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(InputError, match="run the stage again"):
        push(adapter_run, "me/adapters")


# -------------------------------------------------------------------------------------------------------------- the push


def push_to(hub: Hub | str, *arguments: Any, token: str | None = TOKEN, **options: Any) -> subprocess.CompletedProcess:
    """`push` in a process of its own: the hub's library reads its address and token when it is imported."""
    address = hub if isinstance(hub, str) else hub.address
    code = (
        "import sys; from pathlib import Path; from clips_core.errors import InputError\n"
        "from llava_bridge.card import push\n"
        f"try: print(push(Path({str(arguments[0])!r}), {arguments[1]!r}, **{options!r}))\n"
        "except InputError as error: sys.exit(f'error: {error}')"
    )
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    environment = {**kept, "HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": "/nonexistent"}
    environment |= {} if token is None else {"HF_TOKEN": token}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_push(folder: Path) -> None:
    model = folder / "tune" / "model"
    (model / "README.md").unlink(missing_ok=True)
    with serve_hub() as hub:
        done = push_to(hub, folder / "tune", "me/my-llava", private=True, license="apache-2.0")
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[-1] == f"{hub.address}/me/my-llava"
    assert hub.repositories == {"me/my-llava": True} and hub.commits == ["Upload with clips-llava"]
    files = hub.files["me/my-llava"]
    assert set(files) == {path.name for path in model.iterdir()} | {"README.md", "manifest.json"}
    for path in model.iterdir():
        assert files[path.name] == path.read_bytes(), path
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "apache-2.0" and "hf:my-tower" in card.text
    manifest = json.loads(files["manifest.json"])
    assert manifest["weights"] == read_manifest(folder / "tune")["weights"]
    assert manifest["config"]["align"] == "align" and manifest["config"]["data"]["json"] == "captions.json"
    for name, content in files.items():
        assert not name.endswith("safetensors") or name == "model.safetensors"
        assert str(folder).encode() not in content and b"/secret" not in content, f"{name} tells a path of this machine"
    assert not (model / "README.md").exists() and not (model / "manifest.json").exists()


@pytest.mark.slow
def test_pushes_again_and_pushes_refused(folder: Path) -> None:
    """A card that was edited by hand is kept; what the hub refuses is said in one line."""
    card = write_card(folder / "tune" / "model", read_manifest(folder / "tune"))
    card.write_text(card.read_text().replace("# LLaVA", "# My own words"))
    with serve_hub() as hub:
        for _ in range(2):
            assert push_to(hub, folder / "tune", "me/mine").returncode == 0
        assert b"# My own words" in hub.files["me/mine"]["README.md"] and not hub.repositories["me/mine"]
        for name, options, words in (
            ("me/mine", {"private": True}, "me/mine is there already, and public"),
            ("not-ours/mine", {}, "the hub did not take not-ours/mine (.*403"),
        ):
            done = push_to(hub, folder / "tune", name, **options)
            assert done.returncode == 1 and re.search(
                f"^error: {re.escape(words).replace(re.escape('.*'), '.*')}", done.stderr
            )
        assert "error: the hub did not take" in push_to(hub, folder / "tune", "me/mine", token="hf_other").stderr
    card.unlink()
    gone = push_to("http://127.0.0.1:9", folder / "tune", "me/mine")
    assert re.fullmatch(
        r"error: the hub did not take me/mine \(.*\); nothing is lost, run the same command again\n", gone.stderr
    )
    assert "error: no token for the hub" in push_to("http://127.0.0.1:9", folder / "tune", "me/mine", token=None).stderr


def test_what_is_not_pushed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(InputError, match="no such folder"):
        push(tmp_path / "none", "me/mine")
    (tmp_path / "unfinished" / "model").mkdir(parents=True)
    with pytest.raises(InputError, match="has not finished"):
        push(tmp_path / "unfinished", "me/mine")
    for name in ("mine", "me/mine/too", "me/--", "../me"):
        with pytest.raises(InputError, match="repository"):
            push(folder / "tune", name)
    with pytest.raises(InputError, match=r"hub did not take .*[Oo]ffline"):
        push(folder / "tune", "me/mine")  # conftest sets HF_HUB_OFFLINE
