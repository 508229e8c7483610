"""lmms-eval's tasks on small invented files, answered by a tiny LLaVA with random weights.

Answers are compared with plain transformers, figures with plain reimplementations from the records.
"""

import io
import json
import os
import random
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from benchmark_files import png, records_of
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoProcessor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    ViTConfig,
    ViTImageProcessor,
)

from clips_core.errors import InputError
from eval_suites import benchmarks
from eval_suites.benchmarks import SUITES, EvalConfig, load_suite, run_suite
from eval_suites.pictures import blank, derangement, picture_id, shuffled

pytestmark = pytest.mark.usefixtures("one_thread")

OBJECTS = ("star", "heart", "moon", "house", "boat", "tree")
COLOURS = ("red", "blue", "green", "yellow")
ANSWERS = ("yes", "no", *COLOURS, "stop", "Yes.")
POST = "\nAnswer the question using a single word or phrase."
TASKS = ("pope", "mme", "gqa", "textvqa_val")


# ------------------------------------------------------------------------------------------------------------ a data folder


def write(folder: Path, name: str, split: str, rows: list[dict[str, Any]], configuration: str = "default") -> None:
    """One parquet file with the types of the published data set, told of in the README's front matter."""
    path = folder / "lmms-lab-encoder" / name / configuration / f"{split}-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    types: dict[type, Any] = {str: datasets.Value("string"), int: datasets.Value("int64"), dict: datasets.Image()}
    features = {
        key: datasets.List(datasets.Value("string")) if isinstance(value, list) else types[type(value)]
        for key, value in rows[0].items()
    }
    pq.write_table(pa.Table.from_pylist(rows, schema=datasets.Features(features).arrow_schema), path)
    readme = folder / "lmms-lab-encoder" / name / "README.md"
    known = yaml.safe_load(readme.read_text().strip("-\n"))["configs"] if readme.exists() else []
    known = [entry for entry in known if entry["config_name"] != configuration]
    entry = {
        "config_name": configuration,
        "data_files": [{"split": split, "path": f"{configuration}/{split}-*.parquet"}],
    }
    readme.write_text(f"---\n{yaml.safe_dump({'configs': [*known, entry]})}---\n")


def make_data(folder: Path, seed: int = 0) -> Path:
    """18 POPE, 12 MME, 10 GQA and 8 TextVQA questions, in the published schemas; several share a picture."""
    rng = random.Random(seed)
    pope: list[dict[str, Any]] = []
    for picture in (png(rng, (24, 24 + 8 * (i % 2))) for i in range(6)):
        for name in rng.sample(OBJECTS, 3):
            number, where = str(len(pope)), " on the left" * rng.randrange(4)
            pope.append(
                {
                    "id": number, "question_id": number, "question": f"Is there a {name}{where} in the image?",
                    "answer": rng.choice(("yes", "no")), "image_source": "x", "image": picture,
                    "category": rng.choice(("random", "popular", "adversarial")),
                }
            )  # fmt: skip
    mme = []
    for i in range(6):
        picture, category = png(rng), ("existence", "color", "code_reasoning")[i % 3]
        for answer in ("Yes", "No"):
            question = f"Is the {rng.choice(OBJECTS)} {rng.choice(COLOURS)}? Please answer yes or no."
            mme.append(
                {
                    "question_id": f"{i % 2}.png",
                    "image": picture,
                    "question": question,
                    "answer": answer,
                    "category": category,
                }
            )
    pictures = [{"id": f"n{i}", "image": png(rng)} for i in range(5)]
    gqa = [
        {
            "id": str(i), "imageId": f"n{i % 5}", "answer": rng.choice(COLOURS),
            "question": f"What color is the {rng.choice(OBJECTS)}{' on the left' * (i % 3)}?",
        }
        for i in range(10)
    ]  # fmt: skip
    textvqa = [
        {
            "question_id": i, "question": f"what does the {name} say?", "image": png(rng),
            "answers": rng.choices(("stop", "red", "blue", "green"), k=10), "ocr_tokens": ["stop"],
        }
        for i, name in enumerate((*OBJECTS, "sign", "plate"))
    ]  # fmt: skip
    write(folder, "POPE", "test", pope)
    write(folder, "MME", "test", mme)
    write(folder, "GQA", "testdev", gqa, "testdev_balanced_instructions")
    write(folder, "GQA", "testdev", pictures, "testdev_balanced_images")
    write(folder, "textvqa", "validation", textvqa)
    return folder


