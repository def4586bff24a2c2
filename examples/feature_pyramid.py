"""Segment images with a feature pyramid on a CrossViT.

    python examples/feature_pyramid.py

The branches of a CrossViT give feature maps of two resolutions, which torchvision's
FeaturePyramidNetwork merges. A small model, trained from scratch, finds discs and squares in noise,
and is tested on larger images than it was trained on (dynamic_img_size), in a few minutes on two
cores.

FeaturePyramid is also a backbone for torchvision's detectors:

    RetinaNet(FeaturePyramid(create_model("crossvit_15", dynamic_img_size=True)), num_classes=91)
"""

from __future__ import annotations

import argparse
import sys
from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool
except ImportError:
    sys.exit("feature_pyramid.py needs torchvision, of the same release as torch")

from crossvit import Config, CrossViT

CLASSES = ("background", "disc", "square")
SMALL = Config(
    dims=(48, 96),
    num_heads=(3, 3),
    depths=(1, 2),
    mlp_ratios=(2.0, 2.0),
    num_blocks=2,
    patch_sizes=(6, 8),
    img_size=96,
)


class FeaturePyramid(nn.Module):
    """A CrossViT and a feature pyramid over its maps, as torchvision's detectors take it.

    Args:
        model: Its heads are removed. If it has ``dynamic_img_size``, images may have any size.
        out_channels: C of all maps.
        indices: The features to merge, as in ``CrossViT.forward_intermediates``, fine to coarse;
            None for those of both branches after the last block.
    """

    def __init__(
        self, model: CrossViT, out_channels: int = 256, indices: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        num_blocks = len(model.blocks)
        indices = (num_blocks - 1, 2 * num_blocks - 1) if indices is None else indices
        self.indices = model.prune_intermediate_layers(indices)
        self.body = model
        channels = [model.feature_info[i]["num_chs"] for i in self.indices]
        # Detectors want large objects on a coarser map: a pooled one more.
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=LastLevelMaxPool())
        self.out_channels = out_channels

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """X [B, 3, H, W] -> maps [B, out_channels, h, w] by name, fine to coarse."""
        features = self.body.forward_intermediates(
            x, indices=self.indices, norm=True, intermediates_only=True
        )
        named = OrderedDict((str(i), feature) for i, feature in enumerate(features))
        maps: OrderedDict[str, Tensor] = self.fpn(named)
        return maps


class Segmenter(nn.Module):
    """Class scores of every pixel: the sum of the pyramid's maps, and a convolution."""

    def __init__(self, pyramid: FeaturePyramid, num_classes: int) -> None:
        super().__init__()
        self.pyramid = pyramid
        self.head = nn.Conv2d(pyramid.out_channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """X [B, 3, H, W] -> logits [B, num_classes, H, W]."""
        finest, *coarser = self.pyramid(x).values()
        for level in coarser:
            finest = finest + resize(level, finest.shape[2:])
        return resize(self.head(F.relu(finest)), x.shape[2:])


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def draw_shapes(
    batch: int, height: int, width: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw images [B, 3, H, W] of noise with shapes of random colours, and classes [B, H, W]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=generator)

    images = uniform(-1, 1, batch, 3, height, width)
    classes = torch.zeros(batch, height, width, dtype=torch.int64)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    for image, labels in zip(images, classes, strict=True):
        for kind in (1, 2):
            radius = uniform(height / 10, height / 4, 1)
            dy = (y - uniform(0, height, 1)).abs()
            dx = (x - uniform(0, width, 1)).abs()
            distance = (dy.square() + dx.square()).sqrt() if kind == 1 else torch.maximum(dy, dx)
            inside = distance <= radius
            colour = uniform(0.5, 1.5, 3, 1) * (uniform(-1, 1, 3, 1) < 0).float().mul(2).sub(1)
            image[:, inside] = 0.3 * image[:, inside] + colour
            labels[inside] = kind
    return images, classes


def mean_iou(predicted: Tensor, classes: Tensor) -> float:
    """Intersection over union of the pixels of each class, averaged over the classes."""
    ious = []
    for kind in range(len(CLASSES)):
        ours, true = predicted == kind, classes == kind
        ious.append((ours & true).sum().item() / max((ours | true).sum().item(), 1))
    return sum(ious) / len(ious)


@torch.no_grad()
def evaluate(model: nn.Module, size: tuple[int, int]) -> float:
    """Return the mean IoU on held-out images of a size."""
    images, classes = draw_shapes(32, *size, torch.Generator().manual_seed(10**6))
    return mean_iou(model.eval()(images).argmax(dim=1), classes)


def train(options: argparse.Namespace) -> tuple[Segmenter, list[float]]:
    """Train from scratch; return the model and the loss of each step."""
    torch.manual_seed(options.seed)
    body = CrossViT(SMALL, use_fused=not options.eager, dynamic_img_size=True)
    model = Segmenter(FeaturePyramid(body, out_channels=64), len(CLASSES)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    losses = []
    for step in range(options.steps):
        images, classes = draw_shapes(options.batch, *SMALL_SIZE, generator)
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 50 == 0 or step + 1 == options.steps:
            print(f"step {step:4d}: loss {loss.item():.3f}", flush=True)
    return model, losses


SMALL_SIZE, LARGE_SIZE = (96, 96), (120, 144)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=200)
    add("--batch", type=int, default=16)
    add("--seed", type=int, default=0)
    add("--eager", action="store_true", help="without the kernels")
    add("--min-iou", type=float, default=0.45, help="exit status 1 below this, on both sizes")
    options = parser.parse_args(arguments)
    if options.steps < 1 or options.batch < 1:
        parser.error("--steps and --batch: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    model, _ = train(options)
    ious = {size: evaluate(model, size) for size in (SMALL_SIZE, LARGE_SIZE)}
    for (height, width), iou in ious.items():
        print(f"{height} x {width}: mean IoU {iou:.3f}")
    return 0 if min(ious.values()) >= options.min_iou else 1


if __name__ == "__main__":
    sys.exit(main())
