"""Language models of each family inside a LLaVA: they say what they said outside and stop where they should."""

import io
import json
import os
import pickle
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import sentencepiece
import torch
from llava_samples import save_llm, save_tower
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)

from clips_core.errors import InputError
from llava_bridge.conversations import IGNORE, Conversation, Encoder
from llava_bridge.llm import choose_pad, llm_folder, weight_hash
from llava_bridge.mllm import build_mllm, load_mllm, save_mllm
from llava_bridge.templates import shipped_template
from llava_bridge.towers import Tower, load_tower

DATA = Path(__file__).parent / "data" / "conversations"
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": None,
}  # fmt: skip

# What the families' own templates write, in short.
QWEN2 = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
QWEN3 = (  # the last answer alone shows its thoughts
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if loop.last and m['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


@dataclass
class Family:
    """A tiny random model of a family, with a small tokenizer that has its special tokens, and what is expected of it."""

    config: type
    tokenizer: str  # llama (SentencePiece's habits) or bytes (byte-level)
    special: dict[str, str]
    own: str | None  # the tokenizer's chat template
    template: str | None  # that is asked for
    end: str  # the token that ends an answer
    pad: str
    changes: dict[str, Any] = field(default_factory=dict)
    added: tuple[AddedToken | str, ...] = ()
    spare_rows: int = 0  # beyond the tokenizer's tokens


LLAMA3 = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
SPM = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
GEMMA_SPECIAL = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|eot_id|>"}
SWALLOWING = [AddedToken(f"<|{name}|>", rstrip=True, special=True) for name in ("system", "user", "end", "assistant")]
FAMILIES = {
    "llama3 base": Family(
        LlamaConfig, "bytes", LLAMA3, None, "llama3", "<|eot_id|>", "<|finetune_right_pad_id|>",
        added=("<|reserved_special_token_0|>", "<|finetune_right_pad_id|>"),
    ),
    "llama3 instruct": Family(
        LlamaConfig, "bytes", {**LLAMA3, "eos_token": "<|eot_id|>"}, shipped_template("llama3"), None, "<|eot_id|>",
        "<|reserved_special_token_2|>", {"tie_word_embeddings": True, "eos_token_id": 1},
        ("<|reserved_special_token_10|>", "<|reserved_special_token_2|>"),
    ),
    "qwen2": Family(
        Qwen2Config, "bytes", {"eos_token": "<|im_end|>", "pad_token": "<|end_of_text|>"}, QWEN2, None, "<|im_end|>",
        "<|end_of_text|>", {"tie_word_embeddings": True}, spare_rows=40,
    ),
    "qwen3": Family(
        Qwen3Config, "bytes", {"eos_token": "<|im_end|>"}, QWEN3, "chatml", "<|im_end|>", "<pad>",
    ),
    "phi3": Family(
        Phi3Config, "llama", {**SPM, "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}, PHI3, "phi3", "<|end|>",
        "<unk>", {"pad_token_id": 0}, (AddedToken("<|endoftext|>", special=True), *SWALLOWING), spare_rows=7,
    ),
    "mistral": Family(MistralConfig, "llama", SPM, MISTRAL, None, "</s>", "<unk>", {"sliding_window": 16}),
    "gemma2": Family(
        Gemma2Config, "bytes", GEMMA_SPECIAL, GEMMA, None, "<end_of_turn>", "<|eot_id|>",
        {"final_logit_softcapping": None, "query_pre_attn_scalar": 8, "sliding_window": 16},
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "gemma3": Family(
        Gemma3TextConfig, "bytes", GEMMA_SPECIAL, GEMMA, None, "<end_of_turn>", "<|eot_id|>",
        {"query_pre_attn_scalar": 8, "sliding_window": 16}, ("<start_of_turn>", "<end_of_turn>"),
    ),
}  # fmt: skip


def save_family(family: Family, folder: Path, **changes: Any) -> Path:
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA / f"{family.tokenizer}_tokenizer.json"))
    tokenizer.add_tokens([*family.added], special_tokens=True)
    tokenizer.add_special_tokens(family.special)
    tokenizer.chat_template = family.own
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    ids = {f"{name}_id": tokenizer.convert_tokens_to_ids(token) for name, token in family.special.items()}
    ids = {name: value for name, value in ids.items() if name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rows = max(tokenizer.get_vocab().values()) + 1 + family.spare_rows
    config = family.config(**{**TINY, **ids, "vocab_size": rows, **family.changes, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    return load_tower(f"hf:{save_tower(tmp_path_factory.mktemp('tower'))}")


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), dtype=np.uint8))


QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]


def eos_ids(model: Any) -> list[int]:
    ids = model.generation_config.eos_token_id
    return ids if isinstance(ids, list) else [ids]


# --------------------------------------------------------------------------------------------------------------- families


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_inside_a_llava(tower: Tower, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    folder = save_family(family, tmp_path / "llm")
    model, processor = build_mllm(tower, folder, template=family.template)
    tokenizer = processor.tokenizer
    alone = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    # Words alone are read as before.
    ids = torch.randint(7, 300, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = alone(input_ids=ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-5)
    assert found.shape[-1] == max(expected.shape[-1], len(tokenizer))

    # A picture is read where its tokens stand.
    prompt = processor.apply_chat_template(QUESTION, add_generation_prompt=True)
    batches = [processor(images=picture(seed), text=prompt, return_tensors="pt") for seed in (0, 1)]
    assert int((batches[0]["input_ids"] == processor.image_token_id).sum()) == 36
    first = int((batches[0]["input_ids"][0] == processor.image_token_id).nonzero()[0])
    with torch.no_grad():
        one, other = (model(**batch).logits[0] for batch in batches)
    torch.testing.assert_close(one[:first], other[:first])
    assert not torch.allclose(one[first:], other[first:], atol=1e-3)

    # Saved, stock transformers loads it, reads the same and says the same.
    save_mllm(model, processor, tmp_path / "model")
    loaded, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values())
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    stock = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")
    assert stock.apply_chat_template(QUESTION, add_generation_prompt=True) == prompt
    batch = stock(images=picture(), text=prompt, return_tensors="pt")
    assert batch["input_ids"].tolist() == batches[0]["input_ids"].tolist()
    said = loaded.generate(**batch, max_new_tokens=6, do_sample=False)
    assert said.tolist() == model.generate(**batches[0], max_new_tokens=6, do_sample=False).tolist()

    # It stops where answers end, and padding is no stop.
    end = tokenizer.convert_tokens_to_ids(family.end)
    assert {end, tokenizer.eos_token_id} <= set(eos_ids(loaded))
    assert stock.tokenizer.pad_token == tokenizer.pad_token == family.pad
    assert tokenizer.pad_token_id not in (end, tokenizer.eos_token_id)
    assert loaded.generation_config.pad_token_id == loaded.config.text_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_answers_are_learned_with_their_end(tower: Tower, tmp_path: Path, name: str) -> None:
    family = FAMILIES[name]
    _, processor = build_mllm(tower, save_family(family, tmp_path), template=family.template)
    tokenizer = processor.tokenizer
    turns = ("<image>\nWhat is it?", "A red bird.", "How many?", "Two of them.")
    messages = tuple({"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns))
    sample = Encoder(processor, 36, 2048).chat(Conversation("sample 1", (Path("a.png"),), messages))
    learned = sample.labels[sample.labels != IGNORE]
    assert [int((learned == tokenizer.convert_tokens_to_ids(family.end)).sum())] == [2]
    words = tokenizer.decode(learned).replace(" ", "")
    assert words == f"Aredbird.{family.end}Twoofthem.{family.end}"
    # What is read before the first answer is what inference reads.
    prompt = processor.apply_chat_template([messages[0]], add_generation_prompt=True)
    bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
    read = processor(images=picture(), text=prompt, add_special_tokens=not bos)["input_ids"]
    assert sample.input_ids[: int((sample.labels == IGNORE).argmin())].tolist() == np.array(read).reshape(-1).tolist()


@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if not FAMILIES[name].changes.get("tie_word_embeddings")][:5]
)
def test_generation_stops_at_the_end_of_a_turn(tower: Tower, tmp_path: Path, name: str) -> None:
    """The vocabulary's matrix is bent so that the end of a turn is the likeliest first word."""
    family = FAMILIES[name]
    built, processor = build_mllm(tower, save_family(family, tmp_path / "llm"), template=family.template)
    save_mllm(built, processor, tmp_path / "model")
    model, processor = load_mllm(tmp_path / "model")
    batch = processor(
        images=picture(), text=processor.apply_chat_template(QUESTION, add_generation_prompt=True), return_tensors="pt"
    )
    end = processor.tokenizer.convert_tokens_to_ids(family.end)
    with torch.no_grad():
        state = model.model(**batch).last_hidden_state[0, -1]
        model.lm_head.weight[end] = 1000 * state / state.square().sum()
    said = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert said.tolist() == [end]


def test_vicunas_layout_with_a_tokenizer_model_alone(tower: Tower, tmp_path: Path) -> None:
    """SentencePiece's file, no tokenizer.json and no chat template: tokens are SentencePiece's own."""
    lines = ["USER: What is it? ASSISTANT: A red bird. Two blue stars near a small house." for _ in range(50)]
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=file, vocab_size=320, model_type="bpe", byte_fallback=True,
        unk_id=0, bos_id=1, eos_id=2, pad_id=-1, hard_vocab_limit=False, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "tokenizer.model").write_bytes(file.getvalue())
    settings = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": False, **SPM,
        "clean_up_tokenization_spaces": False, "model_max_length": 4096, "pad_token": None,
    }  # fmt: skip
    (tmp_path / "llm" / "tokenizer_config.json").write_text(json.dumps(settings))
    pieces = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    torch.manual_seed(1)
    config = LlamaConfig(**{**TINY, "vocab_size": pieces.vocab_size(), "bos_token_id": 1, "eos_token_id": 2})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "llm")

    with pytest.raises(InputError, match="no chat template; take the instruct model, or set template to one of chatml"):
        build_mllm(tower, tmp_path / "llm")
    model, processor = build_mllm(tower, tmp_path / "llm", template="vicuna_v1")
    save_mllm(model, processor, tmp_path / "model")
    stock = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")
    for text in ("Two blue stars", "USER: What is 3 × 4? ASSISTANT:", "A\nred  bird. Größe"):
        assert processor.tokenizer(text)["input_ids"] == [1, *pieces.encode(text)]
        assert stock.tokenizer(text)["input_ids"] == [1, *pieces.encode(text)]
    assert stock.tokenizer.pad_token == "<unk>"
    assert eos_ids(model) == [2]
    assert processor.apply_chat_template(QUESTION, add_generation_prompt=True).endswith(
        "USER: <image>\nWhat is it? ASSISTANT:"
    )