# ------------------------------------------------------------------------------------------------------------ a tiny LLaVA

TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %} <image> {% else %} {{ part['text'] }} {% endif %}{% endfor %} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


def make_model(folder: Path, seed: int = 0, silent: bool = False) -> Path:
    """A stock LLaVA folder with one token per word. Its head prefers words that are answers; if `silent`, it says nothing."""
    torch.manual_seed(seed)
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<image>"]
    words = "user assistant Is there a the in image? What color is on left what does say? Answer question using single word or"
    known = [*special, *ANSWERS, *OBJECTS, *(f"{name}?" for name in (*OBJECTS, *COLOURS)), *words.split()]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(dict.fromkeys(known))}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    processor = LlavaProcessor(
        ViTImageProcessor(size={"height": 24, "width": 24}, image_mean=[0.485, 0.456, 0.406], image_std=[0.2, 0.2, 0.2]),
        fast, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip
    processor.image_processor.crop_size = {"height": 24, "width": 24}
    small = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64}
    vision = ViTConfig(**small, image_size=24, patch_size=8, initializer_range=0.3)
    ends = {"eos_token_id": fast.eos_token_id, "pad_token_id": fast.pad_token_id, "bos_token_id": fast.bos_token_id}
    text = LlamaConfig(**small, **ends, vocab_size=len(fast), initializer_range=0.3, tie_word_embeddings=False)
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=fast.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default", vision_feature_layer=-2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.02)
        model.lm_head.weight[fast.convert_tokens_to_ids(["<|im_end|>", *ANSWERS])] *= 50
        if silent:
            model.lm_head.weight.zero_()  # equal logits: every token is the first, <pad>
    model.generation_config.eos_token_id = fast.eos_token_id
    model.generation_config.pad_token_id = fast.pad_token_id
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.7  # must not make answers random
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def suite_file(folder: Path, tasks: tuple[str, ...] = TASKS, tokens: int = 1, **changes: Any) -> str:
    """The demo suite with shorter answers, fewer tasks, or changed settings of every task."""
    suite = yaml.safe_load((SUITES / "demo.yaml").read_text())
    suite["tasks"] = {name: {**suite["tasks"][name], **changes} for name in tasks}
    for task in suite["tasks"].values():
        task["generation"] = {**task["generation"], "max_new_tokens": tokens}
    path = folder / f"suite-{len(list(folder.glob('suite-*')))}.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(data: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> EvalConfig:
    folder = tmp_path_factory.mktemp("runs")
    return EvalConfig(
        model,
        data,
        folder / "out",
        suite=suite_file(folder),
        pictures=["real", "blank", "shuffled"],
        batch_size=4,
        precision="float32",
    )


@pytest.fixture(scope="module")
def finished(config: EvalConfig) -> Path:
    return run_suite(config)


def results(folder: Path) -> dict[str, dict[str, float]]:
    return dict(json.loads((folder / "results.json").read_text()))


def docs(data: Path, task: str) -> list[dict[str, Any]]:
    """The questions in the order of the file, each with its picture's bytes."""
    name = {"pope": "POPE/default/test", "mme": "MME/default/test", "textvqa_val": "textvqa/default/validation"}
    path = name.get(task, "GQA/testdev_balanced_instructions/testdev")
    rows = pq.read_table(data / "lmms-lab-encoder" / f"{path}-00000-of-00001.parquet").to_pylist()
    if task == "gqa":
        file = data / "lmms-lab-encoder/GQA/testdev_balanced_images/testdev-00000-of-00001.parquet"
        images = {row["id"]: row["image"] for row in pq.read_table(file).to_pylist()}
        rows = [{**row, "image": images[row["imageId"]]} for row in rows]
    return rows


def prompt(task: str, question: str) -> str:
    """As lmms-eval's tasks phrase it for their default model."""
    if task == "mme":
        question = question.replace(" Please answer yes or no.", "")
    return (question.capitalize() if task == "textvqa_val" else question) + POST


