"""What every kernel between contrast's products promises, as a function of the kernel: Triton's under its interpreter, CUDA's under the
host emulation, both on a GPU. The definition is `_rows._torch_kernel` in float64, which test_contrastive_values.py holds to pairs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ltkernels.contrastive import _rows
from ltkernels.contrastive._rows import Part

INF, NAN = torch.inf, torch.nan
F64 = torch.float64
Kernel = Callable[[Tensor, Part], None]


def parts(rows: int, columns: int, seed: int = 0) -> Iterator[Part]:
    """Parts with everything that may be there, there and not."""
    generator = torch.Generator().manual_seed(100 * columns + seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64)

    some = torch.arange(rows)
    begin = some * 5 % (columns + 1)
    end = torch.minimum(begin + some * 3 % 7, torch.tensor(columns))  # row 0 and others have no column of their own
    shift = torch.where(torch.arange(columns) % 5 == 3, -INF, noise(columns))
    absent = torch.where(some % 3 == 1, -1, some * 7 % columns)
    bonus = torch.where(some % 4 == 2, -INF, noise(rows))
    scale = 1 + noise(rows).abs()
    for groups, shifted, fixed in itertools.product((True, False), repeat=3):
        lone = groups ^ shifted ^ fixed  # any two together, and apart
        said = {"row_scale": scale, "coefficients": True}
        if groups:
            said |= {"own_begin": begin, "own_end": end}
        if shifted:
            said["shift"] = shift
        if lone:
            said["absent"] = absent
        if fixed:  # a row that has none among those that have one
            finite = shift[shift != -INF]
            spread = finite.max().clamp_min(0) if shifted and len(finite) else torch.zeros((), dtype=F64)
            said["reference"] = torch.where(some == 2, INF, scale + spread)
        yield Part(**said)
        if groups:
            loss = {"loss": noise(rows), "weight": torch.where(some % 5 == 4, 0, noise(rows).abs())}
            for minus_own, beside in itertools.product((False, True), repeat=2):
                more = {"base": noise(rows), "bonus": bonus, "grad_base": noise(rows)} if beside else {}
                yield Part(**(said | loss | more | {"minus_own": minus_own}))


def filled(kernel: Kernel, products: Tensor, part: Part) -> tuple[Tensor, Part]:
    """The products after the kernel, and the part with memory of its own for what is written."""
    written = ["loss", "grad_base"] if part.loss is not None else ["other", "own"]
    rows = len(products)
    new = {
        name: torch.full((rows,), 7.0, dtype=F64, device=products.device)
        for name in written
        if name != "grad_base" or part.grad_base is not None
    }
    if part.loss is None:
        upstream = torch.linspace(-1, 2, rows, dtype=F64, device=products.device)
        new |= {"grad_other": upstream, "grad_own": upstream.flip(0)} if part.coefficients else {}
    shift = None if part.shift is None else part.shift.to(products.dtype)
    part = part._replace(shift=shift, **new)
    kernel(products, part)
    return products, part


def there(part: Part, device: str) -> Part:
    return Part(*(each.to(device) if isinstance(each, Tensor) else each for each in part))


def check(kernel: Kernel, rows: int, columns: int, dtype: torch.dtype, scale: float = 1.0, device: str = "cpu") -> None:
    """Losses, log-sum-exps and coefficients against the definition; a row of weight 0 may hold anything."""
    generator = torch.Generator().manual_seed(columns)
    cosines = torch.rand(rows, columns, generator=generator, dtype=F64) * 2 - 1
    for part in parts(rows, columns):
        if part.reference is not None and scale != 1.0:
            continue
        products = cosines * scale
        if part.loss is not None:
            products[4 % rows] = NAN if part.weight[4 % rows] == 0 else products[4 % rows]
        exact, wanted = filled(_rows._torch_kernel, products.clone(), part)
        found, got = filled(kernel, products.to(device, dtype, copy=True), there(part, device))
        size = (products.nan_to_num().abs().amax() * part.row_scale.max()).item()
        eps = torch.finfo(dtype).eps * (16 + 4 * size)
        for name in ("loss", "grad_base", "other", "own"):
            ours, theirs = getattr(got, name), getattr(wanted, name)
            if theirs is not None:
                said = {"rtol": eps, "atol": eps, "equal_nan": True, "msg": lambda m, n=name: f"{n}: {m}"}
                torch.testing.assert_close(ours.cpu(), theirs, **said)
        torch.testing.assert_close(found.cpu().double(), exact, rtol=2 * eps, atol=1e-6 * eps)
        only, alone = filled(
            kernel, products.to(device, dtype, copy=True), there(part, device)._replace(coefficients=False)
        )
        assert torch.equal(only.cpu().nan_to_num(9), products.to(dtype).nan_to_num(9)), "products were written"
        for name in ("loss", "other", "own"):
            if getattr(got, name) is not None:
                assert torch.equal(getattr(alone, name).nan_to_num(9), getattr(got, name).nan_to_num(9))


def check_layouts(kernel: Kernel, dtype: torch.dtype, device: str = "cpu") -> None:
    """Any distance of rows and any address: nothing beside the rows is touched."""
    rows, columns = 3, 45
    (part, *_) = parts(rows, columns)
    for offset, stride in itertools.product(range(5), (columns, columns + 1, columns + 3, 2 * columns)):
        memory = torch.full((offset + rows * stride + 8,), -7.0, dtype=dtype)
        view = memory[offset : offset + rows * stride].view(rows, stride)[:, :columns]
        view.copy_(torch.linspace(-1, 1, rows * columns).view(rows, columns))
        expected, _ = filled(kernel, view.contiguous().to(device), there(part, device))
        placed = memory.to(device)
        filled(kernel, placed[offset : offset + rows * stride].view(rows, stride)[:, :columns], there(part, device))
        view.copy_(expected)
        torch.testing.assert_close(placed.cpu(), memory, rtol=1e-6, atol=1e-9)


def check_confident_rows(kernel: Kernel, dtype: torch.dtype, device: str = "cpu") -> None:
    """The loss less `own`, where nothing is near the own group, and the own columns' gradients keep their digits."""
    products = torch.zeros(2, 4, dtype=F64)
    products[:, 0] = torch.tensor([20.0, 60.0])
    one, number = torch.ones(2, dtype=F64), torch.arange(2)
    said = {"own_begin": 0 * number, "own_end": 0 * number + 1, "loss": one, "weight": one, "minus_own": True}
    part = Part(one, coefficients=True, **said)
    found, got = filled(kernel, products.to(device, dtype, copy=True), there(part, device))
    expected = torch.log1p(3 * torch.exp(-products[:, 0]))
    torch.testing.assert_close(got.loss.cpu(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[:, 0].cpu().double(), -expected, rtol=1e-5, atol=0)


def check_special_rows(kernel: Kernel, dtype: torch.dtype, device: str = "cpu") -> None:
    """NaN and infinity stay in their row; nothing but -inf is the log-sum-exp of nothing."""
    products = torch.zeros(5, 9)
    products[0, 3], products[1, 4], products[2], products[3, 5] = NAN, INF, -INF, -INF
    part = Part(torch.ones(5, dtype=F64), coefficients=True)
    found, got = filled(kernel, products.to(device, dtype, copy=True), there(part, device))
    other = got.other.cpu()
    assert other[0].isnan()
    assert other[1] == INF
    assert other[2] == -INF
    torch.testing.assert_close(other[3:], torch.log(torch.tensor([8.0, 9.0], dtype=F64)), rtol=1e-6, atol=0)
    assert (got.own == -INF).all()
    assert (found[2] == 0).all()
    assert found[3, 5] == 0
    assert found[3:].isfinite().all()
