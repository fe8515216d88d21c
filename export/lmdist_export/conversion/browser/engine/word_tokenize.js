/**
 * The words that NLTK's word_tokenize finds, by its rules: a text's sentences by Punkt (Kiss and Strunk 2006), with the parameters
 * that it learned from the training text, then the words of each by the rules of the Penn Treebank as NLTK 3.10 has them.
 *
 * Whitespace is BLANK to most of NLTK's regular expressions. NLTK (https://www.nltk.org, Apache 2.0) is the definition;
 * tests/conversion/test_browser_text.py compares the words.
 */

import { BLANK, SPACE, split, withoutTrailingSpace } from "./characters.js";

/**
 * @typedef {object} Punkt what was learned from the training text
 * @property {string[]} abbreviations
 * @property {string[][]} collocations
 * @property {string[]} sentence_starters
 * @property {Record<string, number>} contexts how a word was written where, as bits
 */

// --- words -----------------------------------------------------------------------------------------------------------

/** What \w is to NLTK's regular expressions, those of the package regex. */
const W = "[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]";
const START = `(?<!${W})`; // of a word
const STOP = `(?!${W})`;
const TEXT_END = "(?![^])";

/** Contractions that are two words. */
const TWO_WORDS = [
  ...["can not", "d 'ye", "gim me", "gon na", "got ta", "lem me", "more 'n"].map((pair) => pair.split(" ")),
].map(([first, second]) => new RegExp(`${START}(${first})(${second})${STOP}`, "giu"));

