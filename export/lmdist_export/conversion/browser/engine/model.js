/**
 * A model in onnxruntime-web: it reads tokens, predicts the next one and samples new ones, a text at a time.
 *
 * The graphs are those of lmdist's own sampler, so a seed samples the same tokens here and there: the step graph, and one that
 * generates for each choice of filters (top_k, top_p, ...). A graph is opened when it is first needed.
 *
 * Shapes: T tokens, N new tokens, A uniform numbers a token, V vocabulary (V' rounded up to whole blocks), S the sum of the
 * layers' sizes.
 */

/** @typedef {import("./random.js").RandomNumbers} RandomNumbers */

/**
 * @typedef {object} State of a text: what was read, and what is still to read
 * @property {number[]} tokens that were not read yet, at least one
 * @property {any} h tensor (1, S)
 * @property {any} c tensor (1, S)
 * @property {any} [counts] tensor (1, V'): how often each token was generated
 */

export const PREFILL_TOKENS = 512; // in one call without logits
const STEP_TOKENS = 64; // in one call with them: logits are (1, 64, V)
const STEP = "step";
const OPEN_GRAPHS = 2; // that generate; each has a copy of the weights
const FP32_LIMIT = 1e30; // the graphs are fed nothing beyond it nor, where they divide or multiply, below 1 / it
const FILTERS = { top_k: 0, top_p: 1, min_p: 0, typical_p: 1 }; // the value with which each does nothing
const NOT_FINITE = "The logits are not finite, so the weights are not those of a trained model.";

/**
 * Return which graph generates with these options, and what it does: its name is `generate`, then the filters.
 * @param {Record<string, any>} config
 */
export function graphFor(config) {
  const isGreedy = !config.do_sample || config.temperature === 0;
  const filters = isGreedy ? [] : Object.keys(FILTERS).filter((name) => config[name] !== FILTERS[name]);
  const isSorted = filters.includes("top_k") || filters.includes("typical_p");
  return { name: ["generate", ...(isGreedy ? ["greedy"] : filters)].join("-"), filters, isGreedy, isSorted };
}

export class Model {
  /**
   * @param {any} ort onnxruntime-web, or another onnxruntime with its interface
   * @param {{sizes: {layer_sizes: number[], vocabulary_size: number}, padded: number, attempts: number}} about of model.json
   * @param {Uint8Array} weights
   * @param {(name: string) => Promise<Uint8Array>} read
   */
  constructor(ort, about, weights, read) {
    this.ort = ort;
    this.weights = weights;
    this.read = read;
    this.size = about.sizes.vocabulary_size; // V
    this.padded = about.padded; // V'
    this.attempts = about.attempts;
    this.stateSize = about.sizes.layer_sizes.reduce((sum, size) => sum + size);
    /** @type {Map<string, any>} */
    this.sessions = new Map();
    this.turn = Promise.resolve();
  }

  /**
   * Run `work` when all that was asked for before is done: a session computes one call at a time.
   * @template Result
   * @param {() => Promise<Result>} work
   * @returns {Promise<Result>}
   */
  inTurn(work) {
    const result = this.turn.then(work);
    this.turn = result.then(
      () => undefined,
      () => undefined,
    );
    return result;
  }

  /**
   * Return the session of a graph; of those that generate the last few stay open.
   * @param {string} name
   */
  async session(name) {
    const session = this.sessions.get(name) ?? (await this.open(name));
    this.sessions.delete(name);
    this.sessions.set(name, session); // the newest last
    const [oldest, ...others] = [...this.sessions.keys()].filter((key) => key !== STEP);
    if (others.length >= OPEN_GRAPHS) {
      await this.sessions.get(oldest).release();
      this.sessions.delete(oldest);
    }
    return session;
  }

  /** @param {string} name */
  async open(name) {
    return this.ort.InferenceSession.create(await this.read(`${name}.onnx`), {
      externalData: [{ path: "weights.bin", data: this.weights }],
      graphOptimizationLevel: "disabled", // optimizations find nothing in these graphs
    });
  }

  // --- tensors

