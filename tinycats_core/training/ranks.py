"""Communication between the ranks of one training: a rank is a process with a device of its own.

Every rank draws the whole batch and trains on its own part, so the number of ranks changes a run by rounding only.
"""

import json
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tinycats_core.errors import TrainingError

AGREE = timedelta(minutes=30)  # how long a rank waits for the others: rank 0 may be drawing or writing


class RankLost(TrainingError):
    """Another rank, or the connection to it, is gone."""


def rank() -> int:
    """Return the rank of this process, 0 if it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return how many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def largest(number: int) -> int:
    """Return the largest of all ranks' numbers, so that they decide alike. Raises RankLost."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    try:
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=_control())
    except RuntimeError as error:
        if not is_connection_lost(error):
            raise
        raise RankLost(f"another rank is gone ({_first_line(error)})") from None
    return int(tensor)


def is_connection_lost(error: RuntimeError) -> bool:
    """Return whether an error of a step means that another rank no longer answers."""
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection"))
    )


def average(tensor: Tensor) -> Tensor:
    """Return the mean over all ranks, without waiting for a GPU."""
    if world_size() > 1:
        dist.all_reduce(tensor)
        tensor /= world_size()
    return tensor


_control_group: list[Any] = []


def _control() -> Any:
    """Return the group for decisions: over the CPU, so that they wait for no GPU."""
    if dist.get_backend() == "gloo":
        return None
    if not _control_group:
        _control_group.append(dist.new_group(backend="gloo", timeout=AGREE))
    return _control_group[0]


def _first_line(error: BaseException) -> str:
    return json.dumps(str(error).splitlines()[0])[1:-1] if str(error) else type(error).__name__
