"""Mixture-of-experts layers on top of `hpc_moe.Buffer`: differentiable dispatch and combine, a router, modules.

For training and inference codes that want a working expert-parallel layer, or parts of one. Not a training framework:
optimizer, data and schedule are the user's. Imported by its users only (`import hpc_moe.nn`).
"""

from hpc_moe.nn.functional import Dispatched, RoutingHandle, combine, dispatch
from hpc_moe.nn.moe import ExpertParallelMoE, Experts, MoE, MoEStatistics
from hpc_moe.nn.parallel import (
    all_reduce_sum,
    clip_gradients,
    expert_parameter_names,
    full_state_dict,
    gather_experts,
    load_full_state_dict,
    local_experts,
    synchronize_gradients,
)
from hpc_moe.nn.router import RouterOutput, TopKRouter

__all__ = [
    "Dispatched",
    "ExpertParallelMoE",
    "Experts",
    "MoE",
    "MoEStatistics",
    "RouterOutput",
    "RoutingHandle",
    "TopKRouter",
    "all_reduce_sum",
    "clip_gradients",
    "combine",
    "dispatch",
    "expert_parameter_names",
    "full_state_dict",
    "gather_experts",
    "load_full_state_dict",
    "local_experts",
    "synchronize_gradients",
]
