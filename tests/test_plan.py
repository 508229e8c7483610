"""The plan's arithmetic against what torch counts and keeps, and against published figures."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from clips_core import plan
from clips_core.config import PretrainConfig, load_config, load_settings
from clips_core.errors import InputError
from clips_core.model import CLIPS
from clips_core.plan import Flops, PlanConfig, estimate, flops_per_sample, memory_per_gpu
from clips_core.step import training_step
from clips_core.train import build_optimizer

PACKAGE = Path(plan.__file__).parent
TINY = (
    "model={image_size: 32, patch_size: 8, embed_dim: 16, context_length: 20, learnable_tokens: 24, vocab_size: 100, "
    "vision: {width: 64, layers: 3, heads: 2}, text: {width: 48, layers: 2, heads: 2}, "
    "decoder: {width: 32, layers: 4, heads: 2}}"
)
MEDIUM = "model={size: Ti/16, image_size: 112, vocab_size: 500, vision: {layers: 3}, text: {layers: 3}, decoder: {layers: 3}}"


def make_run(*settings: str) -> PretrainConfig:
    fixed = ("out=o", "data.train=d", "samples=1000", "batch_size=6", "learning_rate=1e-3", "precision=fp32")
    return load_config(PretrainConfig, None, [*fixed, *settings])


def on_one_gpu(target_tokens: float) -> PlanConfig:
    return PlanConfig(gpus=1, target_tokens=target_tokens, web_tokens=target_tokens)


def build(run: PretrainConfig) -> CLIPS:
    torch.manual_seed(0)
    model = CLIPS(run.model)
    for part in run.frozen:
        getattr(model, part).requires_grad_(False)
    if run.activation_checkpointing:
        model.set_activation_checkpointing()
    return model.train()


def make_batch(run: PretrainConfig, targets: int) -> dict[str, torch.Tensor]:
    """One picture's caption fills all learnable tokens, the others have `targets` tokens."""
    model, size = run.model, run.batch_size
    texts = 2 if run.method == "clips" else 1
    target = torch.randint(5, model.vocab_size, (size, model.learnable_tokens))
    target[1:, targets:] = 0
    return {
        "image": torch.randint(0, 256, (size, 3, model.image_size, model.image_size), dtype=torch.uint8),
        "texts": torch.randint(5, model.vocab_size, (size, texts, model.context_length)),
        "target": target if model.decoder is not None else target[:, :0],
    }


def executed(run: PretrainConfig, cluster: PlanConfig) -> float:
    return sum(flops_per_sample(run, cluster).values(), Flops()).executed


# ---------------------------------------------------------------------------------------------------------------------
# FLOPs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        [],
        ["method=clip", "model.decoder=null"],
        ["method=coca"],
        ["model.decoder=null"],
        ["contrastive_sub=false"],
        ["frozen=[visual]"],
        ["frozen=[text]"],
        ["frozen=[decoder]"],
        ["frozen=[visual, decoder]"],
        ["micro_batch=2"],
        ["activation_checkpointing=true"],
        ["activation_checkpointing=true", "micro_batch=3", "frozen=[text]"],
        ["precision=bf16", "model.decoder.layers=1"],
    ],
    ids=" ".join,
)
def test_flops_are_what_torch_counts(settings: list[str]) -> None:
    """A whole training step, exactly."""
    run = make_run(TINY, *settings)
    model, batch = build(run), make_batch(run, targets=9)
    cluster = on_one_gpu(float((batch["target"] != 0).sum()) / run.batch_size)
    # The plain kernel of attention: the fused ones compute one of its two products again in the backward pass, which is counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        training_step(model, model.logit_scale, batch, run)
    assert counter.get_total_flops() == round(executed(run, cluster) * run.batch_size)


