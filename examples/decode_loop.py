"""Decode with mixture-of-experts layers: low-latency calls, with and without overlap of two micro-batches.

    mpirun -n 2 python examples/decode_loop.py

or, in this repository's own environment (after `make build`),

    .venv/bin/python tools/launch.py -n 2 -- .venv/bin/python examples/decode_loop.py

Every rank has two micro-batches, each with a token of every sequence that it serves. A step takes both through all
layers: a dense part, a router, dispatch, the local experts, combine. What comes out is the next step's input. The two
take turns at each dispatch and combine. Without overlap such a call sends and receives at once. With overlap it only
sends (`return_recv_hook`), and its hook receives when the micro-batch has its turn again: what the other one computes
meanwhile hides the time that rows are on their way. Nothing else differs, not even the order of computations.

Steps of both kinds alternate. Shown is the time of a step (both micro-batches, the slowest rank, the median over steps)
divided by the layers. All steps' outputs must be equal, bit by bit; if they are not, the exit status is 1.

With `--device cuda` a step is captured in a CUDA graph and replayed (if the library has low-latency calls on CUDA; else
it says so). On CPU it runs eagerly, and the overlap gains little: the cores that compute are those that move the rows,
so only the wait for a slower rank can be hidden.

Not a language model: weights are random, and the dense part has the matrix products of an attention layer (query, key,
value and output), but no past tokens to look at. Nor does it say whether to split a batch in two at all: for that, one
would compare with a single batch of all tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch.nn.functional import rms_norm, silu

import hpc_moe
from hpc_moe.fp8 import dequantize


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the run."""
    about = "Decode with low-latency calls, with and without overlap of two micro-batches."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="tokens in each of a rank's two micro-batches")
    parser.add_argument("--hidden", type=int, default=512, help="channels, a multiple of 128")
    parser.add_argument("--experts", type=int, default=16, help="experts of a layer, on all ranks together")
    parser.add_argument("--top-k", type=int, default=4, help="experts that a token selects")
    parser.add_argument("--steps", type=int, default=20, help="timed steps, so many with overlap and so many without")
    parser.add_argument("--bf16", action="store_true", help="dispatch rows as bfloat16, not as fp8 with scales")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace, num_ranks: int) -> None:
    """Raise a ValueError if so many ranks cannot run with these options; on every rank, for all have the same."""
    hidden, experts = options.hidden, options.experts
    for name, is_good, needed in (
        *((name, getattr(options, name) >= 1, "at least 1") for name in ("layers", "tokens", "steps")),
        ("hidden", 128 <= hidden <= 16384 and hidden % 128 == 0, "a multiple of 128, at most 16384"),
        ("experts", experts >= 1 and experts % num_ranks == 0, f"a multiple of the {num_ranks} ranks"),
        ("top_k", 1 <= options.top_k <= experts, f"1 to {experts}"),
    ):
        if not is_good:
            raise ValueError(f"--{name.replace('_', '-')} must be {needed}; got {getattr(options, name)}")


