"""Blocks with separate projections of q, k and v: transformers' ViT, DINOv2, CLIP, SigLIP."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from crossvit_kernels.ops.layernorm_msa.reference import MsaWeights
from crossvit_kernels.plug_in import calls, looking
from crossvit_kernels.plug_in.adapters.halves import Blocks, Half, packed, why_not_projections
from crossvit_kernels.plug_in.recipe import Declined

#: Configurations of text models, whose layers are the same class and attend to earlier tokens.
_CAUSAL = {f"{name}TextConfig" for name in ("CLIP", "CLIPSeg", "MetaClip2", "OwlViT", "Owlv2")}
_QKV = ("q_proj", "k_proj", "v_proj")


class SplitBlocks(Blocks):
    """transformers' layers; out: the name of attention's last projection."""

    def __init__(self, attention: Half, mlp: Half, out: str) -> None:
        super().__init__(attention, mlp, ("fc1", "activation_fn", "fc2"))
        self.out = out

    def check_attention(self, block: Any) -> None:
        path = self.attention.body
        attn = looking.child(block, path, _kind_beside(block, "Attention"))
        looking.only(attn, path, *_QKV, self.out)
        for name in (*_QKV, self.out):
            looking.linear(attn, name)
        if type(getattr(attn, "config", None)).__name__ in _CAUSAL:
            raise Declined("causal")

    def check_mlp(self, block: Any) -> None:
        looking.child(block, self.mlp.body, _kind_beside(block, "MLP"))

    def live_attention(self, block: Any) -> str | None:
        path = self.attention.body
        attn = block._modules[path]
        dim = looking.shape_of(block._modules[self.attention.norm])[0]
        dropout = getattr(attn, "dropout", getattr(attn, "attention_dropout", 0.0))
        if attn.training and dropout > 0:
            return f"{path} has dropout of {dropout} in training"
        if why := looking.why_not_implementation(attn):
            return why
        if why := why_not_projections(attn, dim, *_QKV, self.out):
            return why
        return looking.why_not_heads(attn, self.num_heads(block), dim, path) or self.live_mlp(block)

    def live_mlp(self, block: Any) -> str | None:
        checkpoints = getattr(block, "gradient_checkpointing", False) and block.training
        return "gradient checkpointing" if checkpoints else None

    def num_heads(self, block: Any) -> int:
        attn = block._modules[self.attention.body]
        heads = getattr(attn, "num_heads", None)
        return int(attn.num_attention_heads if heads is None else heads)

    def msa_weights(self, block: Any) -> MsaWeights:
        attn = block._modules[self.attention.body]
        qkv = packed(attn.q_proj, attn.k_proj, attn.v_proj)
        norm, out = block._modules[self.attention.norm], attn._modules[self.out]
        return MsaWeights(norm.weight, norm.bias, *qkv, out.weight, out.bias)

    def call(
        self,
        block: Any,
        found: list[Any],
        backend: str | None,
        hidden_states: Any,
        attention_mask: Any = None,
        *others: Any,
        **more: Any,
    ) -> Tensor | str:
        """Serve a block: a mask of keys, for torch's attention, is one for the kernels."""
        if others or not calls.fits(hidden_states, block._modules[self.attention.norm].weight):
            return ""
        attn = block._modules[self.attention.body]
        is_plain, key_mask = True, None
        if attention_mask is not None:
            if looking.implementation(attn) == "sdpa":
                key_mask = calls.key_mask_of(attention_mask, hidden_states)
            is_plain = key_mask is not None
        for value in more.values():  # positions, is_causal
            if value is not None and value is not False:
                is_plain = False

        def attend(normed: Tensor) -> Any:
            return attn(normed, attention_mask, **more)[0]

        return self.run(block, found, backend, hidden_states, attend, is_plain, key_mask)


def _kind_beside(block: Any, ending: str) -> str:
    """Return the name of the class that a layer's library calls like the layer, but for the end."""
    return looking.kind_of(block).removesuffix("Layer").removesuffix("Encoder") + ending


_VIT = SplitBlocks(
    Half("layernorm_before", "attention", ("dropout",)),
    Half("layernorm_after", "mlp", ("dropout",)),
    "o_proj",
)
_CLIP = SplitBlocks(Half("layer_norm1", "self_attn"), Half("layer_norm2", "mlp"), "out_proj")
_DINO = SplitBlocks(
    Half("norm1", "attention", ("layer_scale1", "drop_path")),
    Half("norm2", "mlp", ("layer_scale2", "drop_path")),
    "o_proj",
)

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
    "chinese_clip.modeling_chinese_clip.ChineseCLIPVisionLayer": _CLIP,
    "clipseg.modeling_clipseg.CLIPSegEncoderLayer": _CLIP,
    "owlvit.modeling_owlvit.OwlViTEncoderLayer": _CLIP,
    "owlv2.modeling_owlv2.Owlv2EncoderLayer": _CLIP,
    "dinov2.modeling_dinov2.Dinov2Layer": _DINO,
    "dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersLayer": _DINO,
    "radio.modeling_radio.RadioLayer": _DINO,
    "tipsv2.modeling_tipsv2.Tipsv2VisionLayer": _DINO,
}

RECIPES = tuple(
    layout.recipe(f"transformers.models.{target}") for target, layout in _MODELS.items()
)
