"""Held-out benchmark files that lmms-eval's unmodified POPE, MME, GQA and TextVQA tasks load.

Every picture shows at least one colour–object pair that training never shows, and that object is asked about. The rows'
columns are those of the published data sets; a folder is found under the data set's name from the working directory.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

from clips_core.errors import InputError
from clips_core.world.captions import full_name
from clips_core.world.conversations import (
    Ask,
    ask_colour,
    ask_colour_choice,
    ask_count_is,
    ask_exists,
    ask_of_colour,
    ask_related,
    ask_related_is,
    ask_side,
    ask_word,
    ask_word_is,
    wrong_colour,
)
from clips_core.world.scenes import Scene, Thing, draw_scene, png, render
from clips_core.world.settings import Rules

ORGANISATION = "lmms-lab-encoder"
POPE_CATEGORIES = ("random", "popular", "adversarial")
POPE_TEMPLATE = "Is there {a_thing} in the image?"
MME_TEMPLATES = {  # by category, named as MME names them
    "existence": "Is there {a_thing} in this image?",
    "count": "{verb} there a total of {number} {symbols} in this image?",
    "position": "In this image, is {first} placed {relation} {second}?",
    "color": "Is there {a_thing} in this image?",
    "OCR": 'Is the word in the image "{word}"?',
}
MME_SUFFIX = " Please answer yes or no."
GQA_TEMPLATES = {
    "colour": "What color is the {name}?",
    "of_colour": "What is the {colour} thing called?",
    "colour_choice": "Which color is the {name}, {first} or {second}?",
    "related": "What is the thing {relation} {second}?",
    "side": "On which side of the image is {thing}, the {first} or the {second}?",
    "exists": "Are there any {things}?",
}
GQA_KINDS = (  # the two questions about a picture; these six take turns
    ("colour", "exists yes"), ("of_colour", "side"), ("colour_choice", "exists no"),
    ("related", "colour"), ("side", "exists yes"), ("of_colour", "exists no"),
)  # fmt: skip
TEXTVQA_TEMPLATES = (
    "what is written on the sign?",
    "which word can be read on the label?",
    "what does the white plate say?",
)


@dataclass(frozen=True)
class Table:
    """One parquet file: the data set, configuration and split that it is, its columns and its rows."""

    dataset: str
    configuration: str
    split: str
    columns: dict[str, str]  # name → "string", "int64", "strings" or "image"
    rows: list[dict[str, Any]]


@dataclass(frozen=True)
class Picture:
    """A benchmark's picture: its id, its scene, its PNG."""

    key: str
    scene: Scene
    png: bytes

    @property
    def image(self) -> dict[str, Any]:
        return {"bytes": self.png, "path": f"{self.key}.png"}


def _focus(scene: Scene, rules: Rules) -> Thing:
    """The object that is asked about: one of a held-out pair."""
    return next(thing for thing in scene.things if thing.pair in rules.held_out)


