/* The page of a model: write, let it continue the text, see which words it expects and which ones surprise it.

   What computes is behind `engine.js` (see server_engine.js): the page fetches nothing. No framework, nothing to build. */

import { open } from "./engine.js";
import { Editor, bits, join, levelOf, levels, written } from "./editor.js";
import { addOptions, element } from "./options.js";

const CANDIDATES = 7;
const LOOKED_AT = 19; // the likeliest words, of which those that complete the word that is being typed are candidates
const CONTEXT = 2000; // characters before the caret that candidates depend on: the model reads them again for each letter
const PAUSE = 150; // milliseconds without a letter, after which the model is asked
const SPOKEN_AFTER = 1000; // milliseconds without a letter, after which a screen reader hears the candidates
const END = "<eos>";
const UNFINISHED_WORD = /[\p{L}\p{N}'’-]+$/u;
const ENDINGS = { stop: "The model ended the text", length: "The text has its full length", exhausted: "The options left no token" };

const $ = (id) => document.getElementById(id);
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 2 });
const number = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const share = (probability) => (probability < 0.001 ? "< 0.1%" : percent.format(probability));

const editor = new Editor($("text"), $("mirror"), showToken);
let engine;
let options;
let running = null; // the AbortController of the text that is being generated
let before = null; // the text without its last continuation
let candidates = null; // [{word, probability, replaced}], `replaced` letters of an unfinished word; null until they are known
let tabInserts = false; // only while somebody types: else Tab moves on, as everywhere
let tabWaits = false; // Tab was pressed before the candidates were known

// --- messages

const say = (message) => ($("status").textContent = message);

function fail(error) {
  say("");
  $("error").textContent = error.message;
}

let speaking;
function speak(message, delay = 0) {
  clearTimeout(speaking);
  speaking = setTimeout(() => ($("announcement").textContent = message), delay);
}

/** Return a function that runs `work(signal)` after a pause; a later call ends an earlier one. */
function latest(work) {
  let controller = new AbortController();
  return (pause = PAUSE) => {
    controller.abort();
    controller = new AbortController();
    const { signal } = controller;
    setTimeout(() => signal.aborted || work(signal).catch((error) => signal.aborted || fail(error)), pause);
  };
}

// --- generating

function chosenSeed() {
  if ($("new-seed").checked) $("seed").value = Math.floor(Math.random() * 2 ** 32);
  const text = $("seed").value.trim();
  if (/^\d+$/.test(text) && Number.isSafeInteger(Number(text))) return Number(text);
  throw new Error(`The seed is “${text}”. It must be an integer from 0 to ${Number.MAX_SAFE_INTEGER}.`);
}

function setRunning(controller) {
  running = controller;
  editor.growing = Boolean(controller);
  $("text").readOnly = Boolean(controller);
  $("generate").textContent = controller ? "Stop" : "Generate";
  setUndo(before);
}

function setUndo(text) {
  before = text;
  for (const id of ["another", "undo"]) $(id).disabled = running !== null || before === null;
}

function grow(text, start) {
  const paper = $("paper");
  const atEnd = paper.scrollTop + paper.clientHeight > paper.scrollHeight - 40;
  editor.replace(text, [start, text.length]);
  if (atEnd) paper.scrollTop = paper.scrollHeight;
}

async function generate() {
  const prompt = editor.text;
  const started = performance.now();
  const stopping = new AbortController();
  let text = prompt;
  $("error").textContent = "";
  offer([]);
  try {
    const chosen = { ...options.values(), seed: chosenSeed() };
    setUndo(prompt);
    setRunning(stopping);
    say("Generating…");
    let reason;
    for await (const piece of engine.generate({ prompt, options: chosen, signal: stopping.signal })) {
      if (piece.text) grow((text = text === prompt ? join(prompt, piece.text) : text + piece.text), prompt.trimEnd().length);
      reason = piece.finish_reason ?? reason;
    }
    say(`${ENDINGS[reason] ?? "Done"}, after ${number.format((performance.now() - started) / 1000)} s, with seed ${chosen.seed}.`);
  } catch (error) {
    if (stopping.signal.aborted) say("Stopped.");
    else fail(error);
  }
  setRunning(null);
  speak(text.slice(prompt.length));
  textChanged();
}

