"""What counts as a caption, and a local model: a batch says what each picture alone would make it say."""

import base64
import datetime
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from caption_samples import WORDS, save_talker
from llava_samples import save_llm
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from clips_core.captioners import (
    LocalModel,
    Outcome,
    Reply,
    Request,
    _Sampler,
    data_url,
    judge,
    model_folder,
    repeats,
    retry_after,
    whole_sentences,
)
from clips_core.errors import InputError
from clips_core.folders import sha256_file, write_json
from llava_bridge.mllm import save_mllm

PROSE = (
    "A red bird sits on the roof of a small house. To its left there are two stars, both yellow, and a third one that is "
    "half hidden behind a tree. The sky is light blue at the top and nearly white near the hills! In front of the house a "
    "wooden fence runs from left to right. A sign on the fence reads “closed”, in black letters on a white ground."
)
LIST_LIKE = (
    "There is a red flower. There is a blue bird. There is a green house. There is a yellow star. There is a cup."
)


# ------------------------------------------------------------------------------------------------------ the rules


@pytest.mark.parametrize(
    ("text", "cut_off", "caption"),
    [
        (PROSE, False, PROSE),
        (f"  {PROSE[:60]}\n\n{PROSE[60:]} ", False, f"{PROSE[:60].strip()} {PROSE[60:].strip()}"),
        (PROSE + " Behind the hou", True, PROSE),
        (PROSE, True, PROSE),
        ("The bird weighs 3.5 kg. It is", True, "The bird weighs 3.5 kg."),
        ('A sign says "Stop!" beside a ro', True, 'A sign says "Stop!"'),
        ("一只红色的鸟。它坐在屋顶上。天空", True, "一只红色的鸟。它坐在屋顶上。"),
        ("A sign that reads: I'm sorry, we are closed.", False, "A sign that reads: I'm sorry, we are closed."),
        ("I love New York, says the shirt of a man.", False, "I love New York, says the shirt of a man."),
        ("There is no one in the street.", False, "There is no one in the street."),
        (LIST_LIKE, False, LIST_LIKE),
        ("<think>Let me look. A bird?</think> A bird.", False, "A bird."),
    ],
)
def test_captions(text: str, cut_off: bool, caption: str) -> None:
    outcome = judge(Reply(text, cut_off))
    assert (outcome.kind, outcome.caption) == ("captioned", caption)
    assert outcome.trimmed == (cut_off and text != caption)


@pytest.mark.parametrize(
    ("reply", "cause"),
    [
        (Reply("", False), "empty"),
        (Reply(" \n** 12 …", False), "empty"),
        (Reply("<think>Let me look at", True), "empty"),
        (Reply("I'm sorry, I can't help with that.", False), "refusal"),
        (Reply("I’m sorry, but I can’t describe people.", False), "refusal"),
        (Reply("I am unable to see any picture.", False), "refusal"),
        (Reply("Sorry, but I cannot assist with that request.", False), "refusal"),
        (Reply("Unfortunately, I don't see an image.", False), "refusal"),
        (Reply("As an AI language model, I", True), "refusal"),
        (Reply("No image was provided.", False), "refusal"),
        (Reply("Please provide the image.", False), "refusal"),
        (Reply("A bird", False, filtered=True), "refusal"),
        (Reply("A red bird that sits on the ro", True), "cut off"),
        (Reply("! A bird", True), "cut off"),
        (Reply(PROSE + " The sky is blue." * 40, False), "repetition"),
        (Reply("A bird. " + "house " * 30, False), "repetition"),
        (Reply("一只鸟。" * 30, False), "repetition"),
    ],
)
def test_what_is_no_caption(reply: Reply, cause: str) -> None:
    outcome = judge(reply)
    assert (outcome.kind, outcome.cause, outcome.caption) == ("uncaptioned", cause, "")


def test_repetition_is_measured_against_its_plain_definition() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        unit = "".join(rng.choice(list("abc de"), rng.integers(1, 60)))
        text = (unit * int(rng.integers(1, 6)))[: rng.integers(1, 200)]
        runs = [text[i : i + 16] for i in range(len(text)) if len(text[i : i + 16]) == 16]
        assert repeats(text) == (len(runs) > 16 and len(set(runs)) / len(runs) < 0.5)
    assert not repeats(PROSE) and not repeats("A bird.")