/** @type {[RegExp, string][]} what is replaced by what, in this order */
const BEFORE = [
  // Quotes that open.
  [/([«“‘„]|`+)/gu, " $1 "],
  [/^"/u, "``"],
  [/``/gu, " `` "],
  [/([ ([{<])(?:"|'')/gu, "$1 `` "],
  [new RegExp(`${START}'(?!(?:re|ve|ll|m|t|s|d|n)${STOP})(?=${W})`, "giu"), "' "],
  // Punctuation; the first of these is the last full stop.
  [new RegExp(`([^.])\\.([\\])}>"'»”’ ]*)[${BLANK}]*$`, "u"), "$1 . $2 "],
  [/([:,])(\P{Nd})/gu, " $1 $2"],
  [new RegExp(`([:,])(?=\\n?${TEXT_END})`, "gu"), " $1 "],
  [/\.{2,}/gu, " $& "],
  [/[;@#$%&]/gu, " $& "],
  [/[\u2012-\u2015]/gu, " $& "],
  [new RegExp(`([^.])\\.([\\])}>"']*)[${BLANK}]*$`, "u"), "$1 .$2 "],
  [/[?!]/gu, " $& "],
  [/([^'])' /gu, "$1 ' "],
  [/\*/gu, " $& "],
  [/[\][(){}<>]/gu, " $& "],
  [/--/gu, " -- "],
];
/** @type {[RegExp, string][]} the same, once there is a space at both ends */
const AFTER = [
  // Quotes that close.
  [/[»”’]/gu, " $& "],
  [/''/gu, " '' "],
  [/"/gu, " '' "],
  [new RegExp(`[${BLANK}]+`, "gu"), " "],
  [/([^' ])('[sSmMdD]|') /gu, "$1 $2 "],
  [/([^' ])('ll|'LL|'re|'RE|'ve|'VE|n't|N'T) /gu, "$1 $2 "],
  ...TWO_WORDS.map((pattern) => /** @type {[RegExp, string]} */ ([pattern, " $1 $2 "])),
  [new RegExp(`${START}(wan)(na)(?=[${SPACE}])`, "giu"), " $1 $2 "],
  [new RegExp(` ('t)(is)${STOP}`, "giu"), " $1 $2 "],
  [new RegExp(` ('t)(was)${STOP}`, "giu"), " $1 $2 "],
];

/**
 * Return the words of a sentence.
 * @param {string} sentence
 */
function wordsOf(sentence) {
  const replaced = (/** @type {string} */ text, /** @type {[RegExp, string]} */ [pattern, by]) => text.replace(pattern, by);
  return split(AFTER.reduce(replaced, ` ${BEFORE.reduce(replaced, sentence)} `));
}

// --- sentences ---------------------------------------------------------------------------------------------------------

const ENDS = ".?!";
const NOT_IN_WORDS = "[)\";}\\]*:@'({[‘’“”«»?!]";
const S = `[${BLANK}]`;
const NOT_SPACE = `[^${BLANK}]`;
const SEVERAL = `(?:-{2,}|\\.{2,}|(?:\\.${S}){2,}\\.)`;
const WORD_END = `(?=${S}|$|${NOT_IN_WORDS}|${SEVERAL}|,(?=$|${S}|${NOT_IN_WORDS}|${SEVERAL}))`;
const TOKEN = new RegExp(`${SEVERAL}|(?=[^("\`{[:;&#*@)}\\]\\-,])${NOT_SPACE}+?${WORD_END}|${NOT_SPACE}`, "gu");
/** What may end a sentence; what follows it is `after`, and if that is a word after whitespace, `next`. */
const CANDIDATE = new RegExp(`[.?!](?=(?<after>${NOT_IN_WORDS}|${S}+(?<next>${NOT_SPACE}+)))`, "dgu");
/** Brackets and quotes after the end of a sentence, which belong to it. */
const CLOSING = new RegExp(`["')\\]}‘’“”«»]+?(?:${S}+|(?=--)|(?=\\n|${TEXT_END}))`, "uy");

const NUMBER = /^-?[.,]?\p{Nd}[\p{Nd},.-]*\.?$/u;
const INITIAL = /^[\p{Alphabetic}\p{M}\p{Pc}\p{Join_Control}]\.$/u;
// The bits of a word's contexts.
const UPPER_INSIDE = 1 << 2;
const LOWER_FIRST = 1 << 4;
const UPPER = (1 << 1) | UPPER_INSIDE | (1 << 3);
const LOWER = LOWER_FIRST | (1 << 5) | (1 << 6);

/** A token of the text around a possible end of a sentence. */
class Token {
  /**
   * @param {string} text
   * @param {Set<string>} abbreviations
   */
  constructor(text, abbreviations) {
    this.text = text;
    const lower = text.toLowerCase();
    this.type = NUMBER.test(lower) ? "##number##" : lower;
    this.isInitial = INITIAL.test(text);
    this.isEllipsis = /^\.\.+$/u.test(text);
    const body = lower.slice(0, -1);
    const mayEnd = text.endsWith(".") && !text.endsWith("..") && text !== ".";
    this.isAbbreviation = mayEnd && (abbreviations.has(body) || abbreviations.has(body.slice(body.lastIndexOf("-") + 1)));
    /** Whether a sentence ends with it. */
    this.ends = [...ENDS].includes(text) || (mayEnd && !this.isAbbreviation);
  }

  get typeWithoutStop() {
    return this.type.length > 1 && this.type.endsWith(".") ? this.type.slice(0, -1) : this.type;
  }

  get typeInSentence() {
    return this.ends ? this.typeWithoutStop : this.type;
  }

  get isUpper() {
    return /^\p{Uppercase}/u.test(this.text);
  }

  get isLower() {
    return /^\p{Lowercase}/u.test(this.text);
  }
}

/** Finds the words that NLTK finds. */
export class WordFinder {
  /** @param {Punkt | null} punkt without it a text is one sentence */
  constructor(punkt) {
    this.hasSentences = punkt !== null;
    this.abbreviations = new Set(punkt?.abbreviations);
    this.collocations = new Set(punkt?.collocations.map((pair) => pair.join("\0")));
    this.starters = new Set(punkt?.sentence_starters);
    this.contexts = new Map(Object.entries(punkt?.contexts ?? {}));
  }

  /**
   * Return the words of a text.
   * @param {string} text
   */
  words(text) {
    return (this.hasSentences ? this.sentences(text) : [text]).flatMap(wordsOf);
  }

  /**
   * Return the sentences of a text.
   * @param {string} text
   */
  sentences(text) {
    const parts = [];
    let start = 0;
    for (const { stop, next, context } of candidates(text)) {
      if (!this.hasBreak(context)) continue;
      parts.push([start, stop]);
      start = next;
    }
    parts.push([start, withoutTrailingSpace(text).length]);

    const sentences = [];
    let moved = 0; // how much of a sentence belongs to the one before
    parts.forEach(([from, stop], place) => {
      const following = parts[place + 1];
      CLOSING.lastIndex = 0;
      const closing = following && CLOSING.exec(text.slice(...following))?.[0];
      sentences.push(text.slice(from + moved, closing ? following[0] + withoutTrailingSpace(closing).length : stop));
      moved = closing ? closing.length : 0;
    });
    return sentences.filter(Boolean);
  }

  /**
   * Return whether a sentence ends in a text: the word before a possible end, the end, and what follows.
   * @param {string} context
   */
  hasBreak(context) {
    const lines = context.split("\n").filter((line) => split(line).length);
    const tokens = lines.flatMap((line) => line.match(TOKEN) ?? []).map((text) => new Token(text, this.abbreviations));
    // The last token can end none. The one after is as it was found: whether it ends a sentence itself is decided later.
    return tokens.slice(0, -1).some((token, place) => this.endsBefore(token, tokens[place + 1]));
  }

  /**
   * Return whether a sentence ends between two tokens.
   * @param {Token} token
   * @param {Token} next
   */
  endsBefore(token, next) {
    if (!token.text.endsWith(".")) return token.ends;
    const type = token.typeWithoutStop;
    if (this.collocations.has(`${type}\0${next.typeInSentence}`)) return false;
    const begins = this.beginsSentence(next);
    let ends = token.ends;
    if ((token.isAbbreviation || token.isEllipsis) && !token.isInitial) {
      if (begins === true || (next.isUpper && this.starters.has(next.typeInSentence))) return true;
    }
    if (token.isInitial || type === "##number##") {
      const alwaysUpper = next.isUpper && !(this.context(next) & LOWER);
      if (begins === false || (begins === null && token.isInitial && alwaysUpper)) ends = false;
    }
    return ends;
  }

  /**
   * Return whether a token begins a sentence, by how it is written here and was in the training text; null if that is unknown.
   * @param {Token} token
   */
  beginsSentence(token) {
    if (/^[;:,.!?]$/.test(token.text)) return false;
    const context = this.context(token);
    if (token.isUpper && context & LOWER && !(context & UPPER_INSIDE)) return true;
    if (token.isLower && (context & UPPER || !(context & LOWER_FIRST))) return false;
    return null;
  }

  /** @param {Token} token */
  context(token) {
    return this.contexts.get(token.typeInSentence) ?? 0;
  }
}

/**
 * Yield where a sentence may end, where the next one would begin, and the text that decides it. Of several marks behind one word
 * only the last counts.
 * @param {string} text
 */
function* candidates(text) {
  let before = { start: 0, stop: 0 }; // the word before the last mark
  let found = null;
  for (const match of text.matchAll(CANDIDATE)) {
    const space = text.slice(before.stop, match.index).search(/[ \t\n\r\v\f][^ \t\n\r\v\f]*$/);
    const word = { start: space > 0 ? before.stop + space + 1 : before.start, stop: match.index };
    if (found && before.stop <= word.start) yield found;
    const stop = match.index + 1;
    const context = text.slice(word.start, stop) + match.groups?.after;
    found = { stop, next: match.indices?.groups?.next?.[0] ?? stop, context };
    before = word;
  }
  if (found) yield found;
}
