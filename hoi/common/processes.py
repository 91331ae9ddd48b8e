"""The processes of one training run.  torchrun's environment -> a process group of torch.distributed."""

import os
from datetime import timedelta

import torch.distributed as dist

PATIENCE = timedelta(hours=12)  # for the slowest process, which may encode most of what an interrupted run left


def join_processes(backend: str, rank: int, world_size: int) -> None:
    """Connect the processes that torchrun started.

    After a restart torchrun's store may still hold the addresses of the dead, which the living would then call in
    vain; so on one machine each restart gets a room of its own in it.  (Machines count restarts on their own: for them
    torchrun itself must open new stores, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment.)
    """
    store, env = None, os.environ
    restarts = int(env.get("TORCHELASTIC_RESTART_COUNT", 0))
    alone, shared = int(env.get("LOCAL_WORLD_SIZE", 0)) == world_size, env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restarts and alone and shared:
        server = dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"]), world_size, is_master=False)
        store = dist.PrefixStore(f"restart_{restarts}", server)
    elif restarts == 0 and shared and not alone and rank == 0 and int(env.get("TORCHELASTIC_MAX_RESTARTS", 0)):
        print("restarts over several machines need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment")
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)
