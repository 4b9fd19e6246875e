"""Tensors of a kind, and views, whichever of torch's functions make them."""

from __future__ import annotations

import pytest
import torch
from support import DEVICE

from hpc_moe import _C

if hasattr(_C, "CudaRuntime"):
    from hpc_moe._backends.cuda import tensors
    from hpc_moe._backends.cuda.tensors import TensorKind, view_of

pytestmark = pytest.mark.skipif(not hasattr(_C, "CudaRuntime"), reason="this build has no CUDA runtime")


@pytest.fixture(params=["fast", "public"])
def functions(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that torch's compiler calls, where there are such; or torch's public ones."""
    if request.param == "public":
        monkeypatch.setattr(tensors, "_empty_on_current_device", None)
        monkeypatch.setattr(tensors, "_reinterpret", None)


@pytest.mark.usefixtures("functions")
def test_an_empty_tensor_is_of_its_kind() -> None:
    kind = TensorKind((2, 3, 4), (12, 1, 3), torch.float8_e4m3fn, DEVICE)
    one, other = kind.empty(), kind.empty()
    assert (one.shape, one.stride(), one.dtype, one.device) == ((2, 3, 4), (12, 1, 3), torch.float8_e4m3fn, DEVICE)
    assert one.data_ptr() != other.data_ptr() and not one.requires_grad


def test_the_current_device_is_not_taken_for_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "_current_device", lambda: 7)
    monkeypatch.setattr(tensors, "_empty_on_current_device", lambda *arguments: "on the current one")
    assert TensorKind((5,), (1,), torch.int32, torch.device("cuda", 7)).empty() == "on the current one"
    assert TensorKind((5,), (1,), torch.int32, DEVICE).empty().device == DEVICE


@pytest.mark.usefixtures("functions")
def test_a_view_shares_memory() -> None:
    whole = torch.arange(20, dtype=torch.int32, device=DEVICE)
    view = view_of(whole[2:], (2, 3), (4, 1), 5)
    assert view.tolist() == [[7, 8, 9], [11, 12, 13]]
    view.zero_()
    del whole
    assert view.sum() == 0
    view = view_of(torch.arange(20, device=DEVICE), (2,), (1,), 18)  # and keeps it
    assert view.tolist() == [18, 19]
