"""Every setting of a training job, with its default and its meaning; `python -m lmdist.train --help` shows the same text.

The classes check what can be checked without the data and the machine. They import no torch, so that help and a wrong flag
are answered at once. The defaults are those of the demo, launch/demo.toml. What lmdist-prepare takes lies beside it, in
prepare.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmdist.errors import UsageError
from lmdist.prepare import PrepareSettings

ADAPTIVE_HIDDEN_SIZE = 16
"""Each cluster of rare words has rows a quarter as long as the one before; there are two."""


@dataclass
class DataSettings:
    """Which data, and how it is cut into batches."""

    folder: str = "data/demo"
    """A folder made by lmdist-prepare."""
    batching: Literal["streams", "windows"] = "streams"
    """streams: contiguous text with the state carried on; windows: shuffled windows, each from a zero state."""
    global_batch: int = 20
    """Rows of a step over all ranks; the number of ranks must divide it, and changes no result."""
    window: int = 35
    """Words in a row of a step. streams predicts all of them, windows all but the first."""
    stride: int = 0
    """windows: words from the start of one to the start of the next; 0 means window - 1, each word predicted once."""
    valid_batch: int = 10
    """Streams that the validation text is cut into; the fewer, the closer to lmdist-evaluate, which takes one."""

    def __post_init__(self) -> None:
        for name, least in (("global_batch", 1), ("valid_batch", 1), ("stride", 0), ("window", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"data.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.batching == "windows" and self.window < 2:
            raise UsageError("data.window is 1; a window to predict a word in has at least 2")

    @property
    def row_length(self) -> int:
        """Words predicted in a row of a step."""
        return self.window if self.batching == "streams" else self.window - 1


@dataclass(frozen=True)
class ModelSettings:
    """The shape of the model."""

    embedding_size: int = 128
    """Numbers a word is represented by."""
    hidden_size: int = 256
    """Numbers in the state of an LSTM layer. With tied weights the last layer has the embedding's size instead."""
    num_layers: int = 2
    """LSTM layers, one on top of the other."""
    dropout: float = 0.15
    """Probability of zeroing a number between embedding, layers and projection."""
    weight_dropout: float = 0.0
    """Probability of zeroing a recurrent weight of a layer for a step (AWD-LSTM, Merity et al. 2018, arXiv:1708.02182)."""
    tied: bool = True
    """One matrix is both the embedding and the projection (Press and Wolf 2017, arXiv:1608.05859)."""
    head: Literal["full", "adaptive"] = "full"
    """full: every word has a whole row in the projection; adaptive: rare words have short rows (Grave et al. 2017,
    arXiv:1609.04309), much faster above 100,000 words; needs tied false."""

    def __post_init__(self) -> None:
        for name in ("embedding_size", "hidden_size", "num_layers"):
            if getattr(self, name) < 1:
                raise UsageError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("dropout", "weight_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"model.{name} is {getattr(self, name)}; it must be at least 0 and below 1")
        if self.head == "adaptive" and self.tied:
            raise UsageError("model.head adaptive has rows of several sizes and cannot be tied: give model.tied false as well")
        if self.head == "adaptive" and self.hidden_size < ADAPTIVE_HIDDEN_SIZE:
            raise UsageError(
                f"model.hidden_size is {self.hidden_size}; with model.head adaptive it must be at least {ADAPTIVE_HIDDEN_SIZE}"
            )

    @property
    def layer_sizes(self) -> list[int]:
        """The size of each layer's state, first layer first."""
        sizes = [self.hidden_size] * self.num_layers
        if self.tied:
            sizes[-1] = self.embedding_size
        return sizes


@dataclass
class OptimizerSettings:
    """How the parameters are changed."""

    name: Literal["sgd", "adam", "adamw"] = "adamw"
    """The rule by which gradients change the parameters."""
    learning_rate: float = 0.007
    """The highest learning rate; the schedule says when."""
    momentum: float = 0.0
    """sgd: share of the last change that is kept."""
    weight_decay: float = 0.01
    """Share of a parameter that is taken away, times the learning rate."""
    clip: float = 0.5
    """Largest norm of the gradient of a step; 0 leaves it as it is."""
    activation_penalty: float = 0.0
    """Weight in the loss of the mean square of the last layer's output (AR in AWD-LSTM, there 2)."""
    temporal_penalty: float = 0.0
    """Weight in the loss of the mean square of its change from word to word (TAR in AWD-LSTM, there 1)."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise UsageError(f"optimizer.learning_rate is {self.learning_rate}; it must be above 0")
        for name in ("momentum", "weight_decay", "clip", "activation_penalty", "temporal_penalty"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"optimizer.{name} is {getattr(self, name)}; it must not be negative")


@dataclass
class ScheduleSettings:
    """How the learning rate changes."""

    name: Literal["constant", "cosine", "plateau"] = "cosine"
    """constant; cosine: down to a tenth at the last step; plateau: divided whenever validation is no better."""
    warmup_steps: int = 0
    """Steps in which the rate rises evenly from 0; for any of the three."""
    divide_by: float = 4.0
    """plateau: what the rate is divided by."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UsageError(f"schedule.warmup_steps is {self.warmup_steps}; it must not be negative")
        if not self.divide_by > 1:
            raise UsageError(f"schedule.divide_by is {self.divide_by}; it must be above 1")


@dataclass
class TrainingSettings:
    """How long, how precisely and where."""

    epochs: float = 2.0
    """Times the training text is read."""
    steps: int = 0
    """Steps to train for, in place of epochs; 0 leaves it to epochs."""
    accumulation: int = 1
    """Parts that a rank's rows are split into, one after the other; saves memory, changes no result."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: the fastest that this machine computes rightly, and a line says which and why. fp32; bf16: autocast; tf32 and
    fp16 (autocast, with a scaled loss): GPUs only."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: GPUs send each other half as many bytes; the sums are a little less exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where torch sees it, else the CPU."""
    log_every: int = 50
    """Steps between two lines."""
    validate_every: int = 0
    """Steps between two validations; 0 means once an epoch. The last step is always validated."""
    timeout_seconds: float = 120.0
    """Time that a rank waits for the others before it takes them for dead, and ends with exit code 75."""

    def __post_init__(self) -> None:
        for name, least in (("accumulation", 1), ("log_every", 1), ("steps", 0), ("validate_every", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"training.{name} is {getattr(self, name)}; it must be at least {least}")
        if not self.steps and not self.epochs > 0:
            raise UsageError(f"training.epochs is {self.epochs}; it must be above 0")
        if not self.timeout_seconds > 0:
            raise UsageError(f"training.timeout_seconds is {self.timeout_seconds}; it must be above 0")


@dataclass
class CheckpointSettings:
    """When to save, and what to keep."""

    every_steps: int = 0
    """Save every so many steps; 0 leaves it to every_minutes and to the validations."""
    every_minutes: float = 10.0
    """Save when so many minutes have passed since the last time; 0 leaves it to every_steps."""
    keep: int = 2
    """Checkpoints kept: the newest ones, and the one with the best validation besides."""

    def __post_init__(self) -> None:
        if self.keep < 2:
            raise UsageError(f"checkpoint.keep is {self.keep}; at least 2 must be kept, for the newest one may be damaged")
        if self.every_steps < 0 or self.every_minutes < 0:
            raise UsageError("checkpoint.every_steps and checkpoint.every_minutes must not be negative")


@dataclass
class SampleSettings:
    """Text written by the model in the course of training."""

    words: int = 60
    """Words written after each validation, into runs/NAME/samples; 0 writes none."""
    final_words: int = 0
    """Words written into runs/NAME/sample.txt after the last step; 0 writes none."""
    temperature: float = 1.0
    """Below 1 likely words become likelier, above 1 rare ones do."""

    def __post_init__(self) -> None:
        for name in ("words", "final_words"):
            if getattr(self, name) < 0:
                raise UsageError(f"sample.{name} is {getattr(self, name)}; it must not be negative")
        if not self.temperature > 0:
            raise UsageError(f"sample.temperature is {self.temperature}; it must be above 0")


@dataclass
class TrackingSettings:
    """Where figures go beside metrics.jsonl."""

    mlflow: bool = True
    """Log to MLflow: to the server that MLFLOW_TRACKING_URI names, else to the file mlflow.db."""
    experiment: str = "lmdist"
    """The MLflow experiment that the run appears in."""


@dataclass
class Recipe:
    """Everything a run depends on. The defaults are the demo's, launch/demo.toml."""

    run_folder: str = "runs/demo"
    """The folder of the run: recipe, metrics, checkpoints, samples."""
    resume: Literal["auto", "never"] = "never"
    """auto: go on from the newest good checkpoint of the run, or start it; never: refuse a run that is there."""
    seed: int = 1
    """Seed of parameters, dropout and shuffling."""
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)