def test_whole_sentences_end_where_a_sentence_ends() -> None:
    assert whole_sentences("No mark at all") == ""
    assert whole_sentences("One. Two? Three (see there.) Fo") == "One. Two? Three (see there.)"
    assert whole_sentences("Version 2.0 of e.g") == ""


def test_retry_after_holds_seconds_or_a_date() -> None:
    now = datetime.datetime(2024, 5, 1, 12, 0, 0, tzinfo=datetime.UTC)
    assert retry_after("7.5") == 7.5 and retry_after("") == retry_after("soon") == retry_after("-3") == 0
    assert retry_after("Wed, 01 May 2024 12:01:30 GMT", lambda: now) == 90
    assert retry_after("Wed, 01 May 2024 11:00:00 GMT", lambda: now) == 0


def test_what_travels_is_the_pixels_alone() -> None:
    picture = Image.new("RGB", (40, 20), (200, 10, 30))
    picture.info = {"exif": b"Exif\0\0where it was taken", "comment": b"by whom", "icc_profile": b"x" * 200}
    header, _, data = data_url(picture).partition(",")
    assert header == "data:image/jpeg;base64"
    raw = base64.b64decode(data)
    assert b"where" not in raw and b"whom" not in raw and b"ICC" not in raw
    there = np.asarray(Image.open(io.BytesIO(raw)))
    assert there.shape == (20, 40, 3) and np.abs(there.astype(int) - (200, 10, 30)).max() <= 3


