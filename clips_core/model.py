"""CLIPS = open_clip's two towers + the caption decoder.

The towers are open_clip's own modules under open_clip's own names (`visual.*`, `text.*`, `logit_scale`), so the released CLIPS
models and every export share one state-dict layout. They are subclassed for one thing only: a single forward that returns the
pooled feature *and* the tokens before the final LayerNorm, which the decoder reads.
"""

import math
from typing import Any, NamedTuple, cast

import open_clip
import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from clips_core.config import ModelConfig, TransformerConfig
from clips_core.loss import summed_caption_loss
from clips_core.packing import Packing
from clips_core.tokenizer import BOS, PAD

NORM_EPS = 1e-6


def open_clip_config(config: ModelConfig) -> dict[str, Any]:
    """open_clip's `model_cfg` of the towers, with the settings of the released checkpoints."""
    return {
        "embed_dim": config.embed_dim,
        "vision_cfg": {
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "width": config.vision.width,
            "layers": config.vision.layers,
            "head_width": config.vision.width // config.vision.heads,
            "mlp_ratio": 4.0,
            "no_ln_pre": True,
            "pool_type": "avg",
            "final_ln_after_pool": True,
            "pos_embed_type": "sin_cos_2d",
            "norm_kwargs": {"eps": NORM_EPS},
        },
        "text_cfg": {
            "context_length": config.context_length,
            "vocab_size": config.vocab_size,
            "width": config.text.width,
            "heads": config.text.heads,
            "layers": config.text.layers,
            "no_causal_mask": True,
            "act_kwargs": {"approximate": "tanh"},
            "pool_type": "last",
            "norm_kwargs": {"eps": NORM_EPS},
        },
    }


def sin_cos_positions(grid: int, width: int) -> Tensor:
    """Fixed 2-D position embeddings as the authors have them, [1 + grid², width]; zero for the class token.

    For row y and column x: [sin(xω), cos(xω), sin(yω), cos(yω)] with ω_k = 10000^(−k / (width/4 − 1)). open_clip's own function
    divides by width/4 instead; released checkpoints carry these values, so the difference shows in models trained from scratch
    only.
    """
    omega = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4 - 1))
    y, x = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    x_angle, y_angle = x.flatten()[:, None] * omega, y.flatten()[:, None] * omega
    patches = torch.cat([x_angle.sin(), x_angle.cos(), y_angle.sin(), y_angle.cos()], dim=1)
    return torch.cat([torch.zeros(1, width), patches.float()])


class ImageTower(VisionTransformer):
    """open_clip's ViT; its forward returns `(feature [B, E], patch tokens [B, N, D] before any LayerNorm)`."""

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.transformer(self._embeds(image))  # [B, 1 + N, D]
        pooled, _ = self._pool(x)
        return pooled @ self.proj, x[:, 1:]


class TextTower(TextTransformer):
    """open_clip's text encoder; its forward returns `(feature [B, E], tokens [B, T, D] before the final LayerNorm)`."""

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        x, mask = self._embeds(text)
        x = self.transformer(x, attn_mask=mask)  # [B, T, D]
        return self.ln_final(x[:, -1]) @ self.text_projection, x


class MaskedTextTower(TextTower):
    """The same for `text_padding: masked`: no token attends to a pad, the last real token is pooled, and pads are not computed.

    Its feature is that of open_clip's class with `use_pad_mask` and `pool_type="eos"`, which open_clip's configs cannot ask for.
    Its tokens at pads are zero.
    """

    def forward(self, text: Tensor) -> tuple[Tensor, Tensor]:
        packing = Packing(text != PAD)
        x = packing.lay(self.token_embedding(text) + self.positional_embedding)  # [R, T, D], R ≤ B
        bias = x.new_zeros(packing.mask.shape).masked_fill_(~packing.mask, -torch.inf)
        x = self.transformer(x, attn_mask=bias.repeat_interleave(self.heads, dim=0))
        return self.ln_final(x.flatten(0, 1)[packing.last]) @ self.text_projection, packing.take(x)