# ----------------------------------------------------------------------------------------------------------------- templates


def test_a_template_may_be_a_file(tower: Tower, tmp_path: Path) -> None:
    (tmp_path / "ours.jinja").write_text(shipped_template("chatml").replace("\\n", "\\n\\n"), encoding="utf-8")
    folder = save_family(FAMILIES["qwen2"], tmp_path / "llm")
    _, processor = build_mllm(tower, folder, template=str(tmp_path / "ours.jinja"), system_prompt="Be brief.")
    text = processor.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    system = "<|im_start|>system\n\nBe brief.<|im_end|>\n\n"
    assert text == f"{system}<|im_start|>user\n\nHi<|im_end|>\n\n<|im_start|>assistant\n\n"
    assert processor.tokenizer.chat_template == processor.chat_template


def test_of_several_templates_the_default_is_taken(tower: Tower, tmp_path: Path) -> None:
    folder = save_family(FAMILIES["qwen2"], tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": shipped_template("chatml"), "tool_use": QWEN2}
    (folder / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(folder)
    _, processor = build_mllm(tower, folder)
    text = processor.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize(
    ("name", "template", "message"),
    [
        ("qwen3", None, "language model .*: the chat template is not prefix-stable.*choose a template"),
        ("phi3", None, "language model .*: the chat template is not prefix-stable"),
        ("qwen2", "vicuna", "no chat template 'vicuna': take one of chatml, llama3, phi3, vicuna_v1"),
        ("qwen2", "nowhere/mine.jinja", r"chat template nowhere/mine\.jinja: no such file"),
        ("mistral", "chatml", r"ends answers with words .*<\|im_end\|>.* and no token of the tokenizer's own"),
    ],
)
def test_templates_that_do_not_fit(tower: Tower, tmp_path: Path, name: str, template: str | None, message: str) -> None:
    folder = save_family(FAMILIES[name], tmp_path)
    with pytest.raises(InputError, match=message):
        build_mllm(tower, folder, template=template)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ strftime_now('%d %b %Y') }}" + QWEN2, "writes today's date.*set template to one of"),
        ("{% for m in messages %}{{ m['content'] }}{% endfo %}", "cannot render it .*endfo"),
        ("{{ raise_exception('Not today') }}", r"cannot render it \(Not today\)"),
    ],
)
def test_faulty_templates(tower: Tower, tmp_path: Path, text: str, message: str) -> None:
    folder = save_family(FAMILIES["qwen2"], tmp_path / "llm")
    (tmp_path / "mine.jinja").write_text(text)
    with pytest.raises(InputError, match=message):
        build_mllm(tower, folder, template=str(tmp_path / "mine.jinja"))


