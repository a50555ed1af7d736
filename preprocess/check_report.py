"""What check_dataset found, and how it reads."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class SplitReport:
    """Findings about one split; `problems` are sentences, the rest goes to the JSON as it is."""

    expected: dict[str, int | None] = field(default_factory=dict)
    listed: dict[str, int] = field(default_factory=dict)
    found: dict[str, int] = field(default_factory=dict)
    missing_videos: list[str] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    distinct_captions: int = 0
    t2v_r1_ceiling: float = 100.0
    problems: list[str] = field(default_factory=list)


def describe(report: dict) -> list[str]:
    """The report as lines to read: one for a clean split, one more for each problem."""
    lines = []
    for name, split in report["splits"].items():
        title = f"{report['datatype']} {name}"
        if split["listed"]:
            counts = [_count(split, what) for what in ("videos", "captions")]
            state = f"{len(split['problems'])} problems" if split["problems"] else "ok"
            lines.append(f"{title}: {state}: {', '.join(counts)}{_duplicates(split)}{_shared(report, name)}")
        else:
            lines.append(f"{title}: cannot be loaded")
        lines += [f"  - {problem}" for problem in split["problems"]]
    return lines + [f"{report['datatype']} {leak}" for leak in report["leaks"]]


def _count(split: dict, what: str) -> str:
    expected = split["expected"][what]
    found = f"{split['found'][what]:,}"
    return f"{found} {what}" if expected is None else f"{found} of {expected:,} {what}"


def _duplicates(split: dict) -> str:
    if split["t2v_r1_ceiling"] == 100:
        return ""
    return (
        f"; {split['distinct_captions']:,} distinct captions, some on several videos: "
        f"t2v R@1 cannot exceed {split['t2v_r1_ceiling']:.2f} %"
    )


def _shared(report: dict, name: str) -> str:
    shared = [
        f"{both['captions']:,} captions also in {pair.split('/')[0]}"
        for pair, both in report["overlap"].items()
        if pair.endswith(f"/{name}") and both["captions"]
    ]
    return "; " + ", ".join(shared) if shared else ""
