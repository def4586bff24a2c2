"""What CrossViT and the plain vision transformer have in common: settings, running of blocks."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossvit import conventions
from crossvit.configs import Config, ImageSize, Size, VitConfig, config_grids
from crossvit.embed import resize_position_embedding
from crossvit.hub_model import HubModel

EPS = 1e-6  # of every LayerNorm
_OF_CREATE_MODEL = ("pretrained", "checkpoint_path", "features_only", "out_indices")
Self = TypeVar("Self", bound="Backbone")
AnyConfig = TypeVar("AnyConfig", Config, VitConfig)


class Backbone(HubModel, nn.Module):
    """A model of transformer blocks that run fused or eager from the same parameters.

    Attributes:
        config: The architecture.
        num_classes: Classes of the heads; 0 if there are none.
        in_chans: Channels of an image.
        num_features: Width of the features without heads.
        num_prefix_tokens: Tokens in front of the patches: 1 with a CLS, else 0.
        global_pool: What the heads see: "token", the CLS, or "avg", the mean of the patches.
        global_pools: What ``global_pool`` may be.
        position_embeddings: Names of the position embeddings, in the order of ``grid_sizes``.
        heads: Names of the heads.
        grad_checkpointing: See ``set_grad_checkpointing``.
        use_fused, backend: See ``set_fused``.
    """

    config: Config | VitConfig
    blocks: Any  # ModuleLists or modules, like the next two
    patch_embed: Any
    head: Any
    backend: Any
    position_embeddings: tuple[str, ...]
    heads: tuple[str, ...]
    global_pools: tuple[str, ...] = ("token",)

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        num_features: int,
        num_prefix_tokens: int,
        global_pool: str | None = None,
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features, self.num_prefix_tokens = num_features, num_prefix_tokens
        self.grad_checkpointing = False
        self._weights_cfg: dict[str, Any] = {}
        self.global_pools = self.global_pools if num_prefix_tokens else ("avg",)
        self.global_pool = self._checked_pool(global_pool or self.global_pools[0])

    @property
    def grid_sizes(self) -> list[Size]:
        """(height, width) of each branch, in patches."""
        raise NotImplementedError

    def set_fused(
        self: Self, fused: bool = True, backend: str | None = None, keep: str = "fast"
    ) -> Self:
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
        for module in (*self.patch_embed.modules(), *self.blocks.modules()):
            if hasattr(module, "backend"):
                module.backend = backend if fused else "reference"
            if hasattr(module, "keep"):
                module.keep = keep
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in backward instead of keeping what it saves."""
        self.grad_checkpointing = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make new heads for another number of classes; 0 for none.

        Args:
            num_classes: Of the heads.
            global_pool: What they see, one of ``global_pools``; None keeps it.

        Raises:
            ValueError: The model cannot be pooled like this.
        """
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        old = next(self.parameters())
        check_num_classes(num_classes)
        self.head = self._make_head(num_classes).to(old.device, old.dtype)
        self.num_classes = num_classes
        self.head.apply(init_linear)
        self.head.train(self.training)

    def _checked_pool(self, global_pool: str) -> str:
        if global_pool not in self.global_pools:
            expected = " or ".join(map(repr, self.global_pools))
            raise ValueError(f"global_pool: expected {expected}, found {global_pool!r}")
        return global_pool

    def set_input_size(self, img_size: ImageSize) -> None:
        """Change the size of images; position embeddings are resized (bicubic).

        Args:
            img_size: As in the model's configuration.

        Raises:
            ValueError: A size is not positive, or no multiple of its patch.
            TypeError: It is no size.
        """
        config = dataclasses.replace(self.config, img_size=img_size)  # type: ignore[arg-type]
        for b, (name, new_grid) in enumerate(
            zip(self.position_embeddings, config_grids(config), strict=True)
        ):
            old, embed = getattr(self, name), self._embeddings()[b]
            resized = resize_position_embedding(old.detach(), self.grid_sizes[b], new_grid)
            setattr(self, name, nn.Parameter(resized.clone(), requires_grad=old.requires_grad))
            height, width = (side * embed.patch_size for side in new_grid)
            embed.grid_size, embed.img_size = new_grid, (height, width)
        self.config = config
        # timm's own records of a model that it made.
        for record in ("_traits", "_model_args"):
            if record in vars(self):
                setattr(self, record, {**getattr(self, record), "img_size": img_size})

    def _embeddings(self) -> list[Any]:
        """The patch embedding of each branch."""
        several = isinstance(self.patch_embed, nn.ModuleList)
        return list(self.patch_embed) if several else [self.patch_embed]

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """timm's description of the weights and their images, with this model's ``input_size``.

        timm's ``resolve_model_data_config`` makes transforms of it.
        """
        size = conventions.image_size(self.config)
        cfg = self._weights_cfg or conventions.pretrained_cfg(self.config, self.in_chans)
        return {**cfg, "input_size": (self.in_chans, *size)}

    @pretrained_cfg.setter
    def pretrained_cfg(self, cfg: dict[str, Any]) -> None:
        self._weights_cfg = dict(cfg)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's groups of parameters by depth, to which its ``layer_decay`` applies.

        These are the stem, each of ``blocks``, the last LayerNorms, and the heads.

        Args:
            coarse: Ignored, as in timm's CrossViT.
        """
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        """The heads."""
        return self.head

    def no_weight_decay(self) -> set[str]:
        """Names of parameters to exclude from weight decay, besides biases and norms."""
        names = ("pos_embed", "cls_token")
        return {name for name in self._parameters if name.startswith(names)}

    def _make_head(self, num_classes: int) -> nn.Module:
        raise NotImplementedError

    def _initialise(self) -> None:
        for name in sorted(self.no_weight_decay()):
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)
        self.apply(init_linear)

    def _run_block(self, block: nn.Module, *arguments: Any) -> Any:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # For load_checkpoint, next to the version: 16 patches alone could be 4 x 4 or 2 x 8. Plain
        # dicts have no metadata.
        versions = getattr(destination, "_metadata", {})
        versions.get(prefix[:-1], {})["grid_sizes"] = self.grid_sizes


