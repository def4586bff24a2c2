"""Blocks and pools that no function here computes, with the reason."""

from __future__ import annotations

_ROPE = "RoPE"
_BIAS = "a relative position bias"
_WINDOWS = "windowed attention"
_POST = "norms after attention and MLP"
_PARALLEL = "attention and MLP in parallel"
_CHANNELS = "attention over channels"
_TALKING = "talking heads"

_TIMM = {
    "vision_transformer.ResPostBlock": _POST,
    "vision_transformer.ParallelScalingBlock": _PARALLEL,
    "vision_transformer.ParallelThingsBlock": _PARALLEL,
    "vision_transformer.DiffParallelScalingBlock": _PARALLEL,
    "vision_transformer_relpos.RelPosBlock": _BIAS,
    "vision_transformer_relpos.ResPostRelPosBlock": _BIAS,
    "vision_transformer_sam.Block": _BIAS,
    "beit.Block": _BIAS,
    "eva.EvaBlock": "attention of its own, most with RoPE",
    "eva.EvaBlockPostNorm": _POST,
    "swin_transformer.SwinTransformerBlock": _WINDOWS,
    "swin_transformer_v2.SwinTransformerV2Block": _WINDOWS,
    "swin_transformer_v2_cr.SwinTransformerV2CrBlock": _WINDOWS,
    "maxxvit.PartitionAttentionCl": _WINDOWS,
    "maxxvit.PartitionAttention2d": _WINDOWS,
    "maxxvit.MaxxVitBlock": _WINDOWS,
    "maxxvit.ParallelPartitionAttention": _WINDOWS,
    "maxxvit.TransformerBlock2d": _BIAS,
    "hiera.HieraBlock": "mask units and pooled queries",
    "mvitv2.MultiScaleBlock": _BIAS,
    "pvt_v2.Block": "keys of a reduced map",
    "twins.Block": _WINDOWS,
    "nest.TransformerLayer": _WINDOWS,
    "tnt.Block": "attention inside patches",
    "convit.Block": "gated positional attention",
    "cait.LayerScaleBlock": _TALKING,
    "xcit.XCABlock": _CHANNELS,
    "davit.SpatialBlock": _WINDOWS,
    "davit.ChannelBlock": _CHANNELS,
    "volo.Transformer": "a map of tokens [B, H, W, C]",
    "volo.Outlooker": "outlook attention",
    "levit.LevitStage": _BIAS,
    "edgenext.SplitTransposeBlock": _CHANNELS,
    "visformer.Block": "attention by convolutions",
    "tiny_vit.TinyVitBlock": _WINDOWS,
}
_TIMM_LAYERS = {
    "attention_pool2d.RotAttentionPool2d": _ROPE,
    "attention_pool.AttentionPoolPrr": "no projections",
}
_TRANSFORMERS = {
    "beit.modeling_beit.BeitLayer": _BIAS,
    "data2vec.modeling_data2vec_vision.Data2VecVisionLayer": _BIAS,
    "swin.modeling_swin.SwinLayer": _WINDOWS,
    "swinv2.modeling_swinv2.Swinv2Layer": _WINDOWS,
    "hiera.modeling_hiera.HieraLayer": "mask units and pooled queries",
    "bert.modeling_bert.BertLayer": _POST,
    "dinov3_vit.modeling_dinov3_vit.DINOv3ViTLayer": _ROPE,
    "vjepa2.modeling_vjepa2.VJEPA2Layer": _ROPE,
    "vjepa2.modeling_vjepa2.VJEPA2PoolerSelfAttentionLayer": "it also returns attention weights",
    "aimv2.modeling_aimv2.Aimv2EncoderLayer": "RMSNorm and a gated MLP",
    "llama.modeling_llama.LlamaDecoderLayer": _ROPE,
    "idefics2.modeling_idefics2.Idefics2MultiheadAttentionPoolingHead": "a mask of several tokens",
}
_TORCHVISION = {
    "swin_transformer.SwinTransformerBlock": _WINDOWS,
    "swin_transformer.SwinTransformerBlockV2": _WINDOWS,
    "maxvit.PartitionAttentionLayer": _WINDOWS,
}

#: By the name of the class.
REASONS = {
    **{f"timm.models.{name}": reason for name, reason in _TIMM.items()},
    **{f"timm.layers.{name}": reason for name, reason in _TIMM_LAYERS.items()},
    **{f"transformers.models.{name}": reason for name, reason in _TRANSFORMERS.items()},
    **{f"torchvision.models.{name}": reason for name, reason in _TORCHVISION.items()},
    "torch.nn.modules.transformer.TransformerDecoderLayer": "causal, with cross-attention",
    "torch.nn.modules.transformer.TransformerEncoderLayer": "torch has a fast path of its own",
    "open_clip.transformer.CustomResidualAttentionBlock": "qk-norm, scaled heads, norms inside",
}
