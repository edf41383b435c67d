"""Pipelines of one process share its memory, wait for their turn, and survive a fork."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import autotune
from autotune.errors import AutotuneError
from autotune.probe.machine import Machine
from autotune.runtime import allocator, claims
from autotune.runtime.claims import Claim, configuring, owner_of, promised_beside, turn_of
from autotune.runtime.memory import with_own_memory
from autotune.runtime.tuned import Tuned
from autotune.testing.pipelines import BUILDERS
from autotune.testing.state import differences, whole_state
from autotune.units import GIB


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    gc.collect()
    yield


class Owner:
    """Something that can be held weakly."""


class SharedPipe:
    """A pipeline of one module."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.components = {"unet": module}


def claim(device: str = "cuda:0", **bytes_: Any) -> tuple[Owner, Owner]:
    owner, pipe = Owner(), Owner()
    claims.stake(Claim(owner, pipe, device, **bytes_))
    return owner, pipe


def configured(pipe: Any, **options: Any) -> Tuned:
    given = {"height": 64, "width": 64, "steps": 1, "only": ("vae_slicing",), "verify": "never"}
    return autotune.configure(pipe, **(given | options))


# ---- memory --------------------------------------------------------------------------------------


def test_what_others_were_promised_is_not_free(rtx_3080: Machine) -> None:
    before = with_own_memory(rtx_3080, "cuda:0")
    kept = claim(device_bytes=2 * GIB, host_bytes=3 * GIB)
    other = claim("cuda:1", device_bytes=5 * GIB)
    machine = with_own_memory(rtx_3080, "cuda:0")
    assert before.device.free_bytes - machine.device.free_bytes == 2 * GIB
    assert before.host.ram_available_bytes - machine.host.ram_available_bytes == 3 * GIB
    assert promised_beside(kept[1], "cuda:0") == (0, 0), "its own promise is its own"
    del kept, other
    assert with_own_memory(rtx_3080, "cuda:0") == before, "released when it is gone"


def test_what_others_are_drawing_with_is_not_counted_twice() -> None:
    """It is not free any more; what they have yet to take is promised still."""
    (_, first), (_, second) = kept = [claim(device_bytes=2 * GIB), claim(device_bytes=3 * GIB)]
    with claims.drawing(first, 10 * GIB):
        assert promised_beside(None, "cuda:0", 10 * GIB) == (5 * GIB, 0)
        assert promised_beside(None, "cuda:0", 11 * GIB) == (4 * GIB, 0)
        assert promised_beside(None, "cuda:0", 15 * GIB) == (3 * GIB, 0), "no more than its own"
        assert promised_beside(first, "cuda:0", 11 * GIB) == (3 * GIB, 0)
        with claims.drawing(second, 11 * GIB):
            assert promised_beside(None, "cuda:0", 13 * GIB) == (2 * GIB, 0)
    assert promised_beside(None, "cuda:0", 13 * GIB) == (5 * GIB, 0)
    del kept


def test_who_drew_beside_another_is_known_as_long_as_it_draws() -> None:
    (_, first), (_, second) = kept = [claim(), claim()]
    with claims.drawing(first, 0):
        assert claims.draws_alone(first)
        with claims.drawing(second, 0):
            assert not claims.draws_alone(second)
        assert not claims.draws_alone(first), "though the other is done"
    with claims.drawing(first, 0):
        assert claims.draws_alone(first)
    del kept


def test_pipelines_of_the_same_modules_are_promised_the_memory_of_one() -> None:
    """They take turns: planned beside each other, the second would find no memory at all."""
    module = torch.nn.Linear(1, 1)
    pipes = [SharedPipe(module), SharedPipe(module), SharedPipe(torch.nn.Linear(1, 1))]
    owners = [Owner() for _ in pipes]
    for owner, pipe, size in zip(owners, pipes, (2, 3, 4), strict=True):
        claims.stake(Claim(owner, pipe, "cuda:0", device_bytes=size, host_bytes=size))
    assert promised_beside(pipes[0], "cuda:0") == (4, 4)
    assert promised_beside(pipes[2], "cuda:0") == (3, 3)
    assert promised_beside(None, "cuda:0") == (7, 7)


def test_it_never_gets_below_nothing(rtx_3080: Machine) -> None:
    kept = claim(device_bytes=1000 * GIB, host_bytes=1000 * GIB)
    machine = with_own_memory(rtx_3080, "cuda:0")
    assert (machine.device.free_bytes, machine.host.ram_available_bytes) == (0, 0)
    del kept


def test_the_second_pipeline_sees_what_the_first_will_need(measured_here: None) -> None:
    first = configured(BUILDERS["sd"](), batch=4)
    needed = first.plan.prediction.needed_bytes - first._planner.held.device_bytes  # type: ignore[union-attr]
    assert promised_beside(None, "cpu") == (needed, 0)
    second = configured(BUILDERS["sd"](), batch=4)
    assert promised_beside(None, "cpu") == (2 * needed, 0)
    assert promised_beside(second.pipe, "cpu") == (needed, 0)
    first.undo()
    assert promised_beside(second.pipe, "cpu") == (0, 0)
    del second
    gc.collect()
    assert promised_beside(None, "cpu") == (0, 0)


