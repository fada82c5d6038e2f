"""Forgetting Megatron's global state, so that one process can run several layouts after another."""

import torch.distributed as dist


def reset() -> None:
    """Return Megatron to where it was before it was initialised; call it on every rank.

    Its arguments, timers, calculators, parallel state and process groups go; the default process
    group and the CPU platform stay. Collective: one barrier. Models that were built keep their
    (now closed) groups: drop them.
    """
    from megatron.training.training import destroy_global_state

    # A rank that still communicates must not lose its groups.
    dist.barrier()
    destroy_global_state()
    # Megatron only forgets its groups; their sockets and threads would pile up.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)
