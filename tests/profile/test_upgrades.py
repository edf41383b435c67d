from __future__ import annotations

import json
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]
import pytest

from autotune.errors import ProfileError
from autotune.probe.host import read_host
from autotune.profile import store
from autotune.profile.profile import SCHEMA_VERSION
from autotune.profile.staleness import changes, facts_of
from autotune.profile.upgrades import UPGRADES, upgraded

REPOSITORY = Path(__file__).parents[2]
FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("v*.json"))


def fields_of(file: Path) -> dict[str, object]:
    loaded: dict[str, object] = json.loads(file.read_text())
    return loaded


def test_every_version_has_a_fixture_and_a_step_to_the_next() -> None:
    versions = {fields_of(file)["schema_version"] for file in FIXTURES}
    assert versions == set(range(1, SCHEMA_VERSION + 1))
    assert set(UPGRADES) == set(range(1, SCHEMA_VERSION))


@pytest.mark.parametrize("file", FIXTURES, ids=lambda file: file.stem)
def test_every_version_is_read_as_todays(file: Path) -> None:
    profile = store.read_profile(file)
    assert profile.schema_version == SCHEMA_VERSION
    assert len(profile.runs) == 1
    assert changes(facts_of(profile.machine), facts_of(profile.machine)) == ()


@pytest.mark.parametrize("file", FIXTURES, ids=lambda file: file.stem)
def test_nothing_is_lost_on_the_way(file: Path) -> None:
    """Read, written and read again, every field of the old file is there as it was."""
    store.cache_folder()
    before = fields_of(file)
    path = store.profile_path(str(before["key"]))
    path.write_bytes(file.read_bytes())
    store.update_profile(str(before["key"]), lambda old: old)  # type: ignore[arg-type, return-value]
    after = fields_of(path)
    assert after == {**before, "schema_version": SCHEMA_VERSION}


@pytest.mark.parametrize("file", FIXTURES, ids=lambda file: file.stem)
def test_every_version_upgraded_follows_the_schema(file: Path) -> None:
    schema = fields_of(REPOSITORY / "docs" / "schemas" / "profile.json")
    fields = fields_of(file)
    version = int(str(fields["schema_version"]))
    jsonschema.validate(upgraded(fields, version), schema)


def test_an_older_version_is_not_measured_again_for_being_old() -> None:
    """On the same machine and software, that is; here, the host is another."""
    profile = store.read_profile(FIXTURES[0].with_name("v1-cpu.json"))
    now = facts_of(profile.machine)._replace(host=read_host())
    found = {change.what for change in changes(facts_of(profile.machine), now)}
    assert found <= {"CPU", "cores", "OS", "RAM"}


def test_a_version_in_between_goes_through_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it will be when there are more of them."""
    monkeypatch.setattr("autotune.profile.upgrades.SCHEMA_VERSION", 4)
    steps = {
        number: lambda fields, number=number: {**fields, "seen": [*fields["seen"], number]}
        for number in (1, 2, 3)
    }
    monkeypatch.setattr("autotune.profile.upgrades.UPGRADES", steps)
    assert upgraded({"seen": []}, 1) == {"seen": [1, 2, 3], "schema_version": 4}
    assert upgraded({"seen": []}, 3) == {"seen": [3], "schema_version": 4}
    assert upgraded({"seen": []}, 4) == {"seen": [], "schema_version": 4}


def test_an_old_file_is_validated_like_a_new_one(tmp_path: Path) -> None:
    fields = fields_of(FIXTURES[0].with_name("v1.json"))
    file = tmp_path / "old.json"
    file.write_text(json.dumps({**fields, "runs": [{"workload": 3}]}))
    with pytest.raises(ProfileError, match=r"runs\[0\]"):
        store.read_profile(file)
