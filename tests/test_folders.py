"""Manifests: finished or not, the same or another."""

import json
from pathlib import Path

import pytest

from clips_core.errors import InputError
from clips_core.folders import MetricsLog, is_finished, read_json, read_manifest, write_json, write_manifest


def test_finished_only_with_the_same_config_and_inputs(tmp_path: Path) -> None:
    config, inputs = {"a": {"b": 1}}, {"data": "x"}
    assert not is_finished(tmp_path, "stage", config, inputs)
    write_manifest(tmp_path, "stage", config, inputs, {"n": 3})
    assert is_finished(tmp_path, "stage", config, inputs)
    with pytest.raises(InputError, match=r"config\.a\.b: 1 → 2"):
        is_finished(tmp_path, "stage", {"a": {"b": 2}}, inputs)
    with pytest.raises(InputError, match=r"inputs\.data"):
        is_finished(tmp_path, "stage", config, {"data": "y"})
    with pytest.raises(InputError, match="made by stage 'stage'"):
        read_manifest(tmp_path, "other")
    assert read_manifest(tmp_path, "stage")["environment"]["packages"]["torch"]


def test_missing_or_unfinished_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_manifest(tmp_path / "none")
    with pytest.raises(InputError, match="has not finished"):
        read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text('{\n"stage": }')
    with pytest.raises(InputError, match="line 2"):
        read_json(tmp_path / "manifest.json")


def test_json_refuses_what_is_not_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_metrics_survive_a_cut_off_line_and_are_cut_back(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        log.log(step=step, loss=1.0 / step)
    with open(log.path, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in log.rows()] == [1, 2, 3]
    log.cut_after(2)
    log.log(step=3, loss=9.0)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3]
