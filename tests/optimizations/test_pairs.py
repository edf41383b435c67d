"""A part of the coherent pairs that ``scripts/check_pairs.py`` tries all of."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from autotune.testing.pairs import KINDS, Subject
from tests.thorough import THOROUGH, part

LIGHT = 29
"""Of so many pairs one comes and goes; and one of all is failed at every step, and drawn with."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    from diffusers import AutoencoderTiny

    folder = tmp_path_factory.mktemp("tiny")
    with torch.random.fork_rng():
        AutoencoderTiny(latent_channels=4).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", KINDS if THOROUGH else ("sd", "sd3", "wan"))
def test_pairs_come_fail_and_go(kind: str, tiny: str) -> None:
    subject = Subject(kind, tiny)
    pairs, start = subject.pairs(), 7 * list(KINDS).index(kind)
    assert len(pairs) > 12
    light = part(pairs, min(LIGHT, len(pairs)), start)
    full = part(pairs, len(pairs), 13 + start)
    problems = chain(
        *(subject.problems(pair, ("comes_and_goes",)) for pair in light),
        *(subject.problems(pair) for pair in full),
    )
    assert list(problems) == []


def test_what_is_left_behind_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check itself: a handler that forgets something, and one that wavers."""
    from autotune.optimizations import find

    subject = Subject("sd")
    pair = next(p for p in subject.pairs() if {s.name for s in p} == {"tome", "vae_slicing"})
    cls = type(find("vae_slicing"))
    original = cls.apply

    def forgetful(*arguments: object) -> object:
        original(*arguments)  # type: ignore[arg-type]
        return lambda: None

    monkeypatch.setattr(cls, "apply", forgetful)
    found = " ".join(subject.problems(pair, ("comes_and_goes", "interrupted")))
    assert "comes_and_goes: undone, it leaves" in found
    assert "use_slicing" in found
    assert "interrupted: a failure at call" in found