def pool(tokens: Tensor, num_prefix_tokens: int, global_pool: str) -> Tensor:
    """Return the CLS of normalised tokens [B, 1 + N, C], or the mean of the patches, [B, C]."""
    if global_pool == "token":
        return tokens[:, 0]
    return tokens[:, num_prefix_tokens:].mean(dim=1)


def changed(model: type[nn.Module], config: AnyConfig, changes: dict[str, Any]) -> AnyConfig:
    """Return a configuration with other fields.

    Raises:
        TypeError: A name is neither a field nor an argument of the model's class.
    """
    fields: set[str] = {field.name for field in dataclasses.fields(config)}
    for name in changes:
        if name in _OF_CREATE_MODEL:
            raise TypeError(f"{model.__name__}: {name} is an argument of crossvit.create_model")
        if name not in fields:
            known = [*fields, *inspect.signature(model).parameters, *_OF_CREATE_MODEL]
            close = difflib.get_close_matches(name, known, n=1)
            meant = f"; did you mean {close[0]}?" if close else ""
            raise TypeError(f"{model.__name__}: unknown argument {name!r}{meant}")
    return dataclasses.replace(config, **changes)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer; convolutions and LayerNorms keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def check_num_classes(num_classes: int) -> None:
    """Check for a number of classes; 0 is a model without heads.

    Raises:
        ValueError: It is negative.
        TypeError: It is no integer.
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, Integral):
        raise TypeError(f"num_classes: expected an integer, found {num_classes!r}")
    if num_classes < 0:
        raise ValueError(f"num_classes: expected 0 or more, found {num_classes}")
