"""Every setting of a training job, with its default and its meaning; `python -m lmdist.train --help` shows the same text.

The classes check what can be checked without the data and the machine. They import no torch, so that help and a wrong flag
are answered at once. The defaults are those of the demo, launch/demo.toml. What lmdist-prepare takes lies beside it, in
prepare.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lmdist.errors import UsageError

TOKENIZERS = ("word_tokenize", "wordpunct", "whitespace")
CLEANINGS = ("none", "tutorial")

DEMO = "demo"
"""In the place of a file: the demo corpus."""
SPLITS = ("train", "valid", "test")

ADAPTIVE_HIDDEN_SIZE = 16
"""Each cluster of rare words has rows a quarter as long as the one before; there are two."""


@dataclass(frozen=True)
class TextSettings:
    """How a document becomes words."""

    tokenizer: str = "word_tokenize"
    """word_tokenize (NLTK's), wordpunct (runs of letters and digits, runs of other marks) or whitespace."""
    clean: str = "none"
    """none, or tutorial: hyphens become blanks, all other ASCII punctuation goes, letters become small."""
    lowercase: bool = False
    """Make the letters of all words small."""

    def __post_init__(self) -> None:
        if self.tokenizer not in TOKENIZERS:
            raise UsageError(f"tokenizer is {self.tokenizer!r}; expected one of {', '.join(TOKENIZERS)}")
        if self.clean not in CLEANINGS:
            raise UsageError(f"clean is {self.clean!r}; expected one of {', '.join(CLEANINGS)}")

    @property
    def needs_sentences(self) -> bool:
        """Whether a document is cut into sentences first; after the tutorial's cleaning no full stop is left."""
        return self.tokenizer == "word_tokenize" and self.clean != "tutorial"


@dataclass
class PrepareSettings:
    """What to read, how words are found in it, and how it is split."""

    inputs: list[str] = field(default_factory=list)
    """Files or globs: CSV, TSV, JSON Lines, Parquet or plain text, also as gz, bz2, xz or zst; "demo" is the demo corpus."""
    train: str = ""
    """A file or glob to train on, in place of inputs that are split."""
    valid: str = ""
    """A file or glob to validate on, beside train."""
    test: str = ""
    """A file or glob to test on, beside train."""
    text_column: str = ""
    """The column with the text; without it content, text, article or body, whichever is there first."""
    group_by: str = ""
    """A column: rows with the same value go to the same split."""
    rows: int = 0
    """Read the first so many rows only; 0 reads all."""
    encoding: str = ""
    """The encoding of the files; without it UTF-8, or UTF-16 with its mark, and odd bytes are taken for Windows-1252."""
    tokenizer: str = "word_tokenize"
    """word_tokenize (NLTK's), wordpunct (runs of letters and digits, runs of other marks) or whitespace (a line at a time)."""
    clean: str = "none"
    """none, or tutorial: hyphens become blanks, all other ASCII punctuation goes, letters become small."""
    lowercase: bool = False
    """Make the letters of all words small."""
    valid_fraction: float = 0.05
    """Share of the documents or groups that validates; at least one, none with 0."""
    test_fraction: float = 0.05
    """Share of the documents or groups that tests; at least one, none with 0."""
    seed: int = 1
    """Chooses which documents validate and test."""
    min_count: int = 2
    """Words that come less often in the train split become <unk>."""
    vocabulary_size: int = 0
    """Keep only so many words, the most frequent, <unk> and <eos> among them; 0 keeps all."""
    unknown: str = "add"
    """add: rare words become <unk>; file: the text marks its unknown words as <unk> itself (PTB, WikiText), all others stay."""
    workers: int = 0
    """Processes that find words; 0 takes one a core."""

    def __post_init__(self) -> None:
        for name, least in (("rows", 0), ("min_count", 1), ("vocabulary_size", 0), ("workers", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least {least}")
        if 0 < self.vocabulary_size < 3:
            raise UsageError(f"vocabulary_size is {self.vocabulary_size}; <unk>, <eos> and one word make 3")
        for name in ("valid_fraction", "test_fraction"):
            if not 0 <= getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be from 0 to less than 1")
        if self.valid_fraction + self.test_fraction >= 1:
            raise UsageError("valid_fraction and test_fraction leave nothing to train on")
        if self.unknown not in ("add", "file"):
            raise UsageError(f"unknown is {self.unknown!r}; expected add or file")
        if self.unknown == "file" and (self.vocabulary_size or self.min_count > 2):  # 2 may be the default
            raise UsageError("min_count and vocabulary_size make unknown words, and unknown is file: give one or the other")
        if self.inputs and (self.train or self.valid or self.test):
            raise UsageError("inputs are split, and train, valid and test are splits: give one or the other")
        if (self.valid or self.test) and not self.train:
            raise UsageError("valid and test need train beside them")
        if self.train and self.group_by:
            raise UsageError("group_by says how inputs are split, and train, valid and test are splits: leave it out")
        _ = self.text

    @property
    def text(self) -> TextSettings:
        """How a document becomes words; raises UsageError where that is wrong."""
        return TextSettings(self.tokenizer, self.clean, self.lowercase)


DEMO_SETTINGS = PrepareSettings(inputs=[DEMO], group_by="title", lowercase=True, min_count=3)
"""What training takes that is told of no text: [prepare] of launch/demo.toml."""


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
