/** Where the words of a text stand in it, although they are normalized, lowercased, or quotes of another spelling. */

/** @typedef {import("./tokenizer.js").Tokenizer} Tokenizer */

const SPELLINGS = { "``": ['"', "''"], "''": ['"'], "\u2581": [..." \t\n\v\f\r\x85\xa0\u2028\u2029\u3000"], "<eos>": ["\n"], "<nl>": ["\n", "\r"] };
const CLUSTER = /\P{M}?\p{M}*/gsu;

/**
 * Return [start, end] of each word; those of a word that is not found are the end of the word before it.
 * @param {string} text
 * @param {string[]} words in their order
 * @param {Tokenizer} tokenizer
 * @returns {[number, number][]}
 */
export function spansOf(text, words, tokenizer) {
  if (tokenizer.pieces) return spansOfPieces(words, tokenizer.pieces);
  const { cleaned, starts, ends } = cleanedWithPlaces(text, tokenizer);
  let place = 0;
  return words.map((word) => {
    const found = [word, ...(SPELLINGS[word] ?? [])]
      .map((spelling) => ({ start: cleaned.indexOf(spelling, place), length: spelling.length }))
      .filter(({ start }) => start >= 0)
      .sort((one, other) => one.start - other.start)[0];
    if (!found) return [ends[place - 1] ?? 0, ends[place - 1] ?? 0];
    place = found.start + found.length;
    return [starts[found.start], ends[place - 1]];
  });
}

/**
 * Return [start, end] of each piece, which write the text as it is: the space before it aside, and nothing of one that ends inside
 * of a character.
 * @param {string[]} words
 * @param {import("./pieces.js").Pieces} pieces
 * @returns {[number, number][]}
 */
function spansOfPieces(words, pieces) {
  const writer = pieces.writer();
  let end = 0;
  return words.map((word) => {
    const piece = writer.piece(word);
    const start = end + piece.length - piece.replace(/^ +/, "").length;
    end += piece.length;
    return [start, end];
  });
}

/**
 * Return a text as its words are spelled, and where in `text` each of its characters begins and ends.
 * @param {string} text
 * @param {Tokenizer} tokenizer
 */
function cleanedWithPlaces(text, tokenizer) {
  let cleaned = "";
  /** @type {number[]} */
  const starts = [];
  /** @type {number[]} */
  const ends = [];
  for (const { 0: cluster, index } of text.matchAll(CLUSTER)) {
    const clean = tokenizer.cleaned(cluster);
    const spelled = tokenizer.settings.lowercase ? clean.toLowerCase() : clean;
    cleaned += spelled;
    for (let place = 1; place <= spelled.length; place++) {
      starts.push(index + Math.min(place, cluster.length) - 1);
      ends.push(index + (place === spelled.length ? cluster.length : Math.min(place, cluster.length)));
    }
  }
  return { cleaned, starts, ends };
}
