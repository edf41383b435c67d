"""Plans kept in the profile: found by what they were made from, and never wrong for free memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import autotune
from autotune.decide.choose import choose
from autotune.decide.history import History, Misfit
from autotune.decide.limits import Limits
from autotune.probe.machine import Machine, OperatorTime
from autotune.profile.profile import Profile
from autotune.profile.store import load_profile, save_profile, update_profile
from autotune.tuner import plans
from autotune.tuner.here import Measured, new_profile
from autotune.tuner.plans import basis_of, keep, recall
from autotune.units import GIB
from autotune.workload.architecture import find_architecture
from autotune.workload.cache import origin_of, workload_of
from autotune.workload.request import complete_request
from autotune.workload.workload import Workload

KEY = "GPU-0"


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workload, str]:
    """A workload and where it comes from."""
    from autotune.probe.reference import load_machine

    architecture = find_architecture("sd15")
    request = complete_request(architecture, load_machine("rtx-3080-10gb"))
    return workload_of(architecture, request), origin_of(architecture, request)


def with_free(machine: Machine, gib: float) -> Machine:
    device = msgspec.structs.replace(machine.device, free_bytes=int(gib * GIB))
    return msgspec.structs.replace(machine, device=device)


def remembered(machine: Machine, workload: Workload, basis: str, limits: Limits) -> None:
    keep(Measured(KEY, machine, ()), workload, choose(machine, workload, limits), basis)


def test_what_was_decided_is_recalled_whole(rtx_3080, sd15):
    workload, origin = sd15
    limits = Limits(quality="fast")
    plan = choose(rtx_3080, workload, limits)
    basis = basis_of(rtx_3080, workload, origin, limits, History())
    assert recall(KEY, rtx_3080, limits, basis) is None
    keep(Measured(KEY, rtx_3080, ()), workload, plan, basis)
    assert recall(KEY, rtx_3080, limits, basis) == plan


def test_other_free_memory_is_told_and_too_little_decides_anew(rtx_3080, sd15):
    workload, origin = sd15
    limits = Limits()
    basis = basis_of(rtx_3080, workload, origin, limits, History())
    remembered(rtx_3080, workload, basis, limits)
    less = with_free(rtx_3080, 7)
    assert basis_of(less, workload, origin, limits, History()) == basis
    plan = recall(KEY, less, limits, basis)
    assert plan is not None
    assert plan.budget == choose(less, workload, limits).budget
    assert plan.optimizations == choose(less, workload, limits).optimizations
    assert any("were available" in note for note in plan.notes)
    assert recall(KEY, with_free(rtx_3080, 2), limits, basis) is None


def test_whatever_decides_is_in_the_basis(rtx_3080, sd15):
    workload, origin = sd15
    limits = Limits()
    faster = msgspec.structs.replace(rtx_3080, default_attention="vanilla")
    operator = next(o for r in workload.runs for o in r.trace.operators)
    timed = msgspec.structs.replace(rtx_3080, operators={operator.key: OperatorTime(1.0)})
    loaded = msgspec.structs.replace(workload, is_loaded=True)
    bases = {
        basis_of(rtx_3080, workload, origin, limits, History()),
        basis_of(faster, workload, origin, limits, History()),
        basis_of(timed, workload, origin, limits, History()),
        basis_of(rtx_3080, loaded, origin, limits, History()),
        basis_of(rtx_3080, workload, "another", limits, History()),
        basis_of(rtx_3080, workload, origin, Limits(reserve=1), History()),
        basis_of(rtx_3080, workload, origin, limits, History(misfits=(Misfit((), 1),))),
    }
    assert len(bases) == 7
    elsewhere = msgspec.structs.replace(rtx_3080, operators={"another model's": OperatorTime(1.0)})
    assert basis_of(elsewhere, workload, origin, limits, History()) in bases


def test_a_package_that_was_installed_since_is_considered(
    rtx_3080: Machine, sd15: tuple[Workload, str]
) -> None:
    """Nobody measures a machine again for the sake of tomesd."""
    workload, origin = sd15
    bare = msgspec.structs.replace(rtx_3080, source="measured", software={"torch": "2.12.0"})
    more = msgspec.structs.replace(bare, software=bare.software | {"tomesd": "0.1.3"})
    bases = [basis_of(m, workload, origin, Limits(), History()) for m in (bare, more)]
    assert bases[0] != bases[1]


@pytest.mark.parametrize(
    ("changed", "decides"),
    [
        ("decide/rules.py", True),
        ("optimizations/tome.py", True),
        ("probe/software.py", True),
        ("probe/machine.py", True),
        ("cli/env.py", False),
    ],
)
def test_other_code_that_decides_is_another_basis(
    changed: str, decides: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which versions map files is no measurement: a plan that counted on it does not outlive it."""
    package = Path(autotune.__file__).parent
    files = {*package.glob("decide/*.py"), *package.glob("optimizations/*.py"), package / changed}
    for file in files | {*package.glob("probe/*.py")}:
        copy = tmp_path / file.relative_to(package)
        copy.parent.mkdir(exist_ok=True)
        copy.write_bytes(file.read_bytes())
    monkeypatch.setattr(autotune, "__file__", str(tmp_path / "__init__.py"))
    before = plans._code.__wrapped__()
    with (tmp_path / changed).open("a") as code:
        code.write("# changed")
    assert (plans._code.__wrapped__() != before) == decides


def test_what_does_not_fit_is_not_kept(rtx_3080, sd15):
    workload, _ = sd15
    remembered(with_free(rtx_3080, 0.2), workload, "basis", Limits())
    assert load_profile(KEY) is None


def test_a_decision_made_again_takes_the_place_of_the_one_before(rtx_3080, sd15):
    workload, origin = sd15
    limits = Limits()
    basis = basis_of(rtx_3080, workload, origin, limits, History())
    remembered(rtx_3080, workload, basis, limits)
    remembered(with_free(rtx_3080, 2), workload, basis, limits)
    profile = load_profile(KEY)
    assert profile is not None
    assert [p.basis.partition("-")[0] for p in profile.plans] == [basis]


@pytest.mark.parametrize(
    "edited",
    [
        {"fits": "perhaps"},
        {"optimizations": [{"name": "nonexistent", "parameters": {}}]},
        {"optimizations": [{"name": "vae_tiling", "parameters": {"tile": -5}}]},
        {"fastest_seconds": -1.0},
    ],
)
def test_a_plan_edited_by_hand_is_made_anew(
    edited: dict[str, Any],
    rtx_3080: Machine,
    sd15: tuple[Workload, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "autotune")
    workload, origin = sd15
    limits = Limits()
    basis = basis_of(rtx_3080, workload, origin, limits, History())
    save_profile(new_profile(KEY, rtx_3080))
    remembered(rtx_3080, workload, basis, limits)
    decided = recall(KEY, rtx_3080, limits, basis)

    def spoil(profile: Profile | None) -> Profile:
        assert profile is not None
        (plan,) = profile.plans
        changed = msgspec.structs.replace(plan, plan=plan.plan | edited)
        return msgspec.structs.replace(profile, plans=(changed,))

    update_profile(KEY, spoil)
    assert recall(KEY, rtx_3080, limits, basis) is None
    assert "is not used: it was edited" in caplog.text
    remembered(rtx_3080, workload, basis, limits)
    assert recall(KEY, rtx_3080, limits, basis) == decided
    profile = load_profile(KEY)
    assert profile is not None
    assert len(profile.plans) == 1