def pope(rules: Rules, pictures: list[Picture]) -> list[Table]:
    """Two questions per picture, whose absent object is drawn as its category says."""
    rows: list[dict[str, Any]] = []
    for i, category in zip(range(rules.config.counts.benchmarks.pope // 2), cycle(POPE_CATEGORIES), strict=False):

        def ask(scene: Scene, rng: random.Random, category: str = category) -> list[Ask | None]:
            absent = _absent(scene, rules, category)
            asks = [
                ask_exists(_focus(scene, rules).name, True),
                ask_exists(rng.choice(absent), False) if absent else None,
            ]
            return rng.sample(asks, 2)

        picture, asks = _ask_about_a_picture(rules, "pope", i, ask, f"an absent object of POPE's category {category!r}")
        pictures.append(picture)
        for found in asks:
            number = str(len(rows))
            rows.append(
                {
                    "id": number, "question_id": number, "question": found.phrased(POPE_TEMPLATE), "answer": found.answer,
                    "image_source": picture.key, "image": picture.image, "category": category,
                }
            )  # fmt: skip
    strings = ("id", "question_id", "question", "answer", "image_source")
    columns = {**dict.fromkeys(strings, "string"), "image": "image", "category": "string"}
    return [Table("POPE", "default", "test", columns, rows)]


def _absent(scene: Scene, rules: Rules, category: str) -> list[str]:
    """POPE's three ways to choose an absent object: any, a common one, one that often occurs with those present."""
    match category:
        case "random":
            names: tuple[str, ...] = rules.pictograms
        case "popular":
            names = rules.popular
        case _:
            names = tuple(name for present in dict.fromkeys(scene.names) for name in rules.theme[present])
    return [name for name in names if name not in scene.names]


def mme(rules: Rules, pictures: list[Picture]) -> list[Table]:
    """A Yes and a No question per picture, in five of MME's perception categories."""
    rows: list[dict[str, Any]] = []
    for i, category in zip(range(rules.config.counts.benchmarks.mme // 2), cycle(MME_TEMPLATES), strict=False):

        def ask(scene: Scene, rng: random.Random, category: str = category) -> list[Ask | None]:
            return [_mme_ask(scene, rules, category, rng, yes) for yes in (True, False)]

        picture, asks = _ask_about_a_picture(rules, "mme", i, ask, f"a question of MME's category {category!r}")
        pictures.append(picture)
        for found in asks:
            rows.append(
                {
                    "question_id": f"{category}/{picture.key}.png", "image": picture.image,
                    "question": found.phrased(MME_TEMPLATES[category]) + MME_SUFFIX, "answer": found.short,
                    "category": category,
                }
            )  # fmt: skip
    columns = {
        "question_id": "string",
        "image": "image",
        "question": "string",
        "answer": "string",
        "category": "string",
    }
    return [Table("MME", "default", "test", columns, rows)]


def _mme_ask(scene: Scene, rules: Rules, category: str, rng: random.Random, yes: bool) -> Ask | None:
    thing = _focus(scene, rules)
    match category:
        case "existence":
            return ask_exists(thing.name if yes else rng.choice(_absent(scene, rules, "random")), yes)
        case "count":
            return ask_count_is(scene, rules, rng, yes)
        case "position":
            return ask_related_is(scene, thing, rng, yes)
        case "color":
            colour = thing.colour if yes else wrong_colour(scene, thing, rules, rng, training=False)
            return ask_exists(f"{colour} {thing.name}", yes)
        case _:
            return ask_word_is(scene, rules, rng, yes)


def gqa(rules: Rules, pictures: list[Picture]) -> list[Table]:
    """Two questions per picture; a third of all ask yes or no, half of them yes."""
    questions: list[dict[str, Any]] = []
    images: list[dict[str, Any]] = []
    for i, kinds in zip(range(rules.config.counts.benchmarks.gqa // 2), cycle(GQA_KINDS), strict=False):

        def ask(scene: Scene, rng: random.Random, kinds: tuple[str, str] = kinds) -> list[Ask | None]:
            return [_gqa_ask(scene, rules, kind, rng) for kind in kinds]

        picture, asks = _ask_about_a_picture(
            rules, "gqa", i, ask, f"GQA questions of the kinds {' and '.join(kinds)!r}"
        )
        pictures.append(picture)
        images.append({"id": picture.key, "image": picture.image})
        for found in asks:
            question = found.phrased(GQA_TEMPLATES[found.kind])
            questions.append(
                {"id": str(len(questions)), "imageId": picture.key, "question": question, "answer": found.answer}
            )
    return [
        Table(
            "GQA", "testdev_balanced_instructions", "testdev",
            dict.fromkeys(("id", "imageId", "question", "answer"), "string"), questions,
        ),
        Table("GQA", "testdev_balanced_images", "testdev", {"id": "string", "image": "image"}, images),
    ]  # fmt: skip


def _gqa_ask(scene: Scene, rules: Rules, kind: str, rng: random.Random) -> Ask | None:
    thing = _focus(scene, rules)
    match kind:
        case "colour":
            return ask_colour(scene, thing)
        case "of_colour":
            return ask_of_colour(scene, thing)
        case "colour_choice":
            return ask_colour_choice(scene, thing, rules, rng, training=False)
        case "related":
            return ask_related(scene, thing, rng)
        case "side":
            return ask_side(scene, thing, rng)
        case "exists yes":
            return ask_exists(full_name(thing), True)
        case _:
            colour = wrong_colour(scene, thing, rules, rng, training=False)
            return ask_exists(f"{colour} {thing.name}", False)


def textvqa(rules: Rules, pictures: list[Picture]) -> list[Table]:
    """One question per picture about its printed word, with the ten answers that the data set has."""
    rows: list[dict[str, Any]] = []
    for i in range(rules.config.counts.benchmarks.textvqa):
        picture, [ask] = _ask_about_a_picture(rules, "textvqa", i, lambda scene, _: [ask_word(scene)], "a printed word")
        pictures.append(picture)
        question = TEXTVQA_TEMPLATES[i % len(TEXTVQA_TEMPLATES)]
        rows.append(
            {
                "question_id": i, "question": question, "image": picture.image,
                "answers": [ask.answer] * 10, "ocr_tokens": [ask.answer],
            }
        )  # fmt: skip
    columns = {
        "question_id": "int64",
        "question": "string",
        "image": "image",
        "answers": "strings",
        "ocr_tokens": "strings",
    }
    return [Table("textvqa", "default", "validation", columns, rows)]


BENCHMARKS: dict[str, Callable[[Rules, list[Picture]], list[Table]]] = {
    "pope": pope,
    "mme": mme,
    "gqa": gqa,
    "textvqa": textvqa,
}


def _ask_about_a_picture(
    rules: Rules, benchmark: str, index: int, ask: Callable[[Scene, random.Random], list[Ask | None]], wanted: str
) -> tuple[Picture, list[Ask]]:
    """A held-out picture and questions about it: scenes are drawn until one allows all that `ask` asks."""
    for attempt in range(2000):
        rng = rules.rng(benchmark, index, attempt)
        scene = draw_scene(rng, rules, "always")
        asks = ask(scene, rng)
        if all(asks):
            picture = Picture(f"{benchmark}-{index:06d}", scene, png(render(scene, rng, rules.level.clutter)))
            return picture, [found for found in asks if found]
    raise InputError(
        f"world config: no scene in 2000 allows {wanted}; raise pictograms, max_objects or word_rate, or set its count to 0"
    )


# ---------------------------------------------------------------------------------------------------- parquet


def write_tables(tables: list[Table], folder: Path) -> None:
    """Parquet files under `folder/ORGANISATION/<data set>/`, and the README.md that tells `datasets` where they lie."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value
    from datasets import List as ListOf

    types: dict[str, Any] = {
        "string": Value("string"),
        "int64": Value("int64"),
        "strings": ListOf(Value("string")),
        "image": Image(),
    }
    tables = [table for table in tables if table.rows]
    for table in tables:
        features = Features({name: types[kind] for name, kind in table.columns.items()})
        path = folder / ORGANISATION / table.dataset / _data_file(table)
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table.rows, schema=features.arrow_schema), path)
    for dataset in dict.fromkeys(table.dataset for table in tables):
        readme = "\n".join(_readme([table for table in tables if table.dataset == dataset]))
        (folder / ORGANISATION / dataset / "README.md").write_text(readme + "\n", encoding="utf-8")


def _data_file(table: Table) -> str:
    folder = "data" if table.configuration == "default" else table.configuration
    return f"{folder}/{table.split}-00000-of-00001.parquet"


def _readme(tables: list[Table]) -> Iterator[str]:
    yield "---\nconfigs:"
    for table in tables:
        yield f"- config_name: {table.configuration}\n  data_files:"
        yield f"  - split: {table.split}\n    path: {_data_file(table)}"
    yield "---"
    yield f"A stand-in with the columns of {tables[0].dataset}, about pictures of the sample world. Not the published data set."
