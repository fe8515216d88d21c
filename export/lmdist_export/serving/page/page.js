/* The page of a model: write, let it continue the text, see which words it expects and which ones surprise it.

   What computes is behind `engine.js` (see server_engine.js): the page fetches nothing. No framework, nothing to build. */

import { $, element, inDecimals } from "./dom.js";
import { Editor } from "./editor.js";
import { open } from "./engine.js";
import { latest } from "./latest.js";
import { NextWords, candidatesAfter } from "./next_words.js";
import { addOptions } from "./options.js";
import { classOf, showFigures, showLegend, showTable, showToken } from "./surprisal.js";

const SPOKEN_AFTER = 1000; // milliseconds without a letter, after which a screen reader hears the next words
const COPIED_SHOWN = 2000; // milliseconds
const ENDINGS = {
  stop: "The model ended the text",
  length: "The text has its full length",
  exhausted: "The options left no token",
};
const LANGUAGES = { curl: "curl", python: "Python" };

const editor = new Editor($("text"), $("mirror"), showToken);
const nextWords = new NextWords($("next-words"), insert);
let engine;
let options;
let running = null; // the AbortController of the text that is being generated
let before = null; // the text without its last continuation

// --- messages

function say(message) {
  $("status").textContent = message;
}

let errorOf = ""; // "generating" or "typing"
function setError(message, of = "") {
  errorOf = of;
  if ($("error").textContent !== message) $("error").textContent = message; // spoken once, not for each letter
}

let speaking;
function speak(message, delay = 0) {
  clearTimeout(speaking);
  speaking = setTimeout(() => ($("announcement").textContent = message), delay);
}

// --- generating

function chosenSeed() {
  if ($("new-seed").checked) $("seed").value = Math.floor(Math.random() * 2 ** 32);
  const text = $("seed").value.trim();
  if (/^\d+$/.test(text) && Number.isSafeInteger(Number(text))) return Number(text);
  throw new Error(`The seed is “${text}”. It must be an integer from 0 to ${Number.MAX_SAFE_INTEGER}.`);
}

const isRandom = () => !(options.value("num_beams") > 1); // a beam search is not, and takes no seed

function chosenOptions() {
  return { ...options.values(), ...(isRandom() && { seed: chosenSeed() }) };
}

function setRunning(controller) {
  running = controller;
  document.body.classList.toggle("running", Boolean(controller));
  $("text").readOnly = Boolean(controller);
  $("generate").textContent = controller ? "Stop" : "Generate";
  setBefore(before);
}

function setBefore(text) {
  before = text;
  for (const id of ["another", "undo"]) $(id).disabled = running !== null || before === null;
}

function grow(text, start) {
  const paper = $("paper");
  const atEnd = paper.scrollTop + paper.clientHeight > paper.scrollHeight - 40;
  const spaces = text.length - start - text.slice(start).trimStart().length;
  editor.replace(text, { generated: [start + spaces, text.length] });
  if (atEnd) paper.scrollTop = paper.scrollHeight;
}

async function generate() {
  const prompt = editor.text;
  const started = performance.now();
  let frame = 0;
  const stopping = new AbortController();
  let text = prompt;
  setError("");
  nextWords.setTab(false);
  try {
    const chosen = chosenOptions();
    setBefore(prompt);
    setRunning(stopping);
    textChanged();
    say("Generating…");
    let reason;
    for await (const piece of engine.generate({ prompt, options: chosen, signal: stopping.signal })) {
      const first = text === prompt && /\s$/.test(prompt);
      text += first ? piece.text.trimStart() : piece.text; // no second space
      frame ||= requestAnimationFrame(() => ((frame = 0), grow(text, prompt.length))); // a fast model writes many in one
      reason = piece.finish_reason ?? reason;
    }
    const seconds = (performance.now() - started) / 1000;
    const seed = "seed" in chosen ? `, with seed ${chosen.seed}` : "";
    const time = seconds < 0.1 ? "less than 0.1" : inDecimals(seconds);
    say(`${ENDINGS[reason] ?? "Done"}, after ${time} s${seed}.`);
  } catch (error) {
    say(stopping.signal.aborted ? "Stopped." : "");
    if (!stopping.signal.aborted) setError(error.message, "generating");
    if (text === prompt) before = null;
  }
  cancelAnimationFrame(frame);
  if (text !== prompt) grow(text, prompt.length);
  setRunning(null);
  speak(text.slice(prompt.length));
  textChanged();
}

function undo() {
  editor.replace(before);
  setBefore(null);
  say("");
  textChanged();
}

// --- what depends on the text

const whileTyping = {
  onDone: () => errorOf === "typing" && setError(""),
  onError: (error) => errorOf === "generating" || setError(error.message, "typing"),
};

