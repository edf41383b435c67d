"""Recordings of real runs: today's planner predicts and chooses anew, and is held to bars.

``scripts/gpu_validation.py`` makes them, ``scripts/gpu_report.py`` writes docs/benchmarks.md.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autotune.probe.reference import load_machine
from autotune.probe.software import OPTIONAL, installed_versions, version_of
from tests.thorough import examples

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_report  # noqa: E402
from validation import judge  # noqa: E402
from validation.recording import (  # noqa: E402
    Header,
    LeftOut,
    Line,
    Prepared,
    Recording,
    SetRun,
    read,
)
from validation.sets import keys_of, set_of  # noqa: E402
from validation.tables import verdict  # noqa: E402

RECORDINGS = sorted((ROOT / "tests" / "data" / "measured").glob("*.jsonl.gz"))


@pytest.fixture(scope="module", params=RECORDINGS, ids=lambda p: p.name.partition(".")[0])
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


@pytest.fixture(scope="module")
def lines(path: Path) -> list[Line]:
    return list(read(path))


@pytest.fixture(scope="module")
def evidence(lines: list[Line]) -> list[judge.Evidence]:
    return judge.evidence_of(lines)


@pytest.fixture(scope="module")
def rows(evidence: list[judge.Evidence]) -> list[judge.Compared]:
    return [row for e in evidence for row in e.comparisons]


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
        if one.is_reckoned or tau is not None:  # minutes on a GPU may not do for a rank
            assert tau is not None and tau >= 0.6, one.case


@pytest.mark.parametrize("verify", [False, True], ids=["unverified", "verified"])
def test_choices(answers: dict[bool, list[judge.Answer]], verify: bool) -> None:
    bars = judge.bars_of([], answers[verify])
    assert bars.regret is not None and bars.regret <= 0.03
    assert bars.ran_out == 0
    assert all(answer.regret >= 0 for answer in answers[verify] if answer.regret is not None)


def test_every_choice_was_measured(
    answers: dict[bool, list[judge.Answer]], evidence: list[judge.Evidence]
) -> None:
    """A planner that chooses what was never tried needs another recording, not another bar.

    On a CPU, that is, where there is time for everything. What minutes on a GPU did not suffice
    for, the report counts.
    """
    complete = {one.case for one in evidence if one.is_reckoned}
    accepted = [a for some in answers.values() for a in some if a.choice.fits]
    for answer in (a for a in accepted if a.case in complete):
        assert answer.outcome is not None, (answer.case, answer.choice.settings)
    assert any(a.outcome is not None for a in accepted)


def test_compiling_is_timed_where_nothing_was_compiled_before(rows: list[judge.Compared]) -> None:
    """Later sets find parts of what the first one left in the compiler's cache."""
    compiled = [
        (row.case, name)
        for row in rows
        if row.metric == "once"
        for name in row.settings
        if name.startswith("compile")
    ]
    assert len(compiled) == len(set(compiled)) > 0


def test_phases_add_up(evidence: list[judge.Evidence]) -> None:
    """What sets that were not run as a whole are judged by."""
    errors = [abs(error) for e in evidence for error in e.additivity()]
    assert len(errors) > 10 or not all(e.is_reckoned for e in evidence)
    assert errors
    assert sum(errors) / len(errors) < 0.06


def test_the_document_has_todays_tables(
    path: Path, lines: list[Line], evidence: list[judge.Evidence]
) -> None:
    """Otherwise: ``scripts/gpu_report.py --write``."""
    text = gpu_report.DOCUMENT.read_text(encoding="utf-8")
    tables = "\n".join(verdict(lines, evidence))
    assert gpu_report.placed(text, path.name, tables) == text


def test_sets_are_refused_with_reason(evidence: list[judge.Evidence]) -> None:
    """Of all sets on all limits: what fits is not refused for margins that nobody needs."""
    verdicts = [v for one in evidence for v in one.verdicts]
    assert not [v for v in verdicts if v.is_accepted and v.fits is False]
    fitting = [v for v in verdicts if v.fits]
    refused = [v for v in fitting if not v.is_accepted]
    assert len(refused) <= 0.05 * len(fitting), refused


