"""A remembered choice is used with other free memory: it must be the one made anew."""

from __future__ import annotations

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from autotune.decide.choose import choose
from autotune.decide.limits import PRIORITIES, QUALITIES, Limits, budget_within
from autotune.optimizations import CATALOGUE
from autotune.probe.machine import Machine
from autotune.workload.workload import Workload
from tests.decide.strategies import machines, workloads
from tests.thorough import examples

some = st.lists(st.sampled_from(tuple(CATALOGUE)), min_size=1, max_size=8).map(tuple)


def with_memory(machine: Machine, device: float, host: float, elsewhere: float) -> Machine:
    """The same machine with so many times the memory free."""
    return msgspec.structs.replace(
        machine,
        device=msgspec.structs.replace(
            machine.device,
            total_bytes=int(machine.device.total_bytes * max(1, device)),
            free_bytes=int(machine.device.free_bytes * device),
        ),
        host=msgspec.structs.replace(
            machine.host,
            ram_total_bytes=int(machine.host.ram_total_bytes * max(1, host)),
            ram_available_bytes=int(machine.host.ram_available_bytes * host),
        ),
        others=tuple(
            msgspec.structs.replace(
                o,
                total_bytes=int(o.total_bytes * max(1, elsewhere)),
                free_bytes=int(o.free_bytes * elsewhere),
            )
            for o in machine.others
        ),
    )


times = st.one_of(st.floats(0.3, 3), st.floats(0.9, 1.1), st.just(1.0))


@given(
    machine=machines(),
    workload=workloads(),
    only=some,
    priority=st.sampled_from(PRIORITIES),
    quality=st.sampled_from(QUALITIES),
    device=times,
    host=times,
    elsewhere=times,
)
@examples(usually=50, thoroughly=400)
def test_within_its_range_the_choice_is_the_same(
    machine: Machine,
    workload: Workload,
    only: tuple[str, ...],
    priority: str,
    quality: str,
    device: float,
    host: float,
    elsewhere: float,
) -> None:
    limits = Limits(only=only, priority=priority, quality=quality)
    plan = choose(machine, workload, limits)
    assert (plan.validity is not None) == plan.fits
    assume(plan.validity is not None)
    assert plan.validity is not None
    assert plan.validity.holds(plan.budget)
    now = with_memory(machine, device, host, elsewhere)
    assume(plan.validity.holds(budget_within(now, limits)))
    assert choose(now, workload, limits).optimizations == plan.optimizations


def test_a_choice_that_needs_nothing_holds_for_any_more_memory(rtx_3080, traced):
    """On 24 GB SDXL fits as it is: with 80 nothing would be chosen either."""
    roomy = msgspec.structs.replace(
        rtx_3080,
        device=msgspec.structs.replace(rtx_3080.device, free_bytes=22 << 30, total_bytes=24 << 30),
    )
    plan = choose(roomy, traced("sdxl"), Limits())
    assert plan.validity is not None
    assert plan.validity.most_bytes is None
    assert plan.validity.least_bytes == plan.prediction.needed_bytes


def test_a_choice_made_for_want_of_memory_ends_where_another_begins(rtx_3080, traced):
    plan = choose(rtx_3080, traced("sdxl"), Limits())
    assert plan.optimizations
    assert plan.validity is not None
    assert plan.validity.most_bytes is not None
    assert plan.validity.most_bytes < plan.baseline.needed_bytes
