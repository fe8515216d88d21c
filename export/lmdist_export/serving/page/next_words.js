/* A keyboard's view of the model: the likeliest next words while somebody types, inserted by a click, or the first by Tab.

   Tab inserts only while somebody types. After Escape, and whenever the text is entered anew, it moves on as everywhere. */

import { element, inPercent } from "./dom.js";
import { written } from "./editor.js";

const SHOWN = 6;
const COMPLETIONS = 2; // of them at most, where what is typed is a word already
const LOOKED_AT = 19; // the likeliest words, of which those that complete an unfinished word are shown
const CONTEXT = 2000; // characters that the candidates depend on: the model reads them again for each letter
const END = "<eos>";
const BYTE = /^<0x(?!0A)/; // a piece that is no character
const UNFINISHED_WORD = /[\p{L}\p{N}'’-]+$/u;

/** Return the end of a text that the candidates depend on; where it can be, it begins between two words. */
export function contextOf(text) {
  if (text.length <= CONTEXT) return text;
  const end = text.slice(-CONTEXT).replace(/^[\uDC00-\uDFFF]/, ""); // half a character
  return end.slice(Math.max(0, end.slice(0, CONTEXT / 2).search(/\s/))); // Chinese and the like have hardly a space
}

/** Return [{word, probability, isPiece, replaced}] for what may follow a text: `replaced` letters at its end begin the word. */
export async function candidatesAfter(text, engine, signal) {
  const context = contextOf(text);
  const unfinished = UNFINISHED_WORD.exec(context)?.[0] ?? "";
  const replaced = unfinished.length;
  const [following, others] = await Promise.all([
    engine.nextWords(context, LOOKED_AT, signal),
    unfinished ? engine.nextWords(context.slice(0, -replaced), LOOKED_AT, signal) : [],
  ]);
  const isPiece = engine.model.tokens_have_spaces;
  const next = following
    .filter(({ word }) => word !== END && !BYTE.test(word))
    .map((candidate) => ({ ...candidate, isPiece, replaced: 0 }));
  if (isPiece) return next.slice(0, SHOWN);
  const completing = others
    .filter(({ word }) => word.length > replaced && word.startsWith(unfinished))
    .map((candidate) => ({ ...candidate, replaced }));
  const isWord = !completing.length || others.some(({ word }) => word === unfinished);
  if (!isWord) return completing.slice(0, SHOWN);
  return [...next.slice(0, SHOWN - Math.min(completing.length, COMPLETIONS)), ...completing.slice(0, COMPLETIONS)];
}

export class NextWords {
  /** `onChoice(candidate)` is called with the one that was chosen. */
  constructor(place, onChoice) {
    this.place = place;
    this.onChoice = onChoice;
    this.candidates = null; // until they are known
    this.tabInserts = false;
    this.tabWaits = false; // Tab was pressed before the candidates were known
    // The text keeps the focus: nothing moves under the pointer, and a phone's keyboard stays.
    place.addEventListener("mousedown", (event) => event.preventDefault());
  }

  /** The text has changed: what is shown belongs to another one. */
  expire() {
    this.candidates = null;
    this.tabWaits = false;
    this.place.classList.add("old");
  }

  show(candidates) {
    this.candidates = candidates;
    this.place.replaceChildren(
      ...candidates.map((candidate) => {
        const share = element("small", {}, inPercent(candidate.probability));
        const chip = element("button", { type: "button", className: "word" }, written(candidate.word), " ", share);
        chip.style.setProperty("--share", candidate.probability);
        chip.addEventListener("click", () => this.onChoice(candidate));
        return chip;
      }),
    );
    this.place.classList.remove("old");
    if (this.tabWaits && candidates.length) this.onChoice(candidates[0]);
  }

  setTab(inserts) {
    this.tabInserts = inserts;
    this.tabWaits &&= inserts;
    this.place.classList.toggle("tab", inserts);
  }

  /** Insert by Tab; return whether it did, or will. */
  tab() {
    if (!this.tabInserts || this.candidates?.length === 0) return false;
    if (this.candidates) this.onChoice(this.candidates[0]);
    else this.tabWaits = true;
    return true;
  }

  get sentence() {
    return this.candidates?.length ? `Next words: ${this.candidates.map(({ word }) => written(word)).join(", ")}.` : "";
  }
}