# ---- the scripts themselves ---------------------------------------------------------------------


def test_kendall_tau() -> None:
    assert judge.tau([(10, 1), (20, 2), (30, 3)]) == 1
    assert judge.tau([(30, 1), (20, 2), (10, 3)]) == -1
    assert judge.tau([(2, 1), (1, 1.01)]) is None  # as good as equal
    crossed = [(1, 1), (2, 2), (9, 30), (3, 40), (2, 50)]
    assert judge.tau(crossed) == pytest.approx((6 - 4) / 10)


times = st.integers(1, 20).map(float)


@given(st.lists(st.tuples(times, times), max_size=8), st.randoms(use_true_random=False))
@examples(usually=30, thoroughly=1000)
def test_kendall_tau_knows_no_order(pairs: list[tuple[float, float]], random: Random) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    assert judge.tau(shuffled) == judge.tau(pairs)


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
    patch.setattr(bench, "TOOLS", () if where else bench.TOOLS[:3])
    patch.setattr(bench, "SWITCHES", bench.SWITCHES[:1])
    patch.setattr(bench, "RULES", bench.RULES[:1])
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
    peers = {p.peer: p for p in only.peers}
    for name, package in (("ComponentsManager", "diffusers"), ("mmgp", "mmgp")):
        assert peers[name].error, "it has no use for a CPU"
        is_installed = bool(version_of(package))
        assert ("not installed" in peers[name].error) != is_installed
    assert "Could not be run here" in "\n".join(verdict(lines, [only]))


def as_on_a_gpu(lines: list[Line], **changes: Any) -> judge.Evidence:
    """The same figures, as if a large card had given them."""
    gpu = load_machine("rtx-3080-10gb")
    machine = msgspec.structs.replace(
        gpu, source="measured", device=msgspec.structs.replace(gpu.device, **changes)
    )
    header, *rest = lines
    assert isinstance(header, Header)
    (only,) = judge.evidence_of([msgspec.structs.replace(header, machine=machine), *rest])
    return only


def test_a_peak_above_a_card_proves_something_on_a_cpu_only(tiny: Path) -> None:
    """On a GPU libraries take workspace because there is memory."""
    lines = list(read(tiny))
    (cpu,) = judge.evidence_of(lines)
    outcome = cpu.outcome(())
    assert outcome is not None
    small, large = outcome.peak_bytes - 1, outcome.peak_bytes
    assert (cpu.fits((), small), cpu.fits((), large)) == (False, True)
    gpu = as_on_a_gpu(lines)
    context = gpu.machine.context_bytes
    assert (gpu.fits((), small + context), gpu.fits((), large + context)) == (None, True)


def test_a_set_that_the_allocator_model_cannot_place_is_left_out(tiny: Path) -> None:
    lines = [_with_reserved(line) for line in read(tiny)]
    (full,) = (as_on_a_gpu(lines, free_bytes=0),)
    metrics = {row.metric for row in full.comparisons}
    assert "allocated" in metrics
    assert "reserved" not in metrics
    roomy = {row.metric for row in as_on_a_gpu(lines).comparisons}
    assert "reserved" in roomy
    assert "device" not in roomy, "nobody read it"


def _with_reserved(line: Line) -> Line:
    if not isinstance(line, SetRun):
        return line
    runs = tuple(
        tuple(msgspec.structs.replace(p, reserved_bytes=1 << 20, device_bytes=None) for p in run)
        for run in line.runs
    )
    return msgspec.structs.replace(line, runs=runs)


