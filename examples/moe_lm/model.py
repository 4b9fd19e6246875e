"""A small byte-level transformer whose feed-forward layers are mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from mpi4py import MPI

from hpc_moe.nn import ExpertParallelMoE, MoE, TopKRouter
from moe_lm.settings import Settings

NUM_BYTES = 256


class Attention(torch.nn.Module):
    """Causal multi-head attention with rotary positions."""

    def __init__(self, hidden: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        self.project_in = torch.nn.Linear(hidden, 3 * hidden, bias=False)
        self.project_out = torch.nn.Linear(hidden, hidden, bias=False)
        half = hidden // heads // 2
        angles = torch.arange(context).unsqueeze(1) * 1000.0 ** (-torch.arange(half) / half)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.project_in(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(self._rotate(query), self._rotate(key), value, is_causal=True)
        mixed: torch.Tensor = self.project_out(attended.transpose(1, 2).flatten(2))
        return mixed

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        first, second = x.chunk(2, dim=-1)
        cos, sin = self.cos[: x.shape[2]], self.sin[: x.shape[2]]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(torch.nn.Module):
    """Attention, then a mixture of experts, each on normalised input and added to the stream."""

    def __init__(self, settings: Settings, moe: MoE | ExpertParallelMoE) -> None:
        super().__init__()
        self.attention_norm = torch.nn.RMSNorm(settings.hidden)
        self.attention = Attention(settings.hidden, settings.heads, settings.context)
        self.moe_norm = torch.nn.RMSNorm(settings.hidden)
        self.moe = moe

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attention(self.attention_norm(x))
        out, loss = self.moe(self.moe_norm(x))
        return x + out, loss


class ByteModel(torch.nn.Module):
    """Bytes `[batch, time] int64` to logits `[batch, time, 256]`, and the sum of the routers' losses.

    Attributes:
        moes: the mixture-of-experts layers.
    """

    def __init__(self, settings: Settings, make_moe: Callable[[int], MoE | ExpertParallelMoE]) -> None:
        super().__init__()
        torch.manual_seed(settings.seed)  # what is replicated; experts and routers have generators of their own
        self.embedding = torch.nn.Embedding(NUM_BYTES, settings.hidden)
        blocks = [Block(settings, make_moe(index)) for index in range(settings.layers)]
        self.moes = [block.moe for block in blocks]
        self.blocks = torch.nn.ModuleList(blocks)
        self.norm = torch.nn.RMSNorm(settings.hidden)
        self.head = torch.nn.Linear(settings.hidden, NUM_BYTES, bias=False)
        torch.nn.init.normal_(self.embedding.weight, std=0.5)
        torch.nn.init.normal_(self.head.weight, std=0.02)
        for block in blocks:
            torch.nn.init.normal_(block.attention.project_in.weight, std=settings.hidden**-0.5)
            torch.nn.init.normal_(block.attention.project_out.weight, std=0.5 * settings.hidden**-0.5)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embedding(tokens)
        router_loss = x.new_zeros(())
        for block in self.blocks:
            x, loss = block(x)
            router_loss = router_loss + loss
        return self.head(self.norm(x)), router_loss


def make_model(settings: Settings, comm: MPI.Intracomm | None, buffer: Any, device: str) -> ByteModel:
    """The model with its experts spread over `comm` through `buffer`, or all in this process if `comm` is None.

    In one process tokens are rounded to bfloat16 where they would travel otherwise, so that losses can be compared.
    """

    def make_moe(index: int) -> MoE | ExpertParallelMoE:
        seed = 1000 * settings.seed + index
        router = TopKRouter(
            settings.hidden,
            settings.experts,
            settings.top_k,
            norm_topk_prob=True,
            balance_coef=settings.balance_coef,
            z_coef=settings.z_coef,
            comm=comm,
            seed=seed,
        )
        sizes = (settings.hidden, settings.ffn_hidden, settings.experts, settings.top_k)
        if comm is None:
            return MoE(*sizes, router=router, seed=seed, travel_dtype=torch.bfloat16)
        return ExpertParallelMoE(comm, *sizes, router=router, buffer=buffer, seed=seed)

    return ByteModel(settings, make_moe).to(device)
