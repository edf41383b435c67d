"""The supervisor of scripts/gpu_validation.py, with real workers; and what ends one in its job."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import gpu_validation  # noqa: E402
from validation import bench, device, measure, peers  # noqa: E402
from validation.bench import Bench, Job  # noqa: E402
from validation.measure import DeviceLostError, Subject  # noqa: E402
from validation.recording import Line, Recording, SetRun, Started, read  # noqa: E402

EMPTY = SetRun("case | set", "case", (), None)


def supervised(tmp_path: Path, worker: str, seconds: float = 60.0) -> tuple[int, int]:
    """Exit status, and how many workers there were: each writes a character."""
    recording, starts = tmp_path / "recording", tmp_path / "starts"
    head = f"""
        import sys, time
        from pathlib import Path
        recording, starts = Path({str(recording)!r}), Path({str(starts)!r})
        with starts.open("a") as file: file.write("x")
        count = len(starts.read_text())
        assert sys.argv[1] == "--until" and float(sys.argv[2]) > time.time()
    """
    command = [sys.executable, "-S", "-c", textwrap.dedent(head) + textwrap.dedent(worker)]
    status = gpu_validation.supervise(command, recording, time.time() + seconds)
    return status, len(starts.read_text())


@pytest.mark.parametrize("status", [0, 2, 130])
def test_a_worker_that_has_finished_is_the_last(tmp_path: Path, status: int) -> None:
    assert supervised(tmp_path, f"sys.exit({status})") == (status, 1)


def test_another_worker_goes_on(tmp_path: Path) -> None:
    worker = "recording.write_text('x' * count); sys.exit(0 if count == 4 else 3)"
    assert supervised(tmp_path, worker) == (0, 4)


def test_workers_that_record_nothing_are_not_repeated_for_ever(tmp_path: Path) -> None:
    assert supervised(tmp_path, "sys.exit(1)") == (1, gpu_validation.IDLE_WORKERS)


def test_a_worker_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_validation, "GRACE_S", 0.0)
    assert supervised(tmp_path, "time.sleep(60)", 0.7) == (0, 1)


def test_wheels_are_for_the_workers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "before")
    assert gpu_validation.install(tmp_path, str(tmp_path / "there")) == 2
    made = tmp_path / "carried_along-1.0-py3-none-any.whl"
    with zipfile.ZipFile(made, "w") as wheel:
        wheel.writestr("carried_along.py", "")
        folder = "carried_along-1.0.dist-info"
        wheel.writestr(
            f"{folder}/METADATA", "Metadata-Version: 2.1\nName: carried-along\nVersion: 1.0"
        )
        wheel.writestr(
            f"{folder}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        wheel.writestr(f"{folder}/RECORD", "")
    monkeypatch.setenv("PYTHONPATH", "before")
    assert gpu_validation.install(tmp_path, str(tmp_path / "there")) == 0
    code = "import carried_along, sys; print(carried_along.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()).parent == tmp_path / "there"


# ---- a job and its line -------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording.jsonl"


def attempted(path: Path, do: Callable[[], Line], seconds: float = 1.0) -> list[Line]:
    Bench(Recording(path), device.Cpu(), "wall", 60.0, lambda _: None)._attempt(
        Job(EMPTY, seconds, do)
    )
    return list(read(path))


def raising(error: BaseException) -> Callable[[], Line]:
    def do() -> Line:
        raise error

    return do


def last(path: Path) -> Any:
    return list(read(path))[-1]


def test_an_error_is_a_line_of_the_right_kind(path: Path) -> None:
    attempted(path, raising(ValueError("no")))
    assert last(path) == SetRun("case | set", "case", (), None, error="ValueError: no")


def test_a_lost_device_is_recorded_before_the_process_ends(path: Path) -> None:
    for error in (DeviceLostError("gone"), RuntimeError("CUDA error: misaligned address")):
        path.unlink(missing_ok=True)
        with pytest.raises(DeviceLostError):
            attempted(path, raising(error))
        assert str(error) in last(path).error


def test_what_is_interrupted_is_tried_again(path: Path) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            attempted(path, raising(KeyboardInterrupt()))
    assert not Recording(path).done
    assert attempted(path, lambda: EMPTY)[-1] == EMPTY


def test_a_process_dies_in_the_same_job_twice_at_most(path: Path) -> None:
    Recording(path).add(Started(EMPTY.job))
    assert attempted(path, lambda: EMPTY)[-1] == EMPTY
    path.unlink()
    for _ in range(2):
        Recording(path).add(Started(EMPTY.job))
    attempted(path, raising(AssertionError("it is not begun")))
    assert last(path).error == "the process died"


def test_a_process_that_hangs_ends_itself() -> None:
    code = f"""
        import sys, time
        sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT)!r}]
        import ast, contextlib, faulthandler
        from pathlib import Path
        tree = ast.parse(Path({bench.__file__!r}).read_text())
        body = [n for n in tree.body if getattr(n, "name", "") == "_watched"]
        Iterator = list
        exec(compile(ast.Module(body, []), "bench", "exec"))
        with _watched(0.2):
            time.sleep(60)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Timeout" in done.stderr


