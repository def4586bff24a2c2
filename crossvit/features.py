"""Feature maps of every block, with timm's interface for backbones."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from crossvit.configs import Config, VitConfig, scale_of_l_branch
from crossvit.fusion.branch import Branch

Indices = int | Sequence[int] | None


class IntermediateFeatures:
    """``forward_intermediates``, ``feature_info`` and ``prune_intermediate_layers`` as in timm.

    A CrossViT of K multi-scale blocks has 2 K features: those of the S branch after each block,
    then those of the L branch, so that strides grow as in a pyramid; feature ``b * K + k`` is
    branch b's after block k. A plain vision transformer has one after each block. timm's
    ``FeatureGetterNet`` and what is built on it take the models.
    """

    config: Any
    blocks: Any
    norm: Any
    num_prefix_tokens: int
    reset_classifier: Callable[..., None]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """A dict for each feature: channels, pixels per patch, and where it is computed.

        ``num_chs`` is C; ``reduction`` the side of a patch in pixels of the images passed to the
        model, a fraction where the L branch sees them smaller; ``module`` the block's name;
        ``branch`` and ``block`` are b and k.
        """
        return [
            {
                "num_chs": dim,
                "reduction": reduction,
                "module": f"blocks.{k}",
                "branch": b,
                "block": k,
            }
            for b, (dim, reduction) in enumerate(_widths_and_reductions(self.config))
            for k in range(len(self.blocks))
        ]

    def forward_intermediates(
        self,
        x: Tensor | Sequence[Tensor],
        indices: Indices = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Compute the features of several blocks, in timm's convention.

        Args:
            x: Images as ``forward`` takes them.
            indices: The features, numbered as in ``feature_info``; negative ones count from the
                end. An int n: the last n. None: all.
            return_prefix_tokens: Also return each feature's CLS [B, 1, C], in a tuple with it, if
                the model has CLS tokens.
            norm: Apply the branch's last LayerNorm to the features.
            stop_early: Skip the blocks after the last one needed.
            output_fmt: "NCHW": maps [B, C, height, width]; "NLC": patch tokens [B, N, C].
            intermediates_only: Return the features alone.
            output_dict: Return a dict with ``image_intermediates``, ``image_features`` (unless
                intermediates_only) and ``image_intermediates_prefix`` (with return_prefix_tokens).

        Returns:
            The result of ``forward_features`` (after ``stop_early``: of the last block that ran),
            and the list of features in ascending order of their indices.

        Raises:
            ValueError: There is no such feature or format.
            TypeError: An index is not an int.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt: expected 'NCHW' or 'NLC', found {output_fmt!r}")
        numbers = take_indices(len(self.feature_info), indices)
        final, found = self._take(x, numbers, norm, stop_early, not intermediates_only)
        features = [f.as_map() if output_fmt == "NCHW" else f.patches for f in found]
        with_prefix = return_prefix_tokens and self.num_prefix_tokens > 0
        prefixes = [f.prefix_tokens for f in found] if with_prefix else []
        if output_dict:
            result: dict[str, Any] = {"image_intermediates": features}
            result |= {"image_intermediates_prefix": prefixes} if with_prefix else {}
            return result if intermediates_only else result | {"image_features": final}
        taken = list(zip(features, prefixes, strict=True)) if with_prefix else features
        return taken if intermediates_only else (final, taken)

    def prune_intermediate_layers(
        self, indices: Indices = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what ``forward_intermediates`` does not need for these features.

        Args:
            indices: As in ``forward_intermediates``. Blocks after the last one needed are removed.
            prune_norm: Also remove the last LayerNorms.
            prune_head: Also remove the heads.

        Returns:
            The indices of the same features in the smaller model.

        Raises:
            ValueError: There is no such feature.
            TypeError: An index is not an int.
        """
        num_blocks = len(self.blocks)
        numbers = take_indices(len(self.feature_info), indices)
        kept = 1 + max(number % num_blocks for number in numbers)
        self.blocks = self.blocks[:kept]
        size = {"num_blocks" if isinstance(self.config, Config) else "depth": kept}
        self.config = dataclasses.replace(self.config, **size)
        if prune_norm:
            branches = isinstance(self.norm, nn.ModuleList)
            identities = nn.ModuleList(nn.Identity() for _ in self._norms())
            self.norm = identities if branches else nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return [number // num_blocks * kept + number % num_blocks for number in numbers]

    def _norms(self) -> list[nn.Module]:
        """The last LayerNorm of each branch."""
        return list(self.norm) if isinstance(self.norm, nn.ModuleList) else [self.norm]

    def _run_blocks(self, x: Any) -> Iterator[Sequence[Branch]]:
        """Yield the branches of images after each block."""
        raise NotImplementedError

    def _final(self, branches: Sequence[Branch]) -> Any:
        """The result of ``forward_features`` from the branches after the last block."""
        raise NotImplementedError

    def _take(
        self, x: Any, numbers: list[int], norm: bool, stop_early: bool, with_final: bool
    ) -> tuple[Any, list[_Feature]]:
        """Run the blocks; return the final features, and the numbered ones in order."""
        num_blocks = len(self.blocks)
        last = max(number % num_blocks for number in numbers) if stop_early else num_blocks - 1
        found: dict[int, _Feature] = {}
        final = None
        for k, branches in enumerate(self._run_blocks(x)):
            for b, branch in enumerate(branches):
                if (number := b * num_blocks + k) in numbers:
                    layer = self._norms()[b] if norm else nn.Identity()
                    found[number] = _Feature(
                        branch.grid, layer(branch.patches), layer(branch.prefix_tokens)
                    )
            if k == last:
                final = self._final(branches) if with_final else None
                break
        return final, [found[number] for number in sorted(found)]


class _Feature(NamedTuple):
    grid: tuple[int, int]
    patches: Tensor  # [B, N, C]
    prefix_tokens: Tensor  # [B, 1, C]

    def as_map(self) -> Tensor:
        return self.patches.transpose(1, 2).unflatten(2, self.grid).contiguous()


def take_indices(num_features: int, indices: Indices) -> list[int]:
    """Return the numbers that indices in timm's convention stand for, in ascending order.

    Raises:
        ValueError: None of the features has this index.
        TypeError: An index is not an int.
    """
    if indices is None:
        return list(range(num_features))
    if isinstance(indices, int):
        if not 0 < indices <= num_features:
            raise ValueError(f"indices: expected 1 to {num_features} features, found {indices}")
        return list(range(num_features - indices, num_features))
    numbers = set()
    for index in indices:
        try:
            index = operator.index(index)
        except TypeError:
            raise TypeError(f"indices: expected ints, found {index!r}") from None
        if not -num_features <= index < num_features:
            expected = f"{-num_features} to {num_features - 1}"
            raise ValueError(f"indices: expected {expected}, found {index}")
        numbers.add(index % num_features)
    if not numbers:
        raise ValueError("indices: expected at least one feature, found none")
    return sorted(numbers)


def _widths_and_reductions(config: Config | VitConfig) -> list[tuple[int, float]]:
    """C of each branch, and the side of its patches in pixels of the first branch's image."""
    if isinstance(config, VitConfig):
        return [(config.dim, config.patch_size)]
    (numerator, denominator), _ = scale_of_l_branch(config.img_size)
    small, large = config.patch_sizes[0], config.patch_sizes[1] * denominator / numerator
    return [(config.dims[0], small), (config.dims[1], int(large) if large % 1 == 0 else large)]
