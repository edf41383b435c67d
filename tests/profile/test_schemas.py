from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import msgspec
import pytest

from autotune.profile import store
from autotune.profile.profile import Profile

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def make_schemas() -> ModuleType:
    path = REPOSITORY / "scripts" / "make_schemas.py"
    spec = importlib.util.spec_from_file_location("make_schemas", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schema(name: str) -> dict[str, Any]:
    text = (REPOSITORY / "docs" / "schemas" / name).read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def test_the_committed_schemas_are_current(make_schemas: ModuleType) -> None:
    assert make_schemas.outdated() == []


def test_a_missing_or_old_schema_is_noticed(
    make_schemas: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(make_schemas, "FOLDER", tmp_path / "schemas")
    assert len(make_schemas.outdated()) == len(make_schemas.SCHEMAS)
    make_schemas.write()
    assert make_schemas.outdated() == []
    (tmp_path / "schemas" / "profile.json").write_text("{}")
    assert [path.name for path in make_schemas.outdated()] == ["profile.json"]


def test_stored_profiles_are_valid(profile: Profile) -> None:
    store.save_profile(profile)
    stored = json.loads(store.profile_path(profile.key).read_text())
    jsonschema.validate(stored, schema("profile.json"))
    machine = json.loads(msgspec.json.encode(profile.machine))
    jsonschema.validate(machine, schema("machine.json"))


def test_the_schema_refuses_what_the_reader_refuses(profile: Profile) -> None:
    fields = {**json.loads(msgspec.json.encode(profile)), "extra": 1}
    with pytest.raises(jsonschema.ValidationError, match="extra"):
        jsonschema.validate(fields, schema("profile.json"))
