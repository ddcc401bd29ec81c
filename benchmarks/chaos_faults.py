"""The faults of benchmarks.chaos: each is done to real processes, seen by the yard, undone, and got over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.chaos_memory import Cannot, a_container
from benchmarks.chaos_yard import Victim, World
from benchmarks.checkpoint_flips import flip_bit
from launch.checkpoint.catalogue import Catalogue
from launch.checkpoint.storage import open_storage
from orchestrator.errors import StoreError, TuneyardError

AWAY_S = 6.0
"""For how long the database is away."""
RUN_S, REST_S = 0.05, 0.12
"""A rank that is made slow is let run and stopped in turn, in the mean for so long. With a fixed beat, a step of as
much work as fits between two stops would have each of them in the same part, perhaps one that tells nothing."""
MIB = 1 << 20
QUIET = ("checkpoint-", "slow-rank", "job-running", "attempt-running", "attempt-placed")
"""Kinds of events that come without a fault, too."""


@dataclass
class Struck:
    """A fault, and what came of it."""

    kind: str
    job: str | None
    attempt: int | None
    at: float = field(default_factory=time.time)
    what: str = ""
    ends: set[tuple[str, int]] = field(default_factory=set)
    """Attempts that may end by it."""
    detected_s: float | None = None
    """Until the yard knew."""
    back_s: float | None = None
    """Until its job trained again; where no attempt ends, until all was as before."""
    damaged: str | None = None
    """A checkpoint that must not be loaded any more."""


def strike(world: World, kind: str, victim: Victim, **told: Any) -> Struck:
    """From here on it counts, whatever comes of it."""
    struck = Struck(kind, *victim.key, **told)
    world.struck.append(struck)
    return struck


def noticed(world: World, struck: Struck, before: int, kinds: tuple[str, ...] = ()) -> None:
    """Wait for the first event of the job that tells of the fault."""

    def told() -> float | None:
        assert struck.job is not None
        for event in world.events(struck.job, before):
            if event.kind in kinds or (not kinds and not event.kind.startswith(QUIET)):
                return event.time
        return None

    struck.detected_s = max(0.0, world.until(told, f"{struck.kind} is noticed") - struck.at)


def trains_again(world: World, struck: Struck, *, anew: bool = True) -> None:
    """Wait for the first step after it; `anew`: of another attempt."""
    assert struck.job is not None
    job, above = struck.job, struck.attempt if anew and struck.attempt is not None else 0
    stepped = world.until(lambda: world.trained(job, struck.at, above), f"{job} trains again after {struck.kind}")
    struck.back_s = stepped - struck.at


def goes_on(world: World, job: str, since: float) -> float:
    """When a job took its first step after `since`, in whichever attempt; now, if it has ended."""

    def stepped() -> float | None:
        return world.trained(job, since) or (time.time() if world.view(job).state.final else None)

    return world.until(stepped, f"{job} goes on")


def rank_killed(world: World) -> Struck:
    victim = world.victim()
    rank = world.draw.randrange(victim.attempt.plan.world_size)
    before, process = world.last_event(victim.job), victim.process(rank)
    struck = strike(world, "rank-killed", victim, what=f"rank {rank}", ends={victim.key})
    process.kill()
    noticed(world, struck, before)
    trains_again(world, struck)
    return struck


def agent_killed(world: World) -> Struck:
    victim = world.victim()
    index = world.draw.randrange(len(victim.attempt.nodes))
    before, agent = world.last_event(victim.job), victim.agent(index)
    struck = strike(world, "agent-killed", victim, what=f"of node {index}", ends=held_by(world, agent))
    agent.kill()
    noticed(world, struck, before)
    trains_again(world, struck)
    return struck


def raylet_killed(world: World) -> Struck:
    """Not the head's, whose loss is head_killed."""

    def elsewhere(victim: Victim) -> list[tuple[psutil.Process, psutil.Process]]:
        agents = [victim.agent(index) for index in range(len(victim.attempt.nodes))]
        pairs = [(agent, raylet) for agent in agents if (raylet := agent.parent()) is not None]
        return [(agent, raylet) for agent, raylet in pairs if world.node_of(raylet) != 0]

    victim = world.victim(lambda one: bool(elsewhere(one)))
    agent, raylet = world.draw.choice(elsewhere(victim))
    index, before = world.node_of(raylet), world.last_event(victim.job)
    struck = strike(world, "raylet-killed", victim, what=f"of node-{index}", ends=held_by(world, agent))
    raylet.kill()
    noticed(world, struck, before)
    world.until(lambda: not world.yard.record.ray[index].alive, "its starter sees it")
    world.up()
    trains_again(world, struck)
    world.until(world.whole, "all nodes are there")
    return struck


