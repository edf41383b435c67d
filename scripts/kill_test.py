#!/usr/bin/env python3
"""Kill processes while they use the profile; afterwards it must be readable and the next run work.

First a process that stores a profile is killed (SIGKILL) at each call that it makes into the
operating system or a library, then at random moments; then `autotune run` and a program that calls
`autotune.configure` are, at random moments of their whole life. Any failure ends in exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import filelock  # noqa: F401 - before forking, so that no child is killed importing it
from msgspec.structs import replace

from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.profile.merging import with_machine, with_operators, with_records
from autotune.profile.profile import Profile, RunRecord
from autotune.profile.store import list_profiles, load_profile, read_profile, update_profile

ROOT = Path(__file__).resolve().parent.parent
KEY = "GPU-killed"
COLD_EVERY = 5
"""Every so often a run begins without a profile, so that measuring is interrupted, too."""

TIMEOUT_S = 300

CONFIGURE = """
import autotune
from autotune.workload.architecture import find_architecture
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(find_architecture("demo").weights)
tuned = autotune.configure(pipe)
tuned("a handwritten seven", num_inference_steps=2)
"""


class Failed(Exception):  # noqa: N818
    """What must not be."""


class Command(NamedTuple):
    """A program to kill."""

    name: str
    arguments: list[str]


# ---- a process that only stores ------------------------------------------------------------------


def store_once(machine: Machine) -> RunRecord:
    """All that is ever stored: a measurement, operators' times, and a run, which is returned."""
    now = datetime.now(timezone.utc).isoformat(timespec="microseconds")
    run = RunRecord(f"workload {os.getpid()} {now}", (), (), (), now)

    def change(profile: Profile | None) -> Profile:
        stored = with_machine(profile, KEY, machine, now)
        timed = with_operators(stored, KEY, machine, {}, now)
        return with_records(timed, now, runs=[run])

    update_profile(KEY, change)
    return run


def forked(work: Callable[[], object]) -> int:
    """The process that does it."""
    pid = os.fork()
    if pid:
        return pid
    try:
        work()
        os._exit(0)
    finally:
        os._exit(1)


def was_killed(pid: int) -> bool:
    """Wait for a process: whether it was killed before it had finished.

    Raises:
        Failed: it failed for another reason.
    """
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, -signal.SIGKILL):
        raise Failed(f"a process that stores ended with {code}")
    return code != 0


def dies_at(call: int, work: Callable[[], object]) -> Callable[[], None]:
    """The work of a process that kills itself before its n-th call of what is not Python."""
    seen = 0

    def count(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal seen
        seen += event == "c_call"
        if event == "c_call" and seen == call:
            os.kill(os.getpid(), signal.SIGKILL)

    def run() -> None:
        sys.setprofile(count)
        work()
        sys.setprofile(None)

    return run


def kill_at_calls(every: int, machine: Machine) -> int:
    """Kill a process at its first call, the next one some calls later, until one gets through."""
    store = functools.partial(store_once, machine)
    for kills in itertools.count():
        if not was_killed(forked(dies_at(1 + kills * every, store))):
            return kills
        check_stored(machine)
    raise AssertionError


def kill_at_random(kills: int, machine: Machine, chance: random.Random) -> None:
    """Kill processes that store over and over."""

    def store_for_ever() -> None:
        while True:
            store_once(machine)

    for _ in range(kills):
        pid = forked(store_for_ever)
        time.sleep(chance.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        was_killed(pid)
        check_stored(machine)


def check_stored(machine: Machine) -> None:
    """The profile reads back, and the next one to store finds the lock free."""
    check_profiles()
    run = store_once(machine)
    profile = load_profile(KEY)
    if profile is None or run not in profile.runs:
        raise Failed("what was stored after a kill is not there")


# ---- whole programs ------------------------------------------------------------------------------


def commands(folder: Path) -> tuple[Command, ...]:
    """The programs."""
    image = str(folder / "image.png")
    run = ["-m", "autotune", "run", "demo", "--steps", "2", "-o", image]
    return Command("autotune run", run), Command("autotune.configure", ["-c", CONFIGURE])


def start(command: Command) -> subprocess.Popen[bytes]:
    """Start it in a group of its own, so that what it starts is killed with it."""
    return subprocess.Popen(
        [sys.executable, *command.arguments],
        cwd=ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def run_through(command: Command) -> float:
    """Seconds of a whole run.

    Raises:
        Failed: it does not work.
    """
    begin = time.perf_counter()
    process = start(command)
    _, errors = process.communicate(timeout=TIMEOUT_S)
    if process.returncode != 0:
        raise Failed(f"{command.name} after a kill: {errors.decode(errors='replace')}")
    check_profiles()
    if not list_profiles():
        raise Failed(f"{command.name} remembered nothing")
    return time.perf_counter() - begin


def kill_programs(kills: int, folder: Path, cache: Path, chance: random.Random) -> Iterator[str]:
    """Kill whole programs, and run each through afterwards; says what was killed when."""
    programs = commands(folder)
    clear(cache)
    first_s = run_through(programs[0])
    # Of the last whole run of each, since a busy machine takes longer: killed is all of its life.
    lasts = {(command.name, True): first_s for command in programs}
    lasts |= {(command.name, False): run_through(command) for command in programs}
    for number in range(kills):
        command = programs[number % len(programs)]
        is_cold = number % COLD_EVERY == 0
        if is_cold:
            clear(cache)
        longest = lasts[command.name, is_cold]
        after = chance.uniform(0, longest)
        process = start(command)
        time.sleep(after)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT_S)
        finished = process.returncode == 0
        check_profiles()
        took = lasts[command.name, is_cold] = run_through(command)
        yield (
            f"{number + 1:3}  {command.name:<20} {'cold' if is_cold else 'warm'}  "
            f"{'finished before' if finished else 'killed after':<16}{after:6.2f} s of about "
            f"{longest:5.2f}; the next run worked in {took:5.2f} s"
        )


def clear(cache: Path) -> None:
    """Forget everything."""
    shutil.rmtree(cache, ignore_errors=True)


def check_profiles() -> None:
    """Every profile reads, and none had to be set aside.

    Raises:
        Failed: one does not, or had.
    """
    cache = Path(os.environ["AUTOTUNE_CACHE"])
    for path in cache.glob("*.profile.json"):
        read_profile(path)
    aside = list(cache.glob("*.set-aside-*"))
    if aside:
        raise Failed(f"set aside: {', '.join(path.name for path in aside)}")


def main() -> int:
    """The exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="of whole programs (default: 50)")
    parser.add_argument("--stores", type=int, default=200, help="of processes that only store")
    parser.add_argument("--every", type=int, default=1, help="so many calls, one that stores is")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    machine = replace(load_machine("rtx-3080-10gb"), source="measured")
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        os.environ["AUTOTUNE_CACHE"] = str(cache)
        try:
            calls = kill_at_calls(options.every, machine)
            print(f"storing, killed at {calls} of its calls: always readable, stored again")
            kill_at_random(options.stores, machine, chance)
            print(f"storing, killed at {options.stores} random moments: the same", flush=True)
            if options.kills:
                for line in kill_programs(options.kills, Path(folder), cache, chance):
                    print(line, flush=True)
        except Exception as error:
            print(f"FAILED: {type(error).__name__}: {error}", file=sys.stderr)
            return 1
    if options.kills:
        print(f"{options.kills} programs killed: always readable, the next run always worked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
