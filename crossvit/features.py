"""Feature maps of every multi-scale block, with timm's interface for backbones."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from crossvit.configs import Config, Size, scale_of_l_branch
from crossvit.fusion import Branch

Indices = int | Sequence[int] | None


class IntermediateFeatures:
    """``forward_intermediates``, ``feature_info`` and ``prune_intermediate_layers`` as in timm.

    A model of K multi-scale blocks has 2 K features: those of the S branch after each block, then
    those of the L branch, so that strides grow as in a pyramid. Feature ``b * K + k`` is branch b's
    after block k. timm's ``FeatureGetterNet`` and what is built on it take the model.
    """

    config: Config
    blocks: Any
    norm: Any
    embed: Callable[[Any], Sequence[Branch]]
    reset_classifier: Callable[[int], None]
    grid_sizes_of: Callable[[Any], Sequence[Size]]
    _after_blocks: Callable[[Any], Iterator[Sequence[Branch]]]
    _normed: Callable[[Any], list[Tensor]]

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """A dict for each feature: channels, pixels per patch, and where it is computed.

        ``num_chs`` is C; ``reduction`` the side of a patch in pixels of the images passed to the
        model, a fraction where the L branch sees them smaller; ``module`` the block's name;
        ``branch`` and ``block`` are b and k.
        """
        return [
            {
                "num_chs": self.config.dims[b],
                "reduction": _reduction(self.config, b),
                "module": f"blocks.{k}",
                "branch": b,
                "block": k,
            }
            for b in (0, 1)
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
            return_prefix_tokens: Also return each feature's CLS [B, 1, C], in a tuple with it;
                [B, 0, C] without CLS tokens.
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
        branches, found = self._take(x, numbers, norm, stop_early)
        if output_fmt == "NCHW":
            grids = self.grid_sizes_of(x)
            features = [
                taken.patches.transpose(1, 2).unflatten(2, grids[taken.branch]).contiguous()
                for taken in found
            ]
        else:
            features = [taken.patches for taken in found]
        prefixes = [taken.prefix_tokens for taken in found]
        result: dict[str, Any] = {"image_intermediates": features}
        if output_dict and return_prefix_tokens:
            result["image_intermediates_prefix"] = prefixes
        if not intermediates_only:
            result["image_features"] = self._normed(branches)
        if output_dict:
            return result
        pairs = list(zip(features, prefixes, strict=True)) if return_prefix_tokens else features
        return pairs if intermediates_only else (result["image_features"], pairs)

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
        self.config = dataclasses.replace(self.config, num_blocks=kept)
        if prune_norm:
            self.norm = nn.ModuleList(nn.Identity() for _ in self.norm)
        if prune_head:
            self.reset_classifier(0)
        return [number // num_blocks * kept + number % num_blocks for number in numbers]

    def _take(
        self, x: Tensor | Sequence[Tensor], numbers: list[int], norm: bool, stop_early: bool
    ) -> tuple[Sequence[Branch], list[_Feature]]:
        """Run the blocks; return what the last one computed, and the features by number."""
        num_blocks = len(self.blocks)
        last = max(number % num_blocks for number in numbers) if stop_early else num_blocks - 1
        found: dict[int, _Feature] = {}
        branches: Sequence[Branch] = self.embed(x)
        for k, after_block in enumerate(self._after_blocks(branches)):
            branches = after_block
            for b, branch in enumerate(branches):
                if (number := b * num_blocks + k) in numbers:
                    layer = self.norm[b] if norm else nn.Identity()
                    feature = layer(branch.patches), layer(branch.prefix_tokens)
                    found[number] = _Feature(b, *feature)
            if k == last:
                break
        return branches, [found[number] for number in sorted(found)]


class _Feature(NamedTuple):
    branch: int
    patches: Tensor  # [B, N, C]
    prefix_tokens: Tensor  # [B, 1, C]


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
            raise ValueError(
                f"indices: expected {-num_features} to {num_features - 1}, found {index}"
            )
        numbers.add(index % num_features)
    if not numbers:
        raise ValueError("indices: expected at least one feature, found none")
    return sorted(numbers)


def _reduction(config: Config, b: int) -> float:
    """Side of branch b's patch in pixels of the S branch's image."""
    patch = config.patch_sizes[b]
    if b == 0:
        return patch
    (numerator, denominator), _ = scale_of_l_branch(config.img_size)
    reduction = patch * denominator / numerator
    return int(reduction) if reduction.is_integer() else reduction
