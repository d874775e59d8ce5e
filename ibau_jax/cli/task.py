"""One run from its checked input to its written results."""

import functools
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from ibau_jax.auditing import Audit, Suspect, lingering
from ibau_jax.cli import console
from ibau_jax.cli.audit import audit_record
from ibau_jax.cli.device import device_name, is_first_process
from ibau_jax.cli.job import Subject
from ibau_jax.cli.options import ModelOptions
from ibau_jax.cli.progress import RoundProgress
from ibau_jax.cli.relearn import relearning_record
from ibau_jax.cli.run_folder import round_record, suspects_record, versions, write_results
from ibau_jax.cli.stored_run import StoredRun
from ibau_jax.config import UnlearnConfig
from ibau_jax.data import Dataset, Split
from ibau_jax.defences import Defence, TuneConfig
from ibau_jax.errors import ConfigError, DataError, NotFiniteError
from ibau_jax.execution import Execution
from ibau_jax.metrics import Metrics, evaluate, predict
from ibau_jax.models.normalized import normalized_model
from ibau_jax.relearning import Relearned
from ibau_jax.report import Conclusion, conclude, gather, render
from ibau_jax.triggers import Attack
from ibau_jax.unlearning import Result, State

# Images that rounds before the last and epochs of relearning are evaluated on; 95 % intervals are ±3 points at most.
SAMPLED = 1000


