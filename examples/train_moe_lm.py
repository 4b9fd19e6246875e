"""Train a small mixture-of-experts language model on real text, with its experts spread over MPI ranks.

    mpirun -n 4 python examples/train_moe_lm.py

or, in this repository's own environment (after `make build`),

    .venv/bin/python tools/launch.py -n 4 -- .venv/bin/python examples/train_moe_lm.py

The text is the source code of Python's standard library; the model reads bytes. Attention is replicated on all ranks
(data parallel), each rank holds its share of every layer's experts, and tokens travel with `hpc_moe`. At the end
`runs/moe_lm/` holds a JSON with all curves and a picture. `--compare-single` trains the same model in one process, too,
and compares the losses; `--save` and `--resume` work across different numbers of ranks.

The parts are in `examples/moe_lm/`. Not a recipe for good language models: it is small enough for two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI

import hpc_moe
from hpc_moe import nn

# isort: split
from moe_lm import checkpoint, report
from moe_lm.model import make_model
from moe_lm.progress import Progress
from moe_lm.settings import Settings
from moe_lm.text import Text, read_stdlib
from moe_lm.training import History, Trainer, write_sample
from moe_lm.waiting import wait

PROMPT = b"    def read(self, "


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options of the run, and one per field of `Settings`."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n    ")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/moe_lm"), help="folder for the JSON and the picture")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--compare-single",
        action="store_true",
        help="train in one process too (rounding to bfloat16 alike), and compare",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write a checkpoint at the end")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="go on from a checkpoint, with its settings")
    parser.add_argument("--stop-after", type=int, metavar="STEP", help="end at this step of the schedule")
    parser.add_argument(
        "--sample", type=int, default=300, metavar="BYTES", help="length of the text written at the end"
    )
    parser.add_argument("--progress", choices=("auto", "bar", "lines"), default="auto")
    group = parser.add_argument_group("settings of the model and the training (see moe_lm/settings.py)")
    for field in dataclasses.fields(Settings):
        kind = type(field.default)
        group.add_argument(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, metavar=kind.__name__)
    return parser.parse_args(arguments)


def prepare(options: argparse.Namespace, comm: MPI.Intracomm) -> tuple[Settings, dict[str, Any] | None, int]:
    """The settings, the content of the checkpoint to resume, and the step to end at. Collective.

    Raises:
        ValueError: the options cannot be used; on every rank.
    """
    content = None
    if options.resume:
        missing = np.array([not options.resume.is_file()], np.int64)
        nn.all_reduce_sum(comm, missing)
        if missing[0]:
            raise ValueError(f"--resume: {missing[0]} of {comm.Get_size()} ranks find no file {options.resume}")
        content = checkpoint.read(options.resume)
        settings = checkpoint.settings_of(content)
    else:
        settings = Settings(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Settings)})
    settings.check(comm.Get_size())
    first = content["step"] if content else 0
    until = settings.steps if options.stop_after is None else min(options.stop_after, settings.steps)
    if until <= first:
        what = "--stop-after" if options.stop_after is not None else "--steps"
        raise ValueError(f"{what} must be greater than {first}, the steps done before; got {until}")
    return settings, content, until


def choose_gpu(comm: MPI.Intracomm) -> None:
    """Make the GPU with the number of the local rank the current one, where a process sees several."""
    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    if torch.cuda.device_count() > 1:
        torch.cuda.set_device(node.Get_rank() % torch.cuda.device_count())
    node.Free()


def train(
    settings: Settings, content: dict[str, Any] | None, until: int, options: argparse.Namespace, comm: MPI.Intracomm
) -> None:
    """The whole job. Collective."""
    rank = comm.Get_rank()
    if options.device == "cuda":
        choose_gpu(comm)
    text = read_stdlib(comm, settings.max_bytes, settings.seed)
    hint = hpc_moe.Config().get_nvl_buffer_size_hint(settings.hidden * 2, comm.Get_size())
    with hpc_moe.Buffer(comm, hint, device=options.device) as buffer:
        model = make_model(settings, comm, buffer, options.device)
        trainer = Trainer(settings, model, text, comm, options.device)
        if content:
            checkpoint.restore(trainer, content)
        say = print if rank == 0 else (lambda *_, **__: None)
        say(_introduction(settings, trainer, text, comm))
        progress = Progress(trainer.step, until, settings.batch * settings.context, options.progress)
        trainer.train(until, progress.show if rank == 0 else (lambda record: None))
        if options.save:
            checkpoint.save(options.save, trainer)
            say(f"checkpoint: {options.save}")
        sample = b""
        if options.sample > 0:
            sample = write_sample(model, comm, PROMPT, options.sample, settings.seed, settings.context)
    machine = report.describe_machine(comm)
    single = _train_single(settings, text, content, until, options, comm) if options.compare_single else None
    if rank == 0:
        _finish(options.out, machine, trainer, single, sample)
    wait(comm.Ibarrier(), "rank 0 to write the report")


def _train_single(
    settings: Settings,
    text: Text,
    content: dict[str, Any] | None,
    until: int,
    options: argparse.Namespace,
    comm: MPI.Intracomm,
) -> History | None:
    """The same training in one process, with no communication, on rank 0 while the others wait.

    Its history has the steps of this run only, not those from before the checkpoint, which agree by definition.
    """
    history = None
    if comm.Get_rank() == 0:
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, min(comm.Get_size(), 8)))
        trainer = Trainer(
            settings, make_model(settings, None, None, options.device), text, MPI.COMM_SELF, options.device
        )
        if content:
            checkpoint.restore(trainer, content)
        first = trainer.step
        print("the same in one process:")
        trainer.train(until, Progress(trainer.step, until, settings.batch * settings.context, options.progress).show)
        torch.set_num_threads(threads)
        history = trainer.history
        history.records = [record for record in history.records if record.step > first]
    wait(comm.Ibarrier(), "rank 0 to train in one process", limit=24 * 3600)
    return history


def _introduction(settings: Settings, trainer: Trainer, text: Text, comm: MPI.Intracomm) -> str:
    per_rank = sum(parameter.numel() for parameter in trainer.model.parameters())
    experts = sum(parameter.numel() for moe in trainer.model.moes for parameter in moe.experts.parameters())
    total = per_rank + experts * (comm.Get_size() - 1)
    per_expert = experts * comm.Get_size() // (settings.layers * settings.experts)
    active = total - settings.layers * (settings.experts - settings.top_k) * per_expert
    lines = [
        f"text: {text.train.size / 1e6:.1f} MB of Python's library, {text.held_out.size / 1e6:.1f} MB more held out",
        f"model: {total / 1e6:.2f} M parameters, {active / 1e6:.2f} M used per byte; {settings.layers} layers of "
        f"{settings.experts} experts, top-{settings.top_k}",
        f"ranks: {comm.Get_size()}, each with {settings.experts // comm.Get_size()} experts per layer "
        f"({per_rank / 1e6:.2f} M parameters)",
        f"steps: {trainer.step} to {settings.steps}, {settings.batch * settings.context} bytes each",
        "shown: training loss, speed, share of time in dispatch and combine, busiest expert's load over the mean",
    ]
    return "\n".join(lines)


def _finish(out: Path, machine: dict[str, Any], trainer: Trainer, single: History | None, sample: bytes) -> None:
    """Write the report and say what is in it, on rank 0."""
    out.mkdir(parents=True, exist_ok=True)
    written = sample.decode(errors="replace")
    report.write_json(out / "report.json", machine, trainer.settings, trainer.history, single, written)
    from moe_lm import picture  # here, because matplotlib takes its time and only rank 0 needs it

    picture.draw(out / "report.png", machine, trainer.settings, trainer.history, single)
    figures = report.summary(trainer.history, trainer.settings, single)
    if written:
        print("\nthe model writes:\n\n    " + written.replace("\n", "\n    ").rstrip() + "\n")
    print(
        f"loss {figures['first_bits_per_byte']:.2f} -> {figures['last_bits_per_byte']:.2f} bits per byte "
        f"(held-out files: {figures['held_out_bits_per_byte']:.2f}), {figures['tokens_per_second']:,.0f} tokens/s, "
        f"{figures['dispatch_share']:.0%} of the time in dispatch, {figures['combine_share']:.0%} in combine"
    )
    if single is not None:
        print(
            "difference of the loss to the same training in one process, in bits per byte: mean "
            f"{figures['mean_difference_to_single_process']:.4f}, largest of any step "
            f"{figures['largest_difference_to_single_process']:.4f}"
        )
    print(f"report: {out / 'report.json'}, {out / 'report.png'}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run. Options that cannot be used: a line from rank 0, exit status 2. Another error on one rank ends all ranks."""
    comm = MPI.COMM_WORLD
    quiet: Any = contextlib.nullcontext() if comm.Get_rank() == 0 else contextlib.redirect_stderr(io.StringIO())
    with quiet:
        options = parse(arguments)
    try:
        try:
            settings, content, until = prepare(options, comm)
        except ValueError as error:
            if comm.Get_rank() == 0:
                print(f"train_moe_lm.py: error: {error}", file=sys.stderr, flush=True)
            wait(comm.Ibarrier(), "all ranks to end")  # rank 0's message comes first
            raise SystemExit(2) from None
        train(settings, content, until, options, comm)
    except Exception:
        traceback.print_exc()
        if comm.Get_size() == 1:
            raise SystemExit(1) from None
        comm.Abort(1)


if __name__ == "__main__":
    main()