# ------------------------------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize("pictures", ["real", "blank", "shuffled"])
def test_figures_follow_from_the_records(finished: Path, data: Path, pictures: str) -> None:
    folder = finished / pictures
    figures = results(folder)
    assert list(figures) == list(TASKS)
    for task in TASKS:
        rows = records_of(folder, task)
        assert figures[task]["n"] == len(rows) == len(docs(data, task))
        assert [row["doc_id"] for row in rows] == list(range(len(rows)))
        assert all(0 <= row["score"] <= 1 for row in rows)

    pope = [(row["target"], row["answer"].lower()) for row in records_of(folder, "pope")]
    hits = sum(pair == ("yes", "yes") for pair in pope)
    said, there = sum(answer == "yes" for _, answer in pope), sum(target == "yes" for target, _ in pope)
    precision, recall = hits / said if said else 0, hits / there
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0
    accuracy = mean(target == answer for target, answer in pope)
    expected = {"pope_accuracy": accuracy, "pope_precision": precision, "pope_recall": recall, "pope_f1_score": f1}
    assert {key: figures["pope"][key] for key in expected} == pytest.approx(expected)

    pairs: dict[tuple[str, str], list[bool]] = {}
    for row in records_of(folder, "mme"):
        right = row["answer"].lower().strip(".") == row["target"].lower()
        assert row["score"] == right
        pairs.setdefault((row["category"], row["cluster"]), []).append(right)
    assert all(len(pair) == 2 for pair in pairs.values())

    def of_category(category: str) -> float:
        return mean(100 * mean(pair) + 100 * all(pair) for (name, _), pair in pairs.items() if name == category)

    assert figures["mme"]["mme_perception_score"] == pytest.approx(of_category("existence") + of_category("color"))
    assert figures["mme"]["mme_cognition_score"] == pytest.approx(of_category("code_reasoning"))

    plain = str.maketrans("", "", string.punctuation)
    gqa = [row["answer"].lower().translate(plain) == row["target"] for row in records_of(folder, "gqa")]
    assert figures["gqa"]["exact_match"] == pytest.approx(mean(gqa))

    def soft(answer: str, people: list[str]) -> float:
        """VQA: full marks when three others gave the answer, averaged over leaving out each person."""
        others = [[person for j, person in enumerate(people) if j != i] for i in range(len(people))]
        return mean(min(1.0, of.count(answer.lower().strip(".")) / 3) for of in others)

    for row, doc in zip(records_of(folder, "textvqa_val"), docs(data, "textvqa_val"), strict=True):
        assert row["score"] == pytest.approx(soft(row["answer"], doc["answers"]))
        assert row["target"] == " / ".join(dict.fromkeys(doc["answers"]))
    assert figures["textvqa_val"]["exact_match"] == pytest.approx(
        mean(r["score"] for r in records_of(folder, "textvqa_val"))
    )


def test_the_answers_are_not_all_alike(finished: Path) -> None:
    """Else the figures above would say little."""
    rows = [row for task in TASKS for row in records_of(finished / "real", task)]
    assert len({row["answer"] for row in rows}) >= 4
    assert 0 < mean(row["score"] for row in rows) < 1
    real, other = ({(row["task"], row["doc_id"]): row["answer"] for row in rows}, dict[tuple[str, int], str]())
    for pictures in ("blank", "shuffled"):
        other = {(r["task"], r["doc_id"]): r["answer"] for task in TASKS for r in records_of(finished / pictures, task)}
        assert real != other, "the pictures must matter to this model"


# ------------------------------------------------------------------------------------------------------------------ answers


def plain_answers(model: Path, data: Path, task: str, tokens: int, mode: str = "real") -> list[str]:
    """One question at a time through plain transformers."""
    processor = AutoProcessor.from_pretrained(model)
    llava = LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    found = []
    for doc in docs(data, task):
        image = Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB")
        if mode == "blank":
            image = Image.new("RGB", image.size, (124, 116, 104))  # 255 × the processor's mean
        content = [{"type": "image"}, {"type": "text", "text": prompt(task, doc["question"])}]
        text = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(text=text, images=image, return_tensors="pt")
        ids = llava.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=1)
        found.append(
            processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        )
    return found


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("pictures", ["real", "blank"])
def test_answers_equal_plain_transformers(finished: Path, model: Path, data: Path, task: str, pictures: str) -> None:
    assert [row["answer"] for row in records_of(finished / pictures, task)] == plain_answers(
        model, data, task, 1, pictures
    )


