"""One training step: its loss, its gradients, and that micro-batches, recomputation and methods change what they should."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clips_core.config import PretrainConfig
from clips_core.loss import caption_loss_plain, info_nce_plain
from clips_core.model import CLIPS
from clips_core.step import training_step
from clips_core.tokenizer import BOS
from clips_core.zero_shot import normalise
from tests.test_pretrain import first_batch, make_config, make_shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_shards(tmp_path_factory.mktemp("shards"))


def run(config: PretrainConfig, batch: dict[str, Tensor], checkpointing: bool = False) -> tuple[Any, dict[str, Tensor]]:
    """Metrics and gradients of a freshly initialised model."""
    torch.manual_seed(0)
    model = CLIPS(config.model)
    if checkpointing:
        model.set_activation_checkpointing()
    metrics = training_step(model, model.logit_scale, batch, config)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    missing = [name for name, value in trained.items() if value.grad is None]
    assert not missing
    return metrics, {name: value.grad for name, value in trained.items() if value.grad is not None}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to that tensor's largest value."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-12)) for name in a)


def test_clips_equals_the_plain_objective(shards: Path, tmp_path: Path) -> None:
    """Against the full logits of every loss, one autograd graph, no micro-batch."""
    config = make_config(shards, tmp_path)
    batch = first_batch(config)
    metrics, gradients = run(config, batch)
    torch.manual_seed(0)
    model = CLIPS(config.model)
    assert model.decoder is not None
    z_img, z_txt, image_tokens, web_tokens, _ = model.encode(normalise(batch["image"]), batch["texts"])
    scale = model.logit_scale.exp()
    contrastive = [info_nce_plain(z_img, z_txt[:, kind], scale) for kind in (0, 1)]
    hidden = model.decoder(image_tokens, web_tokens, 24)  # all learnable tokens, used or not
    target = F.pad(batch["target"], (0, 24 - batch["target"].shape[1]))
    caption = caption_loss_plain(hidden, model.decoder.head.weight, target)
    loss = (contrastive[0] + contrastive[1]) / 2 + 2 * caption
    loss.backward()
    assert metrics["loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["caption"].item() == pytest.approx(caption.item(), rel=1e-6)
    plain = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    assert worst(gradients, plain) <= 1e-5


@pytest.mark.parametrize("micro_batch", [1, 5, 8, 15])
@pytest.mark.parametrize("method", ["clips", "coca"])
def test_gradient_caching_equals_one_pass(shards: Path, tmp_path: Path, micro_batch: int, method: str) -> None:
    config = make_config(shards, tmp_path, f"method={method}")
    batch = first_batch(config)
    metrics, whole = run(config, batch)
    cached_metrics, cached = run(make_config(shards, tmp_path, f"method={method}", f"micro_batch={micro_batch}"), batch)
    assert {k: v.item() for k, v in cached_metrics.items()} == pytest.approx(
        {k: v.item() for k, v in metrics.items()}, rel=1e-5
    )
    assert worst(cached, whole) <= 2e-5


def test_activation_checkpointing_changes_nothing(shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, tmp_path)
    batch = first_batch(config)
    assert worst(run(config, batch, checkpointing=True)[1], run(config, batch)[1]) == 0.0


def test_bf16_is_near_fp32(shards: Path, tmp_path: Path) -> None:
    batch = first_batch(make_config(shards, tmp_path))
    full, full_gradients = run(make_config(shards, tmp_path), batch)
    low, low_gradients = run(make_config(shards, tmp_path, "precision=bf16"), batch)
    assert low["loss"].item() == pytest.approx(full["loss"].item(), rel=1e-2)
    flat = [torch.cat([g.flatten() for g in gradients.values()]) for gradients in (low_gradients, full_gradients)]
    assert float(F.cosine_similarity(*flat, dim=0)) > 0.999
    cached = run(make_config(shards, tmp_path, "precision=bf16", "micro_batch=5"), batch)[1]
    assert float(F.cosine_similarity(flat[0], torch.cat([g.flatten() for g in cached.values()]), dim=0)) > 0.999


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ([], {"contrastive_web", "contrastive_sub", "caption"}),
        (["contrastive_sub=false"], {"contrastive_web", "caption"}),
        (["model.decoder=null"], {"contrastive_web", "contrastive_sub"}),
        (["method=clip", "model.decoder=null"], {"contrastive"}),
        (["method=clip_mix", "model.decoder=null"], {"contrastive"}),
        (["method=coca"], {"contrastive", "caption"}),
    ],
)
def test_methods_are_settings_of_one_step(shards: Path, tmp_path: Path, settings: list[str], terms: set[str]) -> None:
    config = make_config(shards, tmp_path, *settings)
    metrics, _ = run(config, first_batch(config))  # every trained parameter has a gradient
    assert metrics.keys() == terms | {"loss"}
    contrastive = [metrics[name].item() for name in terms if name != "caption"]
    caption = metrics["caption"].item() if "caption" in terms else 0.0
    assert metrics["loss"].item() == pytest.approx(sum(contrastive) / len(contrastive) + 2 * caption, rel=1e-6)


def test_a_batch_without_captions_has_no_caption_loss_and_all_gradients(shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, tmp_path, "micro_batch=6")
    batch = first_batch(config)
    metrics, gradients = run(config, {**batch, "target": batch["target"][:, :0]})
    assert metrics["caption"].item() == 0.0
    assert not gradients["decoder.head.weight"].any() and gradients["visual.proj"].any()


def test_caption_loss_is_a_mean_over_tokens_whatever_the_micro_batches(shards: Path, tmp_path: Path) -> None:
    """A row with a single target token weighs as one token, in whichever micro-batch it is."""
    config = make_config(shards, tmp_path)
    batch = first_batch(config)
    batch["target"][::2, 1:] = 0
    whole = run(config, batch)[0]["caption"].item()
    assert run(make_config(shards, tmp_path, "micro_batch=3"), batch)[0]["caption"].item() == pytest.approx(
        whole, rel=1e-5
    )


def test_the_captioner_of_coca_sees_the_words_before_and_none_after(shards: Path, tmp_path: Path) -> None:
    config = make_config(shards, tmp_path, "method=coca")
    torch.manual_seed(0)
    model, batch = CLIPS(config.model).eval(), first_batch(config)
    target = batch["target"]
    changed = target.clone()
    changed[:, 4] = 150
    with torch.no_grad():
        encoded = model.encode(normalise(batch["image"]), batch["texts"])
        a, b = (model.caption_states(encoded, t, teacher_forced=True) for t in (target, changed))
        other = encoded._replace(web_tokens=encoded.web_tokens + 1)
        other_text = model.caption_states(other, target, teacher_forced=True)
        other = encoded._replace(image_tokens=encoded.image_tokens.flip(0))
        other_image = model.caption_states(other, target, teacher_forced=True)
    assert torch.equal(a[:, :5], b[:, :5])  # place k sees the tokens before k
    assert all(not torch.equal(a[:, k], b[:, k]) for k in range(5, target.shape[1]))
    assert torch.equal(a, other_text) and not torch.equal(a, other_image)
    assert BOS not in target  # it stands before the first word only


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method=clip"], "clip has no caption decoder"),
        (["method=coca", "model.decoder=null"], "coca needs model.decoder"),
        (["frozen=[visual, text]"], "not both towers"),
        (["frozen=[image]"], "frozen may name"),
        (["micro_batch=0"], "micro_batch must be at least 1"),
        (["ema_decay=1.0"], "ema_decay must be between"),
        (["texts.length=0"], "length must be at least 1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    shards: Path, tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(shards, tmp_path, *settings)
