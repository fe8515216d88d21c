/**
 * `open` for the page: an engine in this browser, from the files beside it. onnxruntime-web computes, in WebAssembly, in one
 * thread: several would need headers (COOP, COEP) that most static servers do not send.
 */

import { createEngine } from "./engine/engine.js";

/**
 * Return the bytes of a file, of which nothing else is accepted than what lmdist-export has written or named.
 * @param {URL} address
 * @param {string} [integrity]
 * @param {(bytes: number) => void} [onBytes] is called with the number of bytes that came
 */
async function fetched(address, integrity, onBytes = () => {}) {
  const failed = (reason) => new Error(`${address.pathname} cannot be loaded: ${reason}.`);
  const response = await fetch(address, { cache: "no-cache", integrity: integrity ?? "" }).catch(() => {
    throw failed(`${address.host} is not there, or has another file`);
  });
  if (!response.ok) throw failed(`${address.host} answered with status ${response.status}`);
  const chunks = [];
  const reader = response.body.getReader();
  for (let { value, done } = await reader.read(); !done; { value, done } = await reader.read()) {
    chunks.push(value);
    onBytes(value.length);
  }
  return new Uint8Array(await new Blob(chunks).arrayBuffer());
}

/**
 * Return onnxruntime-web, ready to run.
 * @param {Record<"script" | "wasm", {address: string, integrity: string}>} files
 * @param {(bytes: number) => void} onBytes
 */
async function loadRuntime({ script, wasm }, onBytes) {
  const bytesOf = ({ address, integrity }) => fetched(new URL(address, import.meta.url), integrity, onBytes);
  const [code, binary] = await Promise.all([script, wasm].map(bytesOf));
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
  const folder = new URL("model/", import.meta.url);
  const about = await fetched(new URL("model.json", folder));
  const { files, runtime } = JSON.parse(new TextDecoder().decode(about));
  const first = Object.keys(files).filter((name) => !name.endsWith(".onnx")); // graphs are small, and loaded when they are needed
  const total = [runtime.script, runtime.wasm, ...first.map((name) => files[name])].reduce((sum, file) => sum + file.bytes, 0);
  let loaded = 0;
  const onBytes = (bytes) => {
    loaded += bytes;
    if (loaded <= total) progress(`Loading the model: ${(loaded / 1e6).toFixed(1)} of ${(total / 1e6).toFixed(1)} MB`);
  };
  const read = async (name) => (name === "model.json" ? about : fetched(new URL(name, folder), files[name].integrity, onBytes));
  const engine = await createEngine(await loadRuntime(runtime, onBytes), read);
  progress("");
  return engine;
}
