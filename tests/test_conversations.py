"""Conversations: labels equal an independent derivation, prompts equal inference's, malformed files are one clear error."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from llava_samples import save_conversations, save_llm, save_tower
from PIL import Image
from transformers import LlavaProcessor

from clips_core.errors import InputError
from llava_bridge.conversations import (
    IGNORE,
    Collator,
    Conversation,
    Encoder,
    Sample,
    SampleDataset,
    draw,
    group_by_length,
    read_conversations,
)
from llava_bridge.mllm import build_mllm
from llava_bridge.towers import load_tower

VICUNA = (
    "{{ 'A chat. ' }}{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' + m['content'] + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
HEADERS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    tower = load_tower(f"hf:{save_tower(tmp_path_factory.mktemp('tower'))}")
    _, processor = build_mllm(tower, save_llm(tmp_path_factory.mktemp("llm")))
    return Encoder(processor, tower.num_image_tokens, 2048)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_conversations(tmp_path_factory.mktemp("data") / "llava")


def with_template(encoder: Encoder, template: str) -> Encoder:
    old = encoder.processor
    processor = LlavaProcessor(
        old.image_processor, old.tokenizer, old.patch_size, old.vision_feature_select_strategy,
        chat_template=template, num_additional_image_tokens=old.num_additional_image_tokens,
    )  # fmt: skip
    return Encoder(processor, encoder.num_image_tokens, encoder.max_length)


def conversation(*texts: str, image: Path | None = Path("some.png")) -> Conversation:
    roles = ("user", "assistant") * (len(texts) // 2)
    return Conversation(
        "f, sample 1", image, tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=True))
    )


CHAT = conversation(
    "<image>\nWhat is it?", "A red bird.", "How many?\nCount them.", "2\n\nTwo, I think!", "Sure?", "Yes"
)


# ---------------------------------------------------------------------------------------------------------------- labels


def test_chat_labels_equal_a_scan_of_the_tokens(encoder: Encoder, data: Path) -> None:
    """ChatML, derived anew: from after `<|im_start|>assistant\\n` to `<|im_end|>` is learned."""
    tokenizer = encoder.processor.tokenizer
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    opening = [start, *tokenizer("assistant\n", add_special_tokens=False)["input_ids"]]
    for item in (CHAT, *read_conversations(data / "tune.json", data / "images")):
        sample = encoder.chat(item)
        ids, expected, learning = sample.input_ids.tolist(), [], False
        for position, token in enumerate(ids):
            expected.append(token if learning else IGNORE)
            if learning and token == end:
                learning = False
            if ids[position - len(opening) + 1 : position + 1] == opening:
                learning = True
        assert sample.labels.tolist() == expected
        answers = "".join(f"{m['content']}<|im_end|>" for m in item.messages if m["role"] == "assistant")
        assert tokenizer.decode(sample.labels[sample.labels != IGNORE]) == answers


@pytest.mark.parametrize(
    ("template", "learned"),
    [
        (VICUNA, " A red bird.<|im_end|> 2\n\nTwo, I think!<|im_end|> Yes<|im_end|>"),
        (HEADERS, "A red bird.<|im_end|>2\n\nTwo, I think!<|im_end|>Yes<|im_end|>"),
    ],
)
def test_other_templates_are_masked_as_well(encoder: Encoder, template: str, learned: str) -> None:
    sample = with_template(encoder, template).chat(CHAT)
    assert encoder.processor.tokenizer.decode(sample.labels[sample.labels != IGNORE]) == learned


def test_what_is_read_before_an_answer_is_what_inference_reads(encoder: Encoder) -> None:
    processor = encoder.processor
    sample = encoder.chat(CHAT)
    learned = sample.labels != IGNORE
    starts = np.flatnonzero(learned & ~np.roll(learned, 1))
    assert len(starts) == 3
    for turn, start in zip((1, 3, 5), starts, strict=True):
        prompt = processor.apply_chat_template(list(CHAT.messages[:turn]), add_generation_prompt=True)
        batch = processor(images=Image.new("RGB", (48, 48)), text=prompt, return_tensors="np")
        assert sample.input_ids[:start].tolist() == batch["input_ids"][0].tolist()


def test_plain_labels_are_caption_and_eos(encoder: Encoder) -> None:
    tokenizer = encoder.processor.tokenizer
    sample = encoder.plain(conversation("<image>\nDescribe it.", "Two red birds."))
    caption = [*tokenizer("Two red birds.")["input_ids"], tokenizer.eos_token_id]
    assert sample.input_ids.tolist() == [tokenizer.bos_token_id] + [encoder.processor.image_token_id] * 36 + caption
    assert sample.labels.tolist() == [IGNORE] * 37 + caption


def test_text_only_conversations_have_no_image_tokens(encoder: Encoder) -> None:
    sample = encoder.chat(conversation("Hello?", "Hi.", image=None))
    assert encoder.processor.image_token_id not in sample.input_ids
    batch = Collator(encoder.processor)([sample])
    assert "pixel_values" not in batch
    with pytest.raises(InputError, match="has no picture"):
        encoder.plain(conversation("Hello?", "Hi.", image=None))


def test_a_long_sample_is_cut_at_its_end(encoder: Encoder) -> None:
    whole = encoder.chat(CHAT)
    cut = Encoder(encoder.processor, 36, len(whole) - 3).chat(CHAT)
    assert cut.input_ids.tolist() == whole.input_ids[:-3].tolist()
    assert cut.labels.tolist() == whole.labels[:-3].tolist()


def test_nothing_left_to_learn_is_an_error(encoder: Encoder) -> None:
    first = int(np.flatnonzero(encoder.chat(CHAT).labels != IGNORE)[0])
    Encoder(encoder.processor, 36, first + 1).chat(CHAT)
    with pytest.raises(InputError, match=f"f, sample 1: no token to learn within max_length {first}"):
        Encoder(encoder.processor, 36, first).chat(CHAT)
    with pytest.raises(InputError, match="f, sample 1: its picture lies beyond max_length 40"):
        Encoder(encoder.processor, 36, 40).chat(CHAT)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "no mark after an answer"),
        (HEADERS.replace("| trim", "| upper"), "changes the answer"),
        (HEADERS.replace("messages %}{{", "messages[-2:] %}{{", 1), "differently once another follows"),
    ],
)
def test_templates_that_cannot_be_masked_are_refused(encoder: Encoder, template: str, message: str) -> None:
    generation = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    broken = with_template(encoder, template if "add_generation_prompt" in template else template + generation)
    with pytest.raises(InputError, match=f"f, sample 1: .*{message}"):
        broken.chat(CHAT)


# --------------------------------------------------------------------------------------------------------------- reading


def test_reading(data: Path) -> None:
    entries = json.loads((data / "tune.json").read_text())
    conversations = read_conversations(data / "tune.json", data / "images")
    assert len(conversations) == len(entries)
    for entry, item in zip(entries, conversations, strict=True):
        assert item.image == (data / "images" / entry["image"]).resolve()
        assert [m["content"] for m in item.messages] == [turn["value"] for turn in entry["conversations"]]
        assert f"(id {entry['id']!r})" in item.where


def turns(*values: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]


GOOD = {"id": "x7", "image": "0.png", "conversations": turns("<image>\nWhat?", "A bird.")}
SAMPLE = r"sample 1 \(id 'x7'\): "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", r"bad\.json, line 1: not JSON"),
        ('[\n{"id": 1,}]', r"bad\.json, line 2: not JSON"),
        ({"a": 1}, "must be a list of conversations"),
        ([], "must be a list of conversations, and not empty"),
        (["text"], "sample 1: must be an object"),
        ([{**GOOD, "conversations": None}], SAMPLE + '"conversations" must be pairs'),
        ([{**GOOD, "conversations": []}], SAMPLE + '"conversations" must be pairs'),
        ([{**GOOD, "conversations": turns("<image>\nWhat?")}], SAMPLE + '"conversations" must be pairs'),
        ([{**GOOD, "conversations": turns("<image>\nWhat?", "  ")}], SAMPLE + "an empty answer"),
        ([{**GOOD, "conversations": turns("", "A bird.")}], SAMPLE + "an empty question"),
        ([{**GOOD, "conversations": [{"from": "human"}, {"from": "gpt"}]}], SAMPLE + "each turn must be"),
        ([{**GOOD, "conversations": turns("<image>", "a")[::-1]}], SAMPLE + "a turn is from 'gpt' where 'human'"),
        ([{**GOOD, "conversations": turns("What?", "A bird.")}], SAMPLE + "has 0 <image> and 1 picture"),
        ([{**GOOD, "conversations": turns("<image><image>", "A bird.")}], SAMPLE + "has 2 <image> and 1 picture"),
        (
            [{**GOOD, "conversations": turns("a", "b", "<image>", "d")}],
            SAMPLE + "has 1 <image> .* in the first human turn",
        ),
        ([{**GOOD, "image": None}], SAMPLE + "has 1 <image> and 0 picture"),
        ([{**GOOD, "image": ["0.png"]}], SAMPLE + '"image" must be one path'),
        ([{**GOOD, "image": "absent.png"}], SAMPLE + r"its picture .*absent\.png does not exist"),
        ([{**GOOD, "image": "../align.json"}], SAMPLE + r"its picture '\.\./align\.json' lies outside"),
        ([{**GOOD, "image": "/etc/passwd"}], SAMPLE + "its picture '/etc/passwd' lies outside"),
        ([GOOD, {**GOOD, "id": "y"}, {"image": 3}], r"sample 3: \"conversations\" must be pairs"),
    ],
)
def test_malformed_files(data: Path, tmp_path: Path, content: Any, message: str) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_conversations(bad, data / "images")


def test_missing_files(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.json: no such file"):
        read_conversations(tmp_path / "absent.json", data / "images")
    with pytest.raises(InputError, match="absent: no such folder of pictures"):
        read_conversations(data / "tune.json", tmp_path / "absent")


# -------------------------------------------------------------------------------------------------------------- batching


def test_a_batch_is_padded_on_the_right(encoder: Encoder, data: Path) -> None:
    samples = [encoder.chat(c) for c in read_conversations(data / "tune.json", data / "images")[:4]]
    batch = Collator(encoder.processor)(samples)
    longest = max(map(len, samples))
    assert min(map(len, samples)) < longest
    for row, sample in enumerate(samples):
        rest = longest - len(sample)
        pad = encoder.processor.tokenizer.pad_token_id
        assert batch["input_ids"][row].tolist() == sample.input_ids.tolist() + [pad] * rest
        assert batch["labels"][row].tolist() == sample.labels.tolist() + [IGNORE] * rest
        assert batch["attention_mask"][row].tolist() == [1] * len(sample) + [0] * rest
        assert sample.image is not None
        alone = encoder.processor(images=Image.open(sample.image), text="<image>", return_tensors="pt")
        assert torch.equal(batch["pixel_values"][row], alone["pixel_values"][0])


def test_a_truncated_picture_is_named_with_its_sample(encoder: Encoder, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes((data / "images" / "0.png").read_bytes()[:2000])
    sample = encoder.chat(conversation("<image>\nWhat?", "A bird.", image=path))
    with pytest.raises(InputError, match=r"f, sample 1, picture .*cut\.png: not a readable picture"):
        Collator(encoder.processor)([sample])


def test_each_epoch_is_a_permutation() -> None:
    drawn = draw(10, 25, seed=3)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert len(set(drawn[20:])) == 5
    assert drawn[:10] != drawn[10:20]
    assert drawn == draw(10, 25, seed=3) != draw(10, 25, seed=4)
    assert drawn[:15] == draw(10, 15, seed=3)


def test_batches_are_of_like_length() -> None:
    rng = np.random.default_rng(0)
    lengths = dict(enumerate(rng.integers(40, 200, 500).tolist()))
    drawn = draw(500, 700, seed=0)
    order = group_by_length(drawn, lengths, 8, seed=0)
    assert sorted(order) == sorted(drawn)
    assert order == group_by_length(drawn, lengths, 8, seed=0) != group_by_length(drawn, lengths, 8, seed=1)

    def padding(order: list[int]) -> float:
        rows = [[lengths[i] for i in order[start : start + 8]] for start in range(0, len(order), 8)]
        return sum(max(row) * len(row) for row in rows) / sum(map(sum, rows)) - 1

    assert padding(order) < 0.06 < 0.3 < padding(drawn)
    means = [np.mean([lengths[i] for i in order[start : start + 8]]) for start in range(0, 128, 8)]
    assert means != sorted(means)  # short batches must not all come first


def test_a_dataset_goes_by_its_order(encoder: Encoder) -> None:
    samples = {
        i: Sample(str(i), None, np.arange(i + 1, dtype=np.int32), np.arange(i + 1, dtype=np.int32)) for i in (0, 4, 9)
    }
    dataset = SampleDataset(samples, [4, 0, 9, 4])
    assert [dataset[i].where for i in range(len(dataset))] == ["4", "0", "9", "4"]
