/**
 * A text that grows, as lmdist_export/sampling/generation.py does: from a prompt's ids to new ones, until it ends.
 *
 * Most options are in the graph. What depends on sequences of tokens (no_repeat_ngram_size, bad words, min_new_tokens) is computed
 * here before each token and enters the graph as a bias. This module knows ids only.
 */

import { PREFILL_TOKENS } from "./model.js";
import { RandomNumbers } from "./random.js";

/** @typedef {import("./model.js").Model} Model */
/** @typedef {import("./options.js").Resolved} Resolved */

/**
 * @typedef {object} Begin what a text begins with, as lmdist_export/sampling/seams.py has it
 * @property {number[]} tokens the first one is one of these; of none, any
 * @property {number} overlap the bytes of it that the prompt has already
 * @property {number | null} again the one that was taken back from the prompt: where it comes again it is no part of the text
 */

/** @type {Begin} */
export const ANYTHING = { tokens: [], overlap: 0, again: null };

const TOKENS_PER_CALL = 32;
const STREAM_MILLISECONDS = 20; // tokens of so short a time are shown together

/** A text that continues a prompt. */
export class Text {
  /**
   * @param {number[]} prompt
   * @param {Resolved} resolved
   * @param {Begin} [begin]
   */
  constructor(prompt, { config, stops, ignoresEnd }, begin = ANYTHING) {
    this.prompt = prompt;
    this.begin = begin;
    this.config = config;
    this.stops = stops;
    /** The tokens that end a text by themselves. */
    this.end = ignoresEnd ? [] : [config.eos_token_id];
    /** @type {number[]} without the end mark or the stop that ended the text */
    this.tokens = [];
    /** The bytes that a text of pieces has of the token in which a stop began. */
    this.rest = new Uint8Array();
    /** stop, length, exhausted, or "" while it grows */
    this.finishReason = "";
    /** @type {Map<string, number[]>} the tokens that followed each sequence of n - 1 tokens */
    this.ngrams = new Map();
    this.numIndexed = 0;
  }

  /**
   * Append new tokens up to where the text ends; return those that are certain to stay.
   * @param {number[]} tokens
   */
  append(tokens) {
    if (!this.tokens.length && tokens.length && tokens[0] === this.begin.again) {
      this.prompt = [...this.prompt, tokens[0]];
      this.begin = ANYTHING;
      tokens = tokens.slice(1);
    }
    const shown = this.tokens.length - this.stops.numHeldBack(this.tokens, this.begin.overlap);
    for (const token of tokens) {
      if (this.end.includes(token)) this.finishReason = "stop";
      else this.tokens.push(token);
      const stop = this.finishReason ? null : this.stops.ending(this.tokens, this.begin.overlap);
      if (stop) {
        this.tokens.splice(-stop.count);
        this.rest = stop.rest;
        this.finishReason = "stop";
      } else if (!this.finishReason && this.tokens.length === this.config.max_new_tokens) this.finishReason = "length";
      if (this.finishReason) break;
    }
    const heldBack = this.finishReason ? 0 : this.stops.numHeldBack(this.tokens, this.begin.overlap);
    return this.tokens.slice(shown, this.tokens.length - heldBack);
  }

  /** @param {number} count the last tokens, those of the prompt included */
  last(count) {
    const tokens = this.tokens.slice(Math.max(0, this.tokens.length - count));
    return [...this.prompt.slice(Math.max(0, this.prompt.length - (count - tokens.length))), ...tokens];
  }

  get mayEnd() {
    return this.tokens.length >= this.config.min_new_tokens;
  }

  /** Return the tokens that must not come next: they would end the text too early, repeat an n-gram, or complete a bad one. */
  banned() {
    const { no_repeat_ngram_size: size, bad_words_ids: bad } = this.config;
    const completes = (sequence) => this.last(sequence.length - 1).join() === sequence.slice(0, -1).join();
    const banned = [
      ...(this.mayEnd ? [] : this.end),
      ...(size ? this.bannedByNgrams(size) : []),
      ...bad.filter((sequence) => sequence.length > 1 && completes(sequence)).map((sequence) => sequence.at(-1)),
    ];
    return banned.filter((token) => this.tokens.length || token !== this.begin.again);
  }

  /**
   * Return the tokens that would complete an n-gram that the text has; only those since the last call are indexed.
   * @param {number} size
   */
  bannedByNgrams(size) {
    const length = this.prompt.length + this.tokens.length;
    const tokens = this.last(length - this.numIndexed + size - 1);
    for (let start = 0; start + size <= tokens.length; start++) {
      const before = tokens.slice(start, start + size - 1).join();
      this.ngrams.set(before, [...(this.ngrams.get(before) ?? []), tokens[start + size - 1]]);
    }
    this.numIndexed = length;
    return this.ngrams.get(this.last(size - 1).join()) ?? [];
  }

