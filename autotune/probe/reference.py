"""Recorded machines: the published ones that ship with the package, and those a user adds."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from autotune.errors import MachineError
from autotune.probe.machine import Figure, Machine, Value

_PACKAGE = Path(__file__).resolve().parent.parent
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]*")

PLAUSIBLE: Final = {"_per_s": (1e3, 1e18), "_s": (0.0, 1.0), "_fraction": (0.0, 1.0)}
"""Within what every figure of a machine is, by how its name ends: with its unit. Bytes or
operations per second, from a thousand to what no single device reaches; seconds that the host
spends on one call; shares."""

OPERATOR_S: Final = 3600.0
"""More seconds than one call of an operator takes anywhere."""


def reference_machines() -> dict[str, Path]:
    """Name → file of every machine that ships with the package, then of those the user added."""
    return _named(shipped_folder()) | _named(_user_folder())


def load_machine(name_or_file: str) -> Machine:
    """A recorded machine by its name, or from a JSON file.

    Raises:
        MachineError: no such name (with the close matches) or file, or the file is no machine.
    """
    known = reference_machines()
    if name_or_file in known:
        return read_machine(known[name_or_file])
    path = Path(name_or_file).expanduser()
    if path.suffix == ".json" or path.is_file():
        return read_machine(path)
    close = difflib.get_close_matches(name_or_file.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise MachineError(
        f"there is no recorded machine {name_or_file!r}",
        f"{hint}known: {', '.join(known) or 'none'}; or give a .json file that `autotune probe "
        "--save` wrote",
    )


def read_machine(path: Path) -> Machine:
    """Reads and validates one machine file.

    Raises:
        MachineError: it cannot be read, or is not a machine that can be planned for.
    """
    hint = "write one with `autotune probe --save FILE`"
    try:
        machine = msgspec.json.decode(path.read_bytes(), type=Machine)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        message = f"cannot read the machine file {path}: {reason}"
        raise MachineError(message, f"check the path, or {hint}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:  # not even text
        raise MachineError(f"{path} is not a machine file: {error}", hint) from error
    for problem in machine_problems(machine):
        raise MachineError(f"{path} is no machine that can be planned for: {problem}", hint)
    return machine


def machine_problems(machine: Machine) -> Iterator[str]:
    """What the types let through and no plan can be made with, in words."""
    device, host, kernels = machine.device, machine.host, machine.kernels
    if not 0 <= device.free_bytes <= device.total_bytes or not device.total_bytes:
        yield f"it has {device.free_bytes} of {device.total_bytes} bytes free"
    if host.cores < 1 or not 0 <= host.ram_available_bytes <= host.ram_total_bytes:
        yield f"its host has {host.cores} cores, {host.ram_available_bytes} bytes available"
    for name, figures in (
        ("matmul_flops_per_s", kernels.matmul_flops_per_s),
        ("convolution_flops_per_s", kernels.convolution_flops_per_s),
    ):
        if "float32" not in figures:
            yield f"{name} has no float32"
    if not 0 <= machine.context_bytes <= device.total_bytes:
        yield f"its context takes {machine.context_bytes} of {device.total_bytes} bytes"
    for part in (kernels, machine.link, machine.attention, host):
        for name, value in _figures(part, ""):
            low, high = next(r for unit, r in PLAUSIBLE.items() if name.endswith(unit))
            if not low <= value <= high:
                yield f"{name} is {value:g}, must be {low:g} to {high:g}"
    yield from _operator_problems(machine)


def _operator_problems(machine: Machine) -> Iterator[str]:
    total = machine.device.total_bytes
    for key, time in machine.operators.items():
        for name, seconds in (("seconds", time.seconds), ("first_extra_s", time.first_extra_s)):
            if seconds is not None and not 0 <= seconds <= OPERATOR_S:
                text = f"{name} is {seconds:g}, must be 0 to {OPERATOR_S:g}"
                yield f"an operator's {text}: {key[:80]}"
        if not 0 <= (time.workspace_bytes or 0) <= total:
            yield f"an operator took {time.workspace_bytes} of {total} bytes: {key[:80]}"


def _figures(value: object, name: str) -> Iterator[tuple[str, float]]:
    """Every figure in a part of a machine, with the name that says its unit."""
    if isinstance(value, Figure):
        yield name, value.value
    elif isinstance(value, Value):
        for field in value.__struct_fields__:
            yield from _figures(getattr(value, field), field)
    elif isinstance(value, (dict, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _figures(item, name)


def check_writable(path: Path) -> None:
    """Whether a file can be written there, asked before the work that is to go into it.

    Raises:
        MachineError: it cannot.
    """
    folder = path.absolute().parent
    if path.is_dir():
        raise MachineError(f"cannot write {path}: it is a folder", "name a file in it")
    if not folder.is_dir():
        raise MachineError(f"cannot write {path}: there is no folder {folder}", "make it first")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise MachineError(f"cannot write {path}: no permission in {folder}", "choose another file")


def write_machine(machine: Machine, path: Path) -> None:
    """Writes a machine as indented JSON; the file is whole or not there.

    Raises:
        MachineError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(encode_machine(machine))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or type(error).__name__
        raise MachineError(f"cannot write {path}: {reason}", "choose another file") from error


def add_machine(path: Path) -> Path:
    """Validates a machine file and copies it into the user's cache folder under its name.

    Returns:
        The copy.

    Raises:
        MachineError: it is not a machine, its name cannot be a file name, or a shipped one has it.
    """
    from autotune.profile.files import cache_folder

    machine = read_machine(path)
    if not _NAME.fullmatch(machine.name):
        hint = "use lower-case letters, digits, dots, dashes and underscores"
        raise MachineError(f"a machine cannot be called {machine.name!r}", hint)
    if machine.name in _named(shipped_folder()):
        hint = f'change "name" in {path}'
        raise MachineError(f"a machine called {machine.name!r} ships with autotune", hint)
    folder = cache_folder() / _user_folder().name
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        hint = "set AUTOTUNE_CACHE to a folder that you can write"
        raise MachineError(f"cannot make the folder {folder}: {error.strerror}", hint) from error
    copy = folder / f"{machine.name}.json"
    write_machine(machine, copy)
    return copy


def encode_machine(machine: Machine) -> bytes:
    """The bytes of a machine file."""
    return msgspec.json.format(msgspec.json.encode(machine), indent=2) + b"\n"


def shipped_folder() -> Path:
    """``autotune/_profiles`` in an installed wheel, ``profiles/`` in a checkout."""
    installed = _PACKAGE / "_profiles"
    return installed if installed.is_dir() else _PACKAGE.parent / "profiles"


def _user_folder() -> Path:
    """Made only when a machine is added: reading needs no folder that can be written."""
    from autotune.profile.files import location

    return location() / "machines"


def _named(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.json"))}