def test_flops_under_fused_attention_differ_by_what_it_computes_again() -> None:
    run = make_run(MEDIUM, "batch_size=2")
    model, batch = build(run), make_batch(run, targets=128)
    with FlopCounterMode(display=False) as counter:
        training_step(model, model.logit_scale, batch, run)
    assert counter.get_total_flops() / 2 == pytest.approx(executed(run, on_one_gpu(128)), rel=0.03)
    assert counter.get_total_flops() / 2 > executed(run, on_one_gpu(128))


@pytest.mark.parametrize(
    ("size", "px", "vision", "text", "decoder", "head"),
    [  # forward GFLOP a picture, counted before: no class token, a dense mask, a head at all 128 learnable tokens
        ("B/16", 112, 8.5, 12.4, 21.1, 4.2),
        ("L/14", 84, 21.9, 27.7, 43.7, 6.3),
        ("L/14", 224, 161.4, 27.7, 87.2, 6.3),
    ],
)
def test_flops_of_published_sizes(size: str, px: int, vision: float, text: float, decoder: float, head: float) -> None:
    run = make_run(f"model={{size: {size}, image_size: {px}}}")
    ours = {part: flops.forward / 1e9 for part, flops in flops_per_sample(run, on_one_gpu(128)).items()}
    tokens = (px / run.model.patch_size) ** 2
    assert ours["vision"] == pytest.approx(vision * (tokens + 1) / tokens, rel=0.01)
    assert ours["text"] == pytest.approx(text, rel=0.01)
    assert ours["head"] == pytest.approx(head, rel=0.01)
    assert 0.92 * decoder < ours["decoder"] < decoder  # without a dense mask; the last block at learnable tokens only


@pytest.mark.parametrize(("size", "gflops"), [("S/16", 9.20), ("B/16", 35.13), ("L/14", 162.03), ("H/14", 334.59)])
def test_flops_of_image_towers_are_open_clips(size: str, gflops: float) -> None:
    """open_clip's docs/model_profile.csv, image_gflops at 224 px; its counter adds LayerNorms, additions and the like."""
    run = make_run(f"model={{size: {size}, image_size: 224}}")
    assert flops_per_sample(run, on_one_gpu(128))["vision"].forward / 1e9 == pytest.approx(gflops, rel=0.01)


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [[], ["method=clip", "model.decoder=null"], ["frozen=[text]"], ["frozen=[decoder]"]], ids=" ".join
)
def test_bytes_of_weights_gradients_and_optimizer_are_exact(settings: list[str]) -> None:
    run = make_run(TINY, *settings)
    model = build(run)
    optimizer = build_optimizer(model, run)
    training_step(model, model.logit_scale, make_batch(run, targets=24), run)
    optimizer.step()
    memory = memory_per_gpu(run, on_one_gpu(24))
    parameters = list(model.parameters())
    assert memory["weights"] == sum(p.nbytes for p in parameters)
    assert memory["gradients"] == sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert memory["optimizer"] == sum(value.nbytes for value in moments)


