"""The page: figures and pictures put into `report.html.j2`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ibau_jax.auditing import Audit
from ibau_jax.auditing.judgement import aim_name
from ibau_jax.data.classes import with_name
from ibau_jax.perturbations import Pixel, Shape, size_text
from ibau_jax.report.conclusion import Conclusion
from ibau_jax.report.evidence import Evidence
from ibau_jax.report.figures import curves, picture

SHOWN = 12  # classes; the others are folded away
MAX_TEXT, KEPT = 2000, "\n\N{NO-BREAK SPACE}"  # characters of a text from a file; what is not printable, and shown
MEASURES = {"acc": "ACC", "asr": "ASR", "asr_all": "ASR, all images", "ra": "RA"}


def render(result: Mapping[str, Any], conclusion: Conclusion, evidence: Evidence, audits: Mapping[str, Audit]) -> str:
    """The report as HTML.

    Args:
        result: what result.json holds.
        conclusion: the headline.
        evidence: what both models say of images.
        audits: by `before` and `after`, where there are any.
    """
    class_names = result.get("class_names") or ()
    environment = Environment(
        loader=PackageLoader("ibau_jax.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.finalize = _shown
    environment.filters |= {
        "percent": _percent,
        "value": _value,
        "interval": _interval,
        "size": size_text,
        "aim": partial(aim_name, class_names=class_names),
    }
    return environment.get_template("report.html.j2").render(
        result=result,
        conclusion=conclusion,
        measures=[
            (label, result["before"][name], result["after"][name], result["intervals"]["after"].get(name))
            for name, label in MEASURES.items()
        ],
        curves=curves(result["before"], result["rounds"]),
        unlearned=[_unlearned(entry) for entry in evidence.unlearned],
        spaces=_spaces(audits, class_names),
        examples=[_example(entry) for entry in evidence.examples],
        classes=_classes(result, evidence),
        shown=SHOWN,
        change=lambda before, after: f"{100 * (after - before):+.1f}".replace("-", "\N{MINUS SIGN}"),
    )


def _percent(share: float | None) -> str:
    return "–" if share is None or np.isnan(share) else f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def _interval(interval: tuple[float, float] | None) -> str:
    return "–" if interval is None else f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}\N{NO-BREAK SPACE}%"


def _shown(value: Any) -> Any:
    """A text from a file, cut short, and without characters that only control how the others are shown."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    printable = "".join(character if character.isprintable() or character in KEPT else "?" for character in value)
    return printable if len(printable) <= MAX_TEXT else f"{printable[:MAX_TEXT]}..."


def _value(value: Any) -> str:
    if value is None or value in ((), []):
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(_value(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unlearned(entry: Any) -> dict[str, Any]:
    label = int(np.argmax(entry.share.before))
    return {
        "round": entry.round,
        "picture": picture(Pixel().to_image(entry.perturbation, entry.perturbation.shape)),
        "norm": float(np.linalg.norm(entry.perturbation)),
        "label": label,
        "before": float(entry.share.before[label]),
        "after": float(entry.share.after[label]),
    }


def _spaces(audits: Mapping[str, Audit], class_names: Sequence[str]) -> list[dict[str, Any]]:
    """A table a space, of what was searched to the end before, as it stood out."""
    if "before" not in audits:
        return []
    tables, shape = [], audits["before"].shape
    for name, findings in audits["before"].spaces.items():
        after = audits["after"].spaces[name] if "after" in audits else None
        rows = [
            {
                "aim": aim_name(label, class_names),
                "ratio": float(findings.ratios[index]),
                "before": _finding(findings, index, shape),
                "after": _finding(after, index, shape) if after else None,
                "same": None if after is None or after.earlier is None else float(after.earlier[index]),
            }
            for index, label in findings.smallest.ranking()
        ]
        tables.append({"name": name, "unit": findings.space.unit, "rows": rows})
    return tables


def _finding(findings: Any, index: int, shape: Shape) -> dict[str, Any]:
    trigger = jax.tree.map(lambda array: array[index], findings.triggers)
    return {
        "picture": picture(findings.space.to_image(trigger, shape)),
        "size": float(findings.sizes[index]),
        "success": float(findings.success[index]),
    }


def _example(entry: Any) -> dict[str, Any]:
    pictures = {"clean": picture(entry.clean), "triggered": picture(entry.triggered)}
    return {**vars(entry), **pictures}


def _classes(result: Mapping[str, Any], evidence: Evidence) -> list[dict[str, Any]]:
    unknown = (None,) * len(evidence.counts)
    before, after = (result[when].get("class_acc") or unknown for when in ("before", "after"))
    names = result.get("class_names") or ()
    return [
        {"label": with_name(label, names), "count": int(count), "before": before[label], "after": after[label]}
        for label, count in enumerate(evidence.counts)
    ]
