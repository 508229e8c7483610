"""Makes tests/data/conversations: two small tokenizers, and the tokens and labels that others than we give to some conversations.

    python tests/make_golden_conversations.py LLAVA_CHECKOUT

plain and vicuna_v1 come from the original LLaVA's own functions (its commit is recorded), which are cut out of its files and run as
they are. llama3, chatml and smollm2 are put together from tokens, message by message, as the formats are published: Meta's
`ChatFormat` encodes header and content apart, and so does ChatML; no chat template takes part.
"""

import ast
import copy
import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from llava_bridge.llm import smollm2

DATA = Path(__file__).parent / "data" / "conversations"
IGNORE, IMAGE = -100, -200  # LLaVA's own numbers; IMAGE stands for one picture
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

CAPTION = [("<image>\nRender a clear and concise summary of the photo.", "two red birds on a small house")]
LATE_MARK = [("What do you see happening in this image?\n<image>", "A cat, asleep.")]
TURNS = [
    ("<image>\nWhat is it?\nAnswer in one word.", "Bird"),
    ("How many?", "2\n\nTwo, I think: one red & one blue!"),
    ("Größe? 😀", "Über 3 m — “groß” 鳥."),
]
TEXT = [("Write a loop.", "for i in range(3):\n    print(i)"), ("Thanks", "You're welcome.")]
SEVERAL = [("<image>\n<image>\nWhat differs?", "The second has a star."), ("And here?\n<image>", "Nothing.")]


def train_tokenizers() -> None:
    """A SentencePiece-like one with Llama 2's habits, and a byte-level one with Llama 3's and ChatML's special tokens."""
    samples = [text for turns in (CAPTION, LATE_MARK, TURNS, TEXT, SEVERAL) for turn in turns for text in turn] * 3
    samples += ["USER: ASSISTANT: A chat between a curious user and an artificial intelligence assistant. The assistant gives"
                " helpful, detailed, and polite answers to the user's questions.", "user assistant system"] * 3  # fmt: skip
    habits = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])

    llama = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    llama.normalizer, llama.pre_tokenizer = habits, pre_tokenizers.Split("▁", "merged_with_next")
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    special = ["<unk>", "<s>", "</s>"]
    llama.train_from_iterator([t for t in samples if t.isascii()], trainers.BpeTrainer(
        vocab_size=450, special_tokens=special + fallback, show_progress=False, initial_alphabet=["▁", "\n"]))  # fmt: skip
    state = json.loads(llama.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    state["pre_tokenizer"] = None  # only merges must not cross a word's beginning
    llama = Tokenizer.from_str(json.dumps(state))
    llama.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    llama.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    llama.save(str(DATA / "llama_tokenizer.json"), pretty=False)

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>",
               "<|im_end|>"]  # fmt: skip
    level = Tokenizer(models.BPE())
    level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    level.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    level.train_from_iterator(samples, trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False))  # fmt: skip
    level.save(str(DATA / "bytes_tokenizer.json"), pretty=False)


# ----------------------------------------------------------------------------------------------- the original LLaVA's


def original(checkout: Path) -> SimpleNamespace:
    """`preprocess_multimodal`, `preprocess_plain` and `preprocess_v1` of a LLaVA checkout, without importing its package."""
    namespace: dict[str, Any] = {
        "torch": torch, "copy": copy, "transformers": SimpleNamespace(PreTrainedTokenizer=object),
        "Sequence": list, "Dict": dict, "DataArguments": object, "IS_TOKENIZER_GREATER_THAN_0_14": True,
        "IGNORE_INDEX": IGNORE, "IMAGE_TOKEN_INDEX": IMAGE, "DEFAULT_IMAGE_TOKEN": "<image>",
    }  # fmt: skip
    assert tuple(map(int, tokenizers.__version__.split(".")[:2])) >= (0, 14)

    def cut(file: str, *names: str) -> None:
        tree = ast.parse((checkout / file).read_text())
        tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name in names]
        exec(compile(tree, file, "exec"), namespace)

    conversation: dict[str, Any] = {"__name__": "conversation"}
    sys.modules["conversation"] = SimpleNamespace(__dict__=conversation)  # type: ignore[assignment]
    exec(compile((checkout / "llava/conversation.py").read_text(), "conversation.py", "exec"), conversation)
    namespace["conversation_lib"] = SimpleNamespace(**conversation)
    cut("llava/mm_utils.py", "tokenizer_image_token")
    cut("llava/train/train.py", "preprocess_multimodal", "preprocess_plain", "preprocess_v1")
    return SimpleNamespace(**namespace)


