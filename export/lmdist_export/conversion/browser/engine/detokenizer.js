/**
 * From words back to readable text, as lmdist/text/detokenizer.py does, which has the reasons: a space depends on earlier words,
 * never on later ones, so that text can be shown as it grows.
 */

import { lastCharacter } from "./characters.js";
import { LINE_BREAK, SPACE_WORD } from "./tokenizer.js";
import { END } from "./vocabulary.js";

const OPENING = new Set("([{<#@¿¡");
const CLOSING = new Set(")]}>.,:;?!%");
/** Punctuation with a space on both sides. */
const NEUTRAL = new Set("§¶†‡•‣※⁂\"'*/\\&");
/** Punctuation inside words, where wordpunct splits them. */
const INNER = new Set("-/_‐‑\u05be\u05f3\u05f4՛՞՜\u0f0b");
/** What closes each opening quote. */
const CLOSES = new Map(
  Object.entries({
    ...{ "“": "”", "„": "“”", "‚": "‘’", "‘": "’", "”": "”" },
    ...{ "«": "»", "»": "«»", "‹": "›", "›": "‹›" },
  }),
);
const CLITICS = new Set(["'s", "'m", "'d", "'ll", "'re", "'ve", "n't"]);
/** Words that NLTK splits in two. */
const PAIRS = new Set(
  ["can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n", "wan na", "'t is", "'t was"],
);
const AFTER_APOSTROPHE = new Set(["s", "t", "m", "d", "ll", "re", "ve"]);
const BEFORE_APOSTROPHE = new Set(
  (
    "c d j l m n s t qu lorsqu puisqu jusqu quoiqu presqu quelqu aujourd un dell all nell sull dall coll quell quest gl dov com " +
    "cos anch senz tutt mezz o"
  ).split(" "),
);

/** East Asian punctuation, which has its space inside: of category P, and wide or fullwidth. */
const WIDE =
  /^[\u2329\u232a\u3001-\u3003\u3008-\u3011\u3014-\u301f\u3030\u303d\u30a0\u30fb\ufe10-\ufe19\ufe30-\ufe52\ufe54-\ufe61\ufe63\ufe68\ufe6a\ufe6b\uff01-\uff03\uff05-\uff0a\uff0c-\uff0f\uff1a\uff1b\uff1f\uff20\uff3b-\uff3d\uff3f\uff5b\uff5d\uff5f\uff60\u{16fe2}]$/u;
const ALPHANUMERIC = /[\p{L}\p{N}]/u;
/** Digits, also in circles and above or below the line. */
const DIGIT =
  /^[\p{Nd}\u00b2\u00b3\u00b9\u1369-\u1371\u19da\u2070\u2074-\u2079\u2080-\u2089\u2460-\u2468\u2474-\u247c\u2488-\u2490\u24ea\u24f5-\u24fd\u24ff\u2776-\u277e\u2780-\u2788\u278a-\u2792\u{10a40}-\u{10a43}\u{10e60}-\u{10e68}\u{11052}-\u{1105a}\u{1f100}-\u{1f10a}]$/u;

/** Turns words into text, one after the other. */
export class Detokenizer {
  /** @param {string} tokenizer the name of the tokenizer that split the text */
  constructor(tokenizer) {
    this.tokenizer = tokenizer;
    /** @type {string[]} the quotes that are open */
    this.quotes = [];
    this.before = "";
    /** Whether the next word follows without a space. */
    this.glue = true;
  }

  /** Return what is left at the end of a text: nothing, since words are written as wholes. */
  end() {
    return "";
  }

  /**
   * Return a word as it is written in text, with the space before it.
   * @param {string} word
   */
  piece(word) {
    if (word === END) {
      this.quotes = [];
      this.before = "";
      this.glue = true;
      return this.tokenizer === "whitespace" ? "\n" : "\n\n";
    }
    if (word === LINE_BREAK && this.tokenizer !== "whitespace") {
      this.before = "";
      this.glue = true;
      return "\n";
    }
    if (this.tokenizer === "characters") return word === SPACE_WORD ? " " : word;
    const [text, left, right] = this.spaced(word);
    const piece = left || this.glue ? text : ` ${text}`;
    this.before = word;
    this.glue = right;
    return piece;
  }

