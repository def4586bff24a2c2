"""What CrossViT and the plain vision transformer have in common: settings, running of blocks."""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from crossvit.configs import Config, Size, VitConfig

EPS = 1e-6  # of every LayerNorm
Self = TypeVar("Self", bound="Backbone")


class Backbone(nn.Module):
    """A model of transformer blocks that run fused or eager from the same parameters.

    Attributes:
        config: The architecture.
        num_classes: Classes of the heads; 0 if there are none.
        in_chans: Channels of an image.
        num_features: Width of the features without heads.
        num_prefix_tokens: Tokens in front of the patches: 1 with a CLS, else 0.
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

    def __init__(
        self, num_classes: int, in_chans: int, num_features: int, num_prefix_tokens: int
    ) -> None:
        super().__init__()
        check_num_classes(num_classes)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.num_features, self.num_prefix_tokens = num_features, num_prefix_tokens
        self.grad_checkpointing = False

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

    def reset_classifier(self, num_classes: int) -> None:
        """Make new heads for another number of classes; 0 for none."""
        old = next(self.parameters())
        check_num_classes(num_classes)
        self.head = self._make_head(num_classes).to(old.device, old.dtype)
        self.num_classes = num_classes
        self.head.apply(init_linear)
        self.head.train(self.training)

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


def pool(tokens: Tensor, num_prefix_tokens: int) -> Tensor:
    """Return the CLS of normalised tokens [B, 1 + N, C], or without one their mean, [B, C]."""
    return tokens[:, 0] if num_prefix_tokens else tokens.mean(dim=1)


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
