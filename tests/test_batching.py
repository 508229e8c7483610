"""Order and batches: what meets in a batch, and packed rows that equal their samples alone, forward and backward."""

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModel,
    CLIPImageProcessorPil,
    Gemma2Config,
    Lfm2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    ViTConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

from clips_core.errors import InputError
from clips_core.packing import pack
from llava_bridge.batching import (
    Collator,
    SampleDataset,
    balanced,
    deal,
    draw,
    group_by_length,
    group_by_modality,
    grouped,
    packed_row_length,
    packed_rows,
    real_tokens,
)
from llava_bridge.conversations import IGNORE, Conversation, Sample
from llava_bridge.loss import supervised_loss

IMAGE, PAD, VOCABULARY = 99, 0, 100
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 64, "vocab_size": VOCABULARY, "pad_token_id": PAD, "initializer_range": 0.3}  # fmt: skip
VISION = ViTConfig(image_size=16, patch_size=8, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
                   intermediate_size=32)  # fmt: skip
TOKENS = 4  # of a picture
WINDOW = 6  # tokens that a sliding attention sees


def tiny_llava(text: PreTrainedConfig, attention: str = "sdpa", anyres: bool = False) -> PreTrainedModel:
    """A random LLaVA in fp64."""
    torch.manual_seed(0)
    kind, config = (LlavaForConditionalGeneration, LlavaConfig)
    if anyres:
        kind, config = LlavaNextForConditionalGeneration, LlavaNextConfig
    options: dict[str, Any] = {"image_grid_pinpoints": [[16, 32], [32, 32]]} if anyres else {"image_seq_length": TOKENS}
    settings = config(vision_config=VISION, text_config=text, image_token_id=IMAGE, **options)
    model = kind(settings).double().eval()
    model.model.language_model.set_attn_implementation(attention)
    return model


def processor(anyres: bool = False) -> Any:
    """Of an MLLM's processor, what a collator needs."""
    size = {"height": 16, "width": 16}
    image_processor = CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False)
    if anyres:
        image_processor = LlavaNextImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=size, image_grid_pinpoints=[[16, 32], [32, 32]]
        )
    return SimpleNamespace(tokenizer=SimpleNamespace(pad_token_id=PAD), image_processor=image_processor)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(6)]
    for path in paths:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return paths


