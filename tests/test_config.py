"""Recipes and overrides: what is wrong is named by file, line and key."""

import json
from pathlib import Path

import pytest

from clips_core.config import PretrainConfig, load_config, recipe_path, to_dict
from clips_core.errors import InputError

RECIPE = """\
out: runs/x
data:
  train: shards
model:
  image_size: 32
  patch_size: 8
  vision: {width: 32, layers: 2, heads: 2}
  text: {width: 32, layers: 2, heads: 2}
  decoder: {width: 32, layers: 2, heads: 2}
  embed_dim: 16
samples: 1000
batch_size: 10
learning_rate: 1e-3
"""


def write(folder: Path, text: str) -> Path:
    (folder / "recipe.yaml").write_text(text)
    return folder / "recipe.yaml"


def test_recipe_and_overrides(tmp_path: Path) -> None:
    config = load_config(
        PretrainConfig, write(tmp_path, RECIPE), ["model.text.layers=5", "learning_rate=2e-4", "out=b"]
    )
    assert config.model.text.layers == 5 and config.learning_rate == 2e-4 and config.out == Path("b")
    assert config.model.context_length == 80 and config.model.learnable_tokens == 128  # the method's defaults
    again = write(tmp_path, json.dumps(to_dict(config)))  # JSON is YAML: the resolved config is itself a recipe
    assert load_config(PretrainConfig, again) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            RECIPE.replace("  embed_dim", "  embed_dimm"),
            r"recipe\.yaml, line 10: unknown key 'model.embed_dimm'.*'embed_dim'",
        ),
        (
            RECIPE.replace("batch_size: 10", "batch_size: ten"),
            r"recipe\.yaml, line 12: key 'batch_size'.*integer.*'ten'",
        ),
        (RECIPE.replace("samples: 1000\n", ""), r"recipe\.yaml.*'samples' is required"),
        (
            RECIPE.replace("image_size: 32", "image_size: 33"),
            r"line 4: key 'model'.*33 is not a multiple of patch_size 8",
        ),
        (RECIPE + "method: clap\n", r"line 14: key 'method'.*'clips'"),
        (RECIPE + "method: clip\n", r"the method clip has no caption decoder"),
        ("- a\n- b\n", r"recipe\.yaml: must be a mapping"),
        ("a: [1,\n", r"recipe\.yaml: not YAML.*line 2"),
    ],
)
def test_bad_recipe_names_file_line_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_config(PretrainConfig, write(tmp_path, text))


def test_bad_override_is_named(tmp_path: Path) -> None:
    recipe = write(tmp_path, RECIPE)
    with pytest.raises(InputError, match=r"override 'modle\.embed_dim=3': unknown key 'modle'.*did you mean 'model'"):
        load_config(PretrainConfig, recipe, ["modle.embed_dim=3"])
    with pytest.raises(InputError, match="key=value"):
        load_config(PretrainConfig, recipe, ["seed"])


def test_shipped_recipe_by_name(tmp_path: Path) -> None:
    package = tmp_path / "package"
    (package / "recipes").mkdir(parents=True)
    (package / "recipes" / "demo_clips.yaml").write_text(RECIPE)
    assert recipe_path(package, "demo_clips").read_text() == RECIPE
    with pytest.raises(InputError, match="did you mean 'demo_clips'"):
        recipe_path(package, "demo_clip")


def test_keys_below_a_name_or_a_place_in_a_list_are_known() -> None:
    from eval_suites.study_methods import MethodStudyConfig

    with pytest.raises(InputError, match=r"unknown key 'grids\.0\.seds'.*did you mean 'seeds'"):
        load_config(MethodStudyConfig, None, ["grids=[{arms: [a], seds: [0]}]"])
