"""Blocks with separate projections of q, k and v: transformers' ViT, DeiT, CLIP, SigLIP."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from crossvit_kernels.modules import plain_layers
from crossvit_kernels.ops.layernorm_ffn.reference import FfnWeights
from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.adapters.halves import (
    ffn_part,
    msa_part,
    packed,
    why_not_projections,
)
from crossvit_kernels.plug_in.recipe import Declined, Recipe

#: Implementations of attention in transformers that compute the same without a mask.
_IMPLEMENTATIONS = {
    None,
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
}
_QKV = ("q_proj", "k_proj", "v_proj")


class _Names(NamedTuple):
    """What a library calls the children of a block."""

    attn: str
    out: str
    norm1: str
    norm2: str
    mlp: str
    act: str
    dropout: tuple[str, ...] = ()  # applied to both updates, called where a half is not served


def _recipe(target: str, n: _Names) -> Recipe:
    """Return the recipe of a block whose forward is that of a pre-norm transformer."""
    every = (n.attn, n.norm1, n.norm2, n.mlp, *n.dropout)

    def check_attention(block: Any) -> None:
        looking.only(block, "", *every)
        looking.norm(block, n.norm1)
        attn = looking.child(block, n.attn)
        looking.only(attn, n.attn, *_QKV, n.out)
        for name in _QKV:
            looking.linear(attn, name)
        looking.linear(attn, n.out, bias=True)
        config = getattr(attn, "config", None)
        if getattr(attn, "is_causal", False) or type(config).__name__ in _CAUSAL:
            raise Declined("causal")

    def live_attention(block: Any) -> str | None:
        attn = block._modules[n.attn]
        dim = looking.shape_of(block._modules[n.norm1])[0]
        dropout = getattr(attn, "dropout", getattr(attn, "attention_dropout", 0.0))
        if attn.training and dropout > 0:
            return f"{n.attn} has dropout of {dropout} in training"
        implementation = getattr(attn.config, "_attn_implementation", None)
        if implementation not in _IMPLEMENTATIONS:
            return f"attention is computed by {implementation!r}"
        if why := why_not_projections(attn, dim, *_QKV, n.out):
            return why
        return looking.why_not_heads(attn, _heads(attn), dim, n.attn) or _live(block)

    def msa_weights(block: Any) -> MsaWeights:
        attn = block._modules[n.attn]
        qkv = packed(attn.q_proj, attn.k_proj, attn.v_proj)
        norm, out = block._modules[n.norm1], attn._modules[n.out]
        return MsaWeights(norm.weight, norm.bias, *qkv, out.weight, out.bias)

    def check_mlp(block: Any) -> None:
        looking.only(block, "", *every)
        looking.norm(block, n.norm2)
        mlp = looking.child(block, n.mlp)
        looking.only(mlp, n.mlp, "fc1", n.act, "fc2")
        looking.linear(mlp, "fc1", bias=True)
        looking.linear(mlp, "fc2", bias=True)
        looking.gelu(getattr(mlp, n.act, None), f"{n.mlp}.{n.act}")

    def ffn_weights(block: Any) -> FfnWeights:
        mlp = block._modules[n.mlp]
        layers = (block._modules[n.norm2], mlp.fc1, mlp.fc2)
        return FfnWeights(*plain_layers.parameters(*layers))

    def call(
        block: Any,
        parts: list[bool],
        backend: str | None,
        hidden_states: Any,
        attention_mask: Any = None,
        *others: Any,
        **more: Any,
    ) -> Tensor | str:
        norm1, norm2 = block._modules[n.norm1], block._modules[n.norm2]
        if others or not calls.fits(hidden_states, norm1.weight):
            return ""
        serves_attention = parts[0] and attention_mask is None
        for value in more.values():  # positions, is_causal
            if value is not None and value is not False:
                serves_attention = False
        if not serves_attention and not parts[1]:
            return ""
        x: Any = hidden_states
        if serves_attention:
            heads = _heads(block._modules[n.attn])
            y: Any = calls.msa(x, msa_weights(block), heads, norm1.eps, backend)
            if isinstance(y, str):
                return y
        else:
            update = block._modules[n.attn](norm1(x), attention_mask, **more)[0]
            y = x + _dropped(block, n, update)
        if parts[1]:
            return calls.ffn(y, ffn_weights(block), norm2.eps, backend)
        return y + _dropped(block, n, block._modules[n.mlp](norm2(y)))

    return Recipe(
        target,
        (
            msa_part(
                (n.norm1, n.attn, *n.dropout),
                check_attention,
                msa_weights,
                lambda block: _heads(block._modules[n.attn]),
                live_attention,
            ),
            ffn_part((n.norm2, n.mlp, *n.dropout), check_mlp, ffn_weights, _live),
        ),
        call,
    )


#: Configurations of text models, whose layers are the same class and attend to earlier tokens.
_CAUSAL = {"CLIPTextConfig", "MetaClip2TextConfig"}


def _heads(attention: Any) -> int:
    heads = getattr(attention, "num_heads", None)
    return int(attention.num_attention_heads if heads is None else heads)


def _live(block: Any) -> str | None:
    checkpoints = getattr(block, "gradient_checkpointing", False) and block.training
    return "gradient checkpointing" if checkpoints else None


def _dropped(block: nn.Module, n: _Names, update: Any) -> Any:
    for name in n.dropout:
        update = block._modules[name](update)  # type: ignore[misc]
    return update


_VIT = _Names(
    "attention",
    "o_proj",
    "layernorm_before",
    "layernorm_after",
    "mlp",
    "activation_fn",
    ("dropout",),
)
_CLIP = _Names("self_attn", "out_proj", "layer_norm1", "layer_norm2", "mlp", "activation_fn")

_MODELS = {
    "vit.modeling_vit.ViTLayer": _VIT,
    "deit.modeling_deit.DeiTLayer": _VIT,
    "vit_msn.modeling_vit_msn.ViTMSNLayer": _VIT,
    "clip.modeling_clip.CLIPEncoderLayer": _CLIP,
    "siglip.modeling_siglip.SiglipEncoderLayer": _CLIP,
    "siglip2.modeling_siglip2.Siglip2EncoderLayer": _CLIP,
    "vit_mae.modeling_vit_mae.ViTMAELayer": _VIT,
    "ijepa.modeling_ijepa.IJepaLayer": _VIT,
    "vivit.modeling_vivit.VivitLayer": _VIT,
    "audio_spectrogram_transformer.modeling_audio_spectrogram_transformer.ASTLayer": _VIT,
    "altclip.modeling_altclip.AltCLIPEncoderLayer": _CLIP,
    "metaclip_2.modeling_metaclip_2.MetaClip2EncoderLayer": _CLIP,
}

RECIPES = tuple(
    _recipe(f"transformers.models.{target}", names) for target, names in _MODELS.items()
)
