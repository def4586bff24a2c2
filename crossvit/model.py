"""CrossViT: two branches over two patch sizes, fused by cross-attention (ICCV 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossvit.configs import (
    SAME_SCALE,
    Config,
    Size,
    branch_sizes,
    named_config,
    scale_of_l_branch,
    whole_patches,
)
from crossvit.embed import PatchEmbed, resize_image, resize_position_embedding
from crossvit.features import IntermediateFeatures
from crossvit.fusion import EPS, Branch, MultiScaleBlock


class CrossViT(IntermediateFeatures, nn.Module):
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
        reread_patches: With ``cross_depth`` > 1, whether every cross-attention block reads the
            other branch's patches. In the released code only the first does.
        dynamic_img_size: Let the grids of patches follow the images of each call, with position
            embeddings resized (bicubic). False: images of another size are resized to the
            model's, as in the released code.
        **changes: Fields of ``Config`` to change, e.g. ``img_size=256``,
            ``patch_sizes=(8, 16)``, ``num_blocks=6``.

    Raises:
        ValueError: The name is unknown or sizes do not fit each other.
        TypeError: A keyword is not a field of ``Config``.
    """

    blocks: Any  # ModuleLists, like the next three
    patch_embed: Any
    norm: Any
    head: Any
    backend: Any

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
        reread_patches: bool = False,
        dynamic_img_size: bool = False,
        **changes: Any,
    ) -> None:
        super().__init__()
        config = name if isinstance(name, Config) else named_config(name)
        self.config = config = dataclasses.replace(config, **changes)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.dynamic_img_size = dynamic_img_size
        self.num_features = sum(config.dims)
        self.grad_checkpointing = False
        sizes = branch_sizes(config.img_size, config.patch_sizes)

        self.patch_embed = nn.ModuleList(
            PatchEmbed(sizes[b], config.patch_sizes[b], in_chans, config.dims[b], config.conv_stem)
            for b in (0, 1)
        )
        for b, dim in enumerate(config.dims):
            height, width = self.grid_sizes[b]
            self.register_parameter(
                f"pos_embed_{b}", nn.Parameter(torch.zeros(1, 1 + height * width, dim))
            )
            self.register_parameter(f"cls_token_{b}", nn.Parameter(torch.zeros(1, 1, dim)))
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            MultiScaleBlock(config, rates, qkv_bias, attn_drop_rate, reread_patches)
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

    def set_fused(
        self, fused: bool = True, backend: str | None = None, keep: str = "fast"
    ) -> CrossViT:
        """Choose what runs the blocks; parameters are unchanged.

        Args:
            fused: True for the kernels of crossvit_kernels, False for eager mode, which calls every
                layer as a module, so that hooks, adapters, pruning, quantised and replaced layers
                work. A fused block that has any of these also runs layer by layer, and the logger
                ``crossvit_kernels`` reports it once.
            backend: Name of the backend to use; None for the fastest.
            keep: "fast" or "lean": what training saves for backward on a GPU.

        Raises:
            ValueError: A backend together with ``fused=False``, or an unknown keep.
        """
        if keep not in ("fast", "lean"):
            raise ValueError(f"keep: expected 'fast' or 'lean', found {keep!r}")
        if not fused and backend not in (None, "reference"):
            raise ValueError(f"backend {backend!r}: eager mode is the backend 'reference'")
        self.use_fused, self.backend = fused, backend
        for module in self.blocks.modules():
            if hasattr(module, "backend"):
                module.backend = backend if fused else "reference"
            if hasattr(module, "keep"):
                module.keep = keep
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each multi-scale block in backward instead of keeping what it saves."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int) -> None:
        """Make new heads for another number of classes; 0 for none."""
        old = next(self.parameters())
        self.num_classes = num_classes
        self.head = self._make_head(num_classes).to(old.device, old.dtype)
        for layer in self.head:
            _init(layer)
        self.head.train(self.training)

    def get_classifier(self) -> nn.Module:
        """The heads of both branches."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of parameters to exclude from weight decay, besides biases and norms."""
        return {f"{kind}_{b}" for kind in ("pos_embed", "cls_token") for b in (0, 1)}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # For load_checkpoint, next to the version: 16 patches alone could be 4 x 4 or 2 x 8. Plain
        # dicts have no metadata.
        versions = getattr(destination, "_metadata", {})
        versions.get(prefix[:-1], {})["grid_sizes"] = self.grid_sizes

    def _make_head(self, num_classes: int) -> nn.ModuleList:
        return nn.ModuleList(
            nn.Linear(dim, num_classes) if num_classes > 0 else nn.Identity()
            for dim in self.config.dims
        )

    def _initialise(self) -> None:
        for name in sorted(self.no_weight_decay()):
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)
        self.apply(_init)

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
        return self.forward_head([self.norm[b](c) for b, c in enumerate(self.forward_cls(x))])

    def forward_cls(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """The CLS tokens of both branches, [B, C_S] and [B, C_L], before the last LayerNorm."""
        return [branch.cls for branch in self._encode(self.embed(x))]

    def forward_features(self, x: Tensor | Sequence[Tensor]) -> list[Tensor]:
        """All tokens of both branches, [B, 1 + N, C], after the last LayerNorm."""
        return self._normed(self._encode(self.embed(x)))

    def forward_head(self, features: Sequence[Tensor], pre_logits: bool = False) -> Tensor:
        """Compute logits from the result of ``forward_features``, or from each branch's CLS [B, C].

        Args:
            features: [B, 1 + N, C] or [B, C] for each branch.
            pre_logits: Return the heads' input features, [B, C_S + C_L].
        """
        cls = [self.head_drop(t[:, 0] if t.dim() == 3 else t) for t in features]
        if pre_logits or self.num_classes == 0:
            return torch.cat(cls, dim=1)
        small, large = (head(c) for head, c in zip(self.head, cls, strict=True))
        return cast(Tensor, (small + large) / 2)

    def forward_branches(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The logits of each branch's head, [B, num_classes] twice."""
        cls = self.forward_cls(x)
        small, large = (self.head[b](self.head_drop(self.norm[b](cls[b]))) for b in (0, 1))
        return small, large

    def forward_feature_maps(self, x: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Patch tokens of both branches as maps [B, C, height, width], after the last LayerNorm."""
        small, large = (
            tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
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
        cls_token, pos_embed = (getattr(self, f"{name}_{b}") for name in ("cls_token", "pos_embed"))
        cls = cls_token.to(patches.dtype).expand(image.shape[0], -1, -1)
        if self.dynamic_img_size:
            grid = self._grid_size(b, *image.shape[-2:])
            pos_embed = resize_position_embedding(pos_embed, self.grid_sizes[b], grid)
        tokens = torch.cat([cls, patches], dim=1) + pos_embed
        return Branch(self.pos_drop(tokens))

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
        pair = [x, x] if isinstance(x, Tensor) else list(x)
        if len(pair) != 2:
            raise ValueError(f"x: expected images or a pair of them, found {len(pair)} tensors")
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
            if self.grad_checkpointing and torch.is_grad_enabled():
                branches = checkpoint(block, *branches, use_reentrant=False)
            else:
                branches = block(*branches)
            yield branches

    def _normed(self, branches: Sequence[Branch]) -> list[Tensor]:
        return [norm(b.tokens()) for norm, b in zip(self.norm, branches, strict=True)]


def _drop_paths(config: Config, rate: float) -> list[list[float]]:
    """The rates of each multi-scale block, as in the released code."""
    # There a single cross-attention block is L = 0 and takes no step of its own.
    steps = max(config.depths) + (config.cross_depth if config.cross_depth > 1 else 0)
    rates = torch.linspace(
        0, rate, steps * config.num_blocks, dtype=torch.float32, device="cpu"
    ).tolist()
    return [rates[k * steps : (k + 1) * steps] for k in range(config.num_blocks)]


def _init(module: nn.Module) -> None:
    """Initialise linear layers; convolutions and LayerNorms keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
