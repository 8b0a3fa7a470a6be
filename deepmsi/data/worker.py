"""A process that makes shards: tasks come as lines on standard input, news goes out as lines on the standard
output it was started with. It ends when its input does, so it never outlives the process that started it for
longer than one row. A decoder that crashes takes this process with it and no other.
"""

import json
import os
import signal
import sys
from typing import Any

from deepmsi.data.shards import Task, make_shard
from deepmsi.errors import DiskFullError, UserError


def main() -> None:
    """Serve tasks until the input ends."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the starter tells when to stop
    torch.set_num_threads(1)
    news = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not stand between the lines

    def tell(**message: Any) -> None:
        news.write(json.dumps(message) + "\n")
        news.flush()

    for line in sys.stdin:
        try:
            make_shard(Task.from_json(line), lambda i: tell(row=i))
        except UserError as error:
            tell(error=str(error), full=isinstance(error, DiskFullError))
        else:
            tell(done=True)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        os._exit(1)
