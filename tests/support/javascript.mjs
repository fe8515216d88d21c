// Calls the engine of the page for tests: a line of JSON [name, ...arguments] in, a line of JSON {value} or {error} out.
import { readFile } from "node:fs/promises";
import { createInterface } from "node:readline";

const [folder] = process.argv.slice(2);
const { Detokenizer } = await import(`${folder}/engine/detokenizer.js`);
const { RandomNumbers } = await import(`${folder}/engine/random.js`);
const { spansOf } = await import(`${folder}/engine/spans.js`);
const { Tokenizer } = await import(`${folder}/engine/tokenizer.js`);
const { createEngine } = await import(`${folder}/engine/engine.js`);

let tokenizer;
let engine;

async function runtime(modules, name) {
  if (name === "onnxruntime-node") return (await import(`${modules}/${name}/dist/index.js`)).default;
  const dist = `${modules}/onnxruntime-web/dist`; // the two files that a page has
  const ort = await import(`${dist}/ort.wasm.bundle.min.mjs`);
  ort.env.wasm.wasmBinary = await readFile(`${dist}/ort-wasm-simd-threaded.wasm`);
  ort.env.wasm.numThreads = 1;
  return ort;
}

const functions = {
  tokenizer: (text, vocabulary) => void (tokenizer = new Tokenizer(text, vocabulary)),
  words: (text, continues) => tokenizer.words(text, { continues }),
  spans: (text) => spansOf(text, tokenizer.words(text), tokenizer),
  seam: (words, hasSpace) => tokenizer.pieces.seamOf(words, hasSpace),
  written: (words) => {
    const writer = tokenizer.pieces.writer();
    return [...words.map((word) => writer.piece(word)), writer.end(new Uint8Array())];
  },
  pieces: (words, name) => {
    const detokenizer = new Detokenizer(name);
    return words.map((word) => detokenizer.piece(word));
  },
  numbers: (seed, key, counts, unused) => {
    const random = new RandomNumbers(BigInt(seed), key);
    return counts.map((count) => {
      const numbers = random.next(count);
      random.giveBack(numbers.slice(count - unused));
      return numbers.slice(0, count - unused);
    });
  },
  open: async (page, modules, name) => {
    const read = async (file) => new Uint8Array(await readFile(`${page}/model/${file}`));
    engine = await createEngine(await runtime(modules, name), read);
    return engine.model;
  },
  generate: async (prompt, { seed, ...options }) => {
    const pieces = [];
    for await (const piece of engine.generate({ prompt, options: { ...options, seed: BigInt(seed) } })) pieces.push(piece);
    return [pieces.map((piece) => piece.text).join(""), pieces.map((piece) => piece.finish_reason)];
  },
  nextWords: (prompt, k) => engine.nextWords(prompt, k),
  score: (text) => engine.score(text),
};

for await (const line of createInterface({ input: process.stdin })) {
  const [name, ...given] = JSON.parse(line);
  const answer = await Promise.resolve()
    .then(() => functions[name](...given))
    .then((value) => ({ value: value ?? null }))
    .catch((error) => ({ error: error.message }));
  console.log(JSON.stringify(answer));
}
