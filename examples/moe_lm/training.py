"""The training loop: one step on any number of ranks, evaluation, and the record of what happened.

The mean of the ranks' losses is the loss of the whole batch, so gradients are averaged over the ranks, and a run on R
ranks is the run of one process but for rounding.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mpi4py import MPI

from hpc_moe import nn
from moe_lm.model import ByteModel
from moe_lm.settings import Settings
from moe_lm.text import Text, held_out_windows, own_rows, training_windows

LOAD_COLUMNS = 100  # time bins of the expert load that is kept


@dataclass(frozen=True)
class StepRecord:
    """What one step did. Seconds are means over the ranks; step counts from 1.

    Attributes:
        step: number of the step.
        bits: training loss in bits per byte, before the step's update, without the routers' losses.
        router_loss: sum of the routers' losses, weighted.
        gradient_norm: before clipping.
        busiest_over_mean: tokens of the busiest expert over the mean, averaged over the layers.
        seconds: the whole step.
        dispatch_seconds: in `Buffer.dispatch`, waiting for other ranks included.
        combine_seconds: in `Buffer.combine`, alike.
        synchronize_seconds: averaging gradients.
    """

    step: int
    bits: float
    router_loss: float
    gradient_norm: float
    busiest_over_mean: float
    seconds: float
    dispatch_seconds: float
    combine_seconds: float
    synchronize_seconds: float


@dataclass
class History:
    """All that the report needs, in plain types.

    Attributes:
        records: one per step.
        evaluations: `(step, held-out bits per byte)`.
        load_bin: steps per column of `expert_load`.
        expert_load: per bin, per layer, tokens per expert.
    """

    load_bin: int
    records: list[StepRecord] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    expert_load: list[list[list[int]]] = field(default_factory=list)

    def add(self, record: StepRecord, load: torch.Tensor) -> None:
        """Append a step; `load` is `[layers, E] int64`."""
        self.records.append(record)
        if (record.step - 1) // self.load_bin < len(self.expert_load):
            load = load + torch.tensor(self.expert_load.pop())
        self.expert_load.append(load.tolist())

    def to_plain(self) -> dict[str, Any]:
        """As dicts and lists, for JSON and checkpoints."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> History:
        """The inverse of `to_plain`."""
        records = [StepRecord(**record) for record in plain["records"]]
        evaluations = [(step, bits) for step, bits in plain["evaluations"]]
        return cls(plain["load_bin"], records, evaluations, plain["expert_load"])


class Trainer:
    """A model in training on the ranks of `comm` (`MPI.COMM_SELF` for one process).

    Attributes:
        model: with its experts on the ranks of `comm`.
        optimizer: AdamW over this rank's parameters.
        step: steps done.
        history: of all steps since the first, those before a checkpoint included.
    """

    def __init__(self, settings: Settings, model: ByteModel, text: Text, comm: MPI.Intracomm, device: str) -> None:
        self.settings, self.model, self.text, self.comm, self.device = settings, model, text, comm, device
        decayed = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
        others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
        groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.step = 0
        self.history = History(load_bin=max(1, settings.steps // LOAD_COLUMNS))

    def train(self, until: int, show: Callable[[StepRecord], None]) -> None:
        """Train up to step `until`, and call `show` with every step's record. Collective."""
        if self.step == 0:
            self.history.evaluations.append((0, self.evaluate()))
        while self.step < until:
            record, load = self._train_step()
            self.history.add(record, load)
            if self.step % self.settings.eval_every == 0 or self.step == self.settings.steps:
                self.history.evaluations.append((self.step, self.evaluate()))
            show(record)

    def evaluate(self) -> float:
        """Bits per byte on the held-out windows. Collective."""
        windows = held_out_windows(self.text, self.settings.eval_windows, self.settings.context, self.settings.seed)
        with torch.no_grad():
            loss, _ = self._loss(*windows)
        total = np.array([float(loss)])
        nn.all_reduce_sum(self.comm, total)
        return float(total[0]) / self.comm.Get_size() / math.log(2)

    def _train_step(self) -> tuple[StepRecord, torch.Tensor]:
        begin = time.perf_counter()
        settings = self.settings
        for moe in self.model.moes:
            moe.statistics.reset()
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(settings, self.step)
        self.optimizer.zero_grad()
        windows = training_windows(self.text, self.step, settings.batch, settings.context, settings.seed)
        loss, router_loss = self._loss(*windows)
        torch.autograd.backward(loss + router_loss)
        synchronize_begin = time.perf_counter()
        nn.synchronize_gradients(self.model, self.comm)
        synchronize_seconds = time.perf_counter() - synchronize_begin
        norm = nn.clip_gradients(self.model, self.comm, settings.clip)
        self.optimizer.step()
        self.step += 1

        statistics = [moe.statistics for moe in self.model.moes]
        means = np.array(
            [
                float(loss.detach()) / math.log(2),
                float(router_loss.detach()),
                time.perf_counter() - begin,
                sum(each.dispatch_seconds for each in statistics),
                sum(each.combine_seconds for each in statistics),
                synchronize_seconds,
            ]
        )
        nn.all_reduce_sum(self.comm, means)
        bits, router_bits, seconds, dispatch, combine, synchronize = (means / self.comm.Get_size()).tolist()
        load = torch.stack([each.expert_load for each in statistics])
        busiest = float((load.amax(1) / load.double().mean(1)).mean())
        record = StepRecord(self.step, bits, router_bits, norm, busiest, seconds, dispatch, combine, synchronize)
        return record, load.clone()

    def _loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's share of the batch's loss in nats (the mean over ranks is the batch's), and the routers' loss."""
        rank, num_ranks = self.comm.Get_rank(), self.comm.Get_size()
        own_inputs = own_rows(inputs, rank, num_ranks).to(self.device)
        own_targets = own_rows(targets, rank, num_ranks).to(self.device)
        logits, router_loss = self.model(own_inputs)
        total = F.cross_entropy(logits.flatten(0, 1), own_targets.flatten(), reduction="sum")
        return total * (num_ranks / targets.numel()), router_loss


def learning_rate(settings: Settings, step: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth of the peak. `step` counts from 0."""
    warmup = min(1.0, (step + 1) / settings.warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(step / settings.steps, 1.0)))
    return settings.learning_rate * warmup * (0.05 + 0.95 * cosine)


def write_sample(model: ByteModel, comm: MPI.Intracomm, prompt: bytes, length: int, seed: int, context: int) -> bytes:
    """Let the model continue a prompt, drawn at temperature 0.7. Collective: the other ranks' experts work for rank 0.

    Rank 0 has the only tokens; the others take part with none, which is how a layer's experts serve a single request.
    """
    generator = torch.Generator().manual_seed(seed)
    is_writer = comm.Get_rank() == 0
    written = list(prompt)
    device = next(model.parameters()).device
    with torch.no_grad():
        for _ in range(length):
            window = torch.tensor(written[-context:], device=device).unsqueeze(0)
            logits, _ = model(window if is_writer else window[:0])
            if is_writer:
                likelihood = (logits[0, -1].float().cpu() / 0.7).softmax(dim=-1)
                written.append(int(torch.multinomial(likelihood, 1, generator=generator)))
    return bytes(written)