function undo() {
  editor.replace(before);
  setUndo(null);
  say("");
  textChanged();
}

// --- next words

async function candidatesAfter(text, signal) {
  const context = text.length > CONTEXT ? text.slice(text.indexOf(" ", text.length - CONTEXT)) : text;
  const unfinished = UNFINISHED_WORD.exec(context)?.[0] ?? "";
  const replaced = unfinished.length;
  const [following, others] = await Promise.all([
    engine.nextWords(context, LOOKED_AT, signal),
    unfinished ? engine.nextWords(context.slice(0, -replaced), LOOKED_AT, signal) : [],
  ]);
  const next = following.map((candidate) => ({ ...candidate, replaced: 0 }));
  const completing = others
    .filter(({ word }) => word.length > replaced && word.startsWith(unfinished))
    .map((candidate) => ({ ...candidate, replaced }));
  // An unfinished word is completed, unless it is one of the likely words as it stands.
  const finished = !completing.length || others.some(({ word }) => word === unfinished);
  return [...(finished ? next.slice(0, CANDIDATES - Math.min(completing.length, 2)) : []), ...completing]
    .filter(({ word }) => word !== END)
    .slice(0, CANDIDATES);
}

function offer(found) {
  candidates = found;
  $("next-words").replaceChildren(
    ...found.map((candidate) => {
      const chip = element("button", { type: "button", className: "word" });
      chip.append(element("span", {}, written(candidate.word)), " ", element("small", {}, share(candidate.probability)));
      chip.style.setProperty("--share", candidate.probability);
      chip.addEventListener("click", () => insert(candidate));
      return chip;
    }),
  );
  $("next-words").classList.remove("old");
  if (tabWaits && found.length) insert(found[0]);
}

function insert({ word, replaced }) {
  editor.insert(word, replaced);
  $("text").focus();
  typed();
}

function setTabInserts(value) {
  tabInserts = value;
  tabWaits = tabWaits && value;
  $("next-words").classList.toggle("tab", value);
}

const suggest = latest(async (signal) => {
  const found = await candidatesAfter(editor.beforeCaret, signal);
  if (signal.aborted || running) return;
  offer(found);
  if (tabInserts) speak(`Next words: ${found.map(({ word }) => written(word)).join(", ")}`, SPOKEN_AFTER);
});

// --- surprisal

const score = latest(async (signal) => {
  const tokens = await engine.score(editor.text, signal);
  if (signal.aborted || running) return;
  editor.colour(tokens);
  const bitsPerToken = tokens.reduce((sum, token) => sum + bits(token), 0) / tokens.length;
  $("perplexity").textContent = tokens.length ? number.format(2 ** bitsPerToken) : "–";
  $("bits-per-token").textContent = tokens.length ? bitsPerToken.toFixed(2) : "–";
  $("tokens").textContent = number.format(tokens.length);
  $("unknown").textContent = number.format(tokens.filter((token) => token.unknown).length);
  showTable();
});

function showToken(token) {
  const about = token && `“${written(token.token)}”: ${bits(token).toFixed(1)} bits, probability ${share(Math.exp(token.log_probability))}`;
  const unknown = token?.unknown ? ". The vocabulary does not have it; this is the probability of any unknown word" : "";
  $("token").textContent = token ? `${about}${unknown}.` : "Point at a word, or move the caret to it.";
}

function showTable() {
  if (!$("table").open) return;
  $("rows").replaceChildren(
    ...editor.tokens.map((token) => {
      const name = element("th", { scope: "row" });
      const classes = `token level-${levelOf(token)}${token.unknown ? " unknown" : ""}`;
      name.append(element("span", { className: classes }, written(token.token)), token.unknown ? " (unknown)" : "");
      const cells = [bits(token).toFixed(1), share(Math.exp(token.log_probability))].map((text) => element("td", {}, text));
      return element("tr", {}, name, ...cells);
    }),
  );
}

