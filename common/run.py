"""What identifies a run, so that a snapshot can be matched to it."""

from dataclasses import dataclass, field
from typing import Any

# Flags that change nothing that is trained, or that `identity` compares already.
NOT_COMPARED = {
    *("step", "model", "vit_width", "vit_depth", "num_samples", "data_dir", "precision", "seed"),
    *("snapshot_dir", "save_every", "allow_changes", "metrics", "profile", "verbose", "timeout"),
    *("num_workers", "eval_batch_size", "use_gpu", "compile", "world_size"),
    *("replicas", "no_reshard", "activation_checkpointing", "cpu_offload", "meta_init"),
}
# Of the others, those that a resumed run may have for a good reason: it says so, and continues.
OFTEN_CHANGED = {"epochs", "lr", "batch_size", "accumulate"}


@dataclass(frozen=True)
class Run:
    """One training, which may be interrupted and resumed."""

    step: str  # the folder of its train.py
    model: str
    data: str
    precision: str
    seed: int
    flags: dict[str, Any] = field(default_factory=dict)  # all of them, by name

    @property
    def name(self) -> str:
        """For a folder: `cnn-mnist`."""
        return f"{self.model}-{self.data}"

    def identity(self) -> dict[str, Any]:
        """What a snapshot must have in common with the run that resumes from it."""
        return {"run": self.name, "precision": self.precision, "seed": self.seed}

    def settings(self) -> dict[str, Any]:
        """The flags that change what is trained, as a snapshot keeps them: numbers, strings and None."""
        flags = {name: value for name, value in self.flags.items() if name not in NOT_COMPARED}
        kinds = (bool, int, float, str, type(None))
        return {name: value if isinstance(value, kinds) else str(value) for name, value in flags.items()}


def name_of(thing: Any) -> str:
    """The name of a model or a dataset: its own, if it has one, or that of its class, with its length."""
    if hasattr(thing, "name"):
        return str(thing.name)
    length = f"-{len(thing)}" if hasattr(thing, "__len__") else ""
    return f"{type(thing).__name__}{length}"
