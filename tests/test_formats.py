"""Exports against stock open_clip and stock transformers, and foreign folders read as stock open_clip reads them.

No released weights are at hand here: the folders have the layouts of the authors' releases, tiny sizes, and random weights.
"""

import copy
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, BertTokenizer, ViTModel

from clips_core.config import ModelConfig, load_config, to_dict
from clips_core.data import to_pixels
from clips_core.errors import InputError
from clips_core.folders import sha256_file, write_manifest
from clips_core.formats import export, load_model, load_open_clip, load_run, locate, read_open_clip_config
from clips_core.model import CLIPS, sin_cos_positions
from clips_core.tokenizer import ClipsTokenizer, train_vocab
from clips_core.zero_shot import normalise
from tests.test_model import tiny_config

TEXTS = ["A red heart", "a blue star above", ""]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[CLIPS, ClipsTokenizer, Path]:
    folder = tmp_path_factory.mktemp("export")
    train_vocab(["a red heart above a blue star!"], folder / "small_vocab.txt")
    torch.manual_seed(0)
    model = CLIPS(tiny_config())
    for name, value in model.named_parameters():
        if name != "visual.positional_embedding":
            value.data += 0.05 * torch.randn_like(value)
    tokenizer = ClipsTokenizer(folder / "small_vocab.txt")
    export(model, tokenizer, folder)
    return model.eval(), tokenizer, folder


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (45, 70, 3), dtype=np.uint8))


def pixels(size: int = 32) -> torch.Tensor:
    return normalise(torch.from_numpy(to_pixels(picture(), size)))[None]


# --- what we write --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stock_open_clip_opens_the_folder(exported: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    model, tokenizer, folder = exported
    name = f"local-dir:{folder / 'open_clip'}"
    stock, _, preprocess = open_clip.create_model_and_transforms(name)
    stock.eval()
    ids = open_clip.get_tokenizer(name)(TEXTS)
    assert ids.tolist() == tokenizer.encode(TEXTS, 12).tolist()
    torch.testing.assert_close(preprocess(picture())[None], pixels(), atol=1e-6, rtol=0)
    torch.testing.assert_close(stock.encode_image(pixels()), model.visual(pixels())[0])
    torch.testing.assert_close(stock.encode_text(ids), model.text(ids)[0])
    torch.testing.assert_close(stock.logit_scale, model.logit_scale)


