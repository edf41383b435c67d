"""Reference machines: up to date, plausible, and found by name or file."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from autotune.errors import MachineError
from autotune.probe.machine import Figure, Machine, OperatorTime
from autotune.probe.reference import (
    add_machine,
    load_machine,
    read_machine,
    reference_machines,
    shipped_folder,
    write_machine,
)

ROOT = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (ROOT / "profiles").glob("*.json"))
PUBLISHED = [name for name in NAMES if load_machine(name).source == "datasheet"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path / "cache"))


def figures(machine: Machine) -> Iterator[Figure]:
    kernels, link = machine.kernels, machine.link
    yield from kernels.matmul_flops_per_s.values()
    yield from kernels.convolution_flops_per_s.values()
    yield from kernels.convolution_channels_last_flops_per_s.values()
    yield from (kernels.memory_bytes_per_s, kernels.dispatch_s)
    yield from (rate.flops_per_s for rate in machine.attention if rate.flops_per_s)
    if link is not None:
        yield from (link.h2d_pinned_bytes_per_s, link.module_h2d_bytes_per_s)


def test_the_files_are_what_the_script_writes() -> None:
    script = ROOT / "scripts" / "make_reference_machines.py"
    done = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"run scripts/make_reference_machines.py: {done.stdout}"


def test_all_that_were_promised_are_there() -> None:
    promised = """a100-40gb a100-80gb cpu-16-cores gtx-1660-6gb h100-80gb laptop-rtx-3050-4gb
    rtx-3060-12gb rtx-3080-10gb rtx-3080-10gb-torch1 rtx-4060-8gb rtx-4090-24gb rtx-4090-24gb-x2
    rtx-5090-32gb t4-16gb t4-16gb-x2"""
    assert set(promised.split()) <= set(NAMES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_nothing_published_is_called_measured(name: str) -> None:
    machine = load_machine(name)
    assert machine.name == name
    assert machine.measured_at is None
    for figure in figures(machine):
        assert figure.value > 0
        assert not figure.samples
        assert figure.source != "measured"


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_reached_stays_below_what_is_published(name: str) -> None:
    for figure in figures(load_machine(name)):
        published = re.search(r"([\d.]+) (TFLOP/s|GB/s)", figure.source)
        if published and not figure.source.startswith(("estimate from", "derived")):
            factor = 1e12 if published[2] == "TFLOP/s" else 1e9
            assert figure.value < float(published[1]) * factor


@pytest.mark.parametrize("name", NAMES)
def test_a_machine_is_consistent(name: str) -> None:
    machine = load_machine(name)
    assert 0 < machine.device.free_bytes < machine.device.total_bytes
    assert machine.host.ram_available_bytes < machine.host.ram_total_bytes
    assert set(machine.kernels.convolution_flops_per_s) <= set(machine.kernels.matmul_flops_per_s)
    assert (machine.link is None) == (machine.device.kind == "cpu")


def test_torch1_differs_in_its_attention_only() -> None:
    today, before = load_machine("rtx-3080-10gb"), load_machine("rtx-3080-10gb-torch1")
    assert before.kernels == today.kernels
    assert before.default_attention == "vanilla"
    rates = {(rate.implementation, rate.q_tokens, rate.head_dim): rate for rate in before.attention}
    for (implementation, tokens, head_dim), rate in rates.items():
        if implementation == "vanilla":
            faster = rates["xformers", tokens, head_dim]
            assert faster.flops_per_s and rate.flops_per_s
            assert faster.flops_per_s.value > rate.flops_per_s.value
        if implementation == "sdpa":
            assert rate.error


def test_unknown_names_suggest_close_ones() -> None:
    with pytest.raises(MachineError, match="did you mean rtx-3080-10gb") as raised:
        load_machine("rtx3080")
    assert "h100-80gb" in raised.value.hint


def test_broken_files_say_where(tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    for text, where in (("{", "truncated"), ('{"name": 3}', r"\$\.name"), ("[]", "object")):
        file.write_text(text)
        with pytest.raises(MachineError, match=where):
            load_machine(str(file))
    file.write_bytes(b"\xff\xfe\x00not text")
    with pytest.raises(MachineError, match="is not a machine file"):
        load_machine(str(file))
    file.write_text("[" * 100_000)
    with pytest.raises(MachineError, match="is not a machine file"):
        load_machine(str(file))
    with pytest.raises(MachineError, match="No such file"):
        load_machine(str(tmp_path / "absent.json"))


def odd_machines() -> Iterator[tuple[Machine, str]]:
    """Machines of the right types, with what is wrong about each."""
    machine = load_machine("rtx-3080-10gb")
    device, host, kernels, link = machine.device, machine.host, machine.kernels, machine.link
    assert link is not None
    for free in (-1, device.total_bytes + 1):
        yield replace(machine, device=replace(device, free_bytes=free)), "bytes free"
    yield replace(machine, device=replace(device, total_bytes=0, free_bytes=0)), "bytes free"
    yield replace(machine, host=replace(host, cores=0)), "0 cores"
    for name in ("matmul_flops_per_s", "convolution_flops_per_s"):
        half = {"float16": Figure(1.0)}
        yield replace(machine, kernels=replace(kernels, **{name: half})), f"{name} has no float32"
    zero, negative, little, much = (Figure(f) for f in (0.0, -1.0, 1e-300, 1e300))
    yield (
        replace(machine, kernels=replace(kernels, memory_bytes_per_s=negative)),
        "_s is -1, must be",
    )
    products = kernels.matmul_flops_per_s | {"float16": little}
    yield (
        replace(machine, kernels=replace(kernels, matmul_flops_per_s=products)),
        "is 1e-300, must be",
    )
    yield (
        replace(machine, kernels=replace(kernels, dispatch_s=much)),
        "dispatch_s is 1e\\+300, must be",
    )
    yield replace(machine, link=replace(link, module_h2d_bytes_per_s=zero)), "module_h2d_.* is 0"
    yield replace(machine, link=replace(link, overlap_fraction=negative)), "overlap_fraction is -1"
    rates = (replace(machine.attention[0], flops_per_s=zero),)
    yield replace(machine, attention=rates), "flops_per_s is 0"
    yield replace(machine, host=replace(host, disk_read_bytes_per_s=much)), "disk_read.* is 1e"
    yield replace(machine, context_bytes=-1), "its context takes -1"
    for time in (OperatorTime(1e300), OperatorTime(-1.0), OperatorTime(1.0, None, -1.0)):
        yield replace(machine, operators={"conv": time}), "an operator's .*: conv"
    time = OperatorTime(1.0, workspace_bytes=device.total_bytes + 1)
    yield replace(machine, operators={"conv": time}), "an operator took"


@pytest.mark.parametrize(("machine", "problem"), tuple(odd_machines()))
def test_a_machine_that_no_plan_can_be_made_for_is_refused(
    tmp_path: Path, machine: Machine, problem: str
) -> None:
    write_machine(machine, tmp_path / "odd.json")
    with pytest.raises(MachineError, match=problem):
        read_machine(tmp_path / "odd.json")


def test_added_machines_are_found_by_name(tmp_path: Path) -> None:
    machine = replace(load_machine("rtx-3080-10gb"), name="my-card")
    write_machine(machine, tmp_path / "any.json")
    copy = add_machine(tmp_path / "any.json")
    assert reference_machines()["my-card"] == copy
    assert load_machine("my-card") == machine == read_machine(copy)


@pytest.mark.parametrize("name", ["../evil", "", "Upper", "h100-80gb"])
def test_names_that_cannot_be_added(tmp_path: Path, name: str) -> None:
    write_machine(replace(load_machine("rtx-3080-10gb"), name=name), tmp_path / "any.json")
    with pytest.raises(MachineError):
        add_machine(tmp_path / "any.json")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="cannot write"):
        write_machine(load_machine("t4-16gb"), tmp_path / "absent" / "file.json")
    assert not list(tmp_path.glob("**/.*.part"))


def test_a_checkout_uses_its_profiles() -> None:
    assert shipped_folder().is_dir()
