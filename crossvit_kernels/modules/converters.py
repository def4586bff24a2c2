"""Converts modules of timm and transformers to options and weights of ours.

State dicts do not contain activations, eps or scales. Each function here inspects the module
itself, and rejects one that computes what ours does not. Neither library is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from crossvit_kernels.modules import plain_layers

Converted = tuple[dict[str, Any], dict[str, Tensor]]  # options of our module, its state dict
Module = TypeVar("Module", bound=nn.Module)


def load(module: Module, state: dict[str, Tensor], source: nn.Module) -> Module:
    """Load the state into the module, with the dtype, device and mode of the source."""
    like = next(source.parameters())
    module.to(like.device, like.dtype)
    module.load_state_dict(state, strict=True)
    return module.train(source.training)


def timm_block(block: nn.Module) -> Converted:
    """Convert ``vision_transformer.Block`` to a TransformerBlock; ``eps2`` is that of norm2."""
    source = _Source(block, ("Block",), "vision_transformer")
    source.has_only("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
    attn = source.child("attn")
    attn.has_only("qkv", "proj", "attn_drop")
    eps1, norm1 = source.norm("norm1")
    eps2, norm2 = source.norm("norm2")
    qkv, proj = attn.linear("qkv"), attn.linear("proj", bias=True)
    scales = source.layer_scale("ls1") | source.layer_scale("ls2")
    source.require(len(scales) != 1, "has layer scale in one half")
    rates = {source.drop_path("drop_path1"), source.drop_path("drop_path2")}
    source.require(len(rates) == 1, f"has two rates of drop path, {rates}")
    dim = norm1["norm1.weight"].shape[0]
    options = {
        "dim": dim,
        "num_heads": attn.heads(dim),
        "qkv_bias": "qkv.bias" in qkv,
        "eps": eps1,
        "eps2": eps2,
        "attn_drop": attn.dropout("attn_drop"),
        "drop_path": rates.pop(),
        "init_values": 1.0 if scales else None,
    }
    mlp_options, mlp = _mlp(source.child("mlp"), "act")
    options |= {"act": mlp_options["act"], "mlp_ratio": (mlp_options["hidden_dim"] + 0.5) / dim}
    layers = _under("attn", qkv | proj) | _under("mlp", mlp)
    return options, norm1 | norm2 | scales | layers


#: timm's arguments of a block that this library has no kernels for -> what they may be.
_TIMM_OPTIONS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("qk_norm", "scale_attn_norm", "scale_mlp_norm"), lambda value: not value),
    "proj_drop": lambda value: value == 0,
    "attn_layer": lambda value: (
        getattr(value, "__name__", value) in (None, "", "attn", "Attention")
    ),
    "mlp_layer": lambda value: getattr(value, "__name__", value) in (None, "Mlp"),
    "depth": lambda value: True,
}


def refuse_timm_options(options: Mapping[str, Any]) -> None:
    """Raise unless timm's further arguments of a block ask for nothing.

    Raises:
        ValueError: One asks for what the block here cannot compute.
        TypeError: There is no such argument.
    """
    for name, value in options.items():
        if name not in _TIMM_OPTIONS:
            raise TypeError(f"TransformerBlock has no argument {name!r}")
        if not _TIMM_OPTIONS[name](value):
            raise ValueError(f"{name}: TransformerBlock cannot compute {name}={value!r}")


def norm_options(norm_layer: Callable[..., nn.Module], dim: int) -> tuple[float, bool]:
    """Return eps and whether there is a bias of the LayerNorm that norm_layer(dim) makes.

    Raises:
        ValueError: It makes another layer.
    """
    norm = norm_layer(dim)
    if not _is_layer_norm(norm):
        raise ValueError(f"norm_layer: expected one that makes a LayerNorm, found {norm}")
    return float(norm.eps), norm.bias is not None  # type: ignore[arg-type]


def made_activation(act_layer: Callable[[], nn.Module]) -> str:
    """Return the name of the activation that act_layer() makes.

    Raises:
        ValueError: It is none of those here.
    """
    layer = act_layer()
    name = activation_name(layer)
    if name is None:
        raise ValueError(f"act_layer: expected one of {tuple(_ACTIVATIONS)}, found {layer}")
    return name


def _is_layer_norm(norm: Any) -> bool:
    known = isinstance(norm, nn.LayerNorm) and type(norm).__name__ == "LayerNorm"
    return known and norm.weight is not None


def timm_fusion(block: nn.Module, branch: int) -> Converted:
    """Convert one branch of ``crossvit.MultiScaleBlock`` to a CrossAttentionFusion."""
    source = _Source(block, ("MultiScaleBlock",), "crossvit")
    if branch not in (0, 1):
        raise ValueError(f"branch: expected 0 or 1, found {branch!r}")
    state: dict[str, Tensor] = {}
    eps = set()
    for ours, theirs in (("proj", "projs"), ("revert_proj", "revert_projs")):
        lift = source.child(theirs).child(str(branch))
        lift.has_only("0", "1", "2")
        lift.require(activation_name(lift.module[1]) == "gelu", "has another activation than GELU")
        norm_eps, norm = lift.norm("0")
        eps.add(norm_eps)
        state |= _under(ours, norm | lift.linear("2", bias=True))
    fusion = source.child("fusion").child(str(branch))
    if isinstance(fusion.module, nn.Sequential):
        fusion.require(len(fusion.module) == 1, "has several cross-attention blocks")
        fusion = fusion.child("0")
    fusion.has_only("norm1", "attn", "drop_path")
    attn = fusion.child("attn")
    attn.has_only("wq", "wk", "wv", "proj", "attn_drop")
    norm_eps, norm = fusion.norm("norm1")
    eps.add(norm_eps)
    source.require(len(eps) == 1, f"has LayerNorms of different eps, {eps}")
    projections = {k: t for name in ("wq", "wk", "wv") for k, t in attn.linear(name).items()}
    dim, cls_dim = state["proj.2.weight"].shape
    options = {
        "dim_own": cls_dim,
        "dim": dim,
        "num_heads": attn.heads(dim),
        "qkv_bias": "wq.bias" in projections,
        "eps": eps.pop(),
        "attn_drop": attn.dropout("attn_drop"),
        "drop_path": fusion.drop_path("drop_path"),
    }
    attn_state = _under("attn", projections | attn.linear("proj", bias=True))
    return options, state | _under("fusion", norm | attn_state)


def timm_class_attention(attention: nn.Module) -> Converted:
    """Convert ``cait.ClassAttn`` to a ClassAttention."""
    source = _Source(attention, ("ClassAttn",), "cait")
    source.has_only("q", "k", "v", "proj", "attn_drop")
    state = {k: t for name in ("q", "k", "v") for k, t in source.linear(name).items()}
    dim = state["q.weight"].shape[0]
    options = {
        "dim": dim,
        "num_heads": source.heads(dim),
        "qkv_bias": "q.bias" in state,
        "attn_drop": source.dropout("attn_drop"),
    }
    return options, state | source.linear("proj", bias=True)


def timm_latent_pool(pool: nn.Module) -> Converted:
    """Convert ``AttentionPoolLatent`` to a MAPHead."""
    source = _Source(pool, ("AttentionPoolLatent",), "attention_pool")
    source.has_only("q", "kv", "proj", "norm", "mlp")
    module = source.module
    source.require(module.pos_embed is None, "has a position embedding")
    source.require(module.latent_len == 1, f"has {module.latent_len} latents")
    source.require(module.pool in ("token", "avg"), f"pools {module.pool!r}, keeping its latents")
    source.require(module.mlp is not None, "has no MLP")
    q, kv = source.linear("q", bias=True), source.linear("kv", bias=True)
    proj = source.linear("proj", bias=True)
    dim = module.latent.shape[-1]
    square = q["q.weight"].shape == proj["proj.weight"].shape == (dim, dim)
    source.require(square, "has other widths inside or after")
    eps, norm = source.norm("norm")
    mlp_options, mlp = _mlp(source.child("mlp"), "act")
    options = {"dim": dim, "num_heads": source.heads(dim), "eps": eps, **mlp_options}
    attention = {
        "in_proj_weight": torch.cat([q["q.weight"], kv["kv.weight"]]),
        "in_proj_bias": torch.cat([q["q.bias"], kv["kv.bias"]]),
        "out_proj.weight": proj["proj.weight"],
        "out_proj.bias": proj["proj.bias"],
    }
    norm = {key.replace("norm.", "layernorm."): t for key, t in norm.items()}
    state = {"probe": module.latent.detach(), **norm}
    return options, state | _under("attention", attention) | _under("mlp", mlp)


def transformers_map_head(head: nn.Module) -> Converted:
    """Convert ``Siglip[2]MultiheadAttentionPoolingHead`` to a MAPHead."""
    names = [f"Siglip{version}MultiheadAttentionPoolingHead" for version in ("", "2")]
    source = _Source(head, (*names, "SiglipVisionMultiheadAttentionPoolingHead"), "")
    source.has_only("attention", "layernorm", "mlp")
    attention = source.child("attention")
    attention.has_only("out_proj")
    torch_attention = attention.module
    plain = (
        type(torch_attention) is nn.MultiheadAttention
        and torch_attention.in_proj_weight is not None
        and torch_attention.in_proj_bias is not None
        and torch_attention.bias_k is None
        and not torch_attention.add_zero_attn
        and torch_attention.dropout == 0
    )
    attention.require(plain, "is not torch's attention without dropout and keys of its own")
    eps, norm = source.norm("layernorm")
    mlp_options, mlp = _mlp(source.child("mlp"), "activation_fn")
    options = {
        "dim": source.module.probe.shape[-1],
        "num_heads": torch_attention.num_heads,
        "eps": eps,
        "empty": "mean" if type(head).__name__.startswith("Siglip2") else "zeros",
        **mlp_options,
    }
    state = {"probe": source.module.probe.detach(), **norm}
    attention_state = {k: t.detach() for k, t in torch_attention.state_dict().items()}
    return options, state | _under("attention", attention_state) | _under("mlp", mlp)


def transformers_probe(pooler: nn.Module) -> Converted:
    """Convert ``VJEPA2AttentivePooler`` without self-attention layers to an AttentiveProbe."""
    source = _Source(pooler, ("VJEPA2AttentivePooler",), "")
    source.has_only("cross_attention_layer", "self_attention_layers")
    layers = len(source.module.self_attention_layers)
    source.require(layers == 0, f"has {layers} self-attention layers before it")
    layer = source.child("cross_attention_layer")
    layer.has_only("layer_norm1", "cross_attn", "layer_norm2", "mlp")
    attn = layer.child("cross_attn")
    attn.has_only("q_proj", "k_proj", "v_proj")
    attn.require(attn.module.dropout == 0, f"has dropout={attn.module.dropout}")
    (eps, norm1), (eps2, norm2) = layer.norm("layer_norm1"), layer.norm("layer_norm2")
    layer.require(eps == eps2, f"has LayerNorms of different eps, {eps} and {eps2}")
    mlp_options, mlp = _mlp(layer.child("mlp"), "activation")
    layer.require(mlp_options["act"] == "gelu", "has another activation than GELU")
    q, k, v = (attn.linear(f"{name}_proj", bias=True) for name in "qkv")
    dim = q["q_proj.weight"].shape[0]
    xattn = {
        **{f"q.{kind}": q[f"q_proj.{kind}"] for kind in ("weight", "bias")},
        **{
            f"kv.{kind}": torch.cat([k[f"k_proj.{kind}"], v[f"v_proj.{kind}"]])
            for kind in ("weight", "bias")
        },
    }
    norms = {key.replace("layer_norm", "norm"): t for key, t in (norm1 | norm2).items()}
    options = {
        "dim": dim,
        "num_heads": attn.heads(dim),
        "num_queries": source.module.query_tokens.shape[1],
        "mlp_ratio": (mlp_options["hidden_dim"] + 0.5) / dim,
        "out_proj": False,
        "eps": eps,
    }
    block = norms | _under("xattn", xattn) | _under("mlp", mlp)
    state = {"query_tokens": source.module.query_tokens.detach()}
    return options, state | _under("cross_attention_block", block)


class _Source:
    """An inspected module, with its path for messages."""

    def __init__(self, module: Any, names: Iterable[str], file: str, path: str = "") -> None:
        kind = type(module)
        expected = [*names]
        if expected and (kind.__name__ not in expected or not kind.__module__.endswith(file)):
            where = f" of a module {file}" if file else ""
            raise TypeError(
                f"expected a {' or '.join(expected)}{where}, found {kind.__module__}."
                f"{kind.__name__}"
            )
        self.module, self.path = module, path or kind.__name__
        if not path:
            self._require_plain_calls()

    def _require_plain_calls(self) -> None:
        for name, module in self.module.named_modules():
            if reason := plain_layers.why_not_called_plainly(module):
                raise ValueError(f"{'.'.join(filter(None, (self.path, name)))} {reason}")

    def child(self, name: str) -> _Source:
        module = self.module._modules.get(name)
        self.require(module is not None, f"has no {name}")
        return _Source(module, (), "", f"{self.path}.{name}")

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise ValueError(f"{self.path}: {what}, which the module here cannot compute")

    def has_only(self, *known: str) -> None:
        """Require that no other children than these are active."""
        for name, child in self.module._modules.items():
            idle = (
                child is None
                or isinstance(child, nn.Identity)
                or (isinstance(child, nn.Dropout) and child.p == 0)
            )
            self.require(name in known or idle, f"has {name} = {child}")

    def norm(self, name: str) -> tuple[float, dict[str, Tensor]]:
        """Return (eps, state) of a LayerNorm with weight and bias; timm has its own class."""
        norm: Any = self.module._modules.get(name)
        if not _is_layer_norm(norm) or norm.bias is None:
            raise ValueError(f"{self.path}.{name}: expected a LayerNorm with bias, found {norm}")
        return float(norm.eps), _under(name, _parameters(norm))

    def linear(self, name: str, bias: bool = False) -> dict[str, Tensor]:
        """Return the state of a Linear; bias: whether it must have one."""
        layer = self.module._modules.get(name)
        if not isinstance(layer, nn.Linear) or not type(layer).__module__.startswith("torch.nn"):
            raise ValueError(f"{self.path}.{name}: expected an nn.Linear, found {layer}")
        self.require(layer.bias is not None or not bias, f"has no bias in {name}")
        return _under(name, _parameters(layer))

    def heads(self, dim: int) -> int:
        num_heads: int = self.module.num_heads
        scale = (dim // num_heads) ** -0.5
        actual = getattr(self.module, "scale", scale)
        self.require(abs(actual - scale) < 1e-12, f"has scale={actual} and not {scale}")
        width = getattr(self.module, "head_dim", dim // num_heads)
        self.require(width * num_heads == dim, f"has {num_heads} heads of width {width}")
        return num_heads

    def dropout(self, name: str) -> float:
        layer = self.module._modules.get(name)
        return float(layer.p) if isinstance(layer, nn.Dropout) else 0.0

    def layer_scale(self, name: str) -> dict[str, Tensor]:
        """Return the state of timm's LayerScale; nothing if there is none."""
        layer = self.module._modules.get(name)
        if layer is None or isinstance(layer, nn.Identity):
            return {}
        gamma = layer._parameters.get("gamma")
        known = type(layer).__name__ == "LayerScale" and gamma is not None
        self.require(known, f"has {name} = {layer}")
        return {} if gamma is None else {f"{name}.gamma": gamma.detach()}

    def drop_path(self, name: str) -> float:
        layer = self.module._modules.get(name)
        if layer is None or isinstance(layer, nn.Identity):
            return 0.0
        rate = getattr(layer, "drop_prob", None)
        known = rate is not None and getattr(layer, "scale_by_keep", True)
        self.require(known, f"has {name} = {layer}")
        return float(rate or 0.0)


