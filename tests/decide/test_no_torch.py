"""Deciding needs no torch, no files and no GPU: any plan can be replayed on any machine."""

from __future__ import annotations

import subprocess
import sys

import msgspec

from autotune.decide.choose import choose
from autotune.probe.reference import load_machine


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout


def test_importing_the_package_and_every_torch_free_stage_leaves_torch_alone():
    modules = (
        "autotune, autotune.tuner, autotune.cli.app, autotune.decide.choose, "
        "autotune.optimizations, "
        "autotune.profile.store, autotune.workload.architecture, autotune.workload.cache, "
        "autotune.probe.live, autotune.probe.nvml, autotune.probe.reference"
    )
    heavy = "{'torch', 'diffusers', 'transformers', 'accelerate', 'rich', 'pydantic'}"
    assert run(f"import sys, {modules}; print({heavy} & set(sys.modules))").strip() == "set()"


def test_a_plan_is_decided_without_torch(traced, tmp_path):
    file = tmp_path / "workload.json"
    file.write_bytes(msgspec.json.encode(traced("sdxl")))
    code = f"""
import sys, msgspec, pathlib
from autotune.decide.choose import choose
from autotune.probe.reference import load_machine
from autotune.workload.workload import Workload
workload = msgspec.json.decode(pathlib.Path({str(file)!r}).read_bytes(), type=Workload)
plan = choose(load_machine("rtx-3080-10gb"), workload)
print([str(s) for s in plan.optimizations], "torch" in sys.modules)
"""
    here = choose(load_machine("rtx-3080-10gb"), traced("sdxl"))
    assert run(code).strip() == f"{[str(s) for s in here.optimizations]} False"


def test_workloads_and_machines_survive_json(traced):
    workload = traced("sd15")
    again = msgspec.json.decode(msgspec.json.encode(workload), type=type(workload))
    assert again == workload
    machine = load_machine("t4-16gb")
    assert msgspec.json.decode(msgspec.json.encode(machine), type=type(machine)) == machine
