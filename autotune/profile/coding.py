"""A profile as the bytes of a file, and back: validated, upgraded, never half understood."""

from __future__ import annotations

import msgspec

from autotune.errors import ProfileError
from autotune.probe.reference import machine_problems
from autotune.profile.files import MAX_FILE_BYTES, MEASURE_HINT
from autotune.profile.profile import SCHEMA_VERSION, Profile
from autotune.profile.upgrades import upgraded
from autotune.units import format_bytes, printable


class _Header(msgspec.Struct):
    """The one field that every schema version has, whatever else a newer one adds."""

    schema_version: int


def decode(data: bytes, name: str) -> Profile:
    """A file's content as a profile of today's schema.

    Args:
        data: Of any version up to today's.
        name: Says in errors where it comes from.

    Raises:
        ProfileError: it is no profile, of a newer version, or of a machine that cannot be.
    """
    try:
        version = msgspec.json.decode(data, type=_Header).schema_version
        if version > SCHEMA_VERSION:
            raise ProfileError(
                f"{name} has profile schema {version}, and this version reads up to "
                f"{SCHEMA_VERSION}",
                "update diffusers-autotune",
            )
        profile = _decode(data, version)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        why = printable(str(error))
        raise ProfileError(f"{name} is not a readable profile: {why}", MEASURE_HINT) from error
    for problem in machine_problems(profile.machine):
        raise ProfileError(f"{name} is the profile of no machine: {problem}", MEASURE_HINT)
    return profile


def _decode(data: bytes, version: int) -> Profile:
    if version == SCHEMA_VERSION:
        return msgspec.json.decode(data, type=Profile)
    if version < 1:
        raise ValueError(f"there never was a profile schema {version}")
    # What JSON has for keys of numbers is text.
    return msgspec.convert(upgraded(msgspec.json.decode(data), version), Profile, str_keys=True)


def encode(profile: Profile) -> bytes:
    """Indented JSON, proven to read back the same: JSON would turn a NaN into ``null``.

    Raises:
        ProfileError: it would not read back the same.
    """
    profile = msgspec.structs.replace(profile, schema_version=SCHEMA_VERSION)
    key = repr(profile.key)
    try:
        # The version is written always: defaults are omitted, and this one changes in every schema.
        fields = {"schema_version": SCHEMA_VERSION, **msgspec.to_builtins(profile, str_keys=True)}
        data = msgspec.json.format(msgspec.json.encode(fields), indent=2) + b"\n"
    except (msgspec.MsgspecError, ValueError, TypeError, RecursionError) as error:
        raise ProfileError(f"profile {key} cannot be stored: {error}") from error
    if len(data) > MAX_FILE_BYTES or decode(data, f"profile {key}, not stored,") != profile:
        raise ProfileError(
            f"profile {key} cannot be stored and read back ({format_bytes(len(data))})",
            "a figure is not finite, a value has the wrong type, or it is too large",
        )
    return data
