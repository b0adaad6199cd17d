"""KL(teacher || student) from hidden states, forward and backward, beside its four products, fla and liger-kernel.

python benchmarks/linear_kl.py --name linear-kl-h100

Needs a GPU; fla and liger-kernel where their rows are to be filled (on PYTHONPATH will do): what cannot run is recorded
as failed. Every variant takes turns with the four plain products, in chunks whose logits are made and thrown away, so
that clocks drift alike for both. Memory is the peak beyond inputs and the two gradients. Errors are relative to float64
on a few rows; that of the whole batch's head gradient, where sums over chunks round, to ours summed in float32.
`--kernel` times the kernel alone in several shapes.
"""

import argparse
import gc
import importlib.metadata
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, circumstances, write_result
from torch import Tensor

from hylo.ops.kernels import kernels
from hylo.ops.linear_kl import fused_linear_kl, gpu_chunk_size, linear_kl_reference, part_rows

WARM_UP = 3
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class Inputs:
    """Hidden states `[T, D]` and `[T, D']`, heads `[V, D]` and `[V, D']`."""

    student_hidden: Tensor
    student_head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.student_hidden, self.student_head, self.teacher_hidden, self.teacher_head

    def first(self, rows: int) -> "Inputs":
        hidden = self.student_hidden.detach()[:rows].clone().requires_grad_()
        return replace(self, student_hidden=hidden, teacher_hidden=self.teacher_hidden[:rows].clone())


Loss = Callable[[Inputs], Tensor]


def make_inputs(arguments: argparse.Namespace) -> Inputs:
    """Random, with logits of standard deviation 3: some words likely, most not."""
    torch.manual_seed(0)
    make: dict[str, Any] = {"device": arguments.device, "dtype": DTYPES[arguments.dtype]}
    tokens, width, teacher_width, words = (
        getattr(arguments, name) for name in ("tokens", "width", "teacher_width", "words")
    )
    return Inputs(
        torch.randn(tokens, width, **make).requires_grad_(),
        torch.randn(words, width, **make).mul_(3 * width**-0.5).requires_grad_(),
        torch.randn(tokens, teacher_width, **make),
        torch.randn(words, teacher_width, **make).mul_(3 * teacher_width**-0.5),
    )


def ours(**options: Any) -> Loss:
    return lambda x: fused_linear_kl(*x.all(), **options)


def ours_eager(x: Inputs) -> Tensor:
    with kernels("reference"):
        return fused_linear_kl(*x.all())


def fla(in_float32: bool) -> Loss:
    from fla.modules.fused_kl_div import FusedKLDivLoss

    loss = FusedKLDivLoss(accumulate_grad_in_fp32=in_float32)
    return lambda x: loss(x.student_hidden, x.teacher_hidden, x.student_head, x.teacher_head)


def liger_jsd(dtype: torch.dtype | None) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    loss = LigerFusedLinearJSD(jsd_beta=0.0, accum_dtype=dtype)
    return lambda x: loss(*x.all(), None)


def liger_chunked(chunk_size: int, compiled: bool) -> Loss:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=compiled, chunk_size=chunk_size
    )

    def compute(x: Inputs) -> Tensor:
        labels = torch.zeros(len(x.student_hidden), dtype=torch.long, device=x.student_hidden.device)
        return loss(*x.all(), labels)

    return compute


def liger_kl_div(dtype: torch.dtype | None) -> Loss:
    """Takes the teacher's probabilities, so these are made first, 1,024 rows at a time."""
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    loss = LigerFusedLinearKLDivLoss(accum_dtype=dtype)

    def compute(x: Inputs) -> Tensor:
        hidden, head = x.teacher_hidden, x.teacher_head
        probabilities = torch.empty(len(hidden), len(head), dtype=hidden.dtype, device=hidden.device)
        for begin in range(0, len(hidden), 1024):
            rows = slice(begin, begin + 1024)
            torch.softmax(hidden[rows] @ head.T, -1, out=probabilities[rows])
        return loss(x.student_hidden, x.student_head, probabilities)

    return compute


