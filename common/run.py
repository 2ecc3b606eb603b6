"""What a run is: by this a snapshot knows whether it belongs to it."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One training, also when it is interrupted and resumed."""

    step: str  # the folder of its train.py
    model: str
    data: str
    precision: str
    seed: int

    @property
    def name(self) -> str:
        """For a folder: `cnn-mnist`."""
        return f"{self.model}-{self.data}"

    def identity(self) -> dict[str, Any]:
        """What a snapshot must have in common with the run that resumes from it."""
        return {"run": self.name, "precision": self.precision, "seed": self.seed}


def name_of(thing: Any) -> str:
    """The name of a model or a dataset: its own, if it has one, or that of its class, with its length."""
    if hasattr(thing, "name"):
        return str(thing.name)
    length = f"-{len(thing)}" if hasattr(thing, "__len__") else ""
    return f"{type(thing).__name__}{length}"
