"""Conversations: tokens and labels equal other code's, prompts equal inference's, templates that cannot be masked are refused."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llava_samples import save_conversations, save_llm, save_tower
from PIL import Image
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AddedToken, AutoTokenizer, LlavaProcessor, PreTrainedTokenizerFast

from clips_core.errors import InputError
from llava_bridge.batching import Collator
from llava_bridge.conversations import (
    IGNORE,
    Conversation,
    Encoder,
    read_conversations,
)
from llava_bridge.llm import smollm2
from llava_bridge.mllm import build_mllm
from llava_bridge.mllm import chat_template as mllm_chat_template
from llava_bridge.records import Record, to_conversation
from llava_bridge.templates import shipped_template, shipped_templates
from llava_bridge.towers import load_tower

DATA = Path(__file__).parent / "data" / "conversations"

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


def conversation(*texts: str, images: tuple[Path, ...] = (Path("some.png"),)) -> Conversation:
    roles = ("user", "assistant") * (len(texts) // 2)
    return Conversation(
        "f, sample 1", images, tuple({"role": r, "content": t} for r, t in zip(roles, texts, strict=True))
    )


CHAT = conversation(
    "<image>\nWhat is it?", "A red bird.", "How many?\nCount them.", "2\n\nTwo, I think!", "Sure?", "Yes"
)


def short_chat(picture: Path) -> Conversation:
    return conversation("<image>\nWhat is it?", "A red bird.", images=(picture,))


# ---------------------------------------------------------------------------------------------------------------- golden

GOLDEN = json.loads((DATA / "golden.json").read_text())
SPECIAL = {
    "plain": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "vicuna_v1": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "llama3": {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"},
    "chatml": {"eos_token": "<|im_end|>"},
    "phi3": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
}


def golden_encoder(name: str) -> Encoder:
    """One token a picture; captions end as LLaVA's do."""
    if name == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(smollm2())
    else:
        file = DATA / f"{'bytes' if name in ('llama3', 'chatml') else 'llama'}_tokenizer.json"
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), **SPECIAL[name.removesuffix(" not legacy")])
    if name.endswith(" not legacy"):
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        name = name.removesuffix(" not legacy")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    template = shipped_template(name) if name in shipped_templates() else tokenizer.chat_template
    image = tokenizer.convert_tokens_to_ids("<image>")
    processor = SimpleNamespace(tokenizer=tokenizer, chat_template=template, image_token_id=image)
    return Encoder(processor, 1, 2048, caption_end="\n")


@pytest.mark.parametrize("name", GOLDEN)
def test_tokens_and_labels_equal_the_golden_ones(name: str) -> None:
    """Made by LLaVA's own code (plain, vicuna_v1) and from tokens one by one: see make_golden_conversations.py."""
    encoder = golden_encoder(name)
    for golden in GOLDEN[name]["samples"]:
        turns = [
            turn for question, answer in golden["turns"]
            for turn in ({"from": "human", "value": question}, {"from": "gpt", "value": answer})
        ]  # fmt: skip
        pictures = sum(turn["value"].count("<image>") for turn in turns)
        value = {"image": [f"{i}.png" for i in range(pictures)] or None, "conversations": turns}
        item = to_conversation(Record(1, 1, 0, value), Path("golden.json"), Path("/pictures"))
        sample = encoder.plain(item) if name == "plain" else encoder.chat(item)
        if name.endswith(" not legacy"):
            # LLaVA encodes what stands before and after a picture apart, which costs it another ▁ at each. Transformers' own
            # processor, which is what runs at inference, does not; so neither do we.
            space = encoder.processor.tokenizer.convert_tokens_to_ids("▁")
            after = [i + 1 for i, token in enumerate(golden["input_ids"]) if token == -200]
            assert all(golden["input_ids"][i] == space and golden["labels"][i] == IGNORE for i in after)
            for key in ("input_ids", "labels"):
                golden[key] = [value for i, value in enumerate(golden[key]) if i not in after]
        expected = [encoder.processor.image_token_id if token == -200 else token for token in golden["input_ids"]]
        assert sample.input_ids.tolist() == expected
        assert sample.labels.tolist() == golden["labels"]
        assert any(label != IGNORE for label in golden["labels"])


