"""Small benchmark files in the exact schemas of the published ones: a maker for each task that the suites name.

Texts are of few words, so that a tiny model's vocabulary holds them, and some of its answers are right.
"""

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image

STRING, IMAGE = datasets.Value("string"), datasets.Image()
INT8, INT32 = datasets.Value("int8"), datasets.Value("int32")  # as wide as in the published files
STRINGS, IMAGES = datasets.List(STRING), datasets.List(IMAGE)
WORDS = ("red", "blue", "green", "yellow", "stop")

Rows = list[dict[str, Any]]
OCR_KINDS = (
    "Regular Text Recognition", "Irregular Text Recognition", "Artistic Text Recognition", "Handwriting Recognition",
    "Digit String Recognition", "Non-Semantic Text Recognition", "Scene Text-centric VQA", "Doc-oriented VQA",
    "Key Information Extraction", "Handwritten Mathematical Expression Recognition",
)  # fmt: skip


def png(rng: random.Random, size: tuple[int, int] = (24, 24)) -> dict[str, Any]:
    pixels = np.random.default_rng(rng.randrange(2**32)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": "x.png"}


def write(
    folder: Path, repository: str, split: str, features: dict[str, Any], rows: Rows, name: str = "default"
) -> Path:
    """One parquet file as the hub's converter names it, told of in the README's front matter."""
    place = folder / repository
    path = place / ("data" if name == "default" else name) / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=datasets.Features(features).arrow_schema), path)
    readme = place / "README.md"
    known = yaml.safe_load(readme.read_text().strip("-\n"))["configs"] if readme.exists() else []
    known = [entry for entry in known if entry["config_name"] != name]
    files = [{"split": split, "path": f"{path.parent.name}/{split}-*"}]
    readme.write_text(f"---\n{yaml.safe_dump({'configs': [*known, {'config_name': name, 'data_files': files}]})}---\n")
    return path


