/** Where the words of a text stand in it, although they are normalized, lowercased, or quotes of another spelling. */

/** @typedef {import("./tokenizer.js").Tokenizer} Tokenizer */

const SPELLINGS = { "``": ['"', "''"], "''": ['"'], "\u2581": [" "], "<eos>": ["\n"] };
const CLUSTER = /\P{M}?\p{M}*/gsu;

/**
 * Return [start, end] of each word; those of a word that is not found are the end of the word before it.
 * @param {string} text
 * @param {string[]} words in their order
 * @param {Tokenizer} tokenizer
 * @returns {[number, number][]}
 */
export function spansOf(text, words, tokenizer) {
  const { cleaned, places } = cleanedWithPlaces(text, tokenizer);
  let place = 0;
  return words.map((word) => {
    const found = [word, ...(SPELLINGS[word] ?? [])]
      .map((spelling) => ({ start: cleaned.indexOf(spelling, place), length: spelling.length }))
      .filter(({ start }) => start >= 0)
      .sort((one, other) => one.start - other.start)[0];
    const [start, end] = found ? [found.start, found.start + found.length] : [place, place];
    place = end;
    return [places[start], places[end]];
  });
}

/**
 * Return a text as its words are spelled, and for each place in it, and for its end, the place in `text`.
 * @param {string} text
 * @param {Tokenizer} tokenizer
 */
function cleanedWithPlaces(text, tokenizer) {
  let cleaned = "";
  const places = [];
  for (const { 0: cluster, index } of text.matchAll(CLUSTER)) {
    const clean = tokenizer.cleaned(cluster);
    const spelled = tokenizer.settings.lowercase ? clean.toLowerCase() : clean;
    cleaned += spelled;
    for (let place = 0; place < spelled.length; place++) places.push(index + Math.min(place, cluster.length - 1));
  }
  return { cleaned, places: [...places, text.length] };
}
