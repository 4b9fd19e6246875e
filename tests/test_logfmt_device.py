"""The logarithmic format as the GPU computes it (csrc/cuda/device/logfmt.cuh), here on the CPU, against the reference.

The header has host code and device code in one, of integers and IEEE operations only, so what holds here holds on a
GPU. tests/programs/logfmt.cpp makes a library of it, with the C++ compiler, and with nvcc where there is one.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hpc_moe.testing import logfmt

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "tests" / "programs" / "logfmt.cpp"
ONE = 0x3F80  # 1.0 as bf16
LARGEST = 0x3F7F  # the largest below
COMPILERS = {
    "c++": [os.environ.get("CXX", "c++"), "-O2", "-Wall", "-Wextra", "-Werror", "-fPIC"],
    "nvcc": ["nvcc", "-O2", "-x", "cu", "-arch=sm_80", "-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-fPIC"],
}


class Library:
    """What the program offers, with tensors."""

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.wrong_headers.restype = ctypes.c_int64
        self.row_bytes: Callable[[int], int] = self._library.row_bytes

    def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Headers `[G, 2]` and codes `[G, 128]` of groups `[G, 128]`."""
        assert x.dtype == torch.bfloat16 and x.is_contiguous()
        headers, codes = torch.empty(len(x), 2), torch.empty(x.shape, dtype=torch.int32)
        self._library.encode(pointer(x), ctypes.c_int64(len(x)), pointer(headers), pointer(codes))
        return headers, codes.long()

    def decode(self, headers: torch.Tensor) -> torch.Tensor:
        """The values of all 1024 codes, `[G, 1024]`."""
        values = torch.empty(len(headers), 1024)
        self._library.decode(pointer(headers.contiguous()), ctypes.c_int64(len(headers)), pointer(values))
        return values

    def write_row(self, x: torch.Tensor, row: torch.Tensor) -> None:
        self._library.write_row(pointer(x), x.numel(), pointer(row))

    def read_row(self, row: torch.Tensor, hidden: int) -> torch.Tensor:
        values = torch.empty(hidden)
        self._library.read_row(pointer(row), hidden, pointer(values))
        return values

    def wrong_headers(self, logs: torch.Tensor) -> tuple[int, int]:
        """How many, and of how many pairs."""
        num_pairs = ctypes.c_int64()
        wrong: int = self._library.wrong_headers(pointer(logs), ctypes.byref(num_pairs))
        return wrong, num_pairs.value


def pointer(x: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.data_ptr())


