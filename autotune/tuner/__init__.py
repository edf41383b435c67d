"""The way through, once: machine → ask → plan → applied pipeline → remembered run.

``here`` this machine, ``ask`` what is wanted, ``planning`` the decision, ``configure`` the pipeline
that runs it, ``remember`` what it taught. Everything public starts here; each step is one stage's
function.
"""

from __future__ import annotations

from autotune.tuner.ask import Ask, check_ask
from autotune.tuner.configure import (
    configure_pipeline,
    load_tuned,
    plan_loaded,
    require_fit,
    tuned,
)
from autotune.tuner.fleet import import_profile
from autotune.tuner.here import (
    REPLAY_S,
    Measured,
    Progress,
    changes_here,
    device_name,
    machine_here,
    remember_machine,
    replayed,
    timestamp,
    why_stale,
)
from autotune.tuner.planning import (
    Planned,
    completed,
    loadable,
    make_plan,
    plan_here,
    work_out,
)
from autotune.tuner.remember import is_far_off, remember_run, was_verified

__all__ = [
    "REPLAY_S",
    "Ask",
    "Measured",
    "Planned",
    "Progress",
    "changes_here",
    "check_ask",
    "completed",
    "configure_pipeline",
    "device_name",
    "import_profile",
    "is_far_off",
    "load_tuned",
    "loadable",
    "machine_here",
    "make_plan",
    "plan_here",
    "plan_loaded",
    "remember_machine",
    "remember_run",
    "replayed",
    "require_fit",
    "timestamp",
    "tuned",
    "was_verified",
    "why_stale",
    "work_out",
]
