/** Words and their ids: vocab.txt has one word a line, and the number of the line, from 0, is its id. */

/** The end of a text. */
export const END = "<eos>";
const UNKNOWN_ID = 0;

export class Vocabulary {
  /** @param {string} lines the content of vocab.txt */
  constructor(lines) {
    this.words = lines.replace(/\n$/, "").split("\n");
    this.ids = new Map(this.words.map((word, id) => [word, id]));
  }

  /** @param {string} word */
  has(word) {
    return this.ids.has(word);
  }

  /**
   * Return the ids of words; that of a word which is not in the vocabulary is that of <unk>.
   * @param {string[]} words
   */
  encode(words) {
    return words.map((word) => this.ids.get(word) ?? UNKNOWN_ID);
  }
}
