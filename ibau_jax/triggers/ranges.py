"""What parameters of triggers may be, whether a person or a file names them."""

from dataclasses import dataclass
from typing import Any

from ibau_jax.errors import ConfigError, shortened


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`; without `low` itself where `above`."""

    low: float
    high: float
    above: bool = False

    def check(self, name: str, value: Any) -> None:
        """Raises ConfigError unless `value` is in the range; NaN never is."""
        if not self.low <= value <= self.high or (self.above and value == self.low):
            start = f"above {self.low}" if self.above else f"at least {self.low}"
            raise ConfigError(f"{name} is {shortened(value, 30)}; it must be {start} and at most {self.high}")


LEVELS = Range(2, 255)  # of brightness, a channel
BRIGHTNESS = Range(0, 1)
