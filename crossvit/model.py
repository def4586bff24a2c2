"""CrossViT: two branches over two patch sizes, fused by cross-attention (ICCV 2021)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from crossvit.backbone import EPS, Backbone, changed, pool
from crossvit.configs import (
    SAME_SCALE,
    Config,
    Size,
    VitConfig,
    branch_sizes,
    named_config,
    scale_of_l_branch,
    whole_patches,
)
from crossvit.embed import make_embedding, resize_image, resize_position_embedding
from crossvit.features import IntermediateFeatures
from crossvit.fusion import Branch, make_block


class CrossViT(IntermediateFeatures, Backbone):
    """A CrossViT, either a model of the paper or one of any other sizes.

    Args:
        name: A name from ``list_models``, with or without the size at its end, or a ``Config``.
        use_fused: Run the kernels of crossvit_kernels. False is eager mode, layer by layer.
            Parameters and state-dict keys are the same; ``set_fused`` switches.
        backend: With use_fused, the name of a crossvit_kernels backend; None for the fastest.
        keep: With use_fused, what training saves for backward on a GPU: "fast", or "lean" for less
            memory and more arithmetic.
        num_classes: Classes of both heads. 0: no heads; the model returns the concatenated CLS
            features of both branches, [B, C_S + C_L].
        in_chans: Channels of an image.
        drop_rate: Dropout before the heads.
        pos_drop_rate: Dropout after the position embedding.
        attn_drop_rate: Attention dropout, which runs the reference.
        drop_path_rate: Stochastic depth, with rates rising linearly from 0 to this.
        qkv_bias: Whether query, key and value projections have biases.
        dynamic_img_size: Let the grids of patches follow the images of each call, with position
            embeddings resized (bicubic). False: images of another size are resized to the
            model's, as in the released code.
        global_pool: What the heads see of each branch: "token", its CLS, or "avg", the mean of its
            patches, the only choice without CLS tokens. None: the CLS if there is one.
        **changes: Fields of ``Config`` to change, e.g. ``img_size=256``,
            ``patch_sizes=(8, 16)``, ``num_blocks=6``, ``fusion="class"``.

    Raises:
        ValueError: The name is unknown or of another architecture, or options do not fit each
            other.
        TypeError: A keyword is not a field of ``Config``.
    """

    config: Config
    blocks: Any  # ModuleLists, like the next
    norm: Any
    position_embeddings = ("pos_embed_0", "pos_embed_1")
    heads = ("head.0", "head.1")
    global_pools = ("token", "avg")

    def __init__(
        self,
        name: str | Config = "crossvit_15_240",
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
        config = name if isinstance(name, (Config, VitConfig)) else named_config(name)
        if not isinstance(config, Config):
            raise ValueError(f"{name!r}: no CrossViT; create_model makes models of any kind")
        config = changed(CrossViT, config, changes)
        cls_tokens = int(config.cls_token)
        super().__init__(num_classes, in_chans, sum(config.dims), cls_tokens, global_pool)
        self.config, self.dynamic_img_size = config, dynamic_img_size
        sizes = branch_sizes(config.img_size, config.patch_sizes)

        self.patch_embed = nn.ModuleList(
            make_embedding(config, b, sizes[b], in_chans) for b in (0, 1)
        )
        for b, dim in enumerate(config.dims):
            height, width = self.grid_sizes[b]
            num_tokens = self.num_prefix_tokens + height * width
            self.register_parameter(f"pos_embed_{b}", nn.Parameter(torch.zeros(1, num_tokens, dim)))
            if config.cls_token:
                self.register_parameter(f"cls_token_{b}", nn.Parameter(torch.zeros(1, 1, dim)))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            make_block(config, rates, qkv_bias, attn_drop_rate)
            for rates in _drop_paths(config, drop_path_rate)
        )
        self.norm = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for dim in config.dims)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = self._make_head(num_classes)
        self._initialise()
        self.set_fused(use_fused, backend, keep)

    # Setup

    @property
    def grid_sizes(self) -> list[Size]:
        """(height, width) of each branch at the model's own image size, in patches."""
        return [embed.grid_size for embed in self.patch_embed]

    def _make_head(self, num_classes: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
            for dim in self.config.dims
        )

    # Running

    def forward(self, x: Tensor | Sequence[Tensor]) -> Tensor:
        """Compute class scores of images.

        Args:
            x: Images [B, in_chans, H, W], which each branch resizes (bicubic) to the size in
                ``image_sizes(x)``; or a pair of them in these sizes.

        Returns:
            Logits [B, num_classes], the mean of both heads; without heads, the features
            [B, C_S + C_L].
        """
        return self.forward_head(self._pooled(x))

    def forward_cls(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The CLS tokens of both branches, [B, C_S] and [B, C_L], before the last LayerNorm.

        Without CLS tokens they are the means of the patches, of which the heads see the normalised
        ones.
        """
        return [branch.cls for branch in self._encode(self.embed(x))]

    def _pooled(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """What the heads see of both branches, [B, C_S] and [B, C_L]."""
        branches = self._encode(self.embed(x))
        if self.global_pool == "token":
            return [norm(b.cls) for norm, b in zip(self.norm, branches, strict=True)]
        return [self._pool(tokens) for tokens in self._final(branches)]

    def _pool(self, tokens: Tensor) -> Tensor:
        return pool(tokens, self.num_prefix_tokens, self.global_pool)

    def forward_features(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """All tokens of both after the last LayerNorm, [B, 1 + N, C]; [B, N, C] without CLS."""
        return self._final(self._encode(self.embed(x)))

    def forward_head(self, features: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Compute logits from the result of ``forward_features``, or from each branch's CLS [B, C].

        Args:
            features: [B, 1 + N, C], or [B, N, C] without CLS, or [B, C] for each branch.
            pre_logits: Return the heads' input features, [B, C_S + C_L].
        """
        pooled = [self._pool(t) if t.dim() == 3 else t for t in features]
        cls = [self.head_drop(t) for t in pooled]
        if pre_logits or self.num_classes == 0:
            return torch.cat(cls, dim=1)
        small, large = (head(c) for head, c in zip(self.head, cls, strict=True))
        return cast(Tensor, (small + large) / 2)

    def forward_branches(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The logits of each branch's head, [B, num_classes] twice."""
        pooled = self._pooled(x)
        small, large = (self.head[b](self.head_drop(pooled[b])) for b in (0, 1))
        return small, large

    def forward_feature_maps(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Patch tokens of both branches as maps [B, C, height, width], after the last LayerNorm."""
        small, large = (
            tokens[:, self.num_prefix_tokens :].transpose(1, 2).unflatten(2, grid)
            for tokens, grid in zip(self.forward_features(x), self.grid_sizes_of(x), strict=True)
        )
        return small, large

    def embed(self, x: Tensor | Sequence[Tensor]) -> tuple[Branch, Branch]:
        """Patches, CLS and positions of both branches: x_0 = [x_cls || x_patch] + x_pos (Eq. 1)."""
        small, large = (self._embed(b, image) for b, image in enumerate(self._images(x)))
        return small, large

    def _embed(self, b: int, image: Tensor) -> Branch:
        patches = self.patch_embed[b](image)
        # getattr, not get_parameter: replicas and sharded models hold plain tensors.
        pos_embed, grid = getattr(self, f"pos_embed_{b}"), self.grid_sizes[b]
        if self.dynamic_img_size:
            grid = self._grid_size(b, *image.shape[-2:])
            pos_embed = resize_position_embedding(pos_embed, self.grid_sizes[b], grid)
        if self.config.cls_token:
            cls = getattr(self, f"cls_token_{b}").to(patches.dtype)
            patches = torch.cat([cls.expand(image.shape[0], -1, -1), patches], dim=1)
        return Branch(self.pos_drop(patches + pos_embed), None, grid, self.config.cls_token)

    def image_sizes(self, x: Tensor | Sequence[Tensor]) -> list[Size]:
        """Return (height, width) of the image that each branch sees of x, in pixels.

        They are the model's own; with ``dynamic_img_size`` those of x, rounded up to whole patches,
        and of one image the L branch sees the model's share (224 for 240).
        """
        if not self.dynamic_img_size:
            return [embed.img_size for embed in self.patch_embed]
        one_image = isinstance(x, Tensor)
        scales = SAME_SCALE, scale_of_l_branch(self.config.img_size) if one_image else SAME_SCALE
        pair = (x, x) if one_image else x
        return [
            whole_patches((image.shape[-2], image.shape[-1]), patch, scale)
            for image, patch, scale in zip(pair, self.config.patch_sizes, scales, strict=True)
        ]

    def grid_sizes_of(self, x: Tensor | Sequence[Tensor]) -> list[Size]:
        """Return (height, width) of each branch for the images x, in patches."""
        return [self._grid_size(b, *size) for b, size in enumerate(self.image_sizes(x))]

    def _grid_size(self, b: int, height: int, width: int) -> Size:
        patch = self.config.patch_sizes[b]
        return height // patch, width // patch

    def _images(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The image of each branch in its size."""
        if not isinstance(x, (Tensor, tuple, list)):
            raise ValueError(f"x: expected images or a pair of them, found {type(x).__name__}")
        pair = [x, x] if isinstance(x, Tensor) else list(x)
        if len(pair) != 2 or not all(isinstance(image, Tensor) for image in pair):
            found = ", ".join(type(image).__name__ for image in pair)
            raise ValueError(f"x: expected images or a pair of them, found [{found}]")
        if pair[0].shape[:1] != pair[1].shape[:1]:
            shapes = " and ".join(str(list(image.shape)) for image in pair)
            raise ValueError(f"x: expected as many images for both branches, found {shapes}")
        for image in pair:
            if image.dim() != 4 or image.shape[1] != self.in_chans or 0 in image.shape[2:]:
                shape = list(image.shape)
                raise ValueError(f"x: expected shape [B, {self.in_chans}, H, W], found {shape}")
        sizes = self.image_sizes(x)
        for image, size in zip(pair, sizes, strict=True):
            if not isinstance(x, Tensor) and image.shape[-2:] != size:
                shape = list(image.shape)
                raise ValueError(f"x: expected images of {size} for this branch, found {shape}")
        return [resize_image(image, size) for image, size in zip(pair, sizes, strict=True)]

    def _encode(self, branches: tuple[Branch, Branch]) -> tuple[Branch, Branch]:
        for after_block in self._after_blocks(branches):
            branches = after_block
        return branches

    def _after_blocks(self, branches: tuple[Branch, Branch]) -> Iterator[tuple[Branch, Branch]]:
        """Yield the branches after each multi-scale block."""
        for block in self.blocks:
            branches = self._run_block(block, *branches)
            yield branches

    def _run_blocks(self, x: Tensor | Sequence[Tensor]) -> Iterator[Sequence[Branch]]:
        return self._after_blocks(self.embed(x))

    def _final(self, branches: Sequence[Branch]) -> list[Tensor]:
        return [norm(b.tokens()) for norm, b in zip(self.norm, branches, strict=True)]


def _drop_paths(config: Config, rate: float) -> list[list[float]]:
    """The rates of each multi-scale block, as in the released code."""
    # There a single cross-attention block is L = 0 and takes no step of its own.
    steps = max(config.depths) + (config.cross_depth if config.cross_depth > 1 else 0)
    rates = torch.linspace(
        0, rate, steps * config.num_blocks, dtype=torch.float32, device="cpu"
    ).tolist()
    return [rates[k * steps : (k + 1) * steps] for k in range(config.num_blocks)]
