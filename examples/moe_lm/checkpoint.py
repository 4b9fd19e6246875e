"""Checkpoints that do not depend on the number of ranks: one file, all experts, the optimizer's state beside them."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hpc_moe import nn
from moe_lm.settings import Settings
from moe_lm.training import History, Trainer


def save(path: Path, trainer: Trainer) -> None:
    """Gather everything on rank 0 and write it there; an older file of that name stays whole until then. Collective."""
    comm = trainer.comm
    model = nn.full_state_dict(trainer.model, comm)
    experts = nn.expert_parameter_names(trainer.model)
    optimizer: dict[str, dict[str, Any]] = {}
    for name, parameter in trainer.model.named_parameters():
        optimizer[name] = {}
        for key, value in trainer.optimizer.state[parameter].items():
            if name in experts and value.shape == parameter.shape:
                value = nn.gather_experts(value, comm)
            optimizer[name][key] = value
    if comm.Get_rank() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(path.name + ".unfinished")
        content = {
            "settings": asdict(trainer.settings),
            "step": trainer.step,
            "model": model,
            "optimizer": optimizer,
            "history": trainer.history.to_plain(),
        }
        torch.save(content, unfinished)
        os.replace(unfinished, path)


def read(path: Path) -> dict[str, Any]:
    """Open a checkpoint; tensors stay in the file until they are used. Every rank reads it (a shared file system)."""
    content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    return content


def settings_of(content: dict[str, Any]) -> Settings:
    """The settings of the run that wrote it."""
    return Settings(**content["settings"])


def restore(trainer: Trainer, content: dict[str, Any]) -> None:
    """Put a checkpoint into a fresh trainer, on any number of ranks, or in one process without communication."""
    comm = trainer.comm
    nn.load_full_state_dict(trainer.model, content["model"], comm)
    experts = nn.expert_parameter_names(trainer.model)
    for name, parameter in trainer.model.named_parameters():
        state = {}
        for key, value in content["optimizer"][name].items():
            if name in experts and value.dim():
                value = nn.local_experts(value, parameter, comm)
            state[key] = value.clone().to(parameter.device if value.dim() else "cpu")
        trainer.optimizer.state[parameter] = state
    trainer.step = content["step"]
    trainer.history = History.from_plain(content["history"])
