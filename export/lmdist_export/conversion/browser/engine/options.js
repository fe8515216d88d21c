/**
 * The options of a request, checked and resolved for a model, as lmdist_export/sampling/resolved_options.py does: the model's own
 * options with those of the request in them, and words as ids. Names, types, bounds and defaults are those of model.json, which
 * lmdist-export has written from the table of options.
 */

import { ByteStops, Stops } from "./stops.js";

/** @typedef {import("./vocabulary.js").Vocabulary} Vocabulary */
/** @typedef {import("./tokenizer.js").Tokenizer} Tokenizer */

/**
 * @typedef {object} Option a row of the table
 * @property {string} name
 * @property {"int" | "float" | "bool" | "list"} type
 * @property {any} default
 * @property {number | null} minimum
 * @property {number | null} maximum
 * @property {boolean} [includes_minimum]
 * @property {boolean} [includes_maximum]
 * @property {string} [bounds] the interval in words, where there is one
 * @property {string} help
 */

/**
 * @typedef {object} Resolved
 * @property {Record<string, any>} config the options of generation_config.json
 * @property {Stops | ByteStops} stops what ends a text and is not part of it
 * @property {boolean} ignoresEnd whether the end mark is a token as any other
 * @property {bigint} seed
 */

const UNKNOWN_ID = 0;
const MAX_BIAS = 1_000_000;
const EXPECTED = { int: "an integer", float: "a number", bool: "true or false", list: "a list of strings" };
const IS_TYPE = {
  int: Number.isInteger,
  float: (value) => typeof value === "number" && !Number.isNaN(value),
  bool: (value) => typeof value === "boolean",
  list: (value) => Array.isArray(value) && value.every((item) => typeof item === "string"),
};

/**
 * Return the options of a request; throws an Error with a sentence for what is wrong.
 * @param {Record<string, any>} options null and undefined count as not given
 * @param {{options: Option[], generation: Record<string, any>}} model
 * @param {Vocabulary} vocabulary
 * @param {Tokenizer} tokenizer
 * @returns {Resolved}
 */
export function resolve(options, model, vocabulary, tokenizer) {
  const given = Object.fromEntries(Object.entries(options).filter(([, value]) => value !== null && value !== undefined));
  const { seed, ...others } = given;
  for (const [name, value] of Object.entries(others)) check(name, value, model.options);
  const { stop = [], bad_words: badWords = [], logit_bias: biases = [], ignore_eos, allow_unk, ...values } = others;

  const config = { ...model.generation, ...values };
  if ("temperature" in values) config.do_sample = values.temperature > 0;
  if (allow_unk) config.suppress_tokens = config.suppress_tokens.filter((token) => token !== UNKNOWN_ID);
  const sequences = (name, texts) =>
    texts.flatMap((text) => spellingsOf(name, text, tokenizer).flatMap((words) => known(words, vocabulary)));
  config.bad_words_ids = [...config.bad_words_ids, ...sequences("bad_words", badWords)];
  config.sequence_bias = [...config.sequence_bias, ...biases.flatMap((text) => biasOf(text, vocabulary, tokenizer))];
  if ("min_new_tokens" in values && !("max_new_tokens" in values)) {
    config.max_new_tokens = Math.max(config.min_new_tokens, config.max_new_tokens);
  }
  if (config.min_new_tokens > config.max_new_tokens) {
    throw new Error(`min_new_tokens is ${config.min_new_tokens}; it must be from 0 to max_new_tokens, ${config.max_new_tokens}`);
  }
  const ids = sequences("stop", stop);
  const stops = tokenizer.pieces ? byteStops(stop, vocabulary, tokenizer) : new Stops(ids);
  return { config, stops, ignoresEnd: Boolean(ignore_eos), seed: seedOf(seed) };
}

/**
 * Throw an Error unless a value is of the type and within the bounds of its option.
 * @param {string} name
 * @param {any} value
 * @param {Option[]} options
 */
