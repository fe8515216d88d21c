"""Every setting that a recipe can hold, with its default and its meaning.

One dataclass for each section of a recipe; `Recipe` is all of them. The docstring under a field is its text in `--help` of
lmdist.train and of lmdist-prepare, and its annotation has its bounds. The classes check what can be checked without the
data and the machine. They import no torch, so that `--help` and a wrong flag are answered at once. The defaults are those
of the demo, launch/demo.toml.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Literal, get_args

from lmdist.bounds import LARGEST, SEED, above, at_least, between, check_bounds, check_name
from lmdist.credentials import without_credentials
from lmdist.errors import UsageError

Tokenizer = Literal["word_tokenize", "wordpunct", "whitespace", "characters", "bpe", "unigram", "tokenizers", "sentencepiece"]
LEARNED = ("bpe", "unigram")
"""Tokenizers whose pieces of words are learned from the text to train on."""
FILES = {".json": "tokenizers", ".model": "sentencepiece"}
"""Tokenizers whose pieces come with a file, by its suffix: a user names the file, and not the tokenizer."""
FEWEST_PIECES = 258
"""`<unk>`, `<eos>` and a piece for each byte."""
Cleaning = Literal["none", "tutorial", "html"]

DEMO = "demo"
"""In place of a file name: the demo corpus."""
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)

LEAST_MINUTES = 0.01
ADAPTIVE_HIDDEN_SIZE = 16
"""Each of the two clusters of rare tokens has a quarter of the hidden size of the cluster before it."""


@dataclass(frozen=True)
class TextSettings:
    """How a document is tokenized, as text.json has it: settings of `PrepareSettings`, which describes them, and the rules."""

    tokenizer: Tokenizer = "word_tokenize"
    """For a file with pieces, which `PrepareSettings` names: the package that reads it, tokenizers or sentencepiece."""
    clean: Cleaning = "none"
    lowercase: bool = False
    rules: Literal[1, 2] = 2
    """2: text is put into Unicode's normal form C, invisible characters are dropped, and in wordpunct combining marks stay with
    their letters; 1: none of it, as in folders that were made before there was a choice."""
    line_breaks: bool = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.line_breaks and (self.tokenizer == "whitespace" or self.has_pieces):
            raise UsageError(f"line_breaks is of tokenizers of words, and {self.tokenizer} keeps line breaks: leave it out")

    def stored(self) -> dict[str, Any]:
        """Return the settings as files keep them."""
        return without_newer(self)

    @property
    def has_pieces(self) -> bool:
        """Return whether text becomes pieces of words, which write it exactly."""
        return self.tokenizer in LEARNED or self.tokenizer in FILES.values()

    @property
    def needs_sentences(self) -> bool:
        """Return whether a document is split into sentences first; the tutorial's cleaning leaves no full stop."""
        return self.tokenizer == "word_tokenize" and self.clean != "tutorial"

    @property
    def line_by_line(self) -> bool:
        """Return whether each line of plain text is a document, blank or not."""
        return self.tokenizer == "whitespace"


NEWER = {"line_breaks": False}
"""Settings that there were none of when the first files were written, and what those files mean by it."""


def without_newer(settings: TextSettings | PrepareSettings) -> dict[str, Any]:
    """Return settings without the NEWER ones that change nothing: what files hold of older settings stays as it is."""
    return {name: value for name, value in asdict(settings).items() if name not in NEWER or value != NEWER[name]}