class Layer:
    """The weights of a layer: the dense part and the router, equal on all ranks, and this rank's experts."""

    def __init__(self, number: int, options: argparse.Namespace, comm: MPI.Intracomm, device: torch.device) -> None:
        generator = torch.Generator(device)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=device).div(size[-2] ** 0.5).bfloat16()

        hidden, num_local = options.hidden, options.experts // comm.Get_size()
        generator.manual_seed(number)
        # As many multiplications as an attention layer's projections: to query, key, value, and from its result.
        self.dense_in, self.dense_out = draw(hidden, 2 * hidden), draw(2 * hidden, hidden)
        self.router = draw(hidden, options.experts).float()
        generator.manual_seed(1000 * (comm.Get_rank() + 1) + number)
        self.experts_in, self.experts_out = draw(num_local, hidden, hidden // 2), draw(num_local, hidden // 2, hidden)

    def experts(self, recv_x: Any, recv_count: torch.Tensor) -> torch.Tensor:
        """What the local experts make of the rows that dispatch received, `[L, M*R, H]`."""
        rows, scales = recv_x if isinstance(recv_x, tuple) else (recv_x, None)
        # Rows behind an expert's count are undefined, and combine does not read their results. On CPU most of them are
        # left out (in sixteens, for torch takes long over the first product of a shape). On CUDA the counts are on the
        # GPU and shapes in a graph are fixed, so all rows are multiplied; a grouped matrix product that reads counts
        # on the GPU, and takes fp8 as it is, would save that.
        most = rows.shape[1]
        if not rows.is_cuda:
            most = min(most, -(-int(recv_count.max()) // 16) * 16)
        x = rows[:, :most] if scales is None else dequantize(rows[:, :most], scales[:, :most]).bfloat16()
        results = torch.empty(rows.shape, dtype=torch.bfloat16, device=rows.device)
        results[:, :most] = torch.bmm(silu(torch.bmm(x, self.experts_in)), self.experts_out)
        return results


class Decoder:
    """A rank's layers, and how its tokens go through them."""

    def __init__(self, options: argparse.Namespace, buffer: hpc_moe.Buffer, device: torch.device) -> None:
        self.options, self.buffer, self.device = options, buffer, device
        self.layers = [Layer(number, options, buffer.group, device) for number in range(options.layers)]

    def step(self, tokens: list[torch.Tensor], overlap: bool) -> None:
        """One step of both micro-batches. Collective."""
        # The first one runs until it has sent, then the second one does, then the first goes on, and so forth. (`zip`
        # would stop when the first has ended, and the second would never receive what it sent last.)
        for _ in zip_longest(*(self._step(x, later=overlap) for x in tokens)):
            pass

    def _step(self, x: torch.Tensor, later: bool) -> Iterator[None]:
        """One step of a micro-batch, in place, with a pause after each call; with `later` its rows come meanwhile.

        Two rules are kept. At most two sends of a buffer are unreceived: a micro-batch pauses with one, and receives it
        before it sends again. And a step receives all that it sent, so that a graph of it can be replayed.
        """
        options, buffer = self.options, self.buffer
        y = x
        for layer in self.layers:
            y = y + silu(rms_norm(y, y.shape[1:]) @ layer.dense_in) @ layer.dense_out
            h = rms_norm(y, y.shape[1:])
            logits, topk_idx = (h.float() @ layer.router).topk(options.top_k)
            topk_weights = logits.softmax(dim=1)
            recv_x, recv_count, handle, _, receive = buffer.low_latency_dispatch(
                h, topk_idx, options.tokens, options.experts, use_fp8=not options.bf16, return_recv_hook=later
            )
            yield
            if later:
                receive()
            combined, _, receive = buffer.low_latency_combine(
                layer.experts(recv_x, recv_count), topk_idx, topk_weights, handle, return_recv_hook=later
            )
            yield
            if later:
                receive()
            y = y + combined
        x.copy_(rms_norm(y, y.shape[1:]))  # stands for the embeddings of the next tokens


class Loop:
    """Two micro-batches decoded step by step, with or without overlap, from the same tokens; times and outputs."""

    def __init__(self, decoder: Decoder, overlap: bool) -> None:
        """On CUDA, capture a graph. Collective."""
        generator = torch.Generator().manual_seed(decoder.buffer.rank)
        start = torch.randn(2, decoder.options.tokens, decoder.options.hidden, generator=generator)
        self._tokens = [x.to(decoder.device, torch.bfloat16) for x in start]  # a graph reads and writes these tensors
        self._is_cuda = decoder.device.type == "cuda"
        self.seconds: list[float] = []
        self.outputs: list[torch.Tensor] = []  # [2, T, H] on the CPU
        self._run: Callable[[], None] = lambda: decoder.step(self._tokens, overlap)
        if self._is_cuda:
            self._run = _captured(self._run)
            for x, first in zip(self._tokens, start, strict=True):
                x.copy_(first)  # the warm-up has changed them

    def step(self, comm: MPI.Intracomm) -> None:
        """One step, timed from when all ranks are there. Collective."""
        comm.Barrier()
        begin = time.perf_counter()
        self._run()
        if self._is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - begin)
        self.outputs.append(torch.stack(self._tokens).cpu())


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """What replays a CUDA graph of `run`. Collective, and so is every replay."""
    side = torch.cuda.Stream()  # torch wants the warm-up before a capture on a stream of its own
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # an old graph that the garbage collector finds during the capture would end it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def decode(options: argparse.Namespace, comm: MPI.Intracomm, buffer: hpc_moe.Buffer) -> bool:
    """Decode both ways and print what was found; returns whether the outputs are equal. Collective."""
    say = print if comm.Get_rank() == 0 else (lambda *_: None)
    decoder = Decoder(options, buffer, torch.device(options.device))
    num_tokens = 2 * options.tokens * comm.Get_size()
    say(
        f"{comm.Get_size()} ranks on {options.device}, each with 2 micro-batches of {options.tokens} tokens; "
        f"{options.layers} layers with hidden {options.hidden} and top-{options.top_k} of {options.experts} experts, "
        f"dispatch in {'bf16' if options.bf16 else 'fp8'}, {options.steps} steps"
    )
    loops = [Loop(decoder, overlap=False), Loop(decoder, overlap=True)]
    for number in range(options.steps):
        for loop in loops[:: 1 if number % 2 else -1]:  # the second one finds more in caches: now one, now the other
            loop.step(comm)
    buffer.check()  # raises what went wrong in replays
    for name, loop in zip(("without overlap:", "with overlap:   "), loops, strict=True):
        seconds = np.array(loop.seconds)
        comm.Allreduce(MPI.IN_PLACE, seconds, op=MPI.MAX)
        step = float(np.median(seconds))
        say(f"{name} {1e6 * step / options.layers:8.1f} us per layer, {num_tokens / step:10,.0f} tokens/s")
    without, overlapped = (torch.stack(loop.outputs) for loop in loops)
    # By bits; and NaN counts as different, for outputs that are all NaN would say nothing.
    differ = (without.view(torch.int16) != overlapped.view(torch.int16)) | without.isnan()
    num_values, num_different = comm.allreduce(np.array([differ.numel(), int(differ.sum())]))
    equal = "equal, bit by bit" if num_different == 0 else f"DIFFERENT in {num_different:,} values"
    say(f"outputs with and without overlap are {equal} ({num_values:,} values compared)")
    return bool(num_different == 0)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run. What cannot be run: a line from rank 0, exit status 2. An error on one rank ends all ranks."""
    comm = MPI.COMM_WORLD
    quiet: Any = contextlib.nullcontext() if comm.Get_rank() == 0 else contextlib.redirect_stderr(io.StringIO())
    with quiet:
        options = parse(arguments)
    try:
        try:
            check(options, comm.Get_size())
            sizes = options.tokens, options.hidden, comm.Get_size(), options.experts
            num_bytes = hpc_moe.Buffer.get_low_latency_rdma_size_hint(*sizes)
            buffer = hpc_moe.Buffer(comm, num_rdma_bytes=num_bytes, low_latency_mode=True, device=options.device)
        except (ValueError, hpc_moe.UnavailableError, hpc_moe.BootstrapError) as error:  # all ranks raise them, or none
            if comm.Get_rank() == 0:
                print(f"decode_loop.py: error: {error}", file=sys.stderr, flush=True)
            comm.Barrier()  # rank 0's message comes first
            raise SystemExit(2) from None
        with buffer:
            is_equal = decode(options, comm, buffer)
        sys.stdout.flush()
        comm.Barrier()
        raise SystemExit(0 if is_equal else 1)
    except Exception:
        traceback.print_exc()
        comm.Abort(1)


if __name__ == "__main__":
    main()