function check(name, value, options) {
  const option = options.find((row) => row.name === name);
  if (!option) throw new Error(`${name} is no option here; expected is one of ${options.map((row) => row.name).join(", ")}`);
  if (!IS_TYPE[option.type](value)) throw new Error(`${name} is ${JSON.stringify(value)}; ${EXPECTED[option.type]} is expected`);
  if (!option.bounds) return;
  const [low, high] = [option.minimum ?? -Infinity, option.maximum ?? Infinity];
  const within = (option.includes_minimum ? value >= low : value > low) && (option.includes_maximum ? value <= high : value < high);
  if (!within) throw new Error(`${name} is ${value}; it must be ${option.bounds}`);
}

/**
 * Return a seed, a random one where none is given.
 * @param {number | bigint | undefined} seed
 */
function seedOf(seed) {
  if (seed === undefined) return BigInt(crypto.getRandomValues(new Uint32Array(1))[0]);
  if (!Number.isInteger(seed) && typeof seed !== "bigint") throw new Error(`seed is ${seed}; an integer is expected`);
  if (typeof seed === "number" && !Number.isSafeInteger(seed)) {
    throw new Error(`seed is ${seed}; beyond ${Number.MAX_SAFE_INTEGER} a BigInt is expected`);
  }
  if (seed < 0 || seed >= 2n ** 64n) throw new Error(`seed is ${seed}; it must be from 0 to ${2n ** 64n - 1n}`);
  return BigInt(seed);
}

/**
 * Return how an option's text may be spelled; throws an Error for a text without words.
 * @param {string} name
 * @param {string} text
 * @param {Tokenizer} tokenizer
 */
function spellingsOf(name, text, tokenizer) {
  const spellings = tokenizer.spellings(text);
  if (!spellings[0].length) throw new Error(`${name} ${JSON.stringify(text)} has no words`);
  return spellings;
}

/**
 * Return stops of texts, which are looked for as the model writes them.
 * @param {string[]} texts
 * @param {Vocabulary} vocabulary
 * @param {Tokenizer} tokenizer
 */
function byteStops(texts, vocabulary, tokenizer) {
  const written = (/** @type {Uint8Array} */ bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  const contents = tokenizer.pieces?.contents;
  return new ByteStops(
    texts.map((text) => written(new TextEncoder().encode(tokenizer.cleaned(text)))),
    (token) => written(contents?.get(vocabulary.words[token]) ?? new Uint8Array()),
  );
}

/**
 * Return the ids of words, in a list, or nothing where one of them is not in the vocabulary: it is never generated.
 * @param {string[]} words
 * @param {Vocabulary} vocabulary
 */
function known(words, vocabulary) {
  return words.every((word) => vocabulary.has(word)) ? [vocabulary.encode(words)] : [];
}

/**
 * Return the ids, each in a list, and the bias of WORD=X, of a word in each of its spellings; none is of an unknown word.
 * @param {string} text
 * @param {Vocabulary} vocabulary
 * @param {Tokenizer} tokenizer
 */
function biasOf(text, vocabulary, tokenizer) {
  const [, word, number] = /^(.+)=\s*(-inf|[-+\d.e]+)\s*$/isu.exec(text) ?? [];
  const bias = number?.toLowerCase() === "-inf" ? -Infinity : Number(number);
  if (!word || !(bias === -Infinity || Math.abs(bias) <= MAX_BIAS)) {
    throw new Error(
      `logit_bias is ${JSON.stringify(text)}; WORD=X is expected with X from -1,000,000 to 1,000,000, or -inf, as in the=-2.5`,
    );
  }
  const words = vocabulary.has(word) || !tokenizer.pieces ? [[word]] : tokenizer.spellings(word);
  const known = words.filter((spelled) => spelled.length === 1 && vocabulary.has(spelled[0]));
  return known.map((spelled) => [vocabulary.encode(spelled), bias]);
}
