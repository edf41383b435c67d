"""Planning again on a GPU whose memory others take, under a driver that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec

from autotune.decide.limits import Limits
from autotune.decide.prediction import PROCESS_BYTES
from autotune.probe.reference import load_machine
from autotune.tuner import Ask, make_plan
from autotune.tuner.configure import _as_loaded
from tests.probe.conftest import ROOT
from tests.probe.conftest import stub_folders as stub_folders

OTHERS_COME = """
import json, os, pathlib, sys
import msgspec
from autotune.probe import nvml
from autotune.probe.reference import load_machine
from autotune.tuner import Ask, Measured
from autotune.tuner.planning import decided
from autotune.tuner.replan import Replanner
from autotune.workload.architecture import find_architecture
from autotune.workload.workload import Workload

workload = msgspec.json.decode(pathlib.Path(sys.argv[1]).read_bytes(), type=Workload)
(gpu,) = nvml.gpus()
machine = load_machine("rtx-3080-10gb")
device = msgspec.structs.replace(machine.device, uuid=gpu.uuid, free_bytes=gpu.free_bytes)
machine = msgspec.structs.replace(machine, source="measured", device=device)
ask = Ask(batch=16)
planned = decided(find_architecture("demo"), machine, workload, ask.limits)
planner = Replanner(None, planned, Measured(gpu.uuid, machine, ()), ask)
needed = planned.plan.prediction.needed_bytes
found = {"before": planner.holds(planned.plan)}
room = machine.context_bytes + int(needed * 0.9)
os.environ["NVML_STUB_TAKEN"] = str(gpu.free_bytes - room)
found["then"] = planner.holds(planned.plan)
found["scarce"] = planner.is_scarce()
again = planner.plan(planned.workload.request)
found["again"] = planner.holds(again.plan)
found["smaller"] = again.plan.prediction.needed_bytes < needed
found["seen"] = again.plan.budget_bytes == room - machine.context_bytes
print(json.dumps(found))
"""


def test_ram_for_reading_is_not_needed_once_all_is_read() -> None:
    """It would be missing to every other pipeline, and looked for before each image."""
    machine = load_machine("rtx-3080-10gb")
    # Its files are in float16: in another dtype it cannot stay mapped.
    planned = make_plan(
        "demo", machine, Ask(limits=Limits(only=("vae_slicing",)), dtype="bfloat16")
    )
    weights = planned.workload.weight_bytes
    assert planned.plan.prediction.host_bytes == PROCESS_BYTES + weights
    loaded = _as_loaded(planned, Ask())
    assert loaded.plan.prediction.host_bytes == PROCESS_BYTES
    assert loaded.plan.prediction.load == planned.plan.prediction.load
    assert loaded.workload.is_loaded
    assert _as_loaded(loaded, Ask()) is loaded
    assert loaded.workload.mappable == ()  # unless layers were left in their files
    assert _as_loaded(planned, Ask(), ("unet",)).workload.mappable == ("unet",)


def test_another_process_takes_vram_after_the_plan(
    stub_folders: dict[str, Path], tmp_path: Path
) -> None:
    workload = make_plan("demo", load_machine("rtx-3080-10gb"), Ask(batch=16)).workload
    file = tmp_path / "workload.json"
    file.write_bytes(msgspec.json.encode(workload))
    environment = {"NVML_STUB": "desktop", "LD_LIBRARY_PATH": str(stub_folders["new"])}
    done = subprocess.run(
        [sys.executable, "-c", OTHERS_COME, str(file)],
        env=os.environ | environment | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {
        "before": True, "then": False, "scarce": True, "again": True, "smaller": True, "seen": True
    }  # fmt: skip
