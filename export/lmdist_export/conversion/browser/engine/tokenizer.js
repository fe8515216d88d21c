/**
 * From a text to its words, as lmdist/text/tokenizer.py does: the same words, and with the vocabulary the same ids, that the model
 * was trained on. Text is taken as it is typed: of `--clean html` nothing is done here.
 */

import { LETTER, MARK, SPACE, split, stripped } from "./characters.js";
import { Pieces } from "./pieces.js";
import { END } from "./vocabulary.js";
import { WordFinder } from "./word_tokenize.js";

/** @typedef {{tokenizer: string, clean: string, lowercase: boolean, rules?: number, line_breaks?: boolean}} Settings */
/** @typedef {{settings: Settings, punkt: object | null, pieces?: {model: any}}} TextSettings */

/** The word of `characters` that is a space. */
export const SPACE_WORD = "\u2581";
/** The word that is a line break, where these are tokens. */
export const LINE_BREAK = "<nl>";
/** What follows a prompt: a name that no text has, so that the end of a sentence is decided by the word before it. */
const NEXT_WORD = "Qxzq";

const INVISIBLE = /[\u00ad\u061c\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff]/gu;
const WORDPUNCT = new RegExp(`[${LETTER}][${LETTER}${MARK}]*|[^${LETTER}${SPACE}]+`, "gu");
const FIRST_WORDPUNCT = new RegExp(`[${LETTER}]+|[^${LETTER}${SPACE}]+`, "gu"); // of rules 1
const CHARACTER = new RegExp(`[^${SPACE}][${MARK}]*`, "gu");
const ASCII_PUNCTUATION = /[!-,./:-@[-`{-~]/g; // but the hyphen

/** Splits texts into words. */
export class Tokenizer {
  /**
   * @param {TextSettings} text the content of text.json
   * @param {string[]} vocabulary the words of vocab.txt, which are needed for pieces of words
   */
  constructor({ settings, punkt, pieces }, vocabulary = []) {
    this.pieces = pieces ? new Pieces(pieces, vocabulary) : null;
    this.settings = { rules: 1, ...settings };
    this.hasSentences = settings.tokenizer === "word_tokenize" && settings.clean !== "tutorial";
    this.split = this.splitter(punkt);
  }

  /**
   * Return the words of a text; one that `continues` is a prompt, whose last word may be an abbreviation.
   * @param {string} text
   * @param {{continues?: boolean}} [options]
   */
  words(text, { continues = false } = {}) {
    const cleaned = this.cleaned(text);
    if (this.pieces) return this.pieces.words(continues ? cleaned.replace(/ $/, "") : cleaned);
    if (!this.settings.line_breaks) return this.wordsOf(cleaned, continues);
    const lines = (continues ? cleaned : stripped(cleaned)).split(/\r\n?|\n/);
    return lines.flatMap((line, number) => {
      const isLast = number === lines.length - 1;
      const words = stripped(line) ? this.wordsOf(line, continues || !isLast) : [];
      return isLast ? words : [...words, LINE_BREAK];
    });
  }

  /**
   * Return how a text may stand in another one: as words, or as pieces with and without a space before it.
   * @param {string} text
   */
  spellings(text) {
    if (!this.pieces) return [this.words(text, { continues: true })];
    const [alone, after] = [this.words(text), this.words(` ${text}`)];
    return alone.join("\n") === after.join("\n") ? [alone] : [alone, after];
  }

  /**
   * Return the words of a cleaned text.
   * @param {string} cleaned
   * @param {boolean} continues
   */
  wordsOf(cleaned, continues) {
    const words = continues && this.hasSentences ? this.split(`${cleaned} ${NEXT_WORD}`).slice(0, -1) : this.split(cleaned);
    return this.settings.lowercase ? words.map((word) => word.toLowerCase()) : words;
  }

  /**
   * Return a text in normal form C, without characters that nobody sees, as the settings say.
   * @param {string} text
   */
  cleaned(text) {
    const { tokenizer, clean, rules, lowercase } = this.settings;
    if (this.pieces) return lowercase ? text.toLowerCase() : text;
    if (rules > 1) {
      if (tokenizer !== "whitespace") text = text.replaceAll("\u200b", " ").replace(INVISIBLE, "");
      text = text.normalize("NFC");
    }
    return clean === "tutorial" ? text.replaceAll("-", " ").replace(ASCII_PUNCTUATION, "").toLowerCase() : text;
  }

  /**
   * Return the function that splits a cleaned text.
   * @param {object | null} punkt
   * @returns {(text: string) => string[]}
   */
  splitter(punkt) {
    const wordpunct = this.settings.rules > 1 ? WORDPUNCT : FIRST_WORDPUNCT;
    const finder = new WordFinder(this.hasSentences ? punkt : null);
    const splitters = {
      word_tokenize: (text) => finder.words(text),
      wordpunct: (text) => text.match(wordpunct) ?? [],
      whitespace: splitLines,
      characters: (text) => split(text).join(SPACE_WORD).match(CHARACTER) ?? [],
    };
    return splitters[this.settings.tokenizer];
  }
}

/**
 * Return the words between whitespace, and the end of a text between two lines.
 * @param {string} text
 */
function splitLines(text) {
  const [first, ...others] = text.replace(/\n$/, "").split("\n").map(split);
  return [...first, ...others.flatMap((words) => [END, ...words])];
}
