"""A vocabulary that exists, for other text: that of a model or of a data folder, kept id for id, or with new words behind it.

    base = GivenVocabulary.load(Path("runs/base"))       # a run, a checkpoint, a bundle, a data folder, or a vocab.txt
    vocabulary, counts = base.applied(all_words, candidates, limit)

A model goes on with other text where words keep their ids and text is tokenized as before, so the tokenizer comes with the
words. This module does not know how words are counted, nor what a model is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from lmdist.errors import DataError, MissingInputError, UsageError
from lmdist.settings import LEARNED, PrepareSettings
from lmdist.storage.checksums import FileFacts, verify_checksums, verify_sizes
from lmdist.storage.held import HeldFolder, read_held
from lmdist.storage.reading import MAX_JSON_BYTES
from lmdist.storage.schema import check_schema
from lmdist.text.data_folder import META, TEXT, VOCABULARY
from lmdist.text.piece_files import read_pieces
from lmdist.text.tokenizer import WordTokenizer
from lmdist.text.vocabulary import MAX_BYTES, Vocabulary

MANIFESTS = (META, "manifest.json")
"""What holds the checksums of a data folder, and of a checkpoint or a bundle."""
IN_RUN = f"checkpoints/step-[0-9]*/{VOCABULARY}"
"""The words of a run's checkpoints, which are the same in all of them."""
CHOICES = ("tokenizer", "clean", "lowercase", "line_breaks")
"""The settings by which text is tokenized that a user can give."""


@dataclass(frozen=True)
class GivenVocabulary:
    """The words to keep, and how text was tokenized into them."""

    name: str
    """As the user names it."""
    words: Vocabulary
    tokenizer: WordTokenizer | None
    """None of a bare vocab.txt."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load those of a run, a checkpoint, a bundle, a data folder or a vocab.txt; raise MissingInputError or DataError."""
        if path.is_file():
            return cls(str(path), Vocabulary.load(path), None)
        file = path / VOCABULARY if (path / VOCABULARY).is_file() else max(path.glob(IN_RUN), default=None)
        if file is None:
            raise (DataError if path.exists() else MissingInputError)(
                f"--vocabulary {path} is no run with a checkpoint, no checkpoint, bundle or data folder, and no vocab.txt"
            )
        return read_held(file.parent, partial(cls.of, str(path)))

    @classmethod
    def of(cls, name: str, files: HeldFolder) -> Self:
        """Do the same of a folder that is held open; raise DataError unless the files are those that its manifest names."""
        manifest = next((manifest for manifest in MANIFESTS if (files.path / manifest).is_file()), None)
        if manifest is None:
            raise DataError(f"{files.path} has no {' or '.join(MANIFESTS)}: name the file itself, {files.path / VOCABULARY}")
        value = files.read_json(manifest)
        check_schema(value, {"files": dict[str, FileFacts]}, files.path / manifest)
        words, text = files.read(VOCABULARY, MAX_BYTES), files.read(TEXT, MAX_JSON_BYTES)
        names = (VOCABULARY, TEXT)
        listed = {name: facts for name, facts in value["files"].items() if name in names}
        verify_sizes(files, listed, names)
        verify_checksums(files, listed)
        return cls(name, Vocabulary.parse(words, files.path / VOCABULARY), WordTokenizer.parse(text, files.path / TEXT))

    @classmethod
    def of_pieces(cls, settings: PrepareSettings) -> Self:
        """Return the pieces of the file that the settings name; raise MissingInputError or DataError."""
        model = read_pieces(Path(settings.tokenizer_file))
        return cls(settings.tokenizer_file, Vocabulary(model.words), WordTokenizer(settings.text, model=model))

    def settings(self, asked: PrepareSettings, given: Mapping[str, Any]) -> PrepareSettings:
        """Return the settings with those of the tokenizer in place of the defaults; raise UsageError for others.

        `given` are those that were given by hand, which may be a default.
        """
        if self.tokenizer is None:
            if asked.tokenizer in LEARNED:
                raise UsageError(
                    f"tokenizer is {asked.tokenizer}, whose pieces are learned, and {self.name} has words alone: "
                    "leave vocabulary out, or name the data folder, run or bundle that has the pieces"
                )
            return asked
        defaults = PrepareSettings()
        if asked.extend and self.tokenizer.settings.has_pieces:
            raise UsageError(f"extend adds words, and {self.name} has pieces, which write every text: leave it out")
        self.check({name: value for name in CHOICES if (value := getattr(asked, name)) != getattr(defaults, name)} | {**given})
        return dataclasses.replace(asked, **{name: getattr(self.tokenizer.settings, name) for name in CHOICES})

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise UsageError for a setting, given by hand, by which text would be tokenized otherwise than the words were."""
        settings = self.tokenizer and self.tokenizer.settings
        for name in CHOICES if settings else ():
            own = getattr(settings, name)
            if given.get(name, own) != own:
                raise UsageError(
                    f"{name} is {given[name]}, and the text of {self.name} was read with {own}: leave {name} out, "
                    "or prepare without vocabulary"
                )

    def applied(self, found: Vocabulary, candidates: Vocabulary | None, limit: int) -> tuple[Vocabulary, dict[str, Any]]:
        """Return the vocabulary of a text, and what meta.json has of it.

        `found` has all words of the train split. Of the `candidates`, the most frequent ones first, those that are new become
        words, at most `limit` if that is not 0.
        """
        known = self.words.ids
        new = [word for word in (candidates.words if candidates else ()) if word not in known]
        vocabulary = Vocabulary([*self.words.words, *(new[:limit] if limit else new)])
        words = found.words[2:]
        shared = sum(word in known for word in words)
        if len(vocabulary) == len(self.words) and not shared:
            raise DataError(f"{self.name} has none of the words of this text: --extend adds them, or name another --vocabulary")
        added = len(vocabulary) - len(self.words)
        counts = {"shared": shared, "new": added, "dropped": len(words) - shared - added}
        return vocabulary, {"from": self.name, "words": len(self.words), **counts}