# ---------------------------------------------------------------------------------------------------- a local model


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_talker(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def local(llava: Path) -> LocalModel:
    return LocalModel(str(llava), max_new_tokens=24)


def requests(count: int = 6) -> list[Request]:
    """Random pictures of several sizes, prompts of several lengths."""
    rng = np.random.default_rng(0)
    prompts = [
        "Hi.",
        "Describe this picture.",
        "Describe this picture in as many words as you can, from left to right.",
    ]
    sizes = [(50, 70), (48, 48), (20, 90)]
    return [
        Request(Image.fromarray(rng.integers(0, 256, (*sizes[i % 3], 3), dtype=np.uint8)), prompts[i % 3], seed=i)
        for i in range(count)
    ]


def test_a_batch_says_what_stock_generate_says_of_each_picture(local: LocalModel, llava: Path) -> None:
    model, processor = AutoModelForImageTextToText.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    expected = []
    for picture, prompt, _ in requests():
        text = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        text += f"<|im_start|>user\n<image>\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        inputs = processor(images=picture, text=text, return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=24, do_sample=False)
        expected.append(processor.tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    batch = requests()
    inputs = local.encode(batch)
    assert int((inputs["attention_mask"] == 0).sum()) > 20  # there is padding, and it must not matter
    assert (inputs["attention_mask"][:, -1] == 1).all()
    replies = local.generate(inputs, [r.seed for r in batch], temperature=0)
    assert [reply.text for reply in replies] == expected
    assert len(set(expected)) > 3  # pictures and prompts matter


def test_a_drawn_caption_depends_on_its_seed_alone(local: LocalModel) -> None:
    batch = requests()
    together = local.generate(local.encode(batch), [r.seed for r in batch], temperature=0.5)
    alone = [local.generate(local.encode([r]), [r.seed], temperature=0.5)[0] for r in batch]
    assert together == alone
    other = local.generate(local.encode(batch), [r.seed + 100 for r in batch], temperature=0.5)
    assert all(a.text != b.text for a, b in zip(together, other, strict=True))


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([[1.0, 0.0, -1.0, 2.0]]).repeat(500, 1)
    sampler = _Sampler(0.7, list(range(500)), torch.device("cpu"))
    draws = torch.cat([sampler(None, logits).argmax(1) for _ in range(40)])
    share = torch.bincount(draws, minlength=4) / len(draws)
    expected = torch.softmax(logits[0] / 0.7, 0)
    assert (
        (share - expected).abs() < 4 * (expected * (1 - expected) / len(draws)).sqrt()
    ).all()  # four standard errors


def test_a_caption_that_ended_by_itself_is_not_cut_off(llava: Path) -> None:
    model = LocalModel(str(llava), max_new_tokens=24)
    batch = requests()
    free = model.generate(model.encode(batch), [0] * 6, 0)
    assert all(reply.cut_off for reply in free)
    word = next(word for word in WORDS if 0 < sum(word in reply.text for reply in free) < len(free))
    model.end = {int(model.processor.tokenizer.encode(word)[0])}
    ended = model.generate(model.encode(batch), [0] * 6, 0)
    for before, after in zip(free, ended, strict=True):
        assert after.cut_off == (word not in before.text)
        if not after.cut_off:
            assert after.text == before.text[: before.text.index(word) + len(word)]
    assert {reply.cut_off for reply in ended} == {True, False}


@dataclass(frozen=True, eq=False)
class Sample:
    """A task for the tests."""

    number: int
    request: Request | Outcome

    @property
    def batch(self) -> int:
        return self.number // 4

    def read(self) -> Request | Outcome:
        return self.request


def test_tasks_are_captioned_in_batches_and_asked_again_once(local: LocalModel) -> None:
    """Against the rules applied to each picture alone; one task has nothing to ask."""
    tasks = [Sample(i, request) for i, request in enumerate(requests(10))]
    tasks[5] = Sample(5, Outcome("skipped", cause="no picture"))
    done = dict(local.captions(iter(tasks)))
    assert len(done) == 10
    causes = set()
    for task, outcome in done.items():
        if isinstance(task.request, Outcome):
            assert outcome is task.request
            continue
        first = judge(local.generate(local.encode([task.request]), [task.request.seed], 0)[0])
        if first.kind == "captioned":
            assert outcome == first
        else:
            causes.add(first.cause)
            second = judge(local.generate(local.encode([task.request]), [task.request.seed + 1], 0.7)[0])
            assert outcome == second._replace(retried=first.cause)
    assert causes  # some of these random sentences were not good enough


def test_a_picture_that_the_processor_refuses_spoils_no_other(
    local: LocalModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = local.encode

    def refusing(batch: list[Request]) -> object:
        if any(min(request.picture.size) < 2 for request in batch):
            raise ValueError("absolute aspect ratio must be smaller than 200")
        return encode(batch)

    monkeypatch.setattr(local, "encode", refusing)
    tasks = [Sample(i, request) for i, request in enumerate(requests(4))]
    thin = Sample(2, Request(Image.new("RGB", (1, 500)), "Describe it.", 0))
    outcomes = dict(local.captions(iter([*tasks[:2], thin, tasks[3]])))
    assert (outcomes[thin].kind, outcomes[thin].cause) == ("uncaptioned", "the model cannot take it")
    assert "aspect ratio" in outcomes[thin].detail
    assert all("take" not in outcomes[task].cause for task in (tasks[0], tasks[1], tasks[3]))


def test_tasks_are_read_no_further_than_needed(local: LocalModel) -> None:
    """A shard is opened when its turn comes, not when the run starts."""
    taken = []

    def tasks() -> Iterator[Sample]:
        for i in range(40):
            taken.append(i)
            yield Sample(i, Outcome("kept"))

    next(local.captions(tasks()))
    assert len(taken) <= 17


def test_the_folder_of_a_stage_is_checked(llava: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder, and no hub name"):
        model_folder(str(tmp_path / "nothing"))
    assert model_folder("llava-hf/llava-1.5-7b-hf") is None and model_folder(str(llava)) == llava
    run = tmp_path / "tune"
    (run / "model").mkdir(parents=True)
    with pytest.raises(InputError, match=r"no manifest\.json, so the stage that makes it has not finished"):
        model_folder(str(run))
    (run / "model" / "model.safetensors").write_bytes(b"weights")
    write_json(run / "manifest.json", {"stage": "tune", "weights": {
        "model/model.safetensors": sha256_file(run / "model" / "model.safetensors")}})  # fmt: skip
    assert model_folder(str(run)) == run / "model"
    (run / "model" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(InputError, match="run that stage again"):
        model_folder(str(run))


def test_what_is_no_captioner_is_refused(llava: Path, tmp_path: Path) -> None:
    llm = save_llm(tmp_path / "llm")
    with pytest.raises(InputError, match=f"{llm}: cannot be loaded as a vision-language model"):
        LocalModel(str(llm), 8)
    model, processor = AutoModelForImageTextToText.from_pretrained(llava), AutoProcessor.from_pretrained(llava)
    processor.chat_template = processor.tokenizer.chat_template = None
    save_mllm(model, processor, tmp_path / "mute")
    with pytest.raises(InputError, match="has no chat template"):
        LocalModel(str(tmp_path / "mute"), 8)
    with pytest.raises(InputError, match="cannot be loaded"):  # no network, so no hub
        LocalModel("nobody/nothing-of-the-kind", 8)