  /** Return how many tokens one call can give: the text becomes not too long, nor may end where it must not. */
  mostTokens() {
    const { max_new_tokens: longest, min_new_tokens: shortest } = this.config;
    return (this.mayEnd ? longest : Math.min(longest, shortest)) - this.tokens.length;
  }
}

/**
 * Yield new tokens, a list after each call of the graph, until the text has a finish reason.
 * @param {Model} model
 * @param {Text} text
 * @param {bigint} seed
 * @returns {AsyncGenerator<number[]>}
 */
export async function* grow(model, text, seed) {
  const { config, prompt, end } = text;
  const isByToken = config.no_repeat_ngram_size > 0 || config.bad_words_ids.some((sequence) => sequence.length > 1);
  const hasRowBias = isByToken || (config.min_new_tokens > 0 && end.length > 0);
  const bias = fixedBias(config, model);
  const attempts = model.attemptsOf(config);
  const random = new RandomNumbers(seed, [0, ...prompt]);
  const inPrompt = new Uint8Array(model.padded);
  for (const token of prompt) inPrompt[token] = 1;
  const extras = { stops: [...end, ...text.stops.tokens], bias, inPrompt };
  let state = model.start([config.bos_token_id, ...prompt]);
  if (state.tokens.length > PREFILL_TOKENS + 1) {
    const whole = state;
    state = await model.inTurn(() => model.prefill(whole, config));
  }
  let perCall = 1;
  let isFirst = text.begin.tokens.length > 0;
  while (!text.finishReason) {
    const started = performance.now();
    const rowBias = hasRowBias ? maskOf(text.banned(), model.padded) : undefined;
    const allowed = isFirst ? only(text.begin, bias, model.size) : bias;
    if ((rowBias || isFirst) && isExhausted(allowed, rowBias ?? allowed, model.size)) {
      text.finishReason = "exhausted";
      yield text.append([]);
      return;
    }
    const uniform = random.next(Math.min(perCall, text.mostTokens()) * attempts);
    const before = state;
    const found = await model.inTurn(() => model.generate(before, config, uniform, { ...extras, bias: allowed, rowBias }));
    random.giveBack(uniform.slice(found.tokens.length * attempts));
    state = found.state;
    if (!isByToken) {
      const fitting = Math.floor((STREAM_MILLISECONDS / (performance.now() - started)) * found.tokens.length);
      perCall = Math.max(1, Math.min(TOKENS_PER_CALL, fitting));
    }
    const added = text.append(found.tokens);
    if (text.prompt.length > prompt.length && isFirst) {
      inPrompt[text.prompt[prompt.length]] = 1;
      state = { ...state, counts: undefined }; // what came again was in the prompt
    }
    isFirst = false;
    yield added;
  }
}

/**
 * Return what is added to the logits (V') of every token: -inf for one that is never generated.
 * @param {Record<string, any>} config
 * @param {Model} model
 */
function fixedBias(config, model) {
  const bias = new Float32Array(model.padded);
  for (const [[token], value] of config.sequence_bias) bias[token] += Math.fround(value);
  for (const token of config.suppress_tokens) bias[token] = -Infinity;
  for (const sequence of config.bad_words_ids) if (sequence.length === 1) bias[sequence[0]] = -Infinity;
  if (isExhausted(bias, bias, model.size)) {
    throw new Error("no token is left to sample: suppress_tokens, bad words and logit bias mask all of them");
  }
  return bias;
}

/**
 * Return a bias (V') with which a text begins as it must, with one of the first `size` tokens. The one that was taken back from
 * its prompt is never forbidden: where it comes again, it is not generated.
 * @param {Begin} begin
 * @param {Float32Array} bias
 * @param {number} size
 */
function only({ tokens, again }, bias, size) {
  const found = bias.slice().fill(-Infinity, 0, size);
  for (const token of tokens) found[token] = token === again && bias[token] === -Infinity ? 0 : bias[token];
  return found;
}

/**
 * Return -Infinity for some tokens and 0 for all others, (V').
 * @param {number[]} tokens
 * @param {number} padded
 */
function maskOf(tokens, padded) {
  const mask = new Float32Array(padded);
  for (const token of tokens) mask[token] = -Infinity;
  return mask;
}

/**
 * Return whether two biases leave no token of the first `size` that can be sampled.
 * @param {Float32Array} bias
 * @param {Float32Array} other
 * @param {number} size
 */
function isExhausted(bias, other, size) {
  for (let token = 0; token < size; token++) if (bias[token] + other[token] !== -Infinity) return false;
  return true;
}
