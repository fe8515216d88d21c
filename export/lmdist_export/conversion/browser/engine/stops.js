/**
 * Stops: what ends a text beside its end mark, as lmdist_export/sampling/stops.py has them. Of words they are sequences of ids; a
 * text of pieces may be written by many sequences, so there they are bytes, and each token is spelled.
 */

/** @typedef {{count: number, rest: Uint8Array<ArrayBuffer>}} Ending the last tokens that are no part of a text, and what is of the first */

const NOTHING = new Uint8Array();

/** Stops of ids. */
export class Stops {
  /** @param {number[][]} sequences */
  constructor(sequences) {
    this.sequences = sequences;
    this.beginnings = sequences.flatMap((stop) => stop.slice(1).map((_, place) => stop.slice(0, place + 1)));
    /** The stops of one token. */
    this.tokens = sequences.filter((stop) => stop.length === 1).flat();
  }

  /**
   * Return how a text ends with a stop, or null.
   * @param {number[]} tokens
   * @param {number} [_overlap] bytes, of which words have none
   * @returns {Ending | null}
   */
  ending(tokens, _overlap) {
    const stop = this.sequences.find((sequence) => endsWith(tokens, sequence));
    return stop ? { count: stop.length, rest: NOTHING } : null;
  }

  /**
   * Return how many of the last tokens are the beginning of a stop.
   * @param {number[]} tokens
   * @param {number} [_overlap]
   */
  numHeldBack(tokens, _overlap) {
    return Math.max(0, ...this.beginnings.filter((beginning) => endsWith(tokens, beginning)).map(({ length }) => length));
  }
}

/** Stops of bytes, each a character of a string, as `spell` writes a token. */
export class ByteStops {
  /**
   * @param {string[]} stops
   * @param {(token: number) => string} spell
   */
  constructor(stops, spell) {
    this.stops = stops;
    this.spell = spell;
    this.longest = Math.max(0, ...stops.map(({ length }) => length));
    /** @type {number[]} */
    this.tokens = [];
  }

  /**
   * Return how a text ends with a stop, the first that ends in its last token, or null; `overlap` bytes of its first token are none of it.
   * @param {number[]} tokens
   * @param {number} [overlap]
   * @returns {Ending | null}
   */
  ending(tokens, overlap = 0) {
    const last = this.spell(tokens.at(-1) ?? 0).length;
    const written = this.written(tokens, this.longest + last, overlap);
    const found = this.stops
      .map((stop) => ({ stop, begin: written.indexOf(stop, Math.max(0, written.length - last - stop.length + 1)) }))
      .filter(({ begin }) => begin >= 0)
      .sort((one, other) => one.begin + one.stop.length - other.begin - other.stop.length)[0];
    if (!found) return null;
    let [count, start] = [0, written.length];
    while (start > found.begin) start -= this.spell(tokens[tokens.length - ++count]).length;
    return { count, rest: Uint8Array.from(written.slice(Math.max(0, start), found.begin), (byte) => byte.charCodeAt(0)) };
  }

  /**
   * Return how many of the last tokens may become a stop.
   * @param {number[]} tokens
   * @param {number} [overlap]
   */
  numHeldBack(tokens, overlap = 0) {
    const written = this.written(tokens, this.longest, overlap);
    let length = Math.min(written.length, this.longest - 1);
    while (length > 0 && !this.stops.some((stop) => stop.startsWith(written.slice(-length)))) length--;
    let count = 0;
    while (length > 0) length -= this.spell(tokens[tokens.length - ++count]).length;
    return count;
  }

  /**
   * Return the end of a text, whole tokens of at least so many bytes, where it has them.
   * @param {number[]} tokens
   * @param {number} length
   * @param {number} overlap
   */
  written(tokens, length, overlap) {
    let written = "";
    let place = tokens.length;
    while (place > 0 && written.length < length) written = this.spell(tokens[--place]) + written;
    return place === 0 ? written.slice(overlap) : written;
  }
}

/**
 * @param {number[]} tokens
 * @param {number[]} sequence
 */
function endsWith(tokens, sequence) {
  const start = tokens.length - sequence.length;
  return start >= 0 && sequence.every((token, place) => tokens[start + place] === token);
}
