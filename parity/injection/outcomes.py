"""What the self-test found: an outcome for each mistake and place that it was put into, and the table of them."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from parity.mistakes.catalogue import CATALOGUE

# Today's check: this many tokens, and this cosine of the last one's logits.
COSINE_TOKENS, COSINE = 8, 0.99


class Outcome(NamedTuple):
    fault: str
    layer: int | None
    seed: int
    found: bool
    located: bool
    named: bool
    false: list[str]  # names that were said and are not what was made
    said: str  # what was named, and where, if it was not right
    cosine_passes: bool  # whether the last token's cosine lets it pass


class RunOutcome(NamedTuple):
    """Of a mistake in how the model is put together or run; located is None where its form shows no place."""

    mistake: str
    where: str
    form: str
    seed: int
    found: bool
    located: bool | None
    named: bool
    false: list[str]
    said: str


@dataclasses.dataclass
class SelfTest:
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)
    running: list[RunOutcome] = dataclasses.field(default_factory=list)
    alarms: list[str] = dataclasses.field(default_factory=list)  # right ports, and equivalent ones, that did not pass
    healthy: int = 0
    equivalent: int = 0
    seconds: float = 0.0

    def add(self, other: "SelfTest") -> None:
        """What another process found."""
        self.outcomes += other.outcomes
        self.running += other.running
        self.alarms += other.alarms
        self.healthy += other.healthy
        self.equivalent += other.equivalent

    @property
    def exit_code(self) -> int:
        right = all(
            one.found and one.located is not False and one.named and not one.false for one in (*self.outcomes, *self.running)
        )
        return 0 if right and self.outcomes and not self.alarms else 4

    def to_json(self) -> str:
        found = {"exit_code": self.exit_code} | dataclasses.asdict(self)
        found |= {name: [one._asdict() for one in getattr(self, name)] for name in ("outcomes", "running")}
        return json.dumps(found, indent=2)

    def table(self) -> str:
        return "\n".join(self._rows())

    def _rows(self) -> Iterator[str]:
        count = len(self.outcomes)
        known = {outcome.fault for outcome in self.outcomes} | {one.mistake for one in self.running}
        yield f"self-test   {len(known)} mistakes, {count + len(self.running)} runs"
        yield f"{'where':<12} {'mistakes':>8} {'runs':>6} {'found':>6} {'located':>9} {'named':>6} {'false words':>12}"
        sites: dict[str, list[Any]] = {}
        for one in (*self.outcomes, *self.running):
            sites.setdefault(_where(one), []).append(one)
        for where, some in sites.items():
            placed = [one.located for one in some if one.located is not None]
            located = f"{sum(placed)}/{len(placed)}"
            found, named, false = (
                sum(counts) for counts in zip(*((one.found, one.named, len(one.false)) for one in some), strict=True)
            )
            each = len({getattr(one, "fault", None) or one.mistake for one in some})
            yield f"{where:<12} {each:>8} {len(some):>6} {found:>6} {located:>9} {named:>6} {false:>12}"
        for one in (*self.outcomes, *self.running):
            if not (one.found and one.located is not False and one.named and not one.false):
                kind = "MISSED" if not one.found else "MISLOCATED" if one.located is False else "not named"
                kind = "FALSE" if one.false else kind
                what = one.mistake if isinstance(one, RunOutcome) else one.fault
                at = one.form if isinstance(one, RunOutcome) else "model" if one.layer is None else f"layer {one.layer}"
                yield f"  {kind:<11}{what}, {at}, seed {one.seed}: {one.said}"
        yield f"equivalent  {self.equivalent} runs, healthy {self.healthy} runs, {len(self.alarms)} alarms"
        yield from (f"  ALARM      {alarm}" for alarm in self.alarms)
        passed = sum(outcome.cosine_passes for outcome in self.outcomes)
        yield (
            f"beside it   the last token's cosine >= {COSINE} on {COSINE_TOKENS} tokens lets"
            f" {passed}/{count} of these runs pass   {passed / max(count, 1):.1%}"
        )
        yield f"{'PASS' if self.exit_code == 0 else 'FAIL'}   {self.seconds:.0f} s"


def _where(one: Outcome | RunOutcome) -> str:
    """Where a mistake sits."""
    if isinstance(one, RunOutcome):
        return one.where
    fault = CATALOGUE[one.fault]
    return "checkpoint" if fault.tap == "weights" else "outside" if fault.where == "model" else "block"
