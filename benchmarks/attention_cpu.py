"""Time of attention, forward and backward, on this CPU: ours beside torch's kernel, in turns.

    python benchmarks/attention_cpu.py [--tokens 512] [--documents] [--compile]

Prints the median of each and the median and range of the paired ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from aifactory_train.models.attention import attend, build_mask

ROWS, HEADS, KV_HEADS, HEAD_SIZE = 8, 8, 4, 64


def kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--documents", action="store_true", help="four documents a row")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    document = torch.arange(args.tokens)[None].expand(ROWS, -1) * 4 // args.tokens if args.documents else None
    mask = build_mask(document)
    shapes = [(ROWS, args.tokens, n, HEAD_SIZE) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, grad = (torch.randn(s).bfloat16().transpose(1, 2).requires_grad_() for s in shapes)
    sides = {"ours": attend, "torch": kernel}
    if args.compile:
        sides = {name: torch.compile(side, dynamic=False) for name, side in sides.items()}
    times_s: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(args.repeats + 2):
        for name, side in sides.items():
            start_s = time.perf_counter()
            torch.autograd.grad(side(q, k, v, mask), (q, k, v), grad)
            if repeat >= 2:
                times_s[name].append(time.perf_counter() - start_s)
    for name, values in times_s.items():
        print(f"{name:6s} {statistics.median(values) * 1e3:7.1f} ms")
    ratios = sorted(b / a for a, b in zip(times_s["ours"], times_s["torch"], strict=True))
    print(f"torch / ours {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
