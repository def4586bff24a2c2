"""Transformer blocks ``x + MSA(LN(x))``, ``x + FFN(LN(x))``, of which each half is served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from crossvit_kernels.modules import plain_layers
from crossvit_kernels.ops.layernorm_ffn.reference import FfnInputs, FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaInputs, MsaWeights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe


class Half(NamedTuple):
    """What a library calls the children that make ``x + after(body(norm(x)))``.

    Attributes:
        norm: A LayerNorm.
        body: Attention, or an MLP.
        after: LayerScale, drop path and dropout, where a block has them.
    """

    norm: str
    body: str
    after: tuple[str, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        """Return all children."""
        return (self.norm, self.body, *self.after)

    def by_layers(self, block: Any, x: Tensor, body: Callable[[Tensor], Any]) -> Any:
        """Compute the half by its own layers, and the body as the library calls it."""
        children = block._modules
        update = body(children[self.norm](x))
        for name in self.after:
            if children.get(name) is not None:
                update = children[name](update)
        return x + update


class Found(NamedTuple):
    """What a half was found to have when it was inspected; the names are those of children."""

    scale: str | None = None  # LayerScale
    vector: str = ""  # LayerScale's parameter
    drop_path: str | None = None
    activation: str = ""


class Blocks:
    """How blocks are served whose layers a library arranges alike; a subclass for each.

    Args:
        attention: The first half.
        mlp: The second.
        layers: Names of Linear, activation, Linear in the MLP.
    """

    def __init__(
        self, attention: Half, mlp: Half, layers: tuple[str, str, str] = ("fc1", "act", "fc2")
    ) -> None:
        self.attention, self.mlp, self.layers = attention, mlp, layers

    def check_attention(self, block: Any) -> None:
        """Raise ``Declined`` unless attention has the layers of which weights are made."""
        raise NotImplementedError

    def live_attention(self, block: Any) -> str | None:
        """Return why attention is not what a kernel computes; see ``Part.live``."""
        raise NotImplementedError

    def msa_weights(self, block: Any) -> MsaWeights:
        """Return the weights of the first half."""
        raise NotImplementedError

    def call(self, block: Any, found: list[Any], backend: str | None, *args: Any, **k: Any) -> Any:
        """Compute a block from the library's arguments, by ``run``; see ``recipe.Call``."""
        raise NotImplementedError

    def live_mlp(self, block: Any) -> str | None:
        """Return why the second half cannot be served; see ``Part.live``."""
        return None

    def check_mlp(self, block: Any) -> None:
        """Raise ``Declined`` if the MLP is of another class than the layout's."""
        raise NotImplementedError

    def num_heads(self, block: Any) -> int:
        """Return h."""
        heads: int = block._modules[self.attention.body].num_heads
        return heads

    def recipe(self, target: str) -> Recipe:
        """Return the recipe of a class with this layout."""

        def part(half: Half, serves: str, check: Any, live: Any, sample: Any) -> Part:
            def fast(block: Any) -> str | None:
                return looking.why_no_block_gain(block._modules[half.norm])

            return Part(serves, half.reads, check, live, fast, looking.block_pays, sample)

        halves = (
            part(
                self.attention,
                "layernorm_msa",
                self._check_msa,
                self.live_attention,
                self._msa_sample,
            ),
            part(self.mlp, "layernorm_ffn", self._check_ffn, self.live_mlp, self._ffn_sample),
        )
        return Recipe(target, halves, self.call)

    def run(
        self,
        block: Any,
        found: list[Any],
        backend: str | None,
        x: Tensor,
        attend: Callable[[Tensor], Any],
        is_plain: bool,
        key_mask: Tensor | None = None,
    ) -> Any:
        """Compute a block, serving what can be served; returns a string if nothing can.

        Args:
            block: The block.
            found: Of both halves; None where one is not served.
            backend: Name of a backend, or None.
            x: Tokens [B, N, C].
            attend: Attention of LN(x) as the library calls it, where it is not served.
            is_plain: Whether the call wants nothing of attention besides key_mask.
            key_mask: bool [B, N], or None.
        """
        of_attention, of_mlp = found if is_plain else (None, found[1])
        if of_attention is None and of_mlp is None:
            return ""
        y: Any
        if of_attention is None:
            y = self.attention.by_layers(block, x, attend)
        else:
            y = self._msa(block, of_attention, x, key_mask, backend)
            if isinstance(y, str):
                return y
        if of_mlp is None:
            return self.mlp.by_layers(block, y, block._modules[self.mlp.body])
        return self._ffn(block, of_mlp, y, backend)

    def _msa(
        self, block: Any, found: Found, x: Tensor, key_mask: Tensor | None, backend: str | None
    ) -> Tensor | str:
        return calls.msa(
            x,
            self.msa_weights(block),
            self.num_heads(block),
            block._modules[self.attention.norm].eps,
            backend,
            residual_scale=_residual_scale(block, found, x),
            layer_scale=_layer_scale(block, found),
            key_mask=key_mask,
        )

    def _ffn(self, block: Any, found: Found, x: Tensor, backend: str | None) -> Tensor | str:
        return calls.ffn(
            x,
            self._ffn_weights(block),
            block._modules[self.mlp.norm].eps,
            backend,
            residual_scale=_residual_scale(block, found, x),
            activation=found.activation,
            layer_scale=_layer_scale(block, found),
        )

    def _ffn_weights(self, block: Any) -> FfnWeights:
        children = block._modules
        layers = children[self.mlp.body]._modules
        fc1, _, fc2 = self.layers
        norm = children[self.mlp.norm]
        return FfnWeights(*plain_layers.parameters(norm, layers[fc1], layers[fc2]))

    def _check_msa(self, block: Any) -> Found:
        self._check_children(block, self.attention)
        self.check_attention(block)
        found = _found_after(block, self.attention)
        if reason := self.live_attention(block):
            raise Declined(reason)
        with torch.no_grad():
            w = self.msa_weights(block)
        channels = w.norm_weight.shape[0]
        if w.qkv_weight.shape != (3 * channels, channels):
            raise Declined(f"attention projects to {w.qkv_weight.shape[0]} features")
        if w.out_weight.shape != (channels, channels):
            raise Declined("attention has another width inside or after")
        _require_tensors(block, w, found)
        return found

    def _check_ffn(self, block: Any) -> Found:
        self._check_children(block, self.mlp)
        self.check_mlp(block)
        path, (fc1, act, fc2) = self.mlp.body, self.layers
        mlp = looking.child(block, path)
        looking.only(mlp, path, *self.layers)
        looking.linear(mlp, fc1)
        looking.linear(mlp, fc2)
        name = looking.activation(mlp._modules.get(act), f"{path}.{act}")
        found = _found_after(block, self.mlp)._replace(activation=name)
        with torch.no_grad():
            w = self._ffn_weights(block)
        channels = w.norm_weight.shape[0]
        if w.fc1_weight.shape[1] != channels or w.fc2_weight.shape[0] != channels:
            raise Declined("the MLP has another width before or after")
        _require_tensors(block, w, found)
        return found

    def _check_children(self, block: Any, half: Half) -> None:
        looking.only(block, "", *self.attention.reads, *self.mlp.reads)
        looking.norm(block, half.norm, bias=False)

    def _msa_sample(self, block: Any, found: Found) -> tuple[str, Any]:
        w = self.msa_weights(block)
        x, scale = w.norm_weight.new_empty(1, 2, w.norm_weight.shape[0]), _layer_scale(block, found)
        return "layernorm_msa", MsaInputs(x, w, self.num_heads(block), None, None, scale)

    def _ffn_sample(self, block: Any, found: Found) -> tuple[str, Any]:
        w = self._ffn_weights(block)
        x, scale = w.norm_weight.new_empty(1, 2, w.norm_weight.shape[0]), _layer_scale(block, found)
        return "layernorm_ffn", FfnInputs(x, w, None, found.activation, scale)


