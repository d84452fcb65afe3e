"""A Ray cluster to run on: a private one on this machine that ends with the run, or one that is running already."""

from __future__ import annotations

import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from embodied_rl.errors import UserError
from embodied_rl.pipeline.ray_guard import guarded

ATTEMPTS = 3
"""Ray allows its parts 30 seconds each to start, which a crowded machine may need more often than once."""
CONNECT = 10.0
"""Seconds that a cluster gets to accept a connection."""
RESERVE = 60.0
"""Seconds after which resources that others hold are not waited for any longer."""

_PRIVATE = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # listens on the loopback interface alone, as it does on those systems
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),  # of this process: no file is written to the user's folder
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 would lose against everything else on the machine
}


@contextmanager
def cluster(address: str | None) -> Iterator[None]:
    """Connected to the cluster at `address`, or to a private one, which ends with the block. A process that is
    connected already stays so. Raises `UserError` when there is no such cluster or none can be started."""
    if address is None and "ray" not in sys.modules:  # its parts in this process read them only once
        for name, value in _PRIVATE.items():
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    _connect(ray, address)
    try:
        with nullcontext() if address else guarded(_node()):
            yield
    finally:
        ray.shutdown()


def _node() -> Any:
    """Ray's own handle of what it started here."""
    from ray._private import worker

    return worker._global_node


def _connect(ray: Any, address: str | None) -> None:
    if address is not None:
        _require_listener(address)
    quiet: dict[str, Any] = {"log_to_driver": False, "configure_logging": False}
    for attempt in range(ATTEMPTS if address is None else 1):
        try:
            if address is None:
                ray.init(address="local", include_dashboard=False, **quiet)
            else:
                ray.init(address=address, **quiet)
            return
        except Exception as error:  # Ray raises bare ones
            ray.shutdown()
            reason, last = str(error).strip().partition("\n")[0], attempt
    if address is None:
        raise UserError(f"a private Ray cluster did not start ({last + 1} attempts; the last: {reason})")
    raise _unreachable(address, reason)


def _require_listener(address: str) -> None:
    """Ray itself takes minutes to find out that nobody is there. Other forms than "host:port" are Ray's business."""
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or "/" in host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT).close()
    except (OSError, OverflowError) as error:
        raise _unreachable(address, str(error)) from error


def _unreachable(address: str, reason: str) -> UserError:
    return UserError(f"no Ray cluster answers at pipeline.ray_address {address} ({reason}): see `ray status`")


def reserve(count: int, cpus: float, gpus: float) -> list[Any]:
    """`count` places of so many processors each, all there. Raises `UserError` when the cluster has no room, at once
    where it never will have any."""
    require_room(count, cpus, gpus)
    places = [place(cpus, gpus) for _ in range(count)]
    deadline = time.monotonic() + RESERVE
    if all(there(each, deadline - time.monotonic()) for each in places):
        return places
    for each in places:
        give_back(each)
    raise taken(count, cpus, gpus)


def require_room(count: int, cpus: float, gpus: float) -> None:
    """Raises `UserError` when the cluster could not hold `count` places even if they were all free."""
    if (room := capacity(cpus, gpus)) < count:
        raise UserError(
            f"{count} rollout workers of {_each(cpus, gpus)} do not fit into the Ray cluster, which holds {room}: "
            f"lower pipeline.rollout_workers, rollout_cpus or rollout_gpus"
        )


def taken(count: int, cpus: float, gpus: float) -> UserError:
    """That others have the places."""
    return UserError(
        f"the Ray cluster has {count} times {_each(cpus, gpus)}, but others have held them for {RESERVE:.0f} seconds: "
        f"see `ray status`, or lower pipeline.rollout_workers"
    )


def place(cpus: float, gpus: float) -> Any:
    """Ask for a place: a placement group of one bundle, which goes to the node with the most room. Where its node is
    lost, Ray looks for another."""
    from ray.util.placement_group import placement_group

    return placement_group([_need(cpus, gpus)], strategy="SPREAD")


def there(place: Any, patience: float = 0.0) -> bool:
    """Whether it is to be had within `patience` seconds."""
    from ray.util.placement_group import placement_group_table

    deadline = time.monotonic() + patience
    while placement_group_table(place).get("state") != "CREATED":
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)
    return True


def give_back(place: Any) -> None:
    """Let others have it; who is there ends."""
    from ray.util.placement_group import remove_placement_group

    remove_placement_group(place)


def capacity(cpus: float, gpus: float) -> int:
    """How many places the nodes hold, were they free."""
    import ray

    need = _need(cpus, gpus)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return sum(min(int(node.get(name, 0.0) / amount + 1e-6) for name, amount in need.items()) for node in nodes)


def _need(cpus: float, gpus: float) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _each(cpus: float, gpus: float) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in _need(cpus, gpus).items())
