"""The value that everything else is decided by: it survives files, old ones too."""

from __future__ import annotations

import json

import msgspec
import pytest

from autotune.probe.machine import Device, Figure, Kernels, Machine, OperatorTime
from autotune.probe.reference import load_machine

# Fields that machines of earlier versions were stored without.
LATER = {
    Figure: ("spread", "disturbances"),
    Device: ("used_bytes", "power_limit_default_watts", "memory_bus_bits", "multiprocessors"),
    Kernels: ("launch_s",),
    OperatorTime: ("first_extra_s",),
    Machine: ("left_out",),
}


def test_machines_stored_before_a_field_was_there_are_read() -> None:
    machine = load_machine("rtx-3080-10gb")
    stored = json.loads(msgspec.json.encode(machine))
    for key in LATER[Device]:
        stored["device"].pop(key, None)
    stored["operators"] = {"a": {"seconds": 0.5}, "b": {"seconds": None, "workspace_bytes": 3}}
    read = msgspec.json.decode(json.dumps(stored), type=Machine)
    assert read.operators == {"a": OperatorTime(0.5), "b": OperatorTime(None, 3)}
    assert read.operators["a"].first_extra_s is None
    assert read.device.memory_bus_bits is None
    assert read.kernels == machine.kernels


@pytest.mark.parametrize("kind", LATER)
def test_later_fields_may_be_missing(kind: type[msgspec.Struct]) -> None:
    defaults = {field.name: field.required for field in msgspec.structs.fields(kind)}
    assert all(not defaults[name] for name in LATER[kind])


def test_nothing_is_stored_that_is_not_known() -> None:
    assert json.loads(msgspec.json.encode(Figure(1.5))) == {"value": 1.5}
    assert json.loads(msgspec.json.encode(OperatorTime(0.1))) == {"seconds": 0.1}


def test_a_field_of_a_newer_version_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="colour"):
        msgspec.json.decode(b'{"value": 1.0, "colour": "red"}', type=Figure)