class Encoded(NamedTuple):
    """Pictures and their texts, encoded: K texts a picture, of T tokens."""

    image: Tensor  # [B, E], L2-normalised
    text: Tensor  # [B, K, E], L2-normalised
    image_tokens: Tensor  # [B, N, D]: what the decoder reads of a picture
    web_tokens: Tensor  # [B, T − 1, D]: and of its first text, the web caption
    web_mask: Tensor | None  # bool [B, T − 1]: the tokens of it that are there; None: all are attended to


class CLIPS(nn.Module):
    """Image tower, text tower, temperature and, where the config has one, the caption decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        towers = open_clip.model.CustomTextCLIP(**open_clip_config(config))
        self.visual, self.text, self.logit_scale = towers.visual, towers.text, towers.logit_scale
        self.visual.__class__ = ImageTower
        self.text.__class__ = TextTower if config.text_padding == "attended" else MaskedTextTower
        self.decoder = CaptionDecoder(config, config.decoder) if config.decoder is not None else None
        init_weights(self)

    def forward(
        self, image: Tensor, texts: Tensor, target: Tensor | None = None, teacher_forced: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Features of pictures and of their texts, and how badly the decoder writes the captions. All in one forward, which is what
        DDP and FSDP hook into.

        Args:
            image: [B, 3, H, W], normalised.
            texts: token ids [B, K, T]; `texts[:, 0]` is the one that the decoder reads (the web caption).
            target: token ids [B, M] of the captions to write, pads ignored; None leaves the decoder out.
            teacher_forced: the captioner of CoCa, see `caption_states`.

        Returns:
            image features [B, E] and text features [B, K, E], both L2-normalised; the summed cross-entropy at all targets, or None.
        """
        encoded = self.encode(image, texts)
        if target is None or self.decoder is None:
            return encoded.image, encoded.text, None
        hidden = self.caption_states(encoded, target, teacher_forced)
        return encoded.image, encoded.text, summed_caption_loss(hidden, self.decoder.head.weight, target)

    def set_activation_checkpointing(self) -> None:
        """From now on, keep only what enters each block, and compute the rest again in the backward pass."""
        self.visual.set_grad_checkpointing(True)
        self.text.set_grad_checkpointing(True)
        if self.decoder is not None:
            self.decoder.activation_checkpointing = True

    def blocks(self) -> list[nn.Module]:
        """The blocks of all transformers: the units that are compiled, and sharded."""
        transformers = [self.visual.transformer.resblocks, self.text.transformer.resblocks]
        return [*transformers[0], *transformers[1], *(self.decoder.blocks if self.decoder is not None else ())]

    def encode(self, image: Tensor, texts: Tensor) -> Encoded:
        """Pictures [B, 3, H, W] and token ids of their texts [B, K, T]; the first is the one that the decoder reads."""
        batch, kinds, length = texts.shape
        image_feature, image_tokens = self.visual(image)
        text_feature, text_tokens = self.text(texts.reshape(batch * kinds, length))
        web_tokens, web_mask = text_tokens.view(batch, kinds, length, -1)[:, 0, :-1], None
        if self.config.text_padding == "masked":
            web_mask = texts[:, 0, :-1] != PAD
            longest = int(web_mask.sum(dim=1).max())
            web_tokens, web_mask = web_tokens[:, :longest], web_mask[:, :longest]
        text_feature = F.normalize(text_feature.view(batch, kinds, -1), dim=-1)
        return Encoded(F.normalize(image_feature, dim=-1), text_feature, image_tokens, web_tokens, web_mask)

    def encode_image(self, image: Tensor) -> Tensor:
        """L2-normalised features [B, E] of pictures [B, 3, H, W]."""
        return F.normalize(self.visual(image)[0], dim=-1)

    def encode_text(self, text: Tensor) -> Tensor:
        """L2-normalised features [B, E] of token ids [B, T]."""
        return F.normalize(self.text(text)[0], dim=-1)

    def caption_states(self, encoded: Encoded, target: Tensor, teacher_forced: bool = False) -> Tensor:
        """The decoder's states [B, M, D] at the places of `target` [B, M]; its `head` makes logits of them.

        Teacher-forced, as in CoCa (arXiv 2205.01917): a place sees the image and the target's tokens before it, never the text
        tower's tokens, since the text is the very caption that is to be written.
        """
        assert self.decoder is not None
        if not teacher_forced:
            states: Tensor = self.decoder(
                encoded.image_tokens, encoded.web_tokens, target.shape[1], text_mask=encoded.web_mask
            )
            return states
        before = F.pad(target, (1, 0), value=BOS)[:, :-1]
        states = self.decoder(encoded.image_tokens, None, target.shape[1], self.text.token_embedding(before))
        return states


