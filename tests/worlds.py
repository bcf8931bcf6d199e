"""Worlds of several ranks for the tests, as forks of a process that has imported torch but not yet
used it: importing takes seconds."""
import os
import socket
import sys
import time

import torch
import torch._dynamo                # these take each process two seconds more
import torch.distributed as dist
import torch.distributed.fsdp


def world(ranks: int, call, *args, **options) -> None:
    """call(...) in so many processes at once, which then wait for each other. What looks for its
    rank when it is imported, as pretrain does, only they may import."""
    torch.set_num_threads(1)
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    children, begin = [], time.time()
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks),
                              MASTER_ADDR="localhost", MASTER_PORT=str(port))
            try:
                call(*args, **options)
                if dist.is_initialized():
                    dist.barrier()
                os._exit(0)                          # at times gloo aborts as it is destroyed
            finally:
                sys.excepthook(*sys.exc_info())
                os._exit(1)
    codes = [os.waitpid(child, 0)[1] for child in children]
    assert not any(codes), (call.__name__, codes)
    print(f"{ranks} ranks: {call.__name__} {time.time() - begin:.1f} s", flush=True)
