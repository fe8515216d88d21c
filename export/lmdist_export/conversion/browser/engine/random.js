/**
 * The random numbers of lmdist-generate, number for number: those of numpy's
 * `default_rng(SeedSequence(seed, spawn_key=key)).random(count, float32)`.
 *
 * A SeedSequence mixes seed and key into a pool of 128 bits (O'Neill 2015, "Developing a seed_seq alternative"). The generator is
 * PCG64: a linear congruential one of 128 bits whose output is XSL-RR (O'Neill 2014, "PCG: A Family of Simple Fast
 * Space-Efficient Statistically Good Algorithms for Random Number Generation").
 */

const POOL_SIZE = 4; // words of 32 bits
const MASK_64 = (1n << 64n) - 1n;
const MASK_128 = (1n << 128n) - 1n;
const MULTIPLIER = 0x2360ed051fc65da44385df649fccf645n;

/**
 * Return a function that hashes one word after the other; each is hashed by another constant.
 * @param {number} constant
 * @param {number} multiplier
 * @returns {(word: number) => number}
 */
function hashing(constant, multiplier) {
  return (word) => {
    const value = word ^ constant;
    constant = Math.imul(constant, multiplier);
    const hashed = Math.imul(value, constant);
    return (hashed ^ (hashed >>> 16)) >>> 0;
  };
}

/**
 * Return two words mixed into one.
 * @param {number} word
 * @param {number} other
 */
function mixed(word, other) {
  const sum = (Math.imul(0xca01f9dd, word) - Math.imul(0x4973f715, other)) >>> 0;
  return (sum ^ (sum >>> 16)) >>> 0;
}

/**
 * Return the words of 32 bits of a number, the lowest first; at least one.
 * @param {bigint} number
 */
function wordsOf(number) {
  const words = [];
  do {
    words.push(Number(number & 0xffffffffn));
    number >>= 32n;
  } while (number > 0n);
  return words;
}

/**
 * Return the first `count` words that numpy's SeedSequence generates from a seed and a spawn key.
 * @param {bigint} seed
 * @param {number[]} key
 * @param {number} count
 */
export function seedWords(seed, key, count) {
  const entropy = wordsOf(seed);
  while (key.length && entropy.length < POOL_SIZE) entropy.push(0); // so that a key is never taken for a part of the seed
  entropy.push(...key.flatMap((number) => wordsOf(BigInt(number))));
  const hash = hashing(0x43b0d7e5, 0x931e8875);
  const pool = Array.from({ length: POOL_SIZE }, (_, place) => hash(entropy[place] ?? 0));
  const places = [0, 1, 2, 3];
  for (const source of places) {
    for (const place of places) if (place !== source) pool[place] = mixed(pool[place], hash(pool[source]));
  }
  for (const word of entropy.slice(POOL_SIZE)) {
    for (const place of places) pool[place] = mixed(pool[place], hash(word));
  }
  const output = hashing(0x8b51f9dd, 0x58f38ded);
  return Array.from({ length: count }, (_, place) => output(pool[place % POOL_SIZE]));
}

/** The uniform numbers of one text. */
export class RandomNumbers {
  /**
   * @param {bigint} seed from 0 to 2**64 - 1
   * @param {number[]} key the number of the text, then the ids of its prompt
   */
  constructor(seed, key) {
    const words = seedWords(seed, key, 8).map(BigInt);
    const [stateHigh, stateLow, streamHigh, streamLow] = [0, 2, 4, 6].map((place) => (words[place + 1] << 32n) | words[place]);
    this.increment = ((((streamHigh << 64n) | streamLow) << 1n) | 1n) & MASK_128;
    this.state = (this.increment + ((stateHigh << 64n) | stateLow)) & MASK_128;
    this.step();
    /** @type {number[]} numbers that were drawn before they are used: half of an output, or what a call gave back */
    this.waiting = [];
  }

  step() {
    this.state = (this.state * MULTIPLIER + this.increment) & MASK_128;
  }

  /**
   * Return the next numbers in [0, 1), each a multiple of 2**-24.
   * @param {number} count
   */
  next(count) {
    while (this.waiting.length < count) {
      this.step();
      const folded = (this.state >> 64n) ^ (this.state & MASK_64);
      const rotation = this.state >> 122n;
      const output = ((folded >> rotation) | (folded << (64n - rotation))) & MASK_64;
      this.waiting.push(...[output & 0xffffffffn, output >> 32n].map((word) => (Number(word) >>> 8) / 2 ** 24));
    }
    return this.waiting.splice(0, count);
  }

  /**
   * Take back numbers that `next` has returned and that nobody has used: they come next.
   * @param {number[]} unused
   */
  giveBack(unused) {
    this.waiting.unshift(...unused);
  }
}
