/* How surprising a text is: the colours of its tokens, their legend, figures of the text, and the tokens as a table. */

import { $, element, inDecimals, inPercent, withOneDecimal } from "./dom.js";
import { written } from "./editor.js";

const LEAST_BITS = [0, 1, 3, 6, 9, 12]; // of each level of colour

const bits = (token) => -token.log_probability / Math.LN2;
const levelOf = (token) => LEAST_BITS.findLastIndex((least) => bits(token) >= least);

/** Return the class of the element that shows a token. */
export const classOf = (token) => `token level-${Math.max(levelOf(token), 0)}${token.unknown ? " unknown" : ""}`;

export function showLegend() {
  const last = LEAST_BITS.length - 1;
  $("legend").append(
    ...LEAST_BITS.map((least, level) => {
      const title = level === last ? `${least} bits and more` : `${least} to ${LEAST_BITS[level + 1]} bits`;
      return element("li", { className: `level-${level}`, title }, level === last ? `${least}+` : `${least}`);
    }),
  );
}

export function showFigures(tokens) {
  const bitsPerToken = tokens.reduce((sum, token) => sum + bits(token), 0) / tokens.length;
  $("perplexity").textContent = tokens.length ? withOneDecimal(2 ** bitsPerToken) : "–";
  $("bits-per-token").textContent = tokens.length ? bitsPerToken.toFixed(2) : "–";
  $("tokens").textContent = inDecimals(tokens.length);
  $("unknown").textContent = inDecimals(tokens.filter((token) => token.unknown).length);
}

export function showTable(tokens) {
  const rows = tokens.map((token) => {
    const name = element("th", { scope: "row" }, element("span", { className: classOf(token) }, written(token.token)));
    if (token.unknown) name.append(" unknown");
    const cells = [bits(token).toFixed(1), inPercent(Math.exp(token.log_probability))];
    return element("tr", {}, name, ...cells.map((text) => element("td", {}, text)));
  });
  $("rows").replaceChildren(...rows);
}

/** Write about one token, or how to find out about one. */
export function showToken(token) {
  const about = (token) => {
    const probability = inPercent(Math.exp(token.log_probability));
    const sentence = `“${written(token.token)}”: ${bits(token).toFixed(1)} bits, ${probability}`;
    return token.unknown ? `${sentence} as an unknown word: the vocabulary does not have it.` : `${sentence}.`;
  };
  $("token").textContent = token ? about(token) : "Point at a word, or move the caret to it.";
}