def kept_by_autograd(model: nn.Module, forward: Callable[[], object]) -> int:
    """Bytes of the storages that a forward pass keeps for the backward pass, parameters left out."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor  # alive, so that its address stays its own
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_for_backward(run: PretrainConfig, size: int) -> int:
    model, batch = build(run), make_batch(replace(run, batch_size=size), targets=10**6)
    texts = batch["texts"] if run.contrastive_sub else batch["texts"][:, :1]
    target = batch["target"] if run.model.decoder is not None else None
    with torch.autocast("cpu", torch.bfloat16) if run.precision == "bf16" else nullcontext():
        return kept_by_autograd(model, lambda: model(batch["image"].float(), texts, target, run.method == "coca"))


@pytest.mark.parametrize(
    "settings",
    [
        [TINY],
        [TINY, "method=clip", "model.decoder=null"],
        [TINY, "method=coca"],
        [TINY, "contrastive_sub=false"],
        [TINY, "frozen=[visual]"],
        [TINY, "frozen=[text]"],
        [MEDIUM],
    ],
    ids=lambda settings: " ".join(s.replace(TINY, "tiny").replace(MEDIUM, "medium") for s in settings),
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(settings: list[str], precision: str) -> None:
    run = make_run(*settings, f"precision={precision}")
    each = (kept_for_backward(run, 4) - kept_for_backward(run, 2)) / 2
    ours = plan.activation_bytes(run, on_one_gpu(10**6))
    if precision == "fp32":
        assert ours == pytest.approx(each, rel=0.01)
    else:  # on a GPU autocast runs LayerNorms in fp32 and keeps their inputs so; on a CPU it does not
        assert each < ours < 1.15 * each


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that are alive at once, at most, of all that come into being under it. `known` do not count."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.known = [tensor.untyped_storage() for tensor in known]
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet(self.known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        if storage not in self.seen:
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, storage.nbytes())

    def _remove(self, size: int) -> None:
        self.live -= size


@pytest.mark.parametrize(
    "settings",
    [[], ["activation_checkpointing=true"], ["micro_batch=4"], ["micro_batch=4", "activation_checkpointing=true"]],
    ids=lambda settings: " ".join(settings) or "plain",
)
def test_peak_of_a_step_is_what_is_planned(settings: list[str]) -> None:
    """All of a step that is not weights, gradients or optimizer."""
    run = make_run(
        "model={image_size: 64, patch_size: 8, embed_dim: 64, context_length: 40, learnable_tokens: 64, vocab_size: 300, vision: "
        "{width: 128, layers: 4, heads: 2}, text: {width: 64, layers: 4, heads: 2}, decoder: {width: 64, layers: 4, heads: 2}}",
        "batch_size=16",
        *settings,
    )
    model, batch = build(run), make_batch(run, targets=64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:  # as the buckets of DDP: there from the start
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(parameter.grad for parameter in trained if parameter.grad is not None)]
    with PeakMemory([*known, *batch.values()]) as measured:
        training_step(model, model.logit_scale, batch, run)
    memory = memory_per_gpu(run, on_one_gpu(64))
    assert memory["activations"] + memory["workspace"] == pytest.approx(measured.peak, rel=0.15)


def test_shards_divide_what_fsdp_shards() -> None:
    run, eight = make_run("model={size: H/14, image_size: 84}", "batch_size=512", "ema_decay=0.999"), PlanConfig(gpus=8)
    whole, shared = memory_per_gpu(run, eight), memory_per_gpu(replace(run, sharding="fsdp"), eight)
    for part in ("weights", "gradients", "optimizer", "ema"):
        assert shared[part] == pytest.approx(whole[part] / 8)
    assert whole["gathered"] == 0 < shared["gathered"] < whole["weights"] + whole["gradients"]
    assert shared["activations"] == whole["activations"]


# ---------------------------------------------------------------------------------------------------------------------
# The rest
# ---------------------------------------------------------------------------------------------------------------------


def test_estimate_by_hand() -> None:
    run = make_run("model={size: B/16, image_size: 112}", "samples=1024000", "batch_size=1024", "data.crop_area=0.25")
    cluster = PlanConfig(gpus=16, gpu="a100", mfu=0.5, pictures=100_000, bytes_per_pixel=0.5, bytes_per_sample=1000)
    result = estimate(run, cluster)
    speed = 16 * 312e12 * 0.5 / executed(run, cluster)
    assert result["time"]["images_per_second"] == pytest.approx(speed)
    assert result["time"]["days"] == pytest.approx(1_024_000 / speed / 86_400)
    assert result["time"]["mfu"] == pytest.approx(0.5)  # nothing is computed twice
    assert result["data"]["stored_size"] == 224  # a crop of a quarter of the area is 112 pixels wide
    assert result["data"]["storage"] == pytest.approx(100_000 * (224 * 224 * 0.5 + 1000))
    assert (result["data"]["epochs"], result["data"]["shards"]) == (10.24, 10)
    assert result["data"]["read_bandwidth_per_node"] == pytest.approx(result["data"]["read_bandwidth"] / 2)
    assert result["checkpoint"]["bytes"] == 4 * (result["parameters"]["total"] + 2 * result["parameters"]["trained"])
    again = estimate(make_run("model={size: B/16, image_size: 112}", "samples=1024000", "batch_size=1024",
                              "activation_checkpointing=true"), cluster)  # fmt: skip
    assert again["time"]["mfu"] < 0.5 and again["time"]["days"] > result["time"]["days"]
    assert again["memory"]["activations"] < result["memory"]["activations"] / 3


def test_what_the_network_carries() -> None:
    run, cluster = make_run(TINY, "batch_size=64", "frozen=[text]"), PlanConfig(gpus=4)
    counts, trained = plan.parameter_counts(run.model), plan.trained_parameters(run)
    features = 3 * 16 * 64  # a picture's and two texts', 16 wide, of the whole batch
    assert plan.bytes_sent(run, cluster) == 4 * 3 / 4 * (2 * trained + features)
    sharded = replace(run, sharding="fsdp", micro_batch=8)  # two micro-batches: each gathers thrice
    assert plan.bytes_sent(sharded, cluster) == 4 * 3 / 4 * (6 * counts["total"] + 2 * trained + features)
    assert plan.bytes_sent(run, PlanConfig(gpus=1)) == 0


def test_choices_are_the_largest_that_fit() -> None:
    run = load_settings(PretrainConfig, PACKAGE, ["paper/h14_224", "batch_size=4096"])
    cluster = PlanConfig(gpus=8, gpu="a100")
    for choice in estimate(run, cluster)["choices"]:
        assert choice["memory"] <= plan.usable_memory(cluster)

        same = {key: choice[key] for key in ("sharding", "activation_checkpointing")}
        memory = [
            sum(memory_per_gpu(replace(run, **same, micro_batch=factor * choice["micro_batch"]), cluster).values())
            for factor in (1, 2)
        ]
        assert memory[0] == choice["memory"]
        assert choice["micro_batch"] == 4096 // 8 or memory[1] > plan.usable_memory(cluster)


def test_nothing_fits_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    result = plan.plan(PACKAGE, ["paper/h14_84", "gpus=1", "gpu=rtx4090"])
    assert not result["memory"]["fits"] and all(choice["days"] is None for choice in result["choices"])
    assert "does not fit into a rtx4090" in capsys.readouterr().out


def test_a_512_gpu_run_from_a_laptop(tmp_path: Path) -> None:
    """The command's function, in a process that must not need torch."""
    settings = ["paper/l14_84", "gpus=512", "gpu=h100", "samples=12.8e9", "mfu=0.4", f"out={tmp_path / 'plan.json'}"]
    code = "import sys; from pathlib import Path; from clips_core.plan import plan; "
    code += "plan(Path(sys.argv[1]), sys.argv[2:]); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code, str(PACKAGE), *settings], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["run"]["samples"] == 12_800_000_000 and result["cluster"]["gpus"] == 512
    assert f"{result['time']['days']:.2f} days" in done.stdout and "GFLOP a picture" in done.stdout
    assert result["run"]["out"] == "runs/paper/l14_84"  # `out` is the plan's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["paper/l14_84", "gpus=3"], r"batch_size 32768 is not a multiple of gpus=3"),
        (["paper/l14_84", "gpu=v100"], r"'gpu=v100': key 'gpu'.*'h100'"),
        (["paper/l14_84", "mfu=2"], r"key 'mfu'"),
        (["paper/l14_84", "gpuss=3"], r"unknown key 'gpuss'"),
        (["paper/l15_84"], r"did you mean 'paper/l14_84'"),
    ],
)
def test_bad_settings(settings: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan.plan(PACKAGE, settings)
