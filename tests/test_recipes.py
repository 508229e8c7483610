"""Sizes and recipes: the published figures, the arithmetic of the stages, and every recipe's debug twin, trained."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clips_core import plan, sizes
from clips_core.config import ModelConfig, PretrainConfig, load_config, load_settings, recipe_path, to_dict
from clips_core.errors import InputError
from clips_core.folders import read_manifest
from clips_core.model import CLIPS
from clips_core.shards import write_shards
from clips_core.train import pretrain

PACKAGE = Path(plan.__file__).parent
RECIPES = sorted(
    path.relative_to(PACKAGE / "recipes").with_suffix("").as_posix()
    for folder in ("paper", "one_node")
    for path in (PACKAGE / "recipes" / folder).glob("*.yaml")
)
PUBLISHED = [name for name in sizes.SIZES if name not in ("Ti/16", "debug")]


def model(*settings: str) -> ModelConfig:
    return load_config(ModelConfig, None, list(settings))


def run(name: str, *settings: str) -> PretrainConfig:
    return load_settings(PretrainConfig, PACKAGE, [name, *settings])


def write(folder: Path, **recipes: str) -> Path:
    for name, text in recipes.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Sizes
# ---------------------------------------------------------------------------------------------------------------------


# Millions of parameters in open_clip's published docs/model_profile.csv, at 224 px: of the image tower with the same patches and
# width, and of the text tower of that width. There a tower that is no CLIPA has a LayerNorm before its blocks (2 d more); a text
# tower has 49,408 words and 77 positions, or as CLIPA 32,000 and the number of positions in the third place.
OPEN_CLIP = {
    "S/16": (21.81, 40.44, 77, 2),
    "B/16": (86.19, 63.43, 77, 2),
    "L/16": (304.09, 123.65, 77, 2),
    "L/14": (303.96, 110.25, 32, 0),  # ViT-L-14-CLIPA
    "H/14": (632.07, 336.16, 32, 0),  # ViT-H-14-CLIPA
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_towers_have_the_published_number_of_parameters(size: str) -> None:
    config = model(f"size={size}", "image_size=224")
    counts = plan.parameter_counts(config)
    image, text, positions, norms = OPEN_CLIP[size]
    words = 32_000 if positions == 32 else 49_408
    assert (counts["visual"] + norms * config.vision.width) / 1e6 == pytest.approx(image, abs=0.0051)
    others = (words + positions - config.vocab_size - config.context_length) * config.text.width
    assert (counts["text"] + others) / 1e6 == pytest.approx(text, abs=0.0051)


@pytest.mark.parametrize("size", sizes.SIZES)
@pytest.mark.parametrize("decoder", ["", "decoder=null"])
def test_parameter_counts_are_those_of_the_model(size: str, decoder: str) -> None:
    config = model(f"size={size}", "image_size=112", *filter(None, [decoder]))
    with torch.device("meta"):
        built = CLIPS(config)
    counts = {"total": sum(p.numel() for p in built.parameters())}
    for part in ("visual", "text", "decoder"):
        counts[part] = sum(p.numel() for name, p in built.named_parameters() if name.startswith(f"{part}."))
    assert plan.parameter_counts(config) == counts
    width = 80 if size == "H/14" else 16 if size == "debug" else 64
    assert built.visual.transformer.resblocks[0].attn.head_dim == width


def test_a_size_stands_for_its_parts_and_what_is_given_goes_first(tmp_path: Path) -> None:
    config = model("size=B/16", "image_size=112", "text.layers=3", "decoder=null", "embed_dim=64")
    assert (config.patch_size, config.vision.width, config.vision.heads) == (16, 768, 12)
    assert (config.text.layers, config.text.width, config.embed_dim, config.decoder) == (3, 512, 64, None)
    assert load_config(ModelConfig, write(tmp_path, resolved=json.dumps(to_dict(config))) / "resolved.yaml") == config
    with pytest.raises(InputError, match=r"no size 'B/17' \(did you mean 'B/16'\?\): the sizes are Ti/16, S/16, "):
        model("size=B/17", "image_size=112")
    with pytest.raises(InputError, match="84 is not a multiple of patch_size 16"):
        model("size=L/16", "image_size=84")


# ---------------------------------------------------------------------------------------------------------------------
# Recipes that build on recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_recipe_extends_another_and_lies_under_a_third(tmp_path: Path) -> None:
    base = "image_size: 32\nvision: {width: 32, layers: 2, heads: 2}\nsize: B/16\n"
    write(
        tmp_path,
        base=base,
        middle="extends: base.yaml\nvision: {layers: 5}\n",
        top="decoder: null\ntext: {layers: 1}\n",
    )
    config = load_config(ModelConfig, [tmp_path / "middle.yaml", tmp_path / "top.yaml"], ["text.heads=4"])
    assert to_dict(config.vision) == {"width": 32, "layers": 5, "heads": 2}
    assert to_dict(config.text) == {"width": 512, "layers": 1, "heads": 4}
    assert config.decoder is None and config.embed_dim == 512


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        (
            {"a": "extends: b.yaml\n", "b": "image_size: 3\nimage_sise: 4\n"},
            r"b\.yaml, line 2: unknown key 'image_sise'",
        ),
        (
            {"a": "\nvision: {layers: many}\nextends: b.yaml\n", "b": "vision:\n  width: 8\n"},
            r"a\.yaml, line 2.*'many'",
        ),
        ({"a": "size: S/16\nextends: c.yaml\n"}, r"a\.yaml, line 2: key 'extends': no recipe 'c\.yaml'"),
        ({"a": "extends: b.yaml\n", "b": "extends: a.yaml\n"}, r"a\.yaml: extends itself, by way of a\.yaml, b\.yaml"),
    ],
)
def test_errors_name_the_file_they_are_in(tmp_path: Path, recipes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(ModelConfig, write(tmp_path, **recipes) / "a.yaml")


def test_powers_of_ten_are_numbers(tmp_path: Path) -> None:
    assert run("paper/l14_84", "samples=1.5e9", "learning_rate=8e-6", "out=1e3x").samples == 1_500_000_000
    with pytest.raises(InputError, match="samples"):
        run("paper/l14_84", "samples=1.5e0")


def test_names_of_shipped_recipes() -> None:
    assert recipe_path(PACKAGE, "one_node/clips_b16_112").is_file()
    with pytest.raises(InputError, match=r"did you mean 'one_node/clips_b16_112'.* debug, .*paper/l14_84, "):
        recipe_path(PACKAGE, "one_node/clips_b16_12")


# ---------------------------------------------------------------------------------------------------------------------
# The shipped ones
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_numbers_are_the_published_ones(name: str) -> None:
    """Peak learning rate per 256 pictures, batch and warm-up by stage: 112 px of the paper, else the descendant's script."""
    config = run(name)
    rate, batch, warmup = {
        84: (8e-6, 32_768, 40), 112: (8e-6, 32_768, 40), 224: (4e-7, 16_384, 20), 336: (1e-7, 8_192, 0),
    }[config.model.image_size]  # fmt: skip
    assert config.batch_size == batch and config.warmup_samples == warmup * 1_281_000
    if name != "one_node/continue_l14_224":
        assert config.learning_rate == pytest.approx(rate * batch / 256)
    assert (config.data.crop_area, config.data.colour_jitter) == (0.4, 0.4)
    assert (config.weight_decay, config.beta1, config.beta2) == (0.2, 0.9, 0.95)
    assert config.batch_size % config.data.lanes == 0 and (config.batch_size // 8) % (config.micro_batch or 1) == 0
    assert config.model.size is not None and config.model.learnable_tokens == 128 and config.model.context_length == 80
    ablation = re.match(r"paper/ablation_|one_node/clips_b16_112", name)
    assert not ablation or config.samples == 2000 * 1_281_000


def test_stages_go_on_from_one_another() -> None:
    runs = {name: run(name) for name in RECIPES}
    folders = {str(config.out): config for config in runs.values()}
    assert len(folders) == len(runs)
    chained = {name: config for name, config in runs.items() if config.init_from is not None}
    assert set(chained) == {
        "paper/l14_224", "paper/l14_336", "paper/h14_224", "one_node/clips_b16_224", "one_node/clip_mix_b16_224",
        "one_node/continue_l14_224",
    }  # fmt: skip
    for name, config in chained.items():
        if not str(config.init_from).startswith("hf-hub:"):
            before = folders[str(config.init_from)]
            assert before.model.image_size < config.model.image_size and before.method == config.method, name
            assert (before.model.size, before.model.decoder) == (config.model.size, config.model.decoder)


@pytest.mark.parametrize("px", [112, 224])
def test_the_baseline_has_the_same_work(px: int) -> None:
    ours, baseline = run(f"one_node/clips_b16_{px}"), run(f"one_node/clip_mix_b16_{px}")
    work = [
        config.samples * sum(part.model for part in plan.flops_per_sample(config, plan.PlanConfig()).values())
        for config in (ours, baseline)
    ]
    assert work[0] == pytest.approx(work[1], rel=1e-3)
    same = ("batch_size", "learning_rate", "warmup_samples", "data", "seed")
    assert all(getattr(ours, key) == getattr(baseline, key) for key in same)


@pytest.mark.parametrize("name", RECIPES)
def test_headers_quote_what_the_plan_says(name: str) -> None:
    text = recipe_path(PACKAGE, name).read_text()
    quoted = re.search(r"^#     clips-llava plan (\S+) gpus=(\d+) gpu=h100  → (\d+\.\d\d) days$", text, re.MULTILINE)
    assert quoted is not None and quoted[1] == name
    result = plan.estimate(run(name), plan.PlanConfig(gpus=int(quoted[2])))
    assert f"{result['time']['days']:.2f}" == quoted[3] and result["memory"]["fits"]


def test_one_node_fits_into_a_week() -> None:
    names = [name for name in RECIPES if name.startswith("one_node/clip")]
    days = sum(plan.estimate(run(name), plan.PlanConfig())["time"]["days"] for name in names)
    assert len(names) == 4 and days < 7
    assert f"together: {days:.1f} days" in recipe_path(PACKAGE, "one_node/clips_b16_112").read_text()


# ---------------------------------------------------------------------------------------------------------------------
# Debug twins
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 pictures of noise in 3 shards; every fourth has no synthetic caption."""
    rng, folder = np.random.default_rng(0), tmp_path_factory.mktemp("shards")
    samples: list[dict[str, Any]] = []
    for i in range(48):
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, "JPEG")
        synthetic = (
            {} if i % 4 == 0 else {"re_caption": f"A photograph of noise. It is picture {i}! Nothing is to be seen."}
        )
        samples.append({"__key__": f"{i:04d}", "jpg": buffer.getvalue(), "txt": f"noise {i}", "json": synthetic})
    write_shards(samples, folder, per_shard=16)
    return folder


def twin(name: str, shards: Path, out: Path, *settings: str) -> PretrainConfig:
    return load_settings(PretrainConfig, PACKAGE, [name, "debug", f"data.train={shards}", f"out={out}", *settings])


def distinct_twins() -> list[str]:
    """Recipes, one of those whose debug twins are the same: sizes differ no more, for example."""
    twins = {name: json.dumps(to_dict(twin(name, Path("shards"), Path("out")))) for name in RECIPES}
    return list({config: name for name, config in twins.items()}.values())


@pytest.mark.parametrize("name", RECIPES)
def test_debug_twin_keeps_what_the_recipe_is_about(name: str) -> None:
    config, full = twin(name, Path("shards"), Path("out")), run(name)
    same = (
        "method",
        "texts",
        "contrastive_sub",
        "activation_checkpointing",
        "sharding",
        "learning_rate",
        "max_logit_scale",
    )
    assert all(getattr(config, key) == getattr(full, key) for key in same)
    assert config.model.image_size == full.model.image_size
    assert (config.model.decoder is None) == (full.model.decoder is None)


@pytest.mark.parametrize("name", distinct_twins())
def test_debug_twin_trains(name: str, shards: Path, tmp_path: Path) -> None:
    """All there is, on a CPU."""
    config = twin(name, shards, tmp_path / "run")
    pretrain(config)
    manifest = read_manifest(tmp_path / "run", "pretrain")
    assert manifest["config"]["model"]["vision"] == {
        "width": 32,
        "layers": 2,
        "heads": 2,
    }  # the folder says what `debug` is
    assert manifest["config"]["model"]["size"] == "debug"
    assert manifest["outputs"]["parameters"] == plan.parameter_counts(config.model)["total"]


def test_debug_twins_of_the_stages_go_on_from_one_another(shards: Path, tmp_path: Path) -> None:
    before = pretrain(twin("paper/l14_84", shards, tmp_path / "84", "samples=16"))
    after = pretrain(twin("paper/l14_224", shards, tmp_path / "224", "samples=16", f"init_from={before}"))
    positions = [read_manifest(folder)["config"]["model"]["image_size"] for folder in (before, after)]
    assert positions == [84, 224]
