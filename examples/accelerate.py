"""Accelerate a model of timm, compare, profile and restore it.

python examples/accelerate.py --model vit_base_patch16_siglip_224 --pretrained
"""

import argparse
import time

import timm
import torch
from torch.profiler import ProfilerActivity, profile

import crossvit_kernels as ck


def median_ms(model: torch.nn.Module, images: torch.Tensor, rounds: int = 9) -> float:
    """Return the median time of a forward."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(images)
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2] * 1e3


def main(arguments: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="vit_base_patch16_siglip_224")
    parser.add_argument("--pretrained", action="store_true", help="download weights")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args(arguments)
    model = timm.create_model(options.model, pretrained=options.pretrained).eval()
    size = (options.batch, *model.pretrained_cfg["input_size"])
    images = torch.randn(size, dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        before, before_ms = model(images), median_ms(model, images)
        print(ck.accelerate(model, example=images))
        after, after_ms = model(images), median_ms(model, images)
        print(f"{before_ms:.1f} ms before, {after_ms:.1f} ms after")
        print(f"largest difference of the outputs: {(after - before).abs().max():.2g}")
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            model(images)
        print(profiled.key_averages().table(sort_by="self_cpu_time_total", row_limit=8))
        ck.restore(model)
        assert torch.equal(model(images), before)


if __name__ == "__main__":
    main()
