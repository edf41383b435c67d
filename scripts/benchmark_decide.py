#!/usr/bin/env python3
"""How long deciding takes: a plan for each model at each quality, and a thousand predictions.

CPU time of one thread, the best of several; traces are made first and kept in the cache folder.

    scripts/benchmark_decide.py [MODEL ...] [--machine rtx-3080-10gb]
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable

from autotune.decide.choose import QUALITIES, Limits, choose
from autotune.decide.decision import decide
from autotune.decide.predict import Predictor
from autotune.decide.search import Judge, execution_of
from autotune.optimizations import CATALOGUE
from autotune.optimizations.execution import Execution
from autotune.probe.machine import Machine
from autotune.probe.reference import load_machine
from autotune.workload.architecture import find_architecture
from autotune.workload.cache import workload_of
from autotune.workload.request import complete_request
from autotune.workload.workload import Workload

REPEATS = 7
PREDICTIONS = 1000


def milliseconds(run: Callable[[], object]) -> float:
    """CPU time of the quickest of several runs."""
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return 1e3 * min(times)


def coherent_executions(machine: Machine, workload: Workload) -> list[Execution]:
    """Of all coherent sets at any quality, in an order that is no order."""
    judge = Judge(Predictor(machine, workload), ())
    offered = [
        [None, *(o.setting(p) for p in o.worth_trying(machine, workload))]
        for o in CATALOGUE.values()
        if not o.unavailable(machine, workload)
    ]
    found = []
    for combination in itertools.product(*offered):
        settings = tuple(s for s in combination if s is not None)
        if judge.rule_in(settings) is None:
            found.append(execution_of(settings))
    random.Random(0).shuffle(found)
    return found


def report(machine: Machine, model: str) -> None:
    """One line per quality, and one for plain predictions."""
    architecture = find_architecture(model)
    workload = workload_of(architecture, complete_request(architecture, machine))
    for quality in QUALITIES:
        limits = Limits(quality=quality)
        decision = decide(Predictor(machine, workload), limits, CATALOGUE)
        took = milliseconds(lambda limits=limits: choose(machine, workload, limits))  # type: ignore[misc]
        print(
            f"{model:14} {quality:9} {took:6.1f} ms   {len(decision.options)} optimizations, "
            f"{len(decision.candidates)} sets left to choose from"
        )
    executions = coherent_executions(machine, workload)
    sets = list(itertools.islice(itertools.cycle(executions), PREDICTIONS))

    def predict() -> None:
        predictor = Predictor(machine, workload)
        for execution in sets:
            predictor.predict(execution)

    print(
        f"{model:14} {'predict':9} {milliseconds(predict):6.1f} ms   for {PREDICTIONS}, "
        f"of {len(executions)} coherent sets"
    )


def main() -> None:
    """Report for each model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["sd15", "sdxl", "flux-dev"])
    parser.add_argument("--machine", default="rtx-3080-10gb")
    arguments = parser.parse_args()
    machine = load_machine(arguments.machine)
    for model in arguments.models:
        report(machine, model)


if __name__ == "__main__":
    main()