def test_a_system_prompt_that_a_template_refuses(tower: Tower, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot render it .*Only user and assistant roles"):
        build_mllm(tower, save_family(FAMILIES["mistral"], tmp_path), system_prompt="Be brief.")


# ----------------------------------------------------------------------------------------------------------------------- pad


def test_pad_is_never_a_stop(tmp_path: Path) -> None:
    def chosen(stops: tuple[str, ...], *added: str, **special: str) -> str:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "bytes_tokenizer.json"))
        tokenizer.add_tokens([*added], special_tokens=True)
        tokenizer.add_special_tokens(special)
        size = len(tokenizer)
        choose_pad(tokenizer, set(tokenizer.convert_tokens_to_ids([*stops])))
        assert len(tokenizer) == size + (tokenizer.pad_token == "<pad>" and "<pad>" not in added)
        return tokenizer.pad_token

    stops = ("<|eot_id|>", "<|end_of_text|>")
    assert chosen(stops, pad_token="<|im_end|>") == "<|im_end|>"  # kept
    assert chosen(stops, "<pad>", pad_token="<|eot_id|>") == "<pad>"
    assert chosen(stops, "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>") == "<|finetune_right_pad_id|>"
    assert (
        chosen(stops, "<|reserved_special_token_11|>", "<|reserved_special_token_9|>") == "<|reserved_special_token_9|>"
    )
    assert chosen(stops, "<unk>", unk_token="<unk>") == "<unk>"
    assert chosen(stops, unk_token="<|end_of_text|>") == "<pad>"  # as GPT-2's, whose unk is its eos
    assert chosen(stops) == "<pad>"