# ---- a pipeline that is not as it was -----------------------------------------------------------


def test_what_cannot_be_undone_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def undo() -> None:
        raise ValueError("stuck")

    monkeypatch.setattr(measure, "apply_plan", lambda *_: undo)
    monkeypatch.setattr(measure.msgspec.structs, "replace", lambda plan, **_: plan)
    monkeypatch.setattr(measure, "called_with", raising_call)
    subject = Subject(None, None, None, device.Cpu())  # type: ignore[arg-type]
    with pytest.raises(DeviceLostError, match="cannot be undone: ValueError: stuck"):
        subject.drawn_with((), 0, False)


def raising_call(*_: Any) -> Any:
    raise ValueError("it does not even run")


def test_scarce_memory_explains_more() -> None:
    small = device.Cpu()
    small.is_small = True
    error = RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate")
    assert small.ran_out(error) and not small.is_lost(error)
    assert device.Cpu().is_lost(error)
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        except torch.OutOfMemoryError as cause:
            with contextlib.suppress(KeyError):
                raise KeyError("between") from cause
            raise ValueError("outermost") from KeyError("another")
    except ValueError as error:
        assert not device.Cpu().ran_out(ValueError("alone"))
        assert error.__cause__ is not None
        error.__cause__.__cause__ = torch.OutOfMemoryError("CUDA out of memory")
        assert device.Cpu().ran_out(error)


def test_a_tool_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[bool] = []

    class Last:
        def release(self) -> None:
            released.append(True)
            raise RuntimeError("it was set up halfway")

    class Offload:
        last_offload_obj: Any = Last()

    monkeypatch.setitem(sys.modules, "mmgp.offload", Offload)  # type: ignore[arg-type]
    torch.set_default_device("meta")
    try:
        peers.Mmgp().leave()
        assert torch.zeros(1).device.type == "cpu"
    finally:
        torch.set_default_device(None)
    assert released and Offload.last_offload_obj is None


def test_a_part_that_is_wholly_elsewhere_is_fetched_when_it_runs() -> None:
    """One place for a whole component: accelerate hooks it only when it is told to."""

    class Pipe:
        def __init__(self) -> None:
            self.components = {"first": torch.nn.Linear(4, 4), "second": torch.nn.Linear(4, 4)}
            self.first, self.second = self.components.values()

    pipe = Pipe()
    peers.AccelerateRule().set_up(pipe, torch.device("cpu"), 100)
    assert pipe.first.weight.device.type == "cpu"
    assert pipe.second.weight.device.type == "meta"
    assert pipe.second(torch.ones(1, 4)).shape == (1, 4)