def controller_killed(world: World) -> Struck:
    """Known to the yard's users at once, and to nobody else: who supervises it starts another."""
    victim = world.victim()
    controller = world.yard.record.controller
    assert controller is not None
    struck = strike(world, "controller-killed", victim)
    os.kill(controller.pid, signal.SIGKILL)
    struck.detected_s = until_it_fails(lambda: world.client.health()) - struck.at
    world.up()
    back = time.time()
    world.until(lambda: known(world, victim, back), "the next controller knows what the job does")
    struck.back_s = time.time() - struck.at
    return struck


def rank_stopped(world: World) -> Struck:
    victim = world.victim()
    rank = world.draw.randrange(victim.attempt.plan.world_size)
    before, process = world.last_event(victim.job), victim.process(rank)
    struck = strike(world, "rank-stopped", victim, what=f"rank {rank}", ends={victim.key})
    process.send_signal(signal.SIGSTOP)
    try:
        noticed(world, struck, before, ("hung",))
        named = next(event.data["rank"] for event in world.events(victim.job, before) if event.kind == "hung")
        struck.what += f", named {named}"
        trains_again(world, struck)
    finally:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGCONT)
    return struck


def rank_slow(world: World) -> Struck:
    victim = world.victim(eta_s=25.0)
    rank = world.draw.randrange(victim.attempt.plan.world_size)
    before, process = world.last_event(victim.job), victim.process(rank)
    struck = strike(world, "rank-slow", victim, what=f"rank {rank}")
    over, draw = threading.Event(), random.Random(world.draw.random())

    def brake() -> None:
        with contextlib.suppress(psutil.Error):
            while not over.is_set():
                process.send_signal(signal.SIGSTOP)
                time.sleep(draw.uniform(0.5, 1.5) * REST_S)
                process.send_signal(signal.SIGCONT)
                time.sleep(draw.uniform(0.5, 1.5) * RUN_S)

    def named() -> float | None:
        told = world.events(victim.job, before)
        return next((one.time for one in told if one.kind == "slow-rank" and one.data["rank"] == rank), None)

    def found() -> float:
        """When it was named; -1 if its attempt ended first: the job's last one, or to grow or shrink."""
        view = world.view(victim.job)
        return named() or (-1.0 if view.state.final or view.attempts > victim.attempt.number else 0.0)

    braking = threading.Thread(target=brake, daemon=True)
    braking.start()
    try:
        when = world.until(found, "the slow rank is named")
    finally:
        over.set()
        braking.join()
    if when > 0:
        struck.detected_s = max(0.0, when - struck.at)
        released = time.time()
        stepped = world.until(
            lambda: (
                world.trained(victim.job, released) or (time.time() if world.view(victim.job).state.final else None)
            ),
            "it goes on",
        )
        struck.back_s = stepped - struck.at
    return struck


def out_of_memory(world: World) -> Struck:
    """Something else in a rank's container takes what it may have, and the kernel kills the rank."""
    used = {struck.job for struck in world.struck if struck.kind == "out-of-memory"}  # each takes a rung of the ladder
    victim = world.victim(lambda one: one.job not in used)
    rank = world.draw.randrange(victim.attempt.plan.world_size)
    process = victim.process(rank)
    with a_container(process.pid) as container:
        before = world.last_event(victim.job)
        struck = strike(world, "out-of-memory", victim, what=f"rank {rank}", ends={victim.key})
        container.fill()
        struck.at = time.time()
        noticed(world, struck, before)
        outcome = world.until(lambda: world.client.attempts(victim.job)[victim.attempt.number - 1].outcome, "it ends")
        struck.what += f", {outcome}"
    trains_again(world, struck)
    return struck


def disk_full(world: World) -> Struck:
    if world.disk is None:
        raise Cannot("no small file system can be mounted here")
    victim = world.victim()
    before = world.last_event(victim.job)
    balloon = world.disk / "balloon"
    struck = strike(world, "disk-full", victim)
    with balloon.open("wb", buffering=0) as stream:
        try:
            for size in (MIB, 1 << 12):
                with contextlib.suppress(OSError):
                    while stream.write(bytes(size)) == size:
                        pass
            noticed(world, struck, before, ("checkpoint-failed",))
        finally:
            balloon.unlink()
    freed, seen = time.time(), world.last_event(victim.job)
    told = world.until(
        lambda: (
            next((one.time for one in world.events(victim.job, seen) if one.kind == "checkpoint-committed"), None)
            or (freed if world.view(victim.job).state.final else None)
        ),
        "it saves again",
    )
    struck.back_s = told - struck.at
    return struck


