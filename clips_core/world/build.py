"""The world's folder: drawn part by part, resumed at the first part that is missing.

manifest.json, vocab.txt, contact_sheet.png
pretrain/shard-*.tar      KEY.png, KEY.txt (web caption), KEY.json {"re_caption", "noise", "scene"}
retrieval/shard-*.tar     KEY.png, KEY.txt (one sentence, unique), KEY.json {"held_out", "scene"}
classes/test/shard-*.tar  KEY.png, KEY.cls (its class's number), KEY.json {"held_out", "scene"}; one object each, as many of every
                          class and colour; classes/ has classnames.txt and zeroshot_classification_templates.txt
pairs/                    the same pictures and files, but a class is a colour–object pair
llava/                    align.json, tune.json, images/*.png, scenes.json
benchmarks/               lmms-lab-encoder/<data set>/…, scenes.json
"""

import io
import json
import os
import shutil
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from clips_core.captions import split_caption
from clips_core.config import to_dict
from clips_core.errors import InputError
from clips_core.folders import (
    first_difference,
    is_finished,
    read_json,
    write_bytes,
    write_json,
    write_manifest,
)
from clips_core.shards import Shards, write_shards
from clips_core.tokenizer import train_vocab
from clips_core.world.benchmarks import BENCHMARKS, Picture, write_tables
from clips_core.world.captions import (
    class_prompts,
    corpus_words,
    full_name,
    pair_prompts,
    synthetic_caption,
    web_caption,
    whole_scene,
    written,
)
from clips_core.world.conversations import align_record, tune_record
from clips_core.world.scenes import FONTS, Thing, draw_scene, png, render
from clips_core.world.settings import Rules, WorldConfig, resolve

STAGE = "world"
UNFINISHED = ".unfinished.json"  # the config of a world that is being built


def make_world(config: WorldConfig) -> Path:
    """Build a world, or what is missing of it. The same config gives the same bytes (but for the manifest's environment).

    Returns:
        The world's folder.

    Raises:
        InputError: if the config asks for what cannot be drawn, or the folder holds something else.
    """
    rules = resolve(config)
    identity = {key: value for key, value in to_dict(config).items() if key != "out"}
    if is_finished(config.out, STAGE, identity, {}):
        return config.out
    _claim(config.out, identity)
    for name, build in PARTS.items():
        part, temporary = config.out / name, config.out / f".{name}.unfinished"
        if part.exists() or (name in ("classes", "pairs") and not config.counts.classes):
            continue
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        build(rules, temporary)
        os.replace(temporary, part)
    if not (config.out / "vocab.txt").exists():
        train_vocab(map(corpus_words, _training_texts(config.out / "pretrain")), config.out / "vocab.txt")
    write_bytes(config.out / "contact_sheet.png", png(contact_sheet(rules)))
    outputs = {
        "counts": identity["counts"],
        "held_out": sorted(" ".join(pair) for pair in rules.held_out),
        "pictograms": list(rules.pictograms),
        "colours": list(rules.colours),
        "retrieval_with_held_out": sum(bool(sample["held_out"]) for sample in _json_of(config.out / "retrieval")),
        "vocabulary": len((config.out / "vocab.txt").read_text(encoding="utf-8").splitlines()),
    }
    write_manifest(config.out, STAGE, identity, {}, outputs)
    (config.out / UNFINISHED).unlink(missing_ok=True)
    return config.out


