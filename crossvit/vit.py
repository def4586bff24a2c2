"""The plain vision transformer on the same blocks, with timm's names: DeiT (Table 2)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossvit.backbone import EPS, Backbone, changed, pool
from crossvit.configs import Size, VitConfig, config_grids, named_config, whole_patches
from crossvit.embed import PatchEmbed, resize_image, resize_position_embedding
from crossvit.features import IntermediateFeatures
from crossvit.fusion import Branch
from crossvit_kernels.modules import TransformerBlock


class VisionTransformer(IntermediateFeatures, Backbone):
    """A vision transformer whose blocks run on the kernels: timm's ``VisionTransformer``.

    Args:
        name: A name from ``list_models("deit*")``, or a ``VitConfig``.
        use_fused: Run the kernels of crossvit_kernels. False is eager mode, layer by layer.
            Parameters and state-dict keys are the same; ``set_fused`` switches.
        backend: With use_fused, the name of a crossvit_kernels backend; None for the fastest.
        keep: With use_fused, what training saves for backward on a GPU: "fast", or "lean" for less
            memory and more arithmetic.
        num_classes: Classes of the head. 0: no head; the model returns the CLS, [B, C].
        in_chans: Channels of an image.
        drop_rate: Dropout before the head.
        pos_drop_rate: Dropout after the position embedding.
        attn_drop_rate: Attention dropout, which runs the reference.
        drop_path_rate: Stochastic depth, with rates rising linearly from 0 to this.
        qkv_bias: Whether query, key and value projections have biases.
        dynamic_img_size: Let the grid of patches follow the images of each call, as in
            ``CrossViT``.
        global_pool: What the head sees: "token", the CLS.
        **changes: Fields of ``VitConfig`` to change, e.g. ``img_size=(256, 320)``.

    Raises:
        ValueError: The name is unknown or of another architecture, or a size is not positive.
        TypeError: A keyword is not a field of ``VitConfig``.
    """

    config: VitConfig
    position_embeddings = ("pos_embed",)
    heads = ("head",)

    def __init__(
        self,
        name: str | VitConfig = "deit_small_patch16_224",
        *,
        use_fused: bool = False,
        backend: str | None = None,
        keep: str = "fast",
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        qkv_bias: bool = True,
        dynamic_img_size: bool = False,
        global_pool: str | None = None,
        **changes: Any,
    ) -> None:
        config = named_config(name) if isinstance(name, str) else name
        if not isinstance(config, VitConfig):
            raise ValueError(f"{name!r}: not a plain vision transformer; see create_model")
        config = changed(VisionTransformer, config, changes)
        super().__init__(num_classes, in_chans, config.dim, 1, global_pool)
        self.config, self.dynamic_img_size = config, dynamic_img_size
        dim, patch = config.dim, config.patch_size
        height, width = config_grids(config)[0]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + height * width, dim))
        self.patch_embed = PatchEmbed((height * patch, width * patch), patch, in_chans, dim)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = torch.linspace(0, drop_path_rate, config.depth, dtype=torch.float32, device="cpu")
        self.blocks = nn.ModuleList(
            TransformerBlock(
                dim,
                config.num_heads,
                mlp_ratio=config.mlp_ratio,
                qkv_bias=qkv_bias,
                eps=EPS,
                attn_drop=attn_drop_rate,
                drop_path=rate,
            )
            for rate in rates.tolist()
        )
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes)
        self._initialise()
        self.set_fused(use_fused, backend, keep)

    @property
    def grid_sizes(self) -> list[Size]:
        """(height, width) of the only branch at the model's own image size, in patches."""
        return [self.patch_embed.grid_size]

    def _make_head(self, num_classes: int) -> nn.Module:
        return nn.Linear(self.config.dim, num_classes) if num_classes > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Compute class scores of images.

        Args:
            x: Images [B, in_chans, H, W], resized (bicubic) to the size in ``image_sizes(x)``.

        Returns:
            Logits [B, num_classes]; without a head, the CLS [B, C].
        """
        return self.forward_head(self.norm(self._encode(x)[:, 0]))

    def forward_features(self, x: Tensor) -> Tensor:
        """All tokens after the last LayerNorm, [B, 1 + N, C]."""
        return cast(Tensor, self.norm(self._encode(x)))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Compute logits from the result of ``forward_features``, or from its CLS [B, C].

        Args:
            features: [B, 1 + N, C] or [B, C].
            pre_logits: Return the head's input, [B, C].
        """
        cls = self.head_drop(
            pool(features, 1, self.global_pool) if features.dim() == 3 else features
        )
        return cls if pre_logits else cast(Tensor, self.head(cls))

    def forward_feature_maps(self, x: Tensor) -> Tensor:
        """Patch tokens as a map [B, C, height, width], after the last LayerNorm."""
        tokens = self.forward_features(x)[:, 1:]
        return tokens.transpose(1, 2).unflatten(2, self.grid_sizes_of(x)[0])

    def image_sizes(self, x: Tensor) -> list[Size]:
        """Return (height, width) of the image that the blocks see of x, in pixels.

        It is the model's own; with ``dynamic_img_size`` that of x, rounded up to whole patches.
        """
        if not self.dynamic_img_size:
            return [self.patch_embed.img_size]
        return [whole_patches((x.shape[-2], x.shape[-1]), self.config.patch_size)]

    def grid_sizes_of(self, x: Tensor) -> list[Size]:
        """Return (height, width) for the images x, in patches."""
        patch = self.config.patch_size
        return [(height // patch, width // patch) for height, width in self.image_sizes(x)]

    def embed(self, x: Tensor) -> Tensor:
        """Patches, CLS and positions: x_0 = [x_cls || x_patch] + x_pos (Eq. 1), [B, 1 + N, C]."""
        if (
            not isinstance(x, Tensor)
            or x.dim() != 4
            or x.shape[1] != self.in_chans
            or 0 in x.shape[2:]
        ):
            found = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: expected shape [B, {self.in_chans}, H, W], found {found}")
        pos_embed: Tensor = self.pos_embed
        if self.dynamic_img_size:
            grid = self.grid_sizes_of(x)[0]
            pos_embed = resize_position_embedding(pos_embed, self.grid_sizes[0], grid)
        patches = self.patch_embed(resize_image(x, self.image_sizes(x)[0]))
        cls = self.cls_token.to(patches.dtype).expand(x.shape[0], -1, -1)
        return cast(Tensor, self.pos_drop(torch.cat([cls, patches], dim=1) + pos_embed))

    def _encode(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        for block in self.blocks:
            tokens = self._run_block(block, tokens)
        return tokens

    def _run_blocks(self, x: Tensor) -> Iterator[Sequence[Branch]]:
        tokens, (grid,) = self.embed(x), self.grid_sizes_of(x)
        for block in self.blocks:
            tokens = self._run_block(block, tokens)
            yield [Branch(tokens, None, grid)]

    def _final(self, branches: Sequence[Branch]) -> Tensor:
        return cast(Tensor, self.norm(branches[0].x))
