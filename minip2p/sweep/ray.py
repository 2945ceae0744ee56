"""Share a sweep's work out on Ray (Moritz et al. 2018): a worker for each GPU or share of the CPUs.

Ray places the workers, starts them again and repeats their work. What is left to do here is to
choose which worker gets which group next. `ray.util.ActorPool` hands out groups as well, but it
puts no new worker in the place of one that Ray has given up, and keeps idle workers where others
need the place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from .. import fast
from ..errors import UserError, check
from .results import Files, Row

# From groups of runs to what was made of each group. A run has a `row`, as SweepRun does.
Work = Callable[[Sequence[Sequence[Any]]], Iterable[list[tuple[Row, Files]]]]
RESTARTS = 5  # of a worker, before its loss is the error of the runs that it was making


class Actor:
    """A worker in a process of its own, which loads its model when it is first used.

    kind: the worker's class; its objects have `describe` and `run`, as Worker does.
    """

    def __init__(self, kind: Callable[..., Any], arguments: tuple[Any, ...], threads: int):
        self.kind, self.arguments = kind, arguments
        torch.set_num_threads(threads)
        fast.keep_memory()

    @cached_property
    def worker(self) -> Any:
        return self.kind(*self.arguments)

    def describe(self) -> dict[str, Any]:
        return self.worker.describe()

    def run(self, runs: Sequence[Any]) -> list[tuple[Row, Files]]:
        return self.worker.run(runs)


@dataclass(frozen=True)
class Allocation:
    """How many workers share a cluster, and what each of them gets."""

    workers: int
    threads: int
    resources: dict[str, int]  # as ray.remote takes them

    @classmethod
    def of(cls, nodes: Sequence[Mapping[str, Any]], workers: int | None, cpu: bool) -> Allocation:
        """Share out the nodes' resources. cpu: use no GPU."""
        gpus, cpus = (int(sum(node.get(kind, 0) for node in nodes)) for kind in ("GPU", "CPU"))
        n = workers or (0 if cpu else gpus) or len(nodes)
        largest_node = int(max(node.get("CPU", 0) for node in nodes))
        threads = max(1, min(cpus // n, largest_node))
        return cls(n, threads, {"num_gpus": 1} if gpus and not cpu else {"num_cpus": threads})


@contextmanager
def cluster(
    kind: Callable[..., Any],
    arguments: tuple[Any, ...],
    device: str | None,
    workers: int | None,
    address: str | None,
) -> Iterator[tuple[dict[str, Any], Work]]:
    """Start workers. Give a worker's description, and a function from groups to what was made.

    kind: Worker, or a class like it. device: "cpu" also on nodes that have GPUs. workers: by
    default one for each GPU, or one for each node where there is none. address: of a cluster;
    None starts one on this machine alone, for as long as the context lasts.
    Raises UserError if there is no Ray or no cluster, or if the workers can't load their model.
    """
    ray = start_ray(workers, address)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        share = Allocation.of(nodes, workers, cpu=device == "cpu")
        # Retries have no end: until Ray knows that a node is lost, each of them fails at once.
        remote = ray.remote(max_restarts=RESTARTS, max_task_retries=-1, **share.resources)(Actor)
        make_actor = partial(remote.remote, kind, arguments, share.threads)
        starting = {(actor := make_actor()).describe.remote(): actor for _ in range(share.workers)}
        (first,), _ = ray.wait(list(starting))
        description = result_of(ray, first)
        yield description, partial(map_unordered, ray, make_actor, starting, description)
    finally:
        ray.shutdown()


def start_ray(workers: int | None, address: str | None) -> Any:
    """Return the module `ray`, connected to the cluster at `address`, or to a new one."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    if not address:  # otherwise Ray takes the machine's own address even for 127.0.0.1
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise UserError("--workers and --address need Ray: pip install 'minip2p[ray]'.") from None
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address, **quiet)
        else:
            cpus = max(workers or 1, os.cpu_count() or 1)
            local = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
            ray.init("local", num_cpus=cpus, object_store_memory=2**28, **local, **quiet)
    except (ConnectionError, RuntimeError) as error:
        raise UserError(f"There is no Ray cluster at {address}: {error}") from None
    return ray


def result_of(ray: Any, task: Any, name: str = "load the model") -> Any:
    """Return the result of a task. Raises UserError if the task raised an error of its own."""
    try:
        return ray.get(task)
    except ray.exceptions.RayTaskError as error:  # errors of a sweep's runs are in their rows
        raise UserError(f"A worker can't {name}: {error.cause}") from None


def map_unordered(
    ray: Any,
    make_actor: Callable[[], Any],
    starting: Mapping[Any, Any],
    description: Mapping[str, Any],
    groups: Sequence[Sequence[Any]],
) -> Iterator[list[tuple[Row, Files]]]:
    """Yield what was made of each group, as it comes. Each actor has one group at a time.

    starting: actors by their first task, which describes their model. The runs of a group whose
    actor Ray has given up have that as their error, and a new actor takes its place.
    """
    waiting, n_left, tasks = iter(groups), len(groups), dict(starting)
    group_of: dict[Any, Sequence[Any]] = {}
    while n_left:
        (task,), _ = ray.wait(list(tasks))
        actor, group = tasks.pop(task), group_of.pop(task, ())
        try:
            result = result_of(ray, task, "do its work" if group else "load the model")
        except ray.exceptions.RayError as error:
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            check(group, f"A worker can't be started: {message}")
            result = [(run.row | {"error": message}, {}) for run in group]
            ray.kill(actor)
            actor = make_actor()
            tasks[actor.describe.remote()] = actor
        else:
            is_same = group or result["id"] == description["id"]
            check(is_same, "Two workers have different models in the same place: copy one of them.")
            next_group = next(waiting, None)
            if next_group is None:  # its place is free for an actor that has lost its node
                ray.kill(actor)
            else:
                task = actor.run.remote(next_group)
                tasks[task], group_of[task] = actor, next_group
        if group:
            n_left -= 1
            yield result