@dataclass(frozen=True)
class ReadSettings:
    """How files are read."""

    text_column: list[str] | str = field(default="", metadata={"repeated": True})
    """The column with the text, by its name or with --no-header by its number; of several, given one after the other, a line
    break joins the texts (title and content). By default it is the first of content, text, article, body that exists."""
    where: str = ""
    """Read only the rows for which this holds, like "publication == 'Atlantic' and year >= 2016": columns, compared with
    numbers or with texts in quotes by == != < <= > >= in, not in; joined by and, or, not; numbers with + - * / // %; a
    name with spaces in backticks."""
    header: bool = True
    """The first line of CSV and TSV has the names of the columns; with --no-header it is a row like all others."""
    separator: str = ""
    """The character between the cells of CSV and TSV, or tab; by default a comma, a semicolon, a tab or |, whichever fits."""
    lines: bool = False
    """Each line of plain text is a document; by default blank lines separate documents (of whitespace, lines do)."""
    rows: Annotated[int, at_least(0)] = 0
    """Read only the first rows, so many of all inputs together or of each given split; 0 reads all."""
    encoding: str = ""
    """The encoding of the files; by default UTF-8, or UTF-16 with a byte order mark; a few undecodable bytes are read as
    Windows-1252."""
    allow_losses: bool = False
    """Go on without the lines that cannot be read; by default more than 1 % of them are an error."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if isinstance(self.text_column, list) and len(self.text_column) < 2:
            object.__setattr__(self, "text_column", "".join(self.text_column))
        try:
            "".encode(self.encoding or "utf-8")
        except (LookupError, UnicodeError):
            raise UsageError(
                f"encoding is {self.encoding!r}, which Python does not know; utf-16 and gb18030 are encodings"
            ) from None
        if self.separator in ("tab", "\\t"):
            object.__setattr__(self, "separator", "\t")
        if self.separator and (len(self.separator) > 1 or self.separator in '"\r\n '):
            raise UsageError(f"separator is {self.separator!r}; one character such as ; or | is expected, or tab")

    @property
    def text_columns(self) -> list[str]:
        """Return the columns of the text that are named."""
        return as_list(self.text_column)


def as_list(value: list[str] | str) -> list[str]:
    """Return a setting that has one value or several, or none."""
    return value if isinstance(value, list) else [value] if value else []


@dataclass(frozen=True)
class PrepareSettings(ReadSettings):
    """What to read, how it is tokenized, and how it is split."""

    inputs: list[str] = field(default_factory=list)
    """Files, addresses (s3://, https://) or globs of them: CSV, TSV, JSON Lines, Parquet, Feather, ORC, spreadsheets or plain
    text, also packed by gzip, bzip2, xz, zstd or zip; - is stdin, and "demo" is the demo corpus."""
    train: list[str] | str = ""
    """Files or globs to train on, in place of inputs that are split."""
    valid: list[str] | str = ""
    """Files or globs to validate on; needs train."""
    test: list[str] | str = ""
    """Files or globs to test on; needs train."""
    group_by: str = ""
    """A column: rows with the same value go to the same split."""
    tokenizer: str = "word_tokenize"
    """word_tokenize (NLTK's), wordpunct (runs of letters and digits, runs of punctuation), whitespace (line by line) or
    characters, for languages without spaces between words; bpe or unigram: pieces of words, learned from the text to train on;
    or a file with pieces, a tokenizer.json or a SentencePiece .model."""
    clean: Cleaning = "none"
    """none; tutorial: hyphens become spaces, all other ASCII punctuation is removed, letters become lowercase; html: tags are
    dropped, entities decoded."""
    lowercase: bool = False
    """Lowercase all words."""
    line_breaks: bool = False
    """Keep each line break as a token, for poems, lyrics and dialogues; by default it is whitespace. Pieces keep them all."""
    valid_fraction: Annotated[float, between(0, 1, includes_high=False)] = 0.05
    """Fraction of the documents or groups to validate on: at least one of them, none with 0."""
    test_fraction: Annotated[float, between(0, 1, includes_high=False)] = 0.05
    """Fraction of the documents or groups to test on: at least one of them, none with 0."""
    seed: Annotated[int, SEED] = 1
    """Chooses the documents of valid and test."""
    min_count: Annotated[int, at_least(1)] = 2
    """Words with a lower count in the train split become <unk>."""
    vocabulary_size: Annotated[int, at_least(0)] = 0
    """Keep only so many words, the most frequent ones, including <unk> and <eos>; 0 keeps all. With bpe and unigram it is how
    many pieces are learned, by default 8,000."""
    vocabulary: str = ""
    """Take the words, their ids and the tokenizer of this run, checkpoint, bundle or data folder, or the words of a vocab.txt;
    all other words become <unk>."""
    extend: bool = False
    """Add the new words of the train split behind those of --vocabulary: --min-count and --vocabulary-size count these."""
    unknown: Literal["add", "file"] = "add"
    """add: rare words become <unk>; file: the text marks its unknown words as <unk> itself (PTB, WikiText), no others do."""
    workers: Annotated[int, between(0, 1_024)] = 0
    """Processes that read and tokenize; 0 is one for each available CPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_tokenizer()
        if self.extend and not self.vocabulary:
            raise UsageError("extend adds words to those of a vocabulary: give vocabulary as well")
        if self.vocabulary and (self.unknown == "file" or (self.vocabulary_size and not self.extend)):
            setting = "unknown file" if self.unknown == "file" else "vocabulary_size"
            raise UsageError(f"{setting} says which words are kept, and so does vocabulary {self.vocabulary}: leave one out")
        if 0 < self.vocabulary_size < 3 and not self.extend:
            raise UsageError(f"vocabulary_size is {self.vocabulary_size}; <unk>, <eos> and one word need 3")
        if self.valid_fraction + self.test_fraction >= 1:
            raise UsageError("valid_fraction and test_fraction leave nothing to train on")
        if self.unknown == "file" and (self.vocabulary_size or self.min_count > 2):  # 2 may be the default
            raise UsageError("min_count and vocabulary_size create unknown words, and unknown is file: give one or the other")
        if self.inputs and (self.train or self.valid or self.test):
            raise UsageError("inputs are split, and train, valid and test are splits: give one or the other")
        if (self.valid or self.test) and not self.train:
            raise UsageError("valid and test need train beside them")
        if self.train and self.group_by:
            raise UsageError("group_by says how inputs are split, and train, valid and test are splits: leave it out")

    def check_tokenizer(self) -> None:
        """Raise UsageError for a tokenizer that there is not, and for settings that it has no use for."""
        names = [name for name in get_args(Tokenizer) if name not in FILES.values()]
        if self.tokenizer not in get_args(Tokenizer) and not self.tokenizer_file:
            raise UsageError(
                f"tokenizer is {self.tokenizer}; {', '.join(names)}, or a file that ends in .json or .model is expected"
            )
        if self.tokenizer in FILES.values() and not self.vocabulary:
            raise UsageError(f"tokenizer is {self.tokenizer}: name its file, such as tokenizer.json or bpe.model")
        text = self.text
        if text.has_pieces and self.unknown == "file":
            raise UsageError("unknown file marks words of the text, and pieces have no unknown ones: leave one out")
        if self.tokenizer in LEARNED and 0 < self.vocabulary_size < FEWEST_PIECES:
            raise UsageError(
                f"vocabulary_size is {self.vocabulary_size}; at least {FEWEST_PIECES} are needed: <unk>, <eos> and each byte"
            )
        if self.tokenizer_file and (self.vocabulary or self.vocabulary_size):
            setting = "vocabulary" if self.vocabulary else "vocabulary_size"
            raise UsageError(f"the pieces of {self.tokenizer} are the vocabulary: leave out {setting}, or the file")

    def check_min_count(self, given: Container[str]) -> None:
        """Raise UsageError where min_count is among the names that were `given`, and there are pieces."""
        if "min_count" in given and self.text.has_pieces:
            raise UsageError("min_count creates unknown words, and pieces have none: leave it out")

    def stored(self) -> dict[str, Any]:
        """Return the settings as files keep them: the addresses of the text without passwords, signatures and tokens."""
        values = without_newer(self)
        for name in ("inputs", *SPLITS):
            given = values[name]
            values[name] = [*map(without_credentials, given)] if isinstance(given, list) else without_credentials(given)
        return values

    def files(self, split: str) -> list[str]:
        """Return the files or globs that a given split is read from."""
        return as_list(getattr(self, split))

    @property
    def text(self) -> TextSettings:
        """Return the settings of the tokenizer alone."""
        kind: Any = FILES[self.tokenizer[self.tokenizer.rindex(".") :]] if self.tokenizer_file else self.tokenizer
        return TextSettings(kind, self.clean, self.lowercase, line_breaks=self.line_breaks)

    @property
    def tokenizer_file(self) -> str:
        """Return the file with the pieces, or "" where the tokenizer is no file."""
        return self.tokenizer if self.tokenizer.endswith((*FILES,)) else ""


DEMO_SETTINGS = PrepareSettings(inputs=[DEMO], group_by="title", lowercase=True, min_count=3)
"""[prepare] of launch/demo.toml, and of a recipe that names no text."""


@dataclass
class DataSettings:
    """The data, and how it is cut into batches."""

    folder: str = "data/demo"
    """A data folder, as lmdist-prepare writes it."""
    batching: Literal["streams", "windows"] = "streams"
    """streams: contiguous text with the state carried on; windows: shuffled windows, each from a zero state."""
    global_batch: Annotated[int, between(1, 1_000_000)] = 20
    """Batch size of a step over all ranks; the number of ranks must divide it, and changes no result."""
    window: Annotated[int, between(1, 1_000_000)] = 35
    """Sequence length of a step in tokens. streams predicts all of them, windows all but the first."""
    stride: Annotated[int, at_least(0)] = 0
    """windows: tokens from the start of one window to the next; 0 is window - 1, so that each token is predicted once."""
    valid_batch: Annotated[int, between(1, 1_000_000)] = 10
    """Streams that the validation text is cut into; lmdist-evaluate takes one, and fewer streams come closer to it."""

    def __post_init__(self) -> None:
        check_bounds(self, "data")
        check_name("data.folder", self.folder)
        if self.batching == "windows" and self.window < 2:
            raise UsageError("data.window is 1; windows need at least 2 tokens, of which the first is not predicted")

    @property
    def sequence_length(self) -> int:
        """Return the number of tokens predicted in a sequence of a step."""
        return self.window if self.batching == "streams" else self.window - 1


MODEL_SIZES = ("embedding_size", "hidden_size", "num_layers", "tied", "head")
"""The settings of a model that decide the shapes of its parameters."""


@dataclass(frozen=True)
class ModelSettings:
    """The architecture of the model."""

    embedding_size: Annotated[int, between(1, 1_000_000)] = 128
    """Size of a token's embedding."""
    hidden_size: Annotated[int, between(1, 1_000_000)] = 256
    """Size of an LSTM layer's state. With tied weights the last layer has the embedding's size instead."""
    num_layers: Annotated[int, between(1, 1_000)] = 2
    """Number of LSTM layers."""
    dropout: Annotated[float, between(0, 1, includes_high=False)] = 0.2
    """Dropout probability between embedding, layers and projection: of those of the next three that are not given. All are
    AWD-LSTM's (Merity et al. 2018, arXiv:1708.02182), with one mask for all tokens of a sequence in a step."""
    dropout_input: Annotated[float | None, between(0, 1, includes_high=False)] = None
    """Dropout probability of the first layer's inputs; by default that of model.dropout."""
    dropout_hidden: Annotated[float | None, between(0, 1, includes_high=False)] = None
    """Dropout probability between two layers, where there are two or more; by default that of model.dropout."""
    dropout_output: Annotated[float | None, between(0, 1, includes_high=False)] = None
    """Dropout probability of the last layer's outputs; by default that of model.dropout."""
    dropout_embedding: Annotated[float, between(0, 1, includes_high=False)] = 0.0
    """Probability of dropping a word of the vocabulary from all inputs of a step."""
    weight_dropout: Annotated[float, between(0, 1, includes_high=False)] = 0.0
    """Probability of dropping a recurrent weight of a layer for a step."""
    tied: bool = True
    """One matrix is both the embedding and the projection (Press and Wolf 2017, arXiv:1608.05859)."""
    head: Literal["full", "adaptive"] = "full"
    """full: one softmax over the vocabulary; adaptive: rare tokens have a smaller projection (Grave et al. 2017,
    arXiv:1609.04309), much faster above 100,000 words; needs tied false."""

    def __post_init__(self) -> None:
        check_bounds(self, "model")
        if self.head == "adaptive" and self.tied:
            raise UsageError(
                "model.head adaptive has projections of several sizes and cannot be tied: give model.tied false as well"
            )
        if self.head == "adaptive" and self.hidden_size < ADAPTIVE_HIDDEN_SIZE:
            raise UsageError(
                f"model.hidden_size is {self.hidden_size}; with model.head adaptive it must be at least {ADAPTIVE_HIDDEN_SIZE}"
            )

    @property
    def layer_sizes(self) -> list[int]:
        """Return the size of each layer's state, first layer first."""
        sizes = [self.hidden_size] * self.num_layers
        if self.tied:
            sizes[-1] = self.embedding_size
        return sizes

    @property
    def vector_dropouts(self) -> list[float]:
        """Return the dropout probability of each layer's inputs, and of the last layer's outputs."""
        given = [self.dropout_input, *[self.dropout_hidden] * (self.num_layers - 1), self.dropout_output]
        return [self.dropout if rate is None else rate for rate in given]


@dataclass
class InitSettings:
    """What a run starts from beside init_from, and what of it is kept still."""

    embeddings: str = ""
    """A file of word vectors (word2vec's text format, GloVe's or fastText's .vec; also packed by gzip), which become the
    embeddings of its words; with init_from, of those that the base does not have."""
    freeze: list[str] | str = ""
    """Parts of the model that are not trained, with commas between: embedding, layers.0 (the first layer), layers.1, ...,
    projection."""
    freeze_steps: Annotated[int, at_least(0)] = 0
    """Train them after so many steps; 0 is never."""

    def __post_init__(self) -> None:
        check_bounds(self, "init")
        if isinstance(self.freeze, str):
            self.freeze = [name for part in self.freeze.split(",") if (name := part.strip())]
        if self.freeze_steps and not self.freeze:
            raise UsageError("init.freeze_steps is how long init.freeze holds: give init.freeze as well")


@dataclass
class OptimizerSettings:
    """The optimizer, and what the loss adds to the cross-entropy."""

    name: Literal["sgd", "adam", "adamw", "nadam"] = "adamw"
    """The optimizer; nadam: AdamW with Nesterov's momentum (Dozat 2016)."""
    learning_rate: Annotated[float, between(1e-12, LARGEST)] = 0.007
    """The highest learning rate; the schedule says when."""
    momentum: Annotated[float, at_least(0)] = 0.0
    """sgd: momentum."""
    weight_decay: Annotated[float | None, at_least(0)] = None
    """Weight decay, times the rate with adamw and nadam, part of the gradient with sgd and adam; unless given 0.1 and 0."""
    clip: Annotated[float, at_least(0)] = 0.5
    """Largest norm of the gradient of a step; 0 does not clip."""
    activation_penalty: Annotated[float, at_least(0)] = 0.0
    """Weight in the loss of the mean square of the last layer's output (AR in AWD-LSTM, there 2)."""
    temporal_penalty: Annotated[float, at_least(0)] = 0.0
    """Weight in the loss of the mean square of its change from token to token (TAR in AWD-LSTM, there 1)."""
    layer_decay: Annotated[float, between(1e-6, 1)] = 1.0
    """The learning rate of a layer is this times that of the layer after it (Howard and Ruder 2018, arXiv:1801.06146, who take
    0.38); the projection, and with it a tied embedding, has the full rate."""

    def __post_init__(self) -> None:
        check_bounds(self, "optimizer")


@dataclass
class ScheduleSettings:
    """How the learning rate changes, and with one-cycle the momentum."""

    name: Literal["constant", "cosine", "plateau", "one-cycle", "warmup-stable-decay", "inverse-sqrt"] = "warmup-stable-decay"
    """constant; cosine: down to a tenth at the last step; plateau: divided whenever validation does not improve; one-cycle: up
    from a 25th, then down to almost 0, the momentum the other way; warmup-stable-decay: constant, and down to 0 in the last
    part; inverse-sqrt: after the warmup down with the square root of the step."""
    warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps of linear warmup from 0; for any schedule but one-cycle."""
    warmup_fraction: Annotated[float, between(0, 1, includes_high=False)] = 0.3
    """one-cycle: fraction of the steps, the first ones, in which the rate rises."""
    decay_fraction: Annotated[float, between(0, 1)] = 0.6
    """warmup-stable-decay: fraction of the steps, the last ones, in which the rate falls."""
    momentum_low: Annotated[float, between(0, 1, includes_high=False)] = 0.85
    """one-cycle: momentum at the highest rate, in place of optimizer.momentum; with adam and its kin beta1."""
    momentum_high: Annotated[float, between(0, 1, includes_high=False)] = 0.95
    """one-cycle: momentum at the first and the last step."""
    divide_by: Annotated[float, above(1)] = 4.0
    """plateau: what the rate is divided by."""

    def __post_init__(self) -> None:
        check_bounds(self, "schedule")
        if self.name == "one-cycle" and self.warmup_steps:
            raise UsageError("schedule one-cycle has a warmup of its own, schedule.warmup_fraction: leave warmup_steps out")
        if self.name == "inverse-sqrt" and not self.warmup_steps:
            raise UsageError("schedule inverse-sqrt falls from the end of the warmup on: give schedule.warmup_steps as well")
        if self.momentum_low > self.momentum_high:
            raise UsageError(
                f"schedule.momentum_low is {self.momentum_low}; it must be at most momentum_high, {self.momentum_high}"
            )


@dataclass
class AveragingSettings:
    """An average of the parameters over the steps, which is validated, exported and sampled in place of the last ones."""

    name: Literal["none", "ema", "nt-asgd"] = "none"
    """ema: an exponential moving average; nt-asgd: the mean since validation stopped improving (Merity et al. 2018,
    arXiv:1708.02182), for a constant rate."""
    decay: Annotated[float, between(0, 1, includes_high=False)] = 0.999
    """ema: weight of the average before a step; (1 + n) / (10 + n) after n steps, where that is lower."""
    nonmonotone_interval: Annotated[int, at_least(1)] = 5
    """nt-asgd: the mean begins when a validation is worse than the best of all but so many before it."""

    def __post_init__(self) -> None:
        check_bounds(self, "averaging")


@dataclass
class TrainingSettings:
    """How long, in which precision and on which device."""

    epochs: Annotated[float, at_least(0)] = 4.0
    """Epochs to train for."""
    steps: Annotated[int, at_least(0)] = 0
    """Steps to train for, in place of epochs; 0 leaves it to epochs."""
    minutes: Annotated[float, between(0, 10_000_000)] = 0.0
    """Minutes to train for, validations included, in place of epochs and steps: the speed decides the steps, and the schedule
    ends with them; 0 leaves it to these."""
    accumulation: Annotated[int, between(1, 1_000_000)] = 1
    """Parts that a rank's batch is split into, one after the other; saves memory, changes no result."""
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: the fastest that this machine computes correctly; a log line names it and the reason. fp32; bf16: autocast; tf32
    and fp16 (autocast, with a scaled loss): GPUs only."""
    gradient_compression: Literal["none", "bf16"] = "none"
    """bf16: GPUs send each other half as many bytes; the sums are a little less exact."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto is CUDA where torch finds it, else the CPU."""
    log_every: Annotated[int, at_least(1)] = 50
    """Steps between two log lines."""
    validate_every: Annotated[int, at_least(0)] = 0
    """Steps between two validations; 0 is once an epoch. The last step is always validated."""
    patience: Annotated[int, at_least(0)] = 0
    """End the run after so many validations without a better one; 0 trains to the last step."""
    timeout_seconds: Annotated[float, between(0.1, 10_000_000)] = 120.0
    """Time that a rank waits in a step for the others before it takes them for dead and exits with code 75. Between steps,
    where one may still validate, sample or write, it is at least 30 minutes; a rank that dies is noticed at once."""

    def __post_init__(self) -> None:
        check_bounds(self, "training")
        if self.minutes:
            self.check_minutes()
        elif not self.steps and not self.epochs > 0:
            raise UsageError(f"training.epochs is {self.epochs}; it must be above 0")

    def check_minutes(self) -> None:
        """Raise UsageError where something else than training.minutes says how long the run is too, or they are too few."""
        if self.minutes < LEAST_MINUTES:
            raise UsageError(f"training.minutes is {self.minutes:g}; it must be 0, or at least {LEAST_MINUTES}")
        for name, value, unset in (("steps", self.steps, (0,)), ("epochs", self.epochs, (0, TrainingSettings.epochs))):
            if value not in unset:
                raise UsageError(
                    f"training.minutes is {self.minutes:g} and training.{name} is {value:g}, and both say how long the run is: "
                    f"leave one out, or give --training.{name} 0 where a recipe has it"
                )


@dataclass
class CheckpointSettings:
    """When to save a checkpoint, and which to keep."""

    every_steps: Annotated[int, at_least(0)] = 0
    """Save every so many steps; 0 leaves it to every_minutes and to the validations."""
    every_minutes: Annotated[float, at_least(0)] = 10.0
    """Save when so many minutes have passed since the last time; 0 leaves it to every_steps."""
    keep: Annotated[int, at_least(2, "the newest one may be damaged")] = 2
    """Checkpoints to keep: the newest ones, and also the one with the best validation loss."""

    def __post_init__(self) -> None:
        check_bounds(self, "checkpoint")


@dataclass
class SampleSettings:
    """Text sampled from the model during training."""

    words: Annotated[int, between(0, 1_000_000)] = 60
    """Tokens sampled after each validation, into runs/NAME/samples; 0 samples none."""
    final_words: Annotated[int, between(0, 1_000_000)] = 0
    """Tokens sampled after the last step, into runs/NAME/sample.txt; 0 samples none."""
    temperature: Annotated[float, between(0.001, 1_000)] = 1.0
    """Temperature of the softmax: below 1 likely tokens become likelier, above 1 rare ones do."""

    def __post_init__(self) -> None:
        check_bounds(self, "sample")


@dataclass
class TrackingSettings:
    """Where metrics go beside metrics.jsonl."""

    mlflow: bool = True
    """Log to MLflow: to the server that MLFLOW_TRACKING_URI names, else to the file mlflow.db."""
    experiment: str = "lmdist"
    """The MLflow experiment of the run; with the default, MLFLOW_EXPERIMENT_NAME counts."""


@dataclass
class Recipe:
    """Everything a run depends on. The defaults are the demo's, launch/demo.toml."""

    run_folder: str = "runs/demo"
    """The folder of the run: recipe, metrics, checkpoints, samples."""
    resume: Literal["auto", "never"] = "never"
    """auto: resume from the newest valid checkpoint of the run, or start it; never: raise an error if the run exists."""
    init_from: str = ""
    """Start from the weights of this run, checkpoint, bundle or registered model (models:/NAME@ALIAS), word by word; sizes and
    tokenizer must be the same, the vocabulary need not."""
    seed: Annotated[int, SEED] = 1
    """Seed of parameters, dropout and shuffling."""
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    data: DataSettings = field(default_factory=DataSettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    init: InitSettings = field(default_factory=InitSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    averaging: AveragingSettings = field(default_factory=AveragingSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)
    sample: SampleSettings = field(default_factory=SampleSettings)
    tracking: TrackingSettings = field(default_factory=TrackingSettings)

    def __post_init__(self) -> None:
        check_bounds(self)
        check_name("run_folder", self.run_folder)