@pytest.mark.parametrize("name", shipped_templates())
def test_a_system_message_is_read_and_replaces_the_default(name: str) -> None:
    """The prompt is put together by hand, from the published format."""
    processor = golden_encoder(name).processor
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    prompt = processor.tokenizer.apply_chat_template(
        messages, chat_template=processor.chat_template, tokenize=False, add_generation_prompt=True
    )
    assert (
        prompt
        == {
            "vicuna_v1": "Be brief. USER: Hi ASSISTANT:",
            "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi<|end|>\n<|assistant|>\n",
            "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
            "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        }[name]
    )


def test_an_unknown_template_is_refused() -> None:
    with pytest.raises(InputError, match="no chat template 'llama_3': take one of chatml, llama3, phi3, vicuna_v1"):
        shipped_template("llama_3")


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


@pytest.mark.parametrize("name", ["vicuna_v1", "llama3", "chatml"])
def test_bos_stands_once_as_at_inference(encoder: Encoder, name: str) -> None:
    """Whether the template writes it (llama3) or the tokenizer adds it (vicuna_v1), or there is none."""
    shipped = golden_encoder(name)
    tokenizer, picture = shipped.processor.tokenizer, Image.new("RGB", (48, 48))
    if name == "llama3":  # its tokenizer would add one too
        bos = [("<|begin_of_text|>", tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=bos
        )
    old = encoder.processor
    processor = LlavaProcessor(
        old.image_processor, tokenizer, old.patch_size, old.vision_feature_select_strategy,
        chat_template=mllm_chat_template(shipped.processor.chat_template, None),
        num_additional_image_tokens=old.num_additional_image_tokens,
    )  # fmt: skip
    sample = Encoder(processor, 36, 2048).chat(CHAT)
    question = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=True, return_dict=True
    )
    ids = np.array(prompt["input_ids"]).reshape(-1).tolist()
    assert sample.input_ids[: len(ids)].tolist() == ids
    assert sample.labels[len(ids) - 1] == IGNORE != sample.labels[len(ids)]
    assert ids.count(tokenizer.bos_token_id) == (0 if name == "chatml" else 1)


def test_plain_labels_are_caption_and_eos(encoder: Encoder) -> None:
    tokenizer = encoder.processor.tokenizer
    sample = encoder.plain(conversation("<image>\nDescribe it.", "Two red birds."))
    caption = [*tokenizer("Two red birds.")["input_ids"], tokenizer.eos_token_id]
    assert sample.input_ids.tolist() == [tokenizer.bos_token_id] + [encoder.processor.image_token_id] * 36 + caption
    assert sample.labels.tolist() == [IGNORE] * 37 + caption


def test_a_caption_may_end_as_llavas_do(encoder: Encoder) -> None:
    tokenizer = encoder.processor.tokenizer
    item = conversation("<image>\nDescribe it.", "Two red birds.")
    sample = Encoder(encoder.processor, 36, 2048, caption_end="\n").plain(item)
    assert tokenizer.decode(sample.labels[sample.labels != IGNORE]) == "Two red birds.\n"
    assert sample.input_ids[:-1].tolist() == encoder.plain(item).input_ids[:-1].tolist()


def test_stage_1_takes_captions_only(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="f, sample 1: stage 1 takes one picture, one question and one caption"):
        encoder.plain(CHAT)
    with pytest.raises(InputError, match="f, sample 1: stage 1 takes one picture, one question and one caption"):
        encoder.plain(conversation("<image> <image>", "Two.", images=(Path("a.png"), Path("b.png"))))


def test_several_pictures_stand_where_their_marks_do(encoder: Encoder, data: Path) -> None:
    paths = tuple(data / "images" / f"{i}.png" for i in (3, 1, 2))
    item = conversation("<image>\nA. <image>\nB?", "Yes.", "And <image>", "No.", images=paths)
    sample = encoder.chat(item)
    prompt = encoder.processor.apply_chat_template(list(item.messages), tokenize=False)
    pictures = [Image.open(path) for path in paths]
    alone = encoder.processor(images=pictures, text=prompt, return_tensors="pt")
    assert sample.input_ids.tolist() == alone["input_ids"][0].tolist()
    batch = Collator(encoder.processor)([sample, encoder.chat(short_chat(paths[0]))])
    assert batch["pixel_values"].shape[0] == 4
    assert torch.equal(batch["pixel_values"][:3], alone["pixel_values"])
    assert torch.equal(batch["pixel_values"][3], alone["pixel_values"][0])


def test_marks_and_pictures_must_agree(encoder: Encoder) -> None:
    with pytest.raises(InputError, match="f, sample 1: the template renders 1 <image> for 2 pictures"):
        encoder.chat(conversation("<image>\nWhat?", "A bird.", images=(Path("a.png"), Path("b.png"))))


def test_text_only_conversations_have_no_image_tokens(encoder: Encoder) -> None:
    sample = encoder.chat(conversation("Hello?", "Hi.", images=()))
    assert encoder.processor.image_token_id not in sample.input_ids
    batch = Collator(encoder.processor)([sample])
    assert "pixel_values" not in batch
    with pytest.raises(InputError, match="has no picture"):
        encoder.plain(conversation("Hello?", "Hi.", images=()))


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
        ("{% if 'Yes' in messages[-1]['content'] %}{{ 'Surely: ' }}{% endif %}" + HEADERS, "not prefix-stable"),
        (
            HEADERS.replace(
                "'<|im_start|>'",
                "('<|im_start|>' if messages | length < 2 or 'red' in messages[1]['content'] else '')",
                1,
            ),
            "with other answers",
        ),
        (
            HEADERS.replace("messages %}{{", "messages[-2:] %}{{", 1),
            "is not prefix-stable: it renders a turn differently once another follows",
        ),
    ],
)
def test_templates_that_cannot_be_masked_are_refused(encoder: Encoder, template: str, message: str) -> None:
    generation = "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    broken = with_template(encoder, template if "add_generation_prompt" in template else template + generation)
    with pytest.raises(InputError, match=f"f, sample 1: .*{message}"):
        broken.chat(CHAT)
