"""The examples run under mpirun: the loss falls, the report is there, one process and other rank counts agree."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import DEVICE, ON_CUDA, needs_low_latency

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(300)]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY = (
    "--layers=2",
    "--hidden=128",
    "--heads=2",
    "--experts=12",
    "--ffn-hidden=32",
    "--context=32",
    "--batch=16",
    "--learning-rate=2e-3",  # low, so that rounding grows slowly
    "--steps=30",
    "--warmup=5",
    "--max-bytes=2000000",
    "--eval-windows=8",
    "--eval-every=10",
    "--sample=10",
    f"--device={DEVICE.type}",
)

SMALL_DECODER = (
    "--layers=2",
    "--tokens=5",
    "--hidden=128",
    "--experts=6",
    "--top-k=3",
    "--steps=4",
    f"--device={DEVICE.type}",
)

Mpirun = Callable[..., Any]


Train = Callable[..., tuple[dict[str, Any], str]]


@pytest.fixture(scope="session")
def train(mpirun: Mpirun, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Run the training on some ranks with more options; returns the JSON and what was printed."""

    def run(ranks: int, *options: str | Path) -> tuple[dict[str, Any], str]:
        out = tmp_path_factory.mktemp("out")
        result = mpirun(ranks, EXAMPLES / "train_moe_lm.py", *TINY, f"--out={out}", *options, limit=120.0)
        assert result.returncode == 0, result.stdout + result.stderr
        assert (out / "report.png").stat().st_size > 20_000
        report: dict[str, Any] = json.loads((out / "report.json").read_text())
        return report, result.stdout

    return run


@pytest.fixture(scope="session")
def whole_run(train: Train) -> tuple[dict[str, Any], str]:
    """All steps on 4 ranks, and in one process."""
    return train(4, "--compare-single")


def _bits(report: dict[str, Any]) -> np.ndarray:
    return np.array(report["curves"]["bits"])


def _assert_same_run(bits: np.ndarray, expected: np.ndarray) -> None:
    """Equal at first; then a token near the border between two experts may choose the other one, and that grows."""
    difference = np.abs(bits - expected)
    assert difference[:3].max() < 0.002 and difference.mean() < 0.01 and difference.max() < 0.05, difference.tolist()


def test_dispatch_combine(mpirun: Mpirun) -> None:
    result = mpirun(3, EXAMPLES / "dispatch_combine.py")
    assert result.returncode == 0, result.stderr
    assert "3 ranks x 1000 tokens" in result.stdout
    error = float(result.stdout.split("combined result: ")[1].split()[0])
    assert error < 0.01


def test_dispatch_combine_is_short() -> None:
    assert len((EXAMPLES / "dispatch_combine.py").read_text().splitlines()) < 40


@needs_low_latency
@pytest.mark.parametrize("rows", ["fp8", "bf16"])
def test_decode_loop(mpirun: Mpirun, rows: str) -> None:
    result = mpirun(2, EXAMPLES / "decode_loop.py", *SMALL_DECODER, *(["--bf16"] if rows == "bf16" else []), limit=60.0)
    assert result.returncode == 0, result.stdout + result.stderr
    first, *times, last = result.stdout.splitlines()
    assert first.startswith(
        f"2 ranks on {DEVICE.type}, each with 2 micro-batches of 5 tokens; 2 layers with hidden 128"
    )
    assert f"top-3 of 6 experts, dispatch in {rows}, 4 steps" in first
    for line, name in zip(times, ("without overlap", "with overlap"), strict=True):
        figures = re.fullmatch(rf"{name}: +([\d.]+) us per layer, +([\d,]+) tokens/s", line)
        assert figures, line
        layer_us, speed = (float(figure.replace(",", "")) for figure in figures.groups())
        assert speed == pytest.approx(2 * 2 * 5 / (2 * layer_us * 1e-6), rel=0.01)
    assert last == f"outputs with and without overlap are equal, bit by bit ({4 * 2 * 2 * 5 * 128:,} values compared)"