def by_original(
    llava: SimpleNamespace, version: str, turns: list[tuple[str, str]], legacy: bool = True
) -> tuple[list[int], list[int]]:
    """Input ids and labels. Not `legacy`: ▁ is put before the text alone, not after each special token (as Vicuna 1.5 has it)."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "llama_tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<unk>", model_max_length=2048,
    )  # fmt: skip
    tokenizer.legacy = legacy
    if not legacy:
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([])
        first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.backend_tokenizer.pre_tokenizer = first
    llava.conversation_lib.default_conversation = llava.conversation_lib.conv_templates[version]
    has_image = any("<image>" in question for question, _ in turns)
    sources = [[turn for q, a in turns for turn in ({"from": "human", "value": q}, {"from": "gpt", "value": a})]]
    if has_image:
        arguments = SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False)
        sources = llava.preprocess_multimodal(sources, arguments)
    if version == "plain":
        result = llava.preprocess_plain(sources, tokenizer)
    else:
        result = llava.preprocess_v1(sources, tokenizer, has_image=has_image)
    return result["input_ids"][0].tolist(), result["labels"][0].tolist()


# ------------------------------------------------------------------------------------------ put together from tokens


@dataclasses.dataclass
class Format:
    """What stands before and after a message's own tokens: special tokens by name, other text as `text:…`."""

    tokenizer: Any
    bos: list[str]
    header: list[str]  # ROLE stands for the role
    end: str  # learned after an answer
    after_end: list[str]
    system: str | None

    def encode(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        messages = [("system", self.system)] if self.system else []
        messages += [message for q, a in turns for message in (("user", q), ("assistant", a))]
        ids = [i for part in self.bos for i in self.part(part)]
        labels = [IGNORE] * len(ids)
        for role, content in messages:
            header = [i for part in self.header for i in self.part(part.replace("ROLE", role))]
            body = [i for n, text in enumerate(content.split("<image>")) for i in [IMAGE] * (n > 0) + self.words(text)]
            body += self.part(self.end)
            after = [i for part in self.after_end for i in self.part(part)]
            ids += header + body + after
            labels += (
                [IGNORE] * len(header) + (body if role == "assistant" else [IGNORE] * len(body)) + [IGNORE] * len(after)
            )
        return ids, labels

    def part(self, part: str) -> list[int]:
        if part.startswith("text:"):
            return self.words(part.removeprefix("text:"))
        return [self.tokenizer.convert_tokens_to_ids(part)]

    def words(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def formats() -> dict[str, Format]:
    level = PreTrainedTokenizerFast(tokenizer_file=str(DATA / "bytes_tokenizer.json"))
    chatml = dict(bos=[], header=["<|im_start|>", "text:ROLE\n"], end="<|im_end|>", after_end=["text:\n"])
    header = ["<|start_header_id|>", "text:ROLE", "<|end_header_id|>", "text:\n\n"]
    return {
        "llama3": Format(level, ["<|begin_of_text|>"], header, "<|eot_id|>", [], None),
        "chatml": Format(level, system=None, **chatml),  # type: ignore[arg-type]
        "smollm2": Format(AutoTokenizer.from_pretrained(smollm2()), system=SMOLLM2_SYSTEM, **chatml),  # type: ignore[arg-type]
    }


def mark_first(turns: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A single mark goes to the front of its turn, as in LLaVA; several stay."""
    return [
        ("<image>\n" + q.replace("<image>", "").strip() if q.count("<image>") == 1 else q, a) for q, a in turns
    ]  # fmt: skip


def main(checkout: Path) -> None:
    DATA.mkdir(parents=True, exist_ok=True)
    train_tokenizers()
    llava = original(checkout)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True).stdout.strip()
    source = f"haotian-liu/LLaVA at {commit}: its own preprocess functions"
    golden: dict[str, Any] = {}
    for name, version, cases in (
        ("plain", "plain", [CAPTION, LATE_MARK]),
        ("vicuna_v1", "v1", [CAPTION, LATE_MARK, TURNS, TEXT]),
    ):
        samples = [(turns, *by_original(llava, version, turns)) for turns in cases]
        golden[name] = {"source": source, "samples": samples}
    samples = [(turns, *by_original(llava, "v1", turns, legacy=False)) for turns in [CAPTION, TURNS, TEXT]]
    golden["vicuna_v1 not legacy"] = {"source": source, "samples": samples}
    for name, form in formats().items():
        cases = [LATE_MARK, TURNS, TEXT, SEVERAL]
        samples = [(turns, *form.encode(mark_first(turns))) for turns in cases]
        golden[name] = {"source": "put together from tokens, message by message", "samples": samples}
    lines = []
    for name, entry in golden.items():
        rows = [json.dumps(dict(zip(("turns", "input_ids", "labels"), row, strict=True))) for row in entry["samples"]]
        lines.append(f'"{name}": {{"source": {json.dumps(entry["source"])}, "samples": [\n' + ",\n".join(rows) + "\n]}")
    (DATA / "golden.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
