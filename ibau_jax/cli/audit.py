"""The audit as a command: what it looks at, what a person sees of it, what JSON holds."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from flax import nnx
from jaxtyping import Float
from rich.table import Table

from ibau_jax.auditing import Audit, Auditor
from ibau_jax.auditing.judgement import aim_name, median_size
from ibau_jax.cli.console import escaped, percent, warn
from ibau_jax.cli.progress import Bar
from ibau_jax.config import AuditConfig
from ibau_jax.errors import IbauError
from ibau_jax.execution import DEFAULT_EXECUTION
from ibau_jax.metrics import ENOUGH
from ibau_jax.perturbations import size_text

if TYPE_CHECKING:
    from ibau_jax.cli.task import Task
    from ibau_jax.execution import Execution

When = Literal["before", "after"]


def make_auditor(config: AuditConfig, execution: "Execution" = DEFAULT_EXECUTION) -> Auditor:
    """An auditor; a search that is too short to be trusted is warned of."""
    enough = AuditConfig().steps
    if config.steps < enough:
        warn(f"{config.steps} steps are too few for a small trigger to show; --audit-steps {enough} or more")
    return Auditor(config, execution)


class AuditProgress:
    """A bar over the steps of a space."""

    def __init__(self, name: str) -> None:
        self.name, self.progress = name, Bar()

    def __enter__(self) -> "AuditProgress":
        self.progress.__enter__()
        self.task = self.progress.add_task(f"{self.name}: compiling", total=None)
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)

    def on_step(self, space: str, done: int, count: int) -> None:
        """Moves the bar."""
        self.progress.update(self.task, description=f"{self.name}: {space}", completed=done, total=count)


def audit_task(task: "Task", auditor: Auditor, when: When, model: nnx.Module) -> None:
    """Audits a model of a run, searched on the clean set, measured on the other images; a failure is only told of."""
    with AuditProgress(f"audit {when}") as bar:
        try:
            task.audits[when] = auditor(
                model, task.clean_set, task.split.evaluation, bar.on_step, task.audits.get("before")
            )
        except IbauError as error:  # the results are written all the same
            warn(f"{task.name} is not audited: {error}")


def audit_tables(audit: Audit, class_names: Sequence[str] = ()) -> Iterator[Table]:
    """A table a space: what was searched to the end, the smallest triggers first, and the median class's size."""
    for name, findings in audit.spaces.items():
        table = Table("to", title=f"Smallest {name}")
        for heading in (findings.space.unit, "stands out\n(times)", "anomaly\nindex"):
            table.add_column(heading, justify="right")
        table.add_column("held-out images\nthat follow", justify="right")
        for index, label in findings.smallest.ranking():
            table.add_row(
                escaped(aim_name(label, class_names)),
                size_text(findings.sizes[index]),
                f"{findings.ratios[index]:.2f}",
                f"{findings.anomaly_index[index]:.1f}",
                percent(findings.success[index]),
            )
        table.add_section()
        table.add_row("median", size_text(float(median_size(findings.sizes))), "", "", "")
        yield table


def verdict_lines(audit: Audit, class_names: Sequence[str] = ()) -> Iterator[str]:
    """The verdict, and a line of evidence for every suspect."""
    yield audit.verdict
    if min(audit.n_searched, audit.n_measured) < ENOUGH:
        yield (
            f"searched on {audit.n_searched} images and measured on {audit.n_measured}: on fewer than {ENOUGH} of each "
            "an audit is uncertain"
        )
    for suspect in audit.suspects:
        findings, index = audit.spaces[suspect.space], suspect.index
        yield (
            f"{aim_name(suspect.label, class_names)} (confidence {100 * suspect.confidence:.0f} %): "
            f"a {suspect.space} of {size_text(findings.sizes[index])} {findings.space.unit} leads there, "
            f"{suspect.ratio:.1f} times smaller than the median class's{_followed(findings.success[index])}"
        )
    if not audit.suspects:
        yield (
            "no class is reached by a much smaller trigger than the others, nor is any other class than an image's own "
            "(a trigger that is neither a small perturbation nor a patch, a warp or few waves, the same for all "
            "images, may not show)"
        )


def _followed(share: float) -> str:
    return "" if np.isnan(share) else f"; {percent(share)} of held-out images follow it"


def _where_measured(shares: Float[np.ndarray, " aims"]) -> list[float | None]:
    return [None if np.isnan(share) else float(share) for share in shares]


def audit_record(audit: Audit) -> dict[str, Any]:
    """The audit as JSON has it; lists hold a number a class, and last one for any other class than an image's own."""
    return {
        "verdict": audit.verdict,
        "suspects": [
            {"label": one.label, "view": one.space, "ratio": one.ratio, "confidence": one.confidence}
            for one in audit.suspects
        ],
        "views": {
            name: {
                "unit": findings.space.unit,
                "sizes": findings.sizes.tolist(),
                "finished": findings.smallest.finished.tolist(),
                "success": _where_measured(findings.success),
                "anomaly_index": findings.anomaly_index.tolist(),
                "earlier": None if findings.earlier is None else _where_measured(findings.earlier),
            }
            for name, findings in audit.spaces.items()
        },
        "n_searched": audit.n_searched,
        "n_measured": audit.n_measured,
        "seconds": audit.seconds,
    }
