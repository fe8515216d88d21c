/* The editor: a textarea over a mirror of its text, whose spans have the colours that a textarea cannot have.

   Both have the same box and the same font, so each letter of the one lies on that of the other. The mirror's letters are
   transparent, and screen readers do not read it. */

const LEVELS = [1, 3, 6, 9, 12]; // bits of surprisal at which the next colour begins
const WRITTEN = { "``": '"', "''": '"' }; // quotes as Penn Treebank's tokens
const CLINGS = /^(?:[.,;:!?%)\]}’…]|''$|'\p{L}|n't$)/u; // follows a word without a space
const OPENS = /(?:[([{“‘]|(?:^|\s)["'])$/; // no space follows
const WITHOUT_SPACES = /[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}\p{Script=Thai}]/u;

export const bits = (token) => -token.log_probability / Math.LN2;
export const levels = [0, ...LEVELS];
export const levelOf = (token) => LEVELS.filter((least) => bits(token) >= least).length;
export const written = (word) => WRITTEN[word] ?? word;

/** Return a text with a word, or with a first piece of more text, after it: with the space between them that people write. */
export function join(text, word) {
  if (/^\s/.test(word)) return /\s$/.test(text) ? text + word.trimStart() : text + word;
  if (CLINGS.test(word)) return text.replace(/ $/, "") + written(word);
  const together = !text || /\s$/.test(text) || OPENS.test(text) || (WITHOUT_SPACES.test(word) && WITHOUT_SPACES.test(text.slice(-1)));
  return text + (together ? "" : " ") + written(word);
}

function span(className, text, number) {
  const made = document.createElement("span");
  made.className = className;
  made.textContent = text;
  if (number !== undefined) made.dataset.number = number;
  return made;
}

export class Editor {
  /** `onToken(token)` is called with the token at the caret or under the pointer, where tokens are shown. */
  constructor(textarea, mirror, onToken) {
    this.textarea = textarea;
    this.mirror = mirror;
    this.onToken = onToken;
    this.tokens = [];
    this.generated = null; // [start, end] of the text that was generated last
    this.growing = false;
    textarea.addEventListener("input", () => this.changed());
    document.addEventListener("selectionchange", () => document.activeElement === textarea && this.report(this.atCaret()));
    textarea.addEventListener("mousemove", (event) => this.report(this.atPoint(event) ?? this.atCaret()));
    textarea.addEventListener("mouseleave", () => this.report(this.atCaret()));
  }

  get text() {
    return this.textarea.value;
  }

  /** Replace the text, with the caret at its end; `generated` is the range of it that the model wrote. */
  replace(text, generated = null) {
    this.textarea.value = text;
    this.textarea.setSelectionRange(text.length, text.length);
    this.changed(generated);
  }

  get beforeCaret() {
    return this.text.slice(0, this.textarea.selectionStart);
  }

  /** Put a word in the place of the last `replaced` letters before the caret. */
  insert(word, replaced) {
    const { selectionStart, selectionEnd } = this.textarea;
    const before = join(this.text.slice(0, selectionStart - replaced), word);
    const after = this.text.slice(selectionEnd);
    const space = /^\s/.test(after) || OPENS.test(before) || WITHOUT_SPACES.test(word) ? "" : " ";
    this.textarea.value = before + space + after;
    this.textarea.setSelectionRange(before.length + space.length, before.length + space.length);
    this.changed();
  }

  /** Colour the tokens of the text, or none; they are valid as far as the text stays as it was scored. */
  colour(tokens) {
    this.tokens = tokens;
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
    const { text, tokens, generated } = this;
    const parts = [];
    let at = 0;
    const add = (start, end, className, number) => {
      if (start > at) parts.push(text.slice(at, start));
      parts.push(span(className, text.slice(start, end), number));
      at = end;
    };
    tokens.forEach((token, number) =>
      add(token.start, token.end, `token level-${levelOf(token)}${token.unknown ? " unknown" : ""}`, number),
    );
    if (generated && !tokens.length) add(generated[0], generated[1], "generated");
    parts.push(text.slice(at), span(this.growing ? "caret" : "", "\u200b")); // which gives an empty last line its height
    this.mirror.replaceChildren(...parts);
  }

  report(token) {
    if (token === this.reported) return;
    this.mirror.querySelector(".current")?.classList.remove("current");
    if (token) this.mirror.querySelector(`[data-number="${this.tokens.indexOf(token)}"]`)?.classList.add("current");
    this.reported = token;
    this.onToken(token);
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
