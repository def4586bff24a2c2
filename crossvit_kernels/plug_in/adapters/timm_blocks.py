"""timm: the transformer block, and CrossViT's fusions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import functional
from crossvit_kernels.modules import plain_layers
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.adapters.halves import Blocks, Half
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe, never

_ATTENTION = "timm.layers.attention.Attention"
_MLP = "timm.layers.mlp.Mlp"
_FUSION = "timm.models.crossvit.CrossAttentionBlock"
_SEQUENTIAL = "torch.nn.modules.container.Sequential"


class TimmBlocks(Blocks):
    """``vision_transformer.Block``."""

    def check_attention(self, block: Any) -> None:
        attn = looking.child(block, "attn", _ATTENTION)
        looking.only(attn, "attn", "qkv", "proj")
        looking.linear(attn, "qkv")
        looking.linear(attn, "proj")

    def live_attention(self, block: Any) -> str | None:
        attn, dim = block.attn, looking.shape_of(block.attn.qkv)[1]
        return looking.why_not_heads(attn, attn.num_heads, dim) or (
            None
            if looking.shape_of(attn.qkv) == (3 * dim, dim)
            else f"attn.qkv has the shape {list(looking.shape_of(attn.qkv))}"
        )

    def msa_weights(self, block: Any) -> MsaWeights:
        return MsaWeights(*plain_layers.parameters(block.norm1, block.attn.qkv, block.attn.proj))

    def check_mlp(self, block: Any) -> None:
        looking.child(block, "mlp", _MLP)

    def call(
        self,
        block: Any,
        found: list[Any],
        backend: str | None,
        x: Any,
        attn_mask: Any = None,
        is_causal: Any = False,
        **others: Any,
    ) -> Tensor | str:
        """Serve a block; torch's attention gives 0 where a mask leaves no key, as kernels do."""
        if others or not calls.fits(x, block.norm1.weight):
            return ""
        is_plain, key_mask = is_causal is False, None
        if attn_mask is not None:
            if getattr(block.attn, "fused_attn", False):
                key_mask = calls.key_mask_of(attn_mask, x)
            is_plain = is_plain and key_mask is not None

        def attend(normed: Tensor) -> Any:
            # Older releases of timm know no is_causal.
            masks = {} if attn_mask is None else {"attn_mask": attn_mask}
            masks = masks if is_causal is False else {**masks, "is_causal": is_causal}
            return block.attn(normed, **masks)

        return self.run(block, found, backend, x, attend, is_plain, key_mask)


BLOCK = TimmBlocks(
    Half("norm1", "attn", ("ls1", "drop_path1")), Half("norm2", "mlp", ("ls2", "drop_path2"))
).recipe("timm.models.vision_transformer.Block")


def _fusion_block(block: Any, branch: int) -> Any:
    """Return the cross-attention block of a branch: alone, or in a Sequential."""
    fusion = block.fusion[branch]
    return fusion[0] if isinstance(fusion, torch.nn.Sequential) else fusion


def _check_fusions(block: Any) -> None:
    looking.only(block, "", "blocks", "projs", "fusion", "revert_projs")
    if len(block.projs) != len(block.fusion) or block.num_branches != len(block.fusion):
        raise Declined("it has branches without a fusion")
    for i in range(block.num_branches):
        fusion = looking.child(block.fusion, str(i), _FUSION, _SEQUENTIAL)
        if isinstance(fusion, torch.nn.Sequential) and len(fusion) != 1:
            raise Declined(f"fusion.{i} has {len(fusion)} cross-attention blocks")
        if looking.kind_of(_fusion_block(block, i)) != _FUSION:
            raise Declined(f"fusion.{i}.0 is a {type(fusion[0]).__name__}")
        eps = set()
        for lifts in ("projs", "revert_projs"):
            lift = looking.child(getattr(block, lifts), str(i), _SEQUENTIAL)
            looking.only(lift, f"{lifts}.{i}", "0", "1", "2")
            eps.add(looking.norm(lift, "0").eps)
            looking.exact_gelu(lift[1], f"{lifts}.{i}.1")
            looking.linear(lift, "2", bias=True)
        one = _fusion_block(block, i)
        looking.only(one, f"fusion.{i}", "norm1", "attn", "drop_path")
        if not looking.is_idle(one.drop_path) and not looking.is_drop_path(one.drop_path):
            raise Declined(f"fusion.{i}.drop_path is a {type(one.drop_path).__name__}")
        eps.add(looking.norm(one, "norm1").eps)
        if len(eps) > 1:
            raise Declined(f"fusion.{i} has LayerNorms of different eps")
        attn = looking.child(one, "attn", "timm.models.crossvit.CrossAttention")
        looking.only(attn, f"fusion.{i}.attn", "wq", "wk", "wv", "proj")
        for name in ("wq", "wk", "wv"):
            looking.linear(attn, name)
        looking.linear(attn, "proj", bias=True)
        weights = _fusion_weights(block, i)
        if reason := plain_layers.why_not_tensors(weights):
            raise Declined(reason)
        cls, tokens = (
            w.new_empty(1, *shape)
            for w, shape in (
                (weights.norm_weight, (weights.proj_weight.shape[1],)),  # type: ignore[union-attr]
                (weights.norm_weight, (2, weights.norm_weight.shape[0])),
            )
        )
        inputs = FusionInputs(cls, tokens, weights, attn.num_heads, None)
        looking.require_kernels("cross_attention_fusion", inputs)


def _live_fusions(block: Any) -> str | None:
    for i in range(block.num_branches):
        attn = _fusion_block(block, i).attn
        dim = looking.shape_of(attn.wq)[1]
        if reason := looking.why_not_heads(attn, attn.num_heads, dim, f"fusion.{i}.attn"):
            return reason
    return None


def _fusion_weights(block: Any, branch: int) -> FusionWeights:
    f, g, one = block.projs[branch], block.revert_projs[branch], _fusion_block(block, branch)
    attn = one.attn
    return FusionWeights(
        *plain_layers.parameters(
            f[0], f[2], one.norm1, attn.wq, attn.wk, attn.wv, attn.proj, g[0], g[2]
        )
    )


def _call_fusions(
    block: Any, parts: list[bool], backend: str | None, x: Any, *others: Any, **more: Any
) -> list[Tensor] | str:
    if others or more or not isinstance(x, (list, tuple)) or len(x) != block.num_branches:
        return ""
    for i in range(block.num_branches):
        if not calls.fits(x[i], block.projs[i][0].weight):
            return ""
    encoded = [layers(t) for layers, t in zip(block.blocks, x, strict=True)]
    outputs = []
    for i in range(block.num_branches):
        weights, one = _fusion_weights(block, i), _fusion_block(block, i)
        own, other = encoded[i], encoded[(i + 1) % block.num_branches]
        cls = functional.cross_attention_fusion(
            own[:, 0],
            other[:, 1:],
            weights,
            one.attn.num_heads,
            one.norm1.eps,
            looking.drop_path_factors(one.drop_path, own),
            backend=backend,
        )
        outputs.append(torch.cat([cls.unsqueeze(1), own[:, 1:]], dim=1))
    return outputs


FUSIONS = Recipe(
    "timm.models.crossvit.MultiScaleBlock",
    (
        Part(
            "cross_attention_fusion",
            ("projs", "fusion", "revert_projs"),
            _check_fusions,
            _live_fusions,
            never,
        ),
    ),
    _call_fusions,
)

RECIPES = (BLOCK, FUSIONS)