function setColours(shown) {
  $("surprisal").hidden = !shown;
  if (shown) score(0);
  else editor.colour([]);
}

// --- code

function showSnippets() {
  if (!$("code").open) return;
  const chosen = { ...options.values(), ...($("seed").value && { seed: Number($("seed").value) }) };
  const snippets = Object.entries(engine.snippets({ prompt: editor.text, options: chosen }));
  $("snippets").replaceChildren(
    ...snippets.map(([name, text]) => {
      const label = { curl: "curl", python: "Python" }[name];
      const code = element("code", {}, text);
      const copy = element("button", { type: "button" }, `Copy as ${label}`);
      copy.addEventListener("click", async () => {
        await copied(text, code);
        copy.textContent = "Copied";
        setTimeout(() => (copy.textContent = `Copy as ${label}`), 2000);
        speak(`Copied as ${label}`);
      });
      const title = element("div", { className: "title" }, element("h3", {}, label), copy);
      return element("div", { className: "snippet" }, title, element("pre", { tabIndex: 0 }, code));
    }),
  );
}

/** Copy a text; where the browser has no clipboard for pages without TLS, by selecting the element that shows it. */
async function copied(text, shownIn) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  getSelection().selectAllChildren(shownIn);
  return document.execCommand("copy");
}

// --- what happens

function textChanged() {
  candidates = null;
  $("next-words").classList.add("old");
  suggest();
  if ($("colours").checked) score();
  showSnippets();
}

function typed() {
  $("error").textContent = "";
  setUndo(null);
  tabWaits = false;
  setTabInserts(true);
  textChanged();
}

function pressed(event) {
  if (event.isComposing) return;
  if (event.key === "Escape" && running) running.abort();
  else if (event.key === "Escape") setTabInserts(false);
  else if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !running) generate();
  else if (event.key !== "Tab" || event.shiftKey || event.target !== $("text") || !tabInserts || running) return;
  else if (candidates === null) tabWaits = true;
  else if (candidates.length) insert(candidates[0]);
  else return;
  event.preventDefault();
}

function askKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  $("key").value = "";
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) =>
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" && $("key").value.trim()), { once: true }),
  );
}

function showLegend() {
  const last = levels.length - 1;
  const names = levels.map((least, level) => (level === last ? `${least} and more` : `${least} to ${levels[level + 1]}`));
  $("legend").append(...names.map((name, level) => element("li", { className: `token level-${level}`, title: `${name} bits` }, `${levels[level]}${level === last ? "+" : ""}`)));
}

function listen() {
  $("text").addEventListener("input", typed);
  $("text").addEventListener("blur", () => setTabInserts(false));
  document.addEventListener("keydown", pressed);
  $("generate").addEventListener("click", () => (running ? running.abort() : generate()));
  $("another").addEventListener("click", () => (editor.replace(before), generate()));
  $("undo").addEventListener("click", undo);
  $("colours").addEventListener("change", (event) => setColours(event.target.checked));
  $("table").addEventListener("toggle", showTable);
  $("code").addEventListener("toggle", showSnippets);
  $("seed").addEventListener("input", () => (($("new-seed").checked = false), showSnippets()));
  $("reset").addEventListener("click", () => (options.reset(), optionsChanged()));
}

function optionsChanged() {
  $("reset").hidden = !Object.keys(options.values()).length;
  showSnippets();
}

async function start() {
  showLegend();
  engine = await open({ askKey });
  const { name, layer_sizes: layers, vocabulary_size: size, precision } = engine.model;
  document.title = `${name} · lmdist`;
  $("model-name").textContent = name;
  $("model-facts").textContent = `LSTM ${layers.join("-")} · vocabulary ${number.format(size)} · ${precision}`;
  options = addOptions(engine.model.options, $("options"), $("more-options"), optionsChanged);
  $("code").hidden = !Object.keys(engine.snippets({ prompt: "", options: {} })).length;
  for (const id of ["text", "generate", "colours"]) $(id).disabled = false;
  listen();
  textChanged();
}

start().catch((error) => {
  $("model-facts").textContent = "";
  fail(error);
});
