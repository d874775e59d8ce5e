"""What a run amounts to, in a sentence: never more than its figures say."""

from dataclasses import dataclass
from typing import Literal

from ibau_jax.auditing.judgement import Suspect, Verdict
from ibau_jax.metrics import Metrics

Level = Literal["good", "doubtful", "bad"]
WORKED = 0.5  # an attack that succeeds less often than this did not work
DEFEATED = 0.1  # and one that succeeds less often than this works no longer
COSTLY = 0.03  # accuracy lost
OPEN = 0.1  # images that still follow a short cut


@dataclass(frozen=True)
class Conclusion:
    """The headline of a report.

    Attributes:
        level: how good the news is.
        headline: one sentence.
        reasons: what it rests on, and what it does not say.
    """

    level: Level
    headline: str
    reasons: tuple[str, ...]


def conclude(
    before: Metrics,
    after: Metrics,
    audits: dict[str, Verdict],
    relearned: dict[str, list[float]] | None = None,
    *,
    targeted: bool,
    residual: float | None = None,
    suspect: Suspect | None = None,
) -> Conclusion:
    """Weighs a run's figures.

    Args:
        before: of the model as it came, on images that did not unlearn.
        after: of the cleaned model, on the same images.
        audits: the verdicts, by `before` and `after`, where it was audited.
        relearned: the attack's success before and after each epoch of fine-tuning with triggered images, by model, the
            cleaned one first.
        targeted: whether the unlearning closed the very short cuts that an audit looks for.
        residual: the share of clean images that still follow the suspects' short cuts, where that was measured.
        suspect: the class suspected before, where it is still the one that the smallest trigger leads to.
    """
    level, headline = _of_attack(before.asr, after.asr) if before.asr is not None else _of_audits(audits)
    lost = before.acc - after.acc
    if lost > COSTLY and level != "bad":
        level, headline = "doubtful", f"{headline}, at the cost of {100 * lost:.1f} points of accuracy"
    if level == "good" and relearned and _returns(relearned):
        level, headline = "doubtful", f"{headline}, but it is relearned within an epoch"
    open_to = residual if residual and residual > OPEN else None
    if level == "good" and open_to and before.asr is None:
        level, headline = "doubtful", f"{headline}, but the short cut to the suspected class is still open"
    reasons = (
        *_figures(before, after),
        *_of_trust(audits, targeted),
        *_of_suspect(suspect),
        *_of_residual(open_to),
        *_of_relearning(relearned or {}),
    )
    return Conclusion(level, headline, reasons)


def _of_attack(before: float | None, after: float | None) -> tuple[Level, str]:
    assert before is not None
    if after is None or before < WORKED:
        return "doubtful", f"No success to report: the attack did not work before either ({100 * before:.1f} %)"
    if after <= DEFEATED:
        return "good", "The measured attack no longer works"
    return "bad", f"The measured attack still works on {100 * after:.1f} % of the images"


def _of_audits(audits: dict[str, Verdict]) -> tuple[Level, str]:
    if "after" not in audits:
        return "doubtful", "Nothing is known of success: no attack was named, and nothing was audited"
    if audits["after"] != "no backdoor found":
        return "bad", f"The audit of the cleaned model says: {audits['after']}"
    if audits.get("before") == "no backdoor found":
        return "doubtful", "No success to report: the audit found no backdoor before either"
    return "good", "The audit no longer finds a backdoor"


def _returns(relearned: dict[str, list[float]]) -> bool:
    """Whether the cleaned model follows the trigger after an epoch, where one that never had the backdoor does not."""
    cleaned, *others = (asr[1] for asr in relearned.values())
    return cleaned >= WORKED and (len(others) < 2 or others[-1] < WORKED)


def _of_relearning(relearned: dict[str, list[float]]) -> tuple[str, ...]:
    if not relearned:
        return ()
    each = ", ".join(f"{name} {100 * asr[1]:.1f} %" for name, asr in relearned.items())
    return (f"attack success after an epoch of fine-tuning with triggered images: {each}",)


def _of_residual(residual: float | None) -> tuple[str, ...]:
    if residual is None:
        return ()
    return (
        f"{100 * residual:.1f} % of clean images still follow the suspected short cut of the model as it came: "
        "more clean images or more rounds (--n-clean, --n-rounds) may close it",
    )


def _of_suspect(suspect: Suspect | None) -> tuple[str, ...]:
    if suspect is None:
        return ()
    return (
        f"class {suspect.label}, suspected before, is still the one that the smallest {suspect.view} leads to "
        f"({suspect.ratio:.1f} times smaller than the median class's): a remainder of the backdoor, or nothing, since "
        "in a clean model too there is a smallest one",
    )


def _figures(before: Metrics, after: Metrics) -> tuple[str, ...]:
    accuracy = f"accuracy {100 * before.acc:.1f} → {100 * after.acc:.1f} % on images that did not unlearn"
    if before.asr is None or after.asr is None:
        return (accuracy,)
    return (accuracy, f"attack success {100 * before.asr:.1f} → {100 * after.asr:.1f} %")


def _of_trust(audits: dict[str, Verdict], targeted: bool) -> tuple[str, ...]:
    said = tuple(f"audit {when} unlearning: {verdict}" for when, verdict in audits.items())
    if "after" in audits and targeted:
        said += ("no proof by itself: targeted unlearning closes the short cuts that an audit looks for",)
    return said
