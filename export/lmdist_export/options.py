"""The options of generation, one table for all: a field of `GenerationConfig` or `Options` is a row.

    top_k: Annotated[int, at_least(0), Option("sample from the K most likely tokens", ...)] = 0

A row has a name, a type, bounds, a default and a help text; an option that is an input of the graphs says how. From the rows
come the keys of generation_config.json, the flags of lmdist-generate, the params of the server and their MLflow signature,
the inputs of the graphs and what is fed to them, and the tables of docs/sampling.md. docs/sampling-internals.md says how
to add an option.

This module needs neither numpy nor onnxruntime, so that `lmdist-generate --help` is quick.
"""

# No `from __future__ import annotations`: annotations that are functions could not be read from strings.
import dataclasses
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from lmdist.bounds import Bounds, at_least, between, check, check_bounds
from lmdist.errors import UsageError
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID

Item = TypeVar("Item")

MAX_BEAMS = 1_000
MAX_BIAS = 1_000_000  # added to a logit, or multiplied with it: fp32 has no numbers far beyond the products
FP32_LIMIT = 1e30  # the graphs are fed nothing beyond it nor, where they divide or multiply, below 1 / it
MAX_WEIGHT = 1 - 2**-24  # of a cache in fp32: the logarithm of the rest is finite
ATTEMPTS = 24  # uniform numbers a token where it may be rejected; each rejection leaves about half of what is not allowed

BATCH_SIZES = between(1, 65_536)
"""How many texts may be generated, or scored, at a time."""
THREADS = between(0, 1_024, "0 chooses by the machine")
"""How many threads onnxruntime may have."""
NO_CACHE = (
    "this bundle has no neural cache: tune one by lmdist-evaluate RUN --cache 2000, then export the run again by lmdist-export"
)

CONTENT = "what to write"
SAMPLING = "how tokens are sampled"
OUTPUT = "how it is written"