@pytest.fixture(scope="module", params=COMPILERS)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Library:
    compiler, *flags = COMPILERS[request.param]
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    path = tmp_path_factory.mktemp("logfmt") / "logfmt.so"
    line = [compiler, *flags, "-std=c++17", "-shared", f"-I{ROOT / 'csrc'}", "-o", str(path), str(SOURCE)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return Library(path)


# --- groups to encode ------------------------------------------------------------------------------------------------


def of_bits(bits: torch.Tensor) -> torch.Tensor:
    return bits.to(torch.int16).view(torch.bfloat16)


def random_signs(magnitudes: torch.Tensor, gen: torch.Generator) -> torch.Tensor:
    return magnitudes | torch.randint(0, 2, magnitudes.shape, generator=gen) << 15


def random_groups(kind: str, count: int = 2000) -> torch.Tensor:
    """`[count, 128] bfloat16`."""
    gen = torch.Generator().manual_seed(sum(map(ord, kind)))
    shape = (count, 128)
    normal = torch.randn(shape, generator=gen)
    uniform = torch.rand(shape, generator=gen)
    scale = torch.rand(count, 1, generator=gen)
    if kind == "normal":
        return (normal * 0.2).clamp(-0.99, 0.99).bfloat16()
    if kind == "normal, some too large":
        return (normal * torch.exp2(-4 * scale)).bfloat16()
    if kind == "of all sizes":
        return (normal.clamp(-1, 1) * 0.99 * torch.exp2(-120 * scale)).bfloat16()
    if kind == "wide":
        return (normal.sign() * torch.exp2(-0.01 - 50 * scale - 40 * uniform)).bfloat16()
    if kind == "narrow":
        least = torch.randint(1, LARGEST - 400, (count, 1), generator=gen)
        return of_bits(random_signs(least + (uniform * scale * 400).long(), gen))
    if kind == "two magnitudes":
        pair = torch.randint(1, LARGEST + 1, (count, 2), generator=gen)
        return of_bits(random_signs(pair.gather(1, (uniform > 0.5).long()), gen))
    if kind == "two neighbours":
        return of_bits(random_signs((scale * (LARGEST - 1)).long() + 1 + (uniform > 0.5), gen))
    if kind == "denormal":
        return of_bits(random_signs((uniform * (1 + scale * 0x7F)).long(), gen))
    if kind == "into the denormal":
        return of_bits(random_signs((uniform * (0x80 + scale * 0x1100)).long(), gen))
    if kind == "any magnitude below one":
        return of_bits(random_signs(torch.randint(0, ONE, shape, generator=gen), gen))
    if kind == "any bits":
        return of_bits(torch.randint(0, 0x10000, shape, generator=gen))
    if kind == "powers of two":
        return of_bits(random_signs((uniform * ONE // 0x80).long() * 0x80, gen))
    if kind == "many zeros":
        return (normal * 0.1 * (uniform < scale * 0.1)).clamp(-0.99, 0.99).bfloat16()
    if kind == "all equal":
        return of_bits(torch.arange(ONE + 0x100).unsqueeze(1).expand(-1, 128).contiguous())
    if kind == "one that is not zero":
        bits = torch.zeros(ONE + 0x100, 128, dtype=torch.int64)
        bits[torch.arange(len(bits)), torch.randint(0, 128, (len(bits),), generator=gen)] = torch.arange(len(bits))
        return of_bits(bits)
    assert kind == "around half of what code 1 is"  # zero is nearer, or code 1
    largest = torch.randint(34 * 128, ONE, (count, 1), generator=gen)
    offset = torch.randint(-3, 4, shape, generator=gen)
    bits = largest - 33 * 128 + offset
    bits[:, 100:] = largest
    bits[:, 99] = 1  # so that the range is the widest
    return of_bits(bits)


KINDS = [
    "normal",
    "normal, some too large",
    "of all sizes",
    "wide",
    "narrow",
    "two magnitudes",
    "two neighbours",
    "denormal",
    "into the denormal",
    "any magnitude below one",
    "any bits",
    "powers of two",
    "many zeros",
    "all equal",
    "one that is not zero",
    "around half of what code 1 is",
]


def special_groups() -> torch.Tensor:
    """`[12, 128] bfloat16`; the first 6 are encoded."""
    x = torch.zeros(12, 128)
    x[1] = -0.0
    x[2, 7] = -0.25
    x[3] = torch.where(torch.arange(128) % 2 == 0, 0.3125, -0.3125)
    x[4, :2] = torch.tensor([0.99609375, -(2.0**-133)])  # the largest below 1, and the smallest of all
    x[5] = torch.tensor([0.5, -0.375, 3 * 2.0**-35, 2.0**-40]).repeat_interleave(32)  # docs/worked-examples.md
    for row, value in enumerate([1.0, -1.0, 3e38, math.inf, -math.inf, math.nan]):
        x[6 + row, 11 * row :] = 0.1
        x[6 + row, 20 * row] = value
    return x.bfloat16()


# --- against the reference -------------------------------------------------------------------------------------------


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.contiguous().view(torch.int32), other.contiguous().view(torch.int32))


def compare(library: Library, x: torch.Tensor) -> logfmt.LogFormat:
    """Headers, codes and values of groups `[G, 128]`, bit for bit; returns the reference's."""
    expected = logfmt.encode(x)
    encoded = expected.encoded.flatten()
    headers, codes = library.encode(x)
    assert torch.equal(headers[:, 1].isnan(), ~encoded)
    assert same_bits(headers[encoded, 0], expected.log_min.flatten()[encoded])
    assert same_bits(headers[encoded, 1], expected.step.flatten()[encoded])
    expected_codes = (expected.codes + (expected.negative << 9)).squeeze(1)
    assert torch.equal(codes[encoded], expected_codes[encoded])

    row = torch.zeros(library.row_bytes(x.numel()) // 8, dtype=torch.int64)
    library.write_row(x, row)
    values = library.read_row(row, x.numel()).view(x.shape)
    assert same_bits(values[encoded], expected.decode()[encoded])
    assert same_bits(values[~encoded], x[~encoded].float())
    error = (values.double() - x.double()).abs()[encoded]
    assert (error <= expected.error_bound()[encoded]).all()
    return expected


@pytest.mark.parametrize("kind", KINDS)
def test_random_groups(library: Library, kind: str) -> None:
    expected = compare(library, random_groups(kind))
    assert bool(expected.encoded.any()) == (kind != "any bits")
    if kind == "around half of what code 1 is":
        assert {0, 1} <= set(expected.codes[:, :, :99].flatten().tolist())


def test_special_groups(library: Library) -> None:
    expected = compare(library, special_groups())
    assert expected.encoded.flatten().tolist() == [True] * 6 + [False] * 6


def test_values_next_to_the_middle_between_two_codes(library: Library) -> None:
    """Their logarithms lie 2^-29 to 2^-31 beside it, on either side: what the device's must tell apart."""
    largest_smallest_value = [
        (0x1203, 0x08E6, 0x119A),
        (0x1344, 0x1076, 0x1240),
        (0x167D, 0x0A6A, 0x115E),
        (0x1BD1, 0x0E67, 0x0F98),
        (0x1F3D, 0x1D39, 0x1F28),
        (0x2347, 0x16E4, 0x223E),
        (0x23B5, 0x1AE9, 0x1F70),
        (0x2FE2, 0x2CFF, 0x2FA4),
        (0x3342, 0x2849, 0x2B99),
        (0x35E3, 0x34CA, 0x354F),
        (0x3B4D, 0x3A13, 0x3AC3),
        (0x3B7C, 0x2ED5, 0x337A),
        (0x3D1D, 0x3521, 0x3720),
    ]
    x = torch.zeros(len(largest_smallest_value), 128, dtype=torch.int64)
    x[:, :3] = torch.tensor(largest_smallest_value)
    compare(library, of_bits(x))


def test_headers_of_all_pairs_of_magnitudes(library: Library) -> None:
    logs = of_bits(torch.arange(ONE)).double().log2()
    assert library.wrong_headers(logs) == (0, LARGEST * (LARGEST + 1) // 2)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "any bits"])
def test_values_of_all_codes(library: Library, kind: str) -> None:
    x = random_groups(kind)
    headers = library.encode(x[:: len(x) // 300].contiguous())[0]
    headers = headers[~headers[:, 1].isnan()]
    assert len(headers) > 100
    codes = torch.arange(1024).expand(len(headers), 1, 1024)
    shape = (len(headers), 1)
    expected = logfmt.LogFormat(
        encoded=torch.ones(shape, dtype=torch.bool),
        codes=codes & 511,
        negative=codes > 511,
        log_min=headers[:, 0].view(shape),
        step=headers[:, 1].view(shape),
        as_bf16=torch.zeros(1),
    )
    assert same_bits(library.decode(headers), expected.decode())


# --- the row on the wire ---------------------------------------------------------------------------------------------


def test_row_bytes(library: Library) -> None:
    assert [library.row_bytes(hidden) for hidden in (128, 256, 7168)] == [256 + 16, 512 + 16, 14336 + 448]


def test_a_row_writes_its_own_places_and_no_others(library: Library) -> None:
    x = special_groups()
    hidden, groups = x.numel(), len(x)
    row = torch.full((library.row_bytes(hidden) + 64,), 0xA5, dtype=torch.uint8)
    library.write_row(x, row)
    slots = row[: 256 * groups].view(groups, 256)
    assert (slots[:6, 160:] == 0xA5).all() and (row[2 * hidden + 8 * groups :] == 0xA5).all()
    assert torch.equal(slots[6:], x[6:].view(torch.uint8))
    headers, codes = library.encode(x)
    assert torch.equal(row[2 * hidden : 2 * hidden + 8 * groups], headers.view(torch.uint8).flatten())
    lanes = codes[:6].view(6, 16, 8)
    bits = torch.arange(8)
    assert torch.equal(slots[:6, :128].long(), codes[:6] & 255)
    assert torch.equal(slots[:6, 128:160:2].long(), ((lanes >> 8 & 1) << bits).sum(dim=2))
    assert torch.equal(slots[:6, 129:160:2].long(), ((lanes >> 9) << bits).sum(dim=2))