def mme(folder: Path, rng: random.Random, n: int) -> None:
    rows = []
    for i in range(n // 2):
        picture, category = png(rng), ("existence", "color", "code_reasoning")[i % 3]
        for answer in ("Yes", "No"):
            question = f"Is the star {rng.choice(WORDS)}? Please answer yes or no."
            rows.append(
                {
                    "question_id": f"{i}.png",
                    "image": picture,
                    "question": question,
                    "answer": answer,
                    "category": category,
                }
            )
    features = {"question_id": STRING, "image": IMAGE, "question": STRING, "answer": STRING, "category": STRING}
    write(folder, "lmms-lab-encoder/MME", "test", features, rows)


def pope(folder: Path, rng: random.Random, n: int) -> None:
    columns = ("id", "question_id", "question", "answer", "image_source", "category")
    rows = [
        {
            "id": str(i), "question_id": str(i), "question": "Is there a star in the image?", "image": png(rng),
            "answer": rng.choice(("yes", "no")), "image_source": "x", "category": rng.choice(("random", "popular")),
        }
        for i in range(n)
    ]  # fmt: skip
    write(folder, "lmms-lab-encoder/POPE", "test", {**dict.fromkeys(columns, STRING), "image": IMAGE}, rows)


def gqa(folder: Path, rng: random.Random, n: int) -> None:
    questions = [
        {
            "id": str(i), "imageId": f"n{i % 3}", "question": "What color is the star?", "answer": rng.choice(WORDS),
            "types": {"detailed": "color", "semantic": "attr", "structural": ("query", "verify")[i % 2]},
        }
        for i in range(n)
    ]  # fmt: skip
    pictures = [{"id": f"n{i}", "image": png(rng)} for i in range(3)]
    features = dict.fromkeys(("id", "imageId", "question", "answer"), STRING)
    features["types"] = dict.fromkeys(("detailed", "semantic", "structural"), STRING)
    write(folder, "lmms-lab-encoder/GQA", "testdev", features, questions, "testdev_balanced_instructions")
    write(
        folder, "lmms-lab-encoder/GQA", "testdev", {"id": STRING, "image": IMAGE}, pictures, "testdev_balanced_images"
    )


def chartqa(folder: Path, rng: random.Random, n: int) -> None:
    rows = [
        {
            "type": ("human_test", "augmented_test")[i % 2], "question": "What color is the star?",
            "answer": rng.choice((*WORDS, "12", "7.5")), "image": png(rng),
        }
        for i in range(n)
    ]  # fmt: skip
    features = {"type": STRING, "question": STRING, "answer": STRING, "image": IMAGE}
    write(folder, "lmms-lab-encoder/ChartQA", "test", features, rows)


def nocaps_val(folder: Path, rng: random.Random, n: int) -> None:
    def caption() -> str:
        return f"A {rng.choice(WORDS)} star on the left of the {rng.choice(WORDS)} boat."

    rows = [
        {
            "image": png(rng), "image_id": 7 * i, "image_file_name": f"{i}.jpg",
            "annotations_captions": [caption() for _ in range(10)],
        }
        for i in range(n)
    ]  # fmt: skip
    features = {"image": IMAGE, "image_id": INT32, "image_file_name": STRING, "annotations_captions": STRINGS}
    write(folder, "lmms-lab-encoder/NoCaps", "validation", features, rows)


def textvqa_val(folder: Path, rng: random.Random, n: int) -> None:
    rows = [
        {
            "question_id": i, "question": "what does the sign say?", "image": png(rng),
            "answers": rng.choices(WORDS, k=10), "ocr_tokens": ["stop", rng.choice(WORDS)],
        }
        for i in range(n)
    ]  # fmt: skip
    features = {"question_id": INT32, "question": STRING, "image": IMAGE, "answers": STRINGS, "ocr_tokens": STRINGS}
    write(folder, "lmms-lab-encoder/textvqa", "validation", features, rows)


def mmmu_val(folder: Path, rng: random.Random, n: int) -> None:
    rows = []
    for i in range(n):
        options = rng.sample(WORDS, 4)
        chosen = i % 3 != 2
        two = i % 4 == 3
        row: dict[str, Any] = {f"image_{k}": None for k in range(3, 8)}
        row |= {"image_1": png(rng), "image_2": png(rng) if two else None}
        row |= {
            "id": f"validation_{('Art', 'Clinical_Medicine')[i % 2]}_{i + 1}",
            "question": "What color is the star <image 1>" + (" or <image 2>" if two else "") + "?",
            "options": str(options) if chosen else "[]",
            "answer": rng.choice("ABCD") if chosen else rng.choice(WORDS),
            "question_type": "multiple-choice" if chosen else "open",
        }
        rows.append(row)
    features = dict.fromkeys(("id", "question", "options", "answer", "question_type"), STRING)
    write(
        folder, "lmms-lab-encoder/MMMU", "validation", {**features, **{f"image_{k}": IMAGE for k in range(1, 8)}}, rows
    )


def mmvet(folder: Path, rng: random.Random, n: int) -> None:
    rows = [
        {
            "question_id": f"v1_{i}", "question": "What color is the star?", "answer": "red<OR>blue", "image": png(rng),
            "capability": rng.choice(("ocr,math", "rec", "rec,know,gen")),
        }
        for i in range(n)
    ]  # fmt: skip
    features = {"question_id": STRING, "question": STRING, "answer": STRING, "image": IMAGE, "capability": STRING}
    write(folder, "lmms-lab-encoder/MMVet", "test", features, rows)


def seedbench(folder: Path, rng: random.Random, n: int) -> None:
    names = ("question_id", "question", "answer", "choice_a", "choice_b", "choice_c", "choice_d", "data_type")
    rows = []
    for i in range(n):
        video = i % 4 == 3
        row = {f"choice_{letter}": word for letter, word in zip("abcd", WORDS, strict=False)}
        row |= {"question_id": str(i), "question": "What color is the star?", "answer": rng.choice("ABCD")}
        rows.append(
            {**row, "data_type": "video" if video else "image", "image": [png(rng) for _ in range(3 if video else 1)]}
        )
    write(folder, "lmms-lab-encoder/SEED-Bench", "test", {**dict.fromkeys(names, STRING), "image": IMAGES}, rows)


def scienceqa_img(folder: Path, rng: random.Random, n: int) -> None:
    rows = [
        {
            "image": png(rng), "question": "What color is the star?", "choices": rng.sample(WORDS, 2 + i % 3),
            "answer": i % 2, "hint": "the star" if i % 2 else "",
        }
        for i in range(n)
    ]  # fmt: skip
    features = {"image": IMAGE, "question": STRING, "choices": STRINGS, "answer": INT8, "hint": STRING}
    write(folder, "lmms-lab-encoder/ScienceQA", "test", features, rows, "ScienceQA-IMG")


def ocrbench(folder: Path, rng: random.Random, n: int) -> None:
    rows = [
        {
            "dataset": "HME100k" if i % 10 == 9 else "IIIT5K", "question": "what is written in the image?",
            "question_type": OCR_KINDS[i % 10], "answer": [rng.choice(WORDS), "STOP"][: 1 + i % 2], "image": png(rng),
        }
        for i in range(n)
    ]  # fmt: skip
    features = {"dataset": STRING, "question": STRING, "question_type": STRING, "answer": STRINGS, "image": IMAGE}
    write(folder, "echo840/OCRBench", "test", features, rows)


def ai2d(folder: Path, rng: random.Random, n: int) -> None:
    rows = [
        {
            "question": "What color is the star?",
            "options": rng.sample(WORDS, 4),
            "answer": str(i % 4),
            "image": png(rng),
        }
        for i in range(n)
    ]
    features = {"question": STRING, "options": STRINGS, "answer": STRING, "image": IMAGE}
    write(folder, "lmms-lab-encoder/ai2d", "test", features, rows)


def docvqa_val(folder: Path, rng: random.Random, n: int) -> None:
    rows = [
        {
            "questionId": str(i),
            "question": "What color is the star?",
            "answers": rng.sample(WORDS, 2),
            "image": png(rng),
        }
        for i in range(n)
    ]
    features = {"questionId": STRING, "question": STRING, "answers": STRINGS, "image": IMAGE}
    write(folder, "lmms-lab-encoder/DocVQA", "validation", features, rows, "DocVQA")


MAKERS: dict[str, Callable[[Path, random.Random, int], None]] = {
    "mme": mme, "pope": pope, "gqa": gqa, "chartqa": chartqa, "nocaps_val": nocaps_val, "textvqa_val": textvqa_val,
    "textvqa_val_ocr": textvqa_val, "mmmu_val": mmmu_val, "mmvet": mmvet, "seedbench": seedbench,
    "scienceqa_img": scienceqa_img, "ocrbench": ocrbench, "ai2d": ai2d, "docvqa_val": docvqa_val,
}  # fmt: skip


def make_files(folder: Path, tasks: list[str], n: int = 6, seed: int = 0) -> Path:
    """Files with `n` questions (an even number) for each task."""
    for name in tasks:
        MAKERS[name](folder, random.Random(f"{seed} {name}"), n)
    return folder


def rows_of(folder: Path, path: str) -> Rows:
    """The rows of one parquet file, pictures as their bytes."""
    return list(pq.read_table(folder / path).to_pylist())


def records_of(folder: Path, task: str) -> Rows:
    """A run's records of a task."""
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]
