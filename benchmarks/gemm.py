"""Rate of matrix products: the shapes of a recipe's model, and a sweep of square ones.

Inputs are normal random numbers: what is multiplied changes the power a device draws, and so its clock. Before each
call the caches are flushed, and the result goes to fresh memory. A block of the result is compared with a product in
float64.

    python benchmarks/gemm.py --dtypes bf16 fp32 --sizes 512 1024
    mpirun -n 4 python benchmarks/gemm.py --recipe llama3-8b
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator

import torch

from aifactory_train.measure.program import Program, Quantity, start
from aifactory_train.measure.timing import build_cache_flush
from aifactory_train.plan.shape import dims
from aifactory_train.recipe.load import load_recipe

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = {"cpu": [512, 1024], "cuda": [4096, 8192, 16384]}
CHECKED = 64
# Rows of a micro-batch's tokens; more of them do not change the rate.
TOKENS = {"cpu": 512, "cuda": 8192}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--sizes", nargs="*", type=int, help="m = n = k of the sweep (default: by the device)")
    parser.add_argument("--recipe", help="also the products of this recipe's model")


def shapes(program: Program) -> Iterator[tuple[str, int, int, int]]:
    """(name, m, n, k) of each product: C (m, n) = A (m, k) B (k, n)."""
    sizes = SIZES[program.device.type] if program.options.sizes is None else program.options.sizes
    yield from (("square", size, size, size) for size in sizes)
    if program.options.recipe:
        at, m = dims(load_recipe(program.options.recipe).model), TOKENS[program.device.type]
        yield from (("q_proj", m, at.q, at.d), ("kv_proj", m, at.kv, at.d), ("o_proj", m, at.d, at.q))
        yield from (("up_proj", m, at.f, at.d), ("down_proj", m, at.d, at.f), ("head", m, at.vocab, at.d))


def measure_product(program: Program, dtype: str, name: str, m: int, n: int, k: int) -> None:
    a = torch.randn(m, k, device=program.device).to(DTYPES[dtype])
    b = torch.randn(k, n, device=program.device).to(DTYPES[dtype])
    flush = build_cache_flush(program.device)
    out = [a @ b]

    def work() -> None:
        torch.matmul(a, b, out=out[0])

    def before() -> None:
        out[0] = torch.empty_like(out[0])
        flush()

    def wrong() -> int:
        """Elements of the first rows and columns that are off by more than rounding explains."""
        rows, columns = a[:CHECKED].double(), b[:, :CHECKED].double()
        exact = rows @ columns
        # The sum of |a||b| bounds the error of a sum in any order; the result itself is rounded once more.
        scale = (rows.abs() @ columns.abs()) * torch.finfo(torch.float32).eps * k**0.5
        bound = scale + 2 * torch.finfo(DTYPES[dtype]).eps * exact.abs() + scale
        return int((~((out[0][:CHECKED, :CHECKED].double() - exact).abs() <= bound)).sum())

    cell = {"dtype": dtype, "shape": name, "m": m, "n": n, "k": k, "init": "randn"}
    rate = Quantity("aifactory_gemm_flops_per_second", 2.0 * m * n * k)
    program.measure(cell, [rate], work, before=before, wrong=wrong)


def main() -> None:
    with start("gemm", __doc__ or "", add_options) as program:
        for dtype in program.options.dtypes:
            for name, m, n, k in shapes(program):
                measure_product(program, dtype, name, m, n, k)


if __name__ == "__main__":
    main()