def _found_after(block: Any, half: Half) -> Found:
    """Return which of the layers after the body are LayerScale and drop path."""
    found = Found()
    for name in half.after:
        layer = block._modules.get(name)
        if looking.is_idle(layer):
            continue
        if (vector := looking.layer_scale_vector(layer)) is not None and found.scale is None:
            found = found._replace(scale=name, vector=vector)
        elif looking.is_drop_path(layer) and found.drop_path is None:
            found = found._replace(drop_path=name)
        else:
            raise Declined(f"{name} is a {type(layer).__name__}")
    return found


def _layer_scale(block: Any, found: Found) -> Tensor | None:
    if found.scale is None:
        return None
    scale: Tensor = getattr(block._modules[found.scale], found.vector)
    return scale


def _residual_scale(block: Any, found: Found, x: Tensor) -> Tensor | None:
    if found.drop_path is None:
        return None
    return looking.drop_path_factors(block._modules[found.drop_path], x)


def _require_tensors(block: Any, weights: Any, found: Found) -> None:
    with torch.no_grad():
        scale = _layer_scale(block, found)
    if reason := plain_layers.why_not_tensors((*weights, scale)):
        raise Declined(reason)
    if scale is not None and scale.shape != weights[0].shape:
        raise Declined(f"{found.scale} has the shape {list(scale.shape)}")


def packed(*layers: Any) -> tuple[Tensor, Tensor | None]:
    """Return weight [3 C, C] and bias [3 C] of the projections of q, k and v."""
    weight = torch.cat([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    if all(b is None for b in biases):
        return weight, None
    present = [
        w.weight.new_zeros(w.weight.shape[0]) if b is None else b
        for w, b in zip(layers, biases, strict=True)
    ]
    return weight, torch.cat(present)


def why_not_projections(attention: Any, dim: int, *names: str) -> str | None:
    """Return why projections are not [C, C] (their heads were pruned), or None."""
    for name in names:
        shape = looking.shape_of(attention._modules[name])
        if shape != (dim, dim):
            return f"{name} has the shape {list(shape)} and not {[dim, dim]}"
    return None