const suggest = latest(async (signal) => {
  const candidates = await candidatesAfter(editor.beforeCaret, engine, signal);
  return () => {
    nextWords.show(candidates);
    if (nextWords.tabInserts) speak(nextWords.sentence, SPOKEN_AFTER);
  };
}, whileTyping);

const score = latest(async (signal) => {
  const tokens = await engine.score(editor.text, signal);
  return () => {
    editor.colour(tokens, classOf);
    showFigures(tokens);
    if ($("table").open) showTable(tokens);
  };
}, whileTyping);

let askedFor = null; // the text before the caret whose next words are shown, or are to be
function askNextWords() {
  askedFor = editor.beforeCaret;
  suggest();
}

function caretMoved() {
  if (document.activeElement !== $("text") || running || editor.beforeCaret === askedFor) return;
  nextWords.expire();
  askNextWords();
}

function textChanged() {
  nextWords.expire();
  if (running) return;
  askNextWords();
  if ($("colours").checked) score();
  showSnippets();
}

function typed() {
  if (errorOf === "generating") setError("");
  setBefore(null);
  nextWords.setTab(true);
  textChanged();
}

function insert({ word, isPiece, replaced }) {
  $("text").focus();
  if (isPiece) editor.insertPiece(word);
  else editor.insert(word, replaced);
  typed();
}

function setColours(shown) {
  $("surprisal").hidden = !shown;
  if (shown) score(0);
  else editor.colour([]);
}

// --- the request as code

function showSnippets() {
  if (!$("code").open) return;
  const seed = isRandom() && $("seed").value && !$("new-seed").checked ? { seed: chosenSeed() } : {};
  const snippets = engine.snippets({ prompt: editor.text, options: { ...options.values(), ...seed } });
  $("snippets").replaceChildren(...Object.entries(snippets).map(([name, text]) => snippet(LANGUAGES[name], text)));
}

function snippet(language, text) {
  const code = element("code", {}, text);
  const copy = element("button", { type: "button" }, `Copy as ${language}`);
  copy.addEventListener("click", async () => {
    await copied(text, code);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = `Copy as ${language}`), COPIED_SHOWN);
    speak(`Copied as ${language}.`);
  });
  const title = element("div", { className: "title" }, element("h3", {}, language), copy);
  return element("div", { className: "snippet" }, title, element("pre", { tabIndex: 0 }, code));
}

/** Copy a text; where the browser has no clipboard for a page without TLS, by selecting the element that shows it. */
async function copied(text, shownIn) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  getSelection().selectAllChildren(shownIn);
  return document.execCommand("copy");
}

// --- what people do

function pressed(event) {
  const submits = event.key === "Enter" && (event.ctrlKey || event.metaKey);
  if (event.isComposing) return;
  if (event.key === "Escape" && running) running.abort();
  else if (event.key === "Escape") nextWords.setTab(false);
  else if (submits && !running) generate();
  else if (event.key === "Tab" && !event.shiftKey && event.target === $("text") && nextWords.tab()) event.preventDefault();
}

function optionsChanged() {
  $("reset").hidden = !Object.keys(options.values()).length;
  showSnippets();
}

function listen() {
  $("text").addEventListener("input", typed);
  document.addEventListener("selectionchange", caretMoved);
  $("text").addEventListener("blur", () => nextWords.setTab(false));
  document.addEventListener("keydown", pressed);
  $("generate").addEventListener("click", () => (running ? running.abort() : generate()));
  $("another").addEventListener("click", () => (editor.replace(before), generate()));
  $("undo").addEventListener("click", undo);
  $("colours").addEventListener("change", (event) => setColours(event.target.checked));
  $("table").addEventListener("toggle", () => showTable(editor.tokens));
  $("code").addEventListener("toggle", showSnippets);
  $("seed").addEventListener("input", () => ($("new-seed").checked = false));
  $("reset").addEventListener("click", () => (options.reset(), optionsChanged()));
}

/** Ask for an API key, which stays in memory; resolves to it, or to false. */
function askKey(message) {
  const dialog = $("key-dialog");
  $("key-message").textContent = message;
  $("key").value = dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" && $("key").value.trim()), { once: true });
  });
}

async function start() {
  showLegend();
  engine = await open({ askKey, progress: say });
  const { name, layer_sizes: layers, vocabulary_size: size, precision } = engine.model;
  document.title = `${name} · lmdist`;
  $("model-name").textContent = name;
  $("model-facts").textContent = `LSTM ${layers.join("-")} · vocabulary ${inDecimals(size)} · ${precision}`;
  options = addOptions(engine.model.options, $("options"), $("more-options"), optionsChanged);
  $("code").hidden = !Object.keys(engine.snippets({ prompt: "", options: {} })).length;
  for (const id of ["text", "generate", "colours"]) $(id).disabled = false;
  listen();
  textChanged();
}

start().catch((error) => {
  $("model-facts").textContent = "";
  setError(error.message);
});