def make_sample(seed: int, length: int, *images: Path, tokens: int = TOKENS) -> Sample:
    """A text of random tokens with pictures in it; its second half is learned."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, IMAGE, length).astype(np.int32)
    for place, _ in enumerate(images):
        start = 1 + place * (tokens + 1)
        ids[start : start + tokens] = IMAGE
    labels = np.where((np.arange(length) > length // 2) & (ids != IMAGE), ids, IGNORE).astype(np.int32)
    return Sample(f"sample {seed}", images, ids, labels)


@pytest.fixture(scope="module")
def samples(pictures: list[Path]) -> list[Sample]:
    """Of uneven length, with no, one and two pictures."""
    return [
        make_sample(0, 9, pictures[0]),
        make_sample(1, 23, pictures[1], pictures[2]),
        make_sample(2, 7),
        make_sample(3, 14, pictures[3]),
        make_sample(4, 2),
        make_sample(5, 16, pictures[4], pictures[5]),
        make_sample(6, 11),
    ]


# ----------------------------------------------------------------------------------------------------------------- order


def test_each_epoch_is_a_permutation() -> None:
    drawn = draw(10, 25, seed=3)
    assert sorted(drawn[:10]) == sorted(drawn[10:20]) == list(range(10))
    assert len(set(drawn[20:])) == 5
    assert drawn[:10] != drawn[10:20]
    assert drawn == draw(10, 25, seed=3) != draw(10, 25, seed=4)
    assert drawn[:15] == draw(10, 15, seed=3)


def uneven(count: int) -> tuple[dict[int, int], set[int]]:
    """Lengths, and which have a picture: two of three, and they are longer."""
    rng = np.random.default_rng(0)
    pictured = set(np.flatnonzero(rng.random(count) < 2 / 3).tolist())
    return {i: int(rng.integers(10, 200)) + 60 * (i in pictured) for i in range(count)}, pictured


def parts(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def padding(order: list[int], lengths: dict[int, int], size: int) -> float:
    rows = [[lengths[i] for i in part] for part in parts(order, size)]
    return 1 - sum(map(sum, rows)) / sum(max(row) * len(row) for row in rows)


def test_batches_are_of_like_length() -> None:
    lengths, _ = uneven(500)
    drawn = draw(500, 700, seed=0)
    order = group_by_length(drawn, lengths, 8, seed=0)
    assert sorted(order) == sorted(drawn)
    assert order == group_by_length(drawn, lengths, 8, seed=0) != group_by_length(drawn, lengths, 8, seed=1)
    assert padding(order, lengths, 8) < 0.06 < 0.25 < padding(drawn, lengths, 8)
    means = [np.mean([lengths[i] for i in part]) for part in parts(order, 8)[:16]]
    assert means != sorted(means) and means != sorted(means, reverse=True)  # they come in random order


def test_batches_are_of_one_modality() -> None:
    lengths, pictured = uneven(500)
    drawn = draw(500, 1200, seed=0)
    order = group_by_modality(drawn, lengths, pictured, 32)
    assert sorted(order) == sorted(drawn)
    batches = parts(order, 32)
    mixed = [k for k, batch in enumerate(batches) if 0 < len(pictured.intersection(batch)) < len(set(batch))]
    assert len(batches) == 38 and mixed and mixed[0] >= len(batches) - 2  # what is left of both kinds comes last
    kinds = [batch[0] in pictured for batch in batches[: mixed[0]]]
    assert {True, False} == set(kinds[:9]) == set(kinds[-9:])
    for batch in batches[: mixed[0]]:
        assert [lengths[i] for i in batch] == sorted((lengths[i] for i in batch), reverse=True)
    # Within a batch, the parts that are worked on at once hold like lengths.
    assert padding(order, lengths, 4) < 0.6 * padding(drawn, lengths, 4)
    # Each kind is seen in the order of the draw, batch by batch.
    for kind in (True, False):
        found = [sorted(batch) for batch in batches[: mixed[0]] if (batch[0] in pictured) == kind]
        wanted = [i for i in drawn if (i in pictured) == kind]
        assert found == [sorted(batch) for batch in parts(wanted, 32)[: len(found)]]


def test_the_ways_of_grouping() -> None:
    lengths, pictured = uneven(100)
    drawn = draw(100, 100, seed=0)
    assert grouped(drawn, lengths, pictured, 8, "none", seed=0) == drawn
    assert grouped(drawn, lengths, pictured, 8, "length", seed=5) == group_by_length(drawn, lengths, 8, seed=5)
    of_one_kind = group_by_modality(drawn, lengths, pictured, 8)
    assert grouped(drawn, lengths, pictured, 8, "modality_length", seed=0) == of_one_kind
    assert sorted(group_by_modality(drawn, lengths, set(), 8)) == list(range(100))


def test_a_steps_samples_stay_and_their_parts_weigh_alike() -> None:
    lengths, _ = uneven(500)
    drawn = draw(500, 700, seed=0)
    order = balanced(drawn, lengths, 64, 8)
    assert [sorted(batch) for batch in parts(order, 64)] == [sorted(batch) for batch in parts(drawn, 64)]

    def spread(order: list[int]) -> float:
        """The heaviest part of a step over its mean part."""
        weights = np.array([sum(lengths[i] for i in part) for part in parts(order[:640], 8)]).reshape(10, 8)
        return float((weights.max(axis=1) / weights.mean(axis=1)).max())

    assert spread(order) < 1.03 < 1.2 < spread(drawn)
    assert order[640:] == drawn[640:]  # the last batch is not full


def test_items_are_dealt_evenly() -> None:
    assert deal([5, 4, 3, 3, 3], 2, 5) == [[0, 3], [1, 2, 4]]
    assert deal([5, 1, 1, 1], 2, 2) == [[0, 3], [1, 2]]


def test_a_dataset_goes_by_its_order() -> None:
    conversations = [Conversation(str(i), (), ()) for i in range(10)]
    tokens = np.arange(3, dtype=np.int32)
    dataset = SampleDataset(conversations, lambda own: Sample(own.where, (), tokens, tokens), [4, 0, 9, 4])
    assert [dataset[i].where for i in range(len(dataset))] == ["4", "0", "9", "4"]


# --------------------------------------------------------------------------------------------------------------- batches


def pixels(path: Path) -> Tensor:
    return processor().image_processor(Image.open(path), return_tensors="pt")["pixel_values"][0]


def test_a_padded_batch(samples: list[Sample]) -> None:
    batch = Collator(processor())(samples)
    for row, sample in enumerate(samples):
        rest = 23 - len(sample)
        assert batch["input_ids"][row].tolist() == sample.input_ids.tolist() + [PAD] * rest
        assert batch["labels"][row].tolist() == sample.labels.tolist() + [IGNORE] * rest
        assert batch["attention_mask"][row].tolist() == [1] * len(sample) + [0] * rest
    assert batch.keys() == {"input_ids", "labels", "attention_mask", "pixel_values"}
    paths = [path for sample in samples for path in sample.images]
    assert torch.equal(batch["pixel_values"], torch.stack([pixels(path) for path in paths]))
    assert real_tokens(batch) == sum(map(len, samples))


@pytest.mark.parametrize("row_length", [23, 30, 50, None])
def test_a_packed_batch(samples: list[Sample], row_length: int | None) -> None:
    """Read back from its positions, it is each sample once and pads, and the pictures are in the order of their tokens."""
    batch = Collator(processor(), packing=True, row_length=row_length)(samples)
    assert batch.keys() == {"input_ids", "labels", "position_ids", "pixel_values"}
    by_ids = {tuple(sample.input_ids.tolist()): sample for sample in samples}
    found, paths = [], []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*np.flatnonzero(positions == 0).tolist(), len(ids)]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            if end - start == 1:
                assert (ids[start], labels[start]) == (PAD, IGNORE)
                continue
            sample = by_ids[tuple(ids[start:end].tolist())]
            assert labels[start:end].tolist() == sample.labels.tolist()
            found.append(sample.where)
            paths += sample.images
    assert sorted(found) == sorted(sample.where for sample in samples)
    assert torch.equal(batch["pixel_values"], torch.stack([pixels(path) for path in paths]))
    assert real_tokens(batch) == sum(map(len, samples)) == 82
    rows = {23: 4, 30: 3, 50: 2, None: 1}[row_length]
    assert len(batch["input_ids"]) == rows and batch["input_ids"].shape[1] <= (row_length or 82)
    assert batch["input_ids"].numel() <= 1.15 * 82


def test_the_first_token_of_a_sample_is_never_learned(samples: list[Sample]) -> None:
    greedy = [Sample("", (), s.input_ids, s.input_ids) for s in samples if not s.images]
    for packing in (False, True):
        batch = Collator(processor(), packing)(greedy)
        learned = batch["labels"][batch["labels"] != IGNORE]
        assert sorted(learned.tolist()) == sorted(i for sample in greedy for i in sample.input_ids[1:].tolist())


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_each_sample_once_and_little_padding(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row_length = int(rng.integers(50, 300))
    lengths = rng.integers(2, row_length + 1, rng.integers(1, 40)).tolist()
    rows = packed_rows(lengths, row_length)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    weights = [sum(lengths[i] for i in row) for row in rows]
    assert min(weights) > 0 and max(weights) <= row_length
    assert len(rows) <= pack(np.array(lengths), row_length)[2] + 1  # best fit
    assert len(rows) * max(weights) <= len(lengths) * max(lengths)  # no more places than without packing
    if len(lengths) > 8 * len(rows):
        assert sum(weights) > 0.95 * len(rows) * max(weights)
    assert packed_rows(lengths, None) == [list(range(len(lengths)))]


def test_a_text_only_batch_has_no_pixels(samples: list[Sample]) -> None:
    assert "pixel_values" not in Collator(processor())([samples[2], samples[4]])


def test_a_truncated_picture_is_named_with_its_sample(pictures: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "cut.png"
    path.write_bytes(pictures[0].read_bytes()[:500])
    with pytest.raises(InputError, match=r"sample 7, picture .*cut\.png: not a readable picture"):
        Collator(processor())([make_sample(7, 9, path)])


# --------------------------------------------------------------------------------------------------------------- packing

LLMS = {
    "llama": LlamaConfig(**TEXT),
    "mistral with a window": MistralConfig(**TEXT, head_dim=8, sliding_window=WINDOW),
    "gemma-2": Gemma2Config(**TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW),
}


def loss_and_gradients(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor]]:
    losses = [supervised_loss(model, model.get_output_embeddings(), batch) for batch in batches]
    model.zero_grad()
    torch.stack(losses).sum().backward()
    return torch.stack(losses).sum().detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: PreTrainedModel, found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    (loss, gradients), (wanted, wanted_gradients) = (
        loss_and_gradients(model, batches) for batches in (found, expected)
    )
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=0)  # the loss itself is summed in fp32
    assert gradients.keys() == wanted_gradients.keys() and len(gradients) > 20
    for name, gradient in wanted_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()) + 1e-9)


@pytest.mark.parametrize(
    ("llm", "attention"),
    [(llm, kind) for llm in LLMS for kind in ("eager", "sdpa") if (llm, kind) != ("gemma-2", "sdpa")],
)
def test_packed_samples_equal_unpacked_ones(samples: list[Sample], llm: str, attention: str) -> None:
    model = tiny_llava(LLMS[llm], attention)
    alone = [Collator(processor())([sample]) for sample in samples]
    row_length = packed_row_length(model.model.language_model, 30)
    assert row_length == 30
    assert_same(model, [Collator(processor(), True, row_length)(samples)], alone)
    assert_same(model, [Collator(processor(), True, None)(samples)], alone)


def test_packed_samples_of_llava_next_equal_unpacked_ones(pictures: list[Path], tmp_path: Path) -> None:
    """Pictures of several shapes, so of several numbers of tiles and tokens."""
    model, kinds = tiny_llava(LLMS["llama"], anyres=True), processor(anyres=True)
    samples = []
    for number, (height, width) in enumerate([(16, 16), (16, 40), (30, 30), (12, 30)]):
        path = tmp_path / f"{number}.png"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        seen = kinds.image_processor(Image.open(path), return_tensors="pt")
        with torch.no_grad():
            pixel_values = seen["pixel_values"].double()
            features = model.get_image_features(pixel_values, seen["image_sizes"]).pooler_output[0]
        tiles = image_size_to_num_patches([height, width], [[16, 32], [32, 32]], 16)
        assert pixel_values.shape[1] == tiles and len(features) > TOKENS
        samples.append(make_sample(number, 40, path, tokens=len(features)))
    samples.append(make_sample(9, 12))
    assert len({int((s.input_ids == IMAGE).sum()) for s in samples}) > 2
    batch = Collator(kinds, True, 100)(samples)
    assert batch["pixel_values"].ndim == 5 and len(batch["image_sizes"]) == 4
    batches = [batch, *(Collator(kinds)([sample]) for sample in samples)]
    for each in batches:
        if "pixel_values" in each:
            each["pixel_values"] = each["pixel_values"].double()
    assert_same(model, batches[:1], batches[1:])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_changing_a_sample_changes_no_others_logits(samples: list[Sample], attention: str) -> None:
    model = tiny_llava(LLMS["llama"], attention)
    batch = Collator(processor(), True, None)(samples)
    batch.pop("labels")
    starts = [0, *np.cumsum([len(sample) for sample in samples]).tolist()]
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits[0]
        for changed in range(len(samples)):
            ids = batch["input_ids"].clone()
            span = slice(starts[changed], starts[changed + 1])
            ids[0, span] = torch.where(ids[0, span] == IMAGE, IMAGE, 1 + ids[0, span] % (IMAGE - 1))
            after = model(**{**batch, "input_ids": ids}, use_cache=False).logits[0]
            for other in range(len(samples)):
                span = slice(starts[other], starts[other + 1])
                assert torch.equal(after[span], before[span]) == (other != changed)


def test_batches_that_would_leak_are_refused(samples: list[Sample]) -> None:
    model = tiny_llava(LLMS["llama"])
    head, batch = model.get_output_embeddings(), Collator(processor(), True, 50)(samples)
    mask = torch.ones_like(batch["input_ids"])
    with pytest.raises(RuntimeError, match="attention mask: it must be left out"):
        supervised_loss(model, head, {**batch, "attention_mask": mask})
    labels = torch.where(batch["position_ids"] == 0, 5, batch["labels"])
    with pytest.raises(RuntimeError, match="first token must not be learned"):
        supervised_loss(model, head, {**batch, "labels": labels})
    with pytest.raises(RuntimeError, match="must count up from 0"):
        supervised_loss(model, head, {**batch, "position_ids": batch["position_ids"] + 1})


def test_language_models_that_cannot_be_packed_are_refused() -> None:
    def row_length(config: PreTrainedConfig, attention: str = "sdpa") -> int | None:
        llm = AutoModel.from_config(config)
        llm.set_attn_implementation(attention)
        return packed_row_length(llm, 2048)

    # Its short convolutions reach back over the start of a sample.
    convolving = Lfm2Config(**TEXT, layer_types=["conv", "full_attention"], block_auto_adjust_ff_dim=False)
    with pytest.raises(
        InputError, match=r"packing=true is not exact for Lfm2Model: its layers of kind conv .*packing=false"
    ):
        row_length(convolving)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    with pytest.raises(InputError, match=r"not exact for Qwen2VLTextModel: .*several axes \(M-RoPE\)"):
        row_length(Qwen2VLTextConfig(**TEXT, rope_parameters=rope))
    # An attention that transformers makes no mask for sees everything before it.
    AttentionInterface.register("test_without_mask", sdpa_attention_forward)
    with pytest.raises(InputError, match="not exact for LlamaModel: a sample behind another comes out differently"):
        row_length(LlamaConfig(**TEXT), "test_without_mask")
    assert row_length(LlamaConfig(**TEXT)) == row_length(LlamaConfig(**TEXT), "eager") == 2048


def test_flash_attention_gets_one_row() -> None:
    """transformers looks for packed samples there only in batches of one row; in others they would see each other."""
    llm = AutoModel.from_config(LlamaConfig(**TEXT))
    llm.config._attn_implementation = "flash_attention_2"
    assert packed_row_length(llm, 2048) is None
