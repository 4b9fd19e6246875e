"""What defines a training run: sizes, schedule, seeds. What does not (ranks, output folder) is not here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Equal settings give equal losses, on any number of ranks.

    Attributes:
        layers: transformer blocks, each with a mixture-of-experts feed-forward.
        hidden: channels; a multiple of 128.
        heads: attention heads.
        experts: experts per block.
        top_k: experts per token.
        ffn_hidden: width of an expert.
        context: bytes a token can look back, and the length of a training window.
        batch: windows per step over all ranks.
        steps: optimizer steps that the learning-rate schedule spans.
        warmup: steps of linear warm-up.
        learning_rate: its peak.
        weight_decay: of matrices.
        clip: largest gradient norm.
        balance_coef: factor of the load-balancing loss.
        z_coef: factor of the router's z-loss.
        max_bytes: most bytes of text read.
        eval_windows: held-out windows per evaluation.
        eval_every: steps between evaluations.
        seed: of the initial weights and of the order of the text.
    """

    layers: int = 3
    hidden: int = 128
    heads: int = 4
    experts: int = 16
    top_k: int = 2
    ffn_hidden: int = 128
    context: int = 128
    batch: int = 32
    steps: int = 400
    warmup: int = 30
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    clip: float = 1.0
    balance_coef: float = 0.02
    z_coef: float = 1e-4
    max_bytes: int = 12_000_000
    eval_windows: int = 32
    eval_every: int = 50
    seed: int = 0

    def check(self, num_ranks: int) -> None:
        """Whether a run on so many ranks can have these settings.

        Raises:
            ValueError: it cannot.
        """
        for name in (
            "layers",
            "heads",
            "ffn_hidden",
            "context",
            "batch",
            "steps",
            "warmup",
            "eval_windows",
            "eval_every",
        ):
            _require(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        _require(self.hidden >= 1 and self.hidden % 128 == 0, "hidden", "a multiple of 128", self.hidden)
        _require(self.hidden % (2 * self.heads) == 0, "heads", f"a divisor of {self.hidden // 2}", self.heads)
        is_multiple = self.experts >= 1 and self.experts % num_ranks == 0
        _require(is_multiple, "experts", f"a multiple of the {num_ranks} ranks", self.experts)
        _require(1 <= self.top_k <= self.experts, "top_k", f"1 to {self.experts}", self.top_k)
        _require(self.max_bytes >= 1_000_000, "max_bytes", "at least 1000000", self.max_bytes)
        _require(self.seed >= 0, "seed", "at least 0", self.seed)


def _require(condition: bool, name: str, needed: str, got: int) -> None:
    if not condition:
        raise ValueError(f"--{name.replace('_', '-')} must be {needed}; got {got}")
