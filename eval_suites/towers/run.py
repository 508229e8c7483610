"""`clips-llava eval tower`: every tower on every set and task, and a table of them all."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from clips_core.config import to_dict
from clips_core.errors import InputError
from clips_core.folders import is_finished, write_bytes, write_json, write_manifest
from clips_core.pictures import json_lines
from clips_core.zero_shot import accuracy_by_rank, retrieval
from eval_suites.towers import probes
from eval_suites.towers.config import TowerEvalConfig
from eval_suites.towers.embedders import Embedder, check_reads_texts, load_embedder
from eval_suites.towers.features import Features, Part
from eval_suites.towers.sets import Captioned, Classification, prompts_fingerprint, read_caption_set, read_class_set
from eval_suites.towers.table import STAGE, print_table, tower_table

EMBEDDINGS = "embeddings"

Rows = list[dict[str, Any]]


class Measured(NamedTuple):
    """What came out of one tower, set and task."""

    figures: dict[str, Any]
    records: dict[
        str, Rows
    ]  # by file name without suffix; the rows are as `eval_suites.records.Record`, with image and rank
    content: dict[str, str]  # hashes of the pictures' bytes: test, train


def eval_towers(config: TowerEvalConfig) -> list[Path]:
    """Measure each tower on each set; returns the towers' folders, and prints the table of what is in them.

    `out/TOWER/SET/TASK/` holds results.json (figures), a .jsonl with a record for each picture or query, and last manifest.json;
    `out/embeddings/` keeps the vectors. What is there already is left as it is, and a run that was stopped goes on.

    Raises:
        InputError: for bad input; whatever can be known beforehand, before the first picture is embedded.
    """
    for spec in config.towers:
        check_reads_texts(spec, _tasks_with_texts(config))
    classifications = [read_class_set(name, own, config.data) for name, own in config.classes.items()]
    captioned = [read_caption_set(name, own, config.data) for name, own in config.captions.items()]
    for one in classifications:
        _check_enough(one, config)
    folders = []
    for spec in config.towers:
        embedder = load_embedder(spec, config.image_size, config.device)
        features = Features(embedder, config.out / EMBEDDINGS, config.precision, config.batch_size, config.workers)
        folder = config.out / embedder.name
        for one in classifications:
            for task in one.tasks:
                _classify(folder / one.name / task, task, one, embedder, features, config)
        for each in captioned:
            _retrieve(folder / each.name / "retrieval", each, embedder, features, config)
        folders.append(folder)
        del embedder, features  # two towers need not fit into memory
    names = [*config.classes, *config.captions]
    table = tower_table(folders, names)
    write_json(config.out / "table.json", table.to_dict())
    print_table(table, Console())
    return folders


def _tasks_with_texts(config: TowerEvalConfig) -> list[str]:
    zero_shot = [f"classes.{name} (zero_shot)" for name, one in config.classes.items() if "zero_shot" in one.tasks]
    return zero_shot + [f"captions.{name}" for name in config.captions]


def _check_enough(one: Classification, config: TowerEvalConfig) -> None:
    if one.train is None:
        return
    if "knn" in one.tasks and config.knn.k > len(one.train.labels):
        raise InputError(f"{one.name}: knn.k={config.knn.k} is more than its {len(one.train.labels)} training pictures")
    counts = torch.bincount(one.train.labels)
    if "probe" in one.tasks and len(config.probe.l2) > 1 and int(counts.max()) < 2:
        raise InputError(
            f"{one.name}: every class has one training picture, so none can be held out to choose probe.l2 by; give one strength"
        )


# -------------------------------------------------------------------------------------------------------------- tasks


def _classify(
    folder: Path, task: str, one: Classification, embedder: Embedder, features: Features, config: TowerEvalConfig
) -> None:
    """Zero-shot classification, linear probe or kNN."""
    inputs = {"tower": embedder.hash, "test": one.test.fingerprint()}
    settings: dict[str, Any] = {
        "set": one.name,
        "task": task,
        "precision": config.precision,
        "classes": len(one.classes),
    }
    if task == "zero_shot":
        prompts = [template(name) for name in one.spoken for template in one.templates]
        inputs["prompts"] = prompts_fingerprint(prompts)
        settings["templates"] = len(one.templates)
    else:
        assert one.train is not None
        inputs["train"] = one.train.fingerprint()
        settings[task] = to_dict(config.probe if task == "probe" else config.knn)

    def measure() -> Measured:
        test = features.pictures(one.test.pictures, f"{one.name}, test")
        content = {"test": test.content}
        extra: dict[str, Any] = {}
        if task == "zero_shot":
            weights = features.classifier(one.spoken, one.templates, f"{one.name}, prompts")
            scores = test.values @ weights
        else:
            assert one.train is not None
            train = features.pictures(one.train.pictures, f"{one.name}, train")
            content["train"] = train.content
            learn = _probe if task == "probe" else _knn
            scores, extra = learn(test, train, one, embedder.device, config)
        rank = probes.ranks(scores, one.test.labels)
        figures = accuracy_by_rank(rank, one.test.labels, one.classes)
        del figures["ranks"]  # in the records
        if len(one.classes) <= 5:
            figures["top5"] = None  # says nothing
        answers = scores.argmax(dim=1).tolist()
        return Measured(figures | extra, {"records": _class_rows(one, task, rank.tolist(), answers)}, content)

    _finish(folder, settings, inputs, embedder, measure)


def _probe(
    test: Part, train: Part, one: Classification, device: torch.device, config: TowerEvalConfig
) -> tuple[Tensor, dict[str, Any]]:
    """Logits of the test pictures, and how the probe was fitted."""
    assert one.train is not None
    values, labels = train.values.to(device), one.train.labels.to(device)
    scale = probes.Scale.of(values)
    probe = probes.linear_probe(scale(values), labels, len(one.classes), config.probe)
    edge = probes.at_edge(probe.l2, config.probe.l2)
    if edge:
        tqdm.write(f"{one.name}: probe.l2={probe.l2:g} is at the edge of those tried; a better one may lie beyond")
    if not probe.linear.converged:
        tqdm.write(f"{one.name}: the probe has not converged in {config.probe.max_iterations} iterations; allow more")
    figures = {
        "l2": probe.l2,
        "l2_at_edge": edge,
        "held_out": [{"l2": l2, "top1": accuracy} for l2, accuracy in probe.held_out.items()],
        "n_fitted": probe.fitted,
        "n_train": len(labels),
        "converged": probe.linear.converged,
    }
    return probes.scores(probe.linear, scale(test.values.to(device))).cpu(), figures


def _knn(
    test: Part, train: Part, one: Classification, device: torch.device, config: TowerEvalConfig
) -> tuple[Tensor, dict[str, Any]]:
    """Votes for the test pictures."""
    assert one.train is not None
    votes = probes.knn_scores(
        test.values.to(device), train.values.to(device), one.train.labels.to(device), len(one.classes), config.knn
    )
    return votes.cpu(), {**to_dict(config.knn), "n_train": len(one.train.labels)}


def _retrieve(folder: Path, one: Captioned, embedder: Embedder, features: Features, config: TowerEvalConfig) -> None:
    """R@1, 5 and 10 both ways."""
    inputs = {"tower": embedder.hash, "test": one.fingerprint()}
    settings = {"set": one.name, "task": "retrieval", "precision": config.precision, "captions": len(one.captions)}

    def measure() -> Measured:
        images = features.pictures(one.pictures, f"{one.name}, pictures")
        texts = features.texts(one.captions, f"{one.name}, captions")
        figures = retrieval(images.values, texts, one.owner)
        ranks = figures.pop("ranks")
        records = {
            "image_to_text": _picture_rows(one, ranks["image_to_text"], _nearest(images.values, texts)),
            "text_to_image": _caption_rows(one, ranks["text_to_image"], _nearest(texts, images.values)),
        }
        return Measured(figures, records, {"test": images.content})

    _finish(folder, settings, inputs, embedder, measure)


def _nearest(queries: Tensor, candidates: Tensor) -> list[int]:
    """The candidate with the largest cosine for each query."""
    return [int(i) for part in queries.split(1024) for i in (part @ candidates.T).argmax(dim=1)]


def _finish(
    folder: Path,
    settings: Mapping[str, Any],
    inputs: dict[str, str],
    embedder: Embedder,
    measure: Callable[[], Measured],
) -> None:
    """Measure, unless the folder holds exactly this result; write records, figures and last the manifest."""
    if is_finished(folder, STAGE, dict(settings), inputs):
        return
    started = time.monotonic()
    measured = measure()
    for name, rows in measured.records.items():
        write_bytes(folder / f"{name}.jsonl", json_lines(rows))
    write_json(folder / "results.json", measured.figures)
    outputs = {
        "tower": embedder.spec,
        "image_size": embedder.image_size,
        "feature": embedder.feature,
        "content": measured.content,
        "figures": {key: value for key, value in measured.figures.items() if key != "per_class"},
        "inference": "checkpoint",
        "n_seeds": 1,
        "seconds": round(time.monotonic() - started, 2),
    }
    write_manifest(folder, STAGE, dict(settings), inputs, outputs)


# ------------------------------------------------------------------------------------------------------------ records


def _class_rows(one: Classification, task: str, ranks: Sequence[int], answers: Sequence[int]) -> Rows:
    """A record for each picture; it is its own cluster."""
    labels = one.test.labels.tolist()
    return [
        _row(f"{one.name} {task}", i, image, image, one.classes[labels[i]], "", one.spoken[labels[i]],
             one.spoken[answers[i]], ranks[i])
        for i, image in enumerate(one.test.pictures.ids)
    ]  # fmt: skip


def _picture_rows(one: Captioned, ranks: Sequence[int], answers: Sequence[int]) -> Rows:
    """A record for each picture, whose caption is looked for."""
    targets: list[list[str]] = [[] for _ in one.pictures.ids]
    for caption, owner in zip(one.captions, one.owner.tolist(), strict=True):
        targets[owner].append(caption)
    return [
        _row(f"{one.name} image_to_text", i, image, image, "", "", " / ".join(targets[i]), one.captions[answers[i]],
             ranks[i])
        for i, image in enumerate(one.pictures.ids)
    ]  # fmt: skip


def _caption_rows(one: Captioned, ranks: Sequence[int], answers: Sequence[int]) -> Rows:
    """A record for each caption, whose picture is looked for; those of one picture are a cluster."""
    ids, owner = one.pictures.ids, one.owner.tolist()
    return [
        _row(f"{one.name} text_to_image", i, ids[owner[i]], ids[owner[i]], "", caption, ids[owner[i]], ids[answers[i]],
             ranks[i])
        for i, caption in enumerate(one.captions)
    ]  # fmt: skip


def _row(
    task: str, doc_id: int, image: str, cluster: str, category: str, question: str, target: str, answer: str, rank: int
) -> dict[str, Any]:
    return {
        "task": task, "doc_id": doc_id, "image": image, "cluster": cluster, "category": category, "question": question,
        "target": target, "answer": answer, "score": float(rank == 0), "rank": rank,
    }  # fmt: skip
