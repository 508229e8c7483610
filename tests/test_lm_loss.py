"""The loss: equal to torch's and the model's own, forward and backward; never many logits; the tower runs in every batch."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_batching import IMAGE, LLMS, TEXT, TOKENS, make_sample, processor, tiny_llava
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, PreTrainedModel

from llava_bridge import loss as module
from llava_bridge.batching import Collator
from llava_bridge.conversations import IGNORE
from llava_bridge.llm import default_cache
from llava_bridge.loss import chunked_cross_entropy, supervised_loss

PROJECTOR = "multi_modal_projector."
UNTIED = LlamaConfig(**TEXT, tie_word_embeddings=False)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *made])
        return result


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6 * float(value.abs().max()) + 1e-9, msg=name)


def batch_of(*lengths: int, pictures: bool = True) -> dict[str, Tensor]:
    """Samples of these lengths, the first with a picture of noise."""
    samples = [make_sample(seed, length) for seed, length in enumerate(lengths)]
    if pictures:
        samples[0].input_ids[1 : 1 + TOKENS], samples[0].labels[1 : 1 + TOKENS] = IMAGE, IGNORE
    batch = Collator(processor())(samples)
    if pictures:
        generator = torch.Generator().manual_seed(0)
        batch["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    return batch


# --------------------------------------------------------------------------------------------------------- cross-entropy


@pytest.mark.parametrize("chunk", [1, 7, 25, 100])
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_sum_to_torchs_cross_entropy(chunk: int, trained: bool) -> None:
    torch.manual_seed(0)
    head = nn.Linear(8, 50).double().requires_grad_(trained)
    rows, labels = torch.randn(25, 8, dtype=torch.float64, requires_grad=True), torch.randint(50, (25,))

    F.cross_entropy(head(rows), labels, reduction="sum").backward()
    expected = {"rows": rows.grad, **gradients(head)}
    plain = F.cross_entropy(head(rows), labels, reduction="sum")
    rows.grad = None
    found = chunked_cross_entropy(rows, labels, head, chunk)
    (3 * found).backward()

    torch.testing.assert_close(found.double(), plain, rtol=1e-6, atol=0)
    assert len(expected) == (3 if trained else 1)
    assert_same_gradients({"rows": rows.grad, **gradients(head)}, {name: 3 * value for name, value in expected.items()})


def test_chunks_under_autocast_equal_the_whole_under_autocast() -> None:
    torch.manual_seed(0)
    head, labels = nn.Linear(8, 50), torch.randint(50, (25,))
    found = []
    for chunk in (4, 100):
        rows = torch.randn(25, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = chunked_cross_entropy(rows, labels, head, chunk)
        loss.backward()
        found.append((loss.detach(), rows.grad, *gradients(head).values()))
    for parts, whole in zip(*found, strict=True):
        assert parts.dtype == torch.float32
        torch.testing.assert_close(parts, whole, rtol=2e-2, atol=2e-2 * float(whole.abs().max()))


def test_without_labels_the_loss_is_zero_and_connected() -> None:
    rows = torch.randn(0, 8, requires_grad=True)
    loss = chunked_cross_entropy(rows, torch.zeros(0, dtype=torch.long), nn.Linear(8, 50), 4)
    loss.backward()
    assert loss == 0 and rows.grad.shape == (0, 8)


def test_no_more_logits_than_a_chunks_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward, with a vocabulary that outweighs all the rest; and none is kept between the two."""
    vocabulary, chunk = 3000, 16
    model = tiny_llava(LlamaConfig(**{**TEXT, "hidden_size": 8, "intermediate_size": 8, "vocab_size": vocabulary}))
    head, batch = model.get_output_embeddings(), batch_of(100, 90, 120)
    labelled = int((batch["labels"] != IGNORE).sum())
    assert labelled > 9 * chunk

    def logits(size: int) -> tuple[int, int]:
        """Elements of the largest tensor, and of the logits that the forward pass leaves to the backward pass."""
        monkeypatch.setattr(module, "CHUNK", size)
        saved: list[Tensor] = []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t)
        with Largest() as largest, hooks:
            supervised_loss(model, head, batch).backward()
        kept = {t.untyped_storage().data_ptr(): t.numel() for t in saved if vocabulary in t.shape}
        kept.pop(head.weight.untyped_storage().data_ptr(), None)
        return largest.elements, sum(kept.values())

    assert logits(labelled) == (labelled * vocabulary, labelled * vocabulary)
    assert logits(chunk) == (chunk * vocabulary, 0)


# -------------------------------------------------------------------------------------------------------- the model's own


