"""Rate of matrix products: the shapes of a recipe's model, and a sweep of square ones.

Inputs are normal random numbers: what is multiplied changes the power a device draws, and so its clock. Before each
call the caches are flushed, and the result goes to fresh memory. A block of the result is compared with a product in
float64. fp8 is e4m3 with one scale for each input and a result in bf16; a device that cannot do it is skipped.

    python benchmarks/gemm.py --dtypes bf16 fp32 --sizes 512 1024
    mpirun -n 4 python benchmarks/gemm.py --recipe llama3-8b
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Iterator

import torch

from aifactory_train.measure.program import Program, Quantity, start
from aifactory_train.measure.timing import build_cache_flush
from aifactory_train.plan.shape import dims
from aifactory_train.recipe.load import load_recipe

FP8 = "fp8"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Tensor cores add products of fp8 with 13 bits behind the point of the largest one, and every 128 of them go to fp32.
FP8_SUM_EPS = 2.0**-11
SIZES = {"cpu": [512, 1024], "cuda": [4096, 8192, 16384]}
CHECKED = 64
# Rows of a micro-batch's tokens; more of them do not change the rate.
TOKENS = {"cpu": 512, "cuda": 8192}


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--dtypes", nargs="+", choices=[*DTYPES, FP8], default=["bf16"])
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


def fp8_inputs(device: torch.device, m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """A (m, k) by rows and B (k, n) by columns in e4m3, and the factor of each, by which they are normal numbers."""
    # MI300 has a format of its own, without negative zero.
    fnuz = torch.version.hip is not None and "gfx94" in torch.cuda.get_device_properties(device).gcnArchName
    fp8 = torch.float8_e4m3fnuz if fnuz else torch.float8_e4m3fn
    found: list[torch.Tensor] = []
    for rows in (m, n):
        plain = torch.randn(rows, k, device=device)
        factor = plain.abs().max() / torch.finfo(fp8).max
        found += [(plain / factor).to(fp8), factor]
    return found[0], found[2].t(), found[1], found[3]


def why_no_fp8(device: torch.device) -> str | None:
    """None where torch multiplies fp8 on this device, else what it says."""
    a, b, factor_a, factor_b = fp8_inputs(device, 16, 16, 16)
    try:
        torch._scaled_mm(a, b, scale_a=factor_a, scale_b=factor_b, out_dtype=torch.bfloat16)
    except (RuntimeError, NotImplementedError) as error:
        return f"no products of fp8 here: {str(error).splitlines()[0]}"
    return None


def measure_fp8(program: Program, name: str, m: int, n: int, k: int) -> None:
    """Sums stay in fp32 (no fast accumulation), as in the backward products of training."""
    a, b, factor_a, factor_b = fp8_inputs(program.device, m, n, k)
    flush = build_cache_flush(program.device)
    out = [torch.empty(m, n, dtype=torch.bfloat16, device=program.device)]

    def work() -> None:
        torch._scaled_mm(a, b, scale_a=factor_a, scale_b=factor_b, out_dtype=torch.bfloat16, out=out[0])

    def before() -> None:
        out[0] = torch.empty_like(out[0])
        flush()

    def wrong() -> int:
        rows, columns = a[:CHECKED].double() * factor_a, b[:, :CHECKED].double() * factor_b
        return count_wrong(out[0], rows, columns, FP8_SUM_EPS)

    measure(program, FP8, name, (m, n, k), work, before, wrong)


def count_wrong(out: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, sum_eps: float) -> int:
    """Elements of the first rows and columns that are off by more than rounding explains.

    Args:
        out: the result (m, n).
        rows, columns: of the inputs, (r, k) and (k, c) in float64.
        sum_eps: error of a sum as part of the sum of |a||b|, which bounds it in any order.
    """
    exact = rows @ columns
    # The result itself is rounded once more.
    bound = (rows.abs() @ columns.abs()) * sum_eps + 2 * torch.finfo(out.dtype).eps * exact.abs()
    found = out[: len(rows), : columns.shape[1]].double()
    return int((~((found - exact).abs() <= bound)).sum())


def measure(
    program: Program,
    dtype: str,
    name: str,
    size: tuple[int, int, int],
    work: Callable[[], None],
    before: Callable[[], None],
    wrong: Callable[[], int],
) -> None:
    m, n, k = size
    cell = {"dtype": dtype, "shape": name, "m": m, "n": n, "k": k, "init": "randn"}
    rate = Quantity("aifactory_gemm_flops_per_second", 2.0 * m * n * k)
    program.measure(cell, [rate], work, before=before, wrong=wrong)


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
        rows, columns = a[:CHECKED].double(), b[:, :CHECKED].double()
        return count_wrong(out[0], rows, columns, 2 * torch.finfo(torch.float32).eps * k**0.5)

    measure(program, dtype, name, (m, n, k), work, before, wrong)


def main() -> None:
    with start("gemm", __doc__ or "", add_options) as program:
        for dtype in program.options.dtypes:
            why = why_no_fp8(program.device) if dtype == FP8 else None
            if why is not None:
                program.write({"dtype": FP8, "init": "randn"}, {}, None, facts={"skipped": why})
                continue
            for name, m, n, k in shapes(program):
                if dtype == FP8:
                    measure_fp8(program, name, m, n, k)
                else:
                    measure_product(program, dtype, name, m, n, k)


if __name__ == "__main__":
    main()
