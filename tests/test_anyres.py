"""Pictures of any shape: the pixels are LLaVA's own, and each picture has as many tokens as the model gives it."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from llava_samples import SIZE, WIDTH, save_conversations, save_llm, save_tower
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessorPil,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTImageProcessor,
    DINOv3ViTModel,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
)

from clips_core.errors import InputError
from llava_bridge.config import AlignConfig, ConversationConfig, TuneConfig
from llava_bridge.conversations import Conversation, Encoder, count_image_tokens
from llava_bridge.mllm import (
    IMAGE_NEWLINE,
    build_mllm,
    check_swap,
    fixed_image_tokens,
    load_mllm,
    projector_parameters,
    save_mllm,
)
from llava_bridge.records import read_conversations
from llava_bridge.templates import shipped_template
from llava_bridge.towers import Tower, load_tower
from llava_bridge.train import align, tune

KINDS = ("vit", "clip", "siglip", "dinov2")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
SIZES = [(48, 48), (47, 49), (200, 60), (31, 130), (97, 97), (640, 480), (480, 641), (500, 7), (5, 333), (1, 1)]  # W, H


def picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def make_tower(folder: Path, kind: str) -> Tower:
    """Each with its family's way of preparing pictures: squash, crop after the shortest edge, or a larger one cropped."""
    save_tower(folder, kind)
    crop = {"height": 48, "width": 48}
    processor: Any = {
        "vit": CLIPImageProcessorPil(size=crop, crop_size=crop, do_center_crop=False, resample=2, image_mean=MEAN, image_std=STD),
        "clip": CLIPImageProcessorPil(size={"shortest_edge": 48}, crop_size=crop, resample=3),
        "siglip": SiglipImageProcessorPil(size=crop, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3),
        "dinov2": CLIPImageProcessorPil(size={"shortest_edge": 55}, crop_size=crop, resample=3, image_mean=MEAN, image_std=STD),
    }[kind]  # fmt: skip
    processor.save_pretrained(folder)
    return load_tower(f"hf:{folder}")


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tower]:
    return {kind: make_tower(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


def save_small_llm(folder: Path, **changes: Any) -> Path:
    """A random Llama with a vocabulary of 420, which is read sooner than SmolLM2's of 49,152."""
    file = Path(__file__).parent / "data" / "conversations" / "bytes_tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token="<|im_start|>", eos_token="<|im_end|>")
    tokenizer.chat_template = shipped_template("chatml")
    save_llm(folder, vocab_size=len(tokenizer), **changes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_llm(tmp_path_factory.mktemp("llm"))


# ----------------------------------------------------------------------------------------------------------------------- pad


def on_a_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """What LLaVA-1.5 does first: the picture in the middle of a square of the mean colour, an odd pixel left to the far side."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("kind", KINDS)
def test_pad_is_a_square_of_the_mean_colour_and_the_towers_processor(
    towers: dict[str, Tower], llm: Path, tmp_path: Path, kind: str
) -> None:
    tower = towers[kind]
    model, processor = build_mllm(tower, llm, image_mode="pad")
    assert isinstance(model, LlavaForConditionalGeneration)
    save_mllm(model, processor, tmp_path / "model")
    loaded, again = load_mllm(tmp_path / "model")
    colour = tuple(int(value * 255) for value in tower.image_processor.image_mean)
    for seed, size in enumerate(SIZES):
        image = picture(size, seed)
        expected = tower.image_processor(on_a_square(image, colour), return_tensors="pt")["pixel_values"]
        for used in (processor, again):
            batch = used(images=image, text="<image>\nWhat?", return_tensors="pt")
            assert torch.equal(batch["pixel_values"], expected), size
            assert int((batch["input_ids"] == used.image_token_id).sum()) == 36
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_square_differs_from_pad_where_pictures_are_not_square(towers: dict[str, Tower], llm: Path) -> None:
    square, pad = (build_mllm(towers["vit"], llm, image_mode=mode)[1].image_processor for mode in ("square", "pad"))
    for size, same in (((97, 97), True), ((97, 60), False)):
        one, other = (p(picture(size), return_tensors="pt")["pixel_values"] for p in (square, pad))
        assert torch.equal(one, other) == same


# -------------------------------------------------------------------------------------------------------------------- anyres


def plain_tiles(image: Image.Image, side: int, mean: list[float], std: list[float], resample: int) -> torch.Tensor:
    """LLaVA-NeXT's preprocessing, step by step with PIL: [tiles, 3, side, side], the whole picture first."""
    best, most, least = (0, 0), -1, 0
    for width, height in ((2, 1), (1, 2), (2, 2), (1, 3), (3, 1)):
        width, height = width * side, height * side
        scale = min(width / image.width, height / image.height)
        area = int(image.width * scale) * int(image.height * scale)
        useful = min(area, image.width * image.height)
        wasted = width * height - useful
        if useful > most or (useful == most and wasted < least):
            best, most, least = (width, height), useful, wasted
    width, height = best
    if width / image.width < height / image.height:
        inner = (width, min(int(np.ceil(image.height * (width / image.width))), height))
    else:
        inner = (min(int(np.ceil(image.width * (height / image.height))), width), height)
    canvas = Image.new("RGB", best, (0, 0, 0))
    canvas.paste(image.resize(inner, resample), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    tiles = [image.resize((side, side), resample)]
    tiles += [canvas.crop((x, y, x + side, y + side)) for y in range(0, height, side) for x in range(0, width, side)]
    pixels = torch.from_numpy(np.stack([np.asarray(tile, dtype=np.float32) for tile in tiles])) / 255
    return ((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_tiles_are_llava_nexts(towers: dict[str, Tower], llm: Path, kind: str) -> None:
    tower = towers[kind]
    model, processor = build_mllm(tower, llm, image_mode="anyres")
    assert isinstance(model, LlavaNextForConditionalGeneration)
    own = tower.image_processor
    for seed, size in enumerate(SIZES[:-1]):
        image = picture(size, seed)
        batch = processor.image_processor(image, return_tensors="pt")
        expected = plain_tiles(image, 48, own.image_mean, own.image_std, own.resample)
        torch.testing.assert_close(batch["pixel_values"][0], expected, rtol=0, atol=1e-5)
        assert batch["image_sizes"].tolist() == [[size[1], size[0]]]


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_has_as_many_tokens_as_the_model_gives_it(
    towers: dict[str, Tower], llm: Path, tmp_path: Path, kind: str
) -> None:
    model, processor = build_mllm(towers[kind], llm, image_mode="anyres")
    save_mllm(model, processor, tmp_path / "model")
    assert fixed_image_tokens(model) is None
    encoder = Encoder(processor, fixed_image_tokens(model), 2048)
    rng = np.random.default_rng(0)
    sizes = [*SIZES, *((int(w), int(h)) for w, h in rng.integers(1, 500, (20, 2)))]
    counts = {}
    for number, size in enumerate(sizes):
        picture(size).save(tmp_path / f"{number}.png")
        messages = ({"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "A bird."})
        sample = encoder.chat(Conversation(f"sample {number}", (tmp_path / f"{number}.png",), messages))
        prompt = processor.apply_chat_template(list(messages), tokenize=False)
        batch = processor(images=picture(size), text=prompt, return_tensors="pt")
        assert sample.input_ids.tolist() == batch["input_ids"][0].tolist()
        with torch.no_grad():
            pixels = batch["pixel_values"], batch["image_sizes"]
            features = model.model.get_image_features(*pixels).pooler_output[0]
        counts[size] = int((sample.input_ids == processor.image_token_id).sum())
        assert len(features) == counts[size] == count_image_tokens(processor, [(size[1], size[0])])[0]
    assert len(set(counts.values())) > 5
    # Two pictures of different sizes in one batch, in stock transformers.
    stock, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert isinstance(stock, LlavaNextForConditionalGeneration) and not any(report.values())
    again = AutoProcessor.from_pretrained(tmp_path / "model", backend="pil")
    images, texts = [picture((200, 60)), picture((31, 130), 1)], ["<image>\nWhat?", "<image>\nWhat is it?"]
    batch = again(images=images, text=texts, padding=True, return_tensors="pt")
    said = stock.generate(**batch, max_new_tokens=4, do_sample=False)
    loaded, processor = load_mllm(tmp_path / "model")
    batch = processor(images=images, text=texts, padding=True, return_tensors="pt")
    assert said.tolist() == loaded.generate(**batch, max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize("kind", ("vit", "siglip"))
def test_features_are_the_tiles_side_by_side(towers: dict[str, Tower], llm: Path, kind: str) -> None:
    """A grid of tiles without the border that was added, a newline after each row, and the whole picture before all."""
    tower = towers[kind]
    model, processor = build_mllm(tower, llm, image_mode="anyres")
    batch = processor.image_processor(picture((96, 56)), return_tensors="pt")  # fills the width of 2 × 2 tiles
    with torch.no_grad():
        found = model.model.get_image_features(batch["pixel_values"], batch["image_sizes"]).pooler_output[0]
        whole, *tiles = model.model.multi_modal_projector(tower.features(batch["pixel_values"][0]))
        upper, lower = (torch.cat([t.reshape(6, 6, -1) for t in tiles[i : i + 2]], dim=1) for i in (0, 2))
        grid = torch.cat([upper, lower])  # 12 × 12 patches of 8 pixels, of which 56 / 8 = 7 rows show the picture
        shown = grid[2:10]  # LLaVA-NeXT cuts the same number of rows, (12 - 7) // 2, above and below
        newline = model.model.image_newline.expand(8, 1, -1)
        expected = torch.cat([whole, torch.cat([shown, newline], dim=1).flatten(0, 1)])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_newline_is_drawn_from_the_seed_and_trains_with_the_projector(towers: dict[str, Tower], llm: Path) -> None:
    def newline(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 7)
        return build_mllm(towers["vit"], llm, seed=seed, image_mode="anyres")[0].model.image_newline.detach()

    assert torch.equal(newline(0), newline(0)) and not torch.equal(newline(0), newline(1))
    assert 0.5 < newline(0).std() * 64**0.5 < 2  # as LLaVA-NeXT: a variance of one over the width
    model, _ = build_mllm(towers["vit"], llm, image_mode="anyres", projector="linear")
    layer = "model.multi_modal_projector.linear_1"
    assert projector_parameters(model) == {f"{layer}.weight", f"{layer}.bias", IMAGE_NEWLINE}
    square, _ = build_mllm(towers["vit"], llm)
    anyres, _ = build_mllm(towers["vit"], llm, image_mode="anyres")
    assert torch.equal(
        square.model.multi_modal_projector.linear_2.weight, anyres.model.multi_modal_projector.linear_2.weight
    )


def test_a_swap_is_checked_for_anyres_too(towers: dict[str, Tower], llm: Path, tmp_path: Path) -> None:
    save_mllm(*build_mllm(towers["vit"], llm, image_mode="anyres"), tmp_path / "model")
    check_swap(towers["vit"], tmp_path / "model")
    finer = load_tower(f"hf:{save_tower(tmp_path / 'finer', patch_size=6)}")
    with pytest.raises(InputError, match=r"image tokens 64, but .* trained for 36"):
        check_swap(finer, tmp_path / "model")


def test_pictures_that_cannot_be_counted_are_named(towers: dict[str, Tower], llm: Path, tmp_path: Path) -> None:
    model, processor = build_mllm(towers["vit"], llm, image_mode="anyres")
    encoder = Encoder(processor, fixed_image_tokens(model), 2048)
    data = save_conversations(tmp_path / "data")
    first = read_conversations(data / "align.json", data / "images")[0]
    square = encoder.plain(first).input_ids == processor.image_token_id
    assert square.sum() == 36 + 6 * (6 + 1)  # of 48 × 48 pixels: the whole, the shown half of two tiles, newlines
    first.images[0].write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"picture .*0\.png: not a readable picture"):
        encoder.plain(first)
    first.images[0].unlink()
    with pytest.raises(InputError, match=r"picture .*0\.png: no such file"):
        encoder.plain(first)


# ------------------------------------------------------------------------------------------------------------------ training


def save_pictures_of_many_shapes(folder: Path) -> ConversationConfig:
    """A dozen samples, one of them without a picture."""
    save_conversations(folder)
    for number, size in enumerate(SIZES):
        picture(size, number).save(folder / "images" / f"{number}.png")
    samples = json.loads((folder / "tune.json").read_text())
    del samples[3]["image"]
    samples[3]["conversations"][0]["value"] = "Hello?"
    (folder / "tune.json").write_text(json.dumps(samples))
    return ConversationConfig(json=folder / "align.json", images=folder / "images")


@pytest.mark.parametrize("mode", ["pad", "anyres"])
def test_both_stages_train_on_pictures_of_many_shapes(
    towers: dict[str, Tower], llm: Path, tmp_path: Path, mode: Literal["pad", "anyres"]
) -> None:
    data = save_pictures_of_many_shapes(tmp_path / "data")
    settings: dict[str, Any] = {"batch_size": 4, "samples": 12, "precision": "float32", "learning_rate": 1e-2}
    aligned = align(
        AlignConfig(
            out=tmp_path / "align", data=data, tower=towers["clip"].spec, llm=str(llm), image_mode=mode, **settings
        )
    )
    data.json = tmp_path / "data" / "tune.json"
    tuned = tune(TuneConfig(out=tmp_path / "tune", data=data, align=aligned, projector_learning_rate=1e-2, **settings))
    start = build_mllm(towers["clip"], llm, image_mode=mode)[0].state_dict()
    first, second = (load_file(stage / "model" / "model.safetensors") for stage in (aligned, tuned))
    for name, value in first.items():
        of_projector = "multi_modal_projector" in name or "image_newline" in name
        assert torch.equal(value, start[name]) == (not of_projector), name
        assert not (of_projector and torch.equal(value, second[name])), name
    model, processor = load_mllm(tuned)
    assert type(processor.image_processor).__name__ == {"pad": "LlavaImageProcessorPil"}.get(
        mode, "LlavaNextImageProcessorPil"
    )
    batch = processor(images=picture((200, 60)), text="<image>\nWhat?", return_tensors="pt")
    assert torch.isfinite(model(**batch).logits).all()


# ------------------------------------------------------------------------------------------------------------------- misfits


def test_registers_have_no_place_in_a_grid(llm: Path, tmp_path: Path) -> None:
    sizes = {key: value for key, value in WIDTH.items() if key != "intermediate_size"}
    registers = Dinov2WithRegistersConfig(**SIZE, **sizes, mlp_ratio=2, num_register_tokens=4)
    Dinov2WithRegistersModel(registers).save_pretrained(tmp_path)
    size = {"height": 48, "width": 48}
    CLIPImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained(tmp_path)
    tower = load_tower(f"hf:{tmp_path}")
    with pytest.raises(
        InputError, match=r"anyres: .* grid of patches, which the 4 register tokens of tower .* have no place in"
    ):
        build_mllm(tower, llm, image_mode="anyres")
    model, _ = build_mllm(tower, llm, image_mode="pad")
    assert fixed_image_tokens(model) == 40


def test_a_tower_that_reads_other_pixels_of_a_square_is_refused(llm: Path, tmp_path: Path) -> None:
    """DINOv3's processor resizes after rescaling, with torchvision: no stock processor that pads does."""
    DINOv3ViTModel(DINOv3ViTConfig(**SIZE, **WIDTH, num_register_tokens=0)).save_pretrained(tmp_path)
    DINOv3ViTImageProcessor(size={"height": 48, "width": 48}).save_pretrained(tmp_path)
    tower = load_tower(f"hf:{tmp_path}")
    build_mllm(tower, llm)
    with pytest.raises(InputError, match=r"of a square picture, its DINOv3ViTImageProcessor.* makes other pixels"):
        build_mllm(tower, llm, image_mode="pad")


def test_the_largest_picture_must_fit_the_language_model(towers: dict[str, Tower], tmp_path: Path) -> None:
    folder = save_small_llm(tmp_path, max_position_embeddings=192)
    build_mllm(towers["vit"], folder)
    with pytest.raises(InputError, match=r"gives 192 image tokens, but .* has room for 192"):  # 36 + 12 × (12 + 1)
        build_mllm(towers["vit"], folder, image_mode="anyres")
