/* The editor: a textarea over a mirror of its text, whose spans have the colours that a textarea cannot have.

   Both have the same box and the same font, so each letter of the one lies on that of the other. The mirror's letters are
   transparent, and screen readers do not read it. */

import { element } from "./dom.js";

const SPELLED = { "``": '"', "''": '"', "<nl>": "\n", "<0x0A>": "\n" }; // Penn Treebank's quotes, and line breaks
const SPACE = /\u2581/g; // SentencePiece's sign for one, in tokens that are pieces of words
const CLINGS = /^(?:[.,;:!?%)\]}’…]|''$|'\p{L}|n't$|<nl>$)/u; // follows a word without a space
const OPENS = /(?:[([{“‘]|(?:^|\s)["'])$/; // no space follows
const WITHOUT_SPACES = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]/u;

const spelled = (token) => SPELLED[token] ?? token.replace(SPACE, " ");

/** Return a token as people read it alone. */
export const written = (token) => (spelled(token) === "\n" ? "↵" : spelled(token).trim() || token);

/** Return a text with a word after it, and the space between them that people write. */
function join(text, word) {
  if (CLINGS.test(word)) return text.replace(/ $/, "") + spelled(word);
  const dense = WITHOUT_SPACES.test(word) && WITHOUT_SPACES.test(text.slice(-1));
  return text + (!text || /\s$/.test(text) || OPENS.test(text) || dense ? "" : " ") + spelled(word);
}

export class Editor {
  /** `onToken(token)` is called with the token at the caret or under the pointer, where tokens are coloured. */
  constructor(textarea, mirror, onToken) {
    this.textarea = textarea;
    this.mirror = mirror;
    this.onToken = onToken;
    this.tokens = [];
    this.generated = null; // [start, end] of what the model wrote last
    textarea.addEventListener("input", () => this.changed());
    document.addEventListener("selectionchange", () => document.activeElement === textarea && this.report(this.atCaret()));
    textarea.addEventListener("mousemove", (event) => this.report(this.atPoint(event) ?? this.atCaret()));
    textarea.addEventListener("mouseleave", () => this.report(this.atCaret()));
  }

  get text() {
    return this.textarea.value;
  }

  get beforeCaret() {
    return this.text.slice(0, this.textarea.selectionStart);
  }

  /** Replace the text, with the caret at `caret`; `generated` is the range of it that the model wrote. */
  replace(text, { caret = text.length, generated = null } = {}) {
    this.textarea.value = text;
    this.textarea.setSelectionRange(caret, caret);
    this.changed(generated);
  }

  /** Put a word in the place of the selection and of the last `replaced` letters before it, and a space after it. */
  insert(word, replaced) {
    const before = join(this.text.slice(0, this.textarea.selectionStart - replaced), word);
    const after = this.text.slice(this.textarea.selectionEnd);
    const space = /^\s/.test(after) || /\s$/.test(before) || OPENS.test(before) || WITHOUT_SPACES.test(word) ? "" : " ";
    this.replace(before + space + after, { caret: before.length + space.length });
  }

  /** Put a piece of a word, with its own space if it has one, in the place of the selection. */
  insertPiece(piece) {
    const before = this.beforeCaret + (/^$|\s$/.test(this.beforeCaret) ? spelled(piece).replace(/^ /, "") : spelled(piece));
    this.replace(before + this.text.slice(this.textarea.selectionEnd), { caret: before.length });
  }

  /** Colour tokens of the text, each by the class of `classOf`; they stay as far as the text stays what it is now. */
  colour(tokens, classOf) {
    this.tokens = tokens;
    this.classOf = classOf;
    this.scored = this.text;
    this.draw();
    this.report(this.atCaret());
  }

  changed(generated = null) {
    this.generated = generated;
    if (this.tokens.length) {
      let same = 0;
      while (same < this.text.length && this.text[same] === this.scored[same]) same += 1;
      this.tokens = this.tokens.filter((token) => token.end <= same);
    }
    this.draw();
  }

  draw() {
    const { text, tokens } = this;
    const parts = [];
    let at = 0;
    const add = (start, end, className, number) => {
      const part = element("span", { className }, text.slice(start, end));
      if (number !== undefined) part.dataset.number = number;
      parts.push(text.slice(at, start), part);
      at = end;
    };
    tokens.forEach((token, number) => add(token.start, token.end, this.classOf(token), number));
    if (this.generated && !tokens.length) add(...this.generated, "generated");
    // The last span gives an empty last line its height, and shows the caret of the model.
    parts.push(text.slice(at), element("span", { className: "end" }, "\u200b"));
    this.mirror.replaceChildren(...parts);
  }

  report(token) {
    this.mirror.querySelector(".current")?.classList.remove("current");
    if (token) this.mirror.querySelector(`[data-number="${this.tokens.indexOf(token)}"]`).classList.add("current");
    if (token !== this.reported) this.onToken(token);
    this.reported = token;
  }

  atCaret() {
    const at = this.textarea.selectionStart;
    return this.tokens.findLast((token) => token.start <= at && at <= token.end);
  }

  atPoint({ clientX, clientY }) {
    const under = document.elementsFromPoint(clientX, clientY).find((part) => part.dataset.number);
    return under && this.tokens[under.dataset.number];
  }
}