  /** @param {number[]} values @param {number[]} shape */
  integers(values, shape = [values.length]) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), shape);
  }

  /** @param {Float32Array | number[]} values @param {number[]} shape */
  floats(values, shape = []) {
    return new this.ort.Tensor("float32", Float32Array.from(values), shape);
  }

  /** @param {Uint8Array} values @param {number[]} shape */
  booleans(values, shape) {
    return new this.ort.Tensor("bool", values, shape);
  }

  // --- reading

  /**
   * Return the state of a text of which nothing was read.
   * @param {number[]} tokens
   * @returns {State}
   */
  start(tokens) {
    const zeros = () => this.floats(new Float32Array(this.stateSize), [1, this.stateSize]);
    return { tokens, h: zeros(), c: zeros() };
  }

  /**
   * Read tokens; return the logits (T, V) after each, one after the other, and the state after all, with no tokens to read.
   * @param {State} state whose tokens are read, at most STEP_TOKENS
   */
  async step(state) {
    const session = await this.session(STEP);
    const feed = { tokens: this.integers(state.tokens, [1, state.tokens.length]), h: state.h, c: state.c };
    const { logits, next_h: h, next_c: c } = await session.run(feed);
    if (!logits.data.every(Number.isFinite)) throw new Error(NOT_FINITE);
    return { logits: /** @type {Float32Array} */ (logits.data), h, c };
  }

  /**
   * Read all tokens of a state but the last; no logits are computed.
   * @param {State} state
   * @param {Record<string, any>} config the graph is the one that generates with it
   */
  async prefill(state, config) {
    while (state.tokens.length > 1) {
      const head = { ...state, tokens: state.tokens.slice(0, PREFILL_TOKENS) };
      const read = (await this.generate(head, config, [])).state;
      state = { ...read, tokens: [...read.tokens, ...state.tokens.slice(PREFILL_TOKENS)] };
    }
    return state;
  }

  /**
   * Yield the logits (V) after each of `tokens`, a text from its beginning.
   * @param {number[]} tokens
   */
  async *logitsAfter(tokens) {
    let state = this.start([]);
    for (let place = 0; place < tokens.length; place += STEP_TOKENS) {
      const piece = { ...state, tokens: tokens.slice(place, place + STEP_TOKENS) };
      const { logits, h, c } = await this.inTurn(() => this.step(piece));
      for (let row = 0; row < piece.tokens.length; row++) yield logits.subarray(row * this.size, (row + 1) * this.size);
      state = { tokens: [], h, c };
    }
  }

  // --- generating

  /**
   * Return new tokens, one for each A uniform numbers or fewer once a stop came, and the state after them.
   * @param {State} state
   * @param {Record<string, any>} config
   * @param {number[]} uniform (N, A)
   * @param {{stops?: number[], bias?: Float32Array, rowBias?: Float32Array, inPrompt?: Uint8Array}} [extras]
   */
  async generate(state, config, uniform, { stops = [], bias, rowBias, inPrompt } = {}) {
    const graph = graphFor(config);
    const session = await this.session(graph.name);
    const attempts = this.attemptsOf(config);
    const [row, empty] = [[1, this.padded], new Float32Array(this.padded)];
    const inverse = graph.isGreedy ? 1 : Math.min(Math.max(1 / config.temperature, 1 / FP32_LIMIT), FP32_LIMIT);
    const perTemperature = (value) => this.floats([Math.fround(value) * Math.fround(inverse)]);
    const share = (value) => this.floats([Math.max(value, 1 / FP32_LIMIT)]);
    const all = {
      prompt: this.integers(state.tokens, [1, state.tokens.length]),
      lengths: this.integers([state.tokens.length]),
      h: state.h,
      c: state.c,
      uniform: this.floats(uniform, [uniform.length / attempts, 1, attempts]),
      bias: this.floats(bias ?? empty, [this.padded]),
      stops: this.integers([...stops, -1]), // no token is -1
      going: this.booleans(Uint8Array.of(1), [1]),
      counts: state.counts ?? this.floats(empty, row),
      in_prompt: this.booleans(inPrompt ?? new Uint8Array(this.padded), row),
      row_bias: this.floats((rowBias ?? empty).map((value) => value * inverse), row),
      inverse_temperature: this.floats([inverse]),
      repetition_penalty: this.floats([config.repetition_penalty]),
      presence_penalty: perTemperature(config.presence_penalty),
      frequency_penalty: perTemperature(config.frequency_penalty),
      top_k: this.integers([Math.min(config.top_k || this.size, this.size)]),
      top_p: share(config.top_p),
      min_p: this.floats([config.min_p]),
      typical_p: share(config.typical_p),
    };
    const found = await session.run(Object.fromEntries(session.inputNames.map((name) => [name, all[name]])));
    if (!found.mass.data.every(Number.isFinite)) throw new Error(NOT_FINITE);
    const tokens = Array.from(found.words.data, Number);
    const after = { tokens: [tokens.at(-1) ?? state.tokens.at(-1)], h: found.next_h, c: found.next_c, counts: found.next_counts };
    return { tokens, state: /** @type {State} */ (after) };
  }

  /**
   * Return A, how many uniform numbers a token takes: several where it may be rejected.
   * @param {Record<string, any>} config
   */
  attemptsOf(config) {
    const { filters, isSorted } = graphFor(config);
    return filters.length && !isSorted ? this.attempts : 1;
  }
}