# The hooks of combine on rank 1 change one value of one token.
WRONG_OVERLAP = """
import runpy, sys
from hpc_moe import Buffer
right = Buffer.low_latency_combine
def wrong(self, *args, **more):
    combined, event, hook = right(self, *args, **more)
    def receive():
        hook()
        combined[0, 0] += self.rank
    return combined, event, hook and receive
Buffer.low_latency_combine = wrong
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@needs_low_latency
def test_decode_loop_notices_that_outputs_differ(mpirun: Mpirun) -> None:
    result = mpirun(2, "-c", WRONG_OVERLAP, EXAMPLES / "decode_loop.py", *SMALL_DECODER, limit=60.0)
    assert result.returncode == 1, result.stdout + result.stderr
    assert "outputs with and without overlap are DIFFERENT in " in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "option, needed",
    [
        ("--layers=0", "at least 1"),
        ("--tokens=0", "at least 1"),
        ("--hidden=192", "a multiple of 128, at most 16384"),
        ("--experts=5", "a multiple of the 2 ranks"),
        ("--top-k=7", "1 to 6"),
        ("--steps=0", "at least 1"),
    ],
)
def test_decode_loop_options(mpirun: Mpirun, option: str, needed: str) -> None:
    """One line and no traceback."""
    result = mpirun(2, EXAMPLES / "decode_loop.py", *SMALL_DECODER, option, limit=60.0)
    assert result.returncode == 2
    name, got = option.split("=")
    assert result.stderr.count(f"decode_loop.py: error: {name} must be {needed}; got {got}\n") == 1
    assert "Traceback" not in result.stderr


def test_training_and_single_process_agree(whole_run: tuple[dict[str, Any], str]) -> None:
    report, printed = whole_run
    bits = _bits(report)
    assert len(bits) == 30
    assert 7.5 < bits[0] < 8.5 and bits[-5:].mean() < bits[0] - 2.5
    assert report["evaluations"]["step"] == [0, 10, 20, 30]
    assert report["evaluations"]["bits_per_byte"][-1] < 6
    single = np.array(report["single_process_curves"]["bits"])
    _assert_same_run(bits, single)
    assert "difference of the loss to the same training in one process" in printed
    assert report["machine"]["ranks"] == 4
    load = np.array(report["expert_load"]["columns_layers_experts"])
    assert load.shape == (30, 2, 12) and (load.sum(axis=2) == 16 * 32 * 2).all()
    assert 0 < report["summary"]["dispatch_share"] < 1 and 0 < report["summary"]["combine_share"] < 1
    assert "the model writes" in printed and "def read" in report["sample"]


def test_resume_with_another_number_of_ranks(
    train: Train, whole_run: tuple[dict[str, Any], str], tmp_path: Path
) -> None:
    """From a checkpoint of 1 rank, 2 ranks go on with the curve that 4 ranks have without a break."""
    file = tmp_path / "middle.pt"
    train(1, "--stop-after=8", f"--save={file}")
    resumed, printed = train(2, f"--resume={file}", "--layers=1", "--compare-single")  # the checkpoint's settings win
    assert "steps: 8 to 30" in printed
    single = resumed["single_process_curves"]
    assert single["step"] == list(range(9, 31))  # those before the checkpoint would agree whatever happens
    differences = np.abs(_bits(resumed)[8:] - np.array(single["bits"]))
    assert resumed["summary"]["mean_difference_to_single_process"] == pytest.approx(differences.mean(), abs=1e-6)
    assert 0 < differences.mean() < 0.01
    assert resumed["curves"]["step"] == list(range(1, 31))
    assert resumed["settings"] == whole_run[0]["settings"]
    _assert_same_run(_bits(resumed), _bits(whole_run[0]))


def test_more_ranks_than_windows(train: Train) -> None:
    """A rank without a window trains along with no tokens."""
    report, _ = train(3, "--batch=2", "--steps=3", "--eval-windows=2", "--compare-single")
    single = np.array(report["single_process_curves"]["bits"])
    assert np.abs(_bits(report) - single).max() < 0.005


@pytest.mark.parametrize(
    "options, message",
    [
        (["--experts=5"], "--experts must be a multiple of the 2 ranks; got 5"),
        (["--stop-after=0"], "--stop-after must be greater than 0, the steps done before; got 0"),
        (["--resume=/nowhere.pt"], "--resume: 2 of 2 ranks find no file /nowhere.pt"),
    ],
)
def test_options_that_cannot_be_used(mpirun: Mpirun, tmp_path: Path, options: list[str], message: str) -> None:
    """One line and no traceback."""
    result = mpirun(2, EXAMPLES / "train_moe_lm.py", *TINY, *options, f"--out={tmp_path}", limit=60.0)
    assert result.returncode == 2
    assert result.stderr.count(f"train_moe_lm.py: error: {message}\n") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "setting, value, needed",
    [
        ("eval_every", 0, "at least 1"),
        ("steps", 0, "at least 1"),
        ("heads", 3, "a divisor of 64"),
        ("heads", 128, "a divisor of 64"),
        ("hidden", 192, "a multiple of 128"),
        ("top_k", 17, "1 to 16"),
        ("experts", 0, "a multiple of the 4 ranks"),
        ("max_bytes", 10, "at least 1000000"),
    ],
)
def test_settings(monkeypatch: pytest.MonkeyPatch, setting: str, value: int, needed: str) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    settings = importlib.import_module("moe_lm.settings")
    settings.Settings().check(4)
    with pytest.raises(ValueError, match=f"^--{setting.replace('_', '-')} must be {needed}; got {value}$"):
        settings.Settings(**{setting: value}).check(4)


def test_an_error_on_one_rank_ends_the_job(mpirun: Mpirun) -> None:
    """Rank 0 cannot write its report; the others wait for it."""
    out = "--out=/dev/null/out"
    result = mpirun(2, EXAMPLES / "train_moe_lm.py", *TINY, "--steps=1", "--sample=0", out, limit=60.0)
    assert result.returncode not in (0, 2, 124)
    assert "NotADirectoryError" in result.stderr


@pytest.mark.skipif(ON_CUDA, reason="there is a GPU")
def test_decode_loop_without_cuda(mpirun: Mpirun) -> None:
    result = mpirun(2, EXAMPLES / "decode_loop.py", "--device=cuda", limit=60.0)
    assert result.returncode == 2
    assert result.stderr.count("decode_loop.py: error: Buffer: ") == 1
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(ON_CUDA, reason="there is a GPU")
def test_cuda_is_a_clear_error(mpirun: Mpirun, tmp_path: Path) -> None:
    result = mpirun(1, EXAMPLES / "train_moe_lm.py", *TINY, "--device=cuda", f"--out={tmp_path}", limit=60.0)
    assert result.returncode not in (0, 2, 124)
    assert "hpc_moe.errors.UnavailableError: " in result.stderr
