/**
 * `open` for the page: an engine in this browser, from the files beside it. onnxruntime-web computes, in WebAssembly, in one
 * thread: several would need headers (COOP, COEP) that most static servers do not send.
 */

import { createEngine } from "./engine/engine.js";

/** @typedef {{address: string, integrity: string, bytes: number}} File */

/**
 * Return the content of a file; with an `integrity` no other is accepted than the one that lmdist-export has written or named.
 * @param {URL} address
 * @param {string} [integrity]
 */
async function fetched(address, integrity = "") {
  const failed = (/** @type {string} */ reason) => new Error(`${address.pathname} cannot be loaded: ${reason}.`);
  const response = await fetch(address, { cache: "no-cache", integrity }).catch(() => {
    throw failed(`${address.host} is not there, or has another file`);
  });
  if (!response.ok) throw failed(`${address.host} answered with status ${response.status}`);
  return new Uint8Array(await response.arrayBuffer());
}

/**
 * Return onnxruntime-web, ready to run.
 * @param {Record<"script" | "wasm", File>} files
 * @param {(folder: string, file: File) => Promise<Uint8Array<ArrayBuffer>>} load
 */
async function loadRuntime({ script, wasm }, load) {
  const [code, binary] = await Promise.all([load("", script), load("", wasm)]);
  // A module is imported from an address, and what lies at an address may be another file by then.
  const copy = URL.createObjectURL(new Blob([code], { type: "text/javascript" }));
  const ort = await import(copy);
  URL.revokeObjectURL(copy);
  ort.env.wasm.wasmBinary = binary;
  ort.env.wasm.numThreads = 1;
  return ort;
}

/**
 * Return the engine; `progress` is called with a sentence while files are loaded.
 * @param {{progress?: (message: string) => void}} [callbacks]
 */
export async function open({ progress = () => {} } = {}) {
  const about = await fetched(new URL("model/model.json", import.meta.url));
  /** @type {{files: Record<string, File>, runtime: Record<"script" | "wasm", File>}} */
  const { files, runtime } = JSON.parse(new TextDecoder().decode(about));
  const first = Object.values(files).filter(({ address }) => !address.endsWith(".onnx")); // graphs are small, and come when needed
  const total = [...first, ...Object.values(runtime)].reduce((sum, { bytes }) => sum + bytes, 0);
  let loaded = 0;
  const report = () => progress(`Loading the model: ${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
  const load = async (/** @type {string} */ folder, /** @type {File} */ { address, integrity, bytes }) => {
    const content = await fetched(new URL(folder + address, import.meta.url), integrity);
    loaded += bytes;
    if (loaded <= total) report();
    return content;
  };
  report();
  const ort = loadRuntime(runtime, load);
  const read = async (/** @type {string} */ name) => (name === "model.json" ? about : load("model/", files[name]));
  const engine = await createEngine(await ort, read);
  progress("");
  return engine;
}