Role = Literal["temperature", "penalty", "filter", "cache"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class GraphInput:
    """How an option enters the graphs that generate."""

    role: Role
    """A penalty changes the logits of tokens that the text has; a filter says which tokens can be sampled; a cache replaces the
    logits by log-probabilities of a mixture."""
    neutral: float
    """The value with which the option does nothing: a graph has no nodes for it."""
    value: Callable[[Any, int], float] = lambda value, vocabulary_size: value
    """From the option's value and the vocabulary size to the input's value."""
    name: str = ""
    """The name of the input, where it is not the option's."""
    dtype: Literal["float32", "int64"] = "float32"
    shape: tuple[int, ...] = ()
    per_temperature: bool = False
    """Whether the input is divided by the temperature, as the logits are from which it is subtracted."""
    sorts: bool = False
    """Whether the filter needs the tokens sorted; else it rejects tokens that were sampled (docs/sampling-internals.md)."""


@dataclass(frozen=True)
class Option:
    """A row of the table but for its name, type, bounds and default."""

    help: str
    group: str = ""
    """The group of flags in the help of lmdist-generate; an option without one is in generation_config.json only."""
    metavar: str = ""
    graph: GraphInput | None = None
    order: int = 0
    """When it is applied to the logits: 1 is the first."""
    sampling_only: bool = False
    """Whether beam search ignores it."""
    first: bool = False
    """Whether it is listed before all others."""


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    name: str
    type: type
    is_list: bool
    default: Any
    bounds: Bounds | None
    option: Option

    @property
    def flag(self) -> str:
        """Return the flag of lmdist-generate."""
        return f"--{self.name.replace('_', '-')}"


def clamp_above_fp32_tiny(share: float, vocabulary_size: int) -> float:
    """Return a share of probability, raised to the least that fp32 multiplies as a normal number."""
    return max(share, 1 / FP32_LIMIT)


@dataclass(frozen=True)
class GenerationConfig:
    """The options of generation; the names are those of Hugging Face, or of the OpenAI API.

    The defaults of the fields change nothing: tokens are sampled from the model's own distribution. EXPORTED has those that
    lmdist-export writes into generation_config.json.
    """

    bos_token_id: Annotated[int, Option("the token before the first: a text begins where another ended")] = END_ID
    eos_token_id: Annotated[int, Option("the token that ends a text")] = END_ID
    do_sample: Annotated[bool, Option("false is greedy, as temperature 0 is", order=5)] = True
    temperature: Annotated[
        float,
        between(0, math.inf, "0 is greedy", includes_high=False),
        Option(
            "divide the logits by X: below 1 likely tokens become likelier, above 1 rare ones do",
            group=SAMPLING,
            metavar="X",
            order=5,
            sampling_only=True,
            graph=GraphInput(
                "temperature",
                neutral=1,
                name="inverse_temperature",
                value=lambda temperature, _: min(max(1 / temperature, 1 / FP32_LIMIT), FP32_LIMIT),
            ),
        ),
    ] = 1.0
    top_k: Annotated[
        int,
        between(0, 1_000_000, "0 keeps all"),
        Option(
            "sample from the K most likely tokens",
            group=SAMPLING,
            metavar="K",
            order=6,
            sampling_only=True,
            graph=GraphInput(
                "filter",
                neutral=0,
                value=lambda top_k, vocabulary_size: min(top_k or vocabulary_size, vocabulary_size),
                dtype="int64",
                shape=(1,),
                sorts=True,
            ),
        ),
    ] = 0
    top_p: Annotated[
        float,
        between(0, 1, "1 keeps all", includes_low=False),
        Option(
            "sample from the fewest most likely tokens that together have probability P, and those as likely as the last of "
            "them (nucleus sampling)",
            group=SAMPLING,
            metavar="P",
            order=7,
            sampling_only=True,
            graph=GraphInput("filter", neutral=1, value=clamp_above_fp32_tiny),
        ),
    ] = 1.0
    min_p: Annotated[
        float,
        between(0, 1, "0 keeps all"),
        Option(
            "sample from tokens with at least P times the probability of the most likely one",
            group=SAMPLING,
            metavar="P",
            order=8,
            sampling_only=True,
            graph=GraphInput("filter", neutral=0),
        ),
    ] = 0.0
    typical_p: Annotated[
        float,
        between(0, 1, "1 keeps all", includes_low=False),
        Option(
            "sample from the fewest tokens that together have probability P, those first whose surprisal, -log p, is nearest "
            "to the entropy (locally typical sampling)",
            group=SAMPLING,
            metavar="P",
            order=9,
            sampling_only=True,
            graph=GraphInput("filter", neutral=1, value=clamp_above_fp32_tiny, sorts=True),
        ),
    ] = 1.0
    repetition_penalty: Annotated[
        float,
        between(1 / MAX_BIAS, MAX_BIAS, "1 is none"),
        Option(
            "divide the positive logits of tokens that the text or its prompt has by X, and multiply the negative ones",
            group=SAMPLING,
            metavar="X",
            order=2,
            sampling_only=True,
            graph=GraphInput("penalty", neutral=1),
        ),
    ] = 1.0
    presence_penalty: Annotated[
        float,
        between(-MAX_BIAS, MAX_BIAS, "0 is none"),
        Option(
            "subtract X from the logits of tokens that the text has, its prompt aside",
            group=SAMPLING,
            metavar="X",
            order=3,
            sampling_only=True,
            graph=GraphInput("penalty", neutral=0, per_temperature=True),
        ),
    ] = 0.0
    frequency_penalty: Annotated[
        float,
        between(-MAX_BIAS, MAX_BIAS, "0 is none"),
        Option(
            "subtract X from the logit of a token for each time that the text has it, its prompt aside",
            group=SAMPLING,
            metavar="X",
            order=3,
            sampling_only=True,
            graph=GraphInput("penalty", neutral=0, per_temperature=True),
        ),
    ] = 0.0
    cache_weight: Annotated[
        float,
        between(0, 1, "0 is off", includes_high=False),
        Option(
            "mix in a neural cache of the text so far, its prompt included, with weight X: tokens that came after a similar "
            "context become likelier; first of all options",
            group=SAMPLING,
            metavar="X",
            order=1,
            sampling_only=True,
            graph=GraphInput("cache", neutral=0, value=lambda weight, _: min(weight, MAX_WEIGHT)),
        ),
    ] = 0.0
    no_repeat_ngram_size: Annotated[
        int,
        between(0, 1_000_000, "0 allows any"),
        Option(
            "no sequence of N tokens comes twice, the prompt included",
            group=SAMPLING,
            metavar="N",
            order=4,
        ),
    ] = 0
    min_new_tokens: Annotated[
        int,
        at_least(0),
        Option("tokens to generate before a text may end", group=CONTENT, metavar="N", order=4),
    ] = 0
    max_new_tokens: Annotated[
        int,
        at_least(1),
        Option("tokens to generate at most", group=CONTENT, metavar="N", first=True),
    ] = 200
    num_beams: Annotated[
        int,
        between(1, MAX_BEAMS, "1 is off"),
        Option("beam search with K beams instead of sampling", group=SAMPLING, metavar="K"),
    ] = 1
    length_penalty: Annotated[
        float,
        between(-20, 20),
        Option(
            "beam search ranks texts by log-probability / length ** X: above 1 favors longer texts, below 1 shorter ones",
            group=SAMPLING,
            metavar="X",
        ),
    ] = 1.0
    suppress_tokens: Annotated[
        tuple[int, ...], Option("tokens that are never generated; `--allow-unk` takes `<unk>` off the list", order=1)
    ] = (UNKNOWN_ID,)
    bad_words_ids: Annotated[
        tuple[list[int], ...],
        Option("sequences of tokens that are never generated; `--bad-words` adds to them (of several tokens: step 4)", order=1),
    ] = ()
    sequence_bias: Annotated[
        tuple[tuple[list[int], float], ...],
        Option(
            "tokens, each in a list of its own, and what is added to its logit, at most 1,000,000; `--logit-bias` adds to it",
            order=1,
        ),
    ] = ()

    def __post_init__(self) -> None:
        check_bounds(self)

        def expect(name: str, correct: bool, expected: str) -> None:
            if not correct:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be {expected}")

        expect("min_new_tokens", self.min_new_tokens <= self.max_new_tokens, f"from 0 to max_new_tokens, {self.max_new_tokens}")
        expect("bad_words_ids", all(self.bad_words_ids), "sequences of at least one token")
        expect(
            "sequence_bias",
            all(len(tokens) == 1 for tokens, _ in self.sequence_bias),
            "tokens one by one, each in a list of its own",
        )
        expect(
            "sequence_bias",
            all(value == -math.inf or abs(value) <= MAX_BIAS for _, value in self.sequence_bias),
            f"tokens and numbers, at most {MAX_BIAS:,}",
        )

    @cached_property
    def key(self) -> str:
        """Return a text that is equal for equal options."""
        return repr(self)

    @property
    def greedy(self) -> bool:
        """Return whether the most likely token is always chosen."""
        return not self.do_sample or self.temperature == 0


@dataclass(frozen=True)
class Options:
    """What a request, or a command line, asks for: `given` of GenerationConfig's options, and options of its own.

    Raises UsageError for values out of bounds, by the names that the caller knows: flags, or params.
    """

    given: Mapping[str, int | float] = dataclasses.field(default_factory=dict)
    as_flags: bool = False
    seed: Annotated[
        int | None,
        between(0, 2**64 - 1),
        Option("the same seed gives the same text (default: random, and printed)", group=SAMPLING, sampling_only=True),
    ] = None
    n: Annotated[int, between(1, 1_000_000), Option("texts to generate for each prompt", group=CONTENT)] = 1
    logprobs: Annotated[
        int | None,
        between(0, 1_000_000),
        Option(
            "with --json: the log-probability of each token, and the K most likely ones in its place", group=OUTPUT, metavar="K"
        ),
    ] = None
    stop: Annotated[
        Sequence[str],
        Option("end a text before these words; may be given several times", group=CONTENT, metavar="TEXT"),
    ] = ()
    bad_words: Annotated[
        Sequence[str],
        Option("words that never come in a row; may be given several times", group=SAMPLING, metavar="TEXT", order=4),
    ] = ()
    logit_bias: Annotated[
        Sequence[str],
        Option("add X to a word's logit; may be given several times", group=SAMPLING, metavar="WORD=X", order=1),
    ] = ()
    ignore_eos: Annotated[bool, Option("continue after the end of a text, with the next one", group=CONTENT)] = False
    allow_unk: Annotated[bool, Option("allow the unknown token to be generated", group=SAMPLING, order=1)] = False
    echo: Annotated[bool, Option("begin a text with its prompt (default: yes)", group=OUTPUT)] = True

    @classmethod
    def from_values(cls, values: Mapping[str, Any], *, as_flags: bool = False) -> Self:
        """Return the options among `values`; None counts as not given."""
        given = {name: value for name, value in values.items() if value is not None and name in PARAMS}
        own = {name: given.pop(name) for name in list(given) if name in REQUEST}
        return cls(given, as_flags, **own)

    @classmethod
    def from_keywords(cls, keywords: Mapping[str, Any]) -> Self:
        """Return the options of a call; raises UsageError for a name that is no option, or a value of another type."""
        for name in keywords:
            if name not in PARAMS:
                from lmdist.command_line import did_you_mean  # which needs argparse

                hint = did_you_mean(name, PARAMS) or f"; expected is one of {', '.join(PARAMS)}"
                raise UsageError(f"{name} is no option of generation{hint}")
        return cls.from_values({name: typed(PARAMS[name], value) for name, value in keywords.items() if value is not None})

    def __post_init__(self) -> None:
        for name, value in {**self.given, **{name: getattr(self, name) for name in REQUEST}}.items():
            bounds = PARAMS[name].bounds
            if bounds and value is not None:
                check(self.name_for_caller(name), value, bounds)

    def name_for_caller(self, name: str) -> str:
        """Return what the caller calls an option."""
        return PARAMS[name].flag if self.as_flags else name

    def is_given(self, name: str) -> bool:
        """Return whether the caller has set an option."""
        return name in self.given or (name in REQUEST and getattr(self, name) != REQUEST[name].default)


EXPORTED = GenerationConfig(temperature=0.7, top_p=0.9)
"""What lmdist-export writes: what reads best (docs/sampling.md has texts to compare)."""


def rows_of(kind: type, defaults: Any) -> dict[str, Row]:
    """Return the rows of the table that are the fields of a dataclass; `defaults` has an attribute of each name."""
    rows = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if get_origin(hint) is not Annotated:
            continue
        plain, *metadata = get_args(hint)
        option = next(extra for extra in metadata if isinstance(extra, Option))
        bounds = next((extra for extra in metadata if isinstance(extra, Bounds)), None)
        simple = next((simple for simple in (bool, int, float, str) if plain is simple or simple in get_args(plain)), list)
        rows[name] = Row(name, simple, get_origin(plain) is Sequence, getattr(defaults, name), bounds, option)
    return rows


GENERATION = rows_of(GenerationConfig, EXPORTED)
"""The options of generation_config.json."""
REQUEST = rows_of(Options, Options)
"""The options of a request alone."""
LISTED = sorted(GENERATION.values(), key=lambda row: (not row.option.first, row.option.group != CONTENT))
PARAMS = {row.name: row for row in LISTED if row.option.group} | REQUEST
"""The flags of lmdist-generate, and the params of the server, in their order."""
APPLIED = sorted((row for row in PARAMS.values() if row.option.order), key=lambda row: row.option.order)
"""The options of PARAMS that change which token is sampled, in the order in which they are applied."""


def row_facts(row: Row) -> dict[str, Any]:
    """Return a row of the table as JSON, as a page has it: its name, type, default, help and bounds; one not finite is null."""
    facts: dict[str, Any] = {
        "name": row.name,
        "type": "list" if row.is_list else row.type.__name__,
        "default": row.default,
        "help": row.option.help,
    }
    if row.bounds is None:
        return facts
    low, high = (value if math.isfinite(value) else None for value in (row.bounds.low, row.bounds.high))
    return facts | {"minimum": low, "maximum": high}


# --- types of values -----------------------------------------------------------------------------------------------

TYPES: dict[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (Integral, "an integer"),
    float: (Real, "a number"),
    str: (str, "a string"),
}
"""The type of a row, the types of the values that it accepts, and what a message calls them."""


def typed(row: Row, value: Any, quoted: Callable[[Any], str] = reprlib.repr) -> Any:
    """Return a value in the type of a row; an integer is a number too, NumPy's as Python's, and a string is a list of one.

    Raises UsageError for a value of another type, as `quoted`.
    """
    if row.is_list:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list | tuple):
            raise UsageError(f"{row.name} is {quoted(value)}; a list of strings is expected")
        return strings_of(row.name, value, quoted=quoted)
    accepted, expected = TYPES[row.type]
    if not isinstance(value, accepted) or (isinstance(value, bool) and row.type is not bool):
        raise UsageError(f"{row.name} is {quoted(value)}; {expected} is expected")
    if isinstance(value, Integral) and abs(int(value)) >= 2**64:
        raise UsageError(f"{row.name} is {quoted(value)}; {expected} of at most 64 bits is expected")
    return row.type(value)


