"""A few processes that are ranks of one gloo world, and run tasks: functions of `distributed_tasks`, by name.

They are started once and asked many times, from one process that has imported everything. Tensors travel as bytes, with
their strides.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import socket
import sys
import traceback
from contextlib import closing
from datetime import timedelta

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["distributed_tasks"])
TIMEOUT = 60  # seconds, for what is done in far less than one


def start(target, ranks: int, arguments) -> list:
    """A process for each rank, of target(rank, ranks, port, *arguments(rank))."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # the server, which imports, has no other way to know it
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    port = free_port()
    started = [CONTEXT.Process(target=target, args=(r, ranks, port, *arguments(r)), daemon=True) for r in range(ranks)]
    for process in started:
        process.start()
    return started


def free_port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def join_world(rank: int, ranks: int, port: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timedelta(seconds=TIMEOUT))


def serve(rank: int, ranks: int, port: int, connection) -> None:
    join_world(rank, ranks, port)
    import distributed_tasks as tasks

    tasks.prepare(ranks)
    while True:
        try:
            name, arguments = pickle.loads(connection.recv_bytes())
        except EOFError:  # the test process has ended
            return
        try:
            answer = getattr(tasks, name)(**arguments)
        except Exception as error:
            if hasattr(error, "add_note"):  # of Python 3.11
                error.add_note(traceback.format_exc())
            answer = error
        connection.send_bytes(pickle.dumps(answer))


class Pool:
    """Ranks that wait for tasks. What a task raises on a rank is its result there."""

    def __init__(self, ranks: int) -> None:
        pipes = [CONTEXT.Pipe() for _ in range(ranks)]
        self.processes = start(serve, ranks, lambda rank: [pipes[rank][1]])
        self.connections = [ours for ours, _ in pipes]
        for _, theirs in pipes:
            theirs.close()

    def results(self, task: str, **arguments: object) -> list:
        """Of every rank."""
        message = pickle.dumps((task, arguments))
        for connection in self.connections:
            connection.send_bytes(message)
        answers = []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(TIMEOUT):
                self.close()  # so that the next task fails at once
                raise AssertionError(f"rank {rank} has not answered {task}")
            answers.append(pickle.loads(connection.recv_bytes()))
        return answers

    def run(self, task: str, ranks: int | None = None, **arguments: object) -> list:
        """Of the first `ranks` of them, which do not fail."""
        if ranks is not None:
            arguments["ranks"] = ranks
        answers = self.results(task, **arguments)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers[:ranks]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