def test_answers_do_not_depend_on_the_batch(config: EvalConfig, model: Path, data: Path, tmp_path: Path) -> None:
    """Questions of several lengths, so that there is padding; answers of one batch end at different steps."""
    assert len({len(doc["question"].split()) for doc in docs(data, "pope")}) > 1
    suite = suite_file(tmp_path, ("pope",), tokens=5)
    expected = plain_answers(model, data, "pope", 5)
    assert len({len(answer.split()) for answer in expected}) > 1
    for size in (1, 7):
        out = run_suite(
            EvalConfig(model, data, tmp_path / f"batch-{size}", suite=suite, batch_size=size, precision="float32")
        )
        assert [row["answer"] for row in records_of(out / "real", "pope")] == expected


def test_stop_strings_end_an_answer() -> None:
    from eval_suites.chat_model import cut

    assert cut("\n\n yes\n\nBecause of the star", ["\n\n"]) == "yes"
    assert cut("red ASSISTANT: blue", ["USER:", "ASSISTANT:"]) == "red"
    assert cut(" two words. ", []) == "two words."


def test_generation_settings() -> None:
    from eval_suites.chat_model import generation_settings

    pope = {
        "max_new_tokens": 128,
        "temperature": 0.0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
        "until": ["\n\n"],
    }
    settings, stops = generation_settings(pope, {"max_new_tokens": 16, "num_beams": None})
    assert settings == {"max_new_tokens": 16, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    assert stops == ["\n\n"]
    with pytest.raises(InputError, match="max_new_tokens"):
        generation_settings({"until": "ASSISTANT:"}, {})
    with pytest.raises(InputError, match="samples"):
        generation_settings({"max_new_tokens": 4, "temperature": 0.7}, {})


# ----------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", [2, 3, 5, 50])
def test_derangement_moves_everything(size: int) -> None:
    items = [str(i) for i in range(size)]
    orders = [derangement(items, f"{seed}") for seed in range(40)]
    for order in orders:
        assert sorted(order) == sorted(items)
        assert all(new != old for new, old in zip(order, items, strict=True))
    assert derangement(items, "7") == derangement(items, "7")
    assert len({tuple(order) for order in orders}) > 1 or size == 2


def test_one_picture_cannot_be_shuffled() -> None:
    with pytest.raises(InputError, match="1 different"):
        shuffled([["a"], ["a"]], lambda doc_id, position: Image.new("RGB", (2, 2)), "0")


def test_shuffled_never_keeps_the_own_picture(data: Path) -> None:
    images = [Image.open(io.BytesIO(doc["image"]["bytes"])).convert("RGB") for doc in docs(data, "pope")]
    ids = [[picture_id(image)] for image in images]
    assert len({name for (name,) in ids}) == 6
    for seed in range(20):
        swap = shuffled(ids, lambda doc_id, position: images[doc_id], str(seed))
        new = [picture_id(swap(doc_id, 0, image)) for doc_id, image in enumerate(images)]
        assert all(name != own for name, (own,) in zip(new, ids, strict=True))
        assert set(new) == {name for (name,) in ids}, "a permutation: every picture is shown"
        assert len(set(zip(new, map(tuple, ids), strict=True))) == 6, "questions that share a picture share the new one"


def test_blank_is_the_mean_colour_at_the_same_size() -> None:
    swap = blank((0.485, 0.456, 0.406))
    assert swap(0, 0, Image.new("RGB", (24, 32))).size == (24, 32)
    assert swap(0, 0, Image.new("RGB", (24, 32))).getcolors() == [(24 * 32, (124, 116, 104))]


def test_without_its_picture_only_the_question_counts(finished: Path) -> None:
    said: dict[str, set[str]] = {}
    for row in records_of(finished / "blank", "pope"):
        said.setdefault(row["question"], set()).add(row["answer"])
    assert all(len(answers) == 1 for answers in said.values())


def test_clusters_are_the_pictures(finished: Path) -> None:
    for pictures in ("real", "blank", "shuffled"):
        for task, size, count in (("pope", 3, 6), ("mme", 2, 6), ("gqa", 2, 5), ("textvqa_val", 1, 8)):
            clusters = [row["cluster"] for row in records_of(finished / pictures, task)]
            assert len(set(clusters)) == count and all(clusters.count(name) == size for name in clusters)
    real, blanked = (records_of(finished / pictures, "gqa") for pictures in ("real", "blank"))
    assert [row["cluster"] for row in real] == [row["cluster"] for row in blanked]


# --------------------------------------------------------------------------------------------------------- folders and resume


def test_finished_folder_returns_at_once(finished: Path, config: EvalConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert run_suite(config) == finished
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before
    manifest = json.loads((finished / "shuffled/manifest.json").read_text())
    assert manifest["stage"] == "eval" and manifest["config"]["pictures"] == "shuffled"
    assert manifest["config"]["attention"] == "sdpa" and manifest["config"]["lmms_eval"]
    assert not (finished / ".cache").exists()
    assert not list(Path(config.data).glob("submissions")), "tasks write beside the results, not into the data"


def test_another_config_is_refused(finished: Path, config: EvalConfig) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=r"another result .*batch_size: 4 → 5"):
        run_suite(replace(config, batch_size=5))


def test_killed_and_resumed_equals_uninterrupted(finished: Path, config: EvalConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    out = tmp_path / "out"
    shutil.copytree(finished / "real", out / "real")
    for name in ("manifest.json", "results.json", *(f"{task}.jsonl" for task in TASKS)):
        (out / "real" / name).unlink()
    (out / "real/answers-gqa.jsonl").unlink()
    (out / "real/answers-textvqa_val.jsonl").unlink()
    log = out / "real/answers-mme.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:6]) + lines[6][:5])  # a kill in the middle of a line, in the middle of a batch
    first = (out / "real/answers-pope.jsonl").read_text()

    resumed = replace(config, out=out, pictures=["real"])
    with pytest.raises(InputError, match=r"answers of another run .*seed"):
        run_suite(replace(resumed, seed=3))
    run_suite(resumed)
    for task in TASKS:
        assert records_of(out / "real", task) == records_of(finished / "real", task)
    assert results(out / "real") == results(finished / "real")
    assert (out / "real/answers-pope.jsonl").read_text() == first
    assert log.read_text().splitlines(keepends=True)[:6] == lines[:6]
    answered = [{(row["doc_id"], row["answer"]) for row in map(json.loads, text)} for text in (log.open(), lines)]
    assert answered[0] == answered[1] and len(log.read_text().splitlines()) == len(lines)


def test_limit_takes_the_first_questions(finished: Path, config: EvalConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    limited = replace(
        config, out=tmp_path / "out", pictures=["real"], limit=4, suite=suite_file(tmp_path, ("pope", "mme"))
    )
    run_suite(limited)
    for task in ("pope", "mme"):
        rows = records_of(tmp_path / "out/real", task)
        assert rows == records_of(finished / "real", task)[:4]
    with pytest.raises(InputError, match=r"has 1 rows, not 2; limit 3 may cut"):
        run_suite(replace(limited, limit=3, out=tmp_path / "other"))


def test_other_files_at_the_same_path_are_read_anew(model: Path, tmp_path: Path) -> None:
    """`datasets` knows a local file by its path and time of change; here both stay and the content changes."""
    suite = suite_file(tmp_path, ("pope", "gqa"))
    data = make_data(tmp_path / "data", seed=1)
    times = {path: path.stat() for path in data.rglob("*.parquet")}
    run_suite(EvalConfig(model, data, tmp_path / "first", suite=suite))
    make_data(data, seed=2)
    for path, stat in times.items():
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    run_suite(EvalConfig(model, data, tmp_path / "second", suite=suite))
    other = make_data(tmp_path / "other", seed=1)
    run_suite(EvalConfig(model, other, tmp_path / "third", suite=suite))
    for task in ("pope", "gqa"):
        first, second, third = (records_of(tmp_path / name / "real", task) for name in ("first", "second", "third"))
        assert [row["target"] for row in second] == [doc["answer"] for doc in docs(data, task)]
        assert first == third != second
    with pytest.raises(InputError, match=r"another result .*inputs\.data"):
        run_suite(EvalConfig(model, data, tmp_path / "first", suite=suite))


def test_the_process_is_left_as_it_was(finished: Path) -> None:
    """(working directory, offline flags, truncated pictures)"""
    from PIL import ImageFile

    assert Path.cwd() != finished and "LMMS_EVAL_DATASETS_CACHE" not in os.environ
    assert str(datasets.config.HF_DATASETS_CACHE) == os.environ["HF_DATASETS_CACHE"]
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


# ---------------------------------------------------------------------------------------------------------------- bad input


def test_empty_answer_is_an_error(data: Path, tmp_path: Path) -> None:
    silent = make_model(tmp_path / "silent", silent=True)
    suite = suite_file(tmp_path, ("gqa",), tokens=3)
    text = Path(suite).read_text().replace("min_new_tokens: 1", "min_new_tokens: null")
    Path(suite).write_text(text)
    with pytest.raises(RuntimeError, match=r"gqa, doc_id \d+: the model generated no text"):
        run_suite(EvalConfig(silent, data, tmp_path / "out", suite=suite))
    assert not (tmp_path / "out/real/manifest.json").exists()


def test_errors_of_the_model_are_raised(data: Path, model: Path, tmp_path: Path) -> None:
    """One image token too few in the prompt: transformers refuses, and no empty answer comes of it."""
    spoilt = Path(shutil.copytree(model, tmp_path / "spoilt"))
    settings = json.loads((spoilt / "processor_config.json").read_text())
    (spoilt / "processor_config.json").write_text(json.dumps({**settings, "num_additional_image_tokens": 0}))
    with pytest.raises(ValueError, match=r"[Ii]mage"):
        run_suite(EvalConfig(spoilt, data, tmp_path / "out", suite=suite_file(tmp_path, ("pope",))))
    assert not (tmp_path / "out/real/answers-pope.jsonl").exists()


def test_a_truncated_picture_is_not_filled_up(finished: Path, data: Path) -> None:
    """(as lmms-eval has PIL do from its import on)"""
    whole = docs(data, "pope")[0]["image"]["bytes"]
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(whole[: len(whole) // 2])).load()


@pytest.fixture
def spoilt(data: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the data folder to spoil."""
    yield Path(shutil.copytree(data, tmp_path / "spoilt"))


def change(folder: Path, task: str, row: int, **values: Any) -> None:
    name, split = {"pope": ("POPE", "test"), "mme": ("MME", "test"), "textvqa_val": ("textvqa", "validation")}[task]
    rows = docs(folder, task)
    rows[row] |= values
    write(folder, name, split, rows)


def refused(config: EvalConfig, data: Path, tmp_path: Path, task: str) -> str:
    """The message of the error, which must come before anything is loaded or answered."""
    suite = suite_file(tmp_path, (task,))
    with pytest.raises(InputError) as caught:
        run_suite(EvalConfig(config.model, data, tmp_path / "out", suite=suite))
    assert not list((tmp_path / "out").rglob("answers-*"))
    return str(caught.value)


def test_missing_data(config: EvalConfig, spoilt: Path, tmp_path: Path) -> None:
    assert "no such folder" in refused(config, tmp_path / "nowhere", tmp_path, "pope")
    (spoilt / "lmms-lab-encoder/MME/default/test-00000-of-00001.parquet").unlink()
    assert "MME" in refused(config, spoilt, tmp_path, "mme")
    shutil.rmtree(spoilt / "lmms-lab-encoder/POPE")
    message = refused(config, spoilt, tmp_path, "pope")
    assert "lmms-lab-encoder/POPE" in message and "no such folder" in message
    readme = spoilt / "lmms-lab-encoder/GQA/README.md"
    readme.write_text(readme.read_text().replace("testdev_balanced_images", "other"))
    assert "testdev_balanced_images" in refused(config, spoilt, tmp_path, "gqa")


def test_wrong_columns(config: EvalConfig, spoilt: Path, tmp_path: Path) -> None:
    file = spoilt / "lmms-lab-encoder/POPE/default/test-00000-of-00001.parquet"
    table = pq.read_table(file)
    pq.write_table(table.drop_columns(["answer"]), file)
    message = refused(config, spoilt, tmp_path, "pope")
    assert str(file) in message and "no column 'answer'" in message
    pq.write_table(table.replace_schema_metadata({}), file)
    message = refused(config, spoilt, tmp_path, "pope")
    assert str(file) in message and "'image'" in message
    pq.write_table(table.slice(0, 0), file)
    assert "no rows" in refused(config, spoilt, tmp_path, "pope")
    file.write_bytes(b"PAR1 not parquet at all")
    assert "not a readable parquet file" in refused(config, spoilt, tmp_path, "pope")


def test_damaged_picture(config: EvalConfig, spoilt: Path, tmp_path: Path) -> None:
    whole = docs(spoilt, "textvqa_val")[5]["image"]["bytes"]
    change(spoilt, "textvqa_val", 5, image={"bytes": whole[: len(whole) // 2], "path": "x.png"})
    message = refused(config, spoilt, tmp_path, "textvqa_val")
    assert "validation-00000-of-00001.parquet, row 5, column 'image'" in message


def test_bad_rows(config: EvalConfig, spoilt: Path, tmp_path: Path) -> None:
    change(spoilt, "pope", 3, answer="maybe")
    assert "row 3, column 'answer': 'maybe' is neither yes nor no" in refused(config, spoilt, tmp_path, "pope")
    change(spoilt, "mme", 3, question_id="9.png")
    assert "has 1 rows, not 2" in refused(config, spoilt, tmp_path, "mme")
    write(spoilt, "GQA", "testdev", [{"id": "n0", "image": png(random.Random(0))}], "testdev_balanced_images")
    assert "lacks 4 of the values in column 'imageId'" in refused(config, spoilt, tmp_path, "gqa")


def test_unknown_names(config: EvalConfig, tmp_path: Path) -> None:
    from dataclasses import replace

    with pytest.raises(InputError, match=r"suite 'dmeo'.*demo"):
        load_suite("dmeo")
    text = Path(suite_file(tmp_path, ("pope",))).read_text()

    def with_text(new: str) -> EvalConfig:
        path = tmp_path / "changed.yaml"
        path.write_text(new)
        return replace(config, suite=str(path), out=tmp_path / "out")

    for new, message in [
        (text.replace("  pope:", "  popee:"), "'popee': lmms-eval has no such task"),
        (text.replace("  pope:", "  pope_full:"), "group"),
        (text.replace("pope_f1_score", "pope_f2"), "no metric 'pope_f2'"),
        (text.replace("category: category", "categroy: category"), "unknown key"),
        (text.replace("primary: pope_accuracy", "primary: accuracy"), "not among its metrics"),
        (text.replace("  pope:", "  pope_adv:"), "its questions are in"),
    ]:
        with pytest.raises(InputError, match=message):
            run_suite(with_text(new))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_bad_model_folder(config: EvalConfig, model: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    def message(folder: Path) -> str:
        with pytest.raises(InputError) as caught:
            run_suite(replace(config, model=folder, out=tmp_path / "out", pictures=["real"]))
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        return str(caught.value)

    assert "no config.json" in message(tmp_path / "nowhere")
    copy = Path(shutil.copytree(model, tmp_path / "run/model"))
    (tmp_path / "run/manifest.json").write_text(json.dumps({"weights": {"model/model.safetensors": "0" * 64}}))
    assert "not the weights" in message(copy)
    (tmp_path / "run/manifest.json").unlink()
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    del weights["multi_modal_projector.linear_1.weight"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    assert "missing keys among its weights: model.multi_modal_projector" in message(copy)
    (copy / "config.json").write_text('{"model_type": "llama"}')
    assert "'llama'" in message(copy)


def test_without_lmms_eval(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "_lmms_eval_version", lambda: None)
    with pytest.raises(InputError, match=r"found none; run: .*pip install --no-deps lmms-eval==0\.7\.3"):
        run_suite(config)


@pytest.mark.parametrize("path", sorted(SUITES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_suites_are_whole(path: Path) -> None:
    suite = load_suite(path.stem)
    assert suite.name == path.stem and suite.tasks