def checkpoint_torn(world: World) -> Struck:
    """All ranks are stopped first, so that nothing newer is committed, and killed afterwards."""

    def saved(victim: Victim) -> bool:
        return len(store_of(victim).listing().lineage()) >= 2

    victim = world.victim(saved)
    ranks = [victim.process(rank) for rank in range(victim.attempt.plan.world_size)]
    for process in ranks:
        process.send_signal(signal.SIGSTOP)
    before = world.last_event(victim.job)
    newest = store_of(victim).listing().lineage()[0]
    directory = Path(victim.attempt.checkpoint_dir or "") / str(newest)
    shard = world.draw.choice(sorted(directory.glob("*.safetensors")))
    if world.draw.random() < 0.5:
        flip_bit(shard, world.draw)
        how = "a bit flipped"
    else:
        os.truncate(shard, world.draw.randrange(shard.stat().st_size))
        how = "cut"
    what = f"{newest}/{shard.name} {how}"
    struck = strike(world, "checkpoint-torn", victim, what=what, ends={victim.key}, damaged=str(newest))
    for process in ranks:
        process.kill()
    noticed(world, struck, before, ("checkpoint-quarantined",))
    trains_again(world, struck)
    return struck


def database_away(world: World) -> Struck:
    if world.database is None:
        raise Cannot("PostgreSQL is not installed, or cannot run here")
    victim = world.victim()
    struck = strike(world, "database-away", victim)
    world.database.stop()
    try:
        struck.detected_s = until_it_fails(lambda: world.client.jobs(), StoreError) - struck.at
        time.sleep(max(0.0, struck.at + AWAY_S - time.time()))
        on_its_own = world.trained_in(victim, struck.at)
    finally:
        world.database.start()
    back = time.time()
    struck.what = f"{back - struck.at:.1f} s" + ("" if on_its_own else ", and training did not go on")
    world.until(lambda: known(world, victim, back), "the yard knows again what the job does")
    struck.back_s = time.time() - struck.at
    return struck


def head_killed(world: World) -> Struck:
    """Ray's server on the head; Ray then ends the head's raylet as well."""
    victim = world.victim()
    head = world.yard.record.ray[0]
    server = next(child for child in psutil.Process(head.pid).children() if child.name() == "gcs_server")
    kept = world.yard.record.redis is not None
    struck = strike(world, "head-killed", victim, what="Redis" if kept else "no Redis")
    struck.ends = {one.key for one in world.live()}
    server.kill()
    struck.detected_s = until_it_fails(world.check_nodes) - struck.at
    world.until(lambda: not head.alive, "its starter sees it")
    world.up()
    world.until(world.whole, "all nodes are there")
    struck.back_s = goes_on(world, victim.job, time.time()) - struck.at
    return struck


KINDS: dict[str, Callable[[World], Struck]] = {
    "rank-killed": rank_killed,
    "agent-killed": agent_killed,
    "raylet-killed": raylet_killed,
    "controller-killed": controller_killed,
    "rank-stopped": rank_stopped,
    "rank-slow": rank_slow,
    "out-of-memory": out_of_memory,
    "disk-full": disk_full,
    "checkpoint-torn": checkpoint_torn,
    "database-away": database_away,
    "head-killed": head_killed,
}


def held_by(world: World, agent: psutil.Process) -> set[tuple[str, int]]:
    """Attempts of which an agent holds a part."""

    def holds(victim: Victim) -> bool:
        with contextlib.suppress(OSError, psutil.Error):
            return any(victim.agent(index).pid == agent.pid for index in range(len(victim.attempt.nodes)))
        return False

    return {victim.key for victim in world.live() if holds(victim)}


def store_of(victim: Victim) -> Catalogue:
    return Catalogue(open_storage(victim.attempt.checkpoint_dir or ""))


def known(world: World, victim: Victim, since: float) -> bool:
    """Whether the API tells of a step of the job that was taken after `since`, or of its end."""
    view = world.view(victim.job)
    return view.state.final or (view.progress is not None and view.progress.time > since)


def until_it_fails(ask: Callable[[], object], how: type[TuneyardError] = TuneyardError) -> float:
    """When asking the yard first failed."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            ask()
        except how:
            return time.time()
        time.sleep(0.05)
    return float("nan")