class CaptionDecoder(nn.Module):
    """Predicts the full synthetic caption in one pass, from the image and the web caption.

    The prefix (image tokens, web-caption tokens) attends to itself in both directions and never sees the learnable tokens; a
    learnable token sees the whole prefix and the learnable tokens up to itself.
    """

    def __init__(self, model: ModelConfig, config: TransformerConfig):
        super().__init__()
        self.image_proj = nn.Linear(model.vision.width, config.width, bias=False)
        self.text_proj = nn.Linear(model.text.width, config.width, bias=False)
        self.learnable_tokens = nn.Parameter(torch.empty(model.learnable_tokens, config.width))
        self.blocks = nn.ModuleList(DecoderBlock(config.width, config.heads) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(config.width, eps=NORM_EPS)
        self.head = nn.Linear(config.width, model.vocab_size, bias=False)
        self.activation_checkpointing = False

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor | None,
        target_length: int,
        previous: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """States of the first `target_length` = M learnable tokens after the final LayerNorm, [B, M, D]; logits are `head` of them.

        A learnable token never sees a later one, so leaving out those beyond the batch's longest target changes nothing.

        Args:
            image_tokens: [B, N, D_image], the last block's patch tokens before any LayerNorm.
            text_tokens: [B, T − 1, D_text], the text encoder's block outputs of all positions but the last; None: the image alone.
            previous: embeddings [B, M, D_text] of the tokens before each place, for a teacher-forced captioner.
            text_mask: bool [B, T − 1], the text tokens that are attended to; None: all.
        """
        prefix, mask = self.image_proj(image_tokens), None
        if text_mask is not None:
            mask = torch.cat([text_mask.new_ones(prefix.shape[:2]), text_mask], dim=1)  # [B, P]
        if text_tokens is not None:
            prefix = torch.cat([prefix, self.text_proj(text_tokens)], dim=1)  # [B, P, D]
        queries = self.learnable_tokens[:target_length].to(prefix.dtype).expand(len(prefix), -1, -1)  # [B, M, D]
        if previous is not None:
            queries = queries + self.text_proj(previous)
        for number, block in enumerate(self.blocks, start=1):
            last = number == len(self.blocks)
            if self.activation_checkpointing and self.training:
                prefix, queries = checkpoint(block, prefix, queries, last, mask, use_reentrant=False)
            else:
                prefix, queries = block(prefix, queries, last, mask)
        return self.ln_final(queries)


class DecoderBlock(nn.Module):
    """A pre-norm block under the combination mask, as two attention calls without a dense mask."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))

    def forward(
        self, prefix: Tensor, queries: Tensor, last: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[B, P, D], [B, M, D] → the same shapes; the last block leaves the prefix as it is, since nothing reads it any more.

        Args:
            mask: bool [B, P], the prefix's tokens that are attended to; None: all.
        """
        if last:
            return prefix, self._queries_only(prefix, queries, mask)
        length = prefix.shape[1]
        x = torch.cat([prefix, queries], dim=1)
        q, k, v = self._split_heads(self.in_proj(self.ln_1(x)))
        attended = torch.cat(
            [
                F.scaled_dot_product_attention(
                    q[:, :, :length],
                    k[:, :, :length],
                    v[:, :, :length],
                    attn_mask=None if mask is None else mask[:, None, None],
                ),
                F.scaled_dot_product_attention(
                    q[:, :, length:], k, v, attn_mask=_combination_mask(queries, prefix, mask)
                ),
            ],
            dim=2,
        )
        x = x + self.out_proj(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.ln_2(x))
        return x[:, :length], x[:, length:]

    def _queries_only(self, prefix: Tensor, queries: Tensor, mask: Tensor | None) -> Tensor:
        """`forward(prefix, queries)[1]` without the prefix's queries and MLP."""
        width = queries.shape[-1]
        normed_queries = self.ln_1(queries)
        weight, bias = self.in_proj.weight, self.in_proj.bias
        key_value = F.linear(torch.cat([self.ln_1(prefix), normed_queries], dim=1), weight[width:], bias[width:])
        k, v = self._split_heads(key_value, parts=2)
        (q,) = self._split_heads(F.linear(normed_queries, weight[:width], bias[:width]), parts=1)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=_combination_mask(queries, prefix, mask))
        x = queries + self.out_proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.ln_2(x))

    def _split_heads(self, x: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
        """[B, L, parts · D] → `parts` tensors [B, heads, L, D / heads]."""
        batch, length, _ = x.shape
        return x.view(batch, length, parts, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def _combination_mask(queries: Tensor, prefix: Tensor, mask: Tensor | None) -> Tensor:
    """For the learnable tokens' attention over [prefix; learnable tokens]: causal, aligned to the lower right."""
    count, total = queries.shape[1], prefix.shape[1] + queries.shape[1]
    if mask is None and queries.is_cuda and not torch.compiler.is_compiling():
        return causal_lower_right(count, total)  # no mask is materialised, and flash attention applies
    causal = torch.ones(count, total, dtype=torch.bool, device=queries.device).tril(total - count)
    if mask is None:
        return causal
    return causal & F.pad(mask, (0, count), value=True)[:, None, None]  # [B, 1, M, P + M]


@torch.no_grad()
def init_weights(model: CLIPS) -> None:
    """The initialisation of METHOD for each transformer of width d and depth n; biases zero, norms one and zero."""
    visual, text, decoder = model.visual, model.text, model.decoder
    for transformer in (visual.transformer, text.transformer):
        for block in transformer.resblocks:
            _init_block(
                transformer.width, transformer.layers, block.attn.in_proj_weight, block.attn.out_proj, *block.mlp[::2]
            )
            nn.init.zeros_(block.attn.in_proj_bias)
    nn.init.normal_(visual.conv1.weight, std=(3 * visual.patch_size[0] ** 2) ** -0.5)
    nn.init.normal_(visual.class_embedding, std=1e-6)
    visual.positional_embedding.copy_(sin_cos_positions(visual.grid_size[0], visual.transformer.width))
    nn.init.normal_(visual.proj, std=visual.transformer.width**-0.5)
    nn.init.normal_(text.token_embedding.weight, std=0.02)
    nn.init.normal_(text.positional_embedding, std=0.01)
    nn.init.normal_(text.text_projection, std=text.transformer.width**-0.5)
    nn.init.constant_(model.logit_scale, math.log(1 / 0.07))
    if decoder is not None:
        width, layers = decoder.ln_final.normalized_shape[0], len(decoder.blocks)
        for block in cast(list[DecoderBlock], decoder.blocks):
            _init_block(width, layers, block.in_proj.weight, block.out_proj, *block.mlp[::2])
            nn.init.zeros_(block.in_proj.bias)
        for linear in (decoder.image_proj, decoder.text_proj, decoder.head):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
        nn.init.normal_(decoder.learnable_tokens, std=1.0)


def _init_block(
    width: int, layers: int, in_proj: Tensor, out_proj: nn.Linear, first: nn.Linear, second: nn.Linear
) -> None:
    nn.init.normal_(in_proj, std=width**-0.5)
    nn.init.normal_(out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
    nn.init.normal_(first.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(second.weight, std=width**-0.5 * (2 * layers) ** -0.5)
    for linear in (out_proj, first, second):
        nn.init.zeros_(linear.bias)


def decayed_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay applies to: matrices of linear and convolution layers, nothing else."""
    spared = ("token_embedding.weight", "positional_embedding", "class_embedding", "learnable_tokens")
    return {name for name, value in model.named_parameters() if value.ndim >= 2 and not name.endswith(spared)}