# ------------------------------------------------------------------------------------------------------------------ folders


def test_weights_may_be_a_plain_pickle_and_nothing_more(tower: Tower, tmp_path: Path) -> None:
    folder = save_family(FAMILIES["qwen3"], tmp_path / "llm")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        build_mllm(tower, folder, template="chatml")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as in Vicuna's: computed nowadays, not read
    torch.save(weights | old, folder / "pytorch_model.bin")
    model, _ = build_mllm(tower, folder, template="chatml")
    rows = len(weights["model.embed_tokens.weight"])
    assert torch.equal(model.model.language_model.embed_tokens.weight[:rows], weights["model.embed_tokens.weight"])
    assert len(weight_hash(folder)) == 64

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "was-here"),)

    torch.save({**weights, "evil": Evil()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(InputError, match="cannot be loaded"):
        build_mllm(tower, folder, template="chatml")
    assert not (tmp_path / "was-here").exists()


def test_a_hub_name_is_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--lab--tiny" / "snapshots" / commit
    save_family(FAMILIES["qwen2"], snapshot)
    (tmp_path / "models--lab--tiny" / "refs").mkdir()
    (tmp_path / "models--lab--tiny" / "refs" / "main").write_text(commit)
    assert llm_folder("lab/tiny").resolve() == llm_folder(f"lab/tiny@{commit}").resolve() == snapshot.resolve()
    assert llm_folder("lab/tiny", weights=False).resolve() == snapshot.resolve()
    with pytest.raises(
        InputError, match=r"lab/other: neither a folder here nor to be had from the hub.*hf download lab/other"
    ):
        llm_folder("lab/other")


# ------------------------------------------------------------------------------------------------------------------- misfits


def save_config(config: Any, folder: Path) -> Path:
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Gemma3Config(), "model type 'gemma3' is more than a decoder LLM: its text model sits inside a bigger one"),
        (T5Config(), "model type 't5' is more than a decoder LLM"),
        (Gemma2Config(), r"changes its logits after the head \(final_logit_softcapping: 30\.0\).*softcapping\": null"),
        (LlamaConfig(quantization_config={"quant_method": "awq"}), "its weights are quantized"),
    ],
    ids=["gemma3", "t5", "gemma2", "quantized"],
)  # fmt: skip
def test_models_that_a_llava_cannot_hold_by_their_config(
    tower: Tower, tmp_path: Path, config: Any, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_mllm(tower, save_config(config, tmp_path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PhiConfig(**TINY), r"model type 'phi' does not fit a stock LLaVA, which has no place for lm_head\.bias"),
        (GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512), "model type 'gpt2' does not fit a stock LLaVA"),
    ],
    ids=["phi", "gpt2"],
)
def test_models_whose_parts_have_no_place_in_a_llava(tower: Tower, tmp_path: Path, config: Any, message: str) -> None:
    folder = save_family(FAMILIES["qwen2"], tmp_path)
    config.vocab_size = 500
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    with pytest.raises(InputError, match=message):
        build_mllm(tower, folder)


