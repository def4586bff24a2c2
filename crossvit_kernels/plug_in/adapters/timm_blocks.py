"""timm: the transformer block, and CrossViT's fusions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from crossvit_kernels import functional
from crossvit_kernels.modules import plain_layers
from crossvit_kernels.modules.layers import drop_path_scale
from crossvit_kernels.ops.cross_attention.reference import FusionInputs, FusionWeights
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.adapters.halves import ffn_part, msa_part
from crossvit_kernels.plug_in.recipe import Declined, Part, Recipe, never

_ATTENTION = "timm.layers.attention.Attention"
_MLP = "timm.layers.mlp.Mlp"


def _check_attention(block: Any) -> None:
    looking.only(block, "", "norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "ls2")
    looking.norm(block, "norm1")
    attn = looking.child(block, "attn", _ATTENTION)
    looking.only(attn, "attn", "qkv", "proj")
    looking.linear(attn, "qkv")
    looking.linear(attn, "proj", bias=True)
    looking.drop_path(block, "drop_path1")


def _live_attention(block: Any) -> str | None:
    attn, dim = block.attn, looking.shape_of(block.attn.qkv)[1]
    return looking.why_not_heads(attn, attn.num_heads, dim) or (
        None
        if looking.shape_of(attn.qkv) == (3 * dim, dim)
        else f"attn.qkv has the shape {list(looking.shape_of(attn.qkv))}"
    )


def _msa_weights(block: Any) -> MsaWeights:
    return MsaWeights(*plain_layers.parameters(block.norm1, block.attn.qkv, block.attn.proj))


def _check_mlp(block: Any) -> None:
    looking.only(block, "", "norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2", "ls1")
    looking.norm(block, "norm2")
    mlp = looking.child(block, "mlp", _MLP)
    looking.only(mlp, "mlp", "fc1", "act", "fc2")
    looking.linear(mlp, "fc1", bias=True)
    looking.linear(mlp, "fc2", bias=True)
    looking.gelu(mlp.act, "mlp.act")
    looking.drop_path(block, "drop_path2")


def _ffn_weights(block: Any) -> FfnWeights:
    return FfnWeights(*plain_layers.parameters(block.norm2, block.mlp.fc1, block.mlp.fc2))


def _masks(attn_mask: Any, is_causal: Any) -> dict[str, Any]:
    """Return what attention has to be told; older releases of timm know no is_causal."""
    masks = {} if attn_mask is None else {"attn_mask": attn_mask}
    return masks if is_causal is False else {**masks, "is_causal": is_causal}


def _call_block(
    block: Any,
    parts: list[bool],
    backend: str | None,
    x: Any,
    attn_mask: Any = None,
    is_causal: Any = False,
    **others: Any,
) -> Tensor | str:
    if others or not calls.fits(x, block.norm1.weight):
        return ""
    serves_attention = parts[0] and attn_mask is None and is_causal is False
    if not serves_attention and not parts[1]:
        return ""
    y: Any
    if serves_attention:
        attn, drop_path = block.attn, block.drop_path1
        y = calls.msa(x, _msa_weights(block), attn.num_heads, block.norm1.eps, backend, drop_path)
        if isinstance(y, str):
            return y
    else:
        update = block.attn(block.norm1(x), **_masks(attn_mask, is_causal))
        y = x + block.drop_path1(block.ls1(update))
    if parts[1]:
        return calls.ffn(y, _ffn_weights(block), block.norm2.eps, backend, block.drop_path2)
    return y + block.drop_path2(block.ls2(block.mlp(block.norm2(y))))


BLOCK = Recipe(
    "timm.models.vision_transformer.Block",
    (
        msa_part(
            ("norm1", "attn", "ls1", "drop_path1"),
            _check_attention,
            _msa_weights,
            lambda block: block.attn.num_heads,
            _live_attention,
        ),
        ffn_part(("norm2", "mlp", "ls2", "drop_path2"), _check_mlp, _ffn_weights),
    ),
    _call_block,
)


def _fusion_block(block: Any, branch: int) -> Any:
    """Return the cross-attention block of a branch: alone, or in a Sequential."""
    fusion = block.fusion[branch]
    return fusion[0] if isinstance(fusion, torch.nn.Sequential) else fusion


def _check_fusions(block: Any) -> None:
    looking.only(block, "", "blocks", "projs", "fusion", "revert_projs")
    if len(block.projs) != len(block.fusion) or block.num_branches != len(block.fusion):
        raise Declined("it has branches without a fusion")
    for i in range(block.num_branches):
        fusion = block.fusion[i]
        if isinstance(fusion, torch.nn.Sequential) and len(fusion) != 1:
            raise Declined(f"fusion.{i} has {len(fusion)} cross-attention blocks")
        eps = set()
        for lifts in ("projs", "revert_projs"):
            lift = getattr(block, lifts)[i]
            looking.only(lift, f"{lifts}.{i}", "0", "1", "2")
            eps.add(looking.norm(lift, "0").eps)
            looking.gelu(lift[1], f"{lifts}.{i}.1")
            looking.linear(lift, "2", bias=True)
        one = _fusion_block(block, i)
        looking.only(one, f"fusion.{i}", "norm1", "attn", "drop_path")
        looking.drop_path(one, "drop_path")
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
        rate = looking.drop_path_rate(one.drop_path)
        cls = functional.cross_attention_fusion(
            own[:, 0],
            other[:, 1:],
            weights,
            one.attn.num_heads,
            one.norm1.eps,
            drop_path_scale(own.shape[0], rate, True, like=own),
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