def check_count(name: str, value: Any, expected: Bounds) -> None:
    """Raise UsageError, with `name` in it, unless a value is an integer, NumPy's or Python's, within its bounds."""
    accepted, kind = TYPES[int]
    if not isinstance(value, accepted) or isinstance(value, bool):
        raise UsageError(f"{name} is {reprlib.repr(value)}; {kind} is expected")
    check(name, value, expected)


def strings_of(name: str, values: Iterable[Any], example: str = "", quoted: Callable[[Any], str] = reprlib.repr) -> list[str]:
    """Return the values; raises UsageError where one is not a string."""
    return [string_of(f"{name} number {place}", value, example, quoted) for place, value in enumerate(values)]


def items_of(name: str, values: Iterable[Item]) -> Iterator[Item]:
    """Return the values one by one; raises UsageError for a string, whose letters would be taken for values."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise UsageError(f"{name} are {reprlib.repr(values)}; a list is expected, as [{reprlib.repr(values)}]")
    return iter(values)


def string_of(name: str, value: Any, example: str = "", quoted: Callable[[Any], str] = reprlib.repr) -> str:
    """Return a value; raises UsageError where it is not a string, or one that UTF-8 cannot write."""
    if not isinstance(value, str):
        raise UsageError(f"{name} is {quoted(value)}; a string is expected{example}")
    if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
        raise UsageError(f"{name} has a lone surrogate, \\ud800 to \\udfff; a string is expected{example}")
    return value


# --- the graphs ----------------------------------------------------------------------------------------------------

GRAPH = {name: row.option.graph for name, row in GENERATION.items() if row.option.graph}
"""The options that the graphs apply."""
FILTERS = {name: graph for name, graph in GRAPH.items() if graph.role == "filter"}


@dataclass(frozen=True)
class Features:
    """What a graph that generates can do; it has no nodes for anything else. A filter has a field of its name."""

    greedy: bool = False
    adjusted: bool = False
    """Whether it applies penalties, and a bias of each row, to the logits."""
    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    typical_p: bool = False
    cached: bool = False
    """Whether it mixes in the neural cache, whose memory is then a part of the state."""

    @property
    def filters(self) -> list[GraphInput]:
        """Return the filters that it applies."""
        return [graph for name, graph in FILTERS.items() if getattr(self, name)]

    @property
    def sorted(self) -> bool:
        """Return whether the graph sorts the tokens: for the first few, or for an order that is not that of likelihood."""
        return any(graph.sorts for graph in self.filters)

    @property
    def attempts(self) -> int:
        """Return A: uniform numbers a token."""
        return ATTEMPTS if self.filters and not (self.sorted or self.greedy) else 1


EVERY_FEATURE = Features(adjusted=True, **dict.fromkeys(FILTERS, True))


def features_of(config: GenerationConfig, row_bias: bool = False) -> Features:
    """Return what a graph must be able to do for `config`, with a bias of each row or without."""
    active = {name: graph.role for name, graph in GRAPH.items() if getattr(config, name) != graph.neutral}
    adjusted = row_bias or "penalty" in active.values()
    filters = {name: True for name in FILTERS if name in active and not config.greedy}
    return Features(config.greedy, adjusted, **filters, cached="cache_weight" in active)


def graph_inputs(features: Features, role: Role) -> dict[str, GraphInput]:
    """Return the options of a role that are inputs of a graph with these features."""
    if role == "filter":
        # TopK sorts for the other filters too: without top-k all tokens are its candidates.
        return {
            name: graph for name, graph in FILTERS.items() if getattr(features, name) or (name == "top_k" and features.sorted)
        }
    present = {"penalty": features.adjusted, "temperature": not features.greedy, "cache": features.cached}[role]
    return {name: graph for name, graph in GRAPH.items() if graph.role == role and present}