def test_sizes_are_compared_before_weights_are_read(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_family(FAMILIES["qwen3"], tmp_path)
    text = (folder / "config.json").read_text()
    monkeypatch.setattr("llava_bridge.mllm.read_model", lambda _: pytest.fail("weights were read"))
    (folder / "config.json").write_text(text.replace('"intermediate_size": 64', '"intermediate_size": 96'))
    with pytest.raises(
        InputError, match=r"model\.safetensors: model\.layers.*mlp.* is \[.*64.*\], but .*config\.json makes it"
    ):
        build_mllm(tower, folder, template="chatml")
    rows = json.loads(text)["vocab_size"]
    (folder / "config.json").write_text(text.replace(f'"vocab_size": {rows}', f'"vocab_size": {rows - 1}'))
    with pytest.raises(InputError, match=f"its tokenizer has ids up to {rows - 1}, but the model has {rows - 1} rows"):
        build_mllm(tower, folder, template="chatml")
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:100])
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read"):
        build_mllm(tower, folder, template="chatml")


def test_a_model_that_says_something_else_inside_is_refused(
    tower: Tower, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last guard, for what no config tells: here, a cap that is hidden from the check of configs."""
    folder = save_family(FAMILIES["gemma2"], tmp_path, final_logit_softcapping=1.0)
    monkeypatch.setattr("llava_bridge.llm.AFTER_THE_HEAD", {})
    with pytest.raises(InputError, match="inside a stock LLaVA its logits differ from its own by"):
        build_mllm(tower, folder)


def test_bfloat16_passes_the_last_guard(tower: Tower, tmp_path: Path) -> None:
    model, _ = build_mllm(tower, save_llm(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16


def test_a_tokenizer_without_a_fast_form_or_eos(tower: Tower, tmp_path: Path) -> None:
    family = FAMILIES["qwen2"]
    folder = save_family(family, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="has no eos token"):
        build_mllm(tower, folder)