def variants(arguments: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Loss]]]:
    """By name, what makes the loss; the first is what others' head gradients are held against."""
    for dtype in (torch.float32, torch.bfloat16):
        label = f"head gradient in {str(dtype).split('.')[-1]}"
        yield f"hylo, chunk by memory, {label}", lambda d=dtype: ours(head_grad_dtype=d)
        for chunk in arguments.chunks:
            yield f"hylo, chunk {chunk}, {label}", lambda d=dtype, c=chunk: ours(head_grad_dtype=d, chunk_size=c)
    yield "hylo without its kernel", lambda: ours_eager
    yield "fla FusedKLDivLoss, head gradient in float32 (its default)", lambda: fla(True)
    yield "fla FusedKLDivLoss, head gradient in the head's dtype", lambda: fla(False)
    yield "liger LigerFusedLinearJSD, beta 0 (its default)", lambda: liger_jsd(None)
    yield "liger LigerFusedLinearJSD, beta 0, head gradient in float32", lambda: liger_jsd(torch.float32)
    for compiled in (True, False):
        for chunk in (1024, 4096):
            yield (
                f"liger chunked LigerFusedLinearJSDLoss, beta 0, chunk {chunk}{', compiled' if compiled else ''}",
                lambda c=chunk, k=compiled: liger_chunked(c, k),
            )
    yield "liger LigerFusedLinearKLDivLoss of whole teacher probabilities", lambda: liger_kl_div(None)
    yield (
        "liger LigerFusedLinearKLDivLoss of whole teacher probabilities, head gradient in float32",
        lambda: liger_kl_div(torch.float32),
    )


class Products:
    """The four matrix products of the loss, `chunk` rows at a time into memory that is there, nothing added up."""

    def __init__(self, x: Inputs, chunk: int) -> None:
        self.x, self.chunk = x, min(chunk, len(x.student_hidden))
        hidden, head = x.student_hidden.detach(), x.student_head.detach()
        self.student = hidden.new_empty(self.chunk, len(head))
        self.teacher = torch.empty_like(self.student)
        self.hidden_grad, self.head_grad = torch.empty_like(hidden), torch.empty_like(head)

    @torch.no_grad()
    def __call__(self) -> None:
        x = self.x
        for begin in range(0, len(x.student_hidden), self.chunk):
            hidden = x.student_hidden[begin : begin + self.chunk]
            rows = len(hidden)
            torch.mm(hidden, x.student_head.T, out=self.student[:rows])
            torch.mm(x.teacher_hidden[begin : begin + rows], x.teacher_head.T, out=self.teacher[:rows])
            torch.mm(self.student[:rows], x.student_head, out=self.hidden_grad[begin : begin + rows])
            torch.mm(self.student[:rows].T, hidden, out=self.head_grad)

    @property
    def flops(self) -> int:
        x = self.x
        tokens, width = x.student_hidden.shape
        return 2 * tokens * len(x.student_head) * (3 * width + x.teacher_hidden.shape[1])