  /**
   * Return a word as it is written, and whether it needs no space on its left and on its right.
   * @param {string} word
   * @returns {[string, boolean, boolean]}
   */
  spaced(word) {
    const wordpunct = this.tokenizer === "wordpunct";
    if (!wordpunct) {
      if (word === "``") return ['"', false, true];
      if (word === "''") return ['"', true, false];
      const inside = /^@([^])@$/u.exec(word); // WikiText's notation for a - , or . inside a word or number
      if (inside) return [inside[1], true, true];
    }
    const last = lastCharacter(this.before);
    if (ALPHANUMERIC.test(word)) {
      const lower = word.toLowerCase();
      const left =
        CLITICS.has(lower) ||
        PAIRS.has(`${this.before.toLowerCase()} ${lower}`) ||
        (lower === "'t" && "nN".includes(last) && last !== "") ||
        ((this.before === "'" || this.before === "’") && AFTER_APOSTROPHE.has(lower));
      return [word, left, false];
    }
    if (wordpunct && (INNER.has(word) || (word === "·" && /[lL]/.test(last)))) {
      return [word, this.before !== "", this.before !== ""];
    }
    const sides = word === "'" || word === "’" ? this.apostrophe(word, last) : null;
    return [word, ...(sides ?? this.punctuation(word))];
  }

  /**
   * Return the sides that need no space of an apostrophe that belongs to the word before, or null if it is a quote.
   * @param {string} word
   * @param {string} last
   * @returns {[boolean, boolean] | null}
   */
  apostrophe(word, last) {
    if (BEFORE_APOSTROPHE.has(this.before.toLowerCase()) || /^[\u0400-\u052f]$/u.test(last)) return [true, true];
    if (word === "'" && ALPHANUMERIC.test(last) && (this.tokenizer === "wordpunct" || /[sS]/.test(last))) {
      this.close(word);
      return [true, false];
    }
    return null;
  }

  /**
   * Return whether a run of punctuation needs no space on its left and on its right.
   * @param {string} run
   * @returns {[boolean, boolean]}
   */
  punctuation(run) {
    const marks = [...run];
    /** @type {[boolean, boolean][]} */
    const sides = [];
    marks.forEach((mark, place) => {
      if (CLOSES.has(mark) || "\"'’".includes(mark)) {
        const [left, right] = sides.at(-1) ?? [false, false];
        sides.push(this.quote(mark, (left && !right) || closes(marks[place + 1] ?? "")));
      } else {
        sides.push([closes(mark), opens(mark, this.before)]);
      }
    });
    const wide = marks.some((mark) => WIDE.test(mark)); // also the quotes beside such a mark
    return [sides[0][0] || wide, sides[sides.length - 1][1] || wide];
  }

  /**
   * Return whether a quote needs no space on its left, since it closes, or on its right, since it opens.
   * @param {string} mark
   * @param {boolean} closing
   * @returns {[boolean, boolean]}
   */
  quote(mark, closing) {
    const opening = this.quotes.findLast((open) => (CLOSES.get(open) ?? open).includes(mark));
    if (opening !== undefined) {
      this.close(opening);
      return [true, false];
    }
    if (closing || mark === "’") return [true, false];
    if (!this.quotes.includes(mark)) this.quotes.push(mark);
    return [false, true];
  }

  /** @param {string} quote */
  close(quote) {
    const place = this.quotes.indexOf(quote);
    if (place >= 0) this.quotes.splice(place, 1);
  }
}

/**
 * Return whether punctuation follows a word without a space.
 * @param {string} mark
 */
function closes(mark) {
  if (/^[\0-\x7f]?$/.test(mark)) return CLOSING.has(mark);
  const isPoint = /^\p{Po}$/u.test(mark) && !OPENING.has(mark) && !NEUTRAL.has(mark);
  return isPoint || /^[\p{Pe}\p{Pf}\p{M}\u200c\u200d]$/u.test(mark) || WIDE.test(mark);
}

/**
 * Return whether a word follows punctuation without a space: ( and $ in any script, but not the € of "5 €".
 * @param {string} mark
 * @param {string} before the word before
 */
function opens(mark, before) {
  if (/^\p{Sc}$/u.test(mark)) return !DIGIT.test(lastCharacter(before));
  return OPENING.has(mark) || /^[\p{Ps}\p{Pi}]$/u.test(mark) || WIDE.test(mark);
}