def _claim(out: Path, identity: dict[str, Any]) -> None:
    """Make the folder this world's, or see that it is already."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: a file is in the way; choose another folder")
    marker = out / UNFINISHED
    if marker.is_file():
        difference = first_difference(read_json(marker), identity)
        if difference is not None:
            raise InputError(
                f"{out} holds an unfinished world ({difference}); choose another folder or delete this one"
            )
    elif out.is_dir() and any(out.iterdir()):
        raise InputError(f"{out}: not empty, and no world; choose another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(marker, identity)


# ---------------------------------------------------------------------------------------------------- the parts


def pretrain_sample(rules: Rules, index: int) -> dict[str, Any]:
    """A training picture with its web and its synthetic caption, as a shard holds it."""
    rng = rules.rng("pretrain", index)
    scene = draw_scene(rng, rules, "never")
    web, fault = web_caption(scene, rules, rng)
    synthetic, faults = synthetic_caption(scene, rules, rng)
    noise = {**({"web": fault} if fault else {}), **faults}
    return {
        "__key__": f"{index:09d}",
        "png": png(render(scene, rng, rules.level.clutter)),
        "txt": web,
        "json": {"re_caption": synthetic, "noise": noise, "scene": scene.to_json()},
    }


def _build_pretrain(rules: Rules, folder: Path) -> None:
    numbers = tqdm(range(rules.config.counts.pretrain), desc="world: pretraining pictures", unit="picture")
    write_shards((pretrain_sample(rules, i) for i in numbers), folder)


def _build_retrieval(rules: Rules, folder: Path) -> None:
    write_shards(_retrieval_samples(rules), folder)


def _retrieval_samples(rules: Rules) -> Iterator[dict[str, Any]]:
    """Held-out pictures; no two show the same objects with the same word on the same background, whatever the wording."""
    count = rules.config.counts.retrieval
    contents: set[object] = set()
    attempts = 0
    for index in tqdm(range(count), desc="world: retrieval pictures", unit="picture"):
        while True:
            rng = rules.rng("retrieval", attempts)
            scene = draw_scene(rng, rules, "natural")
            attempts += 1
            content = (frozenset(scene.pairs), scene.background, scene.word)
            if content not in contents:
                break
            if attempts > 20 * count:
                raise InputError(
                    f"world config: only {index} different scenes in {attempts} draws; lower counts.retrieval ({count}) or "
                    "raise pictograms, colours, patterns or tints"
                )
        contents.add(content)
        held_out = sorted(" ".join(pair) for pair in scene.pairs & rules.held_out)
        yield {
            "__key__": f"{index:09d}",
            "txt": written([whole_scene(scene, rng)]),
            "png": png(render(scene, rng, rules.level.clutter)),
            "json": {"held_out": held_out, "scene": scene.to_json()},
        }


def _build_classes(rules: Rules, folder: Path) -> None:
    _write_class_set(rules, rules.pictograms, lambda thing: thing.name, class_prompts(rules), folder)


def _build_pairs(rules: Rules, folder: Path) -> None:
    names = [f"{colour} {name}" for name in rules.pictograms for colour in rules.colours]
    _write_class_set(rules, names, full_name, pair_prompts(), folder)


def _write_class_set(
    rules: Rules, names: Sequence[str], class_of: Callable[[Thing], str], prompts: Sequence[str], folder: Path
) -> None:
    """Pictures of one object each, names and prompts of their classes, as CLIP_benchmark lays them out."""
    write_shards(_class_samples(rules, names, class_of), folder / "test")
    (folder / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "zeroshot_classification_templates.txt").write_text("".join(f"{prompt}\n" for prompt in prompts))


def _class_samples(rules: Rules, names: Sequence[str], class_of: Callable[[Thing], str]) -> Iterator[dict[str, Any]]:
    """Held-out pictures of one object each, the objects in turn; each goes through all colours, held-out pairs among them."""
    lots = [(i, name) for i in range(rules.config.counts.classes) for name in rules.pictograms]
    for index, (i, name) in enumerate(tqdm(lots, desc="world: class pictures", unit="picture")):
        rng = rules.rng("classes", name, i)
        scene = draw_scene(rng, rules, [(rules.colours[i % len(rules.colours)], name)])
        yield {
            "__key__": f"{index:09d}",
            "png": png(render(scene, rng, rules.level.clutter)),
            "cls": str(names.index(class_of(scene.things[0]))),
            "json": {"held_out": [" ".join(pair) for pair in scene.pairs & rules.held_out], "scene": scene.to_json()},
        }


def _build_llava(rules: Rules, folder: Path) -> None:
    (folder / "images").mkdir()
    scenes = {}
    for name, count in (("align", rules.config.counts.align), ("tune", rules.config.counts.tune)):
        records = []
        for index in tqdm(range(count), desc=f"world: LLaVA {name} pictures", unit="picture"):
            rng, key = rules.rng(name, index), f"{name}-{index:06d}"
            scene = draw_scene(rng, rules, "never")
            (folder / "images" / f"{key}.png").write_bytes(png(render(scene, rng, rules.level.clutter)))
            records.append(align_record(key, scene, rng) if name == "align" else tune_record(key, scene, rules, rng))
            scenes[key] = scene.to_json()
        write_json(folder / f"{name}.json", records)
    write_json(folder / "scenes.json", scenes)


def _build_benchmarks(rules: Rules, folder: Path) -> None:
    pictures: list[Picture] = []
    for make in tqdm(BENCHMARKS.values(), desc="world: benchmarks", unit="benchmark"):
        write_tables(make(rules, pictures), folder)
    write_json(folder / "scenes.json", {picture.key: picture.scene.to_json() for picture in pictures})


PARTS: dict[str, Callable[[Rules, Path], None]] = {  # first those that can find a config impossible, the longest last
    "benchmarks": _build_benchmarks,
    "retrieval": _build_retrieval,
    "classes": _build_classes,
    "pairs": _build_pairs,
    "llava": _build_llava,
    "pretrain": _build_pretrain,
}


def _json_of(shards: Path) -> Iterator[dict[str, Any]]:
    samples = Shards(shards)
    return (json.loads(samples[i]["json"]) for i in range(len(samples)))


def _training_texts(shards: Path) -> Iterator[str]:
    samples = Shards(shards)
    for i in tqdm(range(len(samples)), desc="world: vocabulary", unit="picture"):
        sample = samples[i]
        yield sample["txt"].decode()
        yield from split_caption(json.loads(sample["json"])["re_caption"])


# ---------------------------------------------------------------------------------------------------- contact sheet


def contact_sheet(rules: Rules, columns: int = 4, rows: int = 6) -> Image.Image:
    """The first training pictures, enlarged, beside their captions: the web caption in bold, then the synthetic one."""
    picture, width, height, margin = 144, 470, 190, 12
    sheet = Image.new("RGB", (columns * width + margin, rows * height + margin), "white")
    canvas = ImageDraw.Draw(sheet)
    fonts = [ImageFont.truetype(FONTS / name, 13) for name in ("DejaVuSans-Bold.ttf", "DejaVuSans.ttf")]
    for index in range(min(columns * rows, rules.config.counts.pretrain)):
        sample = pretrain_sample(rules, index)
        x, y = margin + index % columns * width, margin + index // columns * height
        with Image.open(io.BytesIO(sample["png"])) as image:
            sheet.paste(image.resize((picture, picture), Image.Resampling.NEAREST), (x, y))
        faults = ", ".join(f"{kind}: {what}" for kind, what in sample["json"]["noise"].items())
        texts = (
            (sample["txt"], fonts[0], "black"),
            (sample["json"]["re_caption"], fonts[1], "black"),
            (faults, fonts[1], "#b00000"),
        )
        for text, font, ink in texts:
            for line in textwrap.wrap(text, 40 if font is fonts[1] else 36):
                canvas.text((x + picture + margin, y), line, font=font, fill=ink)
                y += 16
            y += 3
    return sheet