@pytest.mark.parametrize("chunk", [5, 1000])
@pytest.mark.parametrize("llm", [*LLMS.values(), UNTIED], ids=[*LLMS, "untied"])
def test_the_loss_equals_the_models_own(llm: Any, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own loss over all positions, all parameters trained. (Gemma-2: a stock LLaVA does not cap its logits.)"""
    monkeypatch.setattr(module, "CHUNK", chunk)
    # In fp32: at a pad that sees nothing but pads, transformers' plain attention is not a number in fp64.
    model, batch = tiny_llava(llm, attention="eager").float(), batch_of(30, 17, 22)
    plain = model(**batch).loss
    plain.backward()
    expected = gradients(model)
    count = int((batch["labels"][:, 1:] != IGNORE).sum())
    loss = supervised_loss(model, model.get_output_embeddings(), batch) / count
    loss.backward()
    torch.testing.assert_close(loss, plain.float(), rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model), expected)
    assert model(**batch).logits.shape == (3, 30, 100)  # the head's forward is its own again


@pytest.mark.parametrize("chunk", [5, 1000])
def test_an_adapted_head_counts(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    lora = peft.LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model, batch = peft.get_peft_model(tiny_llava(UNTIED), lora), batch_of(30, 17)
    plain = model(**batch).loss
    plain.backward()
    expected = gradients(model)
    loss = supervised_loss(model, model.get_output_embeddings(), batch)
    loss = loss / (batch["labels"][:, 1:] != IGNORE).sum()
    loss.backward()
    torch.testing.assert_close(loss, plain.float(), rtol=1e-5, atol=0)
    assert_same_gradients(gradients(model), expected)
    assert sum("lm_head.lora_" in name for name in expected) == 2


def test_the_heads_hooks_run_and_its_forward_comes_back_after_an_error() -> None:
    """What shards a model gathers the head's weights in such hooks."""
    model, batch = tiny_llava(UNTIED), batch_of(30, 17)
    head, calls = model.get_output_embeddings(), []
    head.register_forward_pre_hook(lambda *_: calls.append("before"))
    head.register_forward_hook(lambda *_: calls.append("after"))
    supervised_loss(model, head, batch)
    assert calls == ["before", "after"]
    head.forward = lambda hidden: F.linear(hidden, 2 * head.weight)  # as Accelerate's hooks replace it
    own = head.forward
    doubled = supervised_loss(model, head, batch)
    assert head.forward is own
    del head.forward
    with torch.no_grad():
        head.weight *= 2
    torch.testing.assert_close(supervised_loss(model, head, batch), doubled)
    with pytest.raises(ValueError, match="do not match"):
        supervised_loss(model, head, {**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})
    assert "forward" not in head.__dict__ and len(model(**batch).logits) == 2


# ----------------------------------------------------------------------------------------------------------- blank picture


def calls_of(model: PreTrainedModel, run: Callable[[], Any]) -> list[str]:
    """The names of the modules that have weights, in the order in which they run."""
    calls: list[str] = []
    hooks = [
        part.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        for name, part in model.named_modules()
        if list(part.parameters(recurse=False)) or name.endswith("language_model")
    ]
    run()
    for hook in hooks:
        hook.remove()
    return calls


@pytest.mark.parametrize("anyres", [False, True], ids=["llava", "llava-next"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
def test_a_text_only_batch_runs_the_tower_for_nothing(anyres: bool, packing: bool) -> None:
    model = tiny_llava(LLMS["llama"], anyres=anyres)
    head, samples = model.get_output_embeddings(), [make_sample(seed, 12 + seed) for seed in range(3)]
    batch = Collator(processor(), packing)(samples)
    count = int((batch["labels"][:, 1:] != IGNORE).sum())

    loss = supervised_loss(model, head, batch)
    loss.backward()
    found = gradients(model)
    inside = {name for name, _ in model.named_parameters() if PROJECTOR in name or "image_newline" in name}
    assert len(inside) == (5 if anyres else 4)
    for name in inside:
        assert found[name] is not None and not found[name].any()
    text = [name for name in found if "language_model" in name]
    assert len(text) > 15 and all(found[name].any() for name in text)

    own = model(**batch, use_cache=False).loss
    torch.testing.assert_close(loss / count, own.float(), rtol=1e-5, atol=0)
    own.backward()
    without = gradients(model)
    assert not inside & without.keys()
    assert_same_gradients({name: found[name] for name in text}, {name: count * without[name] for name in text})


def test_with_and_without_pictures_the_same_modules_run_in_the_same_order() -> None:
    model = tiny_llava(LLMS["llama"])
    head = model.get_output_embeddings()
    seen = calls_of(model, lambda: supervised_loss(model, head, batch_of(30, 17)))
    blank = calls_of(model, lambda: supervised_loss(model, head, batch_of(30, 17, pictures=False)))
    assert blank == seen and any(PROJECTOR in name for name in seen)
    assert seen.index("model.multi_modal_projector.linear_2") < seen.index("model.language_model")
    bare = calls_of(model, lambda: model(**batch_of(30, 17, pictures=False)))
    assert bare != seen  # without the blank picture


def test_a_blank_picture_leaves_the_loss_under_autocast() -> None:
    model = tiny_llava(LLMS["llama"]).float()
    batch = batch_of(30, 17, pictures=False)
    count = int((batch["labels"][:, 1:] != IGNORE).sum())
    with torch.autocast("cpu", torch.bfloat16):
        loss = supervised_loss(model, model.get_output_embeddings(), batch) / count
        own = model(**batch).loss
    torch.testing.assert_close(loss, own.float(), rtol=1e-4, atol=0)


# ----------------------------------------------------------------------------------------------------------- two processes


def parts_of_two_processes() -> list[dict[str, Tensor]]:
    """One with a picture and few labels, one of text alone with many."""
    return [batch_of(14), batch_of(60, 45, 9, pictures=False)]


def labels_in(batch: dict[str, Tensor]) -> int:
    return int((batch["labels"][:, 1:] != IGNORE).sum())


def start(rank: int, port: int) -> tuple[dict[str, Tensor], Tensor]:
    """This process's part, and the number of labels in both."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", address, timeout=timedelta(seconds=120), rank=rank, world_size=2)
    batch = parts_of_two_processes()[rank]
    count = torch.tensor(labels_in(batch))
    dist.all_reduce(count)
    return batch, count


def run_ddp(rank: int, port: int, out: str) -> None:
    """As StageTrainer.compute_loss does it; DDP is told that every parameter which trains is used."""
    batch, count = start(rank, port)
    model = tiny_llava(LLMS["llama"])
    model.model.vision_tower.requires_grad_(False)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):  # DDP says in the second step what was amiss in the first
        model.zero_grad()
        loss = supervised_loss(wrapped, model.get_output_embeddings(), batch) / count * 2
        loss.backward()
    if rank == 0:
        torch.save(gradients(model), out)
    dist.destroy_process_group()


def run_zero3(rank: int, port: int, out: str) -> None:
    """A step of plain gradient descent at a rate of 1: what it takes off a weight is its gradient."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(default_cache() / "torch_extensions"))  # compiled once, then kept
    import deepspeed

    batch, count = start(rank, port)
    module.CHUNK = 5
    model = tiny_llava(LLMS["llama"]).float()
    model.model.vision_tower.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = {
        "train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }  # fmt: skip
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=1.0), config=config)
    loss = supervised_loss(engine, model.get_output_embeddings(), batch) / count * 2
    engine.backward(loss)
    engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        steps = {name: before[name] - parameter.detach() for name, parameter in model.named_parameters()}
    if rank == 0:
        torch.save(steps, out)
    dist.destroy_process_group()


def spawn(run: Callable[..., None], out: Path) -> dict[str, Tensor]:
    """What the first of two processes wrote."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (port, str(out)), nprocs=2)
    found: dict[str, Tensor] = torch.load(out, weights_only=True)
    return found


def gradients_of_the_whole() -> dict[str, Tensor]:
    """In one process: of transformers' own loss, meant over the labels of both parts."""
    model, batches = tiny_llava(LLMS["llama"]), parts_of_two_processes()
    model.model.vision_tower.requires_grad_(False)
    counts = [labels_in(batch) for batch in batches]
    assert counts[1] > 5 * counts[0]
    whole = sum(model(**batch).loss * count for batch, count in zip(batches, counts, strict=True)) / sum(counts)
    whole.backward()
    return gradients(model)


@pytest.mark.slow
def test_two_processes_of_unequal_labels_take_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    found = spawn(run_ddp, tmp_path / "gradients.pt")
    assert_same_gradients(found, gradients_of_the_whole())
    assert any(found[name].any() for name in found if PROJECTOR in name)


@pytest.mark.slow
def test_so_do_they_with_all_weights_sharded(tmp_path: Path) -> None:
    """ZeRO-3, the head's logits in chunks that are computed anew when its weights have long been given back."""
    pytest.importorskip("deepspeed")
    found = spawn(run_zero3, tmp_path / "steps.pt")
    expected = gradients_of_the_whole()
    assert expected.keys() <= found.keys()
    for name, value in expected.items():  # in fp32
        torch.testing.assert_close(
            found[name], value.float(), rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name
        )
    assert not any(found[name].any() for name in found.keys() - expected.keys())


# ------------------------------------------------------------------------------------------------------------ Triton kernel

# In Triton's interpreter, which runs kernels on a CPU; it has to be chosen before Triton is imported.
INTERPRETED = """
import torch
import torch.nn.functional as F
from torch import nn
from llava_bridge.loss import fused_cross_entropy

torch.manual_seed(0)
for bias, trained in ((True, True), (False, False)):
    head = nn.Linear(16, 70, bias=bias).requires_grad_(trained)
    rows, labels = torch.randn(37, 16, requires_grad=True), torch.randint(70, (37,))
    inputs = [rows, *(head.parameters() if trained else ())]
    plain = F.cross_entropy(head(rows), labels, reduction="sum")
    expected = torch.autograd.grad(3 * plain, inputs)
    fused = fused_cross_entropy(rows, labels, head.weight, head.bias)
    found = torch.autograd.grad(3 * fused, inputs)
    torch.testing.assert_close(fused, plain, rtol=1e-5, atol=0)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    print("equal")
"""


@pytest.mark.slow
def test_the_fused_kernel_equals_torchs_cross_entropy() -> None:
    pytest.importorskip("liger_kernel")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["equal", "equal"], done.stderr[-3000:]