# ---- the same pipeline twice ---------------------------------------------------------------------


LITTLE = {"batch": 4, "guidance_scale": 1.0, "ram_limit": "11MiB"}
"""Four images cannot be decoded at once."""


def test_configured_again_it_is_as_if_it_had_not_been(measured_here: None) -> None:
    pipe = BUILDERS["sd"]()
    first = configured(pipe, **LITTLE)
    assert [s.name for s in first.plan.optimizations] == ["vae_slicing"]
    second = configured(pipe)
    assert owner_of(pipe) is second
    assert second.plan.optimizations == second.plan.kept == (), "nothing was set by hand"
    first.undo()
    assert owner_of(pipe) is second, "the first has nothing to undo any more"
    drawn = first("a cat", seed=1, output_type="pt").images
    assert drawn.shape[0] == 4, "it draws as before, with what is on now"


def test_where_that_fails_the_first_is_back(measured_here: None) -> None:
    pipe = BUILDERS["sd"]()
    first = configured(pipe, **LITTLE)
    before = whole_state(pipe)
    with pytest.raises(AutotuneError):
        configured(pipe, height=65)
    assert owner_of(pipe) is first
    assert differences(before, whole_state(pipe)).keys() <= {"pipe._autotune"}, "owned anew"
    assert pipe.vae.use_slicing


# ---- dropped, copied, shared ---------------------------------------------------------------------


def test_what_was_dropped_is_still_undone_and_not_taken_for_the_users(measured_here: None) -> None:
    pipe = BUILDERS["sd"]()
    before = whole_state(pipe)
    configured(pipe, **LITTLE)
    gc.collect()
    assert pipe.vae.use_slicing
    again = configured(pipe)
    assert again.plan.kept == again.plan.optimizations == ()
    del again
    owner_of(pipe).undo()
    assert owner_of(pipe) is None
    assert differences(before, whole_state(pipe)) == {}


def test_a_copy_belongs_to_nobody(measured_here: None) -> None:
    pipe = BUILDERS["sd"]()
    tuned = configured(pipe)
    assert owner_of(copy.deepcopy(pipe)) is owner_of(copy.copy(pipe)) is None
    assert owner_of(pipe) is tuned


def test_of_pipelines_with_the_same_modules_one_is_configured_at_a_time(
    measured_here: None,
) -> None:
    pipe = BUILDERS["sd"]()
    first = configured(pipe, **LITTLE)
    drawn = first("a cat", seed=1, output_type="pt").images
    same = type(pipe)(**pipe.components, requires_safety_checker=False)
    second = configured(same)
    assert second.plan.kept == second.plan.optimizations == (), "the first is not the user"
    assert not pipe.vae.use_slicing
    assert torch.equal(first("a cat", seed=1, output_type="pt").images, drawn)
    assert pipe.vae.use_slicing, "on again"
    second("a cat", seed=1, output_type="pt")
    assert not pipe.vae.use_slicing
    second.undo()
    first.undo()
    assert not pipe.vae.use_slicing


# ---- turns ---------------------------------------------------------------------------------------


def at_once(*jobs: Any) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert not any(thread.is_alive() for thread in threads)


def test_calls_of_one_pipeline_queue(measured_here: None) -> None:
    """The scheduler of one image would be that of the other."""
    tuned = configured(BUILDERS["sd"](), steps=3)
    alone = [tuned("a cat", seed=seed, output_type="pt").images for seed in range(3)]
    found: dict[int, Any] = {}

    def job(seed: int) -> Any:
        def run() -> None:
            found[seed] = tuned("a cat", seed=seed, output_type="pt").images

        return run

    at_once(*(job(seed) for seed in range(3)))
    assert all(torch.equal(found[seed], alone[seed]) for seed in range(3))


def test_several_threads_configure(measured_here: None) -> None:
    """Tracing changes what the whole process shares: the random state, imports, log levels."""
    from diffusers.utils import logging

    pipes = [BUILDERS["sd"]() for _ in range(3)]
    made: list[Tuned] = []
    state, level = torch.get_rng_state(), logging.get_verbosity()

    def job(pipe: Any, side: int) -> Any:
        return lambda: made.append(configured(pipe, height=side, batch=2))

    same = pipes[0]
    at_once(job(same, 64), job(same, 72), job(pipes[1], 64), job(pipes[2], 80))
    assert torch.equal(torch.get_rng_state(), state)
    assert logging.get_verbosity() == level
    assert len(made) == 4
    last = owner_of(same)
    assert {id(owner_of(p)) for p in pipes} == {id(t) for t in made if t is last or t.pipe != same}
    assert sum(t.pipe is same for t in made) == 2
    for tuned in made:
        tuned.undo()
    assert [owner_of(p) for p in pipes] == [None] * 3


