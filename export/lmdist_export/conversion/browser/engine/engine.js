/**
 * The engine of the page without a server: a model that generates, predicts and scores text where it runs.
 *
 *     const engine = await createEngine(ort, read);        // read(name) returns the bytes of a file of the folder model/
 *     for await (const { text } of engine.generate({ prompt, options: { seed: 7 } })) show(text);
 *
 * The same options and the same seed give the text of lmdist-generate. Errors are sentences for people. Nothing here knows a
 * browser, so it runs in Node too.
 */

import { Detokenizer } from "./detokenizer.js";
import { ANYTHING, Text, grow } from "./generation.js";
import { Model } from "./model.js";
import { resolve } from "./options.js";
import { spansOf } from "./spans.js";
import { Tokenizer } from "./tokenizer.js";
import { Vocabulary } from "./vocabulary.js";

const UNKNOWN_ID = 0;
const END_ID = 1;
const READ_STATES = 4; // that nextWords keeps: while somebody types, most of the text was read before

/**
 * Return the engine of a model.
 * @param {any} ort onnxruntime-web, or another onnxruntime with its interface
 * @param {(name: string) => Promise<Uint8Array>} read
 */
export async function createEngine(ort, read) {
  const decoded = async (name) => new TextDecoder().decode(await read(name));
  const [about, text, vocabulary, weights] = await Promise.all([
    decoded("model.json").then(JSON.parse),
    decoded("text.json").then(JSON.parse),
    decoded("vocab.txt").then((lines) => new Vocabulary(lines)),
    read("weights.bin"),
  ]);
  return new Engine(new Model(ort, about, weights, read), about, vocabulary, new Tokenizer(text, vocabulary.words));
}

class Engine {
  /**
   * @param {Model} model
   * @param {any} about of model.json
   * @param {Vocabulary} vocabulary
   * @param {Tokenizer} tokenizer
   */
  constructor(model, about, vocabulary, tokenizer) {
    this.network = model;
    this.about = about;
    this.vocabulary = vocabulary;
    this.tokenizer = tokenizer;
    const tokens_have_spaces = tokenizer.pieces !== null || tokenizer.settings.tokenizer === "characters";
    this.model = { name: about.name, ...about.sizes, tokens_have_spaces, options: about.options };
    /** @type {{seen: number[], state: import("./model.js").State}[]} the last token of a state is to be read; the newest last */
    this.states = [];
  }

  /**
   * Yield the pieces of a text that continues a prompt, with their spaces; the last has a finish_reason.
   * @param {{prompt: string, options?: Record<string, any>, signal?: AbortSignal}} request
   */
  async *generate({ prompt, options = {}, signal }) {
    const resolved = resolve(options, this.about, this.vocabulary, this.tokenizer);
    const words = this.tokenizer.words(prompt, { continues: true });
    const writer = this.tokenizer.pieces?.writer() ?? new Detokenizer(this.tokenizer.settings.tokenizer);
    const seam = this.tokenizer.pieces?.seamOf(words, prompt.endsWith(" ")) ?? null;
    const kept = seam?.again ? words.slice(0, -1) : words; // a piece that may go on is taken back
    for (const word of kept) writer.piece(word);
    let given = seam?.given ?? ""; // of the first piece
    const text = new Text(this.vocabulary.encode(kept), resolved, this.beginOf(seam));
    for await (const tokens of grow(this.network, text, resolved.seed)) {
      signal?.throwIfAborted();
      if (given && text.prompt.length > kept.length) {
        writer.piece(words[kept.length]); // it has come again
        given = "";
      }
      const pieces = tokens.map((token) => writer.piece(this.vocabulary.words[token]));
      if (tokens.length) {
        if (pieces[0].startsWith(given)) pieces[0] = pieces[0].slice(given.length);
        given = "";
      }
      if (text.finishReason) pieces.push(writer.end(text.rest));
      yield { text: pieces.join(""), finish_reason: text.finishReason || null };
      await paused();
    }
  }

  /**
   * Return what a text begins with, in ids.
   * @param {ReturnType<import("./pieces.js").Pieces["seamOf"]>} seam
   * @returns {import("./generation.js").Begin}
   */
  beginOf(seam) {
    if (!seam) return ANYTHING;
    const again = seam.again === null ? null : this.vocabulary.encode([seam.again])[0];
    return { tokens: this.vocabulary.encode(seam.words), overlap: seam.overlap, again };
  }