class Measure:
    """Milliseconds and peak memory, on a GPU or (times alone) on a CPU."""

    def __init__(self, device: str) -> None:
        self.cuda = torch.device(device).type == "cuda"

    def ms(self, work: Callable[[], Any]) -> float:
        if not self.cuda:
            begin = time.perf_counter()
            work()
            return 1000 * (time.perf_counter() - begin)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    def median_ms(self, work: Callable[[], Any], repeats: int) -> float:
        return statistics.median([self.ms(work) for _ in range(WARM_UP + repeats)][WARM_UP:])

    def peak_bytes(self, work: Callable[[], Any]) -> int | None:
        """Beyond what is there before."""
        if not self.cuda:
            work()
            return None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def forget(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def step(loss: Loss, x: Inputs) -> Tensor:
    """One forward and backward; gradients are those of this step alone."""
    x.student_hidden.grad = x.student_head.grad = None
    value = loss(x)
    value.backward()
    return value.detach()


def relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.to(actual.device)
    if not torch.isfinite(actual).all():
        return float("inf")
    # A slice at a time: whole differences in float64 are large.
    pairs = list(zip(actual.reshape(-1).split(2**26), expected.reshape(-1).split(2**26), strict=True))
    difference = sum((a.double() - e.double()).square().sum() for a, e in pairs)
    return float((difference / sum(e.double().square().sum() for _, e in pairs)).sqrt())


def exact(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and both gradients in float64."""
    wide = Inputs(*(tensor.detach().double() for tensor in x.all()))
    hidden, head = wide.student_hidden.requires_grad_(), wide.student_head.requires_grad_()
    loss = linear_kl_reference(*wide.all())
    return loss.detach(), *torch.autograd.grad(loss, (hidden, head))


def errors(loss: Loss, x: Inputs, expected: tuple[Tensor, Tensor, Tensor]) -> dict[str, float]:
    value = step(loss, x)
    actual = (value, x.student_hidden.grad, x.student_head.grad)
    names = ("loss", "hidden_gradient", "head_gradient")
    return {name: relative(a, e) for name, a, e in zip(names, actual, expected, strict=True)}


def measure_variant(
    loss: Loss, x: Inputs, products: Products, measure: Measure, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Times in turns with the plain products, and memory."""
    times: dict[str, list[float]] = {"ms": [], "products_ms": []}
    for repeat in range(WARM_UP + arguments.repeats):
        for name, work in {"ms": lambda: step(loss, x), "products_ms": products}.items():
            taken = measure.ms(work)
            if repeat >= WARM_UP:
                times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    x.student_hidden.grad = x.student_head.grad = None
    peak = measure.peak_bytes(lambda: step(loss, x))
    if peak is not None:
        peak -= x.student_hidden.grad.nbytes + x.student_head.grad.nbytes
    return {
        **{name: round(value, 3) for name, value in medians.items()},
        "of_products": round(medians["ms"] / medians["products_ms"], 4),
        "spread_ms": [round(min(times["ms"]), 3), round(max(times["ms"]), 3)],
        "bytes_beyond": peak,
    }


def breakdown(x: Inputs, measure: Measure, repeats: int) -> dict[str, Any]:
    """Of one chunk of ours by default: each product, and the kernel over the chunk."""
    from hylo.ops.linear_kl import _add_product_
    from hylo.ops.linear_kl_triton import difference_

    hidden, head, teacher_hidden, teacher_head = (tensor.detach() for tensor in x.all())
    words, width = head.shape
    chunk = min(gpu_chunk_size(words, width, teacher_hidden.shape[1], head.itemsize), len(hidden))
    part = part_rows(chunk)
    logits, teacher = hidden.new_empty(chunk, words), hidden.new_empty(part, words)
    kl, hidden_grad = torch.empty(part, device=head.device), torch.empty_like(hidden[:chunk])
    torch.mm(hidden[:chunk], head.T, out=logits)
    torch.mm(teacher_hidden[:part], teacher_head.T, out=teacher)
    options: dict[str, Any] = {"temperature": 1.0, "top_k": None, "gradient": True}
    parts: dict[str, Callable[[], Any]] = {
        "student_logits": lambda: torch.mm(hidden[:chunk], head.T, out=logits),
        "teacher_logits_of_a_part": lambda: torch.mm(teacher_hidden[:part], teacher_head.T, out=teacher),
        "kernel_of_a_part": lambda: difference_(logits[:part], teacher, kl, **options),
        "hidden_gradient": lambda: torch.mm(logits, head, out=hidden_grad),
    }
    for dtype in DTYPES.values():
        total = torch.zeros_like(head, dtype=dtype)
        parts[f"head_gradient_in_{str(dtype).split('.')[-1]}"] = lambda t=total: _add_product_(
            t, logits, hidden[:chunk]
        )
    return {"chunk": chunk, "part": part} | {
        f"{name}_ms": round(measure.median_ms(work, repeats), 4) for name, work in parts.items()
    }


def kernel_shapes(x: Inputs, measure: Measure, repeats: int) -> list[dict[str, Any]]:
    """The kernel alone: its error, milliseconds, and bytes a second: two reads of both matrices, one write."""
    from hylo.ops import linear_kl_triton
    from hylo.ops.linear_kl import difference_

    words = len(x.student_head)
    rows = min(1024, len(x.student_hidden))
    make = {"device": x.student_head.device, "dtype": x.student_head.dtype}
    logits = [3 * torch.randn(rows, words, **make) for _ in range(2)]
    few = [tensor[:8].double() for tensor in logits]
    kl, expected = (torch.empty(n, device=make["device"], dtype=d) for n, d in ((rows, None), (8, torch.float64)))
    options: dict[str, Any] = {"temperature": 1.0, "top_k": None}
    difference_(*few, expected, gradient=False, **options)
    shown = []
    shapes = (
        (1024, 4, 3), (2048, 4, 3), (2048, 8, 2), (2048, 8, 3), (2048, 8, 4), (4096, 8, 3), (4096, 16, 2),
        (4096, 16, 3), (8192, 16, 3), (8192, 32, 3),
    )  # fmt: skip
    for shape in shapes:
        row: dict[str, Any] = dict(zip(("BLOCK", "WARPS", "STAGES"), shape, strict=True))
        for name, value in row.items():
            setattr(linear_kl_triton, name, value)
        try:
            linear_kl_triton.difference_(*logits, kl, gradient=False, **options)
            row["error"] = relative(kl[:8], expected)
            # In place, and never mind the values from here.
            copies = [tensor.clone() for tensor in logits]
            ms = measure.median_ms(
                lambda: linear_kl_triton.difference_(*copies, kl, gradient=True, **options),  # noqa: B023
                repeats,
            )
            row |= {"ms": round(ms, 4), "gb_per_s": round(5 * logits[0].nbytes / ms / 1e6)}
        except Exception as error:
            row["failed"] = one_line(error)
        print(row, flush=True)
        shown.append(row)
    return shown


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


def table(result: dict[str, Any]) -> str:
    lines = [
        "| | ms | of the products | GiB beyond | error: loss | hidden gradient | head gradient | whole head gradient |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in result["variants"].items():
        if "ms" not in row:
            lines.append(f"| {name} | {row.get('failed', '')} |" + " |" * 6)
            continue
        beyond = row["bytes_beyond"]
        error = row.get("error") or {}
        cells = [
            f"{row['ms']:.1f}",
            f"{row['of_products']:.3f}",
            "" if beyond is None else f"{beyond / 2**30:.2f}",
            *(f"{error[key]:.1e}" if key in error else "" for key in ("loss", "hidden_gradient", "head_gradient")),
            f"{row['whole_head_gradient_error']:.1e}" if "whole_head_gradient_error" in row else "",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def attempt(row: dict[str, Any], work: Callable[[], None]) -> None:
    """Records in the row why it could not be done."""
    try:
        work()
    except Exception as error:
        row["failed"] = one_line(error)
        row["where"] = traceback.format_exc().splitlines()[-3].strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="linear-kl-gpu", help="of the result file")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--words", type=int, default=128256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--teacher-width", type=int, default=4096)
    parser.add_argument("--chunks", type=int, nargs="*", default=[1024, 2048, 4096])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--exact-rows", type=int, default=512, help="rows on which float64 is compared with")
    parser.add_argument("--only", default="", help="variants whose name begins so")
    parser.add_argument("--kernel", action="store_true", help="time the kernel alone, in several shapes, and end")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    path = arguments.output / f"{arguments.name}.json"
    measure = Measure(arguments.device)
    result: dict[str, Any] = circumstances()
    try:
        result["versions"]["liger-kernel"] = importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        result["versions"]["liger-kernel"] = "not installed"
    sizes = ("tokens", "words", "width", "teacher_width", "dtype", "repeats")
    result |= {name: getattr(arguments, name) for name in sizes} | {"exact_rows": arguments.exact_rows}
    x = make_inputs(arguments)
    if arguments.kernel:
        write_result(path, result | {"kernel": kernel_shapes(x, measure, arguments.repeats)})
        return

    few = x.first(arguments.exact_rows)
    expected = tuple(tensor.to("cpu") for tensor in exact(few))
    measure.forget()
    result["products"] = {}
    for chunk in (2048, 4096, 8192):
        plain = Products(x, chunk)
        ms = measure.median_ms(plain, arguments.repeats)
        result["products"][str(chunk)] = {"ms": round(ms, 3), "tflop_per_s": round(plain.flops / ms / 1e9, 1)}
        del plain
        measure.forget()
    fastest = min(result["products"], key=lambda chunk: result["products"][chunk]["ms"])
    products = Products(x, int(fastest))
    result["products_chunk"] = products.chunk
    print("products", result["products"], flush=True)
    row: dict[str, Any] = {}
    attempt(row, lambda: row.update(breakdown(x, measure, arguments.repeats)))
    result["breakdown"] = row
    print("breakdown", row, flush=True)
    measure.forget()

    result["variants"] = {}
    # Of the first variant; on the CPU, where it is in nobody's way.
    whole: Tensor | None = None
    for name, build in variants(arguments):
        if not name.startswith(arguments.only):
            continue
        row = result["variants"][name] = {}

        def run(row: dict[str, Any] = row, build: Callable[[], Loss] = build) -> None:
            nonlocal whole
            loss = build()
            row["error"] = errors(loss, few, expected)
            few.student_hidden.grad = few.student_head.grad = None
            measure.forget()
            row.update(measure_variant(loss, x, products, measure, arguments))
            assert x.student_head.grad is not None
            if whole is None:
                whole = x.student_head.grad.to("cpu")
            else:
                row["whole_head_gradient_error"] = relative(x.student_head.grad, whole)

        attempt(row, run)
        x.student_hidden.grad = x.student_head.grad = None
        few.student_hidden.grad = few.student_head.grad = None
        measure.forget()
        print(name, row, flush=True)
        write_result(path, result)
    print(table(result))


if __name__ == "__main__":
    main()