def test_configuring_waits_for_the_turn_and_nobody_for_ever(measured_here: None) -> None:
    """A call that plans anew, and another configuration, each want what the other has."""
    pipe = BUILDERS["sd"]()
    tuned = configured(pipe)
    at_once(
        *(lambda: tuned("a cat", height=72, output_type="pt") for _ in range(2)),
        *(lambda: configured(pipe, height=72) for _ in range(2)),
    )
    assert owner_of(pipe) is not tuned


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_forked_child_does_not_wait_for_threads_that_it_lacks() -> None:
    owner = Owner()
    taken, done = threading.Event(), threading.Event()

    def hold() -> None:
        with turn_of(owner), configuring():
            taken.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait(30)
    try:
        context = multiprocessing.get_context("fork")
        child = context.Process(target=_take_everything, args=(owner,))
        child.start()
        child.join(timeout=30)
        assert child.exitcode == 0
    finally:
        done.set()
        holder.join()


def _take_everything(owner: Owner) -> None:
    with turn_of(owner), configuring():
        promised_beside(owner, "cpu")


# ---- limits of the allocator ---------------------------------------------------------------------


class Backend(SimpleNamespace):
    """Stands in for ``torch.cuda``; what is set is written down."""

    free, total, reserved, used, share = 7 * GIB, 10 * GIB, 1 * GIB, GIB // 2, 1.0

    def mem_get_info(self, device: str) -> tuple[int, int]:
        return self.free, self.total

    def memory_reserved(self, device: str) -> int:
        return self.reserved

    def get_per_process_memory_fraction(self, device: str) -> float:
        return self.share

    def set_per_process_memory_fraction(self, share: float, device: str) -> None:
        assert device == "cuda:0"
        self.share = share

    def empty_cache(self) -> None:
        self.free, self.reserved = self.free + self.reserved - self.used, self.used


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Backend:
    made = Backend(share=0.9)
    monkeypatch.setattr(torch, "get_device_module", lambda device: made)
    monkeypatch.setattr(allocator, "_before", {})
    return made


def test_a_reserve_is_held_against_what_others_use_now(backend: Backend) -> None:
    kept = claim(reserve_bytes=2 * GIB)
    assert allocator.hold_limits("cuda:0") == 6 * GIB
    assert backend.share == 0.6
    backend.free = 5 * GIB  # others have come
    assert allocator.hold_limits("cuda:0") == 4 * GIB
    larger = claim(reserve_bytes=3 * GIB)
    assert allocator.hold_limits("cuda:0") == 3 * GIB, "the largest reserve"
    del larger, kept
    assert allocator.hold_limits("cuda:0") is None
    assert backend.share == 0.9, "as the user had set it"


def test_what_is_reserved_and_unused_is_given_back_for_it(backend: Backend) -> None:
    backend.free, backend.reserved = 1 * GIB, 6 * GIB
    kept = claim(reserve_bytes=2 * GIB)
    assert allocator.hold_limits("cuda:0") == 5 * GIB
    assert backend.free == 6 * GIB + GIB // 2, "and not the 1 GiB beside the allocator's cache"
    del kept


def test_a_limit_set_by_hand_holds_too(backend: Backend) -> None:
    backend.share = 0.5
    kept = claim(reserve_bytes=GIB)
    assert allocator.hold_limits("cuda:0") == 5 * GIB, "and not the 7 GiB that there are"
    assert backend.share == 0.5
    backend.free = 2 * GIB
    assert allocator.hold_limits("cuda:0") == 2 * GIB
    del kept
    assert allocator.hold_limits("cuda:0") is None
    assert backend.share == 0.5


def test_a_limit_is_held_while_all_have_one(backend: Backend) -> None:
    first, second = claim(most_bytes=2 * GIB), claim(most_bytes=1 * GIB)
    assert allocator.hold_limits("cuda:0") == 3 * GIB
    third = claim(device_bytes=1)
    assert allocator.hold_limits("cuda:0") is None
    assert backend.share == 0.9
    del first, second, third


def test_no_more_than_nothing_and_everything(backend: Backend) -> None:
    kept = claim(reserve_bytes=100 * GIB)
    assert allocator.hold_limits("cuda:0") == 0
    assert backend.share == 0.0
    del kept
    kept = claim(most_bytes=100 * GIB)
    assert allocator.hold_limits("cuda:0") == 8 * GIB, "what is free and what is reserved already"
    assert backend.share == 0.8
    del kept


def test_on_a_cpu_no_allocator_has_a_limit() -> None:
    kept = claim("cpu", reserve_bytes=GIB)
    assert allocator.hold_limits("cpu") is None
    assert allocator.device_load("cpu") is None
    del kept