def _mlp(source: _Source, act: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return ({act, hidden_dim}, state) of Linear, activation, Linear."""
    source.has_only("fc1", act, "fc2")
    fc1, fc2 = source.linear("fc1", bias=True), source.linear("fc2", bias=True)
    activation = getattr(source.module, act, None)
    name = activation_name(activation)
    source.require(name is not None, f"has {act} = {activation}")
    return {"act": name, "hidden_dim": fc1["fc1.weight"].shape[0]}, fc1 | fc2


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


#: Far values, as some activations are clipped.
_FAR = (8.0, 12.0, 20.0, 100.0, 1e4)


def activation_name(activation: Any) -> str | None:
    """Identify an activation by its values, as each has many names; None if it is not ours.

    One with parameters or buffers, which may change or be trained, is not ours whatever its values.
    """
    if isinstance(activation, nn.Module) and [*activation.parameters(), *activation.buffers()]:
        return None
    # Modes, such as those of fake tensors and of default devices, leave a tensor without values.
    with torch.no_grad(), torch._C.DisableTorchFunction(), _disable_current_modes():
        near = torch.linspace(-6, 6, 241, dtype=torch.float64, device="cpu")
        far = torch.tensor(_FAR, dtype=torch.float64, device="cpu")
        x = torch.cat([near, far, -far])
        try:
            y = activation(x.clone())
        except Exception:  # third-party code may raise anything
            return None
        if not isinstance(y, Tensor) or (y.shape, y.dtype) != (x.shape, x.dtype):
            return None
        for name, ours in _ACTIVATIONS.items():
            if torch.allclose(y, ours(x), 1e-12, 1e-12):
                return name
    return None


def _parameters(layer: Any) -> dict[str, Tensor]:
    tensors = {"weight": layer.weight, "bias": layer.bias}
    return {key: t.detach() for key, t in tensors.items() if t is not None}


def _under(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{key}": t for key, t in state.items()}