def test_weights_can_be_read_by_whoever_reads_the_config(exported: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    modes = {path.stat().st_mode for path in exported[2].rglob("*") if path.suffix in (".json", ".safetensors")}
    assert len(modes) == 1


@torch.no_grad()
def test_vit_model_carries_the_tower_exactly(exported: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    model, _, folder = exported
    vit, info = ViTModel.from_pretrained(
        folder / "hf", add_pooling_layer=False, output_loading_info=True, dtype=torch.float64
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    visual = CLIPS(model.config).double()
    visual.load_state_dict({name: value.double() for name, value in model.state_dict().items()})
    noise = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    states = vit.eval()(noise, output_hidden_states=True).hidden_states
    feature, tokens = visual.visual(noise)
    torch.testing.assert_close(states[-1][:, 1:], tokens, rtol=1e-10, atol=1e-10)
    between = visual.visual.forward_intermediates(noise, indices=2, output_fmt="NLC")["image_intermediates"][0]
    torch.testing.assert_close(states[-2][:, 1:], between, rtol=1e-10, atol=1e-10)
    proj = load_file(folder / "hf" / "clips_sidecar.safetensors")["proj"].double()
    torch.testing.assert_close(vit.layernorm(states[-1][:, 1:].mean(1)) @ proj, feature, rtol=1e-10, atol=1e-10)


def test_hf_processor_equals_ours(exported: tuple[CLIPS, ClipsTokenizer, Path]) -> None:
    processor = AutoImageProcessor.from_pretrained(exported[2] / "hf", backend="pil")
    theirs = processor(picture(), return_tensors="pt").pixel_values
    torch.testing.assert_close(theirs, pixels(), atol=1e-6, rtol=0)


# --- a run's own folder ---------------------------------------------------------------------------------------------


def make_run(folder: Path, model: CLIPS, tokenizer: ClipsTokenizer) -> Path:
    export(model, tokenizer, folder / "export")
    write_manifest(folder, "pretrain", {"model": to_dict(model.config), "method": "clips"}, {}, {})
    return folder


def test_a_run_comes_back_with_its_decoder(exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = exported
    run = make_run(tmp_path / "run", model, tokenizer)
    for place in (run, run / "export"):
        loaded, words = load_run(place)
        assert loaded.config == model.config and words.tokens == tokenizer.tokens
        state = loaded.state_dict()
        assert state.keys() == model.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
        trained = {name for name, value in loaded.named_parameters() if value.requires_grad}
        assert trained == {name for name, value in model.named_parameters() if value.requires_grad}
    assert load_open_clip(run)[0].decoder is None
    assert locate(run).method == "clips"
    assert set(locate(run).hashes()) == {"open_clip_model.safetensors", "decoder.safetensors", "vocab.txt"}
    shutil.copytree(run / "export" / "open_clip", tmp_path / "towers")
    assert load_model(tmp_path / "towers")[0].decoder is None
    with pytest.raises(InputError, match="decoder was not kept"):
        load_run(tmp_path / "towers")


def test_a_runs_next_stage_has_another_resolution(exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = exported
    loaded, _ = load_run(make_run(tmp_path, model, tokenizer), image_size=48)
    assert loaded.config.image_size == 48 and loaded.decoder is not None
    torch.testing.assert_close(loaded.visual.positional_embedding.data, sin_cos_positions(6, 32))
    image = torch.randn(1, 3, 48, 48)
    assert loaded.visual(image)[1].shape == (1, 36, 32)
    with pytest.raises(InputError, match=r"image_size 50.*multiple of patch_size"):
        load_run(tmp_path, image_size=50)


def test_a_run_whose_weights_were_exchanged_is_refused(
    exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path
) -> None:
    model, tokenizer, _ = exported
    run = make_run(tmp_path, model, tokenizer)
    decoder = run / "export" / "clips" / "decoder.safetensors"
    recorded = sha256_file(decoder)
    save_file({name: value + 1 for name, value in load_file(decoder).items()}, decoder)
    with pytest.raises(InputError, match=rf"decoder\.safetensors: its hash is .* records {recorded}"):
        load_run(run)
    (run / "manifest.json").unlink()
    with pytest.raises(InputError, match="has not finished"):
        load_run(run)


# --- other people's folders -----------------------------------------------------------------------------------------


def authors_config(config: ModelConfig) -> dict[str, Any]:
    """The JSON of the authors' releases (ViT-L-14-CLIPS-224.json and its like), for other sizes."""
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "vision_cfg": {
                "image_size": config.image_size,
                "layers": config.vision.layers,
                "width": config.vision.width,
                "head_width": config.vision.width // config.vision.heads,
                "patch_size": config.patch_size,
                "no_ln_pre": True,
                "pool_type": "avg",
                "final_ln_after_pool": True,
                "norm_kwargs": {"eps": 1e-6},
            },
            "text_cfg": {
                "context_length": config.context_length,
                "vocab_size": config.vocab_size,
                "hf_tokenizer_name": "bert-base-uncased",
                "tokenizer_kwargs": {"strip_sep_token": True},
                "width": config.text.width,
                "heads": config.text.heads,
                "layers": config.text.layers,
                "pool_type": "last",
                "no_causal_mask": True,
                "act_kwargs": {"approximate": "tanh"},
                "norm_kwargs": {"eps": 1e-6},
            },
        },
        "preprocess_cfg": {
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "interpolation": "bilinear",
            "resize_mode": "squash",
        },
    }


def authors_state(model: CLIPS) -> dict[str, torch.Tensor]:
    """Weights under the names of open_clip's `CLIP`, which has the text tower at the top level."""
    state = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("decoder.")}
    return {name.removeprefix("text."): value for name, value in state.items()}


def write_release(
    folder: Path,
    model: CLIPS,
    tokenizer: ClipsTokenizer,
    weights: str = "open_clip_pytorch_model.bin",
    vocabulary: str = "vocab.txt",
    change: Callable[[dict[str, Any]], Any] = lambda config: None,
    state: dict[str, torch.Tensor] | None = None,
) -> Path:
    """A folder in the authors' layout; `change` edits its config."""
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(authors_config(model.config))
    change(config)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    state = authors_state(model) if state is None else state
    if weights.endswith(".bin"):
        torch.save(state, folder / weights)
    else:
        save_file({name: value.contiguous() for name, value in state.items()}, folder / weights)
    if vocabulary == "vocab.txt":
        shutil.copyfile(tokenizer.vocab_path, folder / vocabulary)
    elif vocabulary == "tokenizer.json":
        ids = {token: i for i, token in enumerate(tokenizer.tokens)}
        BertTokenizer(vocab=ids, do_lower_case=True, bos_token="[unused0]", eos_token="[unused1]").save_pretrained(
            folder
        )
        assert (folder / "tokenizer.json").is_file() and not (folder / "vocab.txt").exists()
    return folder


def mode_clips(config: dict[str, Any]) -> None:
    config["model_cfg"]["text_cfg"]["tokenizer_mode"] = "clips"


def custom_text(config: dict[str, Any]) -> None:
    mode_clips(config)
    config["model_cfg"]["custom_text"] = True


def bare(config: dict[str, Any]) -> None:
    model = config.pop("model_cfg")
    config.clear()
    config.update(model)


@torch.no_grad()
@pytest.mark.parametrize(
    ("weights", "vocabulary", "change"),
    [
        ("open_clip_pytorch_model.bin", "vocab.txt", lambda config: None),  # the authors' own
        ("open_clip_model.safetensors", "vocab.txt", mode_clips),
        ("open_clip_pytorch_model.bin", "tokenizer.json", mode_clips),
        ("open_clip_model.safetensors", "tokenizer.json", custom_text),
    ],
)
def test_every_layout_of_a_release_loads(
    exported: tuple[CLIPS, ClipsTokenizer, Path],
    tmp_path: Path,
    weights: str,
    vocabulary: str,
    change: Callable[[dict[str, Any]], None],
) -> None:
    model, tokenizer, _ = exported
    state = authors_state(model)
    if change is custom_text:
        state = {n: value for n, value in model.state_dict().items() if not n.startswith("decoder.")}
    folder = write_release(tmp_path, model, tokenizer, weights, vocabulary, change, state)
    loaded, words = load_open_clip(folder)
    assert words.encode(TEXTS, 12).tolist() == tokenizer.encode(TEXTS, 12).tolist()
    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    stock.eval()
    ids = torch.from_numpy(words.encode(TEXTS, 12))
    torch.testing.assert_close(loaded.eval().visual(pixels())[0], stock.encode_image(pixels()))
    torch.testing.assert_close(loaded.text(ids)[0], stock.encode_text(ids))
    torch.testing.assert_close(preprocess(picture())[None], pixels(), atol=1e-6, rtol=0)
    if vocabulary == "tokenizer.json":  # stock open_clip needs it, and the mode, to tokenize as the release does
        assert open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS).tolist() == ids.tolist()


def test_a_bare_model_config_and_half_precision_load(
    exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path
) -> None:
    model, tokenizer, _ = exported
    half = {name: value.half() for name, value in authors_state(model).items()}
    half["logit_scale"] = half["logit_scale"].reshape(1)
    loaded, _ = load_open_clip(write_release(tmp_path, model, tokenizer, change=bare, state=half))
    assert all(value.dtype == torch.float32 and not value.is_meta for value in loaded.state_dict().values())
    torch.testing.assert_close(loaded.logit_scale, model.logit_scale, rtol=1e-3, atol=0)


def test_weights_that_train_on_leave_their_file_as_it_is(
    exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path
) -> None:
    model, tokenizer, _ = exported
    weights = write_release(tmp_path, model, tokenizer) / "open_clip_pytorch_model.bin"  # mapped into memory, not read
    before = sha256_file(weights)
    loaded, _ = load_open_clip(tmp_path)
    with torch.no_grad():
        for value in loaded.parameters():
            value.add_(1)
    assert torch.equal(loaded.visual.proj, model.visual.proj + 1) and sha256_file(weights) == before


def test_safetensors_are_preferred(exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = exported
    write_release(tmp_path, model, tokenizer, "open_clip_model.safetensors")
    (tmp_path / "open_clip_pytorch_model.bin").write_text("never looked at")
    load_open_clip(f"local-dir:{tmp_path}")


def test_the_published_sizes_are_ours(tmp_path: Path) -> None:
    for size, image_size in (("L/14", 224), ("L/14", 336), ("H/14", 224)):
        expected = load_config(ModelConfig, None, [f"size={size}", f"image_size={image_size}", "decoder=null"])
        path = tmp_path / "open_clip_config.json"
        content = authors_config(expected)
        if size == "L/14":
            del content["model_cfg"]["vision_cfg"]["head_width"]  # as published: open_clip's default
        path.write_text(json.dumps(content))
        found = read_open_clip_config(path)
        assert to_dict(found) == {**to_dict(expected), "size": None}


def test_a_name_on_the_hub_comes_from_the_cache(
    exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model, tokenizer, _ = exported
    repository, commit = tmp_path / "models--LAB--ViT-Ti-8-CLIPS", "0123456789abcdef0123456789abcdef01234567"
    write_release(repository / "snapshots" / commit, model, tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    loaded, words = load_open_clip("hf-hub:LAB/ViT-Ti-8-CLIPS")
    assert words.tokens == tokenizer.tokens and torch.equal(loaded.visual.proj, model.visual.proj)
    stock = open_clip.create_model("hf-hub:LAB/ViT-Ti-8-CLIPS", cache_dir=str(tmp_path)).eval()
    torch.testing.assert_close(loaded.eval().visual(pixels())[0], stock.encode_image(pixels()))
    assert load_model(f"hf-hub:LAB/ViT-Ti-8-CLIPS@{commit}")[0].decoder is None
    with pytest.raises(InputError, match=r"hf-hub:LAB/other: no open_clip_config\.json"):
        load_open_clip("hf-hub:LAB/other")
    (repository / "snapshots" / commit / "open_clip_pytorch_model.bin").unlink()
    with pytest.raises(InputError, match=r"has neither open_clip_model\.safetensors nor"):
        load_open_clip("hf-hub:LAB/ViT-Ti-8-CLIPS")


def test_a_release_without_vocabulary_has_berts(exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = exported
    folder = write_release(tmp_path, model, tokenizer, vocabulary="none")
    with pytest.raises(InputError, match=r"30522 entries, but the model's vocab_size is 150"):
        load_open_clip(folder)

    def other(config: dict[str, Any]) -> None:
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "roberta-base"

    with pytest.raises(InputError, match=r"has neither vocab\.txt nor tokenizer\.json"):
        load_open_clip(write_release(tmp_path, model, tokenizer, vocabulary="none", change=other))


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("vision_cfg", "pool_type", "tok"),
        ("vision_cfg", "no_ln_pre", False),
        ("vision_cfg", "final_ln_after_pool", False),
        ("vision_cfg", "ls_init_value", 1e-5),
        ("vision_cfg", "norm_kwargs", None),  # open_clip's default eps is 1e-5
        ("vision_cfg", "mlp_ratio", 2.0),
        ("vision_cfg", "timm_model_name", "vit_tiny"),
        ("vision_cfg", "head_width", 24),
        ("text_cfg", "no_causal_mask", False),
        ("text_cfg", "act_kwargs", None),
        ("text_cfg", "pool_type", "argmax"),
        ("text_cfg", "tokenizer_mode", "other"),
        ("text_cfg", "proj_bias", True),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("preprocess_cfg", "resize_mode", "shortest"),
        ("preprocess_cfg", "mean", [0.5, 0.5, 0.5]),
        ("model_cfg", "quick_gelu", True),
        ("model_cfg", "init_logit_bias", -10),
    ],
)
def test_what_a_clips_model_cannot_be_is_refused(tmp_path: Path, part: str, key: str, value: Any) -> None:
    config = authors_config(tiny_config())
    place = config[part] if part in config else config["model_cfg"][part]
    place[key] = value
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(config))
    name = key if part == "model_cfg" else f"{part}.{key}"
    with pytest.raises(InputError, match=rf"open_clip_config\.json: {name} is .*open_clip:NAME"):
        read_open_clip_config(path)


def test_a_config_that_makes_no_sense_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "open_clip_config.json"

    def error(change: Callable[[dict[str, Any]], Any]) -> str:
        config = authors_config(tiny_config())
        change(config["model_cfg"])
        path.write_text(json.dumps(config))
        with pytest.raises(InputError) as caught:
            read_open_clip_config(path)
        return str(caught.value)

    assert "vision_cfg.widht is no setting" in error(lambda c: c["vision_cfg"].update(widht=3))
    assert "'embed_dim' is required" in error(lambda c: c.pop("embed_dim"))
    assert "multiple of patch_size" in error(lambda c: c["vision_cfg"].update(image_size=30))
    assert "size cannot be used" in error(lambda c: c["vision_cfg"].update(image_size=[32, 64]))
    assert "size cannot be used" in error(lambda c: c["vision_cfg"].update(layers=[1, 2, 3, 4]))
    path.write_text("[1]")
    with pytest.raises(InputError, match="must be a JSON object"):
        read_open_clip_config(path)


def test_weights_that_do_not_fit_are_named(exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = exported

    def error(change: Callable[[dict[str, torch.Tensor]], Any]) -> str:
        state = authors_state(model)
        change(state)
        with pytest.raises(InputError) as caught:
            load_open_clip(write_release(tmp_path, model, tokenizer, state=state))
        return str(caught.value)

    assert "lacks weight 'text.ln_final.bias' (1 in all)" in error(lambda s: s.pop("ln_final.bias"))
    assert "unknown weight 'visual.ln_pre.weight'" in error(
        lambda s: s.update({"visual.ln_pre.weight": s["ln_final.bias"]})
    )
    short = error(lambda s: s.update({"visual.proj": s["visual.proj"][:, :8]}))
    assert "'visual.proj' has shape (32, 8), but the config makes it (32, 16)" in short
    grid = error(lambda s: s.update({"visual.positional_embedding": torch.zeros(26, 32)}))
    assert "'visual.positional_embedding' has shape (26, 32), but the config makes it (17, 32)" in grid
    with pytest.raises(InputError, match="no such folder"):
        load_open_clip(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no open_clip_config\.json"):
        load_open_clip(tmp_path / "empty")


class Bomb:
    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_pickle_is_not_run(exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    model, tokenizer, _ = exported
    folder = write_release(tmp_path, model, tokenizer)
    weights = folder / "open_clip_pytorch_model.bin"
    torch.save({"visual.proj": Bomb(tmp_path / "ran")}, weights)
    with pytest.raises(InputError, match=r"open_clip_pytorch_model\.bin: cannot be read as plain tensors"):
        load_open_clip(folder)
    weights.write_bytes(pickle.dumps(Bomb(tmp_path / "ran"), protocol=2))
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load_open_clip(folder)
    assert not (tmp_path / "ran").exists()
    weights.write_bytes(weights.read_bytes()[:10])
    with pytest.raises(InputError, match="cannot be read as plain tensors"):
        load_open_clip(folder)


@torch.no_grad()
def test_another_resolution(exported: tuple[CLIPS, ClipsTokenizer, Path], tmp_path: Path) -> None:
    """Sin-cos positions are made anew; learned ones are interpolated exactly as stock open_clip does it."""
    model, tokenizer, _ = exported
    fixed, _ = load_open_clip(write_release(tmp_path / "fixed", model, tokenizer), image_size=48)
    torch.testing.assert_close(fixed.visual.positional_embedding.data, sin_cos_positions(6, 32))
    state = authors_state(model)
    state["visual.positional_embedding"] = torch.randn(17, 32)
    folder = write_release(tmp_path / "learned", model, tokenizer, state=state)
    assert torch.equal(load_open_clip(folder)[0].visual.positional_embedding, state["visual.positional_embedding"])
    learned, _ = load_open_clip(folder, image_size=48)
    stock = open_clip.create_model(f"local-dir:{folder}", force_image_size=48).eval()
    torch.testing.assert_close(learned.eval().visual(pixels(48))[0], stock.encode_image(pixels(48)))
