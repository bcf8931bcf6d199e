"""Several ranks for a test, as forks of a process that has imported torch and not yet used it:
importing it anew takes each rank seconds."""
import os
import socket
import sys
import time

import torch
import torch._dynamo                # imported here so that the forks need not, 2 s each
import torch.distributed as dist
import torch.distributed.fsdp


def world(ranks: int, call, *args, **options) -> None:
    """Run call(*args, **options) in `ranks` processes, with torchrun's environment variables, and
    fail unless all succeed.

    Only the processes may import support.ranks, which looks for its rank when it is imported."""
    torch.set_num_threads(1)
    port = free_port()
    begin = time.time()

    children = []
    for rank in range(ranks):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="localhost", MASTER_PORT=str(port))
            run_rank(call, args, options)
        children.append(child)

    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), (call.__name__, statuses)
    print(f"{ranks} ranks: {call.__name__} {time.time() - begin:.1f} s", flush=True)


def run_rank(call, args, options) -> None:
    """Run the call in a forked process, and end the process."""
    try:
        call(*args, **options)
        if dist.is_initialized():
            dist.barrier()
        # Not sys.exit: at times gloo aborts when it is destroyed.
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]
