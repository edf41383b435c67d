"""Recordings of real runs: today's planner predicts and chooses anew, and is held to bars.

``scripts/gpu_validation.py`` makes them, ``scripts/gpu_report.py`` writes docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

from validation import judge  # noqa: E402
from validation.recording import Header, Recording, SetRun, Started, read  # noqa: E402
from validation.sets import keys_of, set_of  # noqa: E402
from validation.tables import verdict  # noqa: E402

RECORDINGS = sorted((ROOT / "tests" / "data" / "measured").glob("*.jsonl.gz"))


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda p: p.name.partition(".")[0])
def evidence(request: pytest.FixtureRequest) -> list[judge.Evidence]:
    return judge.evidence_of(list(read(request.param)))


@pytest.fixture(scope="module")
def rows(evidence: list[judge.Evidence]) -> list[judge.Compared]:
    return [row for e in evidence for row in e.comparisons()]


@pytest.fixture(scope="module")
def answers(evidence: list[judge.Evidence]) -> dict[bool, list[judge.Answer]]:
    return {verify: [a for e in evidence for a in e.answers(verify)] for verify in (False, True)}


def test_there_are_recordings() -> None:
    assert RECORDINGS


def test_memory(rows: list[judge.Compared]) -> None:
    bars = judge.bars_of(rows, [])
    assert bars.memory is not None and bars.memory <= 0.04
    assert bars.phases is not None and bars.phases <= 0.04


def test_time(rows: list[judge.Compared], evidence: list[judge.Evidence]) -> None:
    bars = judge.bars_of(rows, [])
    assert bars.seconds is not None and bars.seconds <= 0.10
    for one in evidence:
        tau = one.kendall_tau()
        assert tau is None or tau >= 0.6, one.case


@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_choices(answers: dict[bool, list[judge.Answer]], verify: bool) -> None:
    bars = judge.bars_of([], answers[verify])
    assert bars.regret is not None and bars.regret <= 0.03
    assert bars.ran_out == 0


def test_every_choice_was_measured(answers: dict[bool, list[judge.Answer]]) -> None:
    """A planner that chooses what was never tried needs another recording, not another bar."""
    for answer in (a for some in answers.values() for a in some if a.choice.fits):
        assert answer.outcome is not None, (answer.case, answer.choice.settings)


def test_phases_add_up(evidence: list[judge.Evidence]) -> None:
    """What sets that were not run as a whole are judged by."""
    errors = [abs(error) for e in evidence for error in e.additivity()]
    assert len(errors) > 10
    assert sum(errors) / len(errors) < 0.06


def test_a_verdict_is_written(evidence: list[judge.Evidence]) -> None:
    path = next(
        p for p in RECORDINGS if judge.evidence_of(list(read(p)))[0].case == evidence[0].case
    )
    text = "\n".join(verdict(list(read(path)), evidence))
    for heading in ("In short", "Ranking", "Choices", "Beside others"):
        assert f"### {heading}" in text


# ---- the scripts themselves ---------------------------------------------------------------------


def test_kendall_tau() -> None:
    assert judge.tau([(10, 1), (20, 2), (30, 3)]) == 1
    assert judge.tau([(30, 1), (20, 2), (10, 3)]) == -1
    assert judge.tau([(2, 1), (1, 1.01)]) is None  # as good as equal


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recording made here and now, of one case, as far as a few seconds go."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOTUNE_CACHE", str(folder / "cache"))
        run_tiny(folder / "tiny.jsonl", patch)
    return folder / "tiny.jsonl"


def run_tiny(path: Path, patch: pytest.MonkeyPatch, where: Any = None) -> list[str]:
    """What is done, job by job: the plain pipeline, and the tools that refuse a CPU."""
    from validation import bench, cases, device

    from autotune.probe.host import read_host
    from autotune.probe.reference import load_machine
    from autotune.probe.software import installed_versions
    from autotune.testing.pipelines import BUILDERS
    from autotune.tuner import Measured, planning
    from autotune.workload.architecture import describe_pipeline

    here = msgspec.structs.replace(
        load_machine("cpu-16-cores"),
        source="measured",
        host=read_host(),
        software=installed_versions(),
    )
    sd = describe_pipeline(BUILDERS["sd"]())
    patch.setattr(bench, "architecture_of", lambda _: msgspec.structs.replace(sd, name="sd"))
    patch.setattr(bench, "ASKED", judge.ASKED[:1])
    patch.setattr(judge, "ASKED", judge.ASKED[:1])
    patch.setattr(bench, "probed", lambda *_: Measured("here", here, ()))
    patch.setattr(planning, "REPLAY_S", 0.0)
    patch.setattr(bench, "TURNS", (1.0,) if where else (0.9, 1.0))
    patch.setattr(bench, "covering", lambda *_: [()])
    said: list[str] = []
    case = cases.Case("sd", 64, 1, 1, "float32")
    patch.setattr(bench, "TOOLS", bench.TOOLS[:3])
    patch.setattr(bench, "SWITCHES", bench.SWITCHES[:1])
    patch.setattr(bench, "KERNEL_S", 0.1)
    on = where or device.Cpu()
    bench.Bench(Recording(path), on, "wall", 600.0, said.append).run([case])
    return said


def test_a_run_is_recorded(tiny: Path) -> None:
    lines = list(read(tiny))
    (only,) = judge.evidence_of(lines)
    assert isinstance(lines[0], Header)
    assert only.measured == [()]
    outcome = only.outcome(())
    assert outcome is not None and outcome.peak_bytes > only.workload.weight_bytes
    assert {p.peer for p in only.peers} >= {"ComponentsManager", "diffusers-mm", "mmgp"}
    assert all(p.error for p in only.peers), "none of them has a use for a CPU"
    assert "Could not be run here" in "\n".join(verdict(lines, [only]))


def test_a_run_goes_on_where_it_was(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tiny.read_bytes()
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tiny.parent / "cache"))
    run_tiny(tiny, monkeypatch)
    assert tiny.read_bytes() == before


def test_a_card_too_small_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: what is chosen for a card runs on one of that size, out of memory or not."""
    import torch
    from validation import device, measure

    class Cards(device.Cpu):
        simulates = False
        size: int | None = None
        small = 0

        def cards(self, plain_bytes: int, machine: Any) -> tuple[int, ...]:
            self.small = plain_bytes + (1 << 20)
            return self.small, 4 * plain_bytes

        @contextlib.contextmanager
        def card(self, size_bytes: int | None, machine: Any) -> Iterator[None]:
            self.size = size_bytes
            yield
            self.size = None

    cards = Cards()

    called_with = measure.called_with

    def called(*given: Any) -> Any:
        def draw(**options: Any) -> Any:
            if cards.size == cards.small:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return call(**options)

        call = called_with(*given)
        return draw

    monkeypatch.setattr(measure, "called_with", called)
    monkeypatch.setenv("AUTOTUNE_CACHE", str(tmp_path))
    run_tiny(tmp_path / "cards.jsonl", monkeypatch, cards)
    lines = list(read(tmp_path / "cards.jsonl"))
    (only,) = judge.evidence_of(lines)
    small, large = only.cards
    assert {(r.card_bytes, r.ran_out) for r in only.failed} == {(small, True)}
    assert only.fits((), large) is True
    assert only.fits((), small) is False
    assert all(
        a.ran_out == (a.question.card_bytes == small) for a in only.answers(False) if a.choice.fits
    )
    assert "out of memory" in "\n".join(verdict(lines, [only]))


def test_what_a_dead_process_leaves_behind(tiny: Path, tmp_path: Path) -> None:
    """Half a line is dropped; the job in which it died counts as failed, and is not tried again."""
    path = tmp_path / "cut.jsonl"
    path.write_bytes(tiny.read_bytes() + b'{"type":"set","job":"cut o')
    recording = Recording(path)
    assert path.read_bytes() == tiny.read_bytes()
    recording.add(Started("some case | set | plain"))
    assert Recording(path).abandoned == ["some case | set | plain"]
    recording.add(SetRun("some case | set | plain", "some case", (), None, error="died"))
    assert not Recording(path).abandoned


def test_phases_see_their_own_settings(evidence: list[judge.Evidence]) -> None:
    one = evidence[0]
    settings: Any = set_of(("vae_slicing", "layerwise_casting"))
    keys = keys_of(settings, one.machine, one.workload)
    assert keys["decode"][1] == {"vae_slicing", "layerwise_casting"}
    assert keys["denoise"][1] == {"layerwise_casting"}
