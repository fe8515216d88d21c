/**
 * Pieces of words, as lmdist/text/pieces.py has them: the models that `--tokenizer bpe` and `unigram` have learned.
 *
 * A text is split into words, a word is written in GPT-2's alphabet, a character for each byte of UTF-8, and there the model finds
 * its pieces: all 256 bytes are some, so every text has pieces, and comes back exactly.
 */

import { BLANK } from "./characters.js";
import { END } from "./vocabulary.js";

/** @typedef {{type: "BPE", vocab: Record<string, number>, merges: (string | [string, string])[]}} Bpe */
/** @typedef {{type: "Unigram", vocab: [string, number][]}} Unigram */

const MAX_KNOWN = 10_000; // words whose pieces are kept
const GAP = `(?:(?![\r\n])[${BLANK}])+`;
const WORD = new RegExp(
  [
    "\\r?\\n|\\r",
    "['’](?:s|t|m|d|ll|re|ve)(?![\\p{L}\\p{M}])",
    " ?\\p{L}[\\p{L}\\p{M}\\u200c\\u200d]*",
    " ?\\p{N}+",
    ` ?[^${BLANK}\\p{L}\\p{N}]+`,
    `${GAP}(?![^${BLANK}])`,
    GAP,
  ].join("|"),
  "gu",
);

/** GPT-2's alphabet: the character of each byte. */
const SIGNS = signs();
const BYTES = new Map(SIGNS.map((sign, byte) => [sign, byte]));

function signs() {
  const isPrintable = (/** @type {number} */ byte) => (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  let others = 0;
  return Array.from({ length: 256 }, (_, byte) => String.fromCodePoint(isPrintable(byte) ? byte : 256 + others++));
}

/** Splits texts into pieces, and writes pieces as texts. */
export class Pieces {
  /**
   * @param {{model: {model: Bpe | Unigram}}} saved what text.json has: the content of a tokenizer.json
   * @param {string[]} words of vocab.txt, which spells the pieces
   */
  constructor({ model: { model } }, words) {
    const isBpe = model.type === "BPE";
    this.split = isBpe ? bpe(model) : unigram(model);
    const names = isBpe ? Object.entries(model.vocab).sort(([, one], [, other]) => one - other) : model.vocab;
    /** @type {Map<string, string>} */
    this.spelled = new Map(names.map(([name], id) => [name, words[id]]));
    /** @type {Map<string, Uint8Array<ArrayBuffer>>} */
    this.contents = new Map(names.map(([name], id) => [words[id], Uint8Array.from(name, (sign) => BYTES.get(sign) ?? 0)]));
    /** @type {Map<string, string[]>} */
    this.known = new Map();
  }

  /**
   * Return the pieces of a text, as vocab.txt spells them.
   * @param {string} text
   */
  words(text) {
    return (text.replace(/\p{Surrogate}/gu, "\ufffd").match(WORD) ?? []).flatMap((word) => this.of(word));
  }

  /** @param {string} word */
  of(word) {
    let found = this.known.get(word);
    if (!found) {
      const written = Array.from(new TextEncoder().encode(word), (byte) => SIGNS[byte]);
      found = this.split(written).map((name) => /** @type {string} */ (this.spelled.get(name)));
      if (this.known.size >= MAX_KNOWN) this.known.clear();
      this.known.set(word, found);
    }
    return found;
  }

  /**
   * Return the bytes of the space that a prompt ends with, or those of its last piece, where these are whole characters and more
   * pieces begin so; and the pieces that do. See lmdist_export/sampling/seams.py.
   * @param {string[]} words of a prompt
   * @param {boolean} hasSpace
   */
  seamOf(words, hasSpace) {
    const last = words.at(-1) ?? END;
    if (!hasSpace && last === END) return null;
    const content = hasSpace ? Uint8Array.of(0x20) : /** @type {Uint8Array} */ (this.contents.get(last));
    const given = textOf(content);
    const begins = [...this.contents].slice(2).filter(([, other]) => content.every((byte, place) => byte === other[place]));
    if (!given || (!hasSpace && begins.length < 2)) return null;
    return { given, overlap: content.length, words: begins.map(([word]) => word), again: hasSpace ? null : last };
  }

  /** Return what writes pieces one after the other. */
  writer() {
    return new PieceWriter(this.contents);
  }
}

/**
 * Return the text of bytes, "" where they are not whole characters.
 * @param {Uint8Array} content
 */
function textOf(content) {
  try {
    return new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(content);
  } catch {
    return "";
  }
}

/** Writes a text of pieces, "" while a character is incomplete. */
class PieceWriter {
  /** @param {Map<string, Uint8Array<ArrayBuffer>>} contents */
  constructor(contents) {
    this.contents = contents;
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  }

  /** @param {string} word */
  piece(word) {
    if (word === END) return `${this.decoder.decode()}\n\n`;
    return this.decoder.decode(this.contents.get(word), { stream: true });
  }

  /**
   * Return the end of a text: bytes that are no whole piece, and what is left of a character.
   * @param {Uint8Array<ArrayBuffer>} rest
   */
  end(rest) {
    return this.decoder.decode(rest);
  }
}

/**
 * Return the function that merges the characters of a word: the pair that was learned first, the first of equal ones, again and
 * again (Sennrich et al. 2016, "Neural Machine Translation of Rare Words with Subword Units").
 * @param {Bpe} model
 * @returns {(signs: string[]) => string[]}
 */
function bpe({ merges }) {
  const pairs = merges.map((pair) => (typeof pair === "string" ? pair : pair.join(" ")));
  const ranks = new Map(pairs.map((pair, rank) => [pair, rank]));
  return (signs) => {
    const parts = [...signs];
    const rankAt = (/** @type {number} */ place) => ranks.get(`${parts[place]} ${parts[place + 1]}`) ?? Infinity;
    const found = parts.map((_, place) => rankAt(place));
    for (;;) {
      const lowest = found.reduce((one, other) => Math.min(one, other), Infinity);
      if (lowest === Infinity) return parts;
      const place = found.indexOf(lowest);
      parts.splice(place, 2, parts[place] + parts[place + 1]);
      found.splice(place, 1);
      for (const changed of [place - 1, place]) if (changed >= 0) found[changed] = rankAt(changed);
    }
  };
}

/**
 * Return the function that splits a word into the likeliest pieces, by the sum of their scores; of equal ones the first is longest
 * (Kudo 2018, "Subword Regularization", whose search is Viterbi's).
 * @param {Unigram} model
 * @returns {(signs: string[]) => string[]}
 */
function unigram({ vocab }) {
  const scores = new Map(vocab);
  const longest = vocab.reduce((most, [name]) => Math.max(most, name.length), 0);
  return (signs) => {
    const word = signs.join("");
    /** @type {{score: number, start: number}[]} the best way to each place */
    const ways = [{ score: 0, start: 0 }];
    for (let start = 0; start < word.length; start++) {
      for (let end = start + 1; end <= Math.min(word.length, start + longest); end++) {
        const score = ways[start].score + (scores.get(word.slice(start, end)) ?? NaN);
        if (score > (ways[end]?.score ?? -Infinity)) ways[end] = { score, start };
      }
    }
    const parts = [];
    for (let end = word.length; end > 0; end = ways[end].start) parts.unshift(word.slice(ways[end].start, end));
    return parts;
  };
}