@dataclass(eq=False)
class Task:
    """Everything a run needs, checked, and what it has found so far.

    Attributes:
        name: what the screen calls it.
        options: how the checkpoint was asked for.
        settings: what result.json's `config` holds, and what tells an interrupted run from another.
        state: where it stands.
        records: the rounds as result.json has them; figures of rounds before the last are of a sample.
        before: the figures of the model as it came; measured when the first round has ended.
        result: how it ended.
        audits: of the model as it came (`before`) and of the cleaned one (`after`), where they were asked for.
        reference: a model that never had the backdoor, where one was named.
        relearned: what fine-tuning with triggered images did to which model, where that was asked for.
        defence, tuning: another method than I-BAU, and its constants.
        finished: what result.json holds, where an earlier process has finished this run.
    """

    name: str
    options: ModelOptions
    subject: Subject
    split: Split
    attack: Attack | None
    config: UnlearnConfig
    folder: Path
    execution: Execution
    settings: dict[str, Any] = field(repr=False)
    state: State
    records: list[dict[str, Any]] = field(default_factory=list)
    before: Metrics | None = None
    result: Result | None = None
    audits: dict[str, Audit] = field(default_factory=dict)
    reference: nnx.Module | None = None
    relearned: dict[str, Relearned] = field(default_factory=dict)
    defence: Defence | None = None
    tuning: TuneConfig | None = None
    finished: dict[str, Any] | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        """Of the model."""
        return self.subject.checkpoint.num_classes

    @property
    def model(self) -> nnx.Module:
        """The model as it came."""
        return self.subject.model

    @property
    def clean_set(self) -> Dataset:
        """The images that unlearn."""
        return self.split.clean_set

    @property
    def status(self) -> str | None:
        """How it ended; None where it has not."""
        if self.finished is not None:
            return str(self.finished["status"])
        return self.result.status if self.result else None

    @property
    def progress(self) -> StoredRun:
        """Where an interrupted run waits."""
        return StoredRun(self.folder, self.settings)

    def evaluate(self, model: nnx.Module) -> Metrics:
        """Evaluates on all images that do not unlearn."""
        return evaluate(model, self.split.evaluation, self.attack)

    @functools.cached_property
    def sampled(self) -> tuple[Dataset, Attack | None]:
        """What evaluates where all images would take too long: some of them, and the attack on as many."""
        seed, attack = self.config.seed, self.attack
        if attack and attack.triggered:
            attack = replace(attack, triggered=attack.triggered.sample(SAMPLED, seed))
        return self.split.evaluation.sample(SAMPLED, seed), attack

    def as_written(self, model: nnx.Module) -> nnx.Module:
        """A model with the weights that its file would hold: those in the file's dtypes are rounded.

        Raises:
            CheckpointError: one is too large for its dtype.
        """
        written = self.subject.checkpoint.with_weights(model).network()
        return normalized_model(written, self.subject.normalization)

    def end(self, result: Result) -> None:
        """Takes the result; from here on its model is the one that the file will hold.

        Raises:
            NotFiniteError: after the last good round of a run that diverged, logits are not finite for some image that
                is not of the sample.
        """
        self.result = replace(result, model=self.as_written(result.model))
        last = result.rounds[-1].number if result.rounds else None
        if last not in (None, self.config.n_rounds) and is_first_process():  # it was evaluated on a sample
            try:
                self.records[len(result.rounds) - 1] |= asdict(self.evaluate(self.result.model))
            except NotFiniteError as error:
                raise NotFiniteError(f"after round {len(result.rounds)} {error}. Try a smaller --lr") from error

    def take_in(self, state: State, bar: RoundProgress) -> None:
        """Evaluates, stores and shows a round. The first process does so; the others go on and wait for it.

        The figures are those of the weights as a file would hold them; the unlearning goes on from its own.
        """
        if not is_first_process():
            self.state = state
            return
        if self.before is None:
            try:
                self.before = self.evaluate(self.model)
            except NotFiniteError as error:  # no round is to blame
                raise DataError(f"of the model as it came {error}") from error
            bar.on_before(self.name, self.before, state.outliers)
        try:
            written, is_last = self.as_written(state.model), state.rounds[-1].number == self.config.n_rounds
            metrics = self.evaluate(written) if is_last else evaluate(written, *self.sampled)
        except NotFiniteError as error:
            if jax.process_count() > 1:  # which would go on with a round that this one dropped
                raise ConfigError(f"after round {state.rounds[-1].number} {error}. Try a smaller --lr") from error
            raise
        self.state = state
        self.records.append(round_record(state.rounds[-1], metrics))
        if self.defence is None:  # others can't be resumed
            self.progress.store_state(state, {"before": asdict(self.before), "rounds": self.records})
        bar.on_round(self.name, state.rounds[-1], metrics)

    def finish(self, begin: float) -> Path | None:
        """Writes the results.

        Args:
            begin: when the process began its work, by `time.perf_counter`.

        Returns:
            The cleaned model's file; None where another process writes it.

        Raises:
            ConfigError: no round was good.
            NotFiniteError: none was, since the original model's logits are not finite for an image.
        """
        if self.result is None or not self.result.rounds:
            predict(self.model, self.clean_set)
            raise ConfigError(
                "a loss or logit became NaN or infinite in the first round; nothing to keep. Try a smaller --inner-lr "
                "or --lr"
            )
        if not is_first_process():
            return None
        content = self.content()
        content["seconds"]["total"] = time.perf_counter() - begin
        cleaned = self.subject.checkpoint.with_weights(self.result.model)
        model_file = write_results(self.folder, content, cleaned, self.result.rounds, self.report)
        if self.result.status == "diverged":
            console.warn(
                f"{self.name} stopped: a loss or logit became NaN or infinite in round {len(self.result.rounds) + 1}; "
                f"the results are those of round {len(self.result.rounds)}"
            )
        return model_file

    def report(self, content: dict[str, Any]) -> str:
        """report.html, of what result.json holds."""
        assert self.result is not None
        evidence = gather(
            self.model,
            self.result.model,
            self.split.evaluation,
            self.num_classes,
            self.result.rounds,
            self.config,
            self.attack,
        )
        return render(content, self.conclusion(), evidence, self.audits)

    def conclusion(self) -> Conclusion:
        """What the run amounts to."""
        assert self.before is not None
        assert self.result is not None
        verdicts = {when: audit.verdict for when, audit in self.audits.items()}
        relearned = {name: found.figures for name, found in self.relearned.items()}
        still = self.result.rounds[-1].outliers
        return conclude(
            self.before,
            self.after(),
            verdicts,
            relearned,
            targeted=bool(self.config.spaces),
            num_classes=self.num_classes,
            still=still[0] if still else None,
            suspect=self._lingering(),
        )

    def _lingering(self) -> Suspect | None:
        before, after = self.audits.get("before"), self.audits.get("after")
        label = before.suspects[0].label if before and before.suspects else None
        if label is None or not after:
            return None
        return lingering(label, {name: found.sizes for name, found in after.spaces.items()})

    def after(self) -> Metrics:
        """The figures after the last good round."""
        assert self.result is not None
        return Metrics.of(self.records[len(self.result.rounds) - 1])

    def content(self) -> dict[str, Any]:
        """What result.json holds. Seconds of resumed rounds count, those of an interrupted round do not."""
        assert self.result is not None
        assert self.before is not None
        return {
            "checkpoint": str(self.subject.path),
            "model": self.subject.checkpoint.architecture.name,
            "evidence": [one.record() for one in self.subject.evidence],
            "num_classes": self.num_classes,
            "class_names": self.split.evaluation.class_names or None,
            "status": self.result.status,
            "config": self.settings,
            "execution": asdict(self.execution),
            "device": device_name(),
            "versions": versions(),
            "before": asdict(self.before),
            "after": asdict(self.after()),
            "intervals": {"before": self.before.intervals(), "after": self.after().intervals()},
            "audit": {when: audit_record(audit) for when, audit in self.audits.items()} or None,
            "conclusion": asdict(self.conclusion()),
            "suspects": suspects_record(self.state.outliers),
            "kept_round": len(self.result.rounds),
            "rounds": self.records,
            "relearning": relearning_record(self.relearned) if self.relearned else None,
            "seconds": {
                "compile": self.result.compile_seconds,
                "unlearn": sum(record["seconds"] for record in self.records),
            },
        }

    def summary(self, error: str | None) -> dict[str, Any]:
        """The run as summary.json has it."""
        record = {
            "run": self.name,
            "checkpoint": str(self.subject.path),
            "seed": self.config.seed,
            "lr": self.config.lr,
        }
        if self.finished is not None:
            audits = {when: audit["verdict"] for when, audit in (self.finished["audit"] or {}).items()}
            figures = {name: self.finished[name] for name in ("status", "before", "after")}
            return {**record, "folder": str(self.folder), **({"verdicts": audits} if audits else {}), **figures}
        if error or self.result is None or self.before is None:
            return {**record, "status": "failed", "before": None, "after": None, "error": error or "no result"}
        status = {"status": self.result.status, "folder": str(self.folder)}
        verdicts = {"verdicts": {when: audit.verdict for when, audit in self.audits.items()}} if self.audits else {}
        return {**record, **status, **verdicts, "before": asdict(self.before), "after": asdict(self.after())}

    @property
    def method(self) -> str:
        """How it unlearns, for the screen."""
        if self.defence and self.tuning:
            return f"{self.defence.name} ({self.defence.paper}), {self.tuning.epochs} epochs, on {device_name()}"
        preset, rounds = self.settings["preset"], self.config.n_rounds
        return f"I-BAU, preset {preset}, {rounds} round{'s' * (rounds > 1)}, K = {self.config.K}, on {device_name()}"

    def description(self) -> dict[str, Any]:
        """What is about to be done, for the screen."""
        split, norm = self.split, self.subject.normalization
        left_out = f" ({split.duplicates} left out: they are in the clean set)" if split.duplicates else ""
        network = self.subject.evidence[0]
        fewer = f"; rounds before the last on {SAMPLED} of them" if len(split.evaluation) > SAMPLED else ""
        return {
            "checkpoint": f"{self.subject.path} ({self.subject.checkpoint.summary()})",
            "network": f"{network}{': its BatchNorm statistics on clean images' if len(network.layers) else ''}",
            "normalisation": f"mean {norm.mean}, std {norm.std}" if norm else "none",
            "clean set": f"{len(split.clean_set)} images of {split.clean_set.name}",
            "evaluation": f"{len(split.evaluation)} other images of {split.evaluation.name}{left_out}{fewer}",
            "attack": self.attack.description if self.attack else "none named, so only ACC is measured",
            "method": self.method,
        }
