from __future__ import annotations

from msgspec.structs import replace

from autotune.profile.profile import SCHEMA_VERSION, Profile
from autotune.profile.staleness import stale_reasons

SOFTWARE = {"torch": "2.12.0", "diffusers": "0.42.1", "python": "3.11.7"}


def reasons(profile: Profile, **changes: str) -> tuple[str, ...]:
    return stale_reasons(profile, software={**SOFTWARE, **changes}, driver="580.82")


def test_nothing_changed(profile: Profile) -> None:
    host = profile.machine.host
    assert stale_reasons(profile, software=SOFTWARE, driver="580.82", host=host) == ()


def test_what_does_not_matter(profile: Profile) -> None:
    assert reasons(profile, python="3.12.1", tomesd="0.1.3") == ()


def test_changed_versions(profile: Profile) -> None:
    assert reasons(profile, torch="2.13.0", accelerate="1.15.0") == (
        "torch 2.12.0 → 2.13.0",
        "accelerate not installed → 1.15.0",
    )
    assert reasons(profile, cuda="13.0") == ("cuda not installed → 13.0",)


def test_xformers_comes_and_goes(profile: Profile) -> None:
    assert reasons(profile, xformers="0.0.35") == ("xformers not installed → 0.0.35",)
    machine = replace(profile.machine, software={**SOFTWARE, "xformers": "0.0.35"})
    assert reasons(replace(profile, machine=machine)) == ("xformers 0.0.35 → not installed",)


def test_driver(profile: Profile) -> None:
    changed = stale_reasons(profile, software=SOFTWARE, driver="590.44")
    assert changed == ("driver 580.82 → 590.44",)
    assert stale_reasons(profile, software=SOFTWARE, driver=None) == ()


def test_host(profile: Profile) -> None:
    host = replace(
        profile.machine.host, ram_total_bytes=64 << 30, cpu="New CPU", cores=16, os="Linux 6.8.1"
    )
    assert stale_reasons(profile, software=SOFTWARE, driver="580.82", host=host) == (
        "RAM 32.0 GiB → 64.0 GiB",
        "CPU Test CPU → New CPU",
        "cores 8 → 16",
        "OS Linux 6.1.0-28-amd64 → Linux 6.8.1",
    )


def test_small_changes_of_the_host_are_none(profile: Profile) -> None:
    host = replace(
        profile.machine.host,
        ram_total_bytes=(32 << 30) - (200 << 20),
        ram_available_bytes=1 << 30,
        os="Linux 6.1.0-29-amd64",
    )
    assert stale_reasons(profile, software=SOFTWARE, driver="580.82", host=host) == ()


def test_schema(profile: Profile) -> None:
    (reason,) = reasons(replace(profile, schema_version=0))
    assert reason == f"measured by profile schema 0, this version has {SCHEMA_VERSION}"
