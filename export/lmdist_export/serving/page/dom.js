/* Elements of the page, found and made, and numbers as it writes them. */

export const $ = (id) => document.getElementById(id);

/** Return a new element with properties, or attributes where it has no such property, and children. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key in made) made[key] = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 2 });
const decimal = new Intl.NumberFormat("en", { maximumFractionDigits: 1 });
const oneDecimal = new Intl.NumberFormat("en", { minimumFractionDigits: 1, maximumFractionDigits: 1 });

export const inPercent = (probability) => (probability < 0.001 ? "< 0.1%" : percent.format(probability));
export const inDecimals = (number) => decimal.format(number);
export const withOneDecimal = (number) => oneDecimal.format(number);