def test_the_planner_chooses_from_what_was_tried(tiny: Path) -> None:
    """Whatever the machine that was measured says of packages."""
    header, *rest = list(read(tiny))
    assert isinstance(header, Header)
    (line,) = (line for line in rest if isinstance(line, Prepared))
    tried = tuple(name for name in line.offered if name.startswith("vae"))
    assert len({*line.offered} - {*tried}) > 3
    lacking = dict.fromkeys((*OPTIONAL, "c++"), "")
    for software in ({}, lacking):
        machine = msgspec.structs.replace(header.machine, software=software)
        lines = [
            msgspec.structs.replace(header, machine=machine),
            msgspec.structs.replace(line, offered=(*tried, "of_yore")),
            *(other for other in rest if other is not line),
        ]
        (told,) = judge.evidence_of(lines)
        assert {str(s) for sets in told._everything for s in sets} == {*tried}
        assert told.answers(verify=True)
        new, gone = told.offers_changed()
        assert gone == ["of_yore"]
        assert "channels_last" in new
        assert any(name.startswith("compile") for name in new) == (software == {})
        assert "tried then and not today: `of_yore`" in "\n".join(verdict(lines, [told]))


def test_where_nobody_says_what_was_tried_everything_was(tiny: Path) -> None:
    """What the machine lacks is left out, where it says that."""
    header, *rest = list(read(tiny))
    assert isinstance(header, Header)
    untold = [
        msgspec.structs.replace(line, offered=()) if isinstance(line, Prepared) else line
        for line in rest
    ]
    found = []
    for software in ({}, {"c++": "", "tomesd": ""}):
        machine = msgspec.structs.replace(header.machine, software=software)
        (one,) = judge.evidence_of([msgspec.structs.replace(header, machine=machine), *untold])
        assert one.offers_changed() == ([], [])
        found.append({s.name for sets in one._everything for s in sets})
    assert found[0] - found[1] == {"compile", "tome"}


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_recording_that_has_just_begun(tiny: Path, kept: int) -> None:
    lines = list(read(tiny))[:kept]
    assert judge.evidence_of(lines) == []
    assert "No generation was measured" in "\n".join(verdict(lines, []))


def test_a_case_that_could_not_be_prepared_is_said(tiny: Path) -> None:
    lines = [*list(read(tiny))[:1], LeftOut("job", "sdxl", "ran out of host RAM")]
    assert "sdxl could not be prepared: ran out of host RAM" in "\n".join(verdict(lines, []))


def test_tables_are_written_between_their_markers(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tmp_path / "benchmarks.md"
    monkeypatch.setattr(gpu_report, "DOCUMENT", document)
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(tiny), "--write"])
    begin = f"<!-- written by scripts/gpu_report.py from {tiny.name} -->"
    for broken in ("before", f"before\n{begin}\nafter"):
        document.write_text(broken)
        with pytest.raises(SystemExit, match="has no place for tiny"):
            gpu_report.main()
        assert document.read_text() == broken
    document.write_text(f"before\n{begin}\nold\n{gpu_report.END}\nafter\n")
    for _ in range(2):
        assert gpu_report.main() == 0
        text = document.read_text()
        assert text.startswith(f"before\n{begin}\n\n")
        assert text.endswith(f"\n{gpu_report.END}\nafter\n")
        assert "### In short" in text
        assert "old" not in text.split("### In short")[0]


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
    text = "\n".join(verdict(lines, [only]))
    assert "out of memory" in text
    beside = text.partition("### Beside others")[2].splitlines()
    assert "ran out" in next(row for row in beside if row.startswith("| sd 64"))
    for one in (v for v in only.verdicts if v.settings == ()):
        assert (one.is_tried, one.fits) == (True, one.card_bytes == large)
    by_hand = [p for p in only.peer_outcomes() if p.peer == "plain diffusers"]
    assert [p.ran_out for p in by_hand] == [True, False]
    assert by_hand[1].peak_ratio == 1


def test_half_a_line_is_dropped(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl"
    path.write_bytes(tiny.read_bytes() + b'{"type":"set","job":"cut o')
    Recording(path)
    assert path.read_bytes() == tiny.read_bytes()


def test_phases_see_their_own_settings(evidence: list[judge.Evidence]) -> None:
    one = evidence[0]
    settings: Any = set_of(("vae_slicing", "layerwise_casting"))
    keys = keys_of(settings, one.machine, one.workload)
    assert keys["decode"][1] == {"vae_slicing", "layerwise_casting"}
    assert keys["denoise"][1] == {"layerwise_casting"}
