"""A recording's verdict as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from autotune.units import format_bytes, format_seconds
from validation.judge import (
    Answer,
    Compared,
    Evidence,
    Outcome,
    PeerOutcome,
    Verdict,
    bars_of,
    mape,
)
from validation.recording import Header, KernelRun, LeftOut, Line

METRICS = ("allocated", "reserved", "device", "seconds")


def verdict(lines: Sequence[Line], evidence: Sequence[Evidence]) -> Iterator[str]:
    """Every table, with the sentences between them."""
    header = next((line for line in lines if isinstance(line, Header)), None)
    if header is not None:
        yield from _where(header, evidence)
    yield from (
        f"{line.case} could not be prepared: {line.error[:160]}\n"
        for line in lines
        if isinstance(line, LeftOut)
    )
    if not evidence:
        yield "No generation was measured.\n"
        return
    rows = [row for e in evidence for row in e.comparisons]
    without = [a for e in evidence for a in e.answers(verify=False)]
    verified = [a for e in evidence for a in e.answers(verify=True)]
    yield from _summary(rows, without, verified, evidence)
    yield from _errors(rows)
    yield from _worst(rows)
    yield from _ranking(evidence)
    yield from _choices(without, verified)
    yield from _regrets(without)
    yield from _verdicts([v for e in evidence for v in e.verdicts])
    yield from _peers([p for e in evidence for p in e.peer_outcomes()])
    yield from _kernels([line for line in lines if isinstance(line, KernelRun)])
    yield from _failures(evidence)


def _where(header: Header, evidence: Sequence[Evidence]) -> Iterator[str]:
    machine = header.machine
    loads = [load for e in evidence for load in e.loads]
    clock = "CPU time of one thread" if header.clock == "cpu" else "the clock on the wall"
    meanwhile = (
        f" Load average meanwhile: {min(loads):.1f} to {max(loads):.1f}, "
        f"median {statistics.median(loads):.1f}."
        if loads
        else ""
    )
    yield (
        f"{machine.device.name}, {machine.host.cores} cores, PyTorch "
        f"{machine.software.get('torch', '?')}, {header.threads} thread"
        f"{'s' if header.threads > 1 else ''}; timed by {clock}; {header.at}."
        f"{meanwhile}\n"
    )
    if machine.device.kind == "cpu":
        yield (
            "There is no card here: memory limits are reckoned with, by comparing the allocator's "
            "peak with them.\n"
        )
    for one in evidence:
        new, gone = one.offers_changed()
        if new or gone:
            yield (
                f"{one.case}: tried today and not when this was recorded: {_set(new)}; tried then "
                f"and not today: {_set(gone)}.\n"
            )


def _summary(
    rows: Sequence[Compared],
    without: Sequence[Answer],
    verified: Sequence[Answer],
    evidence: Sequence[Evidence],
) -> Iterator[str]:
    plain, checked = bars_of(rows, without), bars_of(rows, verified)
    spreads = [s for e in evidence for n in e.measured if (s := e.spread(n)) is not None]
    added = [abs(x) for e in evidence for x in e.additivity()]
    scored = [e.scored() for e in evidence]
    sets = sum(len(e.measured) for e in evidence)
    verdicts = [v for e in evidence for v in e.verdicts]
    fitting = [v for v in verdicts if v.fits]
    is_reckoned = all(e.is_reckoned for e in evidence)
    yield "### In short\n"
    yield _table(
        ("", "value", "bar"),
        (
            ("memory of a generation, allocated, MAPE", _percent(plain.memory), "4 %"),
            ("the same of each phase", _percent(plain.phases), "4 %"),
            ("seconds of a generation, MAPE", _percent(plain.seconds), "10 %"),
            ("mean regret, not verified", _percent(plain.regret), "3 %"),
            ("mean regret, verified", _percent(checked.regret), "3 %"),
            ("said to fit and ran out, not verified", str(plain.ran_out), "0"),
            ("said to fit and ran out, verified", str(checked.ran_out), "0"),
            (
                "nothing said to fit, though something does",
                str(sum(a.refused_in_vain for a in without)),
                "",
            ),
            (
                "sets refused that fit, of those that fit, over all limits",
                f"{sum(not v.is_accepted for v in fitting)} of {len(fitting)}",
                "",
            ),
            ("questions asked", str(len(without)), ""),
            (
                "answers said to fit, and of these run on a card of that size",
                f"{sum(a.choice.fits for a in without)}, "
                f"{sum(a.choice.fits and a.is_tried for a in without)}",
                "",
            ),
            (
                "answers whose set was not measured",
                str(sum(a.choice.fits and a.outcome is None for a in without)),
                "0" if is_reckoned else "",
            ),
            ("sets measured as a whole", str(sets), ""),
            (
                "coherent sets scored, of the bounded lists",
                f"{sum(s for s, _ in scored)} of {sum(n for _, n in scored)}",
                "",
            ),
            (
                "two generations with one set differ by, median",
                _percent(statistics.median(spreads) if spreads else None),
                "",
            ),
            (
                "phases of other sets add up to a set within, mean",
                _percent(statistics.fmean(added) if added else None),
                "",
            ),
        ),
    )


def _errors(rows: Sequence[Compared]) -> Iterator[str]:
    yield "### Predicted against measured\n"
    lines = []
    for metric in METRICS:
        for phase in dict.fromkeys(r.phase for r in rows):
            some = [r for r in rows if r.metric == metric and r.phase == phase]
            if not some:
                continue
            worst = max(some, key=lambda r: abs(r.error))
            bias = statistics.fmean(r.error for r in some)
            lines.append(
                (
                    metric,
                    "a generation" if phase == "all" else phase,
                    str(len(some)),
                    _percent(mape(some)),
                    f"{bias:+.1%}",
                    f"{worst.error:+.1%}",
                    f"{worst.case}, {_set(worst.settings)}",
                )
            )
    yield _table(("metric", "of", "figures", "mean error", "bias", "worst", "which"), lines)
    once = [r for r in rows if r.metric == "once"]
    if once:
        yield f"What compiling takes, predicted: {_percent(mape(once))} off on average.\n"


def _worst(rows: Sequence[Compared]) -> Iterator[str]:
    total = [r for r in rows if r.phase == "all" and r.metric in ("seconds", "allocated")]
    worst = sorted(total, key=lambda r: -abs(r.error))[:6]
    yield "The worst of a generation:\n"
    yield _table(
        ("case", "set", "metric", "predicted", "measured", "error"),
        (
            (
                r.case,
                _set(r.settings),
                r.metric,
                _quantity(r.metric, r.predicted),
                _quantity(r.metric, r.measured),
                f"{r.error:+.1%}",
            )
            for r in worst
        ),
    )


def _ranking(evidence: Sequence[Evidence]) -> Iterator[str]:
    yield "### Ranking\n"
    yield _table(
        ("case", "sets", "time error", "memory error", "Kendall's τ", "one set's runs differ by"),
        (_case_line(e) for e in evidence),
    )


def _case_line(evidence: Evidence) -> tuple[str, ...]:
    rows = [r for r in evidence.comparisons if r.phase == "all"]
    spreads = [s for n in evidence.measured if (s := evidence.spread(n)) is not None]
    found = evidence.kendall_tau()
    return (
        evidence.case,
        str(len(evidence.measured)),
        _percent(mape(r for r in rows if r.metric == "seconds")),
        _percent(mape(r for r in rows if r.metric == "allocated")),
        "" if found is None else f"{found:.2f}",
        _percent(statistics.median(spreads) if spreads else None),
    )


def _choices(without: Sequence[Answer], verified: Sequence[Answer]) -> Iterator[str]:
    yield "### Choices\n"
    lines = []
    for case in dict.fromkeys(a.case for a in without):
        for label, answers in (("no", without), ("yes", verified)):
            some = [a for a in answers if a.case == case]
            regrets = [a.regret for a in some if a.regret is not None]
            rooms = [r for a in some if (r := a.unused) is not None]
            lines.append(
                (
                    case,
                    label,
                    str(len(some)),
                    _percent(statistics.fmean(regrets) if regrets else None),
                    _percent(max(regrets, default=None)),
                    str(sum(a.ran_out for a in some)),
                    str(sum(a.refused_in_vain for a in some)),
                    str(sum(not a.choice.fits and a.best is None for a in some)),
                    _percent(statistics.fmean(rooms) if rooms else None),
                    str(max((a.tries for a in some), default=0)) if label == "yes" else "",
                )
            )
    yield _table(
        (
            "case",
            "verified",
            "questions",
            "mean regret",
            "worst",
            "ran out",
            "refused in vain",
            "rightly refused",
            "card left unused",
            "runs to verify, most",
        ),
        lines,
    )


def _regrets(answers: Sequence[Answer]) -> Iterator[str]:
    bad = sorted((a for a in answers if a.regret), key=lambda a: -(a.regret or 0.0))[:6]
    if bad:
        yield "The largest regrets, not verified:\n"
        yield _table(
            ("case", "limit", "quality", "images", "chosen", "best that fits", "regret"),
            (
                (
                    a.case,
                    format_bytes(a.question.card_bytes),
                    a.question.quality,
                    str(a.question.images),
                    _set(map(str, a.choice.settings)),
                    _set(a.best[0] if a.best else ()),
                    _percent(a.regret),
                )
                for a in bad
            ),
        )
    wrong = [a for a in answers if a.ran_out or a.refused_in_vain]
    if wrong:
        yield "Said to fit and did not, or the other way round:\n"
        yield _table(
            ("case", "limit", "quality", "chosen", "predicted need", "measured peak", "what"),
            (
                (
                    a.case,
                    format_bytes(a.question.card_bytes),
                    a.question.quality,
                    _set(map(str, a.choice.settings)),
                    format_bytes(a.choice.needed_bytes),
                    format_bytes(a.peak_bytes) if a.peak_bytes else "",
                    "ran out" if a.ran_out else f"fits: {_set(a.best[0] if a.best else ())}",
                )
                for a in wrong
            ),
        )


def _verdicts(rows: Sequence[Verdict]) -> Iterator[str]:
    yield "### Every set on every limit\n"
    yield (
        "Not only what was chosen: each set whose outcome is known, on each limit. *Short* is how "
        "much more than the limit a set was said to need that was refused and fits, margin "
        "included, and *spare* what it really leaves of it.\n"
    )
    lines = []
    for case in dict.fromkeys(v.case for v in rows):
        some = [v for v in rows if v.case == case]
        refused = [v for v in some if not v.is_accepted]
        vain = [v for v in refused if v.fits]
        spare = [v.spare for v in vain if v.spare is not None]
        lines.append(
            (
                case,
                str(len(some)),
                str(sum(v.is_tried for v in some)),
                str(sum(v.is_accepted and v.fits is True for v in some)),
                str(sum(v.is_accepted and v.fits is False for v in some)),
                str(len(vain)),
                str(sum(v.fits is False for v in refused)),
                str(sum(v.fits is None for v in some)),
                _percent(statistics.median(v.short for v in vain) if vain else None),
                _percent(max((v.short for v in vain), default=None)),
                _percent(statistics.median(spare) if spare else None),
            )
        )
    yield _table(
        (
            "case",
            "sets × limits",
            "run there",
            "accepted, fit",
            "accepted, ran out",
            "refused, fit",
            "refused, run out",
            "not known",
            "short, median",
            "short, most",
            "spare, median",
        ),
        lines,
    )


def _peers(rows: Sequence[PeerOutcome]) -> Iterator[str]:
    yield "### Beside others\n"
    yield (
        "On the same cases and limits, ours at exact quality for one image, not verified. "
        "*Time* and *peak* are theirs over ours where both ran, as geometric means.\n"
    )
    peers = _by_peer(rows)
    if any(" = " in name for name in peers):
        yield (
            "Names in one row came to the same everywhere: what else they would try cannot be "
            "tried here.\n"
        )
    lines = []
    for name, some in peers.items():
        ran = [r for r in some if r.outcome is not None and not r.ran_out]
        ratios = [r.ratio for r in ran if r.ratio is not None]
        peaks = [r.peak_ratio for r in ran if r.peak_ratio is not None]
        lines.append(
            (
                name,
                str(len(some)),
                str(len(ran)),
                str(sum(r.ran_out for r in some)),
                f"{statistics.geometric_mean(ratios):.2f}×" if ratios else "",
                f"{max(ratios):.2f}×" if ratios else "",
                f"{statistics.geometric_mean(peaks):.2f}×" if peaks else "",
                f"{max(peaks):.2f}×" if peaks else "",
                str(sum(r.ours is not None and r not in ran for r in some)),
                str(sum(r.ours is None and r in ran for r in some)),
            )
        )
    yield _table(
        (
            "peer",
            "cases × limits",
            "ran",
            "ran out",
            "time",
            "time, worst",
            "peak",
            "peak, worst",
            "only ours ran",
            "only theirs ran",
        ),
        lines,
    )
    yield from _peer_cells(peers)
    reasons = {(r.peer, r.what) for r in rows if r.outcome is None and r.what and not r.ran_out}
    if reasons:
        yield "Could not be run here, or was not:\n"
        yield "".join(f"- {peer}: {what}\n" for peer, what in sorted(reasons))


def _by_peer(rows: Sequence[PeerOutcome]) -> dict[str, list[PeerOutcome]]:
    """Those that came to anything; what came to the same everywhere has one name."""
    alike: dict[object, list[str]] = {}
    for name in dict.fromkeys(r.peer for r in rows):
        some = [r for r in rows if r.peer == name]
        if any(r.outcome or r.ran_out for r in some):
            alike.setdefault(tuple(r._replace(peer="") for r in some), []).append(name)
    return {" = ".join(names): [r for r in rows if r.peer == names[0]] for names in alike.values()}


def _peer_cells(peers: dict[str, list[PeerOutcome]]) -> Iterator[str]:
    """Each on each limit."""
    found = {(r.case, r.card_bytes, n): r for n, some in peers.items() for r in some}
    lines = []
    for case, card in dict.fromkeys((case, card) for case, card, _ in found):
        cells = [found.get((case, card, name)) for name in peers]
        ours = next(r.ours for r in cells if r is not None)
        told = ["" if r is None else _ran(r.outcome, r.ran_out) for r in cells]
        lines.append((case, format_bytes(card), _ran(ours, False), *told))
    yield _table(("case", "limit", "ours", *peers), lines)


def _ran(outcome: Outcome | None, ran_out: bool) -> str:
    if ran_out:
        return "ran out"
    if outcome is None:
        return ""
    return f"{format_seconds(outcome.seconds)}, {format_bytes(outcome.peak_bytes)}"


def _kernels(runs: Sequence[KernelRun]) -> Iterator[str]:
    rates = [(run.case, rate) for run in runs for rate in run.rates]
    if not rates:
        return
    names = list(dict.fromkeys(r.implementation for _, r in rates))
    yield "### Attention at the workloads' shapes\n"
    yield "Times relative to `sdpa`, PyTorch's own choice; below 1 is faster.\n"
    lines = []
    for run in runs:
        by_name = {r.implementation: r for r in run.rates}
        base = by_name.get("sdpa")
        if base is None or base.flops_per_s is None:
            continue
        shape = f"{base.batch}×{base.heads}×{base.q_tokens}×{base.kv_tokens}×{base.head_dim}"
        cells = []
        for name in names:
            rate = by_name.get(name)
            known = rate is not None and rate.flops_per_s is not None
            cells.append(
                f"{base.flops_per_s.value / rate.flops_per_s.value:.2f}"  # type: ignore[union-attr]
                if known
                else ""
            )
        lines.append((run.case, shape, *cells))
    yield _table(("case", "batch×heads×queries×keys×size", *names), lines)
    errors = dict.fromkeys(f"{r.implementation}: {r.error}" for _, r in rates if r.error)
    yield "".join(f"- {error}\n" for error in errors)


def _failures(evidence: Sequence[Evidence]) -> Iterator[str]:
    failed = [(e.case, run) for e in evidence for run in e.failed]
    if not failed:
        return
    yield "### What failed\n"
    yield _table(
        ("case", "set", "card", "error"),
        (
            (
                case,
                _set(run.settings),
                format_bytes(run.card_bytes) if run.card_bytes else "",
                run.error[:160].replace("|", "/"),
            )
            for case, run in failed
        ),
    )


def _set(names: Iterable[str]) -> str:
    return ", ".join(f"`{n}`" for n in names) or "nothing"


def _quantity(metric: str, value: float) -> str:
    return format_seconds(value) if metric == "seconds" else format_bytes(int(value))


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _table(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    head = list(head)
    body = [head, ["---"] * len(head), *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in body)