  /**
   * Return the `k` most likely words after a text, the best first, never <unk>; <eos> is the end of the text.
   * @param {string} prompt
   * @param {number} k
   * @param {AbortSignal} [signal]
   */
  async nextWords(prompt, k, signal) {
    const ids = this.vocabulary.encode(this.tokenizer.words(prompt, { continues: true }));
    const logits = await this.network.inTurn(async () => {
      signal?.throwIfAborted();
      return (await this.network.step(await this.read([END_ID, ...ids]))).logits;
    });
    const total = logSumExp(logits);
    return likeliest(logits, k).map((id) => ({ word: this.vocabulary.words[id], probability: Math.exp(logits[id] - total) }));
  }

  /**
   * Return the tokens of a text and their log-probabilities in nats; the text begins after an end mark.
   * @param {string} text
   * @param {AbortSignal} [signal]
   */
  async score(text, signal) {
    const words = this.tokenizer.words(text);
    const ids = this.vocabulary.encode(words);
    const spans = spansOf(text, words, this.tokenizer);
    const scored = [];
    // The logits after a token are those of the next: the last token is not read.
    for await (const logits of this.network.logitsAfter([END_ID, ...ids].slice(0, ids.length))) {
      signal?.throwIfAborted();
      const [place, id] = [scored.length, ids[scored.length]];
      const [start, end] = spans[place];
      const log_probability = logits[id] - logSumExp(logits);
      scored.push({ token: words[place], start, end, log_probability, unknown: id === UNKNOWN_ID });
    }
    return scored;
  }

  /**
   * Return what does the same in a program, by language.
   * @param {{prompt: string, options: Record<string, any>}} request
   */
  snippets({ prompt, options }) {
    const values = Object.entries(options).map(([name, value]) => `, ${name}=${python(value)}`);
    return {
      python:
        "import lmdist\n\n" +
        `model = lmdist.load("bundles/${this.about.name}")  # by lmdist-export, without --layout web\n` +
        `print(model.generate(${JSON.stringify(prompt)}${values.join("")}).text)`,
    };
  }

  /**
   * Return the state of a text whose last token is still to be read; what was read before is not read again.
   * @param {number[]} tokens
   */
  async read(tokens) {
    const kept = this.states.filter(({ seen }) => seen.length <= tokens.length && seen.every((id, place) => id === tokens[place]));
    const { seen, state } = kept.reduce((one, other) => (other.seen.length > one.seen.length ? other : one), {
      seen: tokens.slice(0, 1),
      state: this.network.start(tokens.slice(0, 1)),
    });
    const whole = { ...state, tokens: [...state.tokens, ...tokens.slice(seen.length)] };
    const read = await this.network.prefill(whole, this.about.generation);
    this.states = [...this.states.slice(1 - READ_STATES), { seen: tokens, state: read }];
    return read;
  }
}

/**
 * Return the ids of the `k` largest logits, the largest first, of equal ones the lower id first; never that of <unk>.
 * @param {Float32Array} logits
 * @param {number} k
 */
function likeliest(logits, k) {
  /** @type {number[]} */
  const best = [];
  logits.forEach((logit, id) => {
    if (id === UNKNOWN_ID || (best.length === k && logit <= logits[best[k - 1]])) return;
    const place = best.findIndex((other) => logits[other] < logit);
    best.splice(place < 0 ? best.length : place, 0, id);
    best.length = Math.min(best.length, k);
  });
  return best;
}

/** Let the browser show what has changed, and hear who stops. */
function paused() {
  return new Promise((resolve) => setTimeout(resolve));
}

/**
 * Return the logarithm of the sum of exponentials.
 * @param {Float32Array} logits
 */
function logSumExp(logits) {
  const largest = logits.reduce((one, other) => Math.max(one, other));
  return largest + Math.log(logits.reduce((sum, logit) => sum + Math.exp(logit - largest), 0));
}

/** @param {any} value */
function python(value) {
  return typeof value === "boolean" ? (value ? "True" : "False") : JSON.stringify(value);
}
