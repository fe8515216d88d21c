/* The options of the page: a slider and a number for each option that the model has, by its own names, defaults and bounds.

   What a slider spans is what people try; the number beside it takes all that the model takes. */

import { element } from "./dom.js";

const SLIDERS = {
  max_new_tokens: { label: "Length, in tokens", low: 1, high: 400, step: 1 },
  temperature: { label: "Temperature", low: 0, high: 2, step: 0.05 },
  top_p: { label: "Top-p", low: 0.05, high: 1, step: 0.01 },
  top_k: { label: "Top-k", low: 0, high: 100, step: 1 },
  min_p: { label: "Min-p", low: 0, high: 0.5, step: 0.01, more: true },
  typical_p: { label: "Typical-p", low: 0.05, high: 1, step: 0.01, more: true },
  repetition_penalty: { label: "Repetition penalty", low: 1, high: 2, step: 0.05, more: true },
  presence_penalty: { label: "Presence penalty", low: -2, high: 2, step: 0.1, more: true },
  frequency_penalty: { label: "Frequency penalty", low: -2, high: 2, step: 0.1, more: true },
  no_repeat_ngram_size: { label: "No repeats of N tokens", low: 0, high: 10, step: 1, more: true },
  cache_weight: { label: "Neural cache", low: 0, high: 0.9, step: 0.05, more: true },
  min_new_tokens: { label: "Least length, in tokens", low: 0, high: 200, step: 1, more: true },
  num_beams: { label: "Beams", low: 1, high: 10, step: 1, more: true },
  length_penalty: { label: "Length penalty of beams", low: -2, high: 2, step: 0.1, more: true },
};

const sentence = (help) => `${help[0].toUpperCase()}${help.slice(1)}.`;

/** Add one option to the page; return how to read and to reset it. */
function addOption(place, { name, default: initial, minimum, maximum, help }, slider, onChange) {
  const { label, low, high, step } = slider;
  const range = element("input", { type: "range", id: `option-${name}`, min: low, max: high, step });
  const bounds = { ...(minimum != null && { min: minimum }), ...(maximum != null && { max: maximum }) };
  const number = element("input", { type: "number", step: "any", ...bounds, "aria-label": `${label}, as a number` });
  const text = element("p", { id: `help-${name}`, className: "help", hidden: true }, sentence(help));
  const toggle = element("button", { type: "button", className: "quiet", "aria-label": `What ${label} does` }, "?");
  toggle.setAttribute("aria-expanded", false);
  toggle.setAttribute("aria-controls", text.id);
  range.setAttribute("aria-describedby", text.id);
  toggle.addEventListener("click", () => {
    text.hidden = !text.hidden;
    toggle.setAttribute("aria-expanded", !text.hidden);
  });

  const show = (value, from) => {
    if (from !== range) range.value = value;
    if (from !== number) number.value = value;
    range.style.setProperty("--filled", (range.value - low) / (high - low));
  };
  for (const input of [range, number]) {
    input.addEventListener("input", () => {
      show(input.value, input);
      onChange();
    });
  }
  number.addEventListener("change", () => number.value === "" && (show(initial), onChange()));
  show(initial);

  const title = element("div", { className: "title" }, element("label", { htmlFor: range.id }, label), toggle, number);
  place.append(element("div", { className: "option" }, title, range, text));
  return {
    name,
    initial,
    value: () => (number.value === "" ? initial : Number(number.value)),
    reset: () => show(initial),
  };
}

/**
 * Add the options of a model to the page; return `values()`, those that differ from the model's defaults, `value(name)`, whether
 * it differs or not, and `reset()`.
 */
export function addOptions(options, place, morePlace, onChange) {
  const byName = new Map(options.map((option) => [option.name, option]));
  const added = Object.entries(SLIDERS)
    .filter(([name]) => byName.has(name))
    .map(([name, slider]) => addOption(slider.more ? morePlace : place, byName.get(name), slider, onChange));
  return {
    values: () => Object.fromEntries(added.filter((one) => one.value() !== one.initial).map((one) => [one.name, one.value()])),
    value: (name) => added.find((one) => one.name === name)?.value(),
    reset: () => added.forEach((one) => one.reset()),
  };
}
