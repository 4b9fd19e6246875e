"""The shortest complete use of hpc_moe: tokens go to their experts, on whatever rank, and the results come back.

mpirun -n 4 python examples/dispatch_combine.py, or with this repository's own environment (after `make build`):
.venv/bin/python tools/launch.py -n 4 -- .venv/bin/python examples/dispatch_combine.py
"""

import torch
from mpi4py import MPI

from hpc_moe import Buffer, Config

comm = MPI.COMM_WORLD
rank, num_ranks = comm.Get_rank(), comm.Get_size()
num_tokens, hidden, top_k, num_experts = 1000, 512, 2, 4 * num_ranks

torch.manual_seed(rank)  # every rank has tokens of its own; the router is a random one here
x = torch.randn(num_tokens, hidden, dtype=torch.bfloat16)
topk_weights, topk_idx = torch.rand(num_tokens, num_experts).softmax(dim=1).topk(top_k)

num_bytes = Config().get_nvl_buffer_size_hint(2 * hidden, num_ranks)
with Buffer(comm, num_bytes, device="cpu") as buffer:
    # Grouped layout: the rows of this rank's first expert, then those of its second, and so on.
    rows, _, weights, counts, handle, _ = buffer.dispatch(
        x, topk_idx=topk_idx, topk_weights=topk_weights, num_experts=num_experts, expert_layout="grouped"
    )
    # The experts: number e multiplies by e. Then the weights, row by row, because combine only sums.
    first = rank * len(counts)
    results = [(first + local) * part for local, part in enumerate(rows.split(counts))]
    combined = buffer.combine(torch.cat(results) * weights.unsqueeze(1).bfloat16(), handle)[0]

expected = x.float() * (topk_idx * topk_weights).sum(dim=1, keepdim=True)
error = (combined.float() - expected).abs().max() / expected.abs().max()
if rank == 0:
    print(f"{num_ranks} ranks x {num_tokens} tokens, {num_experts} experts; rank 0's received {counts} tokens")
    print(f"largest error of the combined result: {error:.4f} of the largest value (bfloat16 rounds to 0.0039)")
